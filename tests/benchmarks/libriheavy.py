"""Writes a manifest with the form, sizes and redundancy of Libriheavy's, of as many cuts as wanted; no audio.

    python tests/benchmarks/libriheavy.py out/libriheavy_cuts_large.jsonl.gz --cuts 12400000

Libriheavy-large has 12.4 million cuts of 14.8 s on average by 6,736 readers. A cut's line holds its text twice (as
printed, and as recognised) and 1,000 characters before it twice, so that neighbours share most of what they say.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # this folder has a file with the name of a module of the standard library
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
from collections.abc import Iterator
from pathlib import Path

READERS = 6736
CUTS_A_FILE = 57
FILES_A_BOOK = 12
_CONTEXT_WORDS = 150

_CUT = (
    '{"id": "%(file)s_%(index)d", "start": %(start)s, "duration": %(duration)s, "channel": 0, "supervisions": [{"id": '
    '"%(file)s_%(index)d", "recording_id": "%(file)s", "start": 0, "duration": %(duration)s, "channel": 0, "language": '
    '"English", "speaker": "%(reader)s", "custom": {"texts": ["%(text)s", "%(heard)s"], "pre_texts": ["%(before)s", '
    '"%(heard_before)s"], "begin_byte": %(begin)d, "end_byte": %(end)d}}], "recording": {"id": "%(file)s", "sources": '
    '[{"type": "file", "channels": [0], "source": "download/librilight/%(file)s.flac"}], "sampling_rate": 16000, '
    '"num_samples": %(samples)d, "duration": %(total)s, "channel_ids": [0]}, "custom": {"text_path": '
    '"download/librilight_text/output_text_large_cleaned/%(book)s/text.txt"}, "type": "MonoCut"}\n'
)


def lines(cuts: int, seed: int = 0) -> Iterator[str]:
    """The JSON lines of `cuts` cuts, each ending in a newline; the same ones for the same arguments."""
    import numpy as np

    random = np.random.default_rng(seed)
    printed, printed_at, heard, heard_at = _book(random)
    at, index, file_number = _CONTEXT_WORDS, CUTS_A_FILE, -1
    lengths = np.clip(random.normal(14.8, 5.5, 1 << 16), 2.0, 35.0).round(2).tolist()
    for number in range(cuts):
        if index == CUTS_A_FILE:
            index, file_number = 0, file_number + 1
            book_number = file_number // FILES_A_BOOK
            reader = str(14 + book_number % READERS)
            book = f"thechroniclesof_{book_number:06d}_librivox_64kb_mp3"
            file = f"large/{reader}/{book}/chronicles_{file_number % FILES_A_BOOK:02d}_various_64kb"
            start = 21.04
        duration = lengths[number & 0xFFFF]
        stop = at + max(2, int(duration * 2.6))
        if stop >= len(printed_at):
            at, stop = _CONTEXT_WORDS, _CONTEXT_WORDS + stop - at
        before = at - _CONTEXT_WORDS
        yield _CUT % {
            "file": file,
            "index": index,
            "reader": reader,
            "book": book,
            "start": round(start, 4),
            "duration": duration,
            "text": printed[printed_at[at] : printed_at[stop] - 1],
            "heard": heard[heard_at[at] : heard_at[stop] - 1],
            "before": printed[printed_at[before] : printed_at[at] - 1],
            "heard_before": heard[heard_at[before] : heard_at[at] - 1],
            "begin": printed_at[at],
            "end": printed_at[stop],
            "samples": 16000 * 900,
            "total": 900.0,
        }
        at, start, index = stop, start + duration, index + 1


def write(path: str | Path, cuts: int, seed: int = 0) -> int:
    """Writes `cuts` cuts as `.jsonl` or, by the name, `.jsonl.gz`; returns the bytes before compression."""
    from isal import igzip

    path, size, waiting = Path(path), 0, []
    path.parent.mkdir(parents=True, exist_ok=True)
    with igzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else open(path, "wb") as file:
        for line in lines(cuts, seed):
            waiting.append(line)
            if len(waiting) == 1000:
                size += file.write("".join(waiting).encode())
                waiting.clear()
        size += file.write("".join(waiting).encode())
    return size


def _book(random) -> tuple[str, list[int], str, list[int]]:
    """400,000 words as printed and as recognised, and where each of them begins; letters as frequent as in English."""
    import numpy as np

    letters = np.array(
        list("eeeeeeeeeeeetttttttttaaaaaaaaooooooooiiiiiiinnnnnnnssssssrrrrrrhhhhhhddddlllluuucccmmffyywwggppbbvvk")
    )
    ranks = np.arange(30_000)
    sizes = np.clip(np.log10(ranks + 2) * 1.7 + random.integers(1, 4, len(ranks)), 1, 14).astype(int)
    vocabulary = ["".join(random.choice(letters, size)) for size in sizes]
    chances = 1 / (ranks + 2.7)  # as Zipf and Mandelbrot found
    words = random.choice(ranks, 400_000, p=chances / chances.sum())
    endings = random.choice([" "] * 16 + [", ", ", ", ". ", "; ", " — ", '.\\" '], len(words))
    printed, heard, capital = [], [], True
    for rank, ending in zip(words.tolist(), endings.tolist(), strict=True):
        word = vocabulary[rank]
        printed.append((word.capitalize() if capital else word) + ending)
        heard.append(word.upper() + " ")
        capital = "." in ending
    return "".join(printed), _starts(printed), "".join(heard), _starts(heard)


def _starts(words: list[str]) -> list[int]:
    import numpy as np

    return [0, *np.cumsum([len(word) for word in words]).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="file to write; gzipped if its name ends in .gz")
    parser.add_argument("--cuts", type=int, default=12_400_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = write(arguments.path, arguments.cuts, arguments.seed)
    compressed = Path(arguments.path).stat().st_size
    print(f"{arguments.cuts} cuts, {size / arguments.cuts:.0f} bytes each, {compressed / 1e9:.2f} GB on disk")


if __name__ == "__main__":
    main()
