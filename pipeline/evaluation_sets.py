"""What systems are asked to say: one item a line, as JSONL or in the format of seed-tts-eval.

    {"id": "a1", "text": "Good morning.", "voice": "ann", "prompt": "ann.wav", "prompt_text": "…"}
    a1|what the prompt says|ann.wav|Good morning.|a1.wav

In JSONL all but id and text may be missing; in seed-tts-eval's meta.lst the reference may. Audio is relative to the
file.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from infra import storage
from pipeline.keys import key_of
from pipeline.measures import EvaluationError
from pipeline.utterances import Reject, Unusable


class Item(NamedTuple):
    """One utterance to say and to judge."""

    id: str
    text: str
    voice: str = ""
    """Name of the enrolled voice that says it; empty for the model's own."""
    prompt: str = ""
    """URL of a recording of the voice that is asked for."""
    prompt_text: str = ""
    """What is said in it."""
    reference: str = ""
    """URL of the text said by a person."""

    @property
    def key(self) -> str:
        """Of the file that a system says it into, without the ending."""
        return key_of(self.id)

    @property
    def likeness(self) -> str:
        """URL of the recording that the voice is compared with: the prompt, or else the reference."""
        return self.prompt or self.reference


def read(url: str) -> tuple[list[Item], list[Reject]]:
    """The items of a set, and its lines that are none.

    Raises:
        EvaluationError: it cannot be read, or holds no item at all.
    """
    try:
        content = storage.read_bytes(url)
    except (OSError, ValueError, ImportError) as error:
        raise EvaluationError(f"{url} cannot be read ({error}); a set is JSONL with id and text, or a .lst") from None
    folder = posixpath.dirname(storage.absolute(url))
    parse = _from_meta if url.endswith(".lst") else _from_json
    items, rejects, seen = [], [], set()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = _absolute(parse(line), folder)
            if item.key in seen:
                raise Unusable("duplicate-id", f"id {item.id[:80]!r} stands in the set before")
        except Unusable as error:
            rejects.append(Reject("", "set", error.reason, error.detail, f"{url.rpartition('/')[2]}:{number}"))
            continue
        seen.add(item.key)
        items.append(item)
    if not items:
        found = f"{len(rejects)} unusable lines, the first: {rejects[0].detail}" if rejects else "no line"
        raise EvaluationError(f"{url} holds nothing to say ({found}); a set is JSONL with id and text, or a .lst")
    return items, rejects


def meta_lines(items: Iterable[Item]) -> Iterator[str]:
    """Lines of seed-tts-eval's meta.lst. Raises EvaluationError for what that format cannot hold."""
    for item in items:
        fields = [item.id, item.prompt_text, item.prompt, item.text, *([item.reference] if item.reference else [])]
        if bad := next((field for field in fields if "|" in field or "\n" in field), None):
            raise EvaluationError(
                f"item {item.id!r} has a '|' or a line break in {bad[:60]!r}: meta.lst has no escapes"
            )
        yield "|".join(fields) + "\n"


def _from_json(line: bytes) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unusable("not-json", f"no JSON: {error}") from None
    if not isinstance(row, dict):
        raise Unusable("not-json", f"expected an object with id and text, found {type(row).__name__}")
    values = {name: row.get(name) or "" for name in Item._fields}
    if wrong := next((name for name, value in values.items() if not isinstance(value, str)), None):
        raise Unusable("bad-field", f"{wrong} must be text, not {type(values[wrong]).__name__}")
    return _checked(Item(**values))


def _from_meta(line: bytes) -> Item:
    try:
        fields = [field.strip() for field in line.decode("utf-8").split("|")]
    except UnicodeDecodeError as error:
        raise Unusable("not-utf8", str(error)) from None
    if len(fields) not in (4, 5):
        raise Unusable("not-meta", f"expected 4 or 5 fields between '|', found {len(fields)}")
    id_, prompt_text, prompt, text, *reference = fields
    return _checked(Item(id_, text, "", prompt, prompt_text, *reference))


def _checked(item: Item) -> Item:
    """Raises Unusable."""
    if not item.text.strip():
        raise Unusable("no-text", f"item {item.id[:80]!r} has no text")
    key_of(item.id)
    return item


def _absolute(item: Item, folder: str) -> Item:
    named = {name: path for name in ("prompt", "reference") if (path := getattr(item, name))}
    return item._replace(**{name: storage.relative_to(folder, path) for name, path in named.items()})
