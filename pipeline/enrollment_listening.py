"""Some of a batch's voices say a sentence, for the report: to be heard, and measured where the eval extra is there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from infra import devices
from pipeline.codec_weights import ResolvedCodec
from pipeline.enroll_config import EnrollConfig
from pipeline.enrollment import Batch
from pipeline.utterances import Unusable, Utterance

if TYPE_CHECKING:
    import numpy as np

    from pipeline.enrollment_report import Results

_ORIGINALS = 3
"""Samples of a speaker that its voice is compared with."""


class Chosen(NamedTuple):
    """A voice that speaks."""

    speaker: str
    url: str
    originals: tuple[Utterance, ...]


class Said(NamedTuple):
    """What came of it; None where it could not be measured."""

    speaker: str
    content: bytes
    """Ogg Opus, with its provenance in it."""
    similarity: float | None
    """Cosine of its voice print to the mean one of the speaker's samples."""
    wer: float | None
    """Words of the sentence that a recogniser gets wrong."""


def listen(batch: Batch, results: Results) -> None:
    """Adds to the results what `config.listen` voices, spread evenly over the batch, say and how well."""
    import ray

    config = batch.config
    device = devices.of_cluster(config.device)
    task = ray.remote(speak).options(num_cpus=1, num_gpus=config.codec_gpus if device == "cuda" else 0)
    said, notes = ray.get(task.remote(config, batch.codec, _chosen(batch, results), device))
    for note in notes:
        print(f"enroll: {note}", file=sys.stderr)
    results.notes += notes
    rows = {row["speaker"]: row for row in results.rows}
    for one in said:
        results.said[one.speaker] = one.content
        rows[one.speaker] |= {"similarity": one.similarity, "wer": one.wer}


def speak(
    config: EnrollConfig, codec: ResolvedCodec, chosen: Sequence[Chosen], device: str
) -> tuple[list[Said], list[str]]:
    """(what the voices say, why some of it is missing or not measured)."""
    import torch

    from pipeline.speaking_voices import read_voice
    from pipeline.speech_files import SpeechFileError, encode
    from pipeline.speech_lines import Line, derived
    from pipeline.speech_stage import describe, provenance_of
    from pipeline.synthesis import Synthesizer, read_model

    torch.set_num_threads(config.threads)
    synthesizer = Synthesizer(read_model(config.model), codec, device, config.dtype)
    voices = {one.speaker: read_voice(one.url, synthesizer.card, one.speaker) for one in chosen}
    lines = ((name, Line(config.sentence, voice, derived(config.seed, name))) for name, voice in voices.items())
    heard = dict(synthesizer.speak(lines))
    judge, reason = _judge()
    said, notes = [], [f"what was said is not measured: {reason}"] if reason else []
    for one in chosen:
        spoken = heard[one.speaker]
        if isinstance(spoken, Unusable):
            return said, [f"the sentence cannot be said: {spoken.detail}"]
        details = {"report": describe(spoken)}
        provenance = provenance_of(synthesizer.card.fingerprint, voices[one.speaker], config.sentence, details)
        try:
            content = encode(spoken.samples, spoken.rate, provenance, "opus") if len(spoken.samples) else b""
        except SpeechFileError as error:
            content = b""
            notes.append(f"the report cannot play {one.speaker!r}: {error}")
        figures = judge(spoken.samples, spoken.rate, config.sentence, one) if judge else (None, None)
        said.append(Said(one.speaker, content, *figures))
    return said, notes


def _chosen(batch: Batch, results: Results) -> list[Chosen]:
    import numpy as np

    names = sorted(row["speaker"] for row in results.rows)
    places = np.unique(np.linspace(0, len(names) - 1, min(batch.config.listen, len(names))).round().astype(int))
    wanted = {names[place] for place in places.tolist()}
    speakers = (part for part in batch.speakers() if getattr(part, "name", None) in wanted)
    return [Chosen(s.name, batch.folder.voice_url(s.key), s.samples[:_ORIGINALS]) for s in speakers]


def _judge():
    """(a function from samples, rate, sentence and whose voice to similarity and WER, or None; why there is none)."""
    from pipeline import measures
    from pipeline.asr_models import TranscriptionUnavailable
    from pipeline.evaluation import whisper

    try:
        measures.count_errors("one", "one")
        recogniser = whisper()
    except (measures.EvaluationError, TranscriptionUnavailable) as error:
        return None, str(error)

    def judged(samples: np.ndarray, rate: int, sentence: str, one: Chosen) -> tuple[float | None, float]:
        errors = measures.count_errors(sentence, recogniser(samples, rate) if len(samples) else "")
        return _likeness(samples, rate, one), measures.word_error_rate([errors])

    return judged, None


def _likeness(samples: np.ndarray, rate: int, one: Chosen) -> float | None:
    """To the mean voice print of the originals; None where no voice is found in them, 0 where none is in the speech."""
    from pipeline import measures
    from pipeline.audio import clean_audio

    prints = []
    for original in one.originals:
        try:
            wave = clean_audio(
                original.audio, original.start, original.duration, target_rate=rate, channel=original.channel
            )
            prints.append(measures.voice_print(wave, rate))
        except (Unusable, measures.NoVoice, OSError):
            continue
    if not prints:
        return None
    try:
        return measures.similarity(measures.voice_print(samples, rate), sum(prints) / len(prints))
    except measures.NoVoice:
        return 0.0
