"""Long texts in pieces that a model can say in one go: whole sentences, clauses where a sentence is too long."""

from __future__ import annotations

import re
from typing import NamedTuple

MOST, LEAST = 200, 25
"""Characters of a piece: about 13 s of speech at most; shorter ones than the least go with their neighbour."""

_PARAGRAPH = re.compile(r"\s*\n\s*\n\s*")
_SENTENCE = re.compile(r"""(?:[.!?…]+["'”’»)\]]*)\s+(?=["'“‘«(\[]*[A-Z0-9À-ÞΑ-ΩА-Я])""")
_NAMED = re.compile(
    r"\b(?:mr|mrs|ms|dr|st|prof|capt|col|gen|lt|sgt|maj|gov|sen|hon|rev|mt|ft|vs|viz|e\.g|i\.e|[a-z])\.$",
    re.IGNORECASE,
)
"""What ends in a dot that does not end a sentence: titles, initials."""
_NUMBERED = re.compile(r"\b(?:no|nos|vol|fig|ch|pp|p)\.$", re.IGNORECASE)
"""The same where a number follows."""
_CLAUSES = (
    re.compile(r"(?<=[.!?;:…])\s+|\s+(?=[-–—]\s)|(?<=[–—])(?=\w)"),
    re.compile(r"(?<=,)\s+"),
    re.compile(r"\s+(?=(?:and|but|or|nor|for|so|yet|which|who|that|because|when|while|where|if|as|than)\b)"),
    re.compile(r"\s+"),
)
"""Where a sentence is cut, the best first."""
_CLOSING = "\"'”’»)]"
_PAUSES = {".": 0.4, "…": 0.5, "!": 0.4, "?": 0.45, ";": 0.3, ":": 0.3, ",": 0.18, "-": 0.22, "–": 0.22, "—": 0.22}
_PARAGRAPH_PAUSE, _NO_MARK_PAUSE = 0.8, 0.06


class Piece(NamedTuple):
    """A part of a text, and the pause after it."""

    text: str
    pause: float
    """Seconds; 0 after the last piece."""


def pieces(text: str, most: int = MOST, least: int = LEAST) -> list[Piece]:
    """The parts of a text in order; together they have all its words. Empty where nothing can be said."""
    found: list[Piece] = []
    for paragraph in _PARAGRAPH.split(text):
        sentences = [part for sentence in _sentences(paragraph) for part in _cut(sentence, most)]
        parts = _packed([part for part in sentences if any(c.isalnum() for c in part)], most, least)
        found += [Piece(part, _pause(part)) for part in parts]
        if parts:
            found[-1] = found[-1]._replace(pause=_PARAGRAPH_PAUSE)
    return [*found[:-1], found[-1]._replace(pause=0.0)] if found else []


def _sentences(paragraph: str) -> list[str]:
    paragraph = " ".join(paragraph.split())
    sentences, begin = [], 0
    for match in _SENTENCE.finditer(paragraph):
        end = match.end()
        sentence = paragraph[begin:end].rstrip()
        if not _NAMED.search(sentence) and not (paragraph[end].isdigit() and _NUMBERED.search(sentence)):
            sentences.append(sentence)
            begin = end
    return [*sentences, paragraph[begin:]]


def _cut(sentence: str, most: int) -> list[str]:
    """A sentence in parts of at most `most` characters, cut at the best place near its middle, and those again."""
    if len(sentence) <= most:
        return [sentence]
    for places in _CLAUSES:
        cuts = [match for match in places.finditer(sentence) if 0.2 < match.start() / len(sentence) < 0.8]
        if cuts:
            cut = min(cuts, key=lambda match: abs(match.start() - len(sentence) / 2))
            return _cut(sentence[: cut.start()], most) + _cut(sentence[cut.end() :], most)
    half = len(sentence) // 2
    return _cut(sentence[:half], most) + _cut(sentence[half:], most)


def _packed(parts: list[str], most: int, least: int) -> list[str]:
    """Very short parts joined with what follows or, at the end, with what precedes: models say single words badly."""
    packed: list[str] = []
    for part in parts:
        short = packed and min(len(packed[-1]), len(part)) < least
        if short and len(packed[-1]) + 1 + len(part) <= most:
            packed[-1] += " " + part
        else:
            packed.append(part)
    return packed


def _pause(part: str) -> float:
    bare = part.rstrip(_CLOSING)
    return _PAUSES.get(bare[-1:], _NO_MARK_PAUSE)
