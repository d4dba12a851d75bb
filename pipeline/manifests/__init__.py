"""Every kind of input corpus becomes one lazy stream of utterances and rejects.

    for item in open_manifest("s3://bucket/train.jsonl"):
        ...  # an `Utterance`, or a `Reject` with the reason

The order is the manifest's own and memory is bounded, however long it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from infra import storage
from pipeline.manifests import fields, fingerprint, tables
from pipeline.manifests.errors import ManifestError
from pipeline.utterances import Reject, Utterance

__all__ = ["KINDS", "Manifest", "ManifestError", "open_manifest"]

KINDS = ("auto", "jsonl", "csv", "tsv", "parquet")


@dataclass(frozen=True)
class Manifest:
    """A corpus that was found and recognised; iterating reads it, each time from its beginning."""

    url: str
    kind: str
    read: Callable[[], Iterator[Utterance | Reject]]
    files: tuple[str, ...] = ()
    """The manifest files; none where a folder of audio is its own manifest."""

    def __iter__(self) -> Iterator[Utterance | Reject]:
        return self.read()

    def fingerprint(self, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """Identity of the content: `url`, `kind`, `size` in bytes, `sha256` and, for files, each one's version.

        A file is read for its sha256 only where its size or its version (modification time, ETag) is not that of
        `known`, an earlier fingerprint. A folder's sha256 is over its files' relative paths and sizes.
        """
        content = fingerprint.of_files(self.files, known) if self.files else fingerprint.of_folder(self.url)
        return {"url": self.url, "kind": self.kind, **content}

    def describe(self) -> str:
        """One line for people: what it is and where."""
        return f"{_NAMES[self.kind]} at {self.url}"


_NAMES = {"jsonl": "JSON Lines manifest", "csv": "CSV manifest", "tsv": "TSV manifest", "parquet": "Parquet manifest"}


def open_manifest(
    input: str, *, kind: str = "auto", corpus: str | None = None, audio_root: str | None = None
) -> Manifest:
    """Finds out what `input` is; nothing but its first rows is read before the result is iterated.

    Args:
        input: path or fsspec URL of a manifest, or of a folder.
        kind: one of `KINDS`; `auto` goes by the name and the first rows.
        corpus: name of a public corpus whose folder `input` is.
        audio_root: folder that relative audio paths belong to; by default the manifest's own.

    Raises:
        ManifestError: nothing is there, it is of no known kind, or it has no column `audio`.
    """
    if kind not in KINDS:
        raise ManifestError(f"unknown kind of manifest {kind!r}; known: {', '.join(KINDS)}")
    url = storage.absolute(input)
    kind = _kind_by_name(url) if kind == "auto" else kind
    folder = (storage.absolute(audio_root) + "/") if audio_root else fields.folder_of(url)
    return _open_table(url, kind, folder)


def _kind_by_name(url: str) -> str:
    ending = url.lower().removesuffix(".gz").rpartition(".")[2]
    return {"pq": "parquet"}.get(ending, ending if ending in KINDS else "jsonl")


def _open_table(url: str, kind: str, folder: str) -> Manifest:
    if kind == "parquet":
        tables.require_audio(url, tables.parquet_columns(url))
        return Manifest(url, kind, lambda: tables.read_parquet((url,), folder), (url,))
    if kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        tables.require_audio(url, tables.header(url, delimiter))
        return Manifest(url, kind, lambda: tables.read_delimited(url, folder, delimiter), (url,))
    tables.require_audio(url, sorted({name for row in tables.sample(url) for name in row}))
    return Manifest(url, kind, lambda: tables.read_jsonl(url, folder), (url,))
