"""Making a plan: which utterances go into which shard and which codec batch, decided before any work.

Two passes, so that 12 million utterances fit into a few hundred megabytes of memory. The first streams the manifest
into a spool on local disk and keeps 28 bytes an utterance in memory. Those decide ids that occur twice, and the shards:
consecutive utterances of about equal bytes, so that a recording's cuts are read together. Utterances with the same text
and duration are put into one shard, because only they can be copies of one another; so comparing audio within a shard
finds the copies in the whole corpus. The second pass writes the Parquet file, a row group a shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from pipeline.keys import key_of
from pipeline.plan import Round, round_digest, shard_digest
from pipeline.tokenize_config import TokenizeConfig
from pipeline.utterances import Reject, Unusable, Utterance

CHUNK = 8192
UNKNOWN_SECONDS = 10.0
"""What a batch reserves for an utterance whose file does not tell its length; decoding finds out."""
TAR_OVERHEAD = 3 * 512 + 3 * 256 + 128
"""Bytes of a sample beside its contents: three headers, padding to 512, the array's header."""
SMALLEST_SHARD = 64
"""Samples below which a small corpus is not divided further."""
LARGEST_FAMILY = 256
"""Utterances of equal text and duration that are brought together, at most."""

_SPOOL = pa.schema(
    [("key", pa.string()), ("id", pa.string()), ("audio", pa.string()), ("start", pa.float64())]
    + [("duration", pa.float64()), ("text", pa.string()), ("speaker", pa.string()), ("language", pa.string())]
    + [("channel", pa.int32()), ("extra", pa.string()), ("where", pa.string())]
)
PLAN_SCHEMA = pa.schema([("shard", pa.int32()), ("batch", pa.int32()), *_SPOOL])


@dataclass(frozen=True)
class Sizes:
    """What planning has to know about the codec and the corpus."""

    bytes_per_second: float
    """Of stored codes: frame rate × codebooks × 2."""
    audio_base: str
    """Audio paths in this folder are stored relative to it."""


@dataclass
class _Spool:
    """What the first pass leaves: rows and rejects on disk, numbers in memory."""

    folder: str
    rejects: Counter = field(default_factory=Counter)
    ids: list[np.ndarray] = field(default_factory=list)
    families: list[np.ndarray] = field(default_factory=list)
    sizes: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    rows: int = 0

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def make_round(
    items: Iterable[Utterance | Reject],
    config: TokenizeConfig,
    sizes: Sizes,
    file: str,
    first_shard: int = 0,
    output: str | None = None,
    progress: Callable[[int, float], None] = lambda rows, seconds: None,
) -> tuple[Round, dict[str, int]]:
    """Plans one round and writes it to the folder `output`; without one it only tells what would be (a dry run).

    Returns:
        the round, and how many items could not be planned by `stage/reason`. Those are in `output`'s quarantine.
    """
    folder = tempfile.mkdtemp(prefix="lina-ray-plan-")
    try:
        spool = _Spool(folder)
        _fill(spool, items, config, sizes, progress)
        repeated = _repeated_ids(spool)
        shard_of = _partition(spool, repeated, config)
        round_ = _write_rows(spool, shard_of, config, file, first_shard)
        if output is not None:
            rejects = storage.join(output, "quarantine", file.replace(".parquet", ".jsonl"))
            storage.upload(spool.path("rejects.jsonl"), rejects)
            storage.upload(spool.path("plan.parquet"), storage.join(output, file))
        return round_, dict(sorted(spool.rejects.items()))
    finally:
        shutil.rmtree(folder)


def _fill(spool: _Spool, items: Iterable, config: TokenizeConfig, sizes: Sizes, progress: Callable) -> None:
    """First pass: every item becomes a row or a reject."""
    with (
        open(spool.path("rejects.jsonl"), "w", encoding="utf-8") as rejects,
        pa.OSFile(spool.path("rows.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, _SPOOL, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer,
    ):
        chunk = _Chunk(config, sizes)
        for item in items:
            try:
                if type(item) is Reject:
                    raise _Rejected(item)
                chunk.add(item)
            except _Rejected as error:
                _set_aside(error.reject, spool, rejects)
            if len(chunk.rows) == CHUNK:
                chunk.move_to(spool, writer)
                progress(spool.rows, spool.seconds)
        chunk.move_to(spool, writer)
        progress(spool.rows, spool.seconds)


class _Rejected(Exception):
    def __init__(self, reject: Reject) -> None:
        super().__init__(reject)
        self.reject = reject


def _set_aside(reject: Reject, spool: _Spool, file: Any) -> None:
    spool.rejects[f"{reject.stage}/{reject.reason}"] += 1
    file.write(json.dumps({"key": "", **reject._asdict()}, sort_keys=True) + "\n")


class _Chunk:
    """Rows on their way to the spool, with the numbers that are kept of them."""

    def __init__(self, config: TokenizeConfig, sizes: Sizes) -> None:
        self.config = config
        self.prefix = sizes.audio_base.rstrip("/") + "/"
        self.bytes_per_second = sizes.bytes_per_second
        self.rows: list[tuple] = []
        self.ids: list[bytes] = []
        self.families: list[bytes] = []
        self.sizes: list[float] = []

    def add(self, utterance: Utterance) -> None:
        id, audio, text, speaker, start, duration, language, channel, extra, where = utterance
        audio = audio.removeprefix(self.prefix)
        id = id or _id_from(audio, start, duration, channel)
        try:
            key = key_of(id)
            _check(text, duration, self.config)
            _check_language(text, language, self.config)
            extra = json.dumps(extra, sort_keys=True, ensure_ascii=False) if extra else ""
            size = len(f"{id}{audio}{text}{speaker}{extra}".encode())
        except _NotEnglish as error:
            raise _Rejected(Reject(id, "phonemise", error.reason, error.detail, where)) from None
        except Unusable as error:
            raise _Rejected(Reject(id, "plan", error.reason, error.detail, where)) from None
        except UnicodeEncodeError:
            detail = "a field is not valid Unicode; save the manifest as UTF-8"
            raise _Rejected(Reject(id, "plan", "not-utf8", detail, where)) from None
        seconds = UNKNOWN_SECONDS if duration is None else duration
        self.rows.append((key, id, audio, start, duration, text, speaker, language, channel, extra, where))
        self.ids.append(hashlib.blake2b(id.encode(), digest_size=16).digest())
        self.families.append(_family(text, duration))
        self.sizes.append(seconds * self.bytes_per_second + size + 6 * len(text or "") + TAR_OVERHEAD)

    def move_to(self, spool: _Spool, writer: Any) -> None:
        if not self.rows:
            return
        columns = zip(*self.rows, strict=True)
        writer.write_batch(
            pa.record_batch([pa.array(c, t) for c, t in zip(columns, _SPOOL.types, strict=True)], _SPOOL)
        )
        spool.rows += len(self.rows)
        spool.seconds += sum(UNKNOWN_SECONDS if row[4] is None else row[4] for row in self.rows)
        spool.ids.append(np.frombuffer(b"".join(self.ids), dtype="V16"))
        spool.families.append(np.frombuffer(b"".join(self.families), dtype="<u8"))
        spool.sizes.append(np.array(self.sizes, dtype=np.float32))
        self.rows, self.ids, self.families, self.sizes = [], [], [], []


def _id_from(audio: str, start: float, duration: float | None, channel: int | None) -> str:
    """An id for an utterance that has none: its recording, its place in it in milliseconds, and its channel."""
    stem = os.path.splitext(audio.split("://")[-1])[0].lstrip("/")
    place = "" if not start and duration is None else f"-{round(start * 1000):08d}"
    return stem + place + ("" if channel is None else f"-c{channel}")


def _check(text: str | None, duration: float | None, config: TokenizeConfig) -> None:
    """What can be refused without opening a file."""
    if text is None and not config.transcribe and not config.keep_untranscribed:
        raise Unusable("no-text", "the manifest gives no text; use --transcribe MODEL or --keep-untranscribed")
    if duration is not None and duration < config.min_seconds:
        raise Unusable("too-short", f"{duration:.3f} s, below min_seconds ({config.min_seconds})")
    if duration is not None and duration > config.max_seconds:
        raise Unusable(
            "too-long",
            f"{duration:.1f} s with a text that cannot be cut along, above max_seconds ({config.max_seconds})",
        )


class _NotEnglish(Unusable):
    """Already known now what making phonemes would find."""


def _check_language(text: str | None, language: str | None, config: TokenizeConfig) -> None:
    phonemes_are_made = text is not None or config.transcribe
    if phonemes_are_made and language and not language.lower().startswith("en"):
        detail = f"phonemes are made for English alone, the language is {language[:40]!r}"
        raise _NotEnglish("not-english", f"{detail}; without text, --keep-untranscribed keeps its codes")


def _family(text: str | None, duration: float | None) -> bytes:
    """Utterances can be copies of one another only if their families are equal; zero where that cannot be told."""
    if not text or duration is None:
        return bytes(8)
    return hashlib.blake2b(f"{duration:.3f}\0{text}".encode(), digest_size=8).digest()


def _repeated_ids(spool: _Spool) -> np.ndarray:
    """bool [rows]: rows whose id an earlier row has; their rejects are written."""
    if not spool.rows:
        return np.zeros(0, dtype=bool)
    ids = np.concatenate(spool.ids)
    _, first = np.unique(ids, return_index=True)
    repeated = np.ones(spool.rows, dtype=bool)
    repeated[first] = False
    with open(spool.path("rejects.jsonl"), "a", encoding="utf-8") as rejects:
        for row in _rows_at(spool, np.flatnonzero(repeated)).to_pylist():
            detail = f"id {row['id']!r} stands in the manifest more than once; the first one is used"
            _set_aside(Reject(row["id"], "plan", "duplicate-id", detail, row["where"]), spool, rejects)
    return repeated


def _partition(spool: _Spool, repeated: np.ndarray, config: TokenizeConfig) -> np.ndarray:
    """int32 [rows]: each row's shard counted from 0, -1 for rows that are left out."""
    if repeated.all():
        return np.full(spool.rows, -1, dtype=np.int32)
    sizes = np.concatenate(spool.sizes).astype(np.float64)
    sizes[repeated] = 0.0
    before = np.cumsum(sizes) - sizes
    used = int((~repeated).sum())
    shards = max(np.ceil(sizes.sum() / (config.shard_megabytes * 1e6)), min(16, used // SMALLEST_SHARD), 1)
    shard_of = np.minimum(before / sizes.sum() * shards, shards - 1).astype(np.int32)
    shard_of[repeated] = -1
    _bring_families_together(np.concatenate(spool.families), shard_of)
    filled = np.unique(shard_of[shard_of >= 0])
    return np.where(shard_of >= 0, np.searchsorted(filled, shard_of), -1).astype(np.int32)


def _bring_families_together(families: np.ndarray, shard_of: np.ndarray) -> None:
    candidates = np.flatnonzero((families != 0) & (shard_of >= 0))
    names, first, inverse, counts = np.unique(
        families[candidates], return_index=True, return_inverse=True, return_counts=True
    )
    del names
    together = (counts[inverse] > 1) & (counts[inverse] <= LARGEST_FAMILY)
    shard_of[candidates[together]] = shard_of[candidates[first[inverse[together]]]]


def _rows_at(spool: _Spool, places: np.ndarray) -> pa.Table:
    """Rows of the spool by their numbers, in that order; `places` is sorted."""
    tables = [_SPOOL.empty_table()]
    with pa.OSFile(spool.path("rows.arrow")) as source:
        reader = pa.ipc.open_file(source)
        for chunk in np.unique(places // CHUNK):
            inside = places[places // CHUNK == chunk] % CHUNK
            tables.append(pa.Table.from_batches([reader.get_batch(int(chunk)).take(pa.array(inside))]))
    return pa.concat_tables(tables).combine_chunks()


def _write_rows(spool: _Spool, shard_of: np.ndarray, config: TokenizeConfig, file: str, first_shard: int) -> Round:
    """Second pass: the plan's Parquet file, a row group a shard."""
    moved = np.flatnonzero((shard_of >= 0) & (shard_of < np.maximum.accumulate(shard_of)))
    moved_rows, moved_to = _rows_at(spool, moved), shard_of[moved]
    staying = shard_of.copy()
    staying[moved] = -1
    digests, batches, utterances, seconds = [], [], 0, 0.0
    with pq.ParquetWriter(spool.path("plan.parquet"), PLAN_SCHEMA, compression="zstd") as writer:
        for shard, rows in _shards(spool, staying):
            rows = pa.concat_tables([rows, moved_rows.filter(pa.array(moved_to == shard))]).combine_chunks()
            lengths = rows["duration"].fill_null(UNKNOWN_SECONDS).to_numpy()
            order, batch = batches_by_length(lengths, config.batch_seconds)
            rows = rows.take(pa.array(order))
            rows = rows.add_column(0, "batch", pa.array(batch, pa.int32()))
            rows = rows.add_column(0, "shard", pa.array(np.full(len(order), first_shard + shard), pa.int32()))
            writer.write_table(rows, row_group_size=max(len(order), 1))
            digests.append(shard_digest(rows))
            batches.append(int(batch[-1]) + 1)
            utterances += len(order)
            seconds += float(lengths.sum())
    size = int(np.concatenate(spool.sizes)[shard_of >= 0].sum()) if utterances else 0
    return Round(file, round_digest(digests), first_shard, tuple(batches), utterances, round(seconds, 3), size)


def _shards(spool: _Spool, shard_of: np.ndarray):
    """(shard, rows) in order; each row's shard is at least that of the row before it, or -1."""
    if not (shard_of >= 0).any():
        return
    with pa.OSFile(spool.path("rows.arrow")) as source:
        reader = pa.ipc.open_file(source)
        current, parts = 0, []
        for number in range(reader.num_record_batches):
            chunk = reader.get_batch(number)
            shards = shard_of[number * CHUNK : number * CHUNK + len(chunk)]
            for shard in np.unique(shards[shards >= 0]):
                if shard != current:
                    yield current, pa.Table.from_batches(parts, _SPOOL)
                    current, parts = shard, []
                parts.append(chunk.filter(pa.array(shards == shard)))
        yield current, pa.Table.from_batches(parts, _SPOOL)


def batches_by_length(seconds: np.ndarray, budget: float) -> tuple[np.ndarray, np.ndarray]:
    """Utterances of like length share a batch whose padded audio fits the budget.

    Args:
        seconds: float [n], lengths.
        budget: seconds of padded audio a batch may hold; a longer utterance is a batch of its own.

    Returns:
        int [n] the order of utterances, longest first, and int [n] the batch of each of those.
    """
    order = np.argsort(-seconds, kind="stable")
    batch = np.empty(len(seconds), dtype=np.int64)
    current, first, longest = -1, 0, 0.0
    for place, length in enumerate(seconds[order].tolist()):
        if current < 0 or (place - first + 1) * longest > budget:
            current, first, longest = current + 1, place, length
        batch[place] = current
    return order, batch
