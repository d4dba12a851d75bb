"""Samples out of a dataset's shards, by row of its index: neighbours in one read, each checked against the index."""

from __future__ import annotations

import errno
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from infra import storage
from pipeline import phonemes, shards
from pipeline.shard_cache import DamagedShard, ShardCache
from pipeline.token_index import ShardFile, TokenIndex

_GAP = 64 << 10
"""Bytes that are cheaper to read and throw away than another request."""
_LONGEST_READ = 32 << 20
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before storage that failed is tried again."""


class BadSample(NamedTuple):
    """A sample that could not be used."""

    row: int
    shard: str
    """URL of its tar."""
    reason: str


class _Lost(ValueError):
    """Bytes that the storage does not have: asking again would not bring them."""


class SampleReader:
    """Reads any samples of an index, from several threads if need be.

    Args:
        cache: local folder for whole shards of a remote dataset; None reads stretches of them as needed. A local
            dataset needs none.
    """

    def __init__(self, index: TokenIndex, cache: ShardCache | None = None) -> None:
        self.index = index
        remote = any(not storage.is_local(shard.url) for shard in index.shards[:1])
        self.cache = cache if remote else None
        self._unreadable: dict[str, str] = {}

    def read(self, rows: np.ndarray) -> tuple[dict[int, shards.Sample], list[BadSample]]:
        """Samples by row, and those that cannot be used.

        Args:
            rows: int [n] of the index, in any order, selected or not.

        Raises:
            OSError: the storage failed, and went on failing; that is not held against the samples.
        """
        good: dict[int, shards.Sample] = {}
        bad: list[BadSample] = []
        for shard, together in self._stretches(np.sort(rows)):
            start, stop = self._span(together)
            try:
                data = self._bytes(shard, start, stop)
            except _Lost as error:
                bad += [BadSample(row, shard.url, str(error)) for row in together]
                continue
            for row in together:
                first, end = self._span([row])
                try:
                    good[row] = self._checked(row, data[first - start : end - start])
                except ValueError as error:
                    bad.append(BadSample(row, shard.url, str(error)))
        return good, bad

    def _stretches(self, rows: np.ndarray) -> Iterator[tuple[ShardFile, list[int]]]:
        """Ascending rows that are read at once: of one shard, with small gaps between them."""
        together: list[int] = []
        before = -1
        for row, shard in zip(rows.tolist(), self.index.shard_of(rows).tolist(), strict=True):
            if together:
                start, stop = self._span([*together[:1], row])
                near = self._span([row])[0] - self._span(together)[1] <= _GAP and stop - start <= _LONGEST_READ
                if shard != before or not near:
                    yield self.index.shards[before], together
                    together = []
            together.append(row)
            before = shard
        if together:
            yield self.index.shards[before], together

    def _span(self, rows: list[int]) -> tuple[int, int]:
        """Bytes from the first of some rows to the last."""
        offset, size = self.index.columns["offset"], self.index.columns["size"]
        return int(offset[rows[0]]), int(offset[rows[-1]]) + int(size[rows[-1]])

    def _bytes(self, shard: ShardFile, start: int, stop: int) -> bytes:
        """A stretch of a shard. Storage that fails is tried again; a shard that is not there is not asked for twice.

        Raises:
            _Lost: the shard is not there, is damaged, or ends before `start`.
            OSError: the storage failed each time.
        """
        if shard.url in self._unreadable:
            raise _Lost(self._unreadable[shard.url])
        pauses = iter(_PAUSES)
        while True:
            try:
                if self.cache is not None:
                    return self.cache.read(shard, start, stop)
                return storage.read_range(shard.url, start, stop)
            except (FileNotFoundError, DamagedShard) as error:
                self._unreadable[shard.url] = f"the shard cannot be read: {error}"
                raise _Lost(self._unreadable[shard.url]) from None
            except OSError as error:
                if error.errno == errno.EINVAL:  # what S3 answers where the object ends before `start`
                    raise _Lost(str(error)) from None
                if (pause := next(pauses, None)) is None:
                    raise
                time.sleep(pause)

    def _checked(self, row: int, data: bytes) -> shards.Sample:
        """The sample of a row out of its bytes. Raises ValueError where they are not what the index says."""
        size, frames = int(self.index.columns["size"][row]), int(self.index.columns["frames"][row])
        if len(data) != size:
            raise ValueError(f"the shard ends {size - len(data)} bytes too early")
        try:
            found = list(shards.read_samples(data))
        except Exception as error:  # tar, NumPy and JSON parsers fail on damaged bytes in more ways than they document
            raise ValueError(f"damaged: {error!r}") from None
        if len(found) != 1 or zlib.crc32(found[0].key.encode("utf-8")) != int(self.index.columns["key_sum"][row]):
            raise ValueError(f"found {[sample.key for sample in found]} where the index has another sample")
        sample, wanted = found[0], (self.index.codebooks, frames)
        if sample.codes.shape != wanted:
            raise ValueError(f"{sample.key}: codes are {sample.codes.shape}, not {wanted}")
        if sample.codes.size and sample.codes.max() >= self.index.codec["codebook_size"]:
            raise ValueError(
                f"{sample.key}: code {sample.codes.max()} is not below {self.index.codec['codebook_size']}"
            )
        phonemes.encode(sample.phones.split())
        return sample
