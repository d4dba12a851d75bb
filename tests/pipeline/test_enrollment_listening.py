"""Voices that are heard for the report: what one of them cannot do is told, and the others are heard."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import soundfile

from model.checkpoint import load
from model.voice_file import load as load_voice
from model.voice_file import save as save_voice
from pipeline import codec_weights
from pipeline.enroll_config import EnrollConfig
from pipeline.enrollment_listening import Chosen, _likeness, speak
from pipeline.speaking_voices import read_voice
from pipeline.speech_files import decode, encode
from pipeline.speech_stage import provenance_of
from pipeline.utterances import Utterance
from tests.pipeline.speaking_model import write_speaker, write_voice


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker")
    return *write_speaker(folder, ends=1.5), write_voice(folder / "ann.safetensors", str(folder / "model"))


@pytest.mark.parametrize("scope", ["🎉" * 400, '"\\' * 200, "\u2028x" * 200, "a" * 400, "short"])
def test_any_consent_fits_into_a_file_of_speech(speaker, tmp_path, scope):
    model, _, voice = speaker
    given = load_voice(voice)
    consent = given.consent | {"scope": scope}
    save_voice(dataclasses.replace(given, consent=consent), tmp_path / "ann.safetensors")
    card = load(model)[1]
    read = read_voice(str(tmp_path / "ann.safetensors"), card)
    whole = f"Ann Example, 2025-03-01: {scope}"
    assert whole.startswith(read.consent) and len(json.dumps(read.consent, ensure_ascii=False).encode()) <= 302
    assert read.consent == whole or len(json.dumps(read.consent + scope[0], ensure_ascii=False).encode()) > 300
    details = {"request": "0" * 32, "report": {"seconds": 1.5, "faults": ["no-end"]}}
    provenance = provenance_of(card.fingerprint, read, "Rain.", details)
    for form in ("wav", "opus"):
        assert decode(encode(np.zeros(2400, np.float32), 24_000, provenance, form))[2].consent == read.consent


def test_a_voice_that_no_file_can_name_does_not_take_the_others_away(speaker):
    model, codec, voice = speaker
    config = EnrollConfig(speakers="any", model=model, sentence="Rain.")
    long = "n" * 1500
    said, notes = speak(config, codec_weights.resolve(codec), [Chosen(n, voice, ()) for n in (long, "ann")], "cpu")
    assert [one.speaker for one in said] == [long, "ann"] and said[0].content == b""
    assert decode(said[1].content)[2].voice == "ann"
    assert any(long in note and "does not fit" in note for note in notes)


def test_a_voice_is_compared_with_the_speakers_own_channel(shared_data, tmp_path):
    pytest.importorskip("resemblyzer")
    files = sorted((shared_data / "librispeech-test-other" / "audio").glob("*.flac"))
    (own, rate), (other, _) = (soundfile.read(file, frames=64_000, dtype="float32") for file in (files[0], files[-1]))
    length = min(len(own), len(other))
    soundfile.write(tmp_path / "two.wav", np.stack([other[:length], own[:length]], 1), rate, subtype="FLOAT")

    def likeness(channel: int | None) -> float:
        original = Utterance("", str(tmp_path / "two.wav"), channel=channel)
        return _likeness(own[:length], rate, Chosen("ann", "", (original,)))

    assert likeness(1) == pytest.approx(1.0, abs=1e-3) and likeness(0) < 0.95
