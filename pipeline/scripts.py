"""A script: lines to say, `{"id": "a/1", "voice": "ann", "text": "Good morning."}` each, read in chunks.

A chunk's digest covers its lines and how they are said, so that what is done is known by name: lines may be added and
changed, and only the chunks that hold them are looked at again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from infra import storage
from pipeline.keys import key_of
from pipeline.utterances import Reject, Unusable


class ScriptError(ValueError):
    """A script that cannot be read at all."""


class ScriptLine(NamedTuple):
    """One line that can be taken up."""

    id: str
    key: str
    """Of its file, without the ending."""
    voice: str
    """Empty for the model's own, or a prompt's."""
    text: str
    prompt: str = ""
    """URL of a recording that is gone on from; scripts of evaluations have some."""
    prompt_text: str = ""
    """What is said in it."""
    prompt_version: str = ""
    """Another one for another recording in its place."""


_PROMPT = ("prompt", "prompt_text", "prompt_version")


class Chunk(NamedTuple):
    """Lines that one worker takes at a time."""

    name: str
    """Of the file that says what became of them: number and digest."""
    lines: tuple[ScriptLine, ...]


@dataclass
class Survey:
    """What a script holds."""

    lines: int = 0
    """All that are not blank, unusable ones included."""
    chunks: dict[str, int] = field(default_factory=dict)
    """Their names in order, and how many lines each has."""
    rejects: Counter = field(default_factory=Counter)
    """By `stage/reason`, of lines that are none."""


def survey(url: str, size: int, settings: dict[str, Any], prompts: bool = False) -> Survey:
    """Goes over a script once. Raises ScriptError."""
    found = Survey()
    for part in read(url, size, settings, prompts):
        if isinstance(part, Reject):
            found.lines += 1
            found.rejects[f"{part.stage}/{part.reason}"] += 1
        else:
            found.lines += len(part.lines)
            found.chunks[part.name] = len(part.lines)
    return found


def read(url: str, size: int, settings: dict[str, Any], prompts: bool = False) -> Iterator[Chunk | Reject]:
    """A script's chunks and, as they are met, its lines that cannot be used.

    Args:
        size: lines a chunk.
        settings: how they are said; part of the chunks' digests.
        prompts: whether lines may name a prompt; otherwise it is passed over, as any field that is not known.

    Raises:
        ScriptError: there is no such file.
    """
    bound = json.dumps(settings, sort_keys=True)
    seen: set[str] = set()
    lines: list[ScriptLine] = []
    number = 0
    for where, content in _lines(url):
        try:
            line = _parsed(content, prompts)
            if line.key in seen:
                raise Unusable("duplicate-id", f"id {line.id[:80]!r} stands in the script before")
        except Unusable as error:
            yield Reject(_id(content), "script", error.reason, error.detail, where)
            continue
        seen.add(line.key)
        lines.append(line)
        if len(lines) == size:
            yield _chunk(number, lines, bound)
            lines, number = [], number + 1
    if lines:
        yield _chunk(number, lines, bound)


def _lines(url: str) -> Iterator[tuple[str, bytes]]:
    fs, path = storage.filesystem(url)
    name = path.rpartition("/")[2]
    try:
        with fs.open(path, "rb") as file:
            for number, content in enumerate(file, 1):
                if content.strip():
                    yield f"{name}:{number}", content
    except OSError as error:
        raise ScriptError(f"{url} cannot be read ({error}); a script is JSONL with id, voice and text") from None


def _parsed(content: bytes, prompts: bool) -> ScriptLine:
    """Raises Unusable."""
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unusable("not-json", f"no JSON: {error}") from None
    if not isinstance(row, dict):
        raise Unusable("not-json", f"expected an object with id, voice and text, found {type(row).__name__}")
    id_, text, voice = row.get("id"), row.get("text"), row.get("voice") or ""
    if not isinstance(id_, str):
        raise Unusable("bad-id", "id is missing or no text")
    if not isinstance(text, str):
        raise Unusable("no-text", "text is missing or no text")
    if not isinstance(voice, str):
        raise Unusable("bad-voice", f"voice must be a name in --voices, not {type(voice).__name__}")
    line = ScriptLine(id_, key_of(id_), voice, text)
    if not prompts or not row.get("prompt"):
        return line
    return line._replace(**{name: str(row.get(name) or "") for name in _PROMPT})


def _id(content: bytes) -> str:
    try:
        return str(json.loads(content)["id"])[:200]
    except (ValueError, RecursionError, TypeError, KeyError):
        return ""


def _chunk(number: int, lines: list[ScriptLine], bound: str) -> Chunk:
    # Lines without a prompt count as they did before there were any: what is done stays done.
    told = [line if line.prompt else line[:4] for line in lines]
    digest = hashlib.sha256((bound + json.dumps(told)).encode()).hexdigest()
    return Chunk(f"{number:06d}-{digest[:16]}", tuple(lines))
