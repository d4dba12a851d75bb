"""One worker of a training run: from the newest checkpoint through steps, log lines, validations and checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from infra import allocator, storage, tracking
from infra.hardware import peak_flops
from model.lina import Lina
from pipeline import model_export
from pipeline import training_checkpoints as checkpoints
from pipeline.loader import Loader
from pipeline.phonemes import INVENTORY
from pipeline.pretrain_config import PretrainConfig
from pipeline.token_index import TokenIndex
from pipeline.training_data import open_index, require_same, schedule_of
from pipeline.training_engine import Engine, StepResult
from pipeline.training_log import StepLog, tell
from pipeline.training_start import PretrainError, starting_card, starting_model
from pipeline.validation import validate


def train(config: PretrainConfig, device: torch.device, uri: str, asked_to_stop: Callable[[], bool]) -> dict[str, Any]:
    """One worker's part of a run, within an initialised process group; returns the last step's numbers."""
    allocator.keep_memory()
    torch.use_deterministic_algorithms(device.type == "cpu")
    rank, world, run = dist.get_rank(), dist.get_world_size(), config.output
    index = open_index(config)
    start = [checkpoints.prepare(run, world, config.zero_stage) if rank == 0 else None]
    dist.broadcast_object_list(start)
    resumed = start[0]
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    start, started_from = _start(config, resumed[0] if resumed else None)
    engine = Engine(config, device, bf16, load_universal=bool(resumed and resumed[1]), start=start)
    if resumed:
        require_same(resumed[0], config, index)
        checkpoints.load(engine, resumed[0])
    known = tracking.known_run(run) if rank == 0 else None
    tags = {"dataset": index.digest, "codec": index.codec["name"], "codec_digest": index.codec["digest"]}
    with tracking.track(
        config.experiment, config.name, config, tags, known, uri if rank == 0 else "none", system_metrics=rank == 0
    ) as tracked:
        if rank == 0:
            tracking.remember_run(run, tracked)
            tracked.log_input(os.path.basename(config.data), index.digest, config.data, "training")
        facts = resumed[0].facts if resumed else {"step": 0}
        skipped = facts.get("skipped", 0)  # checkpoints from before it was noted do not have it
        return _Loop(config, engine, index, tracked, asked_to_stop, started_from, skipped).run(facts["step"])


def _start(config: PretrainConfig, resumed: checkpoints.Checkpoint | None) -> tuple[Lina | None, str]:
    """(the weights that a new run starts from, if they are not random; the fingerprint of their model, or nothing)."""
    if resumed:
        return None, resumed.facts["model"]["training"].get("started_from", "")
    if not config.start_from:
        return None, ""
    return starting_model(config), starting_card(config).fingerprint


def _peak_flops(engine: Engine) -> float:
    """FLOP a second of one worker; tells where fp32 would reach more, as on CPUs without instructions for bf16."""
    peak = peak_flops(engine.device, engine.bf16)
    if engine.bf16 and engine.device.type == "cpu" and (other := peak_flops(engine.device, bf16=False)) > peak:
        tell(
            f"pretrain: on this CPU matrix products reach {peak / 1e9:.0f} GFLOP/s in bf16 and {other / 1e9:.0f} in "
            "fp32: a run with --precision fp32, in another --output, would be faster"
        )
    return peak


class _Loop:
    """Steps, lines of the log, checkpoints, validations."""

    def __init__(
        self,
        config: PretrainConfig,
        engine: Engine,
        index: TokenIndex,
        tracked: tracking.Run,
        asked_to_stop: Callable[[], bool],
        started_from: str,
        skipped: int,
    ) -> None:
        self.config, self.engine, self.index, self.run_ = config, engine, index, tracked
        self.asked_to_stop, self.folder, self.started_from = asked_to_stop, config.output, started_from
        self.first = engine.rank == 0
        self.log = None
        if self.first:
            peak = _peak_flops(engine) * engine.world
            self.log = StepLog(config, peak, engine.device, tracked, self.folder, skipped)
        self.skipped_in_a_row = 0

    def run(self, step: int) -> dict[str, Any]:
        config, engine = self.config, self.engine
        schedule = schedule_of(config, self.index)
        loader = Loader(
            schedule,
            rank=engine.rank,
            world=engine.world,
            start_step=step,
            stop_step=config.steps,
            prefetch=config.prefetch,
            cache=config.cache_folder,
            cache_bytes=config.cache_bytes,
            max_bad_samples=config.max_bad_samples,
            max_bad_shards=config.max_bad_shards,
        )
        result: StepResult | None = None
        saved = step
        with loader:
            for step, micro_batches, waited in loader:
                batches = [micro.batch if micro.rows.size else None for micro in micro_batches]
                result = engine.step(step, batches, self.asked_to_stop(), len(loader.bad))
                done = step + 1
                if self.log:
                    self.log.line(done, result, self.index, schedule.batch(step), waited)
                self._refuse_endless_skipping(result, done)
                last = done == config.steps or result.stop
                if done % config.save_every == 0 or last:
                    self._save(done)
                    saved = done
                # After saving: what fails here costs no steps
                if done % config.evaluate_every == 0 or done == config.steps:
                    self._evaluate(done)
                if result.stop:
                    break
        if saved >= config.steps:
            self._finish(saved)
        return self.log.latest if self.log else {}

    def _refuse_endless_skipping(self, result: StepResult, step: int) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.skipped_in_a_row < self.config.max_skipped:
            return
        if not result.tokens:
            raise PretrainError(
                f"no sample of step {step} can be read, and {self.skipped_in_a_row} steps in a row were skipped; run "
                f"jobs/verify.py on {self.config.data}"
            )
        raise PretrainError(
            f"{self.skipped_in_a_row} steps in a row, to step {step}, had gradients that were not finite or more than "
            f"{self.config.explode:g} times the usual; start another run with a lower learning_rate: --start-from "
            f"takes what jobs/export.py makes of {self.folder}"
        )

    def _evaluate(self, step: int) -> None:
        metrics = validate(self.config, self.engine, self.index, self.run_, step)
        if self.log:
            if metrics:
                self.log.validation(step, metrics)
            self.log.go_on()

    def _save(self, step: int) -> None:
        checkpoints.save(self.engine, self.folder, step, self._facts(), self.config.keep)
        if self.log:
            self.log.go_on()

    def _facts(self) -> dict[str, Any]:
        return {
            "identity": self.config.identity(),
            "dataset": self.index.digest,
            "run_id": self.run_.run_id,
            **({"skipped": self.log.skipped} if self.log else {}),
            "model": {
                "sizes": self.config.sizes().to_dict(),
                "inventory": list(INVENTORY),
                "codec": self.index.codec,
                "training": {
                    "name": self.config.name,
                    "dataset": self.index.digest,
                    "run_id": self.run_.run_id,
                    "config": self.config.identity(),
                    **({"started_from": self.started_from} if self.started_from else {}),
                },
            },
        }

    def _finish(self, step: int) -> None:
        """The portable model beside the checkpoints, and in MLflow's registry."""
        if not self.first:
            return
        output = storage.join(self.folder, model_export.EXPORT)
        card = model_export.export(model_export.find(self.folder), output)
        tell(f"pretrain: the model of step {step:,} is in {output}, fingerprint {card.fingerprint[:16]}")
        self.run_.set_tags({"fingerprint": card.fingerprint})
        self.run_.log_artifact(output, model_export.EXPORT)
        tags = {"fingerprint": card.fingerprint, "step": str(step)}
        self.run_.register_model(self.config.name, model_export.EXPORT, tags)
