"""Everything that can be wrong with an utterance, made afresh: audio, times, text, ids and manifest lines.

`write_bad_corpus` makes the files and says of each manifest line under which stage and reason it must be quarantined.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from tests.corpora import voiced

RATE = 16_000
TEXT = "A quiet green island sailed past."
GOOD_ID = "good/one"


class Fault(NamedTuple):
    """One line of a bad manifest. The good one, which others are duplicates of, has neither stage nor reason."""

    line: bytes
    """With its newline."""
    row: dict[str, Any]
    """What the line says; empty where it is no JSON object."""
    stage: str
    reason: str


def write_bad_corpus(folder: Path) -> list[Fault]:
    """Writes the audio into `folder`, and `manifest.jsonl` with the lines of all faults in order."""
    folder.mkdir(parents=True, exist_ok=True)
    faults = [_fault({"id": GOOD_ID, "audio": "good.wav", "text": TEXT}, "", "")]
    faults += [
        _fault({"id": name, "audio": name, "text": TEXT}, stage, reason) for name, stage, reason in write_audio(folder)
    ]
    faults += [_fault({"audio": "good.wav", "text": TEXT} | row, stage, reason) for row, stage, reason in ROWS]
    faults += [Fault(line + b"\n", {}, "manifest", reason) for line, reason in LINES]
    (folder / "manifest.jsonl").write_bytes(b"".join(fault.line for fault in faults))
    return faults


def _fault(row: dict[str, Any], stage: str, reason: str) -> Fault:
    return Fault(json.dumps(row).encode() + b"\n", row, stage, reason)


ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"id": "start-past-end", "start": 100.0}, "decode", "start-past-end"),
    ({"id": "segment-past-end", "start": 100.0, "duration": 1.0}, "decode", "start-past-end"),
    ({"id": "end-past-end", "start": 1.0, "duration": 30.0}, "decode", "end-past-end"),
    ({"id": "channel", "channel": 7}, "decode", "bad-channel"),
    ({"id": "far-too-long", "duration": 4000.0}, "plan", "too-long"),
    ({"id": "negative-start", "start": -1.0}, "manifest", "bad-field"),
    ({"id": "negative-duration", "duration": -1.0}, "manifest", "bad-field"),
    ({"id": "text-empty", "text": ""}, "phonemise", "empty-text"),
    ({"id": "text-spaces", "text": " \t "}, "phonemise", "empty-text"),
    ({"id": "text-50-kB", "text": "word " * 10_000}, "phonemise", "text-too-long"),
    ({"id": "text-emoji", "text": "🎉👍🏽👩‍👩‍👧"}, "phonemise", "not-speakable"),
    ({"id": "text-cyrillic", "text": "Съешь же ещё этих мягких французских булок"}, "phonemise", "not-speakable"),
    ({"id": "text-han", "text": "敏捷的棕色狐狸"}, "phonemise", "not-speakable"),
    ({"id": "text-decoded-wrongly", "text": "caf\N{REPLACEMENT CHARACTER} au lait"}, "phonemise", "broken-text"),
    ({"id": "text-of-another", "text": "a " * 900}, "phonemise", "chars-per-second"),
    ({"id": "../../etc/passwd"}, "plan", "bad-id"),
    ({"id": "a/../b"}, "plan", "bad-id"),
    ({"id": "a\0b"}, "plan", "bad-id"),
    ({"id": "i" * 300}, "plan", "id-too-long"),
    ({"id": GOOD_ID, "text": "The same id again."}, "plan", "duplicate-id"),
    ({"id": "same-audio-same-text"}, "write", "duplicate-audio"),
]
"""Faults of a row that names the good file: (columns, stage, reason)."""

LINES: list[tuple[bytes, str]] = [
    (b"this is no JSON", "not-json"),
    (b'{"id": "unfinished", "audio": "good.wav"', "not-json"),
    (b"[1, 2, 3]", "not-json"),
    (b'{"id": "not-a-number", "audio": "good.wav", "text": "One two.", "start": NaN}', "bad-field"),
    ('{"id": "latin-1", "audio": "good.wav", "text": "naïve café"}'.encode("latin-1"), "not-utf8"),
    (b'{"id": "no-audio", "text": "Where is it?"}', "missing-audio"),
]
"""Lines that are no row at all: (bytes, reason)."""


def write_audio(folder: Path) -> list[tuple[str, str, str]]:
    """Bad recordings as (file name, stage, reason), and a good one: `good.wav`, 3 s."""
    good = voiced(np.random.default_rng(7), 3.0, RATE)
    soundfile.write(folder / "good.wav", good, RATE)
    made = [*_damaged(folder, good), *_lying(folder, good), *_wrong_signal(folder, good)]
    (folder / "folder.wav").mkdir(exist_ok=True)
    write_long_silence(folder / "ten-hours.flac")
    return [
        *made,
        ("missing.flac", "decode", "missing-file"),
        ("good.wav/inside.wav", "decode", "missing-file"),
        ("folder.wav", "decode", "not-a-file"),
        ("ten-hours.flac", "plan", "too-long"),
    ]


def write_long_silence(path: Path, hours: float = 10.0, rate: int = 8000) -> None:
    """A FLAC file of digital silence: hours of audio in few bytes."""
    block = np.zeros(rate * 600, np.int16)
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for _ in range(round(hours * 6)):
            file.write(block)


def _damaged(folder: Path, good: np.ndarray) -> list[tuple[str, str, str]]:
    """Files that stop too early, are damaged, or never were audio."""
    made = []
    for name in ("wav", "flac", "mp3", "ogg", "aiff"):
        whole = folder / f"whole.{name}"
        soundfile.write(whole, good, RATE)
        data = whole.read_bytes()
        whole.unlink()
        (folder / f"half.{name}").write_bytes(data[: len(data) // 2])
        made.append((f"half.{name}", "decode", "truncated"))
        if name == "flac":
            middle = len(data) // 2
            damaged = data[:middle] + bytes(byte ^ 0x55 for byte in data[middle : middle + 99]) + data[middle + 99 :]
            (folder / "damaged.flac").write_bytes(damaged)
            made.append(("damaged.flac", "decode", "unreadable"))
    random = np.random.default_rng(3).bytes(50_000)
    for name, data, reason in (
        ("no-bytes.wav", b"", "empty"),
        ("noise.flac", random, "unreadable"),
        ("noise.mp3", b"\xff\xfb\x90\x00" + random, "unreadable"),
        ("page.wav", b"<html><body>404 Not Found</body></html>", "unreadable"),
        ("headerless.raw", random, "unreadable"),
    ):
        (folder / name).write_bytes(data)
        made.append((name, "decode", reason))
    return made


def _lying(folder: Path, good: np.ndarray) -> list[tuple[str, str, str]]:
    """Files whose headers do not say what is in them."""
    soundfile.write(folder / "lie.flac", good, RATE)
    flac = (folder / "lie.flac").read_bytes()
    (folder / "lie.flac").unlink()
    wav = (folder / "good.wav").read_bytes()
    size = wav.index(b"data") + 4
    soundfile.write(folder / "header-only.wav", good[:0], RATE)
    for name, data in (
        ("claims-2-GB.wav", patched(wav, size, struct.pack("<I", 2_000_000_000))),
        ("claims-1-kB.wav", patched(wav, size, struct.pack("<I", 1000))),
        ("claims-10-hours.flac", with_flac_samples(flac, RATE * 36_000)),
        ("claims-30-seconds.flac", with_flac_samples(flac, RATE * 30)),
        ("claims-1000-samples.flac", with_flac_samples(flac, 1000)),
        ("0-Hz.wav", patched(wav, 24, struct.pack("<I", 0))),
        ("0-Hz.flac", patched(flac, 18, bytes([0, 0, flac[20] & 0x0F]))),
        ("2-GHz.wav", patched(wav, 24, struct.pack("<I", 2_000_000_000))),
        ("no-channels.wav", patched(wav, 22, struct.pack("<H", 0))),
    ):
        (folder / name).write_bytes(data)
    return [
        ("header-only.wav", "decode", "empty"),
        ("claims-2-GB.wav", "decode", "truncated"),
        ("claims-1-kB.wav", "decode", "bad-header"),
        ("claims-10-hours.flac", "decode", "truncated"),
        ("claims-30-seconds.flac", "decode", "truncated"),
        ("claims-1000-samples.flac", "decode", "bad-header"),
        ("0-Hz.wav", "decode", "bad-sample-rate"),
        ("0-Hz.flac", "decode", "bad-sample-rate"),
        ("2-GHz.wav", "decode", "bad-sample-rate"),
        ("no-channels.wav", "decode", "unreadable"),
    ]


def _wrong_signal(folder: Path, good: np.ndarray) -> list[tuple[str, str, str]]:
    """Readable files without usable speech in them."""
    with_nan, with_infinity, huge = good.copy(), good.copy(), good.copy()
    with_nan[1000], with_infinity[2000], huge[3000] = np.nan, np.inf, 1e30
    made = []
    for name, samples, stage, reason in (
        ("nan.wav", with_nan, "decode", "not-finite"),
        ("infinite.wav", with_infinity, "decode", "not-finite"),
        ("huge.wav", huge, "decode", "too-loud"),
        ("one-sample.wav", good[:1], "plan", "too-short"),
        ("silence.wav", np.zeros(2 * RATE), "decode", "silent"),
        ("offset.wav", np.full(2 * RATE, 0.3), "decode", "silent"),
        ("whisper.wav", good * 1e-3, "decode", "too-quiet"),
        ("clipped.wav", np.clip(good * 100, -1, 1), "decode", "clipped"),
    ):
        soundfile.write(folder / name, samples, RATE, subtype="FLOAT")
        made.append((name, stage, reason))
    return made


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_flac_samples(flac: bytes, samples: int) -> bytes:
    """The total in STREAMINFO: the low 4 bits of byte 21 and the next 4 bytes of the file; 0 stands for unknown."""
    return patched(flac, 21, bytes([flac[21] & 0xF0 | samples >> 32]) + struct.pack(">I", samples & 0xFFFF_FFFF))
