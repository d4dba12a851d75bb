"""Phonemes: g2p-en's words, our inventory, and nothing else for any text there is."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.phonemes import INVENTORY, SPACE, decode, encode, from_text, phonemise, to_text
from pipeline.text import PUNCTUATION
from pipeline.utterances import Unusable

TEXT_REASONS = {"empty-text", "text-too-long", "broken-text", "not-speakable"}


def words(text: str) -> list[str]:
    """The phones of each word, without punctuation."""
    line = to_text(phone for phone in phonemise(text) if phone not in PUNCTUATION)
    return [word.strip() for word in line.split(SPACE)]


def test_the_inventory_never_changes() -> None:
    """Checkpoints and shards hold these numbers."""
    assert INVENTORY[:5] == ("<pad>", "<bos>", "<eos>", "<unk>", "<space>")
    assert len(INVENTORY) == len(set(INVENTORY)) == 5 + 7 + 15 * 3 + 24
    assert encode([".", "-", "AA0", "AA1", "UW2", "B", "ZH"]) == [5, 11, 12, 13, 56, 57, 80]


def test_a_sentence() -> None:
    phones = phonemise("Hello, world - it's 5.")
    assert to_text(phones) == (
        "HH AH0 L OW1 , <space> W ER1 L D - <space> IH1 T S <space> F AY1 V ."
    )  # the dash belongs to the word before it, like every mark
    assert decode(encode(phones)) == from_text(to_text(phones)) == phones


@pytest.fixture(scope="module")
def g2p_en() -> Any:
    phonemise("this finds NLTK's data")
    import g2p_en

    return g2p_en.G2p()


@pytest.mark.parametrize(
    "text",
    [
        "I refuse to collect the refuse around here",
        "the quick brown fox jumps over the lazy dog",
        "they object to the object of this project",
        "popular pets and activationists don't",
        "an old man's desert was to desert him",
    ],
)
def test_plain_words_are_those_of_g2p_en(text: str, g2p_en: Any) -> None:
    spoken = to_text("|" if phone == " " else phone for phone in g2p_en(text))
    assert words(text) == [word.strip() for word in spoken.split("|")]


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("I will read what she read", "AY1|W IH1 L|R IY1 D|W AH1 T|SH IY1|R EH1 D"),
        ("they live a live wire", "DH EY1|L IH1 V|AH0|L AY1 V|W AY1 ER0"),
        ("to-day an x-ray of snow-white", "T AH0 D EY1|AE1 N|EH1 K S R EY2|AH1 V|S N OW1|W AY1 T"),
        ("the 'hello' dogs'", "DH AH0|HH AH0 L OW1|D AO1 G Z"),
        ("the U.S. and mp3", "DH AH0|Y UW1|EH1 S|AH0 N D|EH1 M P IY1|TH R IY1"),
        ("'tis o'clock", "T IH1 Z|AH0 K L AA1 K"),
    ],
)
def test_what_g2p_en_alone_would_get_wrong(text: str, spoken: str) -> None:
    assert words(text) == spoken.split("|")


def test_clitics_follow_the_sound_before_them() -> None:
    for name, ending in (("Zork's", ["S"]), ("Zubbed's", ["Z"]), ("Zish's", ["IH0", "Z"]), ("Zork'll", ["AH0", "L"])):
        assert phonemise(name) == phonemise(name.partition("'")[0]) + ending


def test_upper_case_transcripts_sound_like_lower_case_ones() -> None:
    for text in ("HE READ THE REFUSE TO MISTER SMITH AT SAINT PAUL'S", "A MAN SAID IT WAS US WHO DIDN'T", "DR JONES"):
        assert phonemise(text) == phonemise(text.lower())


def test_of_several_marks_the_strongest_stays() -> None:
    assert to_text(phonemise("... what?!, well;: so...")) == "W AH1 T ? <space> W EH1 L ; <space> S OW1 ."


def test_tokens_outside_the_inventory_are_refused() -> None:
    with pytest.raises(ValueError, match="'QQ' is not one of the 81"):
        encode(["AA0", "QQ"])
    with pytest.raises(ValueError, match="id 81"):
        decode([3, 81])
    with pytest.raises(ValueError, match="id -1"):
        decode([-1])


def check_any(text: str) -> None:
    try:
        phones = phonemise(text)
    except Unusable as error:
        assert error.reason in TEXT_REASONS
        return
    assert phones and set(phones) <= set(INVENTORY[3:])
    assert phones == phonemise(text)
    assert phones[0] not in (SPACE, *PUNCTUATION) and phones[-1] != SPACE
    for one, other in pairwise(phones):
        assert not (one in PUNCTUATION and other in PUNCTUATION) and (one, other) != (SPACE, SPACE)
        assert not (one == SPACE and other in PUNCTUATION)
    assert from_text(to_text(phones)) == phones


@settings(max_examples=300)
@given(st.text(max_size=60))
@example("1" * 2000)
@example("$" + "9" * 400 + ".99")
@example("1/2" * 300)
@example("99th" * 300)
@example("9,999,999,999,999,999,999,999")
@example("½½½ 1½⁄2 ¾th")
@example("''''s 's-'s --'-'- 'a'")
@example("A.B.C.D. a.m.p.m. I. A.")
@example("\0a\0b")
@example("'-a-'")
def test_any_text_gives_phones_or_a_reason(text: str) -> None:
    check_any(text)


@settings(max_examples=300)
@given(st.text(alphabet="aB zMr.St,0159:/-'$£%½é—é?!\u0301\u200d🎉Ж", max_size=40))
def test_any_english_looking_text_gives_phones_or_a_reason(text: str) -> None:
    check_any(text)


def test_without_a_network_data_is_found_or_its_lack_is_a_clear_error(tmp_path: Path) -> None:
    """First as if NLTK's data had never been built, then with it; whoever opens a socket fails."""
    program = """
import socket, sys
from pathlib import Path
def refuse(*_, **__): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from infra import nltk_data
from pipeline.phonemes import phonemise, to_text
built, nltk_data.folder = nltk_data.folder, lambda: Path(sys.argv[1])
try: phonemise("hello")
except nltk_data.MissingData as error: print(error)
nltk_data.folder = built
print(to_text(phonemise("I refuse the refuse")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and "run `make install`" in lines[0], done.stderr
    assert lines[1] == "AY1 <space> R IH0 F Y UW1 Z <space> DH AH0 <space> R EH1 F Y UW2 Z"
