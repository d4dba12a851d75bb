"""From a schedule's row numbers to tensors: reads samples out of shards ahead of time, and tells how long one waited.

    loader = Loader(schedule, rank=0, world=8, start_step=resumed, codec=model_codec)
    for step in loader:
        for micro in step.micro_batches:
            if micro.rows.size: train(micro.batch)

There is no state to save: start at a step and get what an uninterrupted run gets. A sample that cannot be read is named
and left out, which every run with the same data does alike. Too many of them end the run; a shard that has lost many is
counted once, as a lost shard, since one damaged file may have thousands.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from pipeline import phonemes, shards
from pipeline.sample_reader import BadSample, SampleReader
from pipeline.schedule import Schedule
from pipeline.shard_cache import ShardCache
from pipeline.token_index import DataError

if TYPE_CHECKING:
    from model.lina import Batch

_log = logging.getLogger(__name__)
_LOST = 10
"""Samples that a shard may lose before it counts as lost itself."""


class MicroBatch(NamedTuple):
    """What a worker trains on at once."""

    batch: Batch
    """Where `rows` is empty, one row with no frames, so that a worker can keep step with the others; give it no
    weight, and where all workers have none, leave the step out."""
    rows: np.ndarray
    """int [B], of the index."""
    keys: tuple[str, ...]
    speakers: tuple[str, ...]


class Step(NamedTuple):
    """What a worker trains on in a step of the optimiser."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    waited: float
    """Seconds that the caller waited for it."""


class Loader:
    """The steps of one worker, in order, from `start_step` on; also a context manager, which stops its threads.

    Args:
        rank, world: this worker among all.
        start_step, stop_step: the first step, and the one before which to end (None: never).
        codec: identity that the dataset's must equal, as `CodecIdentity.to_dict` gives it; None takes any.
        cache: local folder for whole shards of a remote dataset; None reads stretches of them as needed. Not used for
            a local dataset.
        cache_bytes: limit of that folder. It should hold the shards of two of the schedule's windows.
        prefetch: steps that are read ahead.
        threads: that read them.
        max_bad_samples: that this worker leaves out before it gives up, those of lost shards aside.
        max_bad_shards: lost ones, of each of which this worker has left out more than 10 samples, before it gives up.

    Raises:
        DataError: the dataset is of another codec, has fewer codebooks than the schedule counts, or its samples are
            too long for the budget and so many workers.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        codec: dict[str, Any] | None = None,
        cache: str | None = None,
        cache_bytes: int = 50 << 30,
        prefetch: int = 8,
        threads: int = 4,
        max_bad_samples: int = 100,
        max_bad_shards: int = 10,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to {world - 1}, not {rank}")
        if prefetch < 1 or threads < 1:
            raise ValueError(f"prefetch and threads must be at least 1, not {prefetch} and {threads}")
        index = schedule.index
        index.require_codec(index.codec if codec is None else codec, schedule.codebooks)
        schedule.require_world(world)
        self.index, self.schedule, self.rank, self.world = index, schedule, rank, world
        self.next_step, self.stop_step = start_step, stop_step
        self.prefetch, self.max_bad_samples, self.max_bad_shards = prefetch, max_bad_samples, max_bad_shards
        self.waited = 0.0
        """Seconds that the caller has waited in all."""
        self.bad: dict[int, BadSample] = {}
        """By row, what was left out so far."""
        self._bad_by_shard: Counter[str] = Counter()
        self._reader = SampleReader(index, ShardCache(cache, cache_bytes) if cache is not None else None)
        if self._reader.cache is not None:
            self._warn_if_small(cache_bytes)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead: deque[Future[tuple[tuple[MicroBatch, ...], list[BadSample]]]] = deque()

    def __iter__(self) -> Iterator[Step]:
        while self.stop_step is None or self.next_step < self.stop_step:
            yield self._next()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def load(self, step: int) -> tuple[tuple[MicroBatch, ...], list[BadSample]]:
        """This worker's micro-batches of any step, and what had to be left out of them; reads now, counts nothing."""
        parts = [self.schedule.part(step, self.rank, self.world, micro) for micro in range(self.schedule.accumulate)]
        good, bad = self._reader.read(np.concatenate(parts))
        batches = []
        for rows in parts:
            kept = np.array([row for row in rows.tolist() if row in good], dtype=np.int64)
            batches.append(self._micro_batch(kept, [good[row] for row in kept.tolist()]))
        return tuple(batches), bad

    def _next(self) -> Step:
        step = self.next_step
        last = step + self.prefetch if self.stop_step is None else min(step + self.prefetch, self.stop_step)
        for ahead in range(step + len(self._ahead), last):
            self._ahead.append(self._pool.submit(self.load, ahead))
        start = time.perf_counter()
        micro_batches, bad = self._ahead.popleft().result()
        waited = time.perf_counter() - start
        self.waited += waited
        self.next_step += 1
        self._count(step, bad)
        return Step(step, micro_batches, waited)

    def _count(self, step: int, bad: list[BadSample]) -> None:
        """In the order of steps, whatever order they were read in, so that a run ends where its repetition does."""
        for sample in bad:
            if sample.row in self.bad:
                continue
            self.bad[sample.row] = sample
            self._bad_by_shard[sample.shard] += 1
            if (lost := self._bad_by_shard[sample.shard]) <= _LOST:
                _log.warning("step %d: left out sample %d of %s: %s", step, sample.row, sample.shard, sample.reason)
            elif lost == _LOST + 1:
                _log.warning("step %d: more of %s is left out; it counts as a lost shard", step, sample.shard)
        counts = self._bad_by_shard.values()
        shards_lost, single = sum(count > _LOST for count in counts), sum(count for count in counts if count <= _LOST)
        if single > self.max_bad_samples:
            self._give_up(f"{single} samples cannot be used, more than max_bad_samples {self.max_bad_samples}")
        if shards_lost > self.max_bad_shards:
            self._give_up(
                f"{shards_lost} shards have each lost more than {_LOST} samples, more shards than max_bad_shards "
                f"{self.max_bad_shards}"
            )

    def _give_up(self, why: str) -> NoReturn:
        last = next(reversed(self.bad.values()))
        raise DataError(
            f"{why}; the last one is sample {last.row} of {last.shard}: {last.reason}. Run jobs/verify.py on the "
            "dataset, or raise the limit"
        )

    def _micro_batch(self, rows: np.ndarray, samples: list[shards.Sample]) -> MicroBatch:
        names = [self.index.speakers[number] for number in self.index.columns["speaker"][rows].tolist()]
        batch = collate(samples or [_nothing(self.index.codebooks)], self.schedule.codebooks)
        return MicroBatch(batch, rows, tuple(sample.key for sample in samples), tuple(names))

    def _warn_if_small(self, cache_bytes: int) -> None:
        sizes = sorted((shard.bytes for shard in self.index.shards), reverse=True)
        if (needed := 2 * sum(sizes[: self.schedule.window])) > cache_bytes and sum(sizes) > cache_bytes:
            _log.warning(
                "the shards' cache of %.1f GB may not hold two windows of %d shards (%.1f GB): shards will be loaded "
                "again and again; raise cache_gib, or lower window",
                cache_bytes / 1e9,
                self.schedule.window,
                needed / 1e9,
            )


def collate(samples: Sequence[shards.Sample], codebooks: int) -> Batch:
    """Samples as the network takes them: `<bos>` and `<eos>` around the phones, the first codebooks of the codes.

    Raises:
        ValueError: phones outside the inventory, or a sample with fewer codebooks.
    """
    import torch

    from model.lina import Batch

    texts = [phonemes.encode((phonemes.BOS, *sample.phones.split(), phonemes.EOS)) for sample in samples]
    frames = [sample.codes.shape[1] for sample in samples]
    phones = np.zeros((len(samples), max(map(len, texts))), dtype=np.int64)
    codes = np.zeros((len(samples), codebooks, max(1, *frames)), dtype=np.int64)
    for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        if len(sample.codes) < codebooks:
            raise ValueError(f"{sample.key} has {len(sample.codes)} codebooks, fewer than {codebooks}")
        phones[row, : len(text)] = text
        codes[row, :, : frames[row]] = sample.codes[:codebooks]
    lengths = torch.tensor([len(text) for text in texts])
    return Batch(torch.from_numpy(phones), lengths, torch.from_numpy(codes), torch.tensor(frames))


def _nothing(codebooks: int) -> shards.Sample:
    return shards.Sample("", np.zeros((codebooks, 0), dtype=np.uint16), "", {})
