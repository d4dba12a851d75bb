"""Audio in: any recording that libsndfile reads, on any fsspec URL, as clean mono at one sample rate.

A segment is read by seeking to it: an utterance of a ten-hour audiobook costs its own bytes and no more memory than
`max_seconds`, whatever the header claims. FLAC, WAV (RF64, W64), AIFF, AU, CAF, NIST SPHERE, MP3, Ogg Vorbis and Opus
seek to the exact sample, so cuts of one recording join without a gap.

Whatever is wrong with a recording is an `Unusable` with one of `REASONS`. A storage service that fails to answer is not
the recording's fault: that stays an OSError, for the task to be tried again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pipeline.recording import Recording, opened
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    import numpy as np

REASONS = {
    "missing-file": "there is no such file",
    "not-a-file": "a folder, a pipe or a device",
    "no-permission": "the file may not be read",
    "empty": "no bytes, or a header without audio",
    "unreadable": "not audio that libsndfile knows, or damaged",
    "bad-header": "the header claims less than the file holds",
    "bad-sample-rate": "0 Hz, or outside 4 to 384 kHz",
    "bad-channel": "the channel asked for is not there",
    "bad-times": "start or duration is negative, not a number or infinite",
    "unknown-length": "the header does not say how long the recording is",
    "start-past-end": "the segment starts after the recording's end",
    "end-past-end": "the segment ends after the recording's end",
    "truncated": "the header claims more than the file holds",
    "too-long": "more seconds than may be read at once",
    "too-short": "fewer seconds than an utterance has",
    "not-finite": "NaN or infinite samples",
    "silent": "nothing but silence",
    "too-quiet": "the level is too low for speech",
    "too-loud": "samples far outside -1 to 1",
    "clipped": "too many samples at full scale",
}

_END_TOLERANCE = 0.1
"""Seconds by which a manifest may overstate a segment's end: durations are rounded, and MP3 lengths are estimates."""


class AudioInfo(NamedTuple):
    """What a recording's header says."""

    frames: int
    sample_rate: int
    channels: int
    seconds: float


@dataclass(frozen=True)
class SignalLimits:
    """What a usable utterance sounds like. The defaults keep normal corpora whole and drop what cannot be speech."""

    min_seconds: float = 0.1
    """Shorter is `too-short`: about one phone."""
    silence_dbfs: float = -75.0
    """A largest swing (half of peak to peak, so that an offset does not hide it) below this is `silent`."""
    min_dbfs: float = -60.0
    """A root mean square below this is `too-quiet`."""
    max_clipped: float = 0.01
    """A larger share of samples at or above 0.999 of full scale is `clipped`."""
    max_peak: float = 4.0
    """A larger absolute sample is `too-loud`; lossy codecs overshoot 1.0 a little, broken float files by far."""


class Signal(NamedTuple):
    """Levels of a signal: largest absolute sample, root mean square in dB relative to 1.0, share at full scale."""

    peak: float
    dbfs: float
    clipped: float


def probe(url: str) -> AudioInfo:
    """Length, rate and channels, without decoding the recording.

    Raises:
        Unusable: the file cannot be opened, is no audio, or its header is impossible, gives no length or claims more
            than the file can hold.
        OSError: the storage failed.
    """
    with opened(url) as recording:
        if recording.length_unknown:
            raise Unusable("unknown-length", f"{url}: a streamed file without its length; re-encode it")
        if shortfall := recording.shortfall():
            raise Unusable("truncated", f"{url}: {shortfall}")
        frames, rate = recording.frames, recording.rate
        return AudioInfo(frames, rate, recording.channels, frames / rate)


def read_segment(
    url: str,
    start: float = 0.0,
    duration: float | None = None,
    max_seconds: float = 60.0,
    channel: int | None = None,
) -> tuple[np.ndarray, int]:
    """Samples of one segment, float32 [n] mono, and their rate in Hz.

    Args:
        start, duration: seconds; a duration of None reads to the end of the recording.
        max_seconds: a longer segment is refused before it is read.
        channel: which one to take; None averages all.

    Raises:
        Unusable: with one of `REASONS`.
        OSError: the storage failed.
    """
    for name, value in (("start", start), ("duration", 0.0 if duration is None else duration)):
        if not math.isfinite(value) or value < 0:
            raise Unusable("bad-times", f"{url}: {name} {value} is not a number of seconds")
    with opened(url) as recording:
        rate, total = recording.rate, recording.frames
        first, most = round(start * rate), math.ceil(max_seconds * rate)
        if first >= total:
            raise _past_end("start-past-end", f"starts at {start:.3f} s", recording)
        wanted = total - first if duration is None else round(duration * rate)
        open_ended = duration is None and recording.length_unknown
        if wanted > most and not open_ended:
            raise _too_long(recording, first, wanted, most)
        if first + wanted > total + _END_TOLERANCE * rate:
            raise _past_end("end-past-end", f"ends at {start + wanted / rate:.3f} s", recording)
        if duration is None and (shortfall := recording.shortfall()):
            raise Unusable("truncated", f"{url}: {shortfall}")
        wanted = min(wanted, total - first, most + 1)
        samples = recording.read_mono(first, wanted, channel)
        missing = wanted - len(samples)
        if open_ended and not missing:
            raise Unusable("too-long", f"{url}: over {max_seconds} s from {start:.3f} s on; cut it at pauses first")
        if not open_ended and missing > (_END_TOLERANCE * rate if recording.format == "MP3" else 0):
            raise Unusable("truncated", f"{url}: the data ends {missing} samples before the header's end")
    return samples, rate


def resample(samples: np.ndarray, rate: int, target: int = 24_000) -> np.ndarray:
    """float32 [n] at `rate` Hz to float32 [about n * target / rate], with soxr's HQ filter."""
    if rate == target:
        return samples
    import soxr

    return soxr.resample(samples, rate, target, quality="HQ")


def measure(samples: np.ndarray) -> Signal:
    """Levels of float32 [n], n > 0."""
    import numpy as np

    magnitude = np.abs(samples)
    rms = math.sqrt(float(np.mean(np.square(samples, dtype=np.float64))))
    return Signal(float(magnitude.max()), 20 * math.log10(max(rms, 1e-10)), float(np.mean(magnitude >= 0.999)))


def check_signal(samples: np.ndarray, rate: int, limits: SignalLimits = SignalLimits(), where: str = "") -> Signal:
    """The levels of float32 [n] if they are those of speech.

    Raises:
        Unusable: `empty`, `too-short`, `not-finite`, `silent`, `too-loud`, `clipped` or `too-quiet`.
    """
    import numpy as np

    prefix, count = f"{where}: " if where else "", len(samples)
    if not count:
        raise Unusable("empty", f"{prefix}no samples")
    if count < limits.min_seconds * rate:
        detail = f"{prefix}{count} samples at {rate} Hz are {count / rate:.4f} s, under {limits.min_seconds} s"
        raise Unusable("too-short", detail)
    if bad := count - int(np.isfinite(samples).sum()):
        raise Unusable("not-finite", f"{prefix}{bad} of {count} samples are NaN or infinite")
    level = measure(samples)
    swing = 20 * math.log10(max(float(np.ptp(samples)) / 2, 1e-10))
    if swing < limits.silence_dbfs:
        raise Unusable("silent", f"{prefix}largest swing {swing:.1f} dBFS, under {limits.silence_dbfs}")
    if level.peak > limits.max_peak:
        raise Unusable("too-loud", f"{prefix}peak {level.peak:.4g}, over {limits.max_peak}")
    if level.clipped > limits.max_clipped:
        share = f"{level.clipped:.1%} of samples at full scale, over {limits.max_clipped:.1%}"
        raise Unusable("clipped", f"{prefix}{share}")
    if level.dbfs < limits.min_dbfs:
        raise Unusable("too-quiet", f"{prefix}{level.dbfs:.1f} dBFS, under {limits.min_dbfs}")
    return level


def clean_audio(
    url: str,
    start: float = 0.0,
    duration: float | None = None,
    *,
    target_rate: int = 24_000,
    max_seconds: float = 60.0,
    channel: int | None = None,
    limits: SignalLimits = SignalLimits(),
) -> np.ndarray:
    """One utterance as the codec wants it: float32 [n] mono at `target_rate`, read, checked and resampled.

    Raises:
        Unusable: with one of `REASONS`.
        OSError: the storage failed.
    """
    samples, rate = read_segment(url, start, duration, max_seconds, channel)
    check_signal(samples, rate, limits, where=url)
    return resample(samples, rate, target_rate)


def _past_end(reason: str, what: str, recording: Recording) -> Unusable:
    if shortfall := recording.shortfall():
        return Unusable("truncated", f"{recording.url}: {what}, and {shortfall}")
    return Unusable(reason, f"{recording.url}: {what}, the recording has {recording.frames / recording.rate:.3f} s")


def _too_long(recording: Recording, first: int, wanted: int, most: int) -> Unusable:
    """`too-long`, or `truncated` where the length was only claimed: looks whether the frame past the limit is there."""
    if len(recording.read_mono(min(first + most, recording.frames - 1), 1)):
        seconds = f"{wanted / recording.rate:.3f} s, at most {most / recording.rate:.3f} may be read at once"
        return Unusable("too-long", f"{recording.url}: {seconds}; cut it at pauses first")
    return Unusable("truncated", f"{recording.url}: the header has {recording.frames} samples, the data far fewer")
