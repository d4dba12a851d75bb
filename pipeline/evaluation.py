"""Systems compared on the same clips: the original, a codec, Opus beside it, with confidence intervals.

`compare` takes any way to turn a clip into another recording of it; `evaluate_codec` compares a codec with the original
and with Opus. Intervals are 95 % bootstrap intervals over clips (1,000 resamples, seeded): a figure of 20 clips says
little, and the interval shows how little. Differences to the original are resampled in pairs, which makes them tighter.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline import measures
from pipeline.measures import EvaluationError

if TYPE_CHECKING:
    from model.codec import Codec

_RESAMPLES, _SEED = 1000, 20251
ORIGINAL = "original"

Recogniser = Callable[[np.ndarray, int], str]
"""What is said in float32 [time] at a sample rate."""
System = Callable[[np.ndarray, int], np.ndarray]
"""float32 [time] at a sample rate -> another recording of the same, aligned in time."""


@dataclass(frozen=True)
class Clip:
    """One utterance to compare systems on."""

    id: str
    samples: np.ndarray
    """float32 [time]."""
    rate: int
    text: str
    """What is said in it; '' when nobody knows, and then no words are counted."""


class Figure(NamedTuple):
    """A measurement over clips and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """What one system reached."""

    system: str
    figures: dict[str, Figure]
    """By measure, those of `COLUMNS`; measures against the original are missing for the original."""
    codebooks: tuple[float, ...] = ()
    """A codec's perplexity by codebook: how many of its entries are in effective use."""
    extra: dict[str, float] = field(default_factory=dict)
    """Numbers that are no mean over clips."""

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Flat names and floats, as experiment trackers take them: `codec.wer`, `codec.wer.low`."""
        flat = {f"{prefix}{self.system}.{name}": value for name, value in self.extra.items()}
        flat |= {f"{prefix}{self.system}.perplexity.{i}": value for i, value in enumerate(self.codebooks, 1)}
        for name, figure in self.figures.items():
            key = f"{prefix}{self.system}.{name}"
            flat |= {key: figure.value, f"{key}.low": figure.low, f"{key}.high": figure.high}
        return {re.sub(r"[^\w./-]+", "-", name): value for name, value in flat.items()}


COLUMNS = {
    "coverage": ("coverage %", 100.0, 1),
    "wer": ("WER %", 100.0, 1),
    "wer_added": ("WER +", 100.0, 1),
    "cer": ("CER %", 100.0, 1),
    "similarity": ("SIM", 1.0, 3),
    "stoi": ("STOI", 1.0, 3),
    "mel": ("mel dist.", 1.0, 3),
    "mos": ("DistillMOS", 1.0, 2),
    "dnsmos": ("DNSMOS", 1.0, 2),
    "clicks": ("clicks %", 100.0, 1),
}
"""Measure -> its heading, factor and decimals in the printed table."""


class _Scores(NamedTuple):
    """One system on one clip."""

    errors: measures.WordErrors | None
    similarity: float
    stoi: float
    mel: float
    mos: float
    dnsmos: float
    clicks: bool


def evaluate_codec(
    clips: Sequence[Clip],
    codec: Codec,
    recogniser: Recogniser | None = None,
    codebooks: int | None = None,
    opus_kbits: Sequence[float] = (6.0, 12.0),
    progress: Callable[[int, int], None] = lambda done, total: None,
    prefixes: Sequence[int] = (),
    encodec: Codec | None = None,
) -> list[Row]:
    """The original, `codec` and Opus on `clips`, which must be at the codec's sample rate.

    The codec's row carries, beside the figures, its codebooks' perplexities and how many seconds of audio a core
    encodes and decodes in a second.

    Args:
        codebooks: of the codec that are in use; None means all.
        prefixes: numbers of first codebooks that get a row of their own, where more are in use.
        encodec: EnCodec's published 24 kHz codec, for rows at 3 and 6 kbit/s.

    Raises:
        EvaluationError: no clips, another sample rate, or the `eval` extra is missing.
    """
    if wrong := [clip for clip in clips if clip.rate != codec.config.sample_rate]:
        raise EvaluationError(
            f"clip {wrong[0].id!r} has {wrong[0].rate} Hz, the codec {codec.config.sample_rate}: resample it first"
        )
    through = _Through(codec, codebooks)
    systems: dict[str, System] = {
        f"{codec.config.name}, {depth * codec.config.frame_rate:g} codes/s": _Through(codec, depth)
        for depth in sorted(set(prefixes))
        if depth < (codebooks or codec.config.codebooks)
    }
    systems[codec.config.name] = through
    if encodec is not None:
        systems |= {"EnCodec 3 kbit/s": _Through(encodec, 4), "EnCodec 6 kbit/s": _Through(encodec, 8)}
    systems |= {
        f"Opus {kbits:g} kbit/s": lambda samples, rate, kbits=kbits: measures.opus(samples, rate, kbits)
        for kbits in opus_kbits
    }
    rows = compare(clips, systems, recogniser, progress)
    return [through.described(row) if row.system == codec.config.name else row for row in rows]


def compare(
    clips: Sequence[Clip],
    systems: dict[str, System],
    recogniser: Recogniser | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """One row for the original and one for each system, all on the same clips.

    Args:
        recogniser: default: Whisper base out of the `eval` extra, beam 5.
        progress: told the clips done, and all.

    Raises:
        EvaluationError: no clips, or the `eval` extra is missing.
    """
    if not clips:
        raise EvaluationError("there are no clips to compare systems on")
    recogniser = recogniser or whisper()
    scores: dict[str, list[_Scores]] = {name: [] for name in (ORIGINAL, *systems)}
    for done, clip in enumerate(clips, 1):
        original = np.asarray(clip.samples, np.float32)
        voice = voice_of(original, clip.rate)
        for name in scores:
            recording = original if name == ORIGINAL else systems[name](original, clip.rate)[: len(original)]
            scores[name].append(_scores(clip, original, voice, recording, recogniser))
        progress(done, len(clips))
    return [Row(name, _figures(of, scores[ORIGINAL], name == ORIGINAL)) for name, of in scores.items()]


def interval(parts: np.ndarray, wholes: np.ndarray) -> Figure:
    """Sum of parts over sum of wholes, with the 2.5 and 97.5 percentiles over resampled clips.

    Args:
        parts, wholes: [clips]: errors and words of each; for a mean the wholes are ones. The same number of clips is
            resampled in the same way every time.
    """
    draws = np.random.default_rng(_SEED).integers(0, len(parts), (_RESAMPLES, len(parts)))
    totals = wholes[draws].sum(axis=1)
    resampled = parts[draws].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Figure(float(parts.sum() / wholes.sum()), float(low), float(high))


def table(rows: Sequence[Row]) -> str:
    """Markdown: systems by measures, each with its interval; below it what is no mean over clips."""
    shown = [name for name in COLUMNS if any(name in row.figures for row in rows)]
    lines = ["| system | " + " | ".join(COLUMNS[name][0] for name in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row.system} | " + " | ".join(_cell(row.figures.get(name), name) for name in shown) + " |")
    for row in rows:
        if row.codebooks:
            lines += ["", f"{row.system}, codebook perplexities: " + ", ".join(f"{p:.0f}" for p in row.codebooks)]
        lines += [f"{row.system}, {name}: {_three_digits(value)}" for name, value in row.extra.items()]
    return "\n".join(lines)


def _three_digits(value: float) -> str:
    """0.0341, 70.8, 12,346: of large numbers, all that stand before the point."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def whisper(model: str = "whisper-base") -> Recogniser:
    """A recogniser for `compare`: any model that `pipeline.transcription` takes, beam 5, on two threads.

    Raises:
        TranscriptionUnavailable: no such model, or the `asr` extra is missing.
    """
    from pipeline.transcription import Transcriber

    return Transcriber(model, threads=2).transcribe


class _Through:
    """A codec as a system: encodes and decodes, and keeps the codes and the seconds that it took."""

    def __init__(self, codec: Codec, codebooks: int | None) -> None:
        self.codec, self.codebooks = codec, codebooks
        self.codes: list[np.ndarray] = []
        self.seconds = {"audio": 0.0, "encode": 0.0, "decode": 0.0}

    def __call__(self, samples: np.ndarray, rate: int) -> np.ndarray:
        started = time.process_time()
        codes = self.codec.encode([samples], self.codebooks)
        encoded = time.process_time()
        (decoded,) = self.codec.decode(codes)
        self.seconds["decode"] += time.process_time() - encoded
        self.seconds["encode"] += encoded - started
        self.seconds["audio"] += len(samples) / rate
        self.codes += codes
        return self.codec.beside(decoded, samples)

    def described(self, row: Row) -> Row:
        """`row` with what was seen of the codes and the clock."""
        used = measures.perplexity(self.codes, self.codec.config.codebook_size)
        rates = {
            f"{part}, audio seconds a core-second": self.seconds["audio"] / max(1e-9, self.seconds[part])
            for part in ("encode", "decode")
        }
        return dataclasses.replace(row, codebooks=tuple(used), extra=rates)


def _scores(
    clip: Clip, original: np.ndarray, voice: np.ndarray | None, recording: np.ndarray, recogniser: Recogniser
) -> _Scores:
    rate = clip.rate
    errors = measures.count_errors(clip.text, recogniser(recording, rate)) if clip.text.strip() else None
    return _Scores(
        errors,
        _likeness(voice, recording, rate),
        measures.intelligibility(original, recording, rate),
        measures.mel_distance(original, recording, rate),
        measures.predicted_mos(recording, rate),
        measures.dnsmos(recording, rate),
        measures.clicks(original, recording, rate),
    )


def voice_of(recording: np.ndarray, rate: int) -> np.ndarray | None:
    """The voice print of float32 [time]; None where there is no voice."""
    try:
        return measures.voice_print(recording, rate)
    except measures.NoVoice:
        return None


def _likeness(voice: np.ndarray | None, recording: np.ndarray, rate: int) -> float:
    """Similarity to a voice print: 0 where no voice is left in the recording, NaN where there was none before."""
    if voice is None:
        return math.nan
    other = voice_of(recording, rate)
    return 0.0 if other is None else measures.similarity(voice, other)


def _figures(scores: list[_Scores], originals: list[_Scores], is_original: bool) -> dict[str, Figure]:
    counted = np.array([score.errors or (0, 0, 0, 0) for score in scores], dtype=np.float64)
    before = np.array([score.errors or (0, 0, 0, 0) for score in originals], dtype=np.float64)
    figures = {}
    if counted[:, 0].sum():
        figures["wer"] = interval(counted[:, 1], counted[:, 0])
        figures["cer"] = interval(counted[:, 3], counted[:, 2])
        if not is_original:
            figures["wer_added"] = interval(counted[:, 1] - before[:, 1], counted[:, 0])
    compared = ("mos", "dnsmos") if is_original else ("similarity", "stoi", "mel", "mos", "dnsmos", "clicks")
    for name in compared:
        values = np.array([getattr(score, name) for score in scores], dtype=np.float64)
        if len(values := values[~np.isnan(values)]):
            figures[name] = interval(values, np.ones(len(values)))
    return figures


def _cell(figure: Figure | None, name: str) -> str:
    if figure is None:
        return "—"
    _, factor, decimals = COLUMNS[name]
    value, low, high = (f"{number * factor:.{decimals}f}" for number in figure)
    return f"{value} [{low}, {high}]"
