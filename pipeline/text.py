"""Written English to the words that a reader says: digits, money, times, abbreviations and symbols spelled out.

The result is lower-case words (with their apostrophes and hyphens), the marks of `PUNCTUATION`, and single upper-case
letters where a letter's name is said (`U.S.` becomes `U S`). Upper-case transcripts without punctuation, as LibriSpeech
has them, come out as their lower-case selves. Plain numbers follow g2p-en's own rules (years in pairs, no "and"); what
those get wrong (decimals, money in millions, clock times, signs) is said properly.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from pipeline.spoken_numbers import spell_numbers, spell_roman
from pipeline.utterances import Unusable

PUNCTUATION = (".", ",", "?", "!", ";", ":", "-")
MOST_CHARACTERS = 2000
_LEAST_LATIN = 0.8
"""Share of a text's letters that must be of the Latin alphabet."""

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("‘’‛′`´ʼ", "'"),
        **dict.fromkeys('“”„‟″«»‹›"()[]{}<>*_|~^\\\0', " "),
        **dict.fromkeys("—―─", " - "),
        **dict.fromkeys("‐‑‒–−", "-"),
        **{"…": ".", "⁄": "/", "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O"},
        **{"đ": "d", "Đ": "D", "ł": "l", "Ł": "L", "þ": "th", "Þ": "Th", "ð": "th", "Ð": "Th", "ı": "i"},
        **{
            "&": " and ",
            "@": " at ",
            "%": " percent ",
            "+": " plus ",
            "=": " equals ",
            "×": " times ",
            "°": " degrees ",
        },
    }
)
_TITLES = {
    **{"mr": "mister", "mrs": "missus", "ms": "miz", "dr": "doctor", "st": "saint", "prof": "professor"},
    **{"capt": "captain", "col": "colonel", "gen": "general", "lt": "lieutenant", "sgt": "sergeant", "maj": "major"},
    **{"gov": "governor", "sen": "senator", "hon": "honorable", "rev": "reverend", "mt": "mount", "ft": "fort"},
}
_SAID_WITHOUT_DOT = {"mr", "mrs", "ms", "dr", "st"}
_ABBREVIATIONS = {
    **{"jr": "junior", "sr": "senior", "esq": "esquire", "co": "company", "ltd": "limited", "inc": "incorporated"},
    **{"corp": "corporation", "bros": "brothers", "etc": "et cetera", "vs": "versus", "viz": "namely", "ft": "feet"},
    **{"st": "street", "dr": "drive", "ave": "avenue", "blvd": "boulevard", "rd": "road", "dept": "department"},
    **{"vol": "volume", "approx": "approximately"},
}
_ABBREVIATED = re.compile(rf"\b({'|'.join({**_TITLES, **_ABBREVIATIONS})})\b(\.?)", re.IGNORECASE)
_INITIALISM = re.compile(r"\b([A-Z]{2,5})(?:'?(s))?\b")
_LETTER = "\0"
"""Marks a letter whose name is said until everything else is in lower case."""


def normalise(text: str, is_word: Callable[[str], bool]) -> str:
    """The words of `text` as they are said, one space between them.

    Args:
        is_word: whether a lower-case word has a known pronunciation; short capitals that have none are spelled (`BBC`).

    Raises:
        Unusable: `empty-text`, `text-too-long`, `broken-text` (bytes that were not UTF-8) or `not-speakable` (nothing
            of the Latin alphabet, or too many letters of others: what is dropped here is missing beside its audio).
    """
    if not text.strip():
        raise Unusable("empty-text", "the text is empty")
    if len(text) > MOST_CHARACTERS:
        raise Unusable("text-too-long", f"{len(text)} characters, at most {MOST_CHARACTERS}; cut the utterance")
    if "\N{REPLACEMENT CHARACTER}" in text:
        raise Unusable("broken-text", "the text was decoded from bytes that are not UTF-8; convert the manifest")
    if not any(character.isalnum() for character in text):
        raise Unusable("not-speakable", "no letter and no digit in the text: only signs or emoji")
    text = (text if text.isascii() else _to_latin(text)).translate(_PLAIN)
    text = spell_roman(text)
    if any(c.isdigit() for c in text):
        text = spell_numbers(text)
    text = _expand_abbreviations(text, is_word).lower()
    text = re.sub(_LETTER + "([a-z])", lambda match: f" {match[1].upper()} ", text)
    text = re.sub(r"[^a-z'.,?!;:\-A-Z]+", " ", text)
    text = re.sub(r"-{2,}|(?<![A-Za-z'])-+|-+(?![A-Za-z'])", " - ", text)
    if not re.search(r"[A-Za-z]", text):
        raise Unusable("not-speakable", "no word of the Latin alphabet in the text")
    return " ".join(text.split())


def _to_latin(text: str) -> str:
    """ASCII (and currency signs) of what can be said; accents are dropped, other scripts become spaces."""
    text = "".join(_spaced(c) for c in text.translate(_PLAIN))
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in ("Mn", "Cf"))
    letters = [c for c in text if c.isalpha()]
    latin = sum(c.isascii() for c in letters)
    if latin < _LEAST_LATIN * len(letters):
        raise Unusable("not-speakable", f"only {latin} of {len(letters)} letters are of the Latin alphabet")
    return re.sub(r"[^\x00-\x7f£€¥⁄]", " ", text)


@lru_cache(maxsize=4096)
def _spaced(character: str) -> str:
    """A half written as one character gets its space: `3½` is three and a half, not 31/2."""
    return f" {character}" if unicodedata.decomposition(character).startswith("<fraction>") else character


def _expand_abbreviations(text: str, is_word: Callable[[str], bool]) -> str:
    mixed_case = text != text.upper() and text != text.lower()

    def expanded(match: re.Match) -> str:
        word, dot, rest = match[1].lower(), match[2], text[match.end() :].lstrip()
        named = rest[:1].isupper() if mixed_case else rest[:1].isalpha()
        if named and word in _TITLES and (dot or word in _SAID_WITHOUT_DOT):
            return _TITLES[word]
        if dot and word in _ABBREVIATIONS:
            return _ABBREVIATIONS[word] + ("" if rest else ".")
        return match[0]

    def spelled(match: re.Match) -> str:
        word = match[1].lower()
        if is_word(word) and word != "us":
            return match[0]
        return _letters(word) + ("'s" if match[2] else "")

    def initials(match: re.Match) -> str:
        return _letters(match[0].replace(".", "")) + ("." if match.end() == len(text) else "")

    if "." in text:
        text = re.sub(r"\bi\.\s?e\.", "that is", text, flags=re.IGNORECASE)
        text = re.sub(r"\be\.\s?g\.", "for example", text, flags=re.IGNORECASE)
    text = _ABBREVIATED.sub(expanded, text)
    if "." in text:
        text = re.sub(r"\b(?:[A-Za-z]\.){2,}", initials, text)
        text = re.sub(r"\b([A-HJ-Z])\.(?=\s+[A-Z])", lambda match: _letters(match[1]), text)
    return _INITIALISM.sub(spelled, text) if mixed_case else text


def _letters(word: str) -> str:
    return "".join(f" {_LETTER}{letter}" for letter in word)
