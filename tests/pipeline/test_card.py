"""The card of a dataset: its figures are those of the shards, its pictures are pictures, its code runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infra import storage
from pipeline import card, census, plots, shards
from pipeline.shards import Sample

FRAME_RATE = 75
TEXTS = ("HH AH0 L OW1 <space> W ER1 L D", "")


def sample(random: np.random.Generator, number: int, speaker: str) -> Sample:
    frames = int(random.integers(75, 1200))
    codes = (1024 * random.random((2, frames)) ** 2).astype(np.uint16)
    seconds = frames / FRAME_RATE
    phones = " ".join(["AH0"] * int(seconds * random.uniform(9, 16))) if number % 10 else ""
    return Sample(f"utterance-{number:05d}", codes, phones, {"speaker": speaker, "seconds": seconds, "id": f"{number}"})


def made(dataset: str, speakers: int = 7, per_shard: int = 30, count: int = 3) -> dict:
    """A dataset of random codes and the summary that belongs to it."""
    random = np.random.default_rng(7)
    names = [f"speaker {n}" for n in range(speakers - 2)] + ["a|b*<i>", ""]
    sidecars = []
    for shard in range(count):
        samples = [
            sample(random, shard * per_shard + n, names[int(random.integers(speakers))]) for n in range(per_shard)
        ]
        sidecars.append(shards.write_shard(dataset, shard, samples, [], {}))
    total = {field: sum(sidecar[field] for sidecar in sidecars) for field in ("samples", "seconds", "frames", "bytes")}
    return {
        "name": "made_up",
        "digest": "d" * 64,
        "plan": "p" * 64,
        "codec": {
            "name": "random",
            "digest": "c" * 64,
            "sample_rate": 24000,
            "frame_rate": 75.0,
            "codebooks": 8,
            "codebook_size": 1024,
        },
        "codebooks": 2,
        "config": {"input": "manifest.jsonl", "codebooks": 2},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "utterances": total["samples"] + 10,
        "hours": total["seconds"] / 3600,
        "rejects": {"decode/truncated": 7, "plan/too-short": 3},
        "shardlist": [
            {"url": f"shards/{shards.shard_name(s['shard'])}.tar", "nsamples": s["samples"]} for s in sidecars
        ],
        **total,
    }


def pair(seconds: float) -> plots.Pair:
    time = np.arange(int(24000 * seconds)) / 24000
    original = (0.3 * np.sin(2 * np.pi * 220 * time * (1 + time))).astype(np.float32)
    return plots.Pair("speaker $1: $2", original, np.clip(original, -0.1, 0.1), 24000)


def test_the_card_says_what_the_shards_hold(tmp_path: Path) -> None:
    summary = made(str(tmp_path))
    names = card.write_card(str(tmp_path), summary, [pair(1.0), pair(2.5)])
    text = (tmp_path / "README.md").read_text()
    assert names == ["README.md", *(f"plots/{n}.png" for n in card_plots())]
    for name in names[1:]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text
    assert "| utterances | 90 of 100 in the manifest |" in text
    assert "| in quarantine | 10 (10.00 %) |" in text and "| without text | 9 |" in text
    assert "| decode | truncated | 7 | 7.00 % |" in text
    assert "| codec (encoder and codebooks), digest | `" in text
    assert "a\\|b\\*\\<i\\>" in text and "(unnamed)" in text
    rows = re.findall(r"^\| .* \| (\d+) \| \d\.\d{3} \| \d+\.\d \|$", text, re.MULTILINE)
    assert sum(map(int, rows)) == 90, "every utterance is some speaker's"


def card_plots() -> list[str]:
    return ["durations", "phone_rates", "speakers", "codebooks", "spectrograms"]


def test_the_code_on_the_card_reads_the_dataset(tmp_path: Path) -> None:
    summary = made(str(tmp_path))
    (tmp_path / "dataset.json").write_text(json.dumps(summary))
    card.write_card(str(tmp_path), summary)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) == 5
    read = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    lines = read.stdout.splitlines()
    assert len(lines) == 90 and re.match(r"utterance-00001 \(2, \d+\) speaker \d AH0 AH0", lines[1])


def test_the_same_dataset_gives_the_same_bytes(tmp_path: Path) -> None:
    pictures = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        names = card.write_card(str(folder), made(str(folder)), [pair(1.0)])
        pictures.append([(folder / name).read_bytes() for name in names])
    assert pictures[0] == pictures[1]


def test_a_dataset_on_an_object_store_with_many_speakers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "_SPEAKERS_BY_NAME", 60)
    url = "memory://card/many"
    summary = made(url, speakers=80, per_shard=100)
    names = card.write_card(url, summary)
    text = storage.read_text(f"{url}/README.md")
    assert "60 speakers and more" in text and "*all others*" in text and "plots/spectrograms.png" not in names
    rows = re.findall(r"^\| .* \| (\d+) \| \d\.\d{3} \| \d+\.\d \|$", text, re.MULTILINE)
    assert len(rows) == 51 and sum(map(int, rows)) == 300


def test_an_empty_dataset_has_a_card_without_pictures(tmp_path: Path) -> None:
    summary = made(str(tmp_path), count=0)
    assert card.write_card(str(tmp_path), summary) == ["README.md"]
    assert "0 utterances" in (tmp_path / "README.md").read_text()


def test_counts_are_those_of_the_codes(tmp_path: Path) -> None:
    summary = made(str(tmp_path), per_shard=20, count=2)
    taken = census.take(str(tmp_path), summary, samples=1000)
    codes = [
        s.codes for shard in range(2) for s in shards.read_samples((tmp_path / f"shards/00000{shard}.tar").read_bytes())
    ]
    together = np.concatenate(codes, axis=1)
    expected = np.stack([np.bincount(row, minlength=1024) for row in together])
    assert taken.codes_from == 40 and np.array_equal(taken.codes, expected)
    assert taken.seconds.total == 40 and taken.seconds.sum == pytest.approx(summary["seconds"])
    share = expected[0][expected[0] > 0] / expected[0].sum()
    assert taken.perplexity()[0] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_histogram_quantiles_are_within_a_bin_of_the_exact_ones() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([random.gamma(4, 3, 5000), [400.0]])
    histogram = census.Histogram(0.05, 4000)
    for part in np.array_split(values, 7):
        histogram.add(part)
    for share in (0.05, 0.5, 0.95, 0.99):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.1)
    assert histogram.mean == pytest.approx(values.mean()) and histogram.highest == 400.0
    assert histogram.counts[-1] == 1, "what is beyond the last bin is in it"
