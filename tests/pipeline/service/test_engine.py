"""One engine without a server: what it refuses, how long it takes at most, what it says of itself."""

from __future__ import annotations

import asyncio
import dataclasses
import math

import numpy as np
import pytest
import requests
import yaml

from infra import storage
from infra.config import load
from model.codec_config import ENCODEC_24KHZ
from model.lina_config import ModelError
from pipeline.enroll_config import StageConfig
from pipeline.service.config import ServiceConfig
from pipeline.service.engine import Begun, Refused, SpeechEngine, SpeechRequest
from pipeline.service.service import Service
from pipeline.service.voice_library import UnknownVoice, VoiceLibrary, describe
from tests.pipeline import speaking_model
from tests.pipeline.service import in_process
from tests.pipeline.speaking_model import write_speaker, write_voice

LONG = "The boat sailed past the quiet island. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    write_speaker(folder)
    other, _ = write_speaker(folder / "other", seed=1)
    write_voice(folder / "ann.safetensors", str(folder / "model"))
    write_voice(folder / "foreign.safetensors", other)
    (folder / "damaged.safetensors").write_bytes((folder / "ann.safetensors").read_bytes()[:-9])
    return folder


@pytest.fixture
def engine(folder):
    engine = SpeechEngine(configured(folder, timeout_s=2.0, rows=2, waiting=0))
    yield engine
    engine.speaker.stop()


@pytest.fixture
def patient(folder):
    """Whose limit no busy machine reaches."""
    engine = SpeechEngine(configured(folder, rows=2, waiting=0))
    yield engine
    engine.speaker.stop()


def configured(folder, **changes) -> ServiceConfig:
    return ServiceConfig(model=str(folder / "model"), codec=str(folder / "codec"), device="cpu", **changes)


async def answered(engine: SpeechEngine, text: str, voice: str | None = None, stream: bool = True) -> list:
    return [item async for item in engine.speak(SpeechRequest(text, voice, "ann", 0, stream))]


def test_an_answer_has_a_beginning_speech_and_a_report(patient, folder):
    begun, *speech, report = asyncio.run(answered(patient, "Rain.", str(folder / "ann.safetensors")))
    assert isinstance(begun, Begun) and begun.rate == 24_000 and len(begun.voice_digest) == 64
    assert begun.consent == "Ann Example, 2025-03-01: tests" and begun.model == patient.synthesizer.card.fingerprint
    assert speech and all(part.dtype == np.float32 for part in speech) and report["pieces"] == 1
    assert asyncio.run(patient.facts())["requests"] == 0
    patient.check_health()


@pytest.mark.parametrize("stream", [True, False])
def test_speech_that_takes_too_long_is_ended_with_its_reason(engine, stream):
    begun, *speech, refused = asyncio.run(answered(engine, LONG, stream=stream))
    assert isinstance(begun, Begun) and bool(speech) == stream
    assert (refused.status, refused.code) == (504, "timeout") and "2 s" in refused.message
    assert len(engine.speaker) == 0


@pytest.mark.parametrize(
    ("voice", "text", "status", "reason"),
    [
        ("foreign", "Rain.", 409, "belongs to model"),
        ("damaged", "Rain.", 409, "safetensors file"),
        ("absent", "Rain.", 409, "cannot be read"),
        ("ann", "🎉", 400, "letter"),
    ],
)
def test_what_cannot_be_said_is_refused_first(engine, folder, voice, text, status, reason):
    (refused,) = asyncio.run(answered(engine, text, str(folder / f"{voice}.safetensors")))
    assert isinstance(refused, Refused) and refused.status == status and reason in refused.message
    assert str(folder) not in refused.message


def test_a_storage_that_fails_is_asked_again_and_never_held_against_the_voice(patient, folder, monkeypatch):
    voice, failures = str(folder / "ann.safetensors"), [OSError("slow down")] * 2
    read = storage.read_bytes
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))

    def shaky(url: str) -> bytes:
        if failures:
            raise failures.pop()
        return read(url)

    monkeypatch.setattr(storage, "read_bytes", shaky)
    assert isinstance(asyncio.run(answered(patient, "Rain.", voice))[0], Begun)
    failures += [OSError("slow down")] * 3
    (refused,) = asyncio.run(answered(patient, "Rain.", voice))
    assert (refused.status, refused.code) == (503, "storage_unavailable") and str(folder) not in refused.message


def test_more_requests_than_it_holds_are_refused_and_leaving_makes_room(engine):
    async def crowded() -> list:
        held = [engine.speak(SpeechRequest(LONG, None, "", 0, True)) for _ in range(2)]
        for one in held:
            assert isinstance(await anext(one), Begun)
        (refused,) = await answered(engine, "Rain.")
        for one in held:
            await one.aclose()  # what Ray Serve does when the client is gone
        return [refused, *await answered(engine, "Rain.")]

    refused, begun, *_ = asyncio.run(crowded())
    assert refused.status == 429 and isinstance(begun, Begun)


def test_an_engine_that_stopped_says_that_it_is_not_well(engine):
    engine.speaker.stop()
    with pytest.raises(RuntimeError, match="thread has ended"):
        engine.check_health()


def test_voices_may_lie_on_object_storage(folder, bucket):
    library = VoiceLibrary(f"{bucket}/voices")
    content = (folder / "ann.safetensors").read_bytes()
    for owner, id in (("a", "ann"), ("b", "bert"), ("shared", "sam"), ("shared", "ann"), ("shared", "LJ Speech")):
        library.write(library.entry(owner, id), content)
    assert [(entry.id, entry.shared) for entry in library.entries("a")] == [
        ("LJ Speech", True),
        ("ann", False),
        ("sam", True),
    ]
    assert describe(library, library.find("a", "ann"))["consent"]["who"] == "Ann Example"
    for id in ("bert", "../b/bert", "default", ""):
        with pytest.raises(UnknownVoice):
            library.find("a", id)
    own = library.find("a", "ann")
    library.delete(own)
    assert library.find("a", "ann").shared
    with pytest.raises(UnknownVoice):
        describe(library, own)


def test_names_of_files_that_no_voice_has_are_passed_over(folder, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("ann", "%FF", "%41nn", "%", ".hidden", "a.b", "LJ%20Speech"):
        (tmp_path / "a" / f"{name}.safetensors").write_bytes((folder / "ann.safetensors").read_bytes())
    assert [entry.id for entry in VoiceLibrary(str(tmp_path)).entries("a")] == ["LJ Speech", "ann"]


@pytest.mark.parametrize("streamed", [True, False])
def test_speech_that_no_file_can_hold_is_refused_with_what_happened(tmp_path, monkeypatch, streamed):
    """Opus has no 32 kHz, which this codec has."""
    monkeypatch.setattr(speaking_model, "ENCODEC_24KHZ", dataclasses.replace(ENCODEC_24KHZ, sample_rate=32_000))
    write_speaker(tmp_path)
    config = configured(tmp_path)
    engine = SpeechEngine(config)
    body = {"model": "lina", "input": "Rain.", "response_format": "opus", "stream": streamed}
    try:
        with in_process.serving(Service(config, in_process.Handle(engine), None)) as url:
            answer = requests.post(f"{url}/v1/audio/speech", json=body, timeout=60)
            while requests.get(f"{url}/healthz", timeout=60).json()["requests"]:
                pass
    finally:
        engine.speaker.stop()
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "no_speech" and error["type"] == "server_error" and "32000" in error["message"]


def test_a_model_that_cannot_be_had_is_named(folder):
    with pytest.raises(ModelError, match="nowhere is no model"):
        SpeechEngine(ServiceConfig(model="nowhere"))


def test_the_described_service_can_be_deployed(project):
    """Ray Serve reads infra/configs/serve.yaml, and each application its own part."""
    from ray.serve.schema import ServeDeploySchema

    described = yaml.safe_load((project / "infra" / "configs" / "serve.yaml").read_text())
    applications = {app.name: app for app in ServeDeploySchema.model_validate(described).applications}
    assert applications["speech"].import_path == "pipeline.service.app:app"
    assert applications["speech"].route_prefix == "/"
    config = load(ServiceConfig, overrides=applications["speech"].args)
    assert math.isfinite(config.timeout_s) and config.most_requests == config.rows + config.waiting
    load(StageConfig, overrides=applications["enrollment"].args)
    assert described["http_options"]["host"] == "127.0.0.1" or config.tokens
