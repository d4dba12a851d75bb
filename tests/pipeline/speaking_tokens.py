"""A small dataset of tokens to train on: codes that depend on the text, so that there is something to learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pipeline import shards
from tests.pipeline.token_data import write_samples

IDENTITY = {
    "name": "random-codes",
    "digest": "0" * 64,
    "sample_rate": 24_000,
    "frame_rate": 75.0,
    "codebooks": 4,
    "codebook_size": 32,
}
SIZES = {
    "width": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "heads": 2,
    "key_width": 16,
    "value_width": 32,
    "text_layers": 1,
    "text_heads": 2,
    "position_width": 16,
    "position_kernel": 5,
    "codebook_size": 32,
}
PHONES = ("AA1", "B", "K", "S", "T", "IY0", "M", "<space>")


def write_tokens(folder: Path, samples: int = 60, count: int = 3, seed: int = 0, codebook_size: int = 32) -> str:
    """A finished dataset of `count` shards; each phone lasts some frames of codes that are its own."""
    rng = np.random.default_rng(seed)
    made = [[_sample(f"{shard:02d}-{n:03d}", rng) for n in range(samples // count)] for shard in range(count)]
    write_samples(str(folder), made, IDENTITY | {"codebook_size": codebook_size})
    return str(folder)


def write_sizes(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sizes.json"
    file.write_text(json.dumps(SIZES))
    return str(file)


def _sample(key: str, rng: np.random.Generator) -> shards.Sample:
    phones = rng.choice(len(PHONES), size=rng.integers(4, 10))
    sounds = np.repeat(phones, rng.integers(3, 7, size=len(phones)))
    codes = (sounds[None] * 3 + np.arange(4)[:, None] + rng.integers(0, 2, size=(4, len(sounds)))) % 32
    speaker = f"speaker-{rng.integers(3)}"
    meta = {"id": key, "speaker": speaker, "seconds": len(sounds) / 75, "text": key}
    return shards.Sample(key, codes.astype(np.uint16), " ".join(PHONES[p] for p in phones), meta)
