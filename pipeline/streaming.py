"""Speech that is heard while it is being said.

A codec's decoder is causal: the waveform of the first frames does not depend on later ones. So what is there of a piece
is decoded again and again, each time in a longer stretch, and only what is new is given out: every chunk fits the one
before exactly, for three times the decoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from model.continuous_batch import ContinuousBatch
from pipeline.speech_joining import FADE, faded, trailing_silence
from pipeline.speech_lines import Line
from pipeline.synthesis import Synthesizer, Take

GROWTH = 1.5
"""A chunk ends where so many times as much of the piece has been said as at the last one's end."""


def stream(synthesizer: Synthesizer, line: Line, first: float = 0.3) -> Iterator[np.ndarray]:
    """Says one line: float32 [time] each, which one after another are the whole.

    What was heard cannot be said again, so there are no retries; a piece that fails ends at its limit of frames at the
    latest. Silence between pieces is that of `Synthesizer.speak`, or the model's own where that is longer.

    Args:
        first: seconds in the first chunk of a piece; later ones have more.

    Raises:
        Unusable: a text that cannot be said.
        ModelError: a voice of another model.
    """
    rate = synthesizer.card.codec.sample_rate
    for take in synthesizer.takes("stream", line):
        wave = np.zeros(0, np.float32)
        for chunk in _piece(synthesizer, take, first):
            wave = np.concatenate([wave, chunk])
            yield chunk
        if (silence := round((take.pause - trailing_silence(wave, rate)) * rate)) > 0:
            yield np.zeros(silence, np.float32)


def _piece(synthesizer: Synthesizer, take: Take, first: float) -> Iterator[np.ndarray]:
    """Chunks of one piece; the last milliseconds are held back until it is known whether it ends there."""
    rate, frame_rate = synthesizer.card.codec.sample_rate, synthesizer.card.codec.frame_rate
    batch = ContinuousBatch(synthesizer.model, synthesizer.policy)
    batch.add(take.key, take.phones, take.seed, take.state, take.prompt, synthesizer.most_frames(take))
    given, due = 0, max(1, round(first * frame_rate))
    for frames in itertools.count(2 - synthesizer.card.sizes.codebooks):
        ended = batch.step()
        if not ended and frames < due:
            continue
        codes = ended[0][1].codes if ended else batch.said(take.key)
        wave = faded(synthesizer.decode(codes.cpu().numpy()), rate, end=bool(ended))
        until = len(wave) if ended else max(given, len(wave) - round(FADE * rate))
        if until > given:
            yield wave[given:until]
        if ended:
            return
        given, due = until, max(due + 1, round(due * GROWTH))
