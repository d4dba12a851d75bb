"""lhotse's manifests, written by lhotse itself and read by us: cuts, Libriheavy's, recordings with supervisions."""

from __future__ import annotations

import copy
import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lhotse import AudioSource, CutSet, MonoCut, MultiCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet

from pipeline.manifests import Manifest, ManifestError, open_manifest
from pipeline.planning import Sizes, make_round
from pipeline.tokenize_config import TokenizeConfig
from pipeline.utterances import Reject, Utterance

SAMPLE = 500
"""Cuts in the sample of a Libriheavy manifest."""


def recording(id: str, seconds: float = 30.0, channels: int = 1, path: str | None = None) -> Recording:
    source = AudioSource("file", list(range(channels)), path or f"audio/{id}.flac")
    return Recording(id, [source], sampling_rate=16000, num_samples=int(seconds * 16000), duration=seconds)


def supervision(id: str, of: str, start: float, duration: float, **more: Any) -> SupervisionSegment:
    more = {"text": f"Text of {id}.", "speaker": "1034", "language": "English", **more}
    return SupervisionSegment(id, of, start, duration, **more)


def opened(cuts: list, path: Path, **options: Any) -> Manifest:
    CutSet.from_cuts(cuts).to_file(path)
    return open_manifest(str(path), **options)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_cuts(tmp_path: Path, ending: str) -> None:
    one = supervision("s1", "r1", 0.0, 5.0, custom={"mood": "glad"}, gender="f")
    first, second = (
        supervision("s2", "r1", 1.0, 2.0),
        supervision("s3", "r1", 4.5, 3.0, speaker="77", language="German"),
    )
    cuts = [
        MonoCut("c1", 10.0, 5.0, 0, supervisions=[one], recording=recording("r1"), custom={"shelf": 3}),
        MonoCut("c2", 12.25, 8.0, 0, supervisions=[first, second], recording=recording("r1")),
        MonoCut("c3", 1.0, 2.0, 0, supervisions=[], recording=recording("r2", path="/abs/r2.flac")),
    ]
    manifest = opened(cuts, tmp_path / f"cuts{ending}")
    assert manifest.kind == "lhotse"
    audio, where = str(tmp_path / "audio" / "r1.flac"), f"cuts{ending}"
    assert list(manifest) == [
        Utterance(
            "c1",
            audio,
            "Text of s1.",
            "1034",
            10.0,
            5.0,
            "en",
            0,
            {"shelf": 3, "gender": "f", "mood": "glad"},
            f"{where}:1",
        ),
        Utterance("s2", audio, "Text of s2.", "1034", 13.25, 2.0, "en", 0, {}, f"{where}:2"),
        Utterance("s3", audio, "Text of s3.", "77", 16.75, 3.0, "de", 0, {}, f"{where}:2"),
        Utterance("c3", "/abs/r2.flac", None, "", 1.0, 2.0, "en", 0, {}, f"{where}:3"),
    ]


def test_what_lhotse_trims_we_find_at_the_same_place(tmp_path: Path) -> None:
    whole = MonoCut("c", 0.0, 30.0, 0, recording=recording("r"))
    whole.supervisions = [supervision(f"s{n}", "r", 3.0 * n, 2.5) for n in range(9)]
    windows = list(CutSet.from_cuts([whole]).cut_into_windows(7.0, keep_excessive_supervisions=False))
    items = opened(windows, tmp_path / "cuts.jsonl")
    found = {item.text: (item.start, item.duration) for item in items if item.text}
    expected = {f"Text of s{n}.": (3.0 * n, 2.5) for n in range(9)}
    assert found.items() <= expected.items() and len(found) >= 5


def test_channels(tmp_path: Path) -> None:
    stereo = recording("r", channels=2)
    apart = Recording("q", [AudioSource("file", [n], f"{n}.wav") for n in (0, 1)], 16000, 160000, 10.0)
    cuts = [
        MonoCut("right", 0, 5.0, 1, recording=stereo, supervisions=[supervision("a", "r", 0, 5.0, channel=1)]),
        MonoCut("own file", 0, 5.0, 1, recording=apart),
        MultiCut(
            "both", 0, 5.0, [0, 1], recording=stereo, supervisions=[supervision("b", "r", 0, 5.0, channel=[0, 1])]
        ),
        MultiCut(
            "one of both", 0, 5.0, [0, 1], recording=stereo, supervisions=[supervision("c", "r", 0, 5.0, channel=1)]
        ),
        MultiCut("two files", 0, 5.0, [0, 1], recording=apart),
        MonoCut("no such", 0, 5.0, 2, recording=stereo),
    ]
    found = {item.id: item for item in opened(cuts, tmp_path / "cuts.jsonl")}
    audio = {id: (Path(item.audio).name, item.channel) for id, item in found.items() if isinstance(item, Utterance)}
    assert audio == {
        "right": ("r.flac", 1), "own file": ("1.wav", 0), "both": ("r.flac", None), "one of both": ("r.flac", 1)
    }  # fmt: skip
    assert {id: item.reason for id, item in found.items() if isinstance(item, Reject)} == {
        "two files": "unsupported-source",
        "no such": "bad-field",
    }


def test_cuts_that_are_no_stretch_of_a_file_are_rejected(tmp_path: Path) -> None:
    plain = MonoCut("plain", 0, 5.0, 0, recording=recording("r"), supervisions=[supervision("s", "r", 0, 5.0)])
    command = Recording("q", [AudioSource("command", [0], "cat x.wav")], 16000, 160000, 10.0)
    cuts = [
        plain,
        plain.with_id("padded").pad(duration=10.0),
        plain.with_id("joined").append(plain.with_id("other")),
        plain.with_id("fast").perturb_speed(1.1),
        plain.with_id("resampled").resample(24000),
        MonoCut("piped", 0, 5.0, 0, recording=command),
        MonoCut("silent", 0, 5.0, 0),
    ]
    items = list(opened(cuts, tmp_path / "cuts.jsonl"))
    reasons = [getattr(item, "reason", "") for item in items]
    assert reasons == ["", "mixed-cut", "mixed-cut", "transformed-audio", "", "unsupported-source", "missing-audio"]
    assert [item.id for item in items][3:] == [cut.id for cut in cuts][3:]


@pytest.fixture(scope="module")
def sample(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gzipped manifest as the benchmark's generator writes it."""
    path = tmp_path_factory.mktemp("libriheavy") / "cuts.jsonl.gz"
    generator = project / "tests" / "benchmarks" / "libriheavy.py"
    subprocess.run([sys.executable, str(generator), str(path), "--cuts", str(SAMPLE)], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def sample_cuts(sample: Path) -> list[dict[str, Any]]:
    with gzip.open(sample, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_libriheavy_cuts_use_the_printed_text_and_the_audio_root(sample: Path, sample_cuts: list) -> None:
    manifest = open_manifest(str(sample), audio_root="s3://speech/librilight/")
    assert manifest.kind == "libriheavy" and len(sample_cuts) == SAMPLE
    for number, (item, cut) in enumerate(zip(manifest, sample_cuts, strict=True), 1):
        custom = cut["supervisions"][0]["custom"]
        assert item == Utterance(
            id=cut["id"],
            audio=f"s3://speech/librilight/{cut['recording']['id']}.flac",
            text=custom["texts"][0],
            speaker=cut["id"].split("/")[1],
            start=cut["start"],
            duration=cut["duration"],
            language="en",
            channel=0,
            extra={**cut["custom"], "begin_byte": custom["begin_byte"], "end_byte": custom["end_byte"]},
            where=f"cuts.jsonl.gz:{number}",
        )
    beside = next(iter(open_manifest(str(sample))))
    assert beside.audio == str(sample.parent / sample_cuts[0]["recording"]["sources"][0]["source"])


def test_the_short_way_and_lhotses_own_agree(tmp_path: Path, sample_cuts: list) -> None:
    """The same cuts with a mark that lhotse ignores and the short way does not take."""
    rows = sample_cuts[:100]
    long_way = copy.deepcopy(rows)
    for cut in long_way:
        cut["recording"]["transforms"] = []
    for name, cuts in (("short", rows), ("long", long_way)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cuts.jsonl").write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    short, long = (
        list(open_manifest(str(tmp_path / name / "cuts.jsonl"), audio_root="/x")) for name in ("short", "long")
    )
    assert short == long
    through_lhotse = CutSet.from_jsonl_lazy(tmp_path / "short" / "cuts.jsonl")
    assert [cut.supervisions[0].custom["texts"][0] for cut in through_lhotse] == [item.text for item in short]


@pytest.mark.parametrize(
    "change",
    [
        lambda cut: cut["supervisions"][0].update(language=5),
        lambda cut: cut.update(start=1e306),
        lambda cut: cut.update(duration=1e306, supervisions=[cut["supervisions"][0] | {"duration": 1e306}]),
        lambda cut: cut.update(custom={"tree": json.loads("[" * 900 + "]" * 900)}),
    ],
)
def test_a_bad_field_of_a_cut_of_libriheavy_costs_only_that_cut(tmp_path: Path, sample_cuts: list, change) -> None:
    bad = copy.deepcopy(sample_cuts[1])
    change(bad)
    path = tmp_path / "cuts.jsonl"
    path.write_text("".join(json.dumps(cut) + "\n" for cut in (sample_cuts[0], bad, sample_cuts[2])))
    manifest = open_manifest(str(path))
    _, rejected, _ = manifest
    assert (rejected.reason, rejected.where) == ("bad-field", "cuts.jsonl:2")
    round_, rejects = make_round(manifest, TokenizeConfig(), Sizes(1200.0, manifest.folder), "plan.parquet")
    assert (round_.utterances, rejects) == (2, {"manifest/bad-field": 1})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)


@given(st.data())
def test_a_cut_with_anything_anywhere_gives_utterances_or_rejects(
    tmp_path_factory: pytest.TempPathFactory, sample_cuts: list, data: st.DataObject
) -> None:
    cut = copy.deepcopy(sample_cuts[0])
    for _ in range(data.draw(st.integers(1, 2))):
        node: Any = cut
        while True:
            key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            inside = isinstance(node[key], dict | list) and bool(node[key])
            if not inside or data.draw(st.booleans()):
                break
            node = node[key]
        if isinstance(node, dict) and data.draw(st.booleans()):
            del node[key]
        else:
            node[key] = data.draw(values)
        if not cut:
            break
    path = tmp_path_factory.mktemp("cuts") / "cuts.jsonl"
    good = sample_cuts[0]
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, cut, good)))
    first, *items, last = open_manifest(str(path))
    assert first == last._replace(where="cuts.jsonl:1") and items
    for item in items:
        assert type(item) in (Utterance, Reject) and item.where == "cuts.jsonl:2"
        json.dumps(item, allow_nan=False)
        if isinstance(item, Utterance):
            assert type(item.start) is float and item.start >= 0 and isinstance(item.audio, str) and item.audio
            assert item.duration is None or item.duration > 0
            assert item.text is None or isinstance(item.text, str)


def pair(folder: Path, recordings: list[Recording], supervisions: list[SupervisionSegment]) -> tuple[str, str]:
    files = folder / "x_recordings_all.jsonl.gz", folder / "x_supervisions_all.jsonl.gz"
    RecordingSet.from_recordings(recordings).to_file(files[0])
    SupervisionSet.from_segments(supervisions).to_file(files[1])
    return str(files[0]), str(files[1])


def test_recordings_and_supervisions(tmp_path: Path) -> None:
    recordings = [recording(f"r{n}") for n in range(4)]
    supervisions = [
        supervision("a", "r0", 0.0, 4.0),
        supervision("b", "r0", 5.0, 4.0),
        supervision("c", "r2", 0.0, 30.0),
        supervision("d", "none such", 0.0, 1.0),
        supervision("e", "r1", -0.25, 1.0),
        supervision("f", "r3", 1.0, -2.0),
    ]
    files = pair(tmp_path, recordings, supervisions)
    by_folder, by_name = open_manifest(str(tmp_path)), open_manifest(",".join(files))
    items = list(by_folder)
    assert items == list(by_name)
    assert by_folder.files == by_name.files == files
    said = [(i.id, Path(i.audio).stem, i.start, i.duration, i.text) for i in items if isinstance(i, Utterance)]
    assert said == [
        ("a", "r0", 0.0, 4.0, "Text of a."),
        ("b", "r0", 5.0, 4.0, "Text of b."),
        ("c", "r2", 0.0, 30.0, "Text of c."),
        ("e", "r1", 0.0, 0.75, "Text of e."),
    ]
    assert [(i.id, i.reason) for i in items if isinstance(i, Reject)] == [("d", "missing-audio"), ("f", "bad-field")]


def test_a_recording_without_supervisions_is_an_utterance_without_text(tmp_path: Path) -> None:
    recordings, supervisions = [recording("r0"), recording("r1", 7.5)], [supervision("a", "r0", 0.0, 4.0)]
    files = pair(tmp_path, recordings, supervisions)
    for manifest, ids in ((open_manifest(str(tmp_path)), ["a", "r1"]), (open_manifest(files[0]), ["r0", "r1"])):
        items = list(manifest)
        assert [item.id for item in items] == ids
        assert (items[1].text, items[1].start, items[1].duration) == (None, 0.0, 7.5)
    with pytest.raises(ManifestError, match="supervisions without recordings"):
        open_manifest(files[1])
    with pytest.raises(ManifestError, match="expected lhotse's recordings, found supervisions"):
        open_manifest(f"{files[1]},{files[0]}")


@pytest.mark.parametrize("order", ["same", "shuffled", "reversed"])
def test_the_join_is_complete_in_any_order(tmp_path: Path, order: str) -> None:
    """More recordings than are kept at hand, some without supervisions, one bad line in each file."""
    recordings = [recording(f"r{n:05d}") for n in range(2600)]
    supervisions = [supervision(f"s{n:05d}", f"r{n:05d}", 0.0, 1.0) for n in range(2600) if n % 10]
    if order == "shuffled":
        random.Random(0).shuffle(supervisions)
    elif order == "reversed":
        supervisions.reverse()
    paths = tmp_path / "recordings.jsonl", tmp_path / "supervisions.jsonl"
    for path, items in zip(paths, (recordings, supervisions), strict=True):
        lines = [json.dumps(item.to_dict()) for item in items]
        lines.insert(1500, '{"id": "broken"}')
        path.write_text("\n".join(lines) + "\n")
    items = list(open_manifest(str(tmp_path)))
    by_text = Counter("reject" if isinstance(i, Reject) else "text" if i.text else "silent" for i in items)
    assert by_text == {"text": 2340, "silent": 260, "reject": 2}
    for item in items:
        if isinstance(item, Utterance):
            assert Path(item.audio).stem[1:] == item.id[1:]
    assert [item.id for item in items if isinstance(item, Utterance) and item.text] == [s.id for s in supervisions]
    silent = [item.id for item in items if isinstance(item, Utterance) and not item.text]
    assert silent == sorted(silent)
