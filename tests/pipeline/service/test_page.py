"""The page in a browser, before a service in this process: what it lists, what it says went wrong, what it draws."""

from __future__ import annotations

import base64
import re
import shutil
import threading

import numpy as np
import pytest
import requests
import torch

from pipeline.service import enrollment_link
from pipeline.service.config import ServiceConfig
from pipeline.service.engine import SpeechEngine
from pipeline.service.recordings import SampleReader
from pipeline.service.service import Service
from tests.pipeline.service.in_process import Handle, serving, stage
from tests.pipeline.service.test_service import recording
from tests.pipeline.speaking_model import write_speaker, write_voice


class HeldReader(SampleReader):
    """Reads recordings once it is let go."""

    free = threading.Event()

    def _read(self, recordings):
        assert self.free.wait(60)
        return super()._read(recordings)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """(address, folder of voices, reader, enrollment stage)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("page")
    model, codec = write_speaker(folder)
    voices = folder / "voices" / "local"
    write_voice(folder / "ann.safetensors", model)
    voices.mkdir(parents=True)
    for number in range(7):
        shutil.copy(folder / "ann.safetensors", voices / f"v{number}.safetensors")
    config = ServiceConfig(model=model, codec=codec, voices=str(folder / "voices"), device="cpu", longest_text=150)
    engine, reader = SpeechEngine(config), HeldReader(config)
    with stage(model) as handle, pytest.MonkeyPatch.context() as patch:
        patch.setattr(enrollment_link, "_found", lambda: handle)
        with serving(Service(config, Handle(engine), Handle(reader))) as url:
            yield url, voices, reader, handle
    engine.speaker.stop()
    torch.set_num_threads(threads)


@pytest.fixture
def page(running, chromium):
    from playwright.sync_api import expect

    running[2].free.clear()
    page = chromium.new_page()
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept())
    # Pages of three, so that few voices have several.
    page.route(re.compile(r".*limit=1000.*"), lambda r: r.continue_(url=r.request.url.replace("=1000", "=3")))
    page.goto(running[0])
    expect(page.locator("#voices li")).to_have_count(8)
    yield page
    assert errors == []


def test_all_voices_are_listed_and_a_deletion_that_fails_is_told(running, page):
    from playwright.sync_api import expect

    assert page.locator("#voices strong").all_text_contents() == ["default", *(f"v{n}" for n in range(7))]
    assert page.evaluate("() => document.getElementById('text').maxLength") == 150
    expect(page.locator("#count")).to_contain_text("of 150 characters")
    (running[1] / "v3.safetensors").rename(running[1] / "v3.elsewhere")
    page.click("[aria-label='Delete voice v3']")
    expect(page.locator("#changed")).to_contain_text("v3”: No voice 'v3'")
    expect(page.locator("[aria-label='Delete voice v3']")).to_be_enabled()
    (running[1] / "v3.elsewhere").rename(running[1] / "v3.safetensors")
    page.click("[aria-label='Delete voice v3']")
    expect(page.locator("#changed")).to_contain_text("is deleted")
    expect(page.locator("#voices li")).to_have_count(7)
    shutil.copy(running[1] / "v0.safetensors", running[1] / "v3.safetensors")


def test_while_a_voice_is_made_another_can_be_prepared_but_not_begun(running, page, tmp_path):
    from playwright.sync_api import expect

    for number in range(2):
        (tmp_path / f"{number}.flac").write_bytes(recording(4, number))
        (tmp_path / f"{number}.txt").write_text("the small boat sailed past a quiet island\n")
    page.set_input_files("#samples", [tmp_path / "0.flac", tmp_path / "0.txt"])
    for name, value in (("name", "erin"), ("who", "Erin Example"), ("scope", "tests")):
        page.fill(f"#{name}", value)
    page.check("#consent")
    page.click("#make")
    expect(page.locator("#enrolled")).to_contain_text("Listening")
    expect(page.locator("#make")).to_be_disabled()
    page.set_input_files("#samples", [tmp_path / "1.flac", tmp_path / "1.txt"])
    page.fill("#name", "finn")
    running[2].free.set()
    expect(page.locator("#enrolled")).to_contain_text("is there")
    expect(page.locator("#make")).to_be_enabled()
    assert page.locator("#list .file").all_text_contents() == ["1.flac"]
    assert page.input_value("#list input") == "the small boat sailed past a quiet island"
    assert (page.input_value("#name"), page.input_value("#who"), page.is_checked("#consent")) == ("finn", "", False)
    page.click("[aria-label='Delete voice erin']")
    expect(page.locator("#voices")).not_to_contain_text("erin")


DROPPED = """(files) => {
  const data = new DataTransfer();
  for (const [name, content] of files) {
    data.items.add(new File([Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0))], name));
  }
  const happens = (kind) => new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
  return ["dragover", "drop"].map((kind) => document.getElementById("drop").dispatchEvent(happens(kind)));
}"""


def test_recordings_that_are_dropped_become_a_voice_whose_steps_are_shown(running, page, monkeypatch):
    from playwright.sync_api import expect

    url, _, reader, deployed = running
    reader.free.set()
    files = {"0.flac": recording(4), "0.txt": b"the small boat sailed past a quiet island\n"}
    dropped = page.evaluate(DROPPED, [[name, base64.b64encode(content).decode()] for name, content in files.items()])
    assert dropped == [False, False], "the browser opens the file itself"
    expect(page.locator("#list .file")).to_have_text(["0.flac"])
    expect(page.locator("#list input")).to_have_value("the small boat sailed past a quiet island")
    for name, value in (("name", "gina"), ("who", "Gina Example"), ("scope", "tests")):
        page.fill(f"#{name}", value)
    page.check("#consent")
    most = 10**6
    with stage(deployed._replica.config.model, steps=most, patience=most) as endless:
        monkeypatch.setattr(deployed, "_replica", endless._replica)
        page.click("#make")
        expect(page.locator("#enrolled")).to_have_text(re.compile(rf"Step [1-9]\d* of at most {most}"))
        assert 0 < page.evaluate("() => document.getElementById('progress').value") < 1
        told = requests.get(f"{url}/v1/voices/gina", timeout=60).json()
        assert told["status"] == "tuning" and told["progress"]["state"] == "tuning"
        assert 0 < told["progress"]["steps"] < told["progress"]["of"] == most
        page.click("[aria-label='Delete voice gina']")
        expect(page.locator("#enrolled")).to_contain_text("No voice 'gina'")
        expect(page.locator("#make")).to_be_enabled()
        expect(page.locator("#progress")).to_be_hidden()


DRAWN = """async ([samples, part]) => {
  const counted = { log10: 0, sin: 0, cos: 0 };
  const { Spectrogram } = await import("/static/spectrogram.js");
  for (const name of Object.keys(counted)) {
    const plain = Math[name];
    Math[name] = (x) => (counted[name]++, plain(x));
  }
  const canvas = Object.assign(document.createElement("canvas"), { width: 200, height: 110 });
  const one = new Spectrogram(canvas, 24000);
  for (let place = 0; place < samples.length; place += part) {
    one.add(Float32Array.from(samples.slice(place, place + part)));
    one.draw();
  }
  one.end();
  one.draw();
  const pixel = (x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
  const line = Array.from({ length: 110 }, (_, y) => pixel(100, y)[0]);
  return { counted, hop: one.hop, columns: one.columns.map((column) => [...column]), line };
}"""


def test_a_spectrogram_that_grows_is_the_whole_ones_and_costs_no_more(page):
    random = np.random.default_rng(0)
    time = np.arange(40_000) / 24_000
    wave = (0.5 * np.sin(2 * np.pi * 2000 * time) + 1e-3 * random.standard_normal(len(time))).astype(np.float32)
    whole, grown = (page.evaluate(DRAWN, [wave.tolist(), part]) for part in (len(wave), 777))
    assert grown["columns"] == whole["columns"] and grown["hop"] == whole["hop"] == 128
    padded, window = np.concatenate([wave, np.zeros(512)]), np.hanning(1025)[:-1]
    columns = np.array([padded[n : n + 1024] * window for n in range(0, len(padded) - 1023, 128)])
    power = np.abs(np.fft.rfft(columns)[:, :341]) ** 2
    np.testing.assert_allclose(whole["columns"], 10 * np.log10(power + 1e-9), atol=0.02)
    assert whole["counted"]["log10"] == 341 * len(columns)
    assert grown["counted"]["log10"] < 2 * whole["counted"]["log10"], "columns are computed again and again"
    assert grown["counted"]["sin"] == grown["counted"]["cos"] == 0
    brightest = 110 - 1 - int(np.argmax(whole["line"][::-1]))
    assert abs((109 - brightest) / 110 * 8000 - 2000) < 8000 / 110 * 2
