"""How good is speech? Words a recogniser gets wrong, likeness of voices, intelligibility, predicted opinion, distances.

All models' weights come inside packages of the `eval` extra; each is loaded when it is first used and runs on the CPU.
None of the figures stands alone: predicted opinion prefers clean synthesis to real recordings, and the similarity here
is Resemblyzer's (same speaker about 0.87, another about 0.53 on read English), not the WavLM one of papers.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_JUDGES_RATE = 16000
_MELS = 80
_SILENCE = 1e-4
_LOWEST_OPUS, _HIGHEST_OPUS = 6.0, 256.0


class EvaluationError(RuntimeError):
    """Something cannot be measured: says what is missing or wrong, and what to do."""


class NoVoice(EvaluationError):
    """There is no voice in the audio."""


class WordErrors(NamedTuple):
    """Edit distances of a transcript to its reference, both normalised."""

    words: int
    word_errors: int
    characters: int
    character_errors: int


def count_errors(reference: str, hypothesis: str) -> WordErrors:
    """Errors of what was recognised, after Whisper's English normaliser (case, punctuation, numbers as digits).

    Nothing recognised counts as every word deleted; where the reference has no words, each one recognised is an error.

    Raises:
        EvaluationError: the `eval` extra is missing.
    """
    jiwer, normalise = _needed("jiwer"), _normaliser()
    reference, hypothesis = normalise(reference), normalise(hypothesis)
    if not reference:
        return WordErrors(0, len(hypothesis.split()), 0, len(hypothesis))
    by_word = jiwer.process_words(reference, hypothesis)
    by_character = jiwer.process_characters(reference, hypothesis)
    wrong, wrong_characters = (r.substitutions + r.deletions + r.insertions for r in (by_word, by_character))
    return WordErrors(len(reference.split()), wrong, len(reference), wrong_characters)


def word_error_rate(errors: Sequence[WordErrors]) -> float:
    """Errors over words of all utterances together; 0.1 is one word in ten."""
    return sum(error.word_errors for error in errors) / sum(error.words for error in errors)


def voice_print(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 [256] of length 1: who speaks in `samples`, float32 [time] (Resemblyzer, GE2E).

    Raises:
        NoVoice: silence, or nothing that its voice activity detector takes for speech.
    """
    resemblyzer = _needed("resemblyzer")
    audible = np.abs(samples).max(initial=0.0) > _SILENCE
    speech = resemblyzer.preprocess_wav(at_rate(samples, rate)) if audible else ()
    if len(speech) == 0:
        raise NoVoice("no voice was found: the audio is empty, silent or noise")
    return _voice_encoder().embed_utterance(speech)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of two voice prints: about 0.87 for one speaker's utterances, 0.53 for two speakers'."""
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def intelligibility(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """STOI of `degraded` against `reference`, float32 [time] each, aligned in time; 1: as intelligible (Taal 2011).

    It compares stretches of 0.4 s; NaN where there is less speech than that.
    """
    pystoi = _needed("pystoi")
    length = min(len(reference), len(degraded))
    if length < 0.4 * rate:
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(pystoi.stoi(reference[:length], degraded[:length], rate))
        except RuntimeWarning:
            return math.nan


def predicted_mos(samples: np.ndarray, rate: int) -> float:
    """DistillMOS: the opinion of listeners, 1 to 5, as a network distilled from wav2vec predicts it."""
    import torch

    with torch.inference_mode():
        return float(_distillmos()(torch.from_numpy(np.ascontiguousarray(at_rate(samples, rate)))[None]))


def dnsmos(samples: np.ndarray, rate: int) -> float:
    """DNSMOS P.835's overall opinion, 1 to 5: background noise weighs more here than in `predicted_mos`."""
    judge = _needed("speechmos.dnsmos")
    return float(judge.run(np.clip(at_rate(samples, rate), -1.0, 1.0), _JUDGES_RATE)["ovrl_mos"])


def mel_distance(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Mean absolute difference of log10 mel magnitudes (80 bands), float32 [time] each, aligned in time."""
    length = min(len(reference), len(degraded))
    return float(np.mean(np.abs(log_mel(reference[:length], rate) - log_mel(degraded[:length], rate))))


def log_mel(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 [80, frames]: log10 of mel magnitudes, floored at 1e-5; a frame every 10.7 ms at 24 kHz."""
    size = 1 << round(math.log2(rate * 0.0427))
    padded = np.pad(np.asarray(samples, np.float32), (0, max(0, size - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 4] * np.hanning(size).astype(np.float32)
    magnitudes = np.abs(np.fft.rfft(frames, axis=1)).T
    return np.log10(np.maximum(mel_filters(rate, size) @ magnitudes, 1e-5)).astype(np.float32)


@functools.cache
def mel_filters(rate: int, size: int, bands: int = _MELS) -> np.ndarray:
    """[bands, size // 2 + 1] triangles, evenly spaced on the mel scale from 0 to half of `rate`, each of area 1."""
    edges = 700.0 * (10.0 ** (np.linspace(0.0, 2595.0 * math.log10(1 + rate / 1400.0), bands + 2) / 2595.0) - 1.0)
    frequencies = np.arange(size // 2 + 1) * rate / size
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return triangles / np.maximum(triangles.sum(axis=1, keepdims=True), 1e-9)


def perplexity(codes: Sequence[np.ndarray], entries: int) -> list[float]:
    """How many entries of each codebook are in effective use: 2 to the entropy of their frequencies, 1 to `entries`.

    Args:
        codes: integers [codebooks, frames] an utterance; all with the same number of codebooks.

    Raises:
        EvaluationError: no codes, or one that the codebook does not have.
    """
    if not codes:
        raise EvaluationError("there are no codes to measure the use of codebooks with")
    results = []
    for row in np.concatenate([np.asarray(item, dtype=np.int64) for item in codes], axis=1):
        if row.min() < 0 or row.max() >= entries:
            raise EvaluationError(f"codes go from {row.min()} to {row.max()}, but a codebook has {entries} entries")
        share = np.bincount(row, minlength=entries) / len(row)
        used = share[share > 0]
        results.append(float(2.0 ** -(used * np.log2(used)).sum()))
    return results


def edge_level(samples: np.ndarray, rate: int, span: float = 0.01) -> float:
    """The largest jump of the waveform in its first and last `span` s, silence beyond its ends included.

    In dB against the utterance's own largest jump: speech that fades lies below -20; 0 means that nothing in the
    utterance is as abrupt as its end, which is heard as a click.
    """
    jumps = np.abs(np.diff(np.concatenate([[0.0], np.asarray(samples, np.float64), [0.0]])))
    count = max(1, int(span * rate))
    edge = max(jumps[:count].max(), jumps[-count:].max())
    inside = jumps[count:-count].max(initial=0.0)
    return float(20 * np.log10(max(edge, 1e-6) / max(inside, 1e-6)))


def clicks(original: np.ndarray, decoded: np.ndarray, rate: int) -> bool:
    """Does `decoded` click at an end at which `original` does not? float32 [time] each."""
    return edge_level(decoded, rate) > max(-6.0, edge_level(original, rate) + 6.0)


def opus(samples: np.ndarray, rate: int, kbits: float) -> np.ndarray:
    """`samples`, float32 [time], coded with Opus at about `kbits` kbit/s and decoded: as long and as loud as they were.

    Raises:
        EvaluationError: a bit rate that libsndfile's Opus encoder does not have.
    """
    import soundfile

    if not _LOWEST_OPUS <= kbits <= _HIGHEST_OPUS:
        raise EvaluationError(f"Opus codes one channel at {_LOWEST_OPUS:g} to {_HIGHEST_OPUS:g} kbit/s, not {kbits}")
    # libsndfile's scale from 0 to 1 runs from the highest bit rate to the lowest.
    level = (_HIGHEST_OPUS - kbits) / (_HIGHEST_OPUS - _LOWEST_OPUS)
    file = io.BytesIO()
    supported = next(r for r in (8000, 12000, 16000, 24000, 48000) if r >= min(rate, 48000))
    soundfile.write(
        file, at_rate(samples, rate, supported), supported, format="OGG", subtype="OPUS", compression_level=level
    )
    file.seek(0)
    decoded, decoded_rate = soundfile.read(file, dtype="float32")
    decoded = at_rate(decoded, decoded_rate, rate)
    return np.pad(decoded, (0, max(0, len(samples) - len(decoded))))[: len(samples)]


def at_rate(samples: np.ndarray, rate: int, target: int = _JUDGES_RATE) -> np.ndarray:
    """float32 [time] at `target` Hz: 16 kHz is what recognisers and judges listen at."""
    import soxr

    samples = np.asarray(samples, dtype=np.float32)
    return samples if rate == target else soxr.resample(samples, rate, target)


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"evaluation needs {error.name}: `make install-dev`, or pip install 'lina-ray[asr,eval]' and then "
            "pip install --no-deps -r infra/nodeps-eval.txt"
        ) from None


@functools.cache
def _normaliser() -> Any:
    return _needed("whisper_normalizer.english").EnglishTextNormalizer()


@functools.cache
def _voice_encoder() -> Any:
    return _needed("resemblyzer").VoiceEncoder("cpu", verbose=False)


@functools.cache
def _distillmos() -> Any:
    import contextlib

    from model import encodec_package

    encodec_package.package()  # DistillMOS, too, imports torchaudio, whose extension may not load.
    with contextlib.redirect_stdout(io.StringIO()):
        return _needed("distillmos").ConvTransformerSQAModel().eval()
