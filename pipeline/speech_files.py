"""Speech as files: WAV, FLAC and Opus, each with its provenance in it, which `read` gives back.

What a listener's player shows stands in the tags title (the text), artist (the voice) and software; the comment is the
whole provenance as JSON. WAV keeps them in its LIST chunk, FLAC and Opus as Vorbis comments.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
"""By the ending of a file's name: libsndfile's format and what is in it."""
LONGEST_TAG, LONGEST_COMMENT = 100, 1400
"""Bytes: libsndfile drops the tags of a WAV file that together have more than about 2,000."""
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)


class SpeechFileError(ValueError):
    """A file of speech that cannot be written or read: says why."""


@dataclass(frozen=True)
class Provenance:
    """Where speech comes from. All of it is plain text, so that any tool can show it."""

    model: str
    """Fingerprint of the model."""
    voice: str = ""
    """Name of the voice; empty for the model's own."""
    consent: str = ""
    """Where the speaker's consent is on record."""
    text: str = ""
    """What is said; the file keeps its beginning."""
    details: dict[str, Any] = field(default_factory=dict)
    """More, as plain JSON: what was asked for, how many attempts it took."""
    synthetic: bool = True


def ending(name: str) -> str:
    """The format that a file's name asks for. Raises SpeechFileError for an unknown one."""
    suffix = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    if suffix not in FORMATS:
        raise SpeechFileError(f"{name}: speech is written as {', '.join('.' + known for known in FORMATS)}")
    return suffix


def encode(samples: np.ndarray, rate: int, provenance: Provenance, form: str = "wav") -> bytes:
    """A file of speech.

    Args:
        samples: float32 [time]; what is beyond ±1 is clipped.
        rate: samples a second.
        form: of `FORMATS`. WAV and FLAC have equal bytes for equal arguments; Opus numbers its streams at random.

    Raises:
        SpeechFileError: an unknown format, no audio, a rate that the format has not, provenance that does not fit.
    """
    import soundfile

    if form not in FORMATS:
        raise SpeechFileError(f"speech is written as {', '.join(FORMATS)}, not {form!r}")
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise SpeechFileError(f"expected a wave of finite numbers [time], found {samples.dtype} {list(samples.shape)}")
    if form == "opus" and rate not in _OPUS_RATES:
        raise SpeechFileError(f"Opus has {', '.join(map(str, _OPUS_RATES))} samples a second, not {rate}; use wav")
    container, content = FORMATS[form]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, content, format=container) as target:
        for name, value in tags(provenance).items():
            setattr(target, name, value)
        target.write(np.clip(samples, -1.0, 1.0))
    return file.getvalue()


def decode(content: bytes) -> tuple[np.ndarray, int, Provenance | None]:
    """(float32 [time], samples a second, its provenance if it carries one of ours).

    Raises:
        SpeechFileError: no audio file, or a damaged one.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as source:
            samples = source.read(dtype="float32", always_2d=True).mean(1)
            return samples, source.samplerate, _provenance(source.copy_metadata())
    except (soundfile.SoundFileError, ValueError) as error:
        raise SpeechFileError(f"no audio file of {len(content)} bytes: {error}") from None


def tags(provenance: Provenance) -> dict[str, str]:
    """What a file says of itself, by the names that soundfile knows. Raises SpeechFileError for more than fits."""
    facts = {name: value for name, value in dataclasses.asdict(provenance).items() if name != "text"}
    comment = json.dumps({"lina-ray": facts}, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    if len(comment.encode()) > LONGEST_COMMENT:
        raise SpeechFileError(
            f"provenance of {len(comment.encode())} bytes does not fit a file's {LONGEST_COMMENT}; shorten the "
            "consent reference or the voice's name"
        )
    found = {
        "title": _short(" ".join(provenance.text.split())),
        "artist": _short(provenance.voice),
        "comment": comment,
        "software": f"synthetic speech, lina-ray {_version()}",
    }
    return {name: value for name, value in found.items() if value}


def _provenance(found: dict[str, str]) -> Provenance | None:
    try:
        facts = json.loads(found.get("comment", ""))["lina-ray"]
        return Provenance(**facts, text=found.get("title", ""))
    except (ValueError, KeyError, TypeError):
        return None


def _short(text: str) -> str:
    """At most `LONGEST_TAG` bytes, whole characters, without what a tag cannot hold."""
    content = "".join(c for c in text if c.isprintable()).encode("utf-8", "ignore")
    if len(content) <= LONGEST_TAG:
        return content.decode()
    return content[: LONGEST_TAG - 3].decode("utf-8", "ignore").rstrip() + "…"


def _version() -> str:
    try:
        return version("lina-ray")
    except PackageNotFoundError:
        return "from source"
