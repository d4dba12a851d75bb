"""What goes wrong with recordings that people enroll with: noise, rooms, levels. Functions of samples and a seed."""

from __future__ import annotations

import numpy as np


def degraded(samples: np.ndarray, rate: int, kind: str, number: float, seed: int) -> np.ndarray:
    """float32 [time] as a worse recording of the same speech gives it, as long as before.

    Args:
        kind, number: of `pipeline.experiments.config.condition_of`.
    """
    if kind == "clean":
        return samples
    random = np.random.default_rng(seed)
    if kind == "noise":
        return noisy(samples, rate, number, random)
    if kind == "reverb":
        return reverberant(samples, rate, number, random)
    return np.clip(samples * 10 ** (number / 20), -1, 1).astype(np.float32)


def noisy(samples: np.ndarray, rate: int, snr: float, random: np.random.Generator) -> np.ndarray:
    """With stationary noise of a falling spectrum (power as 1 / f above 100 Hz), `snr` dB below the speech's power."""
    spectrum = np.fft.rfft(random.standard_normal(len(samples)))
    frequency = np.fft.rfftfreq(len(samples), 1 / rate)
    noise = np.fft.irfft(spectrum * np.minimum(1, (100 / np.maximum(frequency, 1)) ** 0.5), len(samples))
    power = np.mean(samples.astype(np.float64) ** 2) / 10 ** (snr / 10)
    scaled = noise * np.sqrt(power / max(np.mean(noise**2), 1e-20))
    return _within(samples + scaled)


def reverberant(samples: np.ndarray, rate: int, rt60: float, random: np.random.Generator) -> np.ndarray:
    """In a room whose sound falls by 60 dB in `rt60` seconds: the direct sound, and exponentially decaying noise of its
    energy from 5 ms on (Polack's model); as loud as before."""
    time = np.arange(round(rt60 * rate)) / rate
    room = random.standard_normal(len(time)) * 10 ** (-3 * time / rt60) * (time >= 0.005)
    room /= max(np.sqrt(np.sum(room**2)), 1e-20)
    room[0] = 1.0
    size = len(samples) + len(room) - 1
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(room, size), size)[: len(samples)]
    return _within(wet * np.sqrt(np.mean(samples.astype(np.float64) ** 2) / max(np.mean(wet**2), 1e-20)))


def _within(samples: np.ndarray) -> np.ndarray:
    """float32 within ±1: turned down as a whole where it would not be, as whoever records does."""
    return (samples / max(1.0, float(np.abs(samples).max(initial=0.0)))).astype(np.float32)
