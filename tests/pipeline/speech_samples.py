"""Speakers for tests of enrollment: as samples of codes, and as recordings with a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch

from model.voice_samples import Sample
from tests.corpora import WORDS, voiced

CONSENT = {"who": "Ann Example", "when": "2025-03-01", "scope": "tests"}


def samples_of(speaker: int, count: int = 4, frames: int = 40) -> list[Sample]:
    """Utterances of random codes for `speaking_model.write_speaker`'s sizes, in lengths of the speaker's own."""
    generator = torch.Generator().manual_seed(speaker)
    return [
        Sample(
            torch.randint(5, 60, (6 + place,), generator=generator),
            torch.randint(0, 32, (4, frames + 9 * place + speaker % 13), generator=generator),
        )
        for place in range(count)
    ]


def request_of(speaker: int, **changes) -> dict:
    """A request to the enrollment stage."""
    samples = [
        {"codes": codes.numpy().astype(np.uint16), "phones": "S AE1 NG <space> AH0 B AW1 T"}
        for _, codes in samples_of(speaker)
    ]
    return {"id": f"r{speaker}", "speaker": f"s{speaker}", "samples": samples, "consent": CONSENT} | changes


def write_speakers(folder: Path, count: int, samples: int = 3, seed: int = 0) -> Path:
    """speakers.jsonl with recordings of 0.5 to 0.9 s and a text each."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for speaker in range(count):
        given = []
        for place in range(samples):
            seconds, file = float(random.uniform(0.5, 0.9)), f"{speaker:03d}-{place}.wav"
            soundfile.write(folder / file, voiced(random, seconds, 16_000), 16_000)
            given.append({"audio": file, "text": " ".join(WORDS[i] for i in random.integers(0, len(WORDS), 2))})
        consent = CONSENT | {"who": f"Speaker {speaker}"}
        rows.append({"speaker": f"spk-{speaker:03d}", "samples": given, "consent": consent})
    manifest = folder / "speakers.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest
