"""Numbers as they are read aloud: counts, ordinals, years, decades, money, clock times, fractions, decimals, ranges."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MOST_DIGITS = 12
"""Longer runs are read digit by digit."""
_MONEY = {"$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent"), "¥": ("yen", "sen")}
_PLURALS = {"penny": "pence", "yen": "yen", "sen": "sen"}
_UNITS = {
    **{
        "km": "kilometers",
        "cm": "centimeters",
        "mm": "millimeters",
        "kg": "kilograms",
        "lb": "pounds",
        "lbs": "pounds",
    },
    **{"oz": "ounces", "mph": "miles per hour", "ft": "feet"},
}
_NUMERAL = re.compile(
    r"\b(chapter|book|part|volume|act|scene|section|canto|psalm)\s+"
    r"(?=[XVI]{2}|[LXV])(X{0,3}|XL|LX{0,3})(IX|IV|V?I{0,3})\b(?![a-z])",
    re.IGNORECASE,
)
_ONES = {"": 0, "I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7, "VIII": 8, "IX": 9}
_TENS = {"": 0, "X": 10, "XX": 20, "XXX": 30, "XL": 40, "L": 50, "LX": 60, "LXX": 70, "LXXX": 80}


def spell_roman(text: str) -> str:
    """`Chapter XIV` to `Chapter fourteen`: capitals after a word that numbers a piece of a book."""

    def spelled(match: re.Match) -> str:
        if match[2] != match[2].upper() or match[3] != match[3].upper():
            return match[0]
        return f"{match[1]} {cardinal(str(_TENS[match[2]] + _ONES[match[3]]))}"

    return _NUMERAL.sub(spelled, text)


def spell_numbers(text: str) -> str:
    """`text` with every ASCII digit said in words, and the signs around digits too."""
    for pattern, spoken in _RULES:
        text = pattern.sub(spoken, text)
    return text


@lru_cache(maxsize=1 << 16)
def cardinal(number: str) -> str:
    """`1,234` as a count, `1234` as a year is read, `007` and very long runs digit by digit."""
    digits = number.replace(",", "")
    if len(digits) > _MOST_DIGITS or (digits[0] == "0" and len(digits) > 1):
        return " ".join(_DIGITS[int(digit)] for digit in digits)
    value = int(digits)
    if "," in number or not 1000 < value < 3000 or value == 2000:
        return number_speller().number_to_words(value, andword="").replace(",", "")
    if 2000 < value < 2010:
        return f"two thousand {_DIGITS[value - 2000]}"
    if value % 100 == 0:
        return f"{number_speller().number_to_words(value // 100)} hundred"
    return number_speller().number_to_words(value, andword="", zero="oh", group=2).replace(",", "")


@cache
def number_speller() -> Any:
    """inflect's engine, imported without typeguard rewriting all its functions, which takes most of two seconds."""
    import typeguard

    rewrite, typeguard.typechecked = typeguard.typechecked, lambda function: function
    try:
        import inflect
    finally:
        typeguard.typechecked = rewrite
    return inflect.engine()


def _ordinal(match: re.Match) -> str:
    digits = match[1].replace(",", "")
    if len(digits) > _MOST_DIGITS:
        return cardinal(digits)
    return number_speller().number_to_words(number_speller().ordinal(int(digits)), andword="").replace(",", "")


def _decade(match: re.Match) -> str:
    words = cardinal(match[1])
    return f"{words[:-1]}ies" if words.endswith("y") else f"{words}s"


def _money(match: re.Match) -> str:
    sign, whole, decimals, magnitude = match.groups()
    unit, part = _MONEY[sign]
    if magnitude or len(decimals or "") > 2:
        return f"{whole}{'.' + decimals if decimals else ''} {magnitude or ''} {_counted(0, unit)}"
    parts = int(f"{decimals or 0:0<2}")
    spoken = [f"{whole} {_counted(int(whole.replace(',', '')), unit)}"] if whole.strip("0,") or not parts else []
    return ", ".join(spoken + ([f"{parts} {_counted(parts, part)}"] if parts else []))


def _counted(count: int, unit: str) -> str:
    return unit if count == 1 else _PLURALS.get(unit, unit + "s")


def _clock(match: re.Match) -> str:
    hour, minute, half = match.groups()
    if int(hour) > 24:
        return match[0]
    spoken = {"0": f"oh {minute[1]}"}.get(minute[0], minute)
    if minute == "00":
        spoken = "" if half else "o'clock"
    return f"{int(hour)} {spoken} {half or ''}"


def _half_of_day(match: re.Match) -> str:
    return f"{match[1]} {match[2]}.m."


def _fraction(match: re.Match) -> str:
    whole, top, bottom = match[1], int(match[2]), int(match[3])
    if not 0 < top < bottom <= 10:
        return match[0]
    part = {2: "half", 4: "quarter"}.get(bottom) or number_speller().number_to_words(number_speller().ordinal(bottom))
    part = part if top == 1 else "halves" if bottom == 2 else f"{part}s"
    return f"{whole} and {'a' if top == 1 else top} {part}" if whole else f"{top} {part}"


def _decimal(match: re.Match) -> str:
    parts = match[2].removeprefix(".").split(".")
    return (match[1] or "") + "".join(f" point {' '.join(part)} " for part in parts)


_RULES = [
    (re.compile(pattern, re.IGNORECASE), spoken)
    for pattern, spoken in (
        (rf"([$£€¥])\s?({_NUMBER})(?:\.(\d+))?(?:\s+(hundred|thousand|million|billion|trillion)\b)?", _money),
        (r"(?<![\d:])(\d{1,2}):([0-5]\d)(?::[0-5]\d)?(?![\d:])(\s*[ap]\.?m\b\.?)?", _clock),
        (r"(\d)\s*\b([ap])\.?m\b\.?", _half_of_day),
        (r"(\d)([ap])\.?m\b\.?", _half_of_day),
        (r"\bno(s?)\.\s?(?=\d)|#\s?(?=\d)", lambda match: f"number{match[1] or ''} "),
        (r"(?:(\d+)\s+)?(?<![\d/])(\d{1,2})/(\d{1,2})(?![\d/])", _fraction),
        (rf"({_NUMBER})(?:st|nd|rd|th)\b", _ordinal),
        (r"\b(\d{1,3}0)'?s\b", _decade),
        (rf"(\d)\s?({'|'.join(_UNITS)})\b", lambda match: f"{match[1]} {_UNITS[match[2].lower()]}"),
        (r"(?<![\w.,])-(?=\d)", "minus "),
        (r"(?<=\d)\s?-\s?(?=\d)", " to "),
        (rf"({_NUMBER})?((?:\.\d+)+)", _decimal),
        (_NUMBER, lambda match: f" {cardinal(match[0])} "),
    )
]
