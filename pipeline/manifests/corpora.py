"""Public corpora by their names: lhotse's recipes read their folders, and what they leave out is told.

A recipe holds its corpus in memory as lhotse's objects (LibriSpeech: about a gigabyte); its result is written once,
sorted, into a folder for temporary files, and streamed from there.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from infra import storage
from pipeline.manifests import fingerprint
from pipeline.manifests.errors import ManifestError
from pipeline.manifests.lhotse_recordings import read_recordings
from pipeline.utterances import Reject, Utterance

if TYPE_CHECKING:
    import lhotse

_AUDIO = (".flac", ".wav", ".mp3", ".ogg", ".opus")


class Corpus:
    """A corpus in a local folder. Its recipe runs when it is first read, and not again as long as this object lives."""

    def __init__(self, name: str, root: str) -> None:
        self.name, self.root = name, root
        self._prepared: tempfile.TemporaryDirectory | None = None

    def read(self) -> Iterator[Utterance | Reject]:
        """Utterances part by part, sorted by recording; then rejects for what the recipe left out.

        Raises:
            ManifestError: the folder is not laid out as the recipe expects.
        """
        if self._prepared is None:
            prepared = tempfile.TemporaryDirectory(prefix=f"{self.name}-")
            _run(self.name, Path(self.root), Path(prepared.name))
            self._prepared = prepared
        folder = Path(self._prepared.name)
        for recordings in sorted(folder.glob("*-recordings.jsonl")):
            supervisions = recordings.with_name(recordings.name.replace("-recordings.", "-supervisions."))
            yield from read_recordings(str(recordings), str(supervisions), lambda path: path)
        for line in (folder / "left-out.jsonl").read_bytes().splitlines():
            yield Reject(**orjson.loads(line))


def check(name: str, root: str) -> None:
    """Raises `ManifestError` where `root` cannot be a corpus of that name."""
    if name not in RECIPES:
        raise ManifestError(f"unknown corpus {name!r}; known: {', '.join(sorted([*RECIPES, 'librilight']))}")
    if not storage.is_local(root):
        raise ManifestError(
            f"{root}: the recipe for {name} reads local folders only; mount the bucket, or give a manifest"
        )
    if not os.path.isdir(root):
        raise ManifestError(f"{root}: there is no such folder; the corpus {name} is expected there, unpacked")


def _run(name: str, root: Path, folder: Path) -> None:
    from lhotse import RecordingSet

    unreadable: dict[str, str] = {}
    with _warnings() as warnings, _unreadable_headers(unreadable):
        try:
            parts = dict(_parts(RECIPES[name](root)))
        except Exception as error:  # recipes check their folders by assertions and by running into what is not there
            why = f"{type(error).__name__}: {error}"
            raise ManifestError(f"{root}: is it the unpacked {name}? lhotse's recipe for it failed: {why}") from error
    if not any(len(part["recordings"] or RecordingSet()) for part in parts.values()):
        raise ManifestError(f"{root}: is it the unpacked {name}? lhotse's recipe for it found nothing")
    used: set[str] = set()
    for part, sets in parts.items():
        recordings = {r.id: r for r in sets["recordings"] if r.sources[0].source not in unreadable}
        used.update(str(Path(r.sources[0].source).absolute()) for r in recordings.values())
        supervisions = [s for s in sets["supervisions"] if s.recording_id in recordings]
        supervisions.sort(key=lambda s: (s.recording_id, s.start, s.id))
        _write(folder / f"{part}-recordings.jsonl", (recordings[id].to_dict() for id in sorted(recordings)))
        _write(folder / f"{part}-supervisions.jsonl", map(_without_alignment, supervisions))
    _write(folder / "left-out.jsonl", (r._asdict() for r in _left_out(root, used, unreadable, warnings)))


def _left_out(root: Path, used: set[str], unreadable: dict[str, str], warnings: list[str]) -> Iterator[Reject]:
    """Rejects for audio that the recipe did not take, and for everything that it warned of."""
    for path, _ in fingerprint.listing(str(root)):
        full = str(root / path)
        if full in unreadable:
            yield Reject(Path(path).stem, "manifest", "unreadable-audio", f"{path}: {unreadable[full]}", path)
        elif path.lower().endswith(_AUDIO) and not {full, full.replace("_mic1.", "_mic2.")} & used:
            # VCTK recorded everything with two microphones; the recipe takes the second.
            detail = f"{path}: the recipe does not use it: no transcript names it, or it is known to be faulty"
            yield Reject(Path(path).stem, "manifest", "not-in-corpus", detail, path)
    yield from (Reject("", "manifest", "recipe-warning", warning, "") for warning in sorted(warnings))


def _without_alignment(supervision: lhotse.SupervisionSegment) -> dict[str, Any]:
    return {name: value for name, value in supervision.to_dict().items() if name != "alignment"}


def _write(path: Path, items: Iterator[dict[str, Any]]) -> None:
    with open(path, "wb") as file:
        file.writelines(orjson.dumps(item) + b"\n" for item in items)


def _parts(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Recipes return recordings and supervisions, or those by part, or by language and part."""
    if "recordings" in result:
        yield prefix or "all", result
        return
    for name, part in result.items():
        yield from _parts(part, f"{prefix}-{name}" if prefix else name)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What recipes say through the root logger while they skip things."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)

    def emit(record: logging.LogRecord) -> None:
        # How many recordings have no transcript is not news: each of them becomes a reject of its own.
        if "recordings with no corresponding supervisions" not in record.getMessage():
            found.append(record.getMessage())

    handler.emit = emit
    logging.getLogger().addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def _unreadable_headers(unreadable: dict[str, str]) -> Iterator[None]:
    """One audio file without a readable header would end a recipe: meanwhile it counts as a second of silence.

    Every such file is noted in `unreadable` (path: what was wrong), for the caller to take it out of the result.
    """
    from lhotse import AudioSource, Recording

    original = Recording.from_file

    def from_file(path: Any, recording_id: Any = None, **options: Any) -> lhotse.Recording:
        try:
            return original(path, recording_id=recording_id, **options)
        except Exception as error:  # each of lhotse's audio backends has exceptions of its own
            unreadable[str(path)] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            id = recording_id(Path(path)) if callable(recording_id) else recording_id or Path(path).stem
            return Recording(
                id, [AudioSource("file", [0], str(path))], sampling_rate=16000, num_samples=16000, duration=1.0
            )

    Recording.from_file = staticmethod(from_file)
    try:
        yield
    finally:
        Recording.from_file = staticmethod(original)


def _librispeech(root: Path) -> dict[str, Any]:
    from lhotse.recipes import prepare_librispeech

    return prepare_librispeech(root)


def _libritts(root: Path) -> dict[str, Any]:
    from lhotse.recipes.libritts import LIBRITTS, prepare_libritts

    present = [part for part in LIBRITTS if (root / part).is_dir()]
    if not present:
        raise FileNotFoundError(f"none of the folders {', '.join(LIBRITTS)} is in it")
    return prepare_libritts(root, dataset_parts=present)


def _ljspeech(root: Path) -> dict[str, Any]:
    from lhotse.recipes import prepare_ljspeech

    sets = prepare_ljspeech(root)
    for supervision in sets["supervisions"]:
        supervision.speaker = "LJ"  # the corpus has one reader, whom the recipe does not name
    return sets


def _vctk(root: Path) -> dict[str, Any]:
    from lhotse.recipes import prepare_vctk

    return prepare_vctk(root, use_edinburgh_vctk_url=(root / "wav48_silence_trimmed").is_dir())


def _mls(root: Path) -> dict[str, Any]:
    from lhotse.recipes import prepare_mls

    return prepare_mls(root, opus=any(root.glob("mls_*_opus")))


RECIPES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "librispeech": _librispeech,
    "libritts": _libritts,
    "ljspeech": _ljspeech,
    "vctk": _vctk,
    "mls": _mls,
}
"""The corpora that lhotse prepares for us; LibriLight has a reader of its own, which cuts it at pauses."""
