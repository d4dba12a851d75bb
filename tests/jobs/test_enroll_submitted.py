"""Enrolling with `ray job submit`: the driver is killed in the middle, and the same command ends what it began."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra import cluster
from model.checkpoint import load
from model.initial_state import Recipe
from pipeline import codec_weights
from pipeline.enroll_config import EnrollConfig
from pipeline.enrolled import voice_bytes
from pipeline.enrollment import prepare
from pipeline.speaker_samples import SampleEncoder, settings_of, to_samples
from pipeline.tuning_batch import Request, TuningBatch
from tests.pipeline.speaking_model import write_speaker
from tests.pipeline.speech_samples import write_speakers

WORDS = ["--speakers", "speakers.jsonl", "--model", "model-of-tests", "--codec", "codec-of-tests", "--device", "cpu"]
WORDS += ["--steps", "5", "--eval-every", "5", "--batch", "2", "--slots", "2", "--tracking", "none"]
WORDS += ["--output", "voices"]
SPEAKERS = 50


@pytest.fixture(scope="module")
def typed(checkout, submit):
    write_speaker(checkout / "made")
    (checkout / "made/model").rename(checkout / "model-of-tests")
    (checkout / "made/codec").rename(checkout / "codec-of-tests")
    write_speakers(checkout, SPEAKERS, samples=2)
    return lambda *options: submit(*options, "--", "python", "jobs/enroll.py", *WORDS)


def alone(checkout, monkeypatch) -> dict[str, bytes]:
    """What the voices are, each made by itself without Ray."""
    import torch

    monkeypatch.chdir(checkout)
    recipe = {"steps": 5, "eval_every": 5, "batch": 2}
    config = EnrollConfig(
        speakers="speakers.jsonl", model="model-of-tests", codec="codec-of-tests", output="elsewhere", **recipe
    )
    batch = prepare(config)
    model, card = load("model-of-tests")
    codec = codec_weights.resolve("codec-of-tests")
    threads = torch.get_num_threads()
    encoder = SampleEncoder(settings_of(config, card.sizes.codebooks, "cpu"), codec, codec.identity.to_dict())
    ids = {phone: number for number, phone in enumerate(card.inventory)}
    found = {}
    for speaker in batch.speakers():
        samples = to_samples([sample.to_request() for sample in encoder.encode(speaker.samples)[0]], ids)
        options = {"slots": 1, "apart": True, "threads": 1, "space": ids["<space>"]}
        tuning, done = TuningBatch(model, Recipe(**recipe), **options), []
        tuning.submit("it", Request(speaker.name, samples), done.append)
        while not (done and hasattr(done[-1], "factors")):
            time.sleep(0.01)
        tuning.close()
        seconds = sum(sample.codes.shape[1] for sample in samples) / card.codec.frame_rate
        source = batch.folder.source(speaker)
        found[speaker.key] = voice_bytes(done[-1], Recipe(**recipe), card.fingerprint, speaker.consent, source, seconds)
    torch.set_num_threads(threads)
    return found


def test_a_killed_driver_loses_nothing(checkout, typed, submit, monkeypatch):
    folder = checkout / "voices/shared"
    assert typed("--no-wait").returncode == 0
    deadline = time.monotonic() + 200
    while len(list(folder.glob("*.safetensors"))) < 3:
        assert time.monotonic() < deadline, "no voices came"
        time.sleep(0.05)
    members = cluster.find(checkout).processes()
    drivers = [process for process in members if any(w.endswith("jobs/enroll.py") for w in process.cmdline())]
    for process in drivers:
        process.kill()
    before = {file.stem: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert drivers and len(before) < SPEAKERS
    done = typed()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    made = {file.stem: file for file in folder.glob("*.safetensors")}
    assert {key: file.stat().st_mtime_ns for key, file in made.items() if key in before} == before
    assert f"{SPEAKERS - len(before)} enrolled, {len(before)} were there" in done.stdout
    assert {key: file.read_bytes() for key, file in made.items()} == alone(checkout, monkeypatch)
    serve = [str(Path(sys.executable).parent / "serve"), "status", "-a", cluster.find(checkout).dashboard]
    status = subprocess.run(serve, capture_output=True, text=True, timeout=60)
    assert status.returncode == 0 and "enrollment" not in status.stdout
