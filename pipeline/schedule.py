"""Which samples are trained on at which step: a pure function of (index, seed, step), so there is nothing to save.

An epoch puts the shards in random order and cuts them into windows of some shards. In a window, samples go into length
buckets 2.5 % wide, in random order within a bucket; the row of buckets is cut into batches that fit the budget, at
places that are random where the budget leaves a choice; the batches of a window come in random order. So reading stays
within a window of shards, a batch holds samples of about one length, and an epoch has each sample once.

How many batches a window gets is the least that fit, which its histogram of lengths tells. So finding a step needs one
table of shards × buckets, and the samples of one window: milliseconds for millions of samples.

The global batch knows nothing of the workers: `part` deals it out to them.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np

from pipeline.token_index import DataError, TokenIndex, scramble

BUDGET = 4096
WINDOW = 128
_BUCKET = 40
"""A bucket reaches 1/40 further than where it begins."""
_SHARDS, _ROWS, _CUTS, _ORDER = range(4)
"""What randomness is for: keeps the streams apart."""


class Epoch(NamedTuple):
    """The plan of one pass over the data."""

    order: np.ndarray
    """Shards that have samples, in the order of this epoch."""
    windows: np.ndarray
    """int [windows + 1]: where in `order` each begins."""
    batches: np.ndarray
    """int [windows + 1]: how many batches come before each."""


class Schedule:
    """The batches of a training run.

    Args:
        index: the samples to train on; only their lengths and shards matter.
        seed: of all randomness.
        budget: model steps of a global batch at most, padding included: rows × (longest frames + codebooks + 1).
        codebooks: that the model reads.
        accumulate: micro-batches that each worker goes through in a step.
        window: shards that are open at a time. More mix better, fewer need less cache.

    Raises:
        ValueError: a setting below 1.
        DataError: an empty index, or a sample that does not fit the budget.
    """

    def __init__(
        self,
        index: TokenIndex,
        seed: int = 0,
        budget: int = BUDGET,
        codebooks: int = 4,
        accumulate: int = 1,
        window: int = WINDOW,
    ) -> None:
        for name, value in (("codebooks", codebooks), ("accumulate", accumulate), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not len(index):
            raise DataError("no sample is left to train on; ease the limits on length, speakers or valid_fraction")
        self.index, self.seed, self.budget = index, seed, budget
        self.codebooks, self.accumulate, self.window = codebooks, accumulate, window
        self._bounds = np.searchsorted(index.rows, index.starts)
        self._edges = _edges(int(index.columns["frames"][index.rows].max()) + codebooks + 1)
        self._count_lengths()
        if self._longest[-1] > budget:
            raise DataError(
                f"budget {budget} does not hold the longest sample, {self._longest[-1]} steps; set budget to at least "
                f"{self._longest[-1]}, or lower max_seconds to leave such samples out"
            )
        self._first_steps = [0]
        self._growing = Lock()  # the loader's threads ask for steps of new epochs at once
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def batch(self, step: int) -> np.ndarray:
        """The global batch of a step from 0 on: row numbers of the index, shortest samples first."""
        epoch, within = self.locate(step)
        plan = self._epoch(epoch)
        window = int(np.searchsorted(plan.batches, within, side="right")) - 1
        rows, cuts, order = self._window(epoch, window)
        place = order[within - plan.batches[window]]
        return rows[cuts[place] : cuts[place + 1]]

    def part(self, step: int, rank: int = 0, world: int = 1, micro: int = 0) -> np.ndarray:
        """The rows of a worker's micro-batch: `accumulate` × `world` of them make up `batch(step)`, in that order.

        Parts have equally many rows, or one more. Where a batch has fewer rows than there are parts, the last parts
        are empty. After `require_world` that takes a batch that is not full: such a one still has about a quarter of
        the rows that the budget has room for, unless its whole window has less.
        """
        rows, parts = self.batch(step), self.accumulate * world
        part = micro * world + rank
        each, extra = divmod(len(rows), parts)
        start = part * each + min(part, extra)
        return rows[start : start + each + (part < extra)]

    def require_world(self, world: int) -> None:
        """Raises DataError where full batches of the longest samples cannot give each micro-batch a row."""
        rows, parts = self.budget // int(self._longest[-1]), self.accumulate * world
        if rows < parts:
            raise DataError(
                f"budget {self.budget} holds {rows} of the longest samples ({self._longest[-1]} steps), but {world} "
                f"workers × accumulate {self.accumulate} need {parts}; set budget to at least "
                f"{parts * int(self._longest[-1])}, or lower workers, accumulate or max_seconds"
            )

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """How many batches an epoch has; epochs may differ by a few."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """The step that an epoch begins with."""
        with self._growing:
            while len(self._first_steps) <= epoch:
                last = len(self._first_steps) - 1
                self._first_steps.append(self._first_steps[last] + int(self._epoch(last).batches[-1]))
        return self._first_steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        while (known := len(self._first_steps)) and self._first_steps[known - 1] <= step:
            self.first_step(known)
        epoch = bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def steps_of(self, rows: np.ndarray) -> np.ndarray:
        """Model steps of each row: frames, and what the delay of the codebooks and the end add."""
        return self.index.columns["frames"][rows] + (self.codebooks + 1)

    def padding(self, steps: range, world: int = 1) -> float:
        """The share of padding in what all workers compute over some steps, each micro-batch padded to its longest."""
        real = padded = 0
        for step in steps:
            for part in range(self.accumulate * world):
                rows = self.part(step, part % world, world, part // world)
                if len(rows):
                    lengths = self.steps_of(rows)
                    real, padded = real + int(lengths.sum()), padded + len(rows) * int(lengths.max())
        return 1 - real / padded

    def _count_lengths(self) -> None:
        """For each shard with samples, how many it has in each bucket; and the longest sample of each bucket."""
        self._shards = np.flatnonzero(np.diff(self._bounds))
        buckets = len(self._edges)
        histogram = np.zeros((len(self._shards), buckets), dtype=np.int32)
        longest = np.zeros(buckets, dtype=np.int64)
        for number, shard in enumerate(self._shards):
            lengths = self.steps_of(self.index.rows[self._bounds[shard] : self._bounds[shard + 1]])
            bucket = np.searchsorted(self._edges, lengths)
            histogram[number] = np.bincount(bucket, minlength=buckets)
            np.maximum.at(longest, bucket, lengths)
        used = longest > 0
        self._edges, self._longest, self._histogram = self._edges[used], longest[used], histogram[:, used]

    def _make_epoch(self, epoch: int) -> Epoch:
        order = np.argsort(scramble(self._shards, self.seed, epoch, _SHARDS), kind="stable")
        count = -(-len(order) // self.window)
        windows = np.arange(count + 1) * len(order) // count
        histogram = np.add.reduceat(self._histogram[order], windows[:-1], axis=0, dtype=np.int64)
        batches = np.concatenate([[0], np.cumsum(_least_batches(histogram, self._longest, self.budget))])
        return Epoch(self._shards[order], windows, batches)

    def _make_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, where its batches are cut, the order in which they come) of a window."""
        plan = self._epoch(epoch)
        shards = plan.order[plan.windows[window] : plan.windows[window + 1]]
        rows = np.concatenate([self.index.rows[self._bounds[s] : self._bounds[s + 1]] for s in shards])
        bucket = np.searchsorted(self._edges, self.steps_of(rows))
        order = np.lexsort((rows, scramble(rows, self.seed, epoch, _ROWS), bucket))
        rows, room = rows[order], self.budget // self._longest[bucket[order]]
        count = int(plan.batches[window + 1] - plan.batches[window])
        cuts = _cut(room, scramble(np.arange(count), self.seed, epoch, window, _CUTS))
        rows = rows[np.lexsort((rows, self.steps_of(rows), np.repeat(np.arange(count), np.diff(cuts))))]
        return rows, cuts, np.argsort(scramble(np.arange(count), self.seed, epoch, window, _ORDER), kind="stable")


def _edges(longest: int) -> np.ndarray:
    """Where the length buckets end, up to `longest`; whole numbers, so that they are the same on every machine."""
    edges = [1]
    while edges[-1] < longest:
        edges.append(edges[-1] + max(1, edges[-1] // _BUCKET))
    return np.array(edges)


def _least_batches(histogram: np.ndarray, longest: np.ndarray, budget: int) -> np.ndarray:
    """How many batches windows need, filled up one after another from short to long.

    Args:
        histogram: int [windows, buckets], rows of each bucket.
        longest: int [buckets], ascending: what a row of the bucket counts.
    """
    closed = np.zeros(len(histogram), dtype=np.int64)
    filled = np.zeros_like(closed)
    for rows, room in zip(histogram.T, (budget // longest).tolist(), strict=True):
        full = (rows > 0) & (filled >= room)  # no room for one more row as long as this
        closed += full
        filled = np.where(full, 0, filled) + rows
        more = np.where(rows > 0, (filled - 1) // room, 0)
        closed += more
        filled -= more * room
    return closed + (filled > 0)


def _cut(room: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Where rows are cut into len(random) batches, which is the least that they need.

    The k-th cut may be as early as the rest still fits the batches left, and as late as the batch has room: it is put
    between a quarter and three quarters of that way, at random, so that no batch is tiny and epochs differ.

    Args:
        room: int [rows], descending: rows that a batch may have which ends with this one.
    """
    count = len(random)
    latest = np.arange(1, len(room) + 1) - room  # ascending: the earliest start of a batch that ends with the row
    earliest = [len(room)]
    for _ in range(count):
        earliest.append(max(0, int(latest[earliest[-1] - 1])))
    earliest.reverse()
    share = 0.25 + 0.5 * (random >> np.uint64(11)).astype(np.float64) / 2**53
    cuts = [0]
    for k in range(1, count):
        furthest = int(np.searchsorted(latest, cuts[-1], side="right"))
        cuts.append(earliest[k] + int(share[k] * (furthest - earliest[k])))
    return np.array(cuts + [len(room)])
