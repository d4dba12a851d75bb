"""What a finished dataset is made of, counted in one pass over its index files: lengths, rates, speakers, codes.

Memory does not grow with the dataset: lengths and rates go into fixed bins, codes are counted in a spread sample, and
only speakers are kept by name, up to a limit.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infra import storage
from pipeline import shards

_READERS = 8
_SPEAKERS_BY_NAME = 200_000


class Histogram:
    """Counts of numbers ≥ 0 in bins of one width, with their exact sum and extremes."""

    def __init__(self, width: float, bins: int) -> None:
        self.width = width
        self.counts = np.zeros(bins, np.int64)
        """int64 [bins]; the last one holds everything beyond."""
        self.total = 0
        self.sum = 0.0
        self.lowest, self.highest = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        """Counts float [values]."""
        if not len(values):
            return
        bins = np.minimum((values / self.width).astype(np.int64), len(self.counts) - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.total += len(values)
        self.sum += float(values.sum())
        self.lowest, self.highest = min(self.lowest, values.min()), max(self.highest, values.max())

    @property
    def mean(self) -> float:
        return self.sum / max(self.total, 1)

    def quantile(self, share: float) -> float:
        """The value below which `share` of the numbers lie, to half a bin."""
        if not self.total:
            return 0.0
        position = int(np.searchsorted(np.cumsum(self.counts), share * self.total))
        return float(np.clip((position + 0.5) * self.width, self.lowest, self.highest))


@dataclass
class Census:
    """The counts that the card and the plots show."""

    seconds: Histogram = field(default_factory=lambda: Histogram(0.05, 4000))
    phone_rates: Histogram = field(default_factory=lambda: Histogram(0.1, 600))
    """Phonemes a second of the utterances that have text."""
    without_text: int = 0
    speakers: dict[str, tuple[int, float]] = field(default_factory=dict)
    """(utterances, seconds) of each."""
    unnamed_speakers: tuple[int, float] = (0, 0.0)
    """(utterances, seconds) of those beyond the limit of names that are kept."""
    codes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """int64 [codebooks, entries]: how often the sample uses each."""
    codes_from: int = 0
    """Utterances in the sample of codes."""

    def add_speaker(self, name: str, utterances: int, seconds: float) -> None:
        if name in self.speakers or len(self.speakers) < _SPEAKERS_BY_NAME:
            known = self.speakers.get(name, (0, 0.0))
            self.speakers[name] = (known[0] + utterances, known[1] + seconds)
        else:
            known = self.unnamed_speakers
            self.unnamed_speakers = (known[0] + utterances, known[1] + seconds)

    def perplexity(self) -> np.ndarray:
        """float [codebooks]: 2 to the entropy of the codes, the number of entries in effective use."""
        share = self.codes / np.maximum(self.codes.sum(axis=1, keepdims=True), 1)
        return 2.0 ** -(share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=1)


def take(dataset: str, summary: dict[str, Any], tars: int = 8, samples: int = 64) -> Census:
    """Reads every index file of the dataset that `summary` (its dataset.json) lists, and a few samples of a few tars.

    Args:
        tars: Spread evenly over the dataset; their codes are counted.
        samples: Of each of those, spread evenly over it.
    """
    census = Census()
    names = [shard["url"].removesuffix(".tar") for shard in summary["shardlist"]]
    urls = [storage.join(dataset, f"{name}.index.parquet") for name in names]
    with ThreadPoolExecutor(_READERS) as readers:
        for window in _windows(urls, 64 * _READERS):
            for part in readers.map(_read_index, window):
                _add_index(census, part)
        entries = summary["codec"]["codebook_size"]
        census.codes = np.zeros((summary["codebooks"], entries), np.int64)
        chosen = [storage.join(dataset, name) for name in _spread(names, tars)]
        for codes in readers.map(lambda shard: _read_codes(shard, samples), chosen):
            for item in codes:
                census.codes_from += 1
                for book, row in enumerate(item):
                    census.codes[book] += np.bincount(row, minlength=entries)
    return census


def _read_index(url: str) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """(seconds, phones, speakers) of one shard."""
    import pyarrow.parquet as pq

    columns = ["speaker", "phones", "seconds"]
    table = pq.read_table(io.BytesIO(storage.read_bytes(url)), columns=columns, use_threads=False)
    speakers = table.group_by("speaker", use_threads=False).aggregate([("seconds", "count"), ("seconds", "sum")])
    return table["seconds"].to_numpy(), table["phones"].to_numpy(), speakers.to_pylist()


def _add_index(census: Census, part: tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]) -> None:
    seconds, phones, speakers = part
    census.seconds.add(seconds)
    spoken = (phones > 0) & (seconds > 0)
    census.phone_rates.add(phones[spoken] / seconds[spoken])
    census.without_text += int((phones == 0).sum())
    for row in speakers:
        census.add_speaker(row["speaker"], row["seconds_count"], row["seconds_sum"])


def _read_codes(shard: str, samples: int) -> list[np.ndarray]:
    import pyarrow.parquet as pq

    columns = ["offset", "size"]
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{shard}.index.parquet")), columns=columns, use_threads=False)
    spans = [(row["offset"], row["offset"] + row["size"]) for row in _spread(table.to_pylist(), samples)]
    pieces = (storage.read_range(f"{shard}.tar", start, stop) for start, stop in spans)
    return [sample.codes for piece in pieces for sample in shards.read_samples(piece)]


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread from the first to the last."""
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))
    return [items[place] for place in places]


def _windows(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while window := list(itertools.islice(iterator, size)):
        yield window
