"""Files on any fsspec URL (local paths, s3://, gs://, memory://), written whole or not at all.

A local file is written under a temporary name beside its target, flushed to disk and renamed; an object is uploaded in
one piece, which object stores make visible at once. So a reader never sees half a file, and a killed writer leaves at
most a temporary one, which `remove_leftovers` takes away.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

if TYPE_CHECKING:
    import fsspec
    import pyarrow.fs

UNREADABLE = (OSError, ValueError, ImportError)
"""What reading a URL raises: also of no scheme that fsspec knows, or of one whose file system is not installed."""
_TEMPORARY = ".part-"
_PAUSES = (1.0, 4.0)
"""Seconds before what failed is tried again."""
Result = TypeVar("Result")


def cache_folder() -> Path:
    """Where this machine keeps what can be had again: `$LINA_RAY_CACHE`, or lina-ray in the user's cache folder."""
    if chosen := os.environ.get("LINA_RAY_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lina-ray"


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The URL itself, or the absolute path of a local one: relative paths are the caller's."""
    return os.path.abspath(url.removeprefix("file://")) if is_local(url) else url.rstrip("/")


def join(base: str, *parts: str) -> str:
    return posixpath.join(base, *parts)


def relative_to(base: str, path: str) -> str:
    """`path` as it reads from the folder `base`: absolute paths and URLs stay as they are."""
    if os.path.isabs(path) or not is_local(path):
        return path
    return posixpath.normpath(posixpath.join(base, path)) if is_local(base) else posixpath.join(base, path)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path on it."""
    import fsspec

    return fsspec.core.url_to_fs(url)


def arrow_filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """As `filesystem`, for whoever takes none but PyArrow's file systems, which are fewer."""
    import pyarrow.fs

    fs, path = filesystem(url)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def _afresh(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """As `filesystem`, with no listing kept that the path is in: other processes write and remove, too."""
    fs, path = filesystem(url)
    for listed in (path, fs._parent(path)):
        fs.invalidate_cache(listed)
    return fs, path


@contextmanager
def as_os_errors(url: str) -> Iterator[None]:
    """Failures of the block as OSError: clients have exceptions of their own for a service that does not answer."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def exists(url: str) -> bool:
    if is_local(url):
        return os.path.exists(absolute(url))
    fs, path = _afresh(url)
    with as_os_errors(url):
        return fs.exists(path)


def patiently(read: Callable[[], Result]) -> Result:
    """What `read` gives, which is called again when the storage fails. Raises OSError: it failed three times."""
    for pause in _PAUSES:
        try:
            return read()
        except OSError:
            time.sleep(pause)
    return read()


def read_bytes(url: str) -> bytes:
    if is_local(url):
        with open(absolute(url), "rb") as file:
            return file.read()
    fs, path = filesystem(url)
    with as_os_errors(url):
        return fs.cat_file(path)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file; fewer where it ends before."""
    if is_local(url):
        with open(absolute(url), "rb") as file:
            file.seek(start)
            return file.read(stop - start)
    fs, path = filesystem(url)
    with as_os_errors(url):
        return fs.cat_file(path, start=start, end=stop)


def read_text(url: str) -> str:
    return read_bytes(url).decode("utf-8")


def write_bytes(url: str, data: bytes) -> None:
    """Writes `data` whole: after a crash at any moment the target is the old file or the new one."""
    if not is_local(url):
        fs, path = filesystem(url)
        with as_os_errors(url):
            fs.pipe_file(path, data)
        return
    with _replacing(absolute(url)) as file:
        file.write(data)


def write_text(url: str, text: str) -> None:
    write_bytes(url, text.encode("utf-8"))


def names(url: str) -> list[str]:
    """Sorted names of the files directly in a folder, in one listing; empty if there is no such folder."""
    if is_local(url):
        folder = absolute(url)
        return sorted(e.name for e in os.scandir(folder) if e.is_file()) if os.path.isdir(folder) else []
    fs, path = _afresh(url)
    with as_os_errors(url):
        return sorted(posixpath.basename(p) for p in fs.ls(path, detail=False)) if fs.exists(path) else []


def version(url: str) -> list[str]:
    """What changes when a file is replaced: its size, its time, its tag; empty where nothing can be told of it."""
    try:
        with as_os_errors(url):
            fs, path = _afresh(url)
            info = fs.info(path)
    except OSError:
        return []
    return [str(info.get(name, "")) for name in ("size", "mtime", "ETag", "LastModified")]


def remove(url: str) -> None:
    """Removes a file or a folder with all that is in it; nothing happens where there is none."""
    fs, path = _afresh(url)
    with as_os_errors(url):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def remove_leftovers(url: str) -> int:
    """Removes temporary files that killed writers left directly in a folder; returns how many."""
    leftovers = [name for name in names(url) if name.startswith(".") and _TEMPORARY in name]
    for name in leftovers:
        remove(join(url, name))
    return len(leftovers)


def upload(local: str, url: str) -> None:
    """Puts a local file at `url`, whole or not at all, without holding it in memory."""
    if not is_local(url):
        fs, path = filesystem(url)
        with as_os_errors(url):
            fs.put_file(local, path)
        return
    with open(local, "rb") as source, _replacing(absolute(url)) as file:
        shutil.copyfileobj(source, file, 1 << 20)


def download(url: str, local: str) -> None:
    """Copies a file, or a folder with all that is in it, to the local path `local`, which does not exist yet."""
    fs, path = filesystem(url)
    with as_os_errors(url):
        if fs.isdir(path):
            fs.get(path.rstrip("/") + "/", f"{local}/", recursive=True)
        else:
            fs.get_file(path, local)


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end of the block, and leaves no trace if that fails."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name[:200]}{_TEMPORARY}{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
