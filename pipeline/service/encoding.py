"""Speech as a file that is sent while it is being made: what was sent is never changed.

libsndfile writes WAV, MP3 and Opus from front to back and then mends what only the end can tell: the length. A stream
leaves the mends out, which is how these formats say that a length is not known. FLAC has such a way, too, but common
readers (libsndfile's among them) do not take it: it is sent whole.
"""

from __future__ import annotations

import io
import json
import struct
import unicodedata

import numpy as np

from pipeline.speech_files import FORMATS, Provenance, SpeechFileError, encode, tags

CONTAINERS = {**FORMATS, "mp3": ("MP3", "MPEG_LAYER_III")}
"""By the name of a format: libsndfile's name of it and of what is in it."""
MEDIA = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "opus": "audio/ogg; codecs=opus",
    "mp3": "audio/mpeg",
    "pcm": "audio/pcm",
}
STREAMED = ("wav", "mp3", "opus", "pcm")
_CONSTANT = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
"""Of MP3, about 80 kbit/s: players take the length of a stream from its rate."""
_UNKNOWN = struct.pack("<I", 0xFFFFFFFF)


class Encoder:
    """
    Args:
        form: of `STREAMED`; pcm is signed 16-bit little-endian, mono, and has no place for provenance.
        rate: samples a second.
        keep: what was sent, for `mended`; otherwise a long stream takes no more memory than a short one.

    Raises:
        SpeechFileError: provenance that does not fit a file, a rate that the format has not.
    """

    def __init__(self, form: str, rate: int, provenance: Provenance, keep: bool = False) -> None:
        import soundfile

        self.form, self._file, self._target = form, _Forward(keep), None
        if form == "pcm":
            return
        container, content = CONTAINERS[form]
        rates = _CONSTANT if form == "mp3" else {}
        try:
            self._target = soundfile.SoundFile(self._file, "w", rate, 1, content, format=container, **rates)
        except soundfile.SoundFileError as error:
            raise SpeechFileError(f"{form} does not take {rate} samples a second ({error}); use wav") from None
        for name, value in tags(provenance).items():
            value = _ascii(value) if form == "mp3" else value
            setattr(self._target, name, value)

    def add(self, samples: np.ndarray) -> bytes:
        """What can be sent after float32 [time] more; what is beyond ±1 is clipped. Often nothing, for a while."""
        clipped = np.clip(samples, -1.0, 1.0)
        if self._target is None:
            return (clipped * 32767).round().astype("<i2").tobytes()
        self._target.write(clipped)
        return self._new()

    def end(self) -> bytes:
        """The rest."""
        if self._target is None:
            return b""
        self._target.close()
        return self._new()

    def mended(self) -> bytes:
        """The file from its start, with what was only known at its end; nothing for pcm."""
        return bytes(self._file.content)

    def _new(self) -> bytes:
        beginning = self._file.sent == 0
        content = self._file.taken()
        return _endless(content) if self.form == "wav" and beginning and content else content


def whole(form: str, samples: np.ndarray, rate: int, provenance: Provenance) -> bytes:
    """A file of known length, in a format of `MEDIA`. Raises SpeechFileError as `speech_files.encode`."""
    if form in FORMATS:
        return encode(samples, rate, provenance, form)
    encoder = Encoder(form, rate, provenance, keep=True)
    content = encoder.add(samples) + encoder.end()
    return encoder.mended() or content


class _Forward(io.RawIOBase):
    """A file in memory for libsndfile, from whose front is taken; what is written there later is dropped with it."""

    def __init__(self, keep: bool) -> None:
        self.content, self.keep, self.sent = bytearray(), keep, 0
        self._place = 0
        self._first = 0
        """Place in the file of what `content` begins with."""

    def taken(self) -> bytes:
        """What was written beyond what was taken."""
        new = bytes(self.content[self.sent - self._first :])
        self.sent += len(new)
        if not self.keep:
            self.content.clear()
            self._first = self.sent
        return new

    def write(self, data) -> int:
        start, size = self._place - self._first, len(data)
        kept = bytes(data)[max(0, -start) :]
        self.content[max(0, start) : max(0, start) + len(kept)] = kept
        self._place += size
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._first + len(self.content)
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: end}[whence]
        return self._place

    def tell(self) -> int:
        return self._place


def _endless(content: bytes) -> bytes:
    """A WAV file's beginning with the length that means: to the end."""
    data = 12  # the first chunk; tags, which may have any word in them, are skipped whole
    while content[data : data + 4] != b"data":
        size = struct.unpack_from("<I", content, data + 4)[0]
        data += 8 + size + size % 2
    return content[:4] + _UNKNOWN + content[8 : data + 4] + _UNKNOWN + content[data + 8 :]


def _ascii(tag: str) -> str:
    """A tag for MP3, for which libsndfile has one byte a character: JSON escapes the others, text loses its accents."""
    try:
        return json.dumps(json.loads(tag), separators=(",", ":"))
    except ValueError:
        return unicodedata.normalize("NFKD", tag).encode("ascii", "ignore").decode()
