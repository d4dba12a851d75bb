"""A model and a codec with random weights, which say nothing that anybody understands, as files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from model.checkpoint import ModelCard, load, save
from model.codec import Codec
from model.codec_config import ENCODEC_24KHZ
from model.initial_state import shapes
from model.lina import Lina
from model.lina_config import LinaConfig
from model.voice_file import Voice
from model.voice_file import save as save_voice
from pipeline.phonemes import INVENTORY
from tests.pipeline.speaking_tokens import SIZES


def write_speaker(folder: Path, seed: int = 0, ends: float = 0.5) -> tuple[str, str]:
    """(the model's folder, the codec's folder).

    Args:
        ends: how much likelier than others the first codebook's end is, as a logarithm.
    """
    config = dataclasses.replace(ENCODEC_24KHZ, name="tests", filters=2, lstm_layers=0, codebooks=4, codebook_size=32)
    codec = Codec.random(config, seed=seed)
    codec.save(folder / "codec")
    sizes = LinaConfig(**SIZES, vocabulary=len(INVENTORY))
    torch.manual_seed(seed)
    model = Lina(sizes)
    with torch.no_grad():
        torch.nn.init.normal_(model.heads.weight, std=0.4)
        # The last norm's first channel is always 1: the end's weight on it is its bias.
        model.norm.weight[0], model.norm.bias[0] = 0, 1
        model.heads.weight[:, 0] = 0
        model.heads.weight[2, 0] = ends
    save(model, ModelCard(sizes, INVENTORY, codec.identity, {"note": "random weights, for tests"}), folder / "model")
    return str(folder / "model"), str(folder / "codec")


def write_voice(file: Path, model: str, seed: int = 0) -> str:
    """A voice of a model in the folder `model`, with random factors."""
    _, card = load(model)
    generator = torch.Generator().manual_seed(seed)
    factors = {name: torch.randn(shape, generator=generator) for name, shape in shapes(card.sizes, 1).items()}
    consent = {"who": "Ann Example", "when": "2025-03-01", "scope": "tests"}
    save_voice(Voice(file.stem, factors, 1, 1.0, card.fingerprint, {}, consent), file)
    return str(file)
