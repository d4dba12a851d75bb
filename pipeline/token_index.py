"""The index of a finished dataset: where every sample lies and how long it is, in arrays of 28 bytes a sample.

    index = TokenIndex.open("s3://bucket/tokens", cache="/nvme/lina")
    train, valid = index.only(max_frames=3000).split(0.005)

Read from `dataset.json` and the shards' `.index.parquet`, and kept merged in a local cache, if there is one, under the
dataset's digest. A selection shares the arrays of the whole, so row numbers mean the same in every selection.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from infra import storage
from pipeline.finalize import DATASET_FILE, read_summary

COLUMNS = {
    "offset": np.int64,
    "size": np.int32,
    "frames": np.int32,
    "phones": np.int32,
    "speaker": np.int32,
    "key_sum": np.uint32,
}
"""What is kept of each sample; `speaker` is a number in `speakers`, `key_sum` the CRC-32 of the key."""
_LAYOUT = 1
"""Of the cached form; another number makes old caches unread."""
_READERS = 8
_FRACTION_BITS = 53


class DataError(ValueError):
    """A dataset that cannot be trained on: not finished, damaged, of another codec, nothing left of it, or samples that
    are too long for the budget."""


class ShardFile(NamedTuple):
    """A tar as `dataset.json` lists it."""

    url: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """All samples of a dataset in the order of its shards, and the rows that are selected."""

    digest: str
    """Of the dataset."""
    codec: dict[str, Any]
    """Identity of the codec whose codes these are."""
    codebooks: int
    """Codes stored a frame."""
    shards: tuple[ShardFile, ...]
    speakers: tuple[str, ...]
    columns: dict[str, np.ndarray]
    """`COLUMNS`, each [samples]."""
    rows: np.ndarray
    """int32, ascending: the samples that are selected."""

    @staticmethod
    def open(dataset: str, cache: str | None = None) -> TokenIndex:
        """Reads the index of a dataset.

        Args:
            dataset: folder of a finished dataset; any fsspec URL.
            cache: local folder for the merged index, which processes may share; None keeps nothing.

        Raises:
            DataError: the dataset is not finished, or an index does not fit it.
        """
        summary_url = storage.join(dataset, DATASET_FILE)
        if not storage.exists(summary_url):
            raise DataError(f"{summary_url} is missing: no finished dataset is there; run jobs/tokenize.py to its end")
        try:
            summary = read_summary(dataset)
            shards = tuple(
                ShardFile(storage.join(dataset, s["url"]), s["filesize"], s["sha256"], s["nsamples"])
                for s in summary["shardlist"]
            )
            facts = {"digest": summary["digest"], "codec": summary["codec"], "codebooks": summary["codebooks"]}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{summary_url} is damaged ({error!r}); run jobs/tokenize.py again") from None
        if cache is None:
            speakers, columns = _merge(shards)
        else:
            speakers, columns = _cached(shards, os.path.join(cache, f"index-{_LAYOUT}-{facts['digest'][:32]}"))
        count = sum(shard.samples for shard in shards)
        return TokenIndex(
            **facts, shards=shards, speakers=speakers, columns=columns, rows=np.arange(count, dtype=np.int32)
        )

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: the first row of each shard, and the number of samples."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)])

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """The numbers in `shards` that rows are in."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    @property
    def frames(self) -> int:
        """Of the selected samples together."""
        return int(self.columns["frames"][self.rows].sum(dtype=np.int64))

    def only(
        self,
        min_frames: int = 1,
        max_frames: int | None = None,
        min_phones: int = 0,
        speakers: Collection[str] | None = None,
    ) -> TokenIndex:
        """The selected samples of fitting length, with texts of at least `min_phones`, of some speakers.

        Raises:
            DataError: a speaker that the dataset has not.
        """
        frames = self.columns["frames"][self.rows]
        kept = frames >= min_frames
        if max_frames is not None:
            kept &= frames <= max_frames
        if min_phones:
            kept &= self.columns["phones"][self.rows] >= min_phones
        if speakers is not None:
            numbers = {name: number for number, name in enumerate(self.speakers)}
            if unknown := sorted(set(speakers) - numbers.keys()):
                raise DataError(f"speaker {unknown[0]!r} is not in the dataset, which has {len(numbers)} speakers")
            wanted = np.zeros(len(numbers), dtype=bool)
            wanted[[numbers[name] for name in speakers]] = True
            kept &= wanted[self.columns["speaker"][self.rows]]
        return replace(self, rows=self.rows[kept])

    def split(self, valid_fraction: float, seed: int = 0, by: str = "key") -> tuple[TokenIndex, TokenIndex]:
        """(training, validation): about `valid_fraction` is held out, by a hash that knows nothing of the rest.

        Args:
            by: `key` holds out samples, `speaker` holds out all samples of some speakers.
        """
        if not 0 <= valid_fraction < 1:
            raise ValueError(f"valid_fraction must be at least 0 and below 1, not {valid_fraction}")
        if by == "key":
            held = _uniform(scramble(self.columns["key_sum"][self.rows], seed)) < valid_fraction
        elif by == "speaker":
            sums = np.array([zlib.crc32(name.encode("utf-8")) for name in self.speakers], dtype=np.uint64)
            held = (_uniform(scramble(sums, seed)) < valid_fraction)[self.columns["speaker"][self.rows]]
        else:
            raise ValueError(f"by must be 'key' or 'speaker', not {by!r}")
        return replace(self, rows=self.rows[~held]), replace(self, rows=self.rows[held])

    def require_codec(self, identity: dict[str, Any], codebooks: int) -> None:
        """Raises DataError unless the codes are those of a model's codec, and as many a frame as it reads."""
        from pipeline.plan import differences

        if changed := differences(identity, self.codec):
            raise DataError(
                "the dataset was made with another codec than the model is for: "
                + ", ".join(changed)
                + "; tokenize the corpus with the model's codec"
            )
        if not 1 <= codebooks <= self.codebooks:
            raise DataError(f"codebooks must be 1 to {self.codebooks}, what the dataset stores, not {codebooks}")


def scramble(numbers: np.ndarray, *salts: int) -> np.ndarray:
    """uint64 hashes of numbers under salts: SplitMix64's finaliser (Steele et al. 2014), equal on every machine."""
    mixed = np.zeros(1, dtype=np.uint64)
    for salt in salts:
        mixed = _mix(mixed ^ np.array([salt & (2**64 - 1)], dtype=np.uint64))
    return _mix(_mix(np.asarray(numbers).astype(np.uint64)) ^ mixed)


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _uniform(hashes: np.ndarray) -> np.ndarray:
    """Hashes as float64 in [0, 1)."""
    return (hashes >> np.uint64(64 - _FRACTION_BITS)).astype(np.float64) / 2.0**_FRACTION_BITS


Merged = tuple[tuple[str, ...], dict[str, np.ndarray]]


def _cached(shards: tuple[ShardFile, ...], folder: str) -> Merged:
    """The merged index from its cache, mapped into memory; one of several processes makes it, the others wait."""
    with locked(f"{folder}.lock"):
        if not os.path.isdir(folder):
            for left in glob.glob(f"{glob.escape(folder)}.part-*"):  # by a killed process: we hold the lock
                shutil.rmtree(left, ignore_errors=True)
            speakers, columns = _merge(shards)
            temporary = f"{folder}.part-{uuid.uuid4().hex[:8]}"
            os.makedirs(temporary)
            try:
                for name, column in columns.items():
                    np.save(os.path.join(temporary, f"{name}.npy"), column, allow_pickle=False)
                with open(os.path.join(temporary, "speakers.json"), "w", encoding="utf-8") as file:
                    json.dump(speakers, file)
                os.rename(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    columns = {name: np.load(f"{folder}/{name}.npy", mmap_mode="r", allow_pickle=False) for name in COLUMNS}
    if any(len(column) != sum(shard.samples for shard in shards) for column in columns.values()):
        raise DataError(f"{folder} does not fit the dataset; delete this folder, which is only a cache")
    with open(f"{folder}/speakers.json", encoding="utf-8") as file:
        return tuple(json.load(file)), columns


def _merge(shards: tuple[ShardFile, ...]) -> Merged:
    """All shards' indexes as one, read by some threads at a time."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    speakers: dict[str, int] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for names, part in pool.map(_read, shards):
            numbers = np.array([speakers.setdefault(name, len(speakers)) for name in names], dtype=np.int32)
            part["speaker"] = numbers[part["speaker"]]
            for name, column in part.items():
                parts[name].append(column)
    columns = {}
    for name, kind in COLUMNS.items():
        columns[name] = np.concatenate([np.zeros(0, kind), *parts.pop(name)])
    return tuple(speakers), columns


def _read(shard: ShardFile) -> tuple[list[str], dict[str, np.ndarray]]:
    """(speakers, columns with `speaker` a number among them) of one shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    url = shard.url.removesuffix(".tar") + ".index.parquet"
    names = ["key", "offset", "size", "frames", "phones", "speaker"]
    try:
        source = pa.BufferReader(storage.read_bytes(url))
        table = pq.ParquetFile(source, read_dictionary=["speaker"]).read(names, use_threads=False)
    except FileNotFoundError:
        raise DataError(f"{url} is missing; run jobs/tokenize.py again") from None
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{url} is damaged ({error}); delete the sidecar and run jobs/tokenize.py again") from None
    if len(table) != shard.samples:
        raise DataError(f"{url} has {len(table)} samples, not {shard.samples} as {DATASET_FILE} says; tokenize again")
    columns = {
        name: table.column(name).to_numpy().astype(COLUMNS[name]) for name in ("offset", "size", "frames", "phones")
    }
    sums = [zlib.crc32(key.encode("utf-8")) for key in table.column("key").to_pylist()]
    columns["key_sum"] = np.array(sums, dtype=np.uint32)
    speaker = table.column("speaker").combine_chunks()
    columns["speaker"] = speaker.indices.to_numpy().astype(np.int32)
    return speaker.dictionary.to_pylist(), columns


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Waits until no other thread or process on this machine is inside the block of this path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
