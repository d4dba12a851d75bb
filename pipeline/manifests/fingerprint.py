"""What a manifest was when it was planned: enough to see, cheaply, whether it is still the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

from infra import storage
from pipeline.manifests.errors import ManifestError
from pipeline.manifests.lines import BLOCK, open_binary


def of_files(urls: tuple[str, ...], known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size, version and sha256 of each file; hashed again only where size or version differ from `known`."""
    before = {part["url"]: part for part in (known or {}).get("files", ())}
    parts = [_of_file(url, before.get(storage.absolute(url))) for url in urls]
    whole = hashlib.sha256("".join(part["sha256"] for part in parts).encode())
    sha256 = parts[0]["sha256"] if len(parts) == 1 else whole.hexdigest()
    return {"size": sum(part["size"] for part in parts), "sha256": sha256, "files": parts}


def of_folder(url: str) -> dict[str, Any]:
    """Files, bytes and a sha256 over the sorted relative paths and sizes: contents are not read."""
    digest, count, total = hashlib.sha256(), 0, 0
    for path, size in listing(url):
        digest.update(f"{path}\0{size}\n".encode("utf-8", "surrogateescape"))
        count, total = count + 1, total + size
    return {"count": count, "size": total, "sha256": digest.hexdigest()}


def listing(url: str) -> Iterator[tuple[str, int]]:
    """Relative path and size of every file below a folder: its own files first, then its folders', sorted.

    Raises:
        ManifestError: there is no such folder.
    """
    if storage.is_local(url):
        root = storage.absolute(url)
        if not os.path.isdir(root):
            raise ManifestError(f"{url}: there is no such folder")
        yield from _local_listing(root, "")
        return
    fs, root = storage.filesystem(url)
    found = fs.find(root, detail=True)  # on object storage one flat listing, not one for each folder
    if not found:
        raise ManifestError(f"{url}: there is no such folder, or nothing is in it")
    prefix = len(root.rstrip("/")) + 1
    files = [(path[prefix:], int(info.get("size") or 0)) for path, info in found.items()]
    yield from sorted(files, key=lambda file: _rank(file[0]))


def _local_listing(root: str, below: str) -> Iterator[tuple[str, int]]:
    with os.scandir(os.path.join(root, below)) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    prefix = f"{below}/" if below else ""
    yield from ((prefix + entry.name, entry.stat().st_size) for entry in ordered if entry.is_file())
    for entry in ordered:
        if entry.is_dir():
            yield from _local_listing(root, prefix + entry.name)


def _rank(path: str) -> list[tuple[bool, str]]:
    *folders, name = path.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


def _of_file(url: str, known: dict[str, Any] | None) -> dict[str, Any]:
    part = {"url": storage.absolute(url), **_version(url)}
    same = known is not None and all(known.get(name) == value for name, value in part.items())
    return {**part, "sha256": known["sha256"] if same else _sha256(url)}


def _version(url: str) -> dict[str, Any]:
    try:
        fs, path = storage.filesystem(url)
        if not storage.is_local(url):
            fs.invalidate_cache(fs._parent(path))
        info = fs.info(path)
    except (OSError, ImportError, ValueError) as error:
        raise ManifestError(f"{url}: cannot be read: {error}") from None
    changed = next(
        (str(info[name]) for name in ("ETag", "etag", "mtime", "LastModified", "created") if name in info), ""
    )
    return {"size": int(info["size"]), "version": changed.strip('"')}


def _sha256(url: str) -> str:
    digest = hashlib.sha256()
    with open_binary(url) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
