"""One worker of a codec's training: from the checkpoint through steps, log lines, validations and checkpoints."""

from __future__ import annotations

import datetime
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from infra import allocator, devices, storage, tracking
from model.codec import Codec, levelled
from model.codec_training.quantiser import on_all_workers
from model.codec_training.trainer import CodecTrainer
from pipeline import measures
from pipeline.codec_checkpoints import CHECKPOINT, EXPORT, export, load_checkpoint, save_checkpoint
from pipeline.codec_training import TrainingFailed
from pipeline.progress import pace
from pipeline.speech_pool import Augmentation, SpeechPool
from pipeline.train_codec_config import TrainCodecConfig

if TYPE_CHECKING:
    from pipeline.codec_weights import ResolvedCodec

STARTING = Augmentation(noise=0.1, room=0.1, second_voice=0.03, lowest_level=-14.0)
"""How the speech is varied from which codebooks start before any training."""
_MAX_SKIPPED = 20
"""Steps in a row without finite gradients after which a run stops."""


def train_worker(
    config: TrainCodecConfig, rank: int, uri: str, start: ResolvedCodec | None, asked_to_stop: Callable[[], bool]
) -> dict[str, float]:
    """One worker's loop, from the checkpoint, `start` or random weights; the first worker logs, to MLflow at `uri`,
    saves and validates. All end after the step in which one was asked to."""
    allocator.keep_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    output = storage.absolute(config.output)
    pool = SpeechPool.open(Path(output, "pool"))
    trainer = CodecTrainer(config.codec(), config.recipe(), devices.of_process(config.device))
    if storage.exists(storage.join(output, CHECKPOINT)):
        load_checkpoint(trainer, output)
    elif start:
        trainer.start_from(start.weights)
    tracked = uri if rank == 0 else "none"
    known = tracking.known_run(output) if rank == 0 else None
    with tracking.track("codec", config.name, config, {"data": pool.digest}, known, tracked) as run:
        if rank == 0:
            tracking.remember_run(output, run)
            run.log_input(config.name, pool.digest, config.data, "training")
        return _Loop(config, trainer, pool, run, asked_to_stop, rank).run()


class _Loop:
    """Steps; the first worker's lines of the log, checkpoints and validations."""

    def __init__(
        self,
        config: TrainCodecConfig,
        trainer: CodecTrainer,
        pool: SpeechPool,
        tracked: tracking.Run,
        asked_to_stop: Callable[[], bool],
        rank: int,
    ) -> None:
        self.config, self.trainer, self.pool, self.run_ = config, trainer, pool, tracked
        self.asked_to_stop, self.rank = asked_to_stop, rank
        self.output = storage.absolute(config.output)
        self.log = _Log(config)
        self.skipped_in_a_row = 0

    def run(self) -> dict[str, float]:
        config, trainer = self.config, self.trainer
        if trainer.step_number == 0 and config.quantise_from == 0 and not trainer.quantiser.started:
            self._start_codebooks()
        going_on = True
        while going_on and trainer.step_number < config.steps:
            self._step()
            going_on = on_all_workers(not self.asked_to_stop(), trainer.device)
            if self.rank == 0:
                self._after(trainer.step_number, ends=not going_on or trainer.step_number == config.steps)
        if self.rank == 0 and trainer.step_number >= config.steps and trainer.quantiser.started:
            save_checkpoint(trainer, self.output)
            export(trainer, self.output)
        return self.log.latest | {"step": float(trainer.step_number)}

    def _start_codebooks(self) -> None:
        """Before any training: from the same latents on every worker, so that the codebooks are equal."""
        frames = 8 * self.config.samples // self.config.codec().hop
        batches = math.ceil(self.config.start_latents / frames)
        if self.rank == 0:
            print(f"the codebooks start from {batches * 8 * self.config.segment:.0f} s of speech", flush=True)
        self.trainer.prime(
            self._batch(n, 0, 8, STARTING) for n in tqdm(range(batches), "speech", disable=self.rank > 0, **pace())
        )

    def _batch(self, step: int, worker: int, rows: int, varied: Augmentation | None) -> torch.Tensor:
        """float32 [rows, samples]: what a worker trains on at a step."""
        waves = self.pool.batch(self.config.seed, step, worker, rows, self.config.samples, varied)
        if self.config.level:
            waves = _at_level(waves, self.config.level, np.random.default_rng([self.config.seed, step, worker, 1]))
        return torch.from_numpy(waves)

    def _step(self) -> None:
        """One step. Raises TrainingFailed after too many in a row whose gradients are not finite."""
        config, trainer = self.config, self.trainer
        varied = Augmentation() if config.augment else None
        audio = self._batch(trainer.step_number, self.rank, config.batch // config.workers, varied)
        try:
            self.log.add(trainer.step(audio))
            self.skipped_in_a_row = 0
        except FloatingPointError as error:
            self.skipped_in_a_row += 1
            print(f"step {trainer.step_number} skipped: {error}", flush=True)
            trainer.step_number += 1
            if self.skipped_in_a_row == _MAX_SKIPPED:
                raise TrainingFailed(
                    f"{_MAX_SKIPPED} steps in a row without finite gradients; lower the learning rate"
                ) from None

    def _after(self, step: int, ends: bool) -> None:
        config, trainer = self.config, self.trainer
        last = step == config.steps
        if step % config.log_every == 0 or last:
            self.run_.log_metrics(self.log.line(step), step)
        if step % config.save_every == 0 or ends:
            save_checkpoint(trainer, self.output)
        if trainer.quantiser.started and (step % config.evaluate_every == 0 or last):
            self.run_.log_metrics(validate(trainer, self.output, self.run_), step)


def _at_level(waves: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Segments [rows, samples] as loud as those of utterances at that level are: some softer, some louder."""
    loudness = level * 10 ** (rng.uniform(-7, 3, len(waves)) / 20)
    return np.stack([levelled(wave, share) for wave, share in zip(waves, loudness, strict=True)]).astype(np.float32)


class _Log:
    """Means over the steps since the last line, printed as one line and handed to MLflow."""

    def __init__(self, config: TrainCodecConfig) -> None:
        self.config, self.since, self.rows = config, time.monotonic(), []
        self.latest: dict[str, float] = {}

    def add(self, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)

    def line(self, step: int) -> dict[str, float]:
        names = sorted({name for row in self.rows for name in row})
        means = {name: float(np.mean([row[name] for row in self.rows if name in row])) for name in names}
        seconds = time.monotonic() - self.since
        speech = len(self.rows) * self.config.batch * self.config.segment
        means["audio_seconds_per_second"] = speech / max(seconds, 1e-9)
        left = datetime.timedelta(seconds=round(seconds / max(1, len(self.rows)) * (self.config.steps - step)))
        self.latest, self.rows, self.since = means, [], time.monotonic()
        told = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"step {step} {told} left {left}", flush=True)
        return means


def validate(trainer: CodecTrainer, output: str, run: tracking.Run) -> dict[str, float]:
    """Exports the codec as it is and puts the validation speech through it: numbers, audio, spectrograms."""
    export(trainer, output)
    codec = Codec.load(Path(output, EXPORT))
    valid = SpeechPool.open(Path(output, "valid"))
    originals = [valid.utterance(i) for i in range(len(valid.ends))]
    codes = codec.encode(originals)
    decoded = [codec.beside(wave, o) for wave, o in zip(codec.decode(codes), originals, strict=True)]
    _log_listening(run, originals[:3], decoded[:3], trainer.step_number, codec.config.sample_rate)
    rate = codec.config.sample_rate
    used = measures.perplexity(codes, codec.config.codebook_size)
    result = {f"valid.perplexity.{level}": value for level, value in enumerate(used, 1)}
    first = [codec.beside(w, o) for w, o in zip(codec.decode([c[:1] for c in codes]), originals, strict=True)]
    for name, waves in (("valid.mel_distance", decoded), ("valid.mel_distance.first_codebook", first)):
        distances = [measures.mel_distance(o, d, rate) for o, d in zip(originals, waves, strict=True)]
        result[name] = float(np.mean(distances))
    print(f"step {trainer.step_number} " + " ".join(f"{k} {v:.4g}" for k, v in result.items()), flush=True)
    return result


def _log_listening(run: tracking.Run, originals, decoded, step: int, rate: int) -> None:
    """Waveforms and spectrograms, the original beside the decoded, as artefacts of the run."""
    import soundfile
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(originals)), layout="constrained")
    axes = figure.subplots(len(originals), 2, squeeze=False)
    with tempfile.TemporaryDirectory() as folder:
        for row, pair in enumerate(zip(originals, decoded, strict=True)):
            for column, (what, wave) in enumerate(zip(("original", "decoded"), pair, strict=True)):
                soundfile.write(f"{folder}/{row}-{what}.wav", wave, rate)
                axes[row][column].imshow(measures.log_mel(wave, rate), origin="lower", aspect="auto")
                axes[row][column].set_title(what)
        run.log_artifact(folder, f"listen/step-{step:08d}")
    run.log_figure(figure, f"spectrograms/step-{step:08d}.png")
