"""Folders as input: LibriLight's layout, and public corpora in miniature, with real audio, through lhotse's recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from infra import storage
from pipeline.manifests import ManifestError, open_manifest
from pipeline.utterances import Reject, Utterance


def record(path: Path, seconds: float = 1.0, rate: int = 16000) -> Path:
    """Writes soft noise in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.05, round(seconds * rate)).astype("float32")
    sf.write(path, noise, rate)
    return path


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def spoken(items: list[Utterance | Reject]) -> list[Utterance]:
    return [item for item in items if isinstance(item, Utterance)]


def rejected(items: list[Utterance | Reject]) -> list[tuple[str, str]]:
    return sorted((item.reason, item.where) for item in items if isinstance(item, Reject))


@pytest.fixture
def librilight(tmp_path: Path) -> Path:
    root = tmp_path / "unlab"
    book = {"id": "83", "title": "Emma", "genre": ["*Fiction"], "totaltime": "16:00:00"}
    spans = [[0.5, 6.0], [6.2, 11.0], [11.3, 14.0], [20.0, 26.0]]
    told = {"speaker": "1034", "book_meta": book, "snr": 7.5, "voice_activity": spans}
    for name, content in (
        ("emma_01", told),
        ("emma_02", {"speaker": "1034"}),
        ("emma_03", {**told, "voice_activity": []}),
    ):
        record(root / "1034" / "emma_lv" / f"{name}.flac")
        write(root / "1034" / "emma_lv" / f"{name}.json", json.dumps(content))
    record(root / "77" / "x.y" / "a.b.flac")
    return root


def test_librilight(librilight: Path) -> None:
    manifest = open_manifest(str(librilight), segment_seconds=8.0, max_seconds=20.0, max_silence=0.8)
    assert manifest.kind == "librilight"
    items = list(manifest)
    segments = [item for item in spoken(items) if item.duration is not None]
    assert all(item.audio == str(librilight / "1034" / "emma_lv" / "emma_01.flac") for item in segments)
    assert {(item.speaker, item.text) for item in segments} == {("1034", None)}
    assert segments[0].extra == {"book": "Emma", "book_id": "83", "genre": ["*Fiction"], "snr": 7.5}
    assert [item.id for item in segments] == [
        f"1034/emma_lv/emma_01-{round(item.start * 1000):08d}" for item in segments
    ]
    # All that is speech is in a segment; no segment spans the long silence or ends inside a span.
    covered = [(item.start, item.start + item.duration) for item in segments]
    for start, end in ((0.5, 6.0), (6.2, 11.0), (11.3, 14.0), (20.0, 26.0)):
        assert any(a <= start + 0.01 and end - 0.01 <= b for a, b in covered)
    assert not any(a < 16.0 < b or a < 18.0 < b for a, b in covered)
    whole = {item.id: item for item in spoken(items) if item.duration is None}
    assert whole.keys() == {"1034/emma_lv/emma_02", "77/x.y/a.b"}
    assert whole["1034/emma_lv/emma_02"].extra == {"needs_segmentation": True}
    assert whole["77/x.y/a.b"].speaker == "77"
    assert rejected(items) == [("no-speech", "1034/emma_lv/emma_03.flac")]
    assert items == list(open_manifest(str(librilight), corpus="librilight", segment_seconds=8.0, max_seconds=20.0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"voice_activity": [[0, 1]', "not-json"),
        ("[]", "not-json"),
        ('{"voice_activity": 5}', "bad-field"),
        ('{"voice_activity": [[1.0]]}', "bad-field"),
        ('{"voice_activity": [["a", "b"]]}', "bad-field"),
        ('{"voice_activity": [[3.0, 2.0]]}', "bad-field"),
        ('{"voice_activity": [[-1.0, 2.0]]}', "bad-field"),
        ('{"voice_activity": [[0.0, NaN]]}', "bad-field"),
        ('{"voice_activity": [[0.0, 1e306]]}', "bad-field"),
        ('{"speaker": [1], "voice_activity": [[0.0, 1.0]]}', "bad-field"),
    ],
)
def test_a_bad_file_beside_a_recording_costs_only_that_recording(librilight: Path, content: str, reason: str) -> None:
    before = list(open_manifest(str(librilight)))
    record(librilight / "9" / "book" / "bad.flac")
    write(librilight / "9" / "book" / "bad.json", content)
    write(librilight / "9" / "book" / "alone.json", "{}")
    items = list(open_manifest(str(librilight)))
    added = [item for item in items if item not in before]
    assert [item for item in items if item in before] == before
    assert rejected(added) == sorted([(reason, "9/book/bad.flac"), ("missing-audio", "9/book/alone.json")])


def test_storage_that_fails_for_a_moment_loses_no_recording(librilight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(open_manifest(str(librilight)))
    read, failed = storage.read_bytes, set()

    def fails_at_first(url: str) -> bytes:
        if url not in failed:
            failed.add(url)
            raise OSError("the storage has a bad moment")
        return read(url)

    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(storage, "read_bytes", fails_at_first)
    assert list(open_manifest(str(librilight))) == expected and failed
    monkeypatch.setattr(storage, "read_bytes", lambda url: (_ for _ in ()).throw(OSError("down")))
    with pytest.raises(OSError, match="down"):
        list(open_manifest(str(librilight)))


def test_overlapping_spans_of_speech_are_one(librilight: Path) -> None:
    record(librilight / "9" / "book" / "a.flac", 10.0)
    write(librilight / "9" / "book" / "a.json", json.dumps({"voice_activity": [[4, 6], [1, 5], [1, 2]]}))
    found = [i for i in spoken(list(open_manifest(str(librilight)))) if i.id.startswith("9/book/a")]
    assert [(item.start, item.duration) for item in found] == [(1.0, 5.0)]


def test_a_folders_fingerprint_is_of_names_and_sizes(librilight: Path) -> None:
    manifest = open_manifest(str(librilight))
    before = manifest.fingerprint()
    assert before["count"] == 7 and before == manifest.fingerprint(before)
    record(librilight / "1034" / "emma_lv" / "emma_04.flac")
    assert manifest.fingerprint()["sha256"] != before["sha256"]


def corpus(name: str, root: Path) -> list[Utterance | Reject]:
    manifest = open_manifest(str(root), corpus=name)
    items = list(manifest)
    assert items == list(manifest), "a second reading gives the same in the same order"
    for item in spoken(items):
        assert Path(item.audio).is_file() and item.duration and item.language == "en"
    return items


def fields(items: list[Utterance | Reject]) -> list[tuple[str, Any, str]]:
    return [(item.id, item.text, item.speaker) for item in spoken(items)]


def test_librispeech(tmp_path: Path) -> None:
    chapter = tmp_path / "dev-clean" / "84" / "121123"
    for number in (2, 0, 1, 7):
        record(chapter / f"84-121123-000{number}.flac")
    (chapter / "84-121123-0002.flac").write_bytes(b"")
    lines = ["0000 GO", "0001 HELLO THERE", "0002 EMPTY FILE", "0003 NO FILE"]
    write(chapter / "84-121123.trans.txt", *(f"84-121123-{line}" for line in lines))
    items = corpus("librispeech", tmp_path)
    assert fields(items) == [("84-121123-0000", "GO", "84"), ("84-121123-0001", "HELLO THERE", "84")]
    assert rejected(items)[:2] == [
        ("not-in-corpus", "dev-clean/84/121123/84-121123-0007.flac"),
        ("recipe-warning", ""),
    ]
    assert ("unreadable-audio", "dev-clean/84/121123/84-121123-0002.flac") in rejected(items)
    assert any("84-121123-0003" in item.detail for item in items if isinstance(item, Reject))


def test_libritts(tmp_path: Path) -> None:
    chapter = tmp_path / "dev-clean" / "84" / "121123"
    ids = ["84_121123_000007_000001", "84_121123_000008_000000"]
    for id in ids:
        record(chapter / f"{id}.wav", rate=24000)
    texts = ["Maximilian.", "Villefort rose, half ashamed."]
    rows = zip(ids, texts, strict=True)
    write(chapter / "84_121123.trans.tsv", *(f"{id}\tOriginal: {text}\t{text}" for id, text in rows))
    write(
        chapter / "84_121123.book.tsv",
        *(f"{id}\ttext\ttext\t0\t1\t{snr}" for id, snr in zip(ids, (19.5, 20.5), strict=True)),
    )
    write(tmp_path / "SPEAKERS.txt", ";ID|SEX|SUBSET|MINUTES|NAME", "84 | F | dev-clean | 8.02 | Christie Nowak")
    items = corpus("libritts", tmp_path)
    assert fields(items) == [(id, text, "84") for id, text in zip(ids, texts, strict=True)]
    assert items[0].extra == {"gender": "F", "orig_text": "Original: Maximilian.", "snr": 19.5}


def test_ljspeech(tmp_path: Path) -> None:
    for number in (1, 2):
        record(tmp_path / "wavs" / f"LJ001-000{number}.wav", rate=22050)
    write(tmp_path / "metadata.csv", "LJ001-0002|in 1455|in fourteen fifty-five", "LJ001-0001|Printing,|Printing,")
    items = corpus("ljspeech", tmp_path)
    assert fields(items) == [("LJ001-0001", "Printing,", "LJ"), ("LJ001-0002", "in 1455", "LJ")]
    assert items[1].extra == {"gender": "female", "normalized_text": "in fourteen fifty-five"}


@pytest.mark.parametrize("release", ["0.80", "0.92"])
def test_vctk(tmp_path: Path, release: str) -> None:
    for id in ("p225_001", "p225_002", "p226_001"):
        speaker = id[:4]
        write(tmp_path / "txt" / speaker / f"{id}.txt", f"Please call {id}.")
        if release == "0.92":
            for microphone in ("mic1", "mic2"):
                record(tmp_path / "wav48_silence_trimmed" / speaker / f"{id}_{microphone}.flac", rate=48000)
        else:
            record(tmp_path / "wav48" / speaker / f"{id}.wav", rate=48000)
    number = "p225" if release == "0.92" else "225"
    other = "p226" if release == "0.92" else "226"
    header = "ID  AGE  GENDER  ACCENTS  REGION COMMENTS"
    write(
        tmp_path / "speaker-info.txt",
        header,
        f"{number}  23  F    English    Southern  England",
        f"{other}  22  M  English",
    )
    items = corpus("vctk", tmp_path)
    ending = "_mic2" if release == "0.92" else ""
    assert fields(items) == [
        (f"p225_001{ending}", "Please call p225_001.", "p225"),
        (f"p225_002{ending}", "Please call p225_002.", "p225"),
        (f"p226_001{ending}", "Please call p226_001.", "p226"),
    ]
    assert items[0].extra["accent"] == "English" and items[0].extra["gender"] == "F"
    assert rejected(items) == [], "the first microphone's file is no loss where the second's is used"
    if release == "0.92":
        (tmp_path / "wav48_silence_trimmed" / "p226" / "p226_002_mic1.flac").write_bytes(
            Path(items[2].audio).read_bytes()
        )
        lone = ("not-in-corpus", "wav48_silence_trimmed/p226/p226_002_mic1.flac")
        assert lone in rejected(corpus("vctk", tmp_path))


@pytest.mark.parametrize("ending", ["flac", "opus"])
def test_mls(tmp_path: Path, ending: str) -> None:
    language = tmp_path / ("mls_english_opus" if ending == "opus" else "mls_english")
    write(language / "metainfo.txt", "SPEAKER | GENDER | PARTITION", "84 | F | train", "85 | M | dev")
    for part, speaker in (("train", "84"), ("dev", "85"), ("test", "84")):
        ids = [f"{speaker}_1_00000{n}" for n in (1, 0)] if part == "train" else [f"{speaker}_{part}_000000"]
        for id in ids:
            path = language / part / "audio" / speaker / "1" / f"{id}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(0).normal(0, 0.05, 24000).astype("float32")
            if ending == "opus":
                sf.write(path, noise, 48000, format="OGG", subtype="OPUS")
            else:
                sf.write(path, noise, 16000)
        write(language / part / "transcripts.txt", *(f"{id}\ttext of {id}" for id in ids))
    items = corpus("mls", tmp_path)
    assert fields(items) == [
        ("85_dev_000000", "text of 85_dev_000000", "85"),
        ("84_test_000000", "text of 84_test_000000", "84"),
        ("84_1_000000", "text of 84_1_000000", "84"),
        ("84_1_000001", "text of 84_1_000001", "84"),
    ]


def test_a_folder_that_is_not_the_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"unknown corpus 'gigaspeech'; known: .*librilight.*vctk"):
        open_manifest(str(tmp_path), corpus="gigaspeech")
    with pytest.raises(ManifestError, match="there is no such folder"):
        open_manifest(str(tmp_path / "none"), corpus="vctk")
    with pytest.raises(ManifestError, match="local folders only"):
        open_manifest("s3://bucket/vctk", corpus="vctk")
    for name in ("librispeech", "libritts", "ljspeech", "vctk", "mls"):
        with pytest.raises(ManifestError, match=f"is it the unpacked {name}"):
            list(open_manifest(str(tmp_path), corpus=name))
    with pytest.raises(ManifestError, match="no recording"):
        open_manifest(str(tmp_path), corpus="librilight")
