"""Training a codec from any corpus: a pool of speech, workers that step together, checkpoints, weights, MLflow.

    <output>/pool/, <output>/valid/     the corpus's speech as memory-mapped samples, made once
    <output>/data.json                  what corpus that is
    <output>/checkpoint.pt              everything the next step depends on
    <output>/export/                    config.json and model.safetensors: what `--codec PATH` takes

A run that was cut off goes on from its checkpoint: batches are a function of the step, so on the same number of workers
and threads it ends in the same weights as a run that was not.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

from infra import devices, storage, tracking
from model.codec_config import CodecConfig, CodecError
from pipeline import codec_weights, training_desk
from pipeline.codec_checkpoints import CHECKPOINT, read_checkpoint
from pipeline.codec_pools import make_pools
from pipeline.train_codec_config import TrainCodecConfig

if TYPE_CHECKING:
    from pipeline.codec_weights import ResolvedCodec


class TrainingFailed(CodecError):
    """Training that began and cannot go on: says why, and what to do."""


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
        from pipeline.codec_training_loop import train_worker

        asked = threading.Event()
        with training_desk.on_term("train_codec", asked.set):
            return train_worker(config, 0, uri, start, asked.is_set)
    return _train_on_ray(config, uri, start)


def _train_on_ray(config: TrainCodecConfig, uri: str, start: ResolvedCodec | None) -> dict[str, float]:
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
    started = read_checkpoint(config.output).get("started_from")
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

    from pipeline.codec_training_loop import train_worker

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
