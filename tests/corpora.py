"""Small corpora and codecs that tests make for themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

WORDS = "the small boat sailed past a quiet green island while seven birds sang about rain and old stone walls".split()


def write_corpus(folder: Path, count: int, seed: int = 0, rate: int = 16_000, text: bool = True) -> Path:
    """A manifest of `count` FLAC files, 1 to 3 s each, of voiced-like sound with a text of fitting length."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        seconds = round(float(random.uniform(1, 3)), 3)
        soundfile.write(folder / f"{number:04d}.flac", voiced(random, seconds, rate), rate)
        words = [WORDS[i] for i in random.integers(0, len(WORDS), max(2, round(seconds * 2.5)))]
        row = {"id": f"spk{number % 5}/{number:04d}", "audio": f"{number:04d}.flac", "speaker": f"spk{number % 5}"}
        lines.append(row | {"duration": seconds} | ({"text": " ".join(words) + "."} if text else {}))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def voiced(random: np.random.Generator, seconds: float, rate: int) -> np.ndarray:
    """Harmonics of a wandering pitch under a syllable-like envelope, with some noise; float32 [n]."""
    time = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(random.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * 2 * time))) / rate
    tone = sum(np.sin(k * phase) / k for k in range(1, 12))
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * time + random.uniform(0, 6))
    return (0.1 * tone * envelope + 0.005 * random.standard_normal(len(time))).astype(np.float32)


def write_codec(folder: Path) -> str:
    """A codec of EnCodec's architecture with few filters and fixed random weights; it has learnt nothing."""
    import dataclasses

    from model.codec import Codec
    from model.codec_config import ENCODEC_24KHZ

    config = dataclasses.replace(
        ENCODEC_24KHZ, name="tests", filters=4, ratios=(2, 4, 5, 8), dimension=32, lstm_layers=0
    )
    Codec.random(config, seed=0).save(folder)
    return str(folder)
