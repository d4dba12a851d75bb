"""lhotse's recordings and supervisions, joined while both are read.

Supervisions mostly come in the order of their recordings; then neither file is ever in memory. Recordings that were
passed lie in a temporary SQLite file, which gets its index only when a supervision comes back to one of them.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline.manifests import fields, tables
from pipeline.manifests.lhotse_cuts import deserialized, one_channel, other_columns, source_of, supervision_row
from pipeline.manifests.lines import lines
from pipeline.utterances import Reject, Unusable, Utterance

if TYPE_CHECKING:
    import lhotse

_WINDOW = 1024
"""Recordings kept at hand, for supervisions that are only a little out of order."""


def read_recordings(
    recordings_url: str, supervisions_url: str | None, resolve: Callable[[str], str]
) -> Iterator[Utterance | Reject]:
    """One utterance for each supervision, and one without text for each recording that has none.

    Args:
        recordings_url, supervisions_url: `.jsonl` or `.jsonl.gz`; without supervisions every recording is an utterance.
        resolve: makes a path in the manifest absolute.
    """
    with tempfile.TemporaryDirectory(prefix="recordings-") as folder:
        recordings = _Recordings(recordings_url, os.path.join(folder, "passed.sqlite"))
        try:
            if supervisions_url:
                yield from _supervised(supervisions_url, recordings, resolve)
            for recording, where in recordings.unused():
                yield _utterance(recording, {"id": recording.id}, {}, resolve, where)
        finally:
            recordings.close()
    yield from recordings.rejects


def _supervised(url: str, recordings: _Recordings, resolve: Callable[[str], str]) -> Iterator[Utterance | Reject]:
    import lhotse

    for supervision, where in _objects(url, lhotse.SupervisionSegment):
        if isinstance(supervision, Reject):
            yield supervision
            continue
        try:
            recording = recordings.find(supervision.recording_id)
            row = supervision_row(supervision, 0.0, None)
        except Unusable as error:
            yield fields.reject(error, where, supervision.id)
            continue
        yield _utterance(recording, row, other_columns(supervision), resolve, where)


def _utterance(
    recording: lhotse.Recording, row: dict[str, Any], extra: dict[str, Any], resolve: Callable[[str], str], where: str
) -> Utterance | Reject:
    try:
        row.setdefault("duration", recording.duration)
        channel = one_channel(recording.channel_ids) if row.get("channel") is None else row["channel"]
        path, row["channel"] = source_of(recording, channel)
        return fields.utterance({**row, "audio": resolve(path)}, "", where, extra)
    except Unusable as error:
        return fields.reject(error, where, row["id"])


def _objects(url: str, kind: type) -> Iterator[tuple[Any, str]]:
    """lhotse's object for each line, or a reject, and where it stands."""
    name = fields.name_of(url)
    for number, line in enumerate(lines(url), 1):
        if not line or line.isspace():
            continue
        where, label = f"{name}:{number}", ""
        try:
            data = tables.json_object(line)
            label = data.get("id", "")
            item = deserialized(data)
            if not isinstance(item, kind) or not isinstance(item.id, str):
                raise Unusable("bad-cut", f"expected a {kind.__name__} with an id, found {fields.shown(label or item)}")
        except Unusable as error:
            item = fields.reject(error, where, label)
        yield item, where


class _Recordings:
    """Recordings by id from a file that is read only as far as it is needed."""

    def __init__(self, url: str, spill: str) -> None:
        import lhotse

        self.rejects: list[Reject] = []
        """Lines of the file that are no recordings."""
        self._ahead = _objects(url, lhotse.Recording)
        self._window: OrderedDict[str, list[Any]] = OrderedDict()  # id: [recording, where, used]
        self._passed = sqlite3.connect(spill, isolation_level=None, check_same_thread=False)
        self._passed.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE passed (id TEXT, line TEXT, place TEXT, used INT); BEGIN;"
        )
        self._indexed = False

    def find(self, id: str) -> lhotse.Recording:
        """Raises `Unusable` (`missing-audio`) where no such recording is in the file."""
        if not isinstance(id, str):
            raise Unusable("bad-field", f"recording_id must be text, not {fields.shown(id)}")
        if id not in self._window:
            if (again := self._find_passed(id)) is not None:
                return again
            for item, where in self._ahead:
                if self._keep(item, where) and item.id == id:
                    break
            else:
                raise Unusable("missing-audio", f"there is no recording {fields.shown(id)} beside the supervisions")
        entry = self._window[id]
        entry[2] = True
        return entry[0]

    def unused(self) -> Iterator[tuple[lhotse.Recording, str]]:
        """Recordings that nobody asked for, in the order of the file; to be called last."""
        for line, where in self._passed.execute("SELECT line, place FROM passed WHERE NOT used ORDER BY rowid"):
            yield deserialized(tables.json_object(line.encode())), where
        yield from ((recording, where) for recording, where, used in self._window.values() if not used)
        for item, where in self._ahead:
            if self._keep(item, where):
                yield item, where

    def close(self) -> None:
        self._passed.close()

    def _keep(self, item: lhotse.Recording | Reject, where: str) -> bool:
        if isinstance(item, Reject):
            self.rejects.append(item)
            return False
        if item.id in self._window:
            detail = f"a recording {fields.shown(item.id)} stands in the manifest more than once; the first one is used"
            self.rejects.append(Reject(item.id, "manifest", "duplicate-recording", detail, where))
            return False
        self._window[item.id] = [item, where, False]
        if len(self._window) > _WINDOW:
            id, (recording, place, used) = self._window.popitem(last=False)
            import orjson

            line = orjson.dumps(recording.to_dict()).decode()
            self._passed.execute("INSERT INTO passed VALUES (?, ?, ?, ?)", (id, line, place, used))
        return True

    def _find_passed(self, id: str) -> lhotse.Recording | None:
        if len(self._window) < _WINDOW:
            return None
        if not self._indexed:
            self._passed.execute("CREATE INDEX by_id ON passed (id)")
            self._indexed = True
        found = self._passed.execute("SELECT rowid, line FROM passed WHERE id = ?", (id,)).fetchone()
        if found is None:
            return None
        self._passed.execute("UPDATE passed SET used = 1 WHERE rowid = ?", found[:1])
        return deserialized(tables.json_object(found[1].encode()))
