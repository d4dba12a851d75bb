"""One row of a manifest becomes an `Utterance`, or a `Reject` that says which field is wrong."""

from __future__ import annotations

import math
import posixpath
from typing import Any

from infra import storage
from pipeline.utterances import Reject, Unusable, Utterance

COLUMNS = ("id", "audio", "text", "speaker", "start", "duration", "language", "channel")
LONGEST_SECONDS = 1e7
"""Four months: no recording is longer, and sums of such times stay exact to a microsecond."""
DEEPEST = 64
"""Levels of lists and objects in a column; parsers and writers of JSON give up at some hundreds."""
_KNOWN = frozenset(COLUMNS)


def folder_of(url: str) -> str:
    """The folder of a file, ending in '/', in the form that `storage.relative_to` takes."""
    url = storage.absolute(url)
    return url[: url.rfind("/") + 1]


def name_of(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


def located(folder: str, path: str) -> str:
    """Absolute path or URL of what a manifest in `folder` calls `path`; object stores know no `..`."""
    path = path.removeprefix("file://")
    found = storage.relative_to(folder, path)
    if found == path or storage.is_local(found):
        return found
    scheme, _, rest = found.partition("://")
    return f"{scheme}://{posixpath.normpath(rest).lstrip('/')}"


def utterance(row: dict[str, Any], folder: str, where: str, extra: dict[str, Any] | None = None) -> Utterance | Reject:
    """Checks every field of a row; its path resolves against `folder`; `extra` is by default every other column."""
    try:
        if extra is None:
            extra = {name: value for name, value in row.items() if name not in _KNOWN}
        return Utterance(
            id=_label(row, "id"),
            audio=located(folder, _audio(row)),
            text=_text(row, "text"),
            speaker=_label(row, "speaker"),
            start=seconds(row.get("start"), "start") or 0.0,
            duration=_duration(row.get("duration")),
            language=_text(row, "language") or "en",
            channel=_channel(row.get("channel")),
            extra={str(name): plain(value) for name, value in extra.items()},
            where=where,
        )
    except Unusable as error:
        return reject(error, where, row.get("id"))


def reject(error: Unusable, where: str, id: Any = "") -> Reject:
    named = isinstance(id, str | int) and not isinstance(id, bool)
    return Reject(
        str(id).encode("utf-8", "replace").decode() if named else "", "manifest", error.reason, error.detail, where
    )


def seconds(value: Any, name: str) -> float | None:
    """A number of seconds from 0 up to `LONGEST_SECONDS`, or None where there is none.

    Raises:
        Unusable: `bad-field`.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable("bad-field", f"{name} must be a number of seconds, not {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise Unusable("bad-field", f"{name} must be a finite number of seconds from 0 up, not {shown(value)}")
    if number > LONGEST_SECONDS:
        raise Unusable("bad-field", f"{name} must be at most {LONGEST_SECONDS:.0e} seconds, not {shown(value)}")
    return number


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: dates and the like become text, numbers that are not finite become null.

    Raises:
        Unusable: `not-utf8`: bytes that are no text; `bad-field`: nested deeper than `DEEPEST`.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return _decoded(value)
    if depth == DEEPEST:
        raise Unusable("bad-field", f"a column is nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        return {str(name): plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def shown(value: Any) -> str:
    """A value as a message shows it: short, and printable whatever it is."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _audio(row: dict[str, Any]) -> str:
    audio = _text(row, "audio")
    if not audio:
        raise Unusable("missing-audio", "the row names no audio file: give its path or URL in the column 'audio'")
    if "\0" in audio or "\n" in audio:
        raise Unusable("bad-field", f"audio must be a path or a URL, not {shown(audio)}")
    return audio


def _text(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    if isinstance(value, bytes):
        return _decoded(value)
    if value is None or isinstance(value, str):
        return value
    raise Unusable("bad-field", f"{name} must be text, not {shown(value)}")


def _label(row: dict[str, Any], name: str) -> str:
    """A name that some corpora write as a number."""
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, name) or ""


def _duration(value: Any) -> float | None:
    duration = seconds(value, "duration")
    if duration == 0:
        raise Unusable("bad-field", "duration must be more than 0 seconds; leave it out to mean the rest of the file")
    return duration


def _channel(value: Any) -> int | None:
    if value is None:
        return None
    whole = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not whole or value != int(value) or not 0 <= value < 1024:
        raise Unusable("bad-field", f"channel must be a whole number from 0 up, not {shown(value)}")
    return int(value)


def _decoded(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("not-utf8", f"{shown(value)} is not UTF-8: {error.reason} at byte {error.start}") from None
