"""Pretraining on Ray Train: the driver, which starts workers, hands SIGTERM on, and says what came out.

    <output>/checkpoints/      see pipeline.training_checkpoints
    <output>/export/           the portable model, made at the end of the run
    <output>/losses.jsonl      a line a step: what the run's log says, for whoever wants to plot without MLflow

A step is a function of (dataset, config, step, checkpoint), so a run that was killed goes on to the same numbers.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from infra import storage, tracking
from model.lina_config import PRESETS
from pipeline import training_desk
from pipeline.model_export import EXPORT
from pipeline.pretrain_config import PretrainConfig
from pipeline.training_checkpoints import CheckpointError, newest
from pipeline.training_data import open_index, require_same, schedule_of
from pipeline.training_start import PretrainError


class TrainingFailed(PretrainError):
    """Training that began and cannot go on: says why, and what to do."""


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Trains to the last step, or until SIGTERM; on the Ray that is connected. Returns the last step's numbers.

    Raises:
        DataError, CheckpointError, PretrainError: refused before any training.
        TrainingFailed: workers met what would come again, however often they were started.
        ray.train.TrainingFailedError: workers failed more often than `max_failures`.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig

    from pipeline.ray_trainer import Trainer

    config = resolve(config)
    exported = storage.join(config.output, EXPORT, "config.json")
    if nothing_left(config) and storage.exists(exported):
        print(f"pretrain: nothing is left of {config.steps:,} steps; the model is {exported}")
        return {}
    device, why = device_of(config)
    print(f"pretrain: {config.workers} worker{'s' * (config.workers > 1)} on {device} ({why})", flush=True)
    cuda = device == "cuda"
    cpus = config.threads or (4 if cuda else max(1, int(ray.cluster_resources().get("CPU", 1)) // config.workers))
    scaling = ray.train.ScalingConfig(
        num_workers=config.workers, use_gpu=cuda, resources_per_worker={"CPU": cpus} | ({"GPU": 1} if cuda else {})
    )
    remote = not storage.is_local(config.output)
    arrow, folder = storage.arrow_filesystem(config.output) if remote else (None, config.output)
    run = ray.train.RunConfig(
        name="ray-train",
        storage_path=folder,
        storage_filesystem=arrow,
        failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
    )
    desk = training_desk.opened()
    with training_desk.on_term("pretrain", desk.ask.remote):
        Trainer(
            _ray_worker,
            # Where the first worker tracks: the caller's folder is not the worker's
            train_loop_config={
                **{"config": config, "desk": desk, "threads": cpus},
                "uri": tracking.resolved(config.tracking),
            },
            scaling_config=scaling,
            run_config=run,
            torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        ).fit()
        if error := ray.get(desk.given_up.remote()):
            raise error
        return ray.get(desk.results.remote())


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Relative paths are the caller's, not the workers'; a run without a name has that of its folder."""
    model = config.model if config.model in PRESETS else storage.absolute(config.model)
    zero = config.zero if config.zero.isdigit() else storage.absolute(config.zero)
    start = storage.absolute(config.start_from) if config.start_from else ""
    data, output = storage.absolute(config.data), storage.absolute(config.output)
    name = config.name or output.rpartition("/")[2]
    return dataclasses.replace(config, data=data, output=output, name=name, model=model, zero=zero, start_from=start)


def nothing_left(config: PretrainConfig) -> bool:
    """Whether the run has been to its end; refuses what can be known to be wrong before any worker starts.

    Raises:
        DataError, PretrainError, CheckpointError.
    """

    index = open_index(config)
    schedule_of(config, index).require_world(config.workers)
    found = newest(config.output)
    if found:
        require_same(found, config, index)
    return found is not None and found.step >= config.steps


def device_of(config: PretrainConfig) -> tuple[str, str]:
    """(where the workers compute, why): `auto` means a GPU where the cluster has one for each worker now."""
    import ray

    if config.device != "auto":
        return config.device, "as --device says"
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus >= config.workers:
        return "cuda", f"auto: GPUs that are up: {gpus}"
    if gpus:
        return "cpu", f"auto: only {gpus} of {config.workers} GPUs up; --device cuda waits for all"
    return "cpu", "auto: no GPU is up; --device cuda waits for one"


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
    desk = settings["desk"]
    first = context.get_world_rank() == 0
    asked_to_stop = training_desk.question(desk) if first else lambda: False
    if ray.get(desk.given_up.remote()):
        return
    from pipeline.training_loop import train

    try:
        metrics = train(settings["config"], ray.train.torch.get_device(), settings["uri"], asked_to_stop)
    except Exception as error:
        if not _may_pass(error):
            refused = isinstance(error, CheckpointError)
            told = error if refused else TrainingFailed(f"{type(error).__name__}: {error}")
            ray.get(desk.give_up.remote(told))
        raise
    if first:
        ray.get(desk.finish.remote(metrics))


def _may_pass(error: Exception) -> bool:
    """Whether starting the workers again may help: a lost peer, memory or storage, not what would come again."""
    return isinstance(error, RuntimeError | OSError) and not isinstance(error, PretrainError | CheckpointError)
