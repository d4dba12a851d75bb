"""Voices that come and go: how many at a time, what a deletion means, what cannot fit, which are listed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from model.checkpoint import load
from model.initial_state import Recipe, drawn
from model.tuned import Tuned
from model.voice_file import unpack
from pipeline.enrolled import voice_bytes
from pipeline.service import enrolling, enrollment_link
from pipeline.service.config import ServiceConfig
from pipeline.service.enrolling import Enrollments, Full
from pipeline.service.ingress import application
from pipeline.service.recordings import Recording, SampleReader
from pipeline.service.service import Service
from pipeline.service.voice_library import VoiceLibrary
from tests.pipeline.service.in_process import Handle, serving, stage
from tests.pipeline.service.test_service import error_of, form, recording, until
from tests.pipeline.speaking_model import write_speaker, write_voice
from tests.pipeline.speech_samples import CONSENT

SAMPLES = [recording(3)]
TEXT = "the small boat sailed past a quiet island"


class Holding:
    """Work that begins, and ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.free = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.begun.set()
        assert self.free.wait(60)


class HeldReader(SampleReader):
    def __init__(self, config: ServiceConfig, holding: Holding) -> None:
        super().__init__(config)
        self.holding = holding

    def _read(self, recordings):
        self.holding.wait()
        return super()._read(recordings)


class HeldLibrary(VoiceLibrary):
    """A slow disk."""

    def __init__(self, folder: str, holding: Holding) -> None:
        super().__init__(folder)
        self.holding = holding

    def write(self, entry, content) -> None:
        self.holding.wait()
        super().write(entry, content)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    write_voice(folder / "ann.safetensors", write_speaker(folder)[0])
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def config(made: Path, tmp_path: Path) -> ServiceConfig:
    where = {"model": str(made / "model"), "codec": str(made / "codec"), "voices": str(tmp_path / "voices")}
    return ServiceConfig(**where, most_enrolling=4, requests_per_minute=100_000)


@pytest.fixture
def held_reader(config: ServiceConfig) -> HeldReader:
    return HeldReader(config, Holding())


@pytest.fixture
def service(config: ServiceConfig, held_reader: HeldReader, monkeypatch):
    """Its address; recordings are read once `held_reader` is let go."""
    with stage(config.model) as handle:
        monkeypatch.setattr(enrollment_link, "_found", lambda: handle)
        with serving(Service(config, None, Handle(held_reader))) as url:
            yield url
        held_reader.holding.free.set()


def test_however_many_come_at_once_no_more_are_begun_than_may_be(service, held_reader):
    post, everybody = f"{service}/v1/voices", threading.Barrier(20)

    def enroll(number: int) -> requests.Response:
        everybody.wait(60)
        return requests.post(post, **form(f"v{number}", SAMPLES), timeout=60)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(enroll, range(20)))
    begun = [answer for answer in answers if answer.status_code == 202]
    assert len(begun) == 4
    for answer in set(answers) - set(begun):
        assert "4 of your voices" in error_of(answer, 429, "too_many_enrollments")
    gone = begun.pop().json()["id"]
    assert requests.delete(f"{post}/{gone}", timeout=60).ok
    error_of(requests.post(post, **form("bad", [b"no audio"]), timeout=60), 400, "invalid_audio", "samples.0")
    assert requests.post(post, **form(gone, SAMPLES), timeout=60).status_code == 202, "a refused one keeps its place"
    held_reader.holding.free.set()
    ids = sorted([gone, *(answer.json()["id"] for answer in begun)])

    def listed() -> list[tuple[str, str]]:
        return [(voice["id"], voice["status"]) for voice in requests.get(post, timeout=60).json()["data"]]

    until(lambda: listed() == [("default", "ready"), *((id, "ready") for id in ids)])


def test_a_record_of_consent_that_cannot_fit_is_refused_at_the_door(service, made):
    def asked(consent: dict[str, str]) -> requests.Response:
        return requests.post(f"{service}/v1/voices", **form("v", SAMPLES, consent=json.dumps(consent)), timeout=60)

    card = load(str(made / "model"))[1]
    long = tuple((step * 10**6, 4.123456789012345 + step / 7) for step in range(5001))
    losses = {"base_loss": 4.123456789012345, "continuation_loss": 3.123456789012345, "tuned_loss": 2.123456789012345}
    recipe = Recipe(steps=10**9)
    tuned = Tuned(
        speaker="v" * 64,
        factors=drawn(card.sizes, recipe, 7),
        reason="converged",
        **{"steps": 10**9, "best_step": 10**9, "samples": 10**6, "held_out": 10**6, "seconds": 1e6, "seed": -(10**18)},
        **losses,
        curve=long,
        train_losses=(),
    )
    for sign in 'xé🎉"\\\x01':
        consent = CONSENT | {"scope": sign}
        while asked_size(more := consent | {"scope": consent["scope"] + sign}) <= 3000:
            consent = more
        assert unpack(voice_bytes(tuned, recipe, card.fingerprint, consent, "f" * 64, 1e6)).consent == consent
        answer = asked(consent)
        assert answer.status_code == 202, answer.text
        requests.delete(f"{service}/v1/voices/v", timeout=60)
        told = error_of(asked(more), 400, "string_above_max_length", "consent")
        assert "at most 3,000 fit" in told
    error_of(asked(CONSENT | {"who": "\ud800"}), 400, "invalid_value", "consent")


def asked_size(consent: dict[str, str]) -> int:
    """Bytes of a record as it stands in a voice's file: JSON in JSON."""
    return len(json.dumps(json.dumps(consent, ensure_ascii=False), ensure_ascii=False).encode())


@pytest.mark.parametrize(
    ("seed", "taken"), [("-5", True), ("9" * 18, True), ("--5", False), ("٣", False), ("-", False)]
)
def test_seeds_are_whole_numbers(service, seed, taken):
    answer = requests.post(f"{service}/v1/voices", **form("v", SAMPLES, seed=seed), timeout=60)
    if taken:
        assert answer.status_code == 202
    else:
        error_of(answer, 400, "invalid_value", "seed")


def test_voices_are_listed_page_by_page_many_headers_at_a_time(made, config):
    folder = Path(config.voices, "local")
    folder.mkdir(parents=True)
    for number in range(32):
        shutil.copy(made / "ann.safetensors", folder / f"v{number:02d}.safetensors")
    for name in ("%FF", "%41nn", "%zz", ".hidden", "a.b", "%2e"):
        (folder / f"{name}.safetensors").write_bytes(b"of something else")
    reading, most, together, lock = 0, 0, threading.Barrier(16), threading.Lock()

    class Counted(VoiceLibrary):
        def record(self, entry):
            nonlocal reading, most
            with lock:
                reading += 1
                most = max(most, reading)
            together.wait(30)
            with lock:
                reading -= 1
            return super().record(entry)

    service = Service(config, None, None)
    service.library = Counted(config.voices)
    with serving(service) as url:
        page = requests.get(f"{url}/v1/voices?limit=16", timeout=60).json()
        assert [voice["id"] for voice in page["data"]] == ["default", *(f"v{n:02d}" for n in range(16))]
        assert page["has_more"] and page["last_id"] == "v15"
        page = requests.get(f"{url}/v1/voices?after=v15", timeout=60).json()
        assert [voice["id"] for voice in page["data"]] == [f"v{n:02d}" for n in range(16, 32)]
        assert not page["has_more"] and page["last_id"] == "v31" and most == 16


class Held(Enrollments):
    """Enrollments without a server; `noting` holds the record of each that is being tuned."""

    noting: Holding | None = None

    def _note(self, tenant, enrollment) -> None:
        if self.noting and enrollment.status == "tuning":
            self.noting.wait()
        super()._note(tenant, enrollment)


async def begun(enrollments: Enrollments, recordings: list[Recording]):
    entry = enrollments.library.entry("local", "ann")
    async with enrollments.place("local") as place:
        return await enrollments.begin(place, entry, "local", recordings, CONSENT, 1)


def files_of(config: ServiceConfig) -> list[str]:
    return sorted(path.name for path in Path(config.voices).rglob("*") if path.is_file())


@pytest.fixture
def staged(config, monkeypatch):
    """Runs what is done with a stage, which ends with it."""

    def run(scenario: Callable[[Handle], Any], **changes: Any) -> None:
        async def whole() -> None:
            with stage(config.model, **changes) as handle:
                monkeypatch.setattr(enrollment_link, "_found", lambda: handle)
                await scenario(handle)

        asyncio.run(whole())

    return run


ENDLESS = {"steps": 10**6, "patience": 10**6}


@pytest.mark.parametrize("what", ["voice", "record"])
def test_what_is_being_written_when_it_is_deleted_does_not_come_back(config, staged, what):
    holding = Holding()

    async def scenario(handle: Handle) -> None:
        library = HeldLibrary(config.voices, holding) if what == "voice" else VoiceLibrary(config.voices)
        enrollments = Held(config, library, Handle(SampleReader(config)))
        enrollments.noting = holding if what == "record" else None
        enrollment = await begun(enrollments, [Recording(SAMPLES[0], TEXT)])
        await soon(holding.begun.is_set)
        deleting = asyncio.create_task(enrollments.cancel("local", enrollment))
        await asyncio.sleep(0.2)
        assert not deleting.done(), "it is deleted while it is being written"
        holding.free.set()
        await deleting
        left = files_of(config)
        assert left == (["ann.safetensors"] if what == "voice" else [])
        if left:  # whole: it can be removed for good
            unpack(Path(config.voices, "local", "ann.safetensors").read_bytes())
            library.delete(library.entry("local", "ann"))
        await asyncio.sleep(0.2)
        assert files_of(config) == []

    staged(scenario)


def test_a_deleted_voice_frees_its_slot_whatever_was_known_of_it(config, staged):
    async def scenario(handle: Handle) -> None:
        enrollments = Held(config, VoiceLibrary(config.voices), Handle(SampleReader(config)))
        recordings = [Recording(SAMPLES[0], TEXT)]
        enrollment = await begun(enrollments, recordings)
        assert enrollment.status == "reading"
        await soon(tuned(handle, 1))
        assert recordings == [], "recordings take memory while the voice is tuned"
        await enrollments.cancel("local", enrollment)
        await soon(tuned(handle, 0))
        assert files_of(config) == []

    staged(scenario, **ENDLESS)


def test_what_another_process_deletes_is_gone_here_too(config, staged):
    async def scenario(handle: Handle) -> None:
        here, there = (Held(config, VoiceLibrary(config.voices), Handle(SampleReader(config))) for _ in range(2))
        enrollment = await begun(here, [Recording(SAMPLES[0], TEXT)])
        await soon(tuned(handle, 1))
        await there.cancel("local", enrollment)
        await soon(lambda: not here._tasks)
        assert files_of(config) == []

    staged(scenario, **ENDLESS)


def test_an_enrollment_that_nobody_follows_any_more_is_lost_within_a_minute(config, staged, monkeypatch):
    monkeypatch.setattr(enrolling, "_BEAT", 0.1)
    monkeypatch.setattr(enrolling, "_LOST", 2.0)
    config = dataclasses.replace(config, most_enrolling=1)

    async def scenario(handle: Handle) -> None:
        here, later = (Held(config, VoiceLibrary(config.voices), Handle(SampleReader(config))) for _ in range(2))
        enrollment = await begun(here, [Recording(SAMPLES[0], TEXT)])
        await soon(tuned(handle, 1))
        await asyncio.sleep(3)
        assert later.find("local", "ann").status == "tuning", "somebody follows it"
        with pytest.raises(Full):
            await begun(later, [Recording(SAMPLES[0], TEXT)])
        here._tasks[enrollment.request].cancel()  # as a process that ends
        await soon(lambda: later.find("local", "ann").status == "failed", seconds=10)
        assert later.find("local", "ann").error["code"] == "lost"
        again = await begun(later, [Recording(SAMPLES[0], TEXT)])
        await soon(tuned(handle, 1))
        await later.cancel("local", again)

    staged(scenario, **ENDLESS)


def test_a_stage_of_another_model_makes_no_voices(config, held_reader, tmp_path, monkeypatch):
    def asked(id: str) -> requests.Response:
        return requests.post(f"{url}/v1/voices", **form(id, SAMPLES), timeout=60)

    other, _ = write_speaker(tmp_path / "other", seed=1)
    with stage(config.model) as ours, stage(other) as theirs:
        deployed = Handle(theirs._replica)
        monkeypatch.setattr(enrollment_link, "_found", lambda: deployed)
        with serving(Service(config, None, Handle(held_reader))) as url:
            told = error_of(asked("ann"), 503, "model_mismatch")
            for model in (config.model, other):
                card = load(model)[1]
                assert card.fingerprint[:12] in told and card.codec.digest[:12] in told
            assert "same `model`" in told
            deployed._replica = ours._replica
            assert asked("ann").status_code == 202, "it is asked again after it was deployed anew"
            deployed._replica = theirs._replica
            held_reader.holding.free.set()
            ann = f"{url}/v1/voices/ann"
            voice = until(lambda: (v := requests.get(ann, timeout=60).json())["status"] == "failed" and v)
            assert voice["error"]["code"] == "model_mismatch" and files_of(config) == ["ann.json"]
            error_of(asked("ben"), 503, "model_mismatch")


def test_a_stage_of_another_model_is_in_the_log_from_the_start(config, tmp_path, monkeypatch, serve_log):
    monkeypatch.setattr(enrollment_link, "_PAUSE", 0.1)
    deployed: list[Handle] = []

    def found() -> Handle:
        if not deployed:
            raise enrollment_link.NoStage("it does not run")
        return deployed[0]

    async def started() -> None:
        app = application(Service(config, None, None))
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0.3)
            assert "voices cannot be made" not in serve_log.text, "it may come up later"
            deployed.append(handle)
            await soon(lambda: "voices cannot be made here: the enrollment stage has model" in serve_log.text)

    monkeypatch.setattr(enrollment_link, "_found", found)
    with stage(write_speaker(tmp_path / "other", seed=1)[0]) as handle:
        asyncio.run(started())


def test_a_stage_that_does_not_answer_is_told(config, monkeypatch):
    class Silent:
        async def about(self) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr(enrollment_link, "_PATIENCE", 0.1)
    monkeypatch.setattr(enrollment_link, "_found", lambda: Handle(Silent()))
    with serving(Service(config, None, None)) as url:
        told = error_of(requests.post(f"{url}/v1/voices", **form("ann", SAMPLES), timeout=60), 503, "no_enrollment")
    assert "does not answer (TimeoutError)" in told


def tuned(stage: Handle, count: int) -> Callable[[], Any]:
    """Whether a stage tunes that many voices, at last."""

    async def true() -> bool:
        return (await stage.about.remote())["tuning"] == count

    return true


async def soon(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (await found if asyncio.iscoroutine(found := true()) else found):
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.02)
