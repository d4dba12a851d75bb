"""JSON Lines on any fsspec URL: an object a line, in ASCII, so that no text ends a line or cannot be encoded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from infra import storage


def line(row: dict[str, Any]) -> str:
    """A row with its line break."""
    return json.dumps(row) + "\n"


def write(url: str, rows: Iterable[dict[str, Any]]) -> None:
    storage.write_text(url, "".join(map(line, rows)))


def read(url: str) -> list[dict[str, Any]]:
    """The rows of a file. Raises OSError, and ValueError where it is no JSON Lines."""
    # Not splitlines, to which U+2028 and others end lines that JSON lets stand as they are.
    return [json.loads(row) for row in storage.read_text(url).split("\n") if row]
