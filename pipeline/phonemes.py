"""Text to phonemes: ARPAbet with stress, from g2p-en, over one fixed inventory that every checkpoint carries.

g2p-en gives its lexicon (CMU), its homographs with the tagger that tells them apart, and its network for words of no
lexicon. Around them stand our own normalisation (`pipeline.text`), tokens, and a few pronunciations that g2p-en has
wrong. Everything comes from installed packages; nothing is downloaded (`infra.nltk_data`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from pipeline.spoken_numbers import number_speller
from pipeline.text import PUNCTUATION, normalise

PAD, BOS, EOS, UNK, SPACE = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<space>")
VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
CONSONANTS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N"),
    *("NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
INVENTORY: tuple[str, ...] = (
    *SPECIALS,
    *PUNCTUATION,
    *(vowel + stress for vowel in VOWELS for stress in "012"),
    *CONSONANTS,
)
_IDS = {token: number for number, token in enumerate(INVENTORY)}

_TOKEN = re.compile(r"[a-z']*[a-z][a-z'\-]*|[A-Z]|[.,?!;:\-]")
_LETTERS_ONLY = re.compile(r"(?!.*(.)\1)[b-df-hj-np-tv-xz]{2,5}")
"""Short and without a vowel, and not drawn out like `brr`: said letter by letter."""
_STRONGEST_FIRST = "?!.;:,-"
_HOMOGRAPHS = {
    "lead": (("VB", "NN", "JJ"), "L IY1 D", "L IY1 D"),
    "live": (("VB",), "L IH1 V", "L AY1 V"),
    "lives": (("VB",), "L IH1 V Z", "L AY1 V Z"),
    "read": (("VBD", "VBN"), "R EH1 D", "R IY1 D"),
    "tear": (("VB",), "T EH1 R", "T IH1 R"),
    "tears": (("VB",), "T EH1 R Z", "T IH1 R Z"),
    "wind": (("VB",), "W AY1 N D", "W IH1 N D"),
    "winds": (("VB",), "W AY1 N D Z", "W IH1 N D Z"),
}
"""What g2p-en 2.1.0 has not, or (read) the wrong way round: part of speech, its phones, the phones otherwise."""
_ENDINGS = {"'ll": ("AH0", "L"), "'d": ("D",), "'ve": ("AH0", "V"), "'re": ("ER0",)}


def phonemise(text: str) -> list[str]:
    """Tokens of `INVENTORY`: phones, `<space>` between words, a punctuation mark right after the word it follows.

    Raises:
        Unusable: `empty-text`, `text-too-long`, `broken-text` or `not-speakable`.
        MissingData: NLTK's data was never built; run `make install`.
    """
    voice = _pronouncer()
    words = _TOKEN.findall(normalise(text, voice.knows))
    words = [part for word in words for part in voice.parts(word)]
    tags = voice.tags(words)
    phones: list[str] = []
    for word, tag in zip(words, tags, strict=True):
        if word in PUNCTUATION:
            _punctuate(phones, word)
            continue
        if phones:
            phones.append(SPACE)
        phones.extend(voice.pronounce(word, tag))
    return phones


def encode(phones: Iterable[str]) -> list[int]:
    """Ids of phones, without `<bos>` and `<eos>`.

    Raises:
        ValueError: a token outside the inventory.
    """
    try:
        return [_IDS[phone] for phone in phones]
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is not one of the {len(INVENTORY)} tokens of the inventory") from None


def decode(ids: Iterable[int]) -> list[str]:
    """Phones of ids, the inverse of `encode`.

    Raises:
        ValueError: an id outside the inventory.
    """
    ids = list(ids)
    if bad := [number for number in ids if not 0 <= number < len(INVENTORY)]:
        raise ValueError(f"id {bad[0]} is not in 0 to {len(INVENTORY) - 1}")
    return [INVENTORY[number] for number in ids]


def to_text(phones: Iterable[str]) -> str:
    """One line, as a `.phones.txt` member holds it."""
    return " ".join(phones)


def from_text(line: str) -> list[str]:
    """The inverse of `to_text`.

    Raises:
        ValueError: a token outside the inventory.
    """
    return decode(encode(line.split()))


def _punctuate(phones: list[str], mark: str) -> None:
    """Adds a mark after a word; of several marks in a row the strongest stays."""
    if not phones:
        return
    if phones[-1] not in PUNCTUATION:
        phones.append(mark)
    elif _STRONGEST_FIRST.index(mark) < _STRONGEST_FIRST.index(phones[-1]):
        phones[-1] = mark


@dataclass(frozen=True)
class _Pronouncer:
    """g2p-en's parts, put together again."""

    lexicon: dict[str, list[list[str]]]
    homographs: dict[str, tuple[tuple[str, ...], Sequence[str], Sequence[str]]]
    guess: Callable[[str], tuple[str, ...]]
    tag: Callable[[list[str]], list[tuple[str, str]]]

    def knows(self, word: str) -> bool:
        return word in self.lexicon

    def parts(self, word: str) -> list[str]:
        """A hyphened word as the lexicon has it: whole (x-ray), joined (to-day) or in parts (snow-white)."""
        if "-" not in word or word in PUNCTUATION or word in self.lexicon:
            return [word]
        joined = word.replace("-", "")
        return [joined] if joined in self.lexicon else [part for part in word.split("-") if part.strip("'")]

    def tags(self, words: list[str]) -> list[str]:
        """Penn tags, or empty ones where no word's sound depends on them."""
        if not any(word in self.homographs for word in words):
            return [""] * len(words)
        return [tag for _, tag in self.tag([word.lower() for word in words])]

    def pronounce(self, word: str, tag: str) -> Sequence[str]:
        if word.isupper():
            return self.lexicon[f"{word.lower()}."][0]
        if word in self.homographs:
            parts_of_speech, phones, otherwise = self.homographs[word]
            return phones if tag.startswith(parts_of_speech) else otherwise
        if word in self.lexicon:
            return self.lexicon[word][0]
        return self.compose(word)

    def compose(self, word: str) -> Sequence[str]:
        """A word of no lexicon: without its quotation marks, stem and clitic, letters (mp), or the network's guess."""
        bare = word.strip("'")
        if bare in self.lexicon:
            return self.lexicon[bare][0]
        stem, apostrophe, ending = bare.rpartition("'")
        clitic = apostrophe + ending
        if stem and clitic in _ENDINGS:
            return (*self.pronounce(stem, ""), *_ENDINGS[clitic])
        if stem and clitic == "'s":
            phones = self.pronounce(stem, "")
            return (*phones, *_plural(phones[-1]))
        if _LETTERS_ONLY.fullmatch(bare):
            return [phone for letter in bare for phone in self.pronounce(letter.upper(), "")]
        return self.guess(bare.replace("'", ""))


def _plural(last: str) -> tuple[str, ...]:
    if last in ("S", "Z", "SH", "ZH", "CH", "JH"):
        return ("IH0", "Z")
    return ("S",) if last in ("P", "T", "K", "F", "TH") else ("Z",)


@cache
def _pronouncer() -> _Pronouncer:
    """Built once a process: some seconds of imports and 8 MB of data."""
    from infra.nltk_data import require

    data = require()  # before g2p_en is imported, which would try to download what it does not find
    import nltk

    if str(data) not in nltk.data.path:
        nltk.data.path.insert(0, str(data))
    number_speller()  # before g2p_en imports it in the slow way
    import g2p_en

    g2p = g2p_en.G2p()

    @lru_cache(maxsize=1 << 17)
    def guess(word: str) -> tuple[str, ...]:
        phones = tuple("UW0" if phone == "UW" else phone for phone in g2p.predict(word))
        return tuple(phone if phone in _IDS else UNK for phone in phones) or (UNK,)

    homographs = {word: ((tag,), one, other) for word, (one, other, tag) in g2p.homograph2features.items()}
    for word, (tags, one, other) in _HOMOGRAPHS.items():
        homographs[word] = (tags, one.split(), other.split())
    return _Pronouncer(g2p.cmu, homographs, guess, nltk.pos_tag)
