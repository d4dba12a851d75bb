"""Token shards on disk: a WebDataset tar, its index, its quarantine and, last of all, its sidecar.

    shards/000012.tar             {key}.codes.npy uint16 [K, T] · {key}.json · {key}.phones.txt, sorted
    shards/000012.index.parquet   key, offset, size, frames, phones, speaker, seconds: what a schedule needs
    quarantine/000012.jsonl       what could not be used, one reject a line
    shards/000012.json            the sidecar: a shard is done when this file exists

The bytes are a function of the samples alone: USTAR headers with mtime 0, fixed owner and mode, sorted members.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from infra import storage

CODES, META, PHONES = "codes.npy", "json", "phones.txt"
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00.{2}\{'descr': '<u2', 'fortran_order': False, 'shape': \((\d+), (\d+)\), \} *\n", re.DOTALL
)


class Sample(NamedTuple):
    """One utterance as training reads it."""

    key: str
    codes: np.ndarray
    """uint16 [K, T]: K codebooks by T frames."""
    phones: str
    """Phonemes on one space-separated line, as `pipeline.phonemes.from_text` reads them."""
    meta: dict[str, Any]
    """id, text, speaker, language, seconds, source and the manifest's other columns."""


def shard_name(shard: int) -> str:
    return f"{shard:06d}"


def tar_url(dataset: str, shard: int) -> str:
    return storage.join(dataset, "shards", f"{shard_name(shard)}.tar")


def sidecar_url(dataset: str, shard: int) -> str:
    return storage.join(dataset, "shards", f"{shard_name(shard)}.json")


def index_url(dataset: str, shard: int) -> str:
    return storage.join(dataset, "shards", f"{shard_name(shard)}.index.parquet")


def quarantine_url(dataset: str, shard: int) -> str:
    return storage.join(dataset, "quarantine", f"{shard_name(shard)}.jsonl")


def write_shard(dataset: str, shard: int, samples: list[Sample], rejects: list[dict], facts: dict) -> dict[str, Any]:
    """Writes one shard, each file whole or not at all and the sidecar last; returns the sidecar.

    Args:
        rejects: quarantine records (`Reject` fields and where the utterance came from).
        facts: what else the sidecar records: the plan's digest of this shard, codec identity, versions.
    """
    samples = sorted(samples, key=lambda sample: sample.key)
    data, index = tar_bytes(samples)
    counts: dict[str, int] = {}
    for reject in rejects:
        name = f"{reject['stage']}/{reject['reason']}"
        counts[name] = counts.get(name, 0) + 1
    sidecar = {
        "shard": shard,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "samples": len(samples),
        "frames": int(sum(sample.codes.shape[1] for sample in samples)),
        "seconds": round(sum(sample.meta["seconds"] for sample in samples), 6),
        "rejects": dict(sorted(counts.items())),
        **facts,
    }
    storage.write_bytes(tar_url(dataset, shard), data)
    storage.write_bytes(index_url(dataset, shard), _index_bytes(samples, index))
    rejects = sorted(rejects, key=lambda reject: (reject["where"], reject["key"]))
    storage.write_bytes(quarantine_url(dataset, shard), b"".join(_json_line(reject) for reject in rejects))
    storage.write_bytes(sidecar_url(dataset, shard), _json_line(sidecar))
    return sidecar


def tar_bytes(samples: list[Sample]) -> tuple[bytes, list[tuple[int, int]]]:
    """The tar of samples in the order given, and (offset, size) in bytes of each sample's stretch of it."""
    buffer = io.BytesIO()
    spans = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            start = tar.offset
            for suffix, content in _members(sample):
                header = tarfile.TarInfo(f"{sample.key}.{suffix}")
                header.size, header.mode = len(content), 0o644
                tar.addfile(header, io.BytesIO(content))
            spans.append((start, tar.offset - start))
    return buffer.getvalue(), spans


def read_samples(data: bytes) -> Iterator[Sample]:
    """The samples of a tar, or of one sample's stretch of it.

    Raises:
        ValueError: a member that is not one of ours, or a sample that lacks a member.
    """
    parts: dict[str, bytes] = {}
    key = None
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", format=tarfile.USTAR_FORMAT) as tar:
        for member in tar:
            name, suffix = split_name(member.name)
            if name != key and key is not None:
                yield _sample(key, parts)
                parts = {}
            key = name
            parts[suffix] = tar.extractfile(member).read()
    if key is not None:
        yield _sample(key, parts)


def split_name(member: str) -> tuple[str, str]:
    """(key, suffix) of a member's name, split where WebDataset splits it."""
    folder, slash, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _members(sample: Sample) -> list[tuple[str, bytes]]:
    codes = io.BytesIO()
    np.lib.format.write_array(codes, np.ascontiguousarray(sample.codes, dtype="<u2"), version=(1, 0))
    return [
        (CODES, codes.getvalue()),
        (META, _json_line(sample.meta)),
        (PHONES, (sample.phones + "\n").encode("utf-8")),
    ]


def _sample(key: str, parts: dict[str, bytes]) -> Sample:
    if set(parts) != {CODES, META, PHONES}:
        raise ValueError(f"sample {key!r} has members {sorted(parts)}, expected {[CODES, META, PHONES]}")
    codes = _codes(parts[CODES])
    if codes.dtype != np.uint16 or codes.ndim != 2:
        raise ValueError(f"sample {key!r}: codes are {codes.dtype} {codes.shape}, expected uint16 [K, T]")
    return Sample(key, codes, parts[PHONES].decode("utf-8").rstrip("\n"), json.loads(parts[META]))


def _codes(content: bytes) -> np.ndarray:
    """The array of a .npy file, [K, T] where it is one of ours.

    Those are not read by numpy: it parses headers with `ast`, which in CPython 3.11 now and then fails where several
    threads do so at once (python/cpython issue 106905), and a good sample would count as damaged.
    """
    if not (header := _HEADER.match(content)):
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    shape = tuple(map(int, header.groups()))
    codes = np.frombuffer(content, "<u2", offset=header.end())
    if codes.size != shape[0] * shape[1]:
        raise ValueError(f"{codes.size} codes where the header says {shape}")
    return codes.reshape(shape).astype(np.uint16)


def _index_bytes(samples: list[Sample], spans: list[tuple[int, int]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "key": pa.array([sample.key for sample in samples], pa.string()),
            "offset": pa.array([start for start, _ in spans], pa.int64()),
            "size": pa.array([size for _, size in spans], pa.int64()),
            "frames": pa.array([sample.codes.shape[1] for sample in samples], pa.int32()),
            "phones": pa.array([len(sample.phones.split()) for sample in samples], pa.int32()),
            "speaker": pa.array([sample.meta["speaker"] for sample in samples], pa.string()),
            "seconds": pa.array([sample.meta["seconds"] for sample in samples], pa.float64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _json_line(value: dict[str, Any]) -> bytes:
    """One canonical JSON line: sorted keys, no spaces, so that equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
