"""Token datasets that tests make for themselves: finished ones on any URL, and indexes that exist in memory only."""

from __future__ import annotations

import hashlib
import json
import zlib

import numpy as np

from infra import storage
from pipeline import shards
from pipeline.sample_reader import SampleReader
from pipeline.shard_cache import ShardCache
from pipeline.token_index import COLUMNS, ShardFile, TokenIndex

CODEC = {
    "name": "tests",
    "digest": "c" * 64,
    "sample_rate": 24_000,
    "frame_rate": 75.0,
    "codebooks": 8,
    "codebook_size": 1024,
}
PHONES = "HH AH0 L OW1 <space> W ER1 L D .".split()


def index_of(frames: list[list[int]], speakers: int = 3) -> TokenIndex:
    """An index of samples of given lengths, by shard; there are no files behind it."""
    flat = np.array([n for shard in frames for n in shard], dtype=np.int64)
    columns = {
        "offset": np.zeros(len(flat)),
        "size": np.full(len(flat), 1536),
        "frames": flat,
        "phones": flat // 7,
        "speaker": np.arange(len(flat)) % speakers,
        "key_sum": [zlib.crc32(b"%d" % row) for row in range(len(flat))],
    }
    return TokenIndex(
        digest="d" * 64,
        codec=CODEC,
        codebooks=8,
        shards=tuple(ShardFile(f"shards/{n:06d}.tar", 1, "0" * 64, len(shard)) for n, shard in enumerate(frames)),
        speakers=tuple(f"s{n}" for n in range(speakers)),
        columns={name: np.asarray(columns[name]).astype(kind) for name, kind in COLUMNS.items()},
        rows=np.arange(len(flat), dtype=np.int32),
    )


def samples_of(number: int, count: int, codebooks: int = 8) -> list[shards.Sample]:
    """Samples of shard `number`, of 20 to 120 frames of random codes, in the order of their keys."""
    random = np.random.default_rng(number)
    made = []
    for place in range(count):
        frames = int(random.integers(20, 120))
        codes = random.integers(0, 1024, (codebooks, frames)).astype(np.uint16)
        key = f"spk{place % 4}/{number}-{place:03d}"
        meta = {"id": key, "speaker": f"spk{place % 4}", "seconds": frames / 75}
        made.append(shards.Sample(key, codes, " ".join(PHONES[: 1 + place % len(PHONES)]), meta))
    return sorted(made, key=lambda sample: sample.key)


def write_dataset(url: str, counts: tuple[int, ...], codec: dict | None = None) -> list[shards.Sample]:
    """A finished dataset with so many samples in each shard; returns them in the order of the index."""
    made = [samples_of(number, count) for number, count in enumerate(counts)]
    write_samples(url, made, codec or CODEC)
    return [sample for shard in made for sample in shard]


def write_samples(url: str, made: list[list[shards.Sample]], codec: dict) -> None:
    """A finished dataset of these samples, by shard."""
    facts = {"plan": "0" * 64, "codec": codec, "versions": {}}
    listed = []
    for number, samples in enumerate(made):
        sidecar = shards.write_shard(url, number, samples, [], facts)
        entry = {"url": f"shards/{number:06d}.tar", "nsamples": len(samples), "filesize": sidecar["bytes"]}
        listed += [entry | {"sha256": sidecar["sha256"]}] if samples else []
    # Caches go by it: other samples need another one
    digest = hashlib.sha256(json.dumps([codec, listed]).encode()).hexdigest()
    summary = {"digest": digest, "codec": codec, "codebooks": codec["codebooks"], "shardlist": listed}
    storage.write_text(storage.join(url, "dataset.json"), json.dumps(summary))


def read_all(url: str, cache: str, seed: int, results) -> None:
    """In a process of its own: reads every sample twice, in any order, through a cache for less than two shards."""
    index = TokenIndex.open(url, cache=cache)
    reader = SampleReader(index, ShardCache(cache, 60_000))
    wrong = 0
    for row in np.random.default_rng(seed).permutation(len(index)).tolist() * 2:
        good, _ = reader.read(np.array([row]))
        wrong += row not in good
    results.put((seed, wrong, len(index)))
