"""The page that people listen on: whole, self-contained, and what the browser makes of it."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from infra import storage
from pipeline.listening import Listened, Recording, spectrogram, wav, write_page

RATE = 24000


def tone(frequency: float, seconds: float = 0.5) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def rows() -> list[Listened]:
    hostile = '<script>alert("1")</script>'
    return [
        Listened("a/b", "One & two.", [Recording("original", tone(440), RATE), Recording("decoded", tone(450), RATE)]),
        Listened(hostile, hostile, [Recording(hostile, tone(3000, 1.5), RATE, hostile)], hostile, {hostile: hostile}),
    ]


class Collected(HTMLParser):
    """Tags that were opened, what they refer to, and the text that is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href") and value]


def read(page: str) -> Collected:
    collected = Collected()
    collected.feed(page)
    return collected


def test_the_page_shows_every_recording_and_refers_to_nothing_else(tmp_path: Path) -> None:
    page = Path(write_page(rows(), str(tmp_path), "A page")).read_text()
    seen = read(page)
    assert seen.tags.count("audio") == seen.tags.count("img") == 3
    files = {reference for reference in seen.references if reference != "data:,"}
    assert files == {f"{stem}.{kind}" for stem in ("0000-0", "0000-1", "0001-0") for kind in ("wav", "png")}
    assert files | {"index.html"} == {file.name for file in tmp_path.iterdir()}
    assert not re.search(r"https?://|url\(|@import", page)


def test_names_and_texts_are_shown_as_they_are_and_never_run(tmp_path: Path) -> None:
    page = Path(write_page(rows(), str(tmp_path), "<i>title</i>", "<b>notes</b>")).read_text()
    assert read(page).tags.count("script") == 1
    assert "One &amp; two." in page
    assert "<b>notes" not in page and "<i>title" not in page


def test_a_table_in_the_notes_becomes_a_table(tmp_path: Path) -> None:
    notes = "Twenty clips.\n| system | WER |\n|---|---|\n| original | 9.8 [7, 12] |\n| codec | 12.0 |\nThe end."
    page = Path(write_page(rows(), str(tmp_path), notes=notes)).read_text()
    tags = read(page).tags
    assert (tags.count("table"), tags.count("tr"), tags.count("th"), tags.count("td")) == (1, 3, 2, 4)
    assert "<p>Twenty clips.</p>" in page and "<p>The end.</p>" in page


def test_sound_comes_back_as_it_was() -> None:
    samples = tone(440)
    back, rate = soundfile.read(io.BytesIO(wav(samples * 4, RATE)), dtype="float32")
    assert rate == RATE
    np.testing.assert_allclose(back, np.clip(samples * 4, -1, 1), atol=2e-4)


def test_the_spectrogram_has_low_tones_at_the_bottom() -> None:
    brightest = []
    for frequency in (200, 1000, 6000):
        picture = np.asarray(Image.open(io.BytesIO(spectrogram(tone(frequency), RATE))).convert("L"), dtype=float)
        assert picture.shape[0] == 80
        brightest.append(int(picture.mean(axis=1).argmax()))
    assert brightest[0] > brightest[1] > brightest[2], "rows count from the top"


def test_it_can_be_written_to_any_file_system() -> None:
    where = write_page(rows(), "memory://listening-test/page")
    assert "<audio" in storage.read_text(where)
    assert len(storage.names("memory://listening-test/page")) == 7


@pytest.mark.parametrize("samples", [np.zeros(0), np.array([0.1, np.nan]), np.zeros((2, 100))])
def test_what_cannot_be_heard_is_refused(tmp_path: Path, samples: np.ndarray) -> None:
    with pytest.raises(ValueError, match="'bad' of 'x'"):
        write_page([Listened("x", "", [Recording("bad", samples, RATE)])], str(tmp_path))
    assert not (tmp_path / "index.html").exists()


def test_nothing_to_listen_to_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to listen to"):
        write_page([], str(tmp_path))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_loads_sounds_and_pictures(tmp_path: Path) -> None:
    page = Path(write_page(rows(), str(tmp_path), "A page"))
    probe = """<script>addEventListener("load", async () => {
      const sounds = [...document.querySelectorAll("audio")];
      await Promise.all(sounds.map(s => s.readyState ? 0 : new Promise(r => s.addEventListener("loadedmetadata", r))));
      document.title = sounds.map(s => s.duration.toFixed(2)).join() + " " +
        [...document.images].map(i => i.naturalHeight).join();
    });</script>"""
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "<title>0.50,0.50,1.50 80,80,80</title>" in done.stdout, done.stdout[:300] + done.stderr[-500:]
