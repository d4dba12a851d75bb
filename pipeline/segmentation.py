"""Long recordings to utterances: where speech is, and where to cut between its pauses.

Speech is found by silero-vad's network (its wheel carries it) over 32 ms frames, streamed: a ten-hour book needs the
memory of one minute. Cutting is a pure function of the spans, so LibriLight's own `voice_activity` goes the same way.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.audio import read_segment
from pipeline.recording import opened
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    import numpy as np

_RATE, _FRAME, _CONTEXT = 16_000, 512, 64
_FRAME_SECONDS = _FRAME / _RATE
_PIECE_SECONDS = 30.0
_SPEECH, _STILL_SPEECH = 0.5, 0.35
"""Probabilities at which speech begins, and below which it ends."""
_SHORTEST_SPEECH, _SHORTEST_PAUSE, _MARGIN = 0.25, 0.2, 0.05
"""Seconds: shorter noises are no speech, shorter gaps may be inside a word, and a span keeps this much around it."""
_ROUNDING = 1e-9
_PAUSE_WEIGHT = 0.2
"""How much a pause of the target's length is worth against a squared distance of one target."""
_ROOM_FOR_QUIET = 0.9
"""Parts of a span cut at quiet places are planned this much shorter than the limit, so that there is a choice."""


class Segment(NamedTuple):
    """A stretch of a recording, in seconds."""

    start: float
    duration: float


def speech_spans(samples: np.ndarray, rate: int) -> list[tuple[float, float]]:
    """Start and end, in seconds, of every stretch of speech in float32 [n] mono at `rate` Hz; ordered and disjoint."""
    return _spans(_probabilities([samples], rate), len(samples) / rate)


def vad_spans(url: str) -> list[tuple[float, float]]:
    """`speech_spans` of a whole recording, however long, in bounded memory.

    Raises:
        Unusable: the recording cannot be read to its end.
        OSError: the storage failed.
    """
    with opened(url) as recording:
        if shortfall := recording.shortfall():
            raise Unusable("truncated", f"{url}: {shortfall}")
        read = 0

        def pieces() -> Iterator[np.ndarray]:
            nonlocal read
            for piece in recording.stream(_PIECE_SECONDS):
                read += len(piece)
                yield piece

        probabilities = _probabilities(pieces(), recording.rate)
        if not recording.length_unknown and recording.format != "MP3" and read < recording.frames:
            raise Unusable(
                "truncated", f"{url}: the data ends {recording.frames - read} samples before the header's end"
            )
        return _spans(probabilities, read / recording.rate)


def cut(
    spans: Iterable[tuple[float, float]],
    target_seconds: float,
    max_seconds: float,
    max_silence: float,
    quietest: Callable[[float, float], float] | None = None,
) -> list[Segment]:
    """Segments of about `target_seconds` out of speech spans: ordered, disjoint, none longer than `max_seconds`.

    A pause longer than `max_silence` is dropped. Between two of those, the cuts are the pauses that bring the lengths
    nearest to the target (least squares, longer pauses preferred). Only a span that is itself longer than `max_seconds`
    is cut inside: into equal parts, or at `quietest(earliest, latest)` near them.

    Raises:
        ValueError: limits that cannot be met.
        Unusable: `bad-times`, spans that are not finite or begin before 0.
    """
    if not 0 < target_seconds <= max_seconds or max_silence < 0:
        raise ValueError(
            f"need 0 < target_seconds <= max_seconds and max_silence >= 0, "
            f"not {target_seconds}, {max_seconds} and {max_silence}"
        )
    pieces = [piece for span in _tidy(spans) for piece in _parts(*span, max_seconds, quietest)]
    segments: list[Segment] = []
    for group in _split_at_silence(pieces, max_silence):
        segments.extend(_best_partition(group, target_seconds, max_seconds))
    return segments


def quietest_place(url: str, window: float = 0.04) -> Callable[[float, float], float]:
    """For `cut`: the middle of the quietest `window` seconds of a recording between two times."""

    def place(earliest: float, latest: float) -> float:
        import numpy as np

        samples, rate = read_segment(url, earliest, latest - earliest, max_seconds=latest - earliest + 1)
        size = max(int(window * rate), 1)
        if len(samples) <= size:
            return (earliest + latest) / 2
        energy = np.convolve(np.square(samples, dtype=np.float64), np.ones(size), mode="valid")
        return earliest + (int(energy.argmin()) + size / 2) / rate

    return place


def _tidy(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """In order, without empty ones, overlapping ones made one."""
    tidy: list[tuple[float, float]] = []
    for start, end in sorted((float(start), float(end)) for start, end in spans):
        if not (math.isfinite(start) and math.isfinite(end)) or start < 0:
            raise Unusable("bad-times", f"speech from {start} to {end} is not a span of seconds")
        if end <= start:
            continue
        last = tidy[-1][1] if tidy else 0.0
        if start < last - _ROUNDING:
            tidy[-1] = (tidy[-1][0], max(end, last))
        elif end > last:
            tidy.append((max(start, last), end))
    return tidy


def _parts(
    start: float, end: float, most: float, quietest: Callable[[float, float], float] | None
) -> Iterator[tuple[float, float]]:
    """The span, or as few parts of at most `most` seconds as it needs."""
    parts = math.ceil((end - start) / (most * (_ROOM_FOR_QUIET if quietest else 1)) - _ROUNDING)
    while end - start > most + _ROUNDING:
        parts = max(parts, 2)
        place = start + (end - start) / parts
        if quietest:
            earliest = max(end - (parts - 1) * most, (start + place) / 2)
            place = min(max(quietest(earliest, start + most), earliest), start + most)
        yield start, place
        start, parts = place, parts - 1
    yield start, end


def _split_at_silence(
    spans: Sequence[tuple[float, float]], max_silence: float
) -> Iterator[Sequence[tuple[float, float]]]:
    first = 0
    for number, ((_, end), (start, _)) in enumerate(pairwise(spans), 1):
        if start - end > max_silence:
            yield spans[first:number]
            first = number
    if spans:
        yield spans[first:]


def _best_partition(spans: Sequence[tuple[float, float]], target: float, most: float) -> list[Segment]:
    """Neighbouring spans joined so that the sum of squared distances from the target is least (dynamic programming)."""
    costs, begins = [0.0], [0]
    for last in range(len(spans)):
        best, begin = math.inf, last
        for first in range(last, -1, -1):
            length = spans[last][1] - spans[first][0]
            if length > most + _ROUNDING:
                break
            pause = spans[first][0] - spans[first - 1][1] if first else 0.0
            cost = costs[first] + (length / target - 1) ** 2 - _PAUSE_WEIGHT * pause / target
            if cost < best:
                best, begin = cost, first
        costs.append(best)
        begins.append(begin)
    segments, last = [], len(spans)
    while last:
        first = begins[last]
        start = spans[first][0]
        segments.append(Segment(start, min(spans[last - 1][1] - start, most)))
        last = first
    return segments[::-1]


def _spans(probabilities: np.ndarray, seconds: float) -> list[tuple[float, float]]:
    """Frames' probabilities to spans: starts above one threshold, ends below another, short gaps closed."""
    found: list[list[float]] = []
    speaking = False
    for frame, probability in enumerate(probabilities.tolist()):
        now = frame * _FRAME_SECONDS
        if not speaking and probability >= _SPEECH:
            speaking = True
            if found and now - found[-1][1] < _SHORTEST_PAUSE:
                continue
            found.append([now, now])
        elif speaking and probability < _STILL_SPEECH:
            speaking = False
            found[-1][1] = now
    if speaking:
        found[-1][1] = seconds
    kept = [(start, min(end, seconds)) for start, end in found if end - start >= _SHORTEST_SPEECH]
    gaps = [seconds, *(after[0] - before[1] for before, after in pairwise(kept)), seconds]
    return [
        (max(start - min(_MARGIN, gaps[i] / 2), 0.0), min(end + min(_MARGIN, gaps[i + 1] / 2), seconds))
        for i, (start, end) in enumerate(kept)
    ]


def _probabilities(pieces: Iterable[np.ndarray], rate: int) -> np.ndarray:
    """Probability of speech, float32 [frames], of consecutive pieces of one signal."""
    import numpy as np

    session, state = _network(), [np.zeros((1, 1, 128), np.float32)] * 2
    tail = np.zeros(_CONTEXT, np.float32)
    found = [np.zeros(0, np.float32)]
    for frames in _frames(_at_16_khz(pieces, rate)):
        contexts = np.vstack([tail, frames[:-1, -_CONTEXT:]])
        inputs = {"input": np.hstack([contexts, frames]), "h": state[0], "c": state[1]}
        values, *state = session.run(["speech_probs", "hn", "cn"], inputs)
        tail = frames[-1, -_CONTEXT:]
        found.append(values.reshape(-1))
    return np.concatenate(found)


def _frames(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """float32 [k, frame] blocks; the last frame is filled up with silence."""
    import numpy as np

    rest = np.zeros(0, np.float32)
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        whole = len(rest) // _FRAME * _FRAME
        if whole:
            yield rest[:whole].reshape(-1, _FRAME)
        rest = rest[whole:]
    if len(rest):
        yield np.pad(rest, (0, _FRAME - len(rest)))[None]


def _at_16_khz(pieces: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    if rate == _RATE:
        yield from pieces
        return
    import numpy as np
    import soxr

    stream = soxr.ResampleStream(rate, _RATE, 1, dtype="float32", quality="HQ")
    for piece in pieces:
        yield stream.resample_chunk(piece)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


@cache
def _network() -> Any:
    """silero-vad's network that takes many frames a call; importing its package would change torch's thread count."""
    import onnxruntime

    spec = importlib.util.find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("silero-vad is not installed: run `make install`")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = Path(spec.submodule_search_locations[0], "data", "silero_vad_16k_sequence.onnx")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
