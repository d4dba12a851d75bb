"""Lines of a text file on any fsspec URL, gzipped or not, as bytes: in bounded memory, at the speed of the disk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

from infra import storage
from pipeline.manifests.errors import ManifestError

BLOCK = 1 << 20
LONGEST_LINE = 16 << 20
"""Bytes of a line that are kept: a longer one comes cut to one byte more, for its reader to refuse."""

_GZIP = b"\x1f\x8b"


def open_binary(url: str) -> BinaryIO:
    """Opens a local file or an object for reading.

    Raises:
        ManifestError: there is no such file, or it cannot be opened.
    """
    try:
        if storage.is_local(url):
            return open(storage.absolute(url), "rb")
        fs, path = storage.filesystem(url)
        return fs.open(path, "rb", block_size=8 * BLOCK)
    except (OSError, ImportError, ValueError) as error:
        # OSError's own text repeats the path, in quotes; the reason alone reads better.
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise ManifestError(f"{url}: cannot be opened: {reason}") from None


def lines(url: str) -> Iterator[bytes]:
    """Each line without its newline, blank ones too, so that counting them gives line numbers."""
    return chain.from_iterable(batches(url))


def batches(url: str) -> Iterator[list[bytes]]:
    """The same lines in lists of what one block held: the caller's loop stays in C for most of the time.

    Raises:
        ManifestError: the file cannot be opened or read, or its gzip data is damaged or incomplete.
    """
    tail, dropping, first = b"", False, True
    for block in _blocks(url):
        if first:
            block, first = block.removeprefix(b"\xef\xbb\xbf"), False
        if dropping:
            _, newline, block = block.partition(b"\n")
            if not newline:
                continue
            dropping = False
            block = b"\n" + block
        pieces = (tail + block).split(b"\n")
        tail = pieces.pop()
        if len(tail) > LONGEST_LINE:
            tail, dropping = tail[: LONGEST_LINE + 1], True
        yield pieces
    if tail:
        yield [tail]


def _blocks(url: str) -> Iterator[bytes]:
    with open_binary(url) as file:
        head = _read(file, url)
        raw = chain((head,), iter(lambda: _read(file, url), b""))
        yield from _inflated(raw, url) if head.startswith(_GZIP) else raw


def _read(file: BinaryIO, url: str) -> bytes:
    try:
        return file.read(BLOCK)
    except OSError as error:
        raise ManifestError(f"{url}: cannot be read: {error}") from error


def _inflated(compressed: Iterator[bytes], url: str) -> Iterator[bytes]:
    """Decompresses gzip members one after another; output comes in bounded pieces whatever the ratio is."""
    from isal import igzip_lib  # inflates three times as fast as zlib, with the interpreter lock released

    def member() -> igzip_lib.IgzipDecompressor:
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    engine, count, begun = member(), 0, False
    for block in compressed:
        while block or (begun and not engine.needs_input):
            if not begun:
                block = block.lstrip(b"\0")  # gzip allows zeros as padding after a member
                if not block:
                    break
            try:
                data = engine.decompress(block, BLOCK >> 2)  # what fits into the processor's cache
            except (igzip_lib.IsalError, EOFError) as error:
                raise ManifestError(f"{url}: gzip data is damaged after {count} bytes of text: {error}") from None
            begun, block, count = True, b"", count + len(data)
            if data:
                yield data
            if engine.eof:
                engine, block, begun = member(), engine.unused_data, False
    if begun:
        raise ManifestError(f"{url}: gzip data ends in the middle, after {count} bytes of text: fetch the file again")
