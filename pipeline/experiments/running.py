"""An experiment from its configuration to its section of the report; the same again does what is missing."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from infra import devices, storage
from model.lina_config import PRESETS
from pipeline.experiments import cells as grid
from pipeline.experiments import report
from pipeline.experiments.cells import ExperimentError
from pipeline.experiments.config import ExperimentsConfig

_MODULES = {
    "gla-vs-attention": "twins",
    "ist-ablation": "ist_ablation",
    "data-amount": "data_amount",
    "robustness": "robustness",
}
OnDone = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and how much there is."""


class Finished(NamedTuple):
    """An experiment that is done."""

    lines: list[str]
    """Its section of the report, Markdown."""
    metrics: dict[str, float]
    files: list[str]
    """URLs, the report's last."""
    left_out: list[dict[str, str]]
    """Speakers, with the reason."""


def resolve(config: ExperimentsConfig) -> ExperimentsConfig:
    """Relative paths are the caller's, not the workers'; the device is settled."""
    paths = {name: getattr(config, name) for name in ("output", "model", "speakers", "data")}
    if config.preset not in PRESETS:
        paths["preset"] = config.preset
    changes = {name: path and storage.absolute(path) for name, path in paths.items()}
    return dataclasses.replace(config, **changes, device=devices.of_cluster(config.device))


def perform(name: str, config: ExperimentsConfig, on_done: OnDone = lambda what, done, total: None) -> Finished:
    """Does what is missing of an experiment on the Ray that is connected, and writes what came of it.

    Raises:
        ExperimentError, ManifestError, ModelError, CodecError, DataError, PretrainError: it cannot be done.
    """
    config = resolve(config)
    folder, module = storage.join(config.output, name), importlib.import_module(f"{__package__}.{_MODULES[name]}")
    if storage.is_local(folder):
        storage.remove_leftovers(storage.join(folder, grid.FOLDER))
    if name == "gla-vs-attention":
        outcomes, left_out = module.run(config, folder, on_done), []
    else:
        kit, left_out = _kit(name, config, folder, module, on_done)
        gpus = config.gpus if config.device == "cuda" else 0
        outcomes = grid.run(
            folder, module.cells(kit), module.work, kit, lambda *n: on_done("voices", *n), config.threads, gpus
        )
    found = module.summary(config, outcomes)
    results = {"experiment": name, "cells": outcomes, "left_out": left_out, "summary": found}
    lines = module.section(config, found)
    if left_out:
        named = "; ".join(f"{one['speaker']} {one['condition']}: {one['reason']}" for one in left_out[:10])
        lines += [f"{len(left_out)} left out: {named}.", ""]
    files = report.write(config.output, name, results, lines, module.figures(found))
    return Finished(lines, {k: v for k, v in module.metrics(found).items() if v is not None}, files, left_out)


def _kit(name: str, config: ExperimentsConfig, folder: str, module: Any, on_done: OnDone):
    from model.checkpoint import read_card
    from pipeline.bulk_synthesis import codec_of
    from pipeline.experiments.adapting import Kit
    from pipeline.experiments.people import gather
    from pipeline.synthesis import read_model

    if not config.speakers:
        raise ExperimentError(f"{name} needs speakers that the model never heard: name them with --speakers")
    files = read_model(config.model)
    card, codec = read_card(files.config), codec_of(config, files)
    if card.sizes.mixer != "gla":
        raise ExperimentError(f"{config.model} is a model of softmax attention, which has no memories to tune")
    conditions = ("clean", *(config.conditions if name == "robustness" else ()))
    people, left_out = gather(
        folder,
        name,
        config,
        codec,
        card.sizes.codebooks,
        config.device,
        conditions,
        lambda *n: on_done("recordings", *n),
    )
    if not people["clean"]:
        raise ExperimentError(f"no speaker of {config.speakers} can be used as recorded: {left_out[0]['reason']}")
    return Kit(config, files, card.fingerprint, codec, config.device, folder, people), left_out
