"""An open recording on any fsspec URL: its header checked against its bytes, its samples read by seeking.

libsndfile does the decoding: straight from the file where it is local, through range reads of a few blocks where it is
not. Headers are not believed: what they claim is compared with what the file holds, and no claim makes memory grow.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO

from infra import storage
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    import numpy as np

_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3"}
_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "DOUBLE": 8}
_LOWEST_RATE, _HIGHEST_RATE = 4_000, 384_000
_BLOCK_VALUES = 1 << 20
"""Values (frames times channels) decoded at a time: 4 MiB of float32 however many channels a header invents."""
_REMOTE_BLOCK, _REMOTE_BLOCKS_KEPT = 256 << 10, 32
_HEADER_SLACK = 4096
_MOST_SAMPLES_A_BYTE = 16
"""More than that is silence or a lie: whether the last sample is there tells which."""
_MP3_PREROLL = 1152 * 10
"""Frames decoded ahead of an MP3 segment: Layer III frames borrow bits from those before them."""
_OGG_LAST_PAGE = 4
"""The flag of an Ogg page that ends its stream (RFC 3533, section 6)."""
_SIZE_NOT_KNOWN = {0xFFFF_FFFF, 0x7FFF_F000}
"""What FFmpeg and SoX write for a WAV's size when they stream it and cannot know."""


class Recording:
    """What libsndfile decodes (`audio`) and the bytes below it (`raw`, `size` of them)."""

    def __init__(self, url: str, audio: Any, raw: BinaryIO, size: int) -> None:
        self.url, self._audio, self._raw, self._size = url, audio, raw, size
        self.format: str = audio.format
        self.rate: int = audio.samplerate
        self.channels: int = audio.channels
        self.frames: int = audio.frames
        self.length_unknown = audio.frames > 1 << 48

    def check_header(self) -> None:
        """Raises Unusable where the header is impossible."""
        if self.format not in _FORMATS:
            raise Unusable("unreadable", f"{self.url}: {self.format} is not one of {', '.join(sorted(_FORMATS))}")
        if not _LOWEST_RATE <= self.rate <= _HIGHEST_RATE:
            raise Unusable("bad-sample-rate", f"{self.url}: {self.rate} Hz is not in {_LOWEST_RATE} to {_HIGHEST_RATE}")
        if surplus := self._bytes_beyond_claim():
            raise Unusable("bad-header", f"{self.url}: claims {self.frames} samples and holds {surplus} bytes more")
        if not self.frames:
            raise Unusable("empty", f"{self.url}: a header without audio")

    def read_mono(self, first: int, count: int, channel: int | None = None) -> np.ndarray:
        """Up to `count` frames from `first`, float32 [n]; fewer where the data ends. A channel of None averages all."""
        import numpy as np

        if channel is not None and not 0 <= channel < self.channels:
            raise Unusable("bad-channel", f"{self.url}: channel {channel} of {self.channels}, counted from 0")
        skip = min(first, _MP3_PREROLL) if self.format == "MP3" else 0
        blocks = [_mono(block, channel) for block in self._blocks(first - skip, skip + count)]
        return np.concatenate(blocks)[skip:] if blocks else np.zeros(0, np.float32)

    def stream(self, seconds: float) -> Iterator[np.ndarray]:
        """The whole recording, averaged over its channels, in float32 pieces of about so many seconds."""
        import numpy as np

        held, held_frames = [], 0
        for block in self._blocks(0, self.frames, int(seconds * self.rate)):
            held.append(_mono(block, None))
            held_frames += len(block)
            if held_frames >= seconds * self.rate:
                yield np.concatenate(held)
                held, held_frames = [], 0
        if held:
            yield np.concatenate(held)

    def shortfall(self) -> str:
        """What the file lacks of what its header or its framing promises; '' if nothing is known to be missing."""
        for name, claimed, found in re.findall(r"(\w+) +: (\d+) \(should be (\d+)\)", self._audio.extra_info):
            if name in ("data", "SSND", "riff") and int(claimed) > int(found) and int(claimed) not in _SIZE_NOT_KNOWN:
                return f"the header has {claimed} bytes of audio, the file {found}"
        if self.format == "OGG":
            tail = self._peek(max(self._size - (64 << 10), 0), 64 << 10)
            page = tail.rfind(b"OggS")
            if page < 0 or page + 5 >= len(tail) or not tail[page + 5] & _OGG_LAST_PAGE:
                return "the Ogg stream has no last page"
        few_bytes = self._size < self.frames * self.channels / _MOST_SAMPLES_A_BYTE
        if few_bytes and not self.length_unknown and not len(self.read_mono(self.frames - 1, 1)):
            return f"the header has {self.frames} samples, the file far fewer"
        return ""

    def _blocks(self, first: int, count: int, block_frames: int = _BLOCK_VALUES) -> Iterator[np.ndarray]:
        """float32 [frames, channels], bounded in size, until `count` frames or the end of the data."""
        import soundfile

        block_frames = max(min(block_frames, _BLOCK_VALUES // self.channels), 1)
        try:
            if first != self._audio.tell():
                self._audio.seek(first)
            while count > 0:
                block = self._audio.read(min(block_frames, count), dtype="float32", always_2d=True)
                if not len(block):
                    return
                count -= len(block)
                yield block
        except soundfile.LibsndfileError as error:
            if self._raw.tell() < self._size and "seek" not in str(error):
                raise
            detail = f"{self.url}: the data ends before the header's {self.frames} samples"
            raise Unusable("truncated", detail) from None

    def _bytes_beyond_claim(self) -> int:
        """Bytes of audio that the header leaves out, where that can be told: FLAC, and WAV with no chunks behind."""
        most = self.frames * self.channels * _BYTES.get(self._audio.subtype, 4) * 1.1 + _HEADER_SLACK
        if self.format == "FLAC" and not self.length_unknown:
            return max(int(self._size - self._flac_metadata() - most), 0)
        if self.format in ("WAV", "WAVEX") and "Exiting parser" in self._audio.extra_info:
            return max(int(self._size - most), 0)
        return 0

    def _flac_metadata(self) -> int:
        """Bytes of metadata blocks (tags, pictures, padding) ahead of the audio frames."""
        at, last = 4, False
        while not last and at < self._size:
            header = self._peek(at, 4)
            last = bool(header[0] & 0x80)
            at += 4 + int.from_bytes(header[1:4], "big")
        return at

    def _peek(self, offset: int, count: int) -> bytes:
        """Bytes at `offset`, leaving the position where libsndfile had it."""
        position = self._raw.tell()
        self._raw.seek(offset)
        data = self._raw.read(count)
        self._raw.seek(position)
        return data


def _mono(block: np.ndarray, channel: int | None) -> np.ndarray:
    """float32 [frames, channels] to [frames]: one channel, or the mean of all."""
    if block.shape[1] == 1:
        return block[:, 0]
    return block.mean(axis=1) if channel is None else block[:, channel].copy()  # a view would keep the whole block


@contextmanager
def opened(url: str) -> Iterator[Recording]:
    """The recording at `url`.

    Raises:
        Unusable: it cannot be opened or is no audio; also for damage found while it is being read.
        OSError: the storage failed.
    """
    import soundfile

    with _opened_bytes(url) as raw:
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        if not size:
            raise Unusable("empty", f"{url}: no bytes")
        if url.lower().endswith(".raw"):
            raise Unusable("unreadable", f"{url}: headerless audio has no sample rate; convert it to WAV or FLAC")
        remote = None if storage.is_local(url) else _Remembering(url, raw)
        try:
            with _sequential()(remote or raw.fileno(), closefd=False) as audio:
                recording = Recording(url, audio, raw, size)
                recording.check_header()
                yield recording
        except (soundfile.LibsndfileError, Unusable) as error:
            if remote:
                remote.raise_fault()
            raise _as_unusable(url, error) from None
        if remote:
            remote.raise_fault()


@cache
def _sequential() -> type:
    """soundfile.SoundFile without its seek to the present position after every read, which FLAC pays for dearly."""
    import soundfile

    class Sequential(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return Sequential


def _as_unusable(url: str, error: Any) -> Unusable:
    if isinstance(error, Unusable):
        return error
    text = error.error_string.strip().removeprefix("Error :").strip().rstrip(".")
    if "SF_INFO struct incomplete" in text:
        return Unusable("bad-sample-rate", f"{url}: the header's sample rate is 0 or negative")
    if "not a regular file" in text:  # what libsndfile says of an MP3 in which mpg123 finds no frame
        text = "no MPEG frame found"
    return Unusable("unreadable", f"{url}: {text}")


@contextmanager
def _opened_bytes(url: str) -> Iterator[BinaryIO]:
    try:
        file = _open_local(url) if storage.is_local(url) else _open_remote(url)
    except (FileNotFoundError, NotADirectoryError):
        raise Unusable("missing-file", f"{url}: no such file") from None
    except IsADirectoryError:
        raise Unusable("not-a-file", f"{url}: a folder") from None
    except PermissionError:
        raise Unusable("no-permission", f"{url}: may not be read") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise Unusable("missing-file", f"{url[:200]!r}: {error.strerror}") from None
        raise
    with file:
        yield file


def _open_local(url: str) -> BinaryIO:
    path = storage.absolute(url)
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL or half a surrogate pair
        raise Unusable("missing-file", f"{url!r}: {error}") from None
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
        raise Unusable("not-a-file", f"{url}: not a regular file")
    return open(path, "rb", buffering=0)


def _open_remote(url: str) -> BinaryIO:
    try:
        fs, path = storage.filesystem(url)
    except ValueError as error:  # an unknown protocol
        raise Unusable("missing-file", f"{url!r}: {error}") from None
    kept = {"maxblocks": _REMOTE_BLOCKS_KEPT}
    with storage.as_os_errors(url):
        return fs.open(path, "rb", block_size=_REMOTE_BLOCK, cache_type="blockcache", cache_options=kept)


class _Remembering:
    """A file for libsndfile's callbacks, which cannot raise: keeps the first error of the storage for afterwards."""

    def __init__(self, url: str, file: BinaryIO) -> None:
        self._url, self._file = url, file
        self._fault: Exception | None = None

    def read(self, count: int) -> bytes:
        try:
            return b"" if self._fault else self._file.read(count)
        except Exception as error:
            self._fault = error
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def raise_fault(self) -> None:
        if self._fault:
            raise OSError(f"{self._url}: {type(self._fault).__name__}: {self._fault}") from self._fault
