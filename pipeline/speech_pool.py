"""Speech to train a codec on: one memory-mapped file of samples, from which any step's batch is drawn by its number.

`batch(seed, step, worker)` is a pure function of the pool and its arguments, so resuming needs no loader state.
Segments are varied so that a codec trained on clean voices carries over to real recordings: level, speed (which moves
pitch and formants together), bandwidth, noise, a room, sometimes a second voice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """How often and how far segments are varied; chances from 0 to 1."""

    speed: float = 0.5
    """Chance of another speed; the factor is from 0.8 to 1.25, evenly on a log scale."""
    band: float = 0.25
    """Chance of a low-pass between 3.4 and 8 kHz, as in recordings of a lower sample rate."""
    noise: float = 0.1
    """Chance of coloured noise, 10 to 45 dB under the speech."""
    room: float = 0.1
    """Chance of a room whose sound decays by 60 dB in 0.1 to 0.6 s; its tail is heard for 0.3 s."""
    second_voice: float = 0.05
    """Chance of another utterance under the first one."""
    lowest_level: float = -20.0
    """Peak levels are from here to -1 dB, evenly."""


class SpeechPool:
    """
    Args:
        samples: int16 [total], utterances one after another.
        ends: int64 [utterances]: where each ends.
        sample_rate: Hz.
    """

    def __init__(self, samples: np.ndarray, ends: np.ndarray, sample_rate: int) -> None:
        if len(ends) == 0 or len(samples) != ends[-1]:
            raise ValueError(f"a speech pool needs utterances: {len(ends)} of them, {len(samples)} samples")
        self.samples, self.ends, self.sample_rate = samples, ends, sample_rate

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate

    @property
    def digest(self) -> str:
        """sha256 of lengths and of a thousandth of the samples: tells pools apart without reading hours of audio."""
        state = hashlib.sha256(np.ascontiguousarray(self.ends).tobytes())
        state.update(np.ascontiguousarray(self.samples[::997]).tobytes())
        return state.hexdigest()

    @classmethod
    def open(cls, folder: str | Path) -> SpeechPool:
        folder = Path(folder)
        facts = json.loads((folder / "pool.json").read_text(encoding="utf-8"))
        samples = np.memmap(folder / "samples.int16", dtype=np.int16, mode="r")
        return cls(samples, np.asarray(facts["ends"], dtype=np.int64), facts["sample_rate"])

    @classmethod
    def write(cls, folder: str | Path, waves, sample_rate: int) -> SpeechPool:
        """Writes float waves [samples] from an iterable into a folder, the description last, and opens it."""
        folder, ends, total = Path(folder), [], 0
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.int16.part").open("wb") as file:
            for wave in waves:
                file.write((np.clip(wave, -1, 1) * 32767).astype(np.int16).tobytes())
                total += len(wave)
                ends.append(total)
        (folder / "samples.int16.part").rename(folder / "samples.int16")
        (folder / "pool.json").write_text(json.dumps({"sample_rate": sample_rate, "ends": ends}), encoding="utf-8")
        return cls.open(folder)

    def utterance(self, number: int) -> np.ndarray:
        """float32 [samples] of one whole utterance."""
        first = int(self.ends[number - 1]) if number else 0
        return self.samples[first : int(self.ends[number])].astype(np.float32) / 32768

    def batch(
        self, seed: int, step: int, worker: int, rows: int, samples: int, augmentation: Augmentation | None
    ) -> np.ndarray:
        """float32 [rows, samples]: the segments that `worker` trains on at `step`."""
        rng = np.random.default_rng([seed, step, worker])
        return np.stack([self._segment(rng, samples, augmentation) for _ in range(rows)])

    def _segment(self, rng: np.random.Generator, samples: int, augmentation: Augmentation | None) -> np.ndarray:
        if augmentation is None:
            return self._cut(rng, samples)
        wave = self._cut_at_speed(rng, samples, augmentation)
        if rng.random() < augmentation.second_voice:
            wave = wave + 10 ** (-rng.uniform(0, 15) / 20) * self._cut_at_speed(rng, samples, augmentation)
        if rng.random() < augmentation.room:
            wave = _in_a_room(rng, wave, self.sample_rate)
        if rng.random() < augmentation.noise:
            wave = _with_noise(rng, wave)
        if rng.random() < augmentation.band:
            wave = _low_passed(wave, rng.uniform(3400, 8000), self.sample_rate)
        peak = 10 ** (rng.uniform(augmentation.lowest_level, -1) / 20)
        return (wave * (peak / max(float(np.abs(wave).max()), 1e-4))).astype(np.float32)

    def _cut_at_speed(self, rng: np.random.Generator, samples: int, augmentation: Augmentation) -> np.ndarray:
        if rng.random() >= augmentation.speed:
            return self._cut(rng, samples)
        speed = 2 ** rng.uniform(-0.32, 0.32)
        wave = self._cut(rng, round(samples * speed) + 2)
        return _resampled(wave, speed, samples)

    def _cut(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """`samples` of one utterance from a random place; shorter ones are followed by silence."""
        which = int(np.searchsorted(self.ends, rng.integers(len(self.samples)), side="right"))
        first = int(self.ends[which - 1]) if which else 0
        length = int(self.ends[which]) - first
        start = first + int(rng.integers(max(1, length - samples + 1)))
        wave = np.zeros(samples, dtype=np.float32)
        piece = self.samples[start : min(start + samples, int(self.ends[which]))]
        wave[: len(piece)] = piece.astype(np.float32) / 32768
        return wave


def _resampled(wave: np.ndarray, speed: float, samples: int) -> np.ndarray:
    """`samples` of the wave played `speed` times as fast."""
    import soxr

    result = soxr.resample(wave, speed, 1.0, quality="LQ")[:samples]
    return np.pad(result, (0, samples - len(result)))


def _in_a_room(rng: np.random.Generator, wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """The wave with an exponentially decaying tail of noise behind the direct sound."""
    length = int(0.3 * sample_rate)
    decay = rng.uniform(0.1, 0.6)
    tail = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / sample_rate / decay)
    tail[: int(rng.uniform(0.001, 0.01) * sample_rate)] = 0
    tail *= rng.uniform(0.1, 0.7) / max(float(np.linalg.norm(tail)), 1e-6)
    size = 1 << (len(wave) + length - 1).bit_length()
    return wave + np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(tail, size), size)[: len(wave)]


def _with_noise(rng: np.random.Generator, wave: np.ndarray) -> np.ndarray:
    """The wave with noise whose spectrum falls by 0 to 6 dB an octave."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    noise = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 20) ** rng.uniform(0, 1), len(wave))
    level = float(np.sqrt(np.mean(wave**2))) * 10 ** (-rng.uniform(10, 45) / 20)
    return wave + noise * (level / max(float(np.sqrt(np.mean(noise**2))), 1e-9))


def _low_passed(wave: np.ndarray, cutoff: float, sample_rate: int) -> np.ndarray:
    """The wave without what lies above `cutoff` Hz, with a slope of an eighth of it."""
    spectrum = np.fft.rfft(wave)
    frequencies = np.fft.rfftfreq(len(wave), 1 / sample_rate)
    return np.fft.irfft(spectrum * np.clip((cutoff * 1.125 - frequencies) / (cutoff / 8), 0, 1), len(wave))
