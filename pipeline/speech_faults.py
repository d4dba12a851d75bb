"""What can go wrong when a model speaks, found in its codes and in where in the text it was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NO_END, TOO_SHORT, REPETITION, STANDING_STILL, SKIPPED = FAULTS = (
    *("no-end", "too-short"),
    *("repetition", "standing-still", "skipped-text"),
)
"""`no-end`: cut, as it did not end; `too-short`: faster than anybody speaks; `repetition`: the same codes over and
over; `standing-still`: about one place in the text for too long; `skipped-text`: phones that it never was at."""


@dataclass(frozen=True)
class Limits:
    """When speech counts as failed. Phones are the sounds of a text; its tokens are those, spaces and marks."""

    seconds_a_token: float = 0.2
    """Speech is cut after so many seconds for each token (twice as long as slow readers take) …"""
    seconds_more: float = 2.0
    """… and so many on top."""
    phones_a_second: float = 30.0
    """More phones a second are no speech (fast speakers reach 20)."""
    repeated_seconds: float = 1.5
    """So long may the first codebook repeat itself, …"""
    longest_period: float = 0.6
    """… one frame over and over or a pattern of up to so many seconds."""
    still_seconds: float = 1.5
    """In so long the place in the text moves …"""
    still_tokens: float = 3.0
    """… by so many tokens at least; in a shorter text by half of its sounds, at least by one. Pauses and drawn-out
    sounds are shorter, and the voice does not follow what drifts more slowly."""
    attended: float = 0.1
    """A phone was spoken if attention to it ever reached this."""
    skipped_share: float = 0.1
    """Share of a text's phones that may be skipped, …"""
    skipped_run: int = 4
    """… and how many of them in a row: a syllable, not a word."""

    def most_frames(self, tokens: int, frame_rate: float) -> int:
        """Where speech of a text of so many tokens is cut."""
        return max(1, round((self.seconds_more + self.seconds_a_token * tokens) * frame_rate))


@dataclass(frozen=True)
class Findings:
    """What is wrong with a piece of speech, and the measures behind it."""

    faults: tuple[str, ...]
    """Of `FAULTS`; empty for good speech."""
    coverage: float
    """Share of phones that were attended to."""


def examine(
    codes: np.ndarray,
    finished: bool,
    attention: np.ndarray,
    phones: np.ndarray,
    frame_rate: float,
    limits: Limits,
) -> Findings:
    """Looks a piece of speech over.

    Args:
        codes: int [K, N].
        finished: whether it ended by itself.
        attention: float [steps, J]: where in the text each step was.
        phones: bool [J]: which of the text's tokens are sounds.
        frame_rate: frames a second.
    """
    frames, sounds = codes.shape[1], int(phones.sum())
    reached = attention.max(0, initial=0.0)[phones] >= limits.attended
    coverage = float(reached.mean()) if sounds else 1.0
    window = max(2, round(limits.still_seconds * frame_rate))
    checks = {
        NO_END: not finished,
        TOO_SHORT: frames < sounds / limits.phones_a_second * frame_rate,
        REPETITION: _repeats(codes[0], limits, frame_rate),
        STANDING_STILL: _least_moved(attention, window) < min(limits.still_tokens, max(1, sounds / 2)),
        SKIPPED: 1 - coverage > limits.skipped_share or _longest_run(~reached) > limits.skipped_run,
    }
    return Findings(tuple(fault for fault, found in checks.items() if found), coverage)


def _repeats(codes: np.ndarray, limits: Limits, frame_rate: float) -> bool:
    """Whether a stretch of codes [N] equals itself a period earlier for too long."""
    most = round(limits.repeated_seconds * frame_rate)
    periods = range(1, max(1, round(limits.longest_period * frame_rate)) + 1)
    return any(_longest_run(codes[period:] == codes[:-period]) > most for period in periods if period < len(codes))


def _least_moved(attention: np.ndarray, window: int) -> float:
    """By how many tokens the mean place moves in the window of steps in which it moves least; inf in shorter speech."""
    if len(attention) < window:
        return np.inf
    place = attention @ np.arange(attention.shape[1])
    seen = np.lib.stride_tricks.sliding_window_view(place, window)
    return float((seen.max(1) - seen.min(1)).min())


def _longest_run(flags: np.ndarray) -> int:
    """How many True stand in a row at most."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))
