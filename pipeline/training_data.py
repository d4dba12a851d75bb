"""What a run trains on, and whether a checkpoint belongs to it: known before any worker starts."""

from __future__ import annotations

import json

from pipeline.pretrain_config import PretrainConfig
from pipeline.schedule import WINDOW, Schedule
from pipeline.token_index import TokenIndex
from pipeline.training_checkpoints import Checkpoint
from pipeline.training_start import PretrainError, starting_card


def open_index(config: PretrainConfig) -> TokenIndex:
    """The dataset's index, within the limits on length; checked against the model's sizes, and against the codec of
    the model that training starts from."""
    index = TokenIndex.open(config.data, config.cache_folder)
    start = starting_card(config)
    index.require_codec(start.codec.to_dict() if start else index.codec, config.codebooks)
    if (size := config.sizes().codebook_size) != index.codec["codebook_size"]:
        raise PretrainError(
            f"model {config.model} has codebooks of {size}, {config.data} codes of {index.codec['codebook_size']}; set "
            "codebook_size in a JSON file of sizes and name that as model"
        )
    rate = index.codec["frame_rate"]
    return index.only(max(1, round(config.min_seconds * rate)), round(config.max_seconds * rate), min_phones=1)


def schedule_of(config: PretrainConfig, index: TokenIndex) -> Schedule:
    train, _ = index.split(config.valid_fraction)
    return Schedule(train, config.seed, config.budget, config.codebooks, config.accumulate, config.window)


def require_same(found: Checkpoint, config: PretrainConfig, index: TokenIndex) -> None:
    """Raises PretrainError where a checkpoint is of another dataset or another recipe, with what differs."""
    # Checkpoints from before the window could be chosen do not name it
    before, now = {"window": WINDOW} | found.facts["identity"], json.loads(json.dumps(config.identity()))
    differing = [f"{name}: {before.get(name)} → {now[name]}" for name in now if before.get(name) != now[name]]
    if config.start_from:  # without it, a run goes on even where that model is gone
        started, named = found.facts["model"]["training"].get("started_from"), starting_card(config).fingerprint
        if started != named:
            differing.insert(0, f"started from model {str(started)[:12]} → {named[:12]}")
    if found.facts["dataset"] != index.digest:
        differing.insert(0, f"dataset: {found.facts['dataset'][:12]}… → {index.digest[:12]}…")
    if differing:
        raise PretrainError(
            f"{config.output} holds a run with other settings ({'; '.join(differing)}); choose another --output, or "
            "take these back"
        )
