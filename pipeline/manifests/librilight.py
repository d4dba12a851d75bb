"""Folders of recordings with what LibriLight tells of each in a JSON file beside it: ROOT/reader/book/file.flac|json.

    {"speaker": "1034", "book_meta": {"id": 1, "title": "…"}, "snr": 7.1, "voice_activity": [[0.4, 5.1], [5.6, 9.0]]}

Speech spans become segments of a wanted length that begin and end at pauses. A recording without `voice_activity` comes
whole, marked `needs_segmentation`, for the planner to find its pauses.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from infra import storage
from pipeline.manifests import fields
from pipeline.manifests.errors import ManifestError
from pipeline.manifests.fingerprint import listing
from pipeline.manifests.tables import json_object
from pipeline.utterances import Reject, Unusable, Utterance

AUDIO = (".flac", ".wav", ".mp3", ".ogg", ".opus")
_READERS, _READ_AHEAD = 32, 256


@dataclass(frozen=True)
class Cutting:
    """How long recordings are cut at their pauses."""

    segment_seconds: float = 15.0
    """Length to aim at."""
    max_seconds: float = 60.0
    max_silence: float = 0.8
    """Longer silences are dropped."""


def read_folder(root: str, cutting: Cutting) -> Iterator[Utterance | Reject]:
    """Segments of every recording below `root`, in the order of the paths' components."""
    root = storage.absolute(root)
    tell = partial(_told, root)
    # From object storage in threads: a request takes a hundredth of a second, and LibriLight has 200,000 files.
    over = map if storage.is_local(root) else _ahead
    for path, told in over(tell, _recordings(root)):
        yield from _segments(root, path, told, cutting)


def require_audio(root: str) -> None:
    """Raises `ManifestError` for a folder without a single recording."""
    if not any(path.lower().endswith(AUDIO) for path, _ in listing(root)):
        raise ManifestError(f"{root}: holds no manifest and no recording ({', '.join(AUDIO)})")


def _recordings(root: str) -> Iterator[tuple[str, bool]]:
    """Relative path of each recording, or of a JSON file without one, and whether such a file tells of it."""
    for stem, paths in _by_stem(root):
        audio = [path for path in paths if path.lower().endswith(AUDIO)]
        json = f"{stem}.json" in paths
        yield from ((path, json) for path in audio)
        if json and not audio:
            yield f"{stem}.json", False


def _by_stem(root: str) -> Iterator[tuple[str, list[str]]]:
    """Files of one name, whatever their endings: in a sorted listing others may stand between them."""
    folder: dict[str, list[str]] = {}
    current = ""
    for path, _ in listing(root):
        if not path.lower().endswith((*AUDIO, ".json")):
            continue
        parent = path.rpartition("/")[0]
        if parent != current:
            yield from folder.items()
            folder, current = {}, parent
        folder.setdefault(os.path.splitext(path)[0], []).append(path)
    yield from folder.items()


def _ahead(function: Callable, items: Iterator) -> Iterator:
    """`map` in threads, in order, a bounded number of results ahead."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(items, _READ_AHEAD))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result


def _told(root: str, recording: tuple[str, bool]) -> tuple[str, dict[str, Any] | Unusable]:
    """A recording's path and what its JSON file says, or what is wrong with that."""
    path, has_json = recording
    if path.endswith(".json"):
        return path, Unusable("missing-audio", "there is no recording beside this file")
    if not has_json:
        return path, {}
    url = storage.join(root, os.path.splitext(path)[0] + ".json")
    try:
        return path, json_object(storage.patiently(partial(_content, url)))
    except Unusable as error:
        return path, Unusable(error.reason, f"{fields.name_of(url)}: {error.detail}")


def _content(url: str) -> bytes:
    """Raises Unusable where the file itself is at fault, OSError where the storage is."""
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        raise Unusable("missing-file", "it was listed and has gone") from None
    except IsADirectoryError:
        raise Unusable("not-a-file", "it is a folder") from None
    except PermissionError as error:
        raise Unusable("no-permission", f"it may not be read: {error}") from None


def _segments(root: str, path: str, told: dict[str, Any] | Unusable, cutting: Cutting) -> Iterator[Utterance | Reject]:
    from pipeline.segmentation import cut

    stem = os.path.splitext(path)[0]
    try:
        if isinstance(told, Unusable):
            raise told
        extra = _about(told)
        row = {"id": stem, "audio": storage.join(root, path), "speaker": told.get("speaker", _reader(path))}
        if told.get("voice_activity") is None:
            yield fields.utterance(row, "", path, {**extra, "needs_segmentation": True})
            return
        segments = cut(
            _spans(told["voice_activity"]), cutting.segment_seconds, cutting.max_seconds, cutting.max_silence
        )
        if not segments:
            raise Unusable("no-speech", "voice_activity names no span of speech")
    except Unusable as error:
        yield fields.reject(error, path, stem)
        return
    for segment in segments:
        times = {"start": round(segment.start, 6), "duration": round(segment.duration, 6)}
        yield fields.utterance({**row, **times, "id": f"{stem}-{round(segment.start * 1000):08d}"}, "", path, extra)


def _reader(path: str) -> str:
    """The folder that is the reader's in LibriLight's layout; '' for a recording that lies elsewhere."""
    folders = path.split("/")[:-1]
    return folders[-2] if len(folders) >= 2 else ""


def _about(told: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping with every segment: the book and the recording's quality, not the book's whole entry."""
    book = told.get("book_meta")
    book = book if isinstance(book, dict) else {}
    about = {"book": book.get("title"), "book_id": book.get("id"), "genre": book.get("genre"), "snr": told.get("snr")}
    return {name: value for name, value in about.items() if value is not None}


def _spans(voice_activity: Any) -> list[tuple[float, float]]:
    if not isinstance(voice_activity, list):
        raise Unusable(
            "bad-field", f"voice_activity must be a list of [start, end], not {fields.shown(voice_activity)}"
        )
    return list(map(_span, voice_activity))


def _span(value: Any) -> tuple[float, float]:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(number) in (int, float) for number in value)
    if not numbers or not 0 <= value[0] <= value[1] <= fields.LONGEST_SECONDS:
        raise Unusable(
            "bad-field", f"a span of voice_activity must be [start, end] in seconds, not {fields.shown(value)}"
        )
    return float(value[0]), float(value[1])
