"""Every kind of input corpus becomes one lazy stream of utterances and rejects.

    for item in open_manifest("s3://bucket/train.jsonl"):
        ...  # an `Utterance`, or a `Reject` with the reason

The order is the manifest's own and memory is bounded, however long it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from infra import storage
from pipeline.manifests import corpora, fields, fingerprint, lhotse_cuts, librilight, tables
from pipeline.manifests.errors import ManifestError
from pipeline.manifests.lhotse_recordings import read_recordings
from pipeline.utterances import Reject, Utterance

__all__ = ["KINDS", "Manifest", "ManifestError", "open_manifest"]

KINDS = ("auto", "jsonl", "csv", "tsv", "parquet", "lhotse", "libriheavy", "librilight")

_NAMES = {
    "jsonl": "JSON Lines manifest",
    "csv": "CSV manifest",
    "tsv": "TSV manifest",
    "parquet": "Parquet manifest",
    "lhotse": "lhotse manifest",
    "libriheavy": "Libriheavy cuts",
    "librilight": "folder of recordings",
}
_JSON_LINES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Manifest:
    """A corpus that was found and recognised; iterating reads it, each time from its beginning."""

    url: str
    kind: str
    """One of `KINDS` but `auto`, or `corpus` and its name: `corpus vctk`."""
    folder: str
    """What relative audio paths belong to; ends in '/'."""
    read: Callable[[], Iterator[Utterance | Reject]]
    files: tuple[str, ...] = ()
    """The manifest files; none where a folder of audio is its own manifest."""

    def __iter__(self) -> Iterator[Utterance | Reject]:
        return iter(self.read())

    def fingerprint(self, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """Identity of the content: `url`, `kind`, `size` in bytes, `sha256` and, for files, each one's version.

        A file is read for its sha256 only where its size or its version (modification time, ETag) is not that of
        `known`, an earlier fingerprint. A folder's sha256 is over its files' relative paths and sizes.
        """
        content = fingerprint.of_files(self.files, known) if self.files else fingerprint.of_folder(self.url)
        return {"url": self.url, "kind": self.kind, **content}

    def describe(self) -> str:
        """One line for people: what it is and where."""
        return f"{_NAMES.get(self.kind, self.kind)} at {self.url}"


def open_manifest(
    input: str,
    *,
    kind: str = "auto",
    corpus: str | None = None,
    audio_root: str | None = None,
    segment_seconds: float = 15.0,
    max_seconds: float = 60.0,
    max_silence: float = 0.8,
) -> Manifest:
    """Finds out what `input` is; nothing but its first rows is read before the result is iterated.

    Args:
        input: path or fsspec URL of a manifest (lhotse: also `recordings.jsonl.gz,supervisions.jsonl.gz`), or of a
            folder: of such a pair or several, of Parquet files, or of recordings in LibriLight's layout.
        kind: one of `KINDS`; `auto` goes by the name and the first rows.
        corpus: `librilight` or one of `corpora.RECIPES`, whose folder `input` is.
        audio_root: folder that relative audio paths belong to, by default the manifest's own; replaces the prefix
            `download/librilight` of Libriheavy's cuts.
        segment_seconds, max_seconds, max_silence: how recordings with known pauses are cut, in seconds.

    Raises:
        ManifestError: nothing is there, it is of no known kind, or it has no column `audio`.
    """
    if kind not in KINDS:
        raise ManifestError(f"unknown kind of manifest {kind!r}; known: {', '.join(KINDS)}")
    if corpus and corpus != "librilight":
        root = storage.absolute(input)
        corpora.check(corpus, root)
        return Manifest(root, f"corpus {corpus}", f"{root}/", corpora.Corpus(corpus, root).read)
    if corpus or kind == "librilight":
        return _open_recordings_folder(input, librilight.Cutting(segment_seconds, max_seconds, max_silence))
    if "," in input and not storage.exists(input):
        return _open_pairs(input, [tuple(input.split(",", 1))], audio_root)
    url = storage.absolute(input)
    if _is_folder(url):
        return _open_folder(url, audio_root, librilight.Cutting(segment_seconds, max_seconds, max_silence))
    return _open_file(url, kind, audio_root)


def _open_file(url: str, kind: str, audio_root: str | None) -> Manifest:
    folder = _folder(url, audio_root)
    guess = kind == "auto"
    kind = _kind_by_name(url) if guess else kind
    if kind == "parquet":
        return _open_parquet(url, (url,), folder)
    if kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        tables.require_audio(url, tables.header(url, delimiter))
        return Manifest(url, kind, folder, lambda: tables.read_delimited(url, folder, delimiter), (url,))
    rows = tables.sample(url)
    found = lhotse_cuts.looks_like(rows) if guess or kind != "jsonl" else None
    if found == "supervisions":
        raise ManifestError(f"{url}: holds lhotse's supervisions without recordings; give recordings.jsonl,{url}")
    if found == "recordings":
        resolve = lhotse_cuts.audio_paths(folder, audio_root)
        return Manifest(url, "lhotse", folder, lambda: read_recordings(url, None, resolve), (url,))
    if found or kind in ("lhotse", "libriheavy"):
        named = "libriheavy" if "libriheavy" in (found, kind) else "lhotse"
        return Manifest(url, named, folder, lambda: lhotse_cuts.read_cuts(url, folder, audio_root), (url,))
    tables.require_audio(url, sorted({name for row in rows for name in row}))
    return Manifest(url, "jsonl", folder, lambda: tables.read_jsonl(url, folder), (url,))


def _open_folder(url: str, audio_root: str | None, cutting: librilight.Cutting) -> Manifest:
    """What lies in a folder decides: Parquet files, lhotse's pairs, another manifest to be named, or recordings."""
    names = storage.names(url)
    parquet = tuple(storage.join(url, name) for name in names if name.endswith(".parquet"))
    if parquet:
        return _open_parquet(url, parquet, _folder(parquet[0], audio_root))
    manifests = [name for name in names if name.endswith(_JSON_LINES)]
    pairs = [
        (storage.join(url, name), storage.join(url, name.replace("recordings", "supervisions")))
        for name in manifests
        if "recordings" in name and name.replace("recordings", "supervisions") in manifests
    ]
    if pairs:
        return _open_pairs(url, pairs, audio_root)
    if manifests or any(name.endswith((".csv", ".tsv")) for name in names):
        raise ManifestError(f"{url}: is a folder with manifests; name the one to read: {', '.join(manifests or names)}")
    return _open_recordings_folder(url, cutting)


def _open_parquet(url: str, files: tuple[str, ...], folder: str) -> Manifest:
    for file in files:
        tables.require_audio(file, tables.parquet_columns(file))
    return Manifest(url, "parquet", folder, lambda: tables.read_parquet(files, folder), files)


def _open_pairs(input: str, pairs: list[tuple[str, str]], audio_root: str | None) -> Manifest:
    pairs = [(storage.absolute(recordings.strip()), storage.absolute(rest.strip())) for recordings, rest in pairs]
    for expected, files in zip(("recordings", "supervisions"), zip(*pairs, strict=True), strict=True):
        for file in files:
            found = lhotse_cuts.looks_like(tables.sample(file))
            if found != expected:
                raise ManifestError(f"{file}: expected lhotse's {expected}, found {found or 'something else'}")
    folder = _folder(pairs[0][0], audio_root)

    def read() -> Iterator[Utterance | Reject]:
        resolve = lhotse_cuts.audio_paths(folder, audio_root)
        return chain.from_iterable(read_recordings(recordings, rest, resolve) for recordings, rest in pairs)

    url = ",".join(pairs[0]) if "," in input else input
    return Manifest(url, "lhotse", folder, read, tuple(file for pair in pairs for file in pair))


def _open_recordings_folder(input: str, cutting: librilight.Cutting) -> Manifest:
    root = storage.absolute(input)
    librilight.require_audio(root)
    return Manifest(root, "librilight", f"{root}/", lambda: librilight.read_folder(root, cutting))


def _kind_by_name(url: str) -> str:
    ending = url.lower().removesuffix(".gz").rpartition(".")[2]
    return {"pq": "parquet"}.get(ending, ending if ending in ("csv", "tsv", "parquet") else "jsonl")


def _folder(url: str, audio_root: str | None) -> str:
    return f"{storage.absolute(audio_root)}/" if audio_root else fields.folder_of(url)


def _is_folder(url: str) -> bool:
    try:
        fs, path = storage.filesystem(url)
        return fs.isdir(path)
    except (OSError, ImportError, ValueError) as error:
        raise ManifestError(f"{url}: cannot be opened: {error}") from None
