"""English as it is written to English as it is said."""

from __future__ import annotations

import re

import pytest

from pipeline.text import MOST_CHARACTERS, normalise
from pipeline.utterances import Unusable

LEXICON = frozenset("nasa the it us is who a i us may he went home part mix".split())


def said(text: str) -> str:
    """Normalised, with every mark right behind its word."""
    return re.sub(r" (?=[.,?!;:])", "", normalise(text, LEXICON.__contains__))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("In 1914, 1905, 2000, 2007 and 1500", "in nineteen fourteen, nineteen oh five, two thousand"),
        ("1,234 and 105 and 0", "one thousand two hundred thirty-four and one hundred five and zero"),
        ("1914-1918", "nineteen fourteen to nineteen eighteen"),
        ("the 1990s and the '20s", "the nineteen nineties and the 'twenties"),
        ("2nd, 21st, 100th", "second, twenty-first, one hundredth"),
        ("3.14 and .5 and 1.2.3", "three point one four and point five and one point two point three"),
        ("$5.50", "five dollars, fifty cents"),
        ("$1, £1.01, €20, ¥7", "one dollar, one pound, one penny, twenty euros, seven yen"),
        ("$1.5 million", "one point five million dollars"),
        ("$0.05 or $0", "five cents or zero dollars"),
        ("50% of 10 km & 5kg", "fifty percent of ten kilometers and five kilograms"),
        ("at 3:00, 3:05, 3:30 p.m. and 7am", "at three o'clock, three oh five, three thirty P M and seven A M"),
        ("½ cup, 3½ miles, 3/4", "one half cup, three and a half miles, three quarters"),
        ("-5 degrees", "minus five degrees"),
        ("007 or 12345678901234", "zero zero seven or one two three four five six seven eight nine zero one two three"),
        ("No. 5, Nos. 3 and #7", "number five, numbers three and number seven"),
        ("Chapter XIV. Part I of Book V", "chapter fourteen. part i of book five"),
        ("Part MIX and part xi", "part mix and part xi"),
    ],
)
def test_numbers(text: str, words: str) -> None:
    assert said(text).startswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mr. Smith met Dr. Jones and Mrs. Brown.", "mister smith met doctor jones and missus brown."),
        ("MR SMITH MET DR JONES", "mister smith met doctor jones"),
        ("St. Paul lived on Baker St.", "saint paul lived on baker street."),
        ("Sunset Dr., Smith & Co. and John Jr.", "sunset drive, smith and company and john junior."),
        ("cats, e.g. tigers, i.e. big ones, etc.", "cats, for example tigers, that is big ones, et cetera."),
        ("The U.S. and the BBC", "the U S and the B B C"),
        ("Give it to us in the US, says NASA", "give it to us in the U S, says nasa"),
        ("J. R. R. Tolkien", "J R R tolkien"),
        ("HE WENT HOME FBI", "he went home fbi"),
        ("It may be; who is he?", "it may be; who is he?"),
    ],
)
def test_abbreviations(text: str, words: str) -> None:
    assert said(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("“Well…” she said — ‘don’t’", "well. she said - 'don't'"),
        ("naïve café, Ærø, straße", "naive cafe, aero, strasse"),
        ("ﬁne ｆｕｌｌ width", "fine full width"),
        ("co\u00adop\u200berate", "cooperate"),
        ("the _Iliad_ [sic] (really)", "the iliad sic really"),
        ("to-day -- and well-known", "to-day - and well-known"),
        ("tabs\tand\nlines\0and nul", "tabs and lines and nul"),
        ("hello 🎉 there", "hello there"),
    ],
)
def test_signs(text: str, words: str) -> None:
    assert said(text) == words


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty-text"),
        (" \n\u3000", "empty-text"),
        ("a" * (MOST_CHARACTERS + 1), "text-too-long"),
        ("word " * 10_000, "text-too-long"),
        ("caf\ufffd", "broken-text"),
        ("🎉🎉", "not-speakable"),
        ("...?!", "not-speakable"),
        ("$ %", "not-speakable"),
        ("\ud800", "not-speakable"),
        ("Съешь ещё булок, please", "not-speakable"),
        ("what the Greeks called λόγος", "not-speakable"),
        ("東京タワー Tokyo", "not-speakable"),
        ("٣٤", "not-speakable"),
    ],
)
def test_what_cannot_be_said(text: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        said(text)
    assert caught.value.reason == reason


def test_a_sign_alone_is_no_word_but_a_number_is() -> None:
    assert said("7") == "seven"
    assert said("Ω is a letter") == "is a letter"
    assert said("naïve façade") == "naive facade"
