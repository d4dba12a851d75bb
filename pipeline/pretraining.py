"""Pretraining on Ray Train: workers that step together through DeepSpeed, and a driver that starts and stops them.

    <output>/checkpoints/      see pipeline.training_checkpoints
    <output>/export/           the portable model, made at the end of the run
    <output>/losses.jsonl      a line a step: what the run's log says, for whoever wants to plot without MLflow

A step is a function of (dataset, config, step, checkpoint), so a run that was killed goes on to the same numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from infra import storage, tracking
from model.lina_config import PRESETS
from pipeline.pretrain_config import PretrainConfig

if TYPE_CHECKING:
    import torch

    from pipeline.schedule import Schedule
    from pipeline.token_index import TokenIndex
    from pipeline.training_checkpoints import Checkpoint
    from pipeline.training_engine import Engine, StepResult


class PretrainError(RuntimeError):
    """A run that cannot start or go on: says why, and what to do."""


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Trains to the last step, or until SIGTERM; on the Ray that is connected. Returns the last step's numbers.

    Raises:
        DataError, CheckpointError, PretrainError: refused before any worker starts.
        ray.train.TrainingFailedError: workers failed more often than `max_failures`.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    config = resolve(config)
    check(config)
    cuda = device_of(config) == "cuda"
    cpus = config.threads or (4 if cuda else max(1, int(ray.cluster_resources().get("CPU", 1)) // config.workers))
    scaling = ray.train.ScalingConfig(
        num_workers=config.workers, use_gpu=cuda, resources_per_worker={"CPU": cpus} | ({"GPU": 1} if cuda else {})
    )
    run = ray.train.RunConfig(
        name="ray-train",
        storage_path=config.output,
        failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
    )
    with _stopping() as desk:
        TorchTrainer(
            _ray_worker,
            train_loop_config={"config": config, "desk": desk, "threads": cpus, "uri": _tracking_uri(config)},
            scaling_config=scaling,
            run_config=run,
            torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        ).fit()
        if error := ray.get(desk.given_up.remote()):
            raise PretrainError(error)
        return ray.get(desk.results.remote())


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Relative paths are the caller's, not the workers'."""
    model = config.model if config.model in PRESETS else storage.absolute(config.model)
    zero = config.zero if config.zero.isdigit() else storage.absolute(config.zero)
    return dataclasses.replace(
        config, data=storage.absolute(config.data), output=storage.absolute(config.output), model=model, zero=zero
    )


def check(config: PretrainConfig) -> None:
    """What can be known before any worker starts. Raises DataError, PretrainError, CheckpointError."""
    from pipeline.training_checkpoints import newest

    index = open_index(config)
    schedule_of(config, index).require_world(config.workers)
    found = newest(config.output)
    if found is None:
        return
    _require_same(found, config, index)
    if found.step >= config.steps:
        print(f"pretrain: {found.url} is of step {found.step:,}; nothing is left of {config.steps:,}")


def open_index(config: PretrainConfig) -> TokenIndex:
    """The dataset's index, within the limits on length; checked against the model's sizes."""
    from pipeline.token_index import TokenIndex

    index = TokenIndex.open(config.data, config.cache_folder)
    index.require_codec(index.codec, config.codebooks)
    if (size := config.sizes().codebook_size) != index.codec["codebook_size"]:
        raise PretrainError(
            f"model {config.model} has codebooks of {size}, {config.data} codes of {index.codec['codebook_size']}; set "
            "codebook_size in a JSON file of sizes and name that as model"
        )
    rate = index.codec["frame_rate"]
    return index.only(max(1, round(config.min_seconds * rate)), round(config.max_seconds * rate), min_phones=1)


def schedule_of(config: PretrainConfig, index: TokenIndex) -> Schedule:
    from pipeline.schedule import Schedule

    train, _ = index.split(config.valid_fraction)
    return Schedule(train, config.seed, config.budget, config.codebooks, config.accumulate)


def device_of(config: PretrainConfig) -> str:
    """`auto` means a GPU where the cluster has one for each worker."""
    import ray

    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= config.workers else "cpu"


def _tracking_uri(config: PretrainConfig) -> str:
    """Where the first worker tracks: the caller's folder is not the worker's."""
    return config.tracking or tracking.default_uri()


class _Desk:
    """An actor between driver and workers: whether to stop, what no restart would mend, what came out."""

    def __init__(self) -> None:
        self.asked, self.error, self.metrics = False, None, {}

    def ask(self) -> None:
        self.asked = True

    def was_asked(self) -> bool:
        return self.asked

    def give_up(self, error: str) -> None:
        self.error = self.error or error

    def given_up(self) -> str | None:
        return self.error

    def finish(self, metrics: dict[str, Any]) -> None:
        self.metrics = metrics

    def results(self) -> dict[str, Any]:
        return self.metrics


@contextmanager
def _stopping():
    """SIGTERM (what `ray job stop` and machines that go away send) ends the run after its step, with a checkpoint."""
    import threading

    import ray

    desk = ray.remote(num_cpus=0)(_Desk).remote()

    def on_term(number, frame) -> None:
        print("pretrain: asked to stop; writing a checkpoint after this step", file=sys.stderr, flush=True)
        desk.ask.remote()

    if threading.current_thread() is not threading.main_thread():
        yield desk
        return
    before = signal.signal(signal.SIGTERM, on_term)
    try:
        yield desk
    finally:
        signal.signal(signal.SIGTERM, before)


def _ray_worker(settings: dict[str, Any]) -> None:
    """One worker: DeepSpeed finds the process group that Ray Train has made."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    for name, value in (
        ("RANK", context.get_world_rank()),
        ("LOCAL_RANK", context.get_local_rank()),
        ("WORLD_SIZE", context.get_world_size()),
    ):
        os.environ[name] = str(value)
    torch.set_num_threads(settings["threads"])
    desk, waiting = settings["desk"], []

    def asked_to_stop() -> bool:
        """Without waiting for the answer: it is that of a question put some steps ago."""
        if context.get_world_rank():
            return False
        if not waiting:
            waiting.append(desk.was_asked.remote())
        ready, _ = ray.wait(waiting, timeout=0)
        if not ready:
            return False
        waiting.clear()
        return ray.get(ready[0])

    if ray.get(desk.given_up.remote()):
        return
    try:
        metrics = train(settings["config"], ray.train.torch.get_device(), settings["uri"], asked_to_stop)
    except Exception as error:
        if not _may_pass(error):
            ray.get(desk.give_up.remote(f"{type(error).__name__}: {error}"))
        raise
    if context.get_world_rank() == 0:
        ray.get(desk.finish.remote(metrics))


def _may_pass(error: Exception) -> bool:
    """Whether starting the workers again may help: a lost peer, memory or storage, not what would come again."""
    from pipeline.training_checkpoints import CheckpointError

    return isinstance(error, RuntimeError | OSError) and not isinstance(error, PretrainError | CheckpointError)


def train(config: PretrainConfig, device: torch.device, uri: str, asked_to_stop=lambda: False) -> dict[str, Any]:
    """One worker's part of a run, within an initialised process group; returns the last step's numbers."""
    import torch
    import torch.distributed as dist

    from pipeline import training_checkpoints as checkpoints
    from pipeline.training_engine import Engine

    torch.use_deterministic_algorithms(device.type == "cpu")
    rank, world, run = dist.get_rank(), dist.get_world_size(), config.output
    index = open_index(config)
    start = [checkpoints.prepare(run, world, config.zero_stage) if rank == 0 else None]
    dist.broadcast_object_list(start)
    resumed = start[0]
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    engine = Engine(config, device, bf16, load_universal=bool(resumed and resumed[1]))
    if resumed:
        _require_same(resumed[0], config, index)
        checkpoints.load(engine, resumed[0])
    known = tracking.known_run(run) if rank == 0 else None
    tags = {"dataset": index.digest, "codec": index.codec["name"], "codec_digest": index.codec["digest"]}
    with tracking.track(
        config.experiment, config.name, config, tags, known, uri if rank == 0 else "none", system_metrics=rank == 0
    ) as tracked:
        if rank == 0:
            tracking.remember_run(run, tracked)
            tracked.log_input(os.path.basename(config.data), index.digest, config.data, "training")
        return _Loop(config, engine, index, tracked, asked_to_stop).run(resumed[0].step if resumed else 0)


class _Loop:
    """Steps, lines of the log, checkpoints, validations."""

    def __init__(self, config: PretrainConfig, engine: Engine, index: TokenIndex, tracked: Any, asked_to_stop) -> None:
        from infra.hardware import peak_flops
        from pipeline.training_log import StepLog

        self.config, self.engine, self.index, self.run_ = config, engine, index, tracked
        self.asked_to_stop, self.folder = asked_to_stop, config.output
        self.first = engine.rank == 0
        peak = peak_flops(engine.device, engine.bf16) * engine.world if self.first else 1.0
        self.log = StepLog(config, peak, engine.device, tracked, self.folder) if self.first else None
        self.skipped = 0

    def run(self, step: int) -> dict[str, Any]:
        from pipeline.loader import Loader

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
            max_bad_samples=config.max_bad_samples,
        )
        result: StepResult | None = None
        saved = step
        with loader:
            for step, micro_batches, waited in loader:
                batches = [micro.batch if micro.rows.size else None for micro in micro_batches]
                result = engine.step(step, batches, self.asked_to_stop())
                done = step + 1
                if self.log:
                    self.log.line(done, result, self.index, schedule.batch(step), waited, len(loader.bad))
                self._refuse_endless_skipping(result, done)
                last = done == config.steps or result.stop
                if done % config.evaluate_every == 0 or done == config.steps:
                    self._evaluate(done)
                if done % config.save_every == 0 or last:
                    self._save(done)
                    saved = done
                if result.stop:
                    break
        if saved >= config.steps:
            self._finish(saved)
        return self.log.latest if self.log else {}

    def _refuse_endless_skipping(self, result: StepResult, step: int) -> None:
        self.skipped = self.skipped + 1 if result.skipped else 0
        if self.skipped >= self.config.max_skipped:
            raise PretrainError(
                f"{self.skipped} steps in a row, to step {step}, had gradients that were not finite or more than "
                f"{self.config.explode:g} times the usual; lower learning_rate, or go back to an earlier checkpoint by "
                f"removing later ones in {self.folder}/checkpoints"
            )

    def _evaluate(self, step: int) -> None:
        from pipeline.validation import validate

        metrics = validate(self.config, self.engine, self.index, self.run_, step)
        if self.log and metrics:
            self.log.validation(step, metrics)

    def _save(self, step: int) -> None:
        from pipeline import training_checkpoints as checkpoints

        checkpoints.save(self.engine, self.folder, step, self._facts(), self.config.keep)

    def _facts(self) -> dict[str, Any]:
        from pipeline.phonemes import INVENTORY

        return {
            "identity": self.config.identity(),
            "dataset": self.index.digest,
            "run_id": self.run_.run_id,
            "model": {
                "sizes": self.config.sizes().to_dict(),
                "inventory": list(INVENTORY),
                "codec": self.index.codec,
                "training": {
                    "name": self.config.name,
                    "dataset": self.index.digest,
                    "run_id": self.run_.run_id,
                    "config": self.config.identity(),
                },
            },
        }

    def _finish(self, step: int) -> None:
        """The portable model beside the checkpoints, and in MLflow's registry."""
        if not self.first:
            return
        from pipeline import model_export
        from pipeline.training_log import tell

        output = storage.join(self.folder, model_export.EXPORT)
        card = model_export.export(model_export.find(self.folder), output)
        tell(f"pretrain: the model of step {step:,} is in {output}, fingerprint {card.fingerprint[:16]}")
        self.run_.set_tags({"fingerprint": card.fingerprint})
        self.run_.log_artifact(output, "export" if not storage.is_local(output) else None)
        self.run_.register_model(self.config.name, "export", {"fingerprint": card.fingerprint, "step": str(step)})


def _require_same(found: Checkpoint, config: PretrainConfig, index: TokenIndex) -> None:
    """Raises PretrainError where a checkpoint is of another dataset or another recipe, with what differs."""
    before, now = found.facts["identity"], json.loads(json.dumps(config.identity()))
    differing = [f"{name}: {before.get(name)} → {now[name]}" for name in now if before.get(name) != now[name]]
    if found.facts["dataset"] != index.digest:
        differing.insert(0, f"dataset: {found.facts['dataset'][:12]}… → {index.digest[:12]}…")
    if differing:
        raise PretrainError(
            f"{config.output} holds a run with other settings ({'; '.join(differing)}); choose another --output, or "
            "take these back"
        )
