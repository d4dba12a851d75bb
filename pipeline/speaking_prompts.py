"""Recordings that a synthesizer goes on from (`model.continuation`): read, phonemised and encoded as for training."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

from infra import storage
from pipeline import phonemes
from pipeline.audio import clean_audio
from pipeline.speaker_samples import to_samples
from pipeline.speech_lines import Prompt
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    from pipeline.synthesis import Synthesizer


def read_prompt(url: str, text: str, synthesizer: Synthesizer) -> Prompt:
    """A recording and its words as what lines can go on from.

    Raises:
        Unusable: `no-prompt-text`, or what is wrong with the recording or the text.
        OSError: the storage failed.
    """
    if not text.strip():
        raise Unusable("no-prompt-text", f"nobody has said what is spoken in {url}: give its words as prompt_text")
    card = synthesizer.card
    phones = phonemes.to_text(phonemes.phonemise(text))
    wave = storage.patiently(functools.partial(clean_audio, url, target_rate=card.codec.sample_rate))
    (codes,) = synthesizer.codec.encode([wave], card.sizes.codebooks)
    ids = {phone: number for number, phone in enumerate(card.inventory)}
    (sample,) = to_samples([{"phones": phones, "codes": codes}], ids)
    return Prompt(sample, hashlib.sha256(codes.astype("<u2").tobytes() + phones.encode()).hexdigest())
