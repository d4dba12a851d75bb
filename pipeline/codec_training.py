"""Training a codec from any corpus: a pool of speech, workers that step together, checkpoints, weights, MLflow.

    <output>/pool/, <output>/valid/     the corpus's speech as memory-mapped samples, made once
    <output>/data.json                  what corpus that is
    <output>/checkpoint.pt              everything the next step depends on; tensors, numbers and text only
    <output>/export/                    config.json and model.safetensors: what `--codec PATH` takes

A run that was cut off goes on from its checkpoint: batches are a function of the step, so on the same number of workers
and threads it ends in the same weights as a run that was not.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import allocator, devices, storage, tracking
from infra.config import option
from model.codec import CONFIG_FILE, WEIGHTS_FILE
from model.codec_config import CodecConfig, CodecError
from pipeline import codec_weights, training_desk
from pipeline.codec_pools import make_pools
from pipeline.corpus_options import CorpusOptions
from pipeline.speech_pool import Augmentation, SpeechPool

if TYPE_CHECKING:
    from model.codec_training.trainer import CodecTrainer, Recipe
    from pipeline.codec_weights import ResolvedCodec

CHECKPOINT, EXPORT = "checkpoint.pt", "export"
STARTING = Augmentation(noise=0.05, room=0.05, second_voice=0.0, lowest_level=-14.0)
"""How the speech is varied from which codebooks start before any training."""
_MAX_SKIPPED = 20
"""Steps in a row without finite gradients after which a run stops."""


class TrainingFailed(CodecError):
    """Training that began and cannot go on: says why, and what to do."""


@dataclass(frozen=True)
class TrainCodecConfig(CorpusOptions):
    """From a corpus to a codec of EnCodec's architecture."""

    data: str = option("data/demo/manifest.jsonl", "manifest or folder, as tokenize takes it; over 60 s is left out")
    output: str = option("out/codec", "local folder for the speech, the checkpoint and the exported codec")
    name: str = option("codec", "name of the codec")
    filters: int = option(32, "channels at the full sample rate; they double at every stride")
    ratios: tuple[int, ...] = option((8, 5, 4, 2), "strides, outermost last; their product is the hop")
    dimension: int = option(128, "width of the quantised vector")
    residual_layers: int = option(1, "residual blocks before each stride")
    lstm_layers: int = option(2, "LSTM layers in encoder and decoder each")
    codebooks: int = option(8, "codes a frame")
    codebook_size: int = option(1024, "entries of a codebook")
    steps: int = option(10_000, "steps of the whole run; a longer run goes on from a shorter one's checkpoint")
    batch: int = option(16, "segments a step, over all workers")
    segment: float = option(1.0, "seconds of a segment")
    learning_rate: float = option(5e-5, "AdamW's, after the warm-up; without the transform start, 1e-3")
    transform_start: bool = option(True, "start as a transform codec, where the sizes allow it")
    bias_rate: float = option(0.02, "share of the learning rate for biases; without the transform start, 1")
    warmup: int = option(200, "steps to the full learning rate")
    cooldown: float = option(0.3, "share of the steps, at the end, in which the learning rate falls")
    quantise_from: int = option(500, "step at which the codebooks start; 0: from latents of the untrained networks")
    full_depth: float = option(0.5, "share of the utterances that surely use all codebooks; others use one to all")
    first_alone: float = option(0.0, "share of the utterances that surely use the first codebook alone")
    start_from: str = option("", "codec whose sizes and weights training starts from: demo, encodec_24khz or a folder")
    codec_weights: str | None = option(None, "path or URL of EnCodec's own weights, for machines without internet")
    decoder_only: bool = option(
        False, "train the decoder of start_from alone: its codes, and so datasets and models, stay"
    )
    commitment: float = option(0.1, "pull of the latents towards their codes, as a share of the reconstruction's")
    mel_weight: float = option(1.0, "share of the mel loss in the gradient")
    time_weight: float = option(0.5, "share of the waveform's loss")
    adversarial_from: int = option(0, "step from which the discriminator judges; 0 trains without one")
    discriminator_filters: int = option(8, "channels of its layers")
    discriminator_windows: tuple[int, ...] = option((2048, 1024, 512), "samples of its spectrograms' windows")
    augment: bool = option(True, "vary level, speed, bandwidth, noise and room")
    seed: int = option(0, "of weights and batches")
    workers: int = option(1, "Ray Train workers; 1 trains in the job's own process")
    device: str = option("auto", "where the workers compute", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "threads of each worker on a CPU; 0 leaves it to PyTorch")
    log_every: int = option(50, "steps between lines of the log")
    save_every: int = option(500, "steps between checkpoints")
    evaluate_every: int = option(1000, "steps between validations with audio and spectrograms")
    tracking: str = option("", tracking.OPTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.codec()
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, not {self.steps}")
        for field in ("batch", "warmup", "workers", "log_every", "save_every", "evaluate_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not self.start_from and 0 < self.quantise_from >= self.steps:
            raise ValueError(
                f"quantise_from {self.quantise_from} must be below steps {self.steps}: otherwise the codebooks never "
                "start, and no codec comes out"
            )
        if self.batch % self.workers:
            raise ValueError(f"batch {self.batch} cannot be divided over {self.workers} workers")
        if self.samples < 2 * self.codec().hop:
            raise ValueError(f"segment {self.segment} s is shorter than two frames")
        if not (self.full_depth >= 0 and self.first_alone >= 0 and self.full_depth + self.first_alone <= 1):
            raise ValueError(
                f"full_depth {self.full_depth} and first_alone {self.first_alone} must be shares of one whole"
            )
        if self.decoder_only and not self.start_from:
            raise ValueError("decoder_only needs a codec to start_from")
        if self.codec_weights and self.start_from != "encodec_24khz":
            raise ValueError(
                f"codec_weights needs start_from encodec_24khz, whose weights they are, not {self.start_from!r}"
            )
        if not storage.is_local(self.output):
            raise ValueError(f"output {self.output} must be a local folder or one that all workers have mounted")

    @property
    def samples(self) -> int:
        """Samples of a segment: a whole number of frames."""
        codec = self.codec()
        return int(self.segment * codec.sample_rate) // codec.hop * codec.hop

    def codec(self) -> CodecConfig:
        return CodecConfig(
            self.name,
            filters=self.filters,
            ratios=tuple(self.ratios),
            dimension=self.dimension,
            residual_layers=self.residual_layers,
            lstm_layers=self.lstm_layers,
            codebooks=self.codebooks,
            codebook_size=self.codebook_size,
        )

    def recipe(self) -> Recipe:
        from model.codec_training.trainer import Recipe

        return Recipe(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe) if hasattr(self, f.name)})


def train(config: TrainCodecConfig) -> dict[str, float]:
    """Trains to the last step, or until SIGTERM, from the checkpoint in `output` if there is one; returns the last log
    line's numbers and the `step` that was reached.

    Raises:
        CodecError: no usable speech, a checkpoint of another architecture or start.
        TrainingFailed: steps without finite gradients.
        ManifestError: the data cannot be read.
    """
    config = resolve(config)
    start = codec_weights.resolve(config.start_from, config.codec_weights) if config.start_from else None
    if start:
        config = adopt(config, start.config)
        require_same_start(config, start.digest)
    make_pools(config)
    uri = tracking.resolved(config.tracking)
    if config.workers == 1:
        asked = threading.Event()
        with training_desk.on_term("train_codec", asked.set):
            return train_worker(config, 0, uri, start, asked.is_set)
    import ray
    import ray.train

    from pipeline.ray_trainer import Trainer

    cuda = devices.of_cluster(config.device) == "cuda"
    threads = config.threads or 1
    scaling = ray.train.ScalingConfig(
        num_workers=config.workers, use_gpu=cuda, resources_per_worker={"CPU": threads} | ({"GPU": 1} if cuda else {})
    )
    run = ray.train.RunConfig(
        name="ray-train",
        storage_path=config.output,
        failure_config=ray.train.FailureConfig(max_failures=3),
    )
    desk = training_desk.opened()
    with training_desk.on_term("train_codec", desk.ask.remote):
        Trainer(
            _ray_worker,
            train_loop_config={"config": config, "desk": desk, "uri": uri, "start": start},
            scaling_config=scaling,
            run_config=run,
        ).fit()
    if error := ray.get(desk.given_up.remote()):
        raise error
    return ray.get(desk.results.remote())


def resolve(config: TrainCodecConfig) -> TrainCodecConfig:
    """Relative paths are the caller's, not the workers'."""
    data = config.root if config.corpus else config.data
    if storage.is_local(data) and storage.exists(data):  # or a pair of files, read by the caller alone
        data = storage.absolute(data)
    weights = storage.absolute(config.codec_weights) if config.codec_weights else None
    named = not config.start_from or config.start_from in codec_weights.NAMES
    start = config.start_from if named else storage.absolute(config.start_from)
    output = storage.absolute(config.output)
    return dataclasses.replace(config, data=data, output=output, start_from=start, codec_weights=weights)


def adopt(config: TrainCodecConfig, found: CodecConfig) -> TrainCodecConfig:
    """The settings with the sizes of the codec in `start_from`, and with its name where its codes stay.

    Raises:
        CodecError: it has sizes that this job does not train.
    """
    settable = {field.name for field in dataclasses.fields(config)} - ({"name"} if not config.decoder_only else set())
    adopted = dataclasses.replace(config, **{n: v for n, v in vars(found).items() if n in settable})
    theirs, ours = found.to_dict(), adopted.codec().to_dict() | {"name": found.name}
    if differing := [f"{name} {theirs[name]}" for name in ours if theirs[name] != ours[name]]:
        raise CodecError(f"the codec in start_from {config.start_from} cannot be trained here: {', '.join(differing)}")
    return adopted


def require_same_start(config: TrainCodecConfig, digest: str) -> None:
    """Raises CodecError where a checkpoint is there of a run that did not start from the weights with this digest."""
    if not storage.exists(storage.join(config.output, CHECKPOINT)):
        return
    started = _read_checkpoint(config.output).get("started_from")
    if started not in (None, digest):  # checkpoints from before it was kept do not tell
        theirs = f"the weights {started[:12]}…" if started else "random weights"
        raise CodecError(
            f"{config.output} holds a run that started from {theirs}, not from those of {config.start_from} "
            f"({digest[:12]}…); choose another --output, or take this --start-from back"
        )


def _ray_worker(settings: dict[str, Any]) -> None:
    """One worker. A CodecError would come again: workers that are started after it have nothing to do."""
    import ray
    import ray.train

    desk = settings["desk"]
    if ray.get(desk.given_up.remote()):
        return
    try:
        rank = ray.train.get_context().get_world_rank()
        asked_to_stop = training_desk.question(desk) if rank == 0 else lambda: False
        metrics = train_worker(settings["config"], rank, settings["uri"], settings["start"], asked_to_stop)
    except CodecError as error:
        ray.get(desk.give_up.remote(error))
        raise
    if rank == 0:
        ray.get(desk.finish.remote(metrics))


def train_worker(
    config: TrainCodecConfig, rank: int, uri: str, start: ResolvedCodec | None, asked_to_stop: Callable[[], bool]
) -> dict[str, float]:
    """One worker's loop, from the checkpoint, `start` or random weights; the first worker logs, to MLflow at `uri`,
    saves and validates. All end after the step in which one was asked to."""
    import torch

    from model.codec_training.trainer import CodecTrainer

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
        return _loop(config, trainer, pool, run, rank, output, asked_to_stop)


def _loop(
    config: TrainCodecConfig,
    trainer: CodecTrainer,
    pool: SpeechPool,
    run: tracking.Run,
    rank: int,
    output: str,
    asked_to_stop: Callable[[], bool],
) -> dict[str, float]:
    import torch

    from model.codec_training.quantiser import on_all_workers

    if trainer.step_number == 0 and config.quantise_from == 0 and not trainer.quantiser.started:
        # Every worker remembers the same latents, so that their codebooks start equal
        trainer.prime(torch.from_numpy(pool.batch(config.seed, n, 0, 8, config.samples, STARTING)) for n in range(56))
    log = _Log(config)
    skipped, going_on = 0, True
    while going_on and trainer.step_number < config.steps:
        rows = pool.batch(
            config.seed,
            trainer.step_number,
            rank,
            config.batch // config.workers,
            config.samples,
            Augmentation() if config.augment else None,
        )
        try:
            log.add(trainer.step(torch.from_numpy(rows)))
            skipped = 0
        except FloatingPointError as error:
            skipped += 1
            print(f"step {trainer.step_number} skipped: {error}", flush=True)
            trainer.step_number += 1
            if skipped == _MAX_SKIPPED:
                raise TrainingFailed(
                    f"{skipped} steps in a row without finite gradients; lower the learning rate"
                ) from None
        going_on = on_all_workers(not asked_to_stop(), trainer.device)
        step, last = trainer.step_number, trainer.step_number == config.steps
        if rank:
            continue
        if step % config.log_every == 0 or last:
            run.log_metrics(log.line(step), step)
        if step % config.save_every == 0 or last or not going_on:
            save_checkpoint(trainer, output)
        if trainer.quantiser.started and (step % config.evaluate_every == 0 or last):
            run.log_metrics(validate(trainer, output, run), step)
    if rank == 0 and trainer.step_number >= config.steps and trainer.quantiser.started:
        save_checkpoint(trainer, output)
        export(trainer, output)
    return log.latest | {"step": float(trainer.step_number)}


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
    from model.codec import Codec
    from pipeline import measures

    export(trainer, output)
    codec = Codec.load(Path(output, EXPORT))
    valid = SpeechPool.open(Path(output, "valid"))
    originals = [valid.utterance(i) for i in range(len(valid.ends))]
    codes = codec.encode(originals)
    decoded = [wave[: len(o)] for wave, o in zip(codec.decode(codes), originals, strict=True)]
    _log_listening(run, originals[:3], decoded[:3], trainer.step_number, codec.config.sample_rate)
    rate = codec.config.sample_rate
    used = measures.perplexity(codes, codec.config.codebook_size)
    result = {f"valid.perplexity.{level}": value for level, value in enumerate(used, 1)}
    first = [wave[: len(o)] for wave, o in zip(codec.decode([c[:1] for c in codes]), originals, strict=True)]
    for name, waves in (("valid.mel_distance", decoded), ("valid.mel_distance.first_codebook", first)):
        distances = [measures.mel_distance(o, d, rate) for o, d in zip(originals, waves, strict=True)]
        result[name] = float(np.mean(distances))
    print(f"step {trainer.step_number} " + " ".join(f"{k} {v:.4g}" for k, v in result.items()), flush=True)
    return result


def _log_listening(run: tracking.Run, originals, decoded, step: int, rate: int) -> None:
    """Waveforms and spectrograms, the original beside the decoded, as artefacts of the run."""
    import tempfile

    import soundfile
    from matplotlib.figure import Figure

    from pipeline.measures import log_mel

    figure = Figure(figsize=(10, 2.2 * len(originals)), layout="constrained")
    axes = figure.subplots(len(originals), 2, squeeze=False)
    with tempfile.TemporaryDirectory() as folder:
        for row, pair in enumerate(zip(originals, decoded, strict=True)):
            for column, (what, wave) in enumerate(zip(("original", "decoded"), pair, strict=True)):
                soundfile.write(f"{folder}/{row}-{what}.wav", wave, rate)
                axes[row][column].imshow(log_mel(wave, rate), origin="lower", aspect="auto")
                axes[row][column].set_title(what)
        run.log_artifact(folder, f"listen/step-{step:08d}")
    run.log_figure(figure, f"spectrograms/step-{step:08d}.png")


def save_checkpoint(trainer: CodecTrainer, output: str) -> None:
    import torch

    content = io.BytesIO()
    torch.save(trainer.state_dict(), content)
    storage.write_bytes(storage.join(output, CHECKPOINT), content.getvalue())


def load_checkpoint(trainer: CodecTrainer, output: str) -> None:
    """Raises CodecError where the checkpoint is damaged or trains another architecture."""
    trainer.load_state_dict(_read_checkpoint(output))


def _read_checkpoint(output: str) -> dict[str, Any]:
    import pickle

    import torch

    url = storage.join(output, CHECKPOINT)
    try:
        return torch.load(io.BytesIO(storage.read_bytes(url)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CodecError(f"{url} is no checkpoint of train_codec: {error}; delete it to start anew") from None


def export(trainer: CodecTrainer, output: str) -> None:
    """Writes `output`/export, the weights first. Raises CodecError before the codebooks have started."""
    folder = storage.join(output, EXPORT)
    storage.write_bytes(storage.join(folder, WEIGHTS_FILE), trainer.weights())
    storage.write_text(storage.join(folder, CONFIG_FILE), json.dumps(trainer.config.to_dict(), indent=2) + "\n")
