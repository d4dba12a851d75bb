"""Training that starts from the weights of an exported model instead of random ones: fine-tuning."""

from __future__ import annotations

from infra import storage
from model.checkpoint import CONFIG_FILE, ModelCard, read_card, unpack
from model.lina import Lina
from pipeline.phonemes import INVENTORY
from pipeline.pretrain_config import PretrainConfig
from pipeline.synthesis import read_model


class PretrainError(RuntimeError):
    """A run that cannot start or go on: says why, and what to do."""


_MAY_DIFFER = ("dropout", "text_dropout", "attention_dropout")


def starting_card(config: PretrainConfig) -> ModelCard | None:
    """The card of the model in `start_from`; None where nothing is named.

    Raises:
        PretrainError: no model is there, or its sizes or phonemes are not those of the run.
    """
    if not config.start_from:
        return None
    try:
        card = read_card(storage.read_bytes(storage.join(config.start_from, CONFIG_FILE)))
    except storage.UNREADABLE as error:  # ModelError is a ValueError
        raise PretrainError(
            f"start_from {config.start_from} is no exported model ({error}); jobs/export.py makes one"
        ) from None
    theirs, ours = card.sizes.to_dict(), config.sizes().to_dict()
    differing = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if theirs[name] != ours[name]]
    if differing := [text for text in differing if text.split()[0] not in _MAY_DIFFER]:
        raise PretrainError(f"the model in start_from {config.start_from} has other sizes: {'; '.join(differing)}")
    if card.inventory != INVENTORY:
        raise PretrainError(f"the model in start_from {config.start_from} was trained with other phonemes")
    return card


def starting_model(config: PretrainConfig) -> Lina:
    """The model in `start_from`, in float32, with the run's dropout. Raises as `starting_card`, and ModelError."""
    starting_card(config)
    files = read_model(config.start_from)
    read, _ = unpack(files.config, files.weights)
    model = Lina(config.sizes())
    model.load_state_dict(read.state_dict())
    return model
