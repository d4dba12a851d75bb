"""Pieces of speech as one: silences between them as long as they are meant to be, no step in the wave anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FADE = 0.008
"""Seconds at both ends of every piece."""
_QUIET = 10 ** (-45 / 20)
"""Of a piece's loudest 10 ms: what is below is its silence."""
_WINDOW = 0.01


def join(waves: Sequence[np.ndarray], pauses: Sequence[float], rate: int) -> np.ndarray:
    """One wave of several.

    Args:
        waves: float32 [samples] each; empty ones leave only their pause.
        pauses: seconds of silence after each wave, what the two pieces bring along included; the last one's is ignored.
        rate: samples a second.

    Returns:
        float32 [samples], starting and ending at zero.
    """
    parts: list[np.ndarray] = []
    for number, wave in enumerate(waves):
        first, last = number == 0, number == len(waves) - 1
        begin, end = _spoken(wave, rate)
        before = 0.0 if first else pauses[number - 1] / 2
        after = 0.0 if last else pauses[number] / 2
        start = 0 if first else max(0, begin - round(before * rate))
        stop = len(wave) if last else min(len(wave), end + round(after * rate))
        parts += [
            np.zeros(max(0, round(before * rate) - (begin - start)), np.float32),
            faded(wave[start:stop], rate),
            np.zeros(max(0, round(after * rate) - (stop - end)), np.float32),
        ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def trailing_silence(wave: np.ndarray, rate: int) -> float:
    """Seconds of silence at a wave's end."""
    return (len(wave) - _spoken(wave, rate)[1]) / rate


def faded(wave: np.ndarray, rate: int, start: bool = True, end: bool = True) -> np.ndarray:
    """A copy of float32 [samples] that starts, and ends, at zero, without a step."""
    length = min(round(FADE * rate), len(wave) // 2)
    ramp = (0.5 - 0.5 * np.cos(np.pi * np.arange(length) / max(length, 1))).astype(np.float32)
    faded = wave.astype(np.float32, copy=True)
    if start:
        faded[:length] *= ramp
    if end:
        faded[len(faded) - length :] *= ramp[::-1]
    return faded


def _spoken(wave: np.ndarray, rate: int) -> tuple[int, int]:
    """Where a wave's speech begins and ends."""
    window = round(_WINDOW * rate)
    count = -(-len(wave) // window)
    frames = np.pad(wave, (0, count * window - len(wave))).reshape(count, window)
    level = np.sqrt(np.square(frames, dtype=np.float64).mean(1))
    loud = np.flatnonzero(level > _QUIET * level.max(initial=0.0))
    if not len(loud):
        return 0, 0
    return int(loud[0]) * window, min(len(wave), (int(loud[-1]) + 1) * window)
