"""Tables as manifests: what a row becomes, what is refused and how, and what a manifest's fingerprint sees."""

from __future__ import annotations

import gzip
import json
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus_options import CorpusOptions
from pipeline.manifests import KINDS, ManifestError, corpora, open_manifest
from pipeline.utterances import Reject, Utterance

GOOD = {"audio": "a.flac", "text": "Hello."}


def write_rows(path: Path, *rows: Any) -> str:
    """Writes each row as JSON, as text or as bytes, whichever it is, on a line of its own."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def read(url: str, **options: Any) -> list[Utterance | Reject]:
    return list(open_manifest(url, **options))


def check(item: Utterance | Reject) -> None:
    """Every field has its type, and the item can be written as JSON: what everything downstream relies on."""
    assert type(item) in (Utterance, Reject)
    json.dumps(item, allow_nan=False).encode()
    "".join(value for value in item if isinstance(value, str)).encode("utf-8")
    assert isinstance(item.id, str) and item.where
    if isinstance(item, Reject):
        assert item.stage == "manifest" and item.detail and item.reason == item.reason.lower().replace(" ", "-")
        return
    assert os.path.isabs(item.audio) or "://" in item.audio
    assert item.text is None or isinstance(item.text, str)
    assert isinstance(item.speaker, str) and isinstance(item.language, str)
    assert type(item.start) is float and math.isfinite(item.start) and item.start >= 0
    assert item.duration is None or (type(item.duration) is float and 0 < item.duration < math.inf)
    assert item.channel is None or (type(item.channel) is int and item.channel >= 0)


def test_the_options_of_jobs_name_what_is_known() -> None:
    """Written twice: `--help` does not wait for what reads manifests."""
    choices = {option.name: option.metadata["choices"] for option in fields(CorpusOptions)}
    assert choices["kind"] == KINDS and choices["corpus"] == (*corpora.RECIPES, "librilight")


def test_a_row_becomes_an_utterance(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "audio": "wavs/../wavs/a.flac",
        "text": "Hello — “you”.",
        "speaker": 1034,
        "start": 2,
        "duration": 1.5,
    }
    row |= {"language": "de", "channel": 1, "snr": 3.5, "book": {"title": "Emma", "parts": [1, 2]}}
    (found,) = read(write_rows(tmp_path / "train.jsonl", row))
    assert found == Utterance(
        id="7",
        audio=str(tmp_path / "wavs" / "a.flac"),
        text="Hello — “you”.",
        speaker="1034",
        start=2.0,
        duration=1.5,
        language="de",
        channel=1,
        extra={"snr": 3.5, "book": {"title": "Emma", "parts": [1, 2]}},
        where="train.jsonl:1",
    )


def test_absent_and_null_fields_take_their_defaults(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("id", "text", "speaker", "start", "duration", "language", "channel"))
    bare, null = read(write_rows(tmp_path / "m.jsonl", {"audio": "a.flac"}, {"audio": "a.flac", **nulls}))
    assert bare == Utterance("", str(tmp_path / "a.flac"), where="m.jsonl:1")
    assert null == bare._replace(where="m.jsonl:2")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not-json"),
        ("[1, 2]", "not-json"),
        ('"text"', "not-json"),
        ("[" * 5000, "not-json"),
        ('{"audio": "a.flac", "duration": 1e999}', "bad-field"),
        ('{"audio": "a.flac", "duration": NaN}', "bad-field"),
        ('{"audio": "a.flac", "snr": -Infinity}', "bad-field"),
        ('{"audio": "a.flac", "text": "\\ud800"}', "not-utf8"),
        ('{"audio": "a.flac", "\\udfff": 1}', "not-utf8"),
        (b'{"audio": "a.flac", "text": "caf\xe9"}', "not-utf8"),
        ('{"text": "no audio"}', "missing-audio"),
        ('{"audio": ""}', "missing-audio"),
        ('{"audio": null}', "missing-audio"),
        ('{"audio": ["a.flac"]}', "bad-field"),
        ('{"audio": "a\\u0000.flac"}', "bad-field"),
        ('{"audio": "a.flac", "text": 5}', "bad-field"),
        ('{"audio": "a.flac", "start": "0"}', "bad-field"),
        ('{"audio": "a.flac", "start": -0.5}', "bad-field"),
        ('{"audio": "a.flac", "start": true}', "bad-field"),
        ('{"audio": "a.flac", "duration": 0}', "bad-field"),
        ('{"audio": "a.flac", "duration": -1}', "bad-field"),
        ('{"audio": "a.flac", "channel": 0.5}', "bad-field"),
        ('{"audio": "a.flac", "channel": -1}', "bad-field"),
        ('{"audio": "a.flac", "speaker": {}}', "bad-field"),
        ('{"audio": "a.flac", "id": false}', "bad-field"),
        ('{"audio": "a.flac", "language": 3}', "bad-field"),
        ('{"audio": "a.flac", "start": 1e306}', "bad-field"),
        ('{"audio": "a.flac", "duration": 1e306}', "bad-field"),
        ('{"audio": "a.flac", "tree": ' + "[" * 900 + "]" * 900 + "}", "bad-field"),
        ('{"audio": "a.flac", "tree": ' + '{"a":' * 900 + "1" + "}" * 901, "bad-field"),
    ],
)
def test_a_bad_line_is_rejected_and_the_others_are_not(tmp_path: Path, line: str | bytes, reason: str) -> None:
    before, bad, after = read(write_rows(tmp_path / "m.jsonl", GOOD, line, "", "  \r", {**GOOD, "id": "last"}))
    assert (bad.reason, bad.where) == (reason, "m.jsonl:2")
    check(bad)
    assert before.text == after.text == "Hello."
    assert (after.id, after.where) == ("last", "m.jsonl:5")


def test_a_rejects_id_is_the_rows(tmp_path: Path) -> None:
    _, bad = read(write_rows(tmp_path / "m.jsonl", GOOD, {"id": "x/../y", "audio": 1}))
    assert (bad.id, bad.reason) == ("x/../y", "bad-field")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
rows = st.fixed_dictionaries(
    {"audio": values | st.just("a.flac")},
    optional=dict.fromkeys(("id", "text", "speaker", "start", "duration", "language", "channel", "other"), values),
)


@given(st.lists(rows, min_size=1, max_size=4))
def test_any_json_value_in_any_field_gives_one_item_a_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list
) -> None:
    path = tmp_path_factory.mktemp("rows") / "m.jsonl"
    items = read(write_rows(path, GOOD, *rows))
    assert [item.where for item in items] == [f"m.jsonl:{number + 1}" for number in range(len(rows) + 1)]
    for item in items:
        check(item)


@given(st.lists(st.binary().filter(lambda line: b"\n" not in line and line.strip()), max_size=5))
def test_any_bytes_give_one_reject_a_line(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    items = read(write_rows(tmp_path_factory.mktemp("bytes") / "m.jsonl", GOOD, *lines))
    assert len(items) == 1 + len([line for line in lines if not line.isspace()])
    for item in items[1:]:
        check(item)


def test_lines_longer_than_a_block_and_longer_than_allowed(tmp_path: Path) -> None:
    from pipeline.manifests.lines import LONGEST_LINE

    long = {**GOOD, "text": "x" * (3 << 20)}
    endless = {**GOOD, "text": "y" * (LONGEST_LINE + (2 << 20))}
    first, kept, refused, last = read(write_rows(tmp_path / "m.jsonl", GOOD, long, endless, GOOD))
    assert len(kept.text) == 3 << 20
    assert (refused.reason, refused.where, len(refused.detail) < 300) == ("not-json", "m.jsonl:3", True)
    assert (first.text, last.where) == ("Hello.", "m.jsonl:4")


def test_gzip_in_several_members_and_a_byte_order_mark(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode() + b"\n"
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + line * 2) + gzip.compress(line * 3) + b"\0" * 100)
    assert [item.text for item in read(str(path))] == ["Hello."] * 5
    big = os.urandom(40_000).hex()
    many = [{**GOOD, "text": big[number : number + 4000]} for number in range(2000)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in many).encode()))
    assert [item.text for item in read(str(path))] == [row["text"] for row in many]


def test_damaged_gzip_is_an_error_that_says_where(tmp_path: Path) -> None:
    text = "".join(json.dumps({**GOOD, "id": os.urandom(8).hex()}) + "\n" for _ in range(100_000)).encode()
    whole = gzip.compress(text)
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ManifestError, match=r"m\.jsonl\.gz: gzip data ends in the middle, after \d+ bytes"):
        read(str(path))
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 5000 + whole[len(whole) // 2 + 5000 :])
    with pytest.raises(ManifestError, match=r"m\.jsonl\.gz: gzip data is damaged"):
        read(str(path))


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(
        b"audio,text,speaker,start,duration,channel,mood\r\n"
        b'a.flac,"Yes, ""you"".\nAnd me.",7,0.5,1.25,1,glad\r\n'
        b"\r\n"
        b"b.flac,,,,,,\r\n"
        b"c.flac,short row\r\n"
        b"d.flac,caf\xe9,,,,,\r\n"
        b"e.flac,x,,nan,,,\r\n"
        b"f.flac,x,,soon,,,\r\n"
        b",x,,,,,\r\n"
        b'"g"h.flac,x,,,,,\r\n'
        b"i.flac,last,,,,,\r\n"
    )
    quoted, bare, *bad, last = read(str(path))
    assert quoted == Utterance(
        "", str(tmp_path / "a.flac"), 'Yes, "you".\nAnd me.', "7", 0.5, 1.25, "en", 1, {"mood": "glad"}, "m.csv:2"
    )
    assert bare == Utterance("", str(tmp_path / "b.flac"), where="m.csv:5")
    expected = ["bad-row:6", "not-utf8:7", "bad-field:8", "bad-field:9", "missing-audio:10", "bad-row:11"]
    assert [f"{item.reason}:{item.where.rpartition(':')[2]}" for item in bad] == expected
    assert (last.text, last.where) == ("last", "m.csv:12")
    for item in bad:
        check(item)


def test_a_quotation_mark_in_tsv_is_one(tmp_path: Path) -> None:
    path = tmp_path / "m.tsv"
    path.write_text('text\taudio\n"Yes\ta.flac\n"No," he said.\tb.flac\n', encoding="utf-8")
    assert [(item.text, item.audio) for item in read(str(path))] == [
        ('"Yes', str(tmp_path / "a.flac")),
        ('"No," he said.', str(tmp_path / "b.flac")),
    ]


@given(st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_csv_as_python_writes_it_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list) -> None:
    import csv

    path = tmp_path_factory.mktemp("csv") / "m.csv"
    clean = [tuple(text.replace("\r", "").replace("\0", "") for text in pair) for pair in texts]
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([("audio", "text", "mood"), *(("a.flac", *pair) for pair in clean)])
    items = read(str(path))
    written = [tuple(text.encode("utf-8", "replace").decode() for text in pair) for pair in clean]
    assert [(item.text or "", item.extra.get("mood", "")) for item in items] == written


def test_parquet(tmp_path: Path) -> None:
    import datetime
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "audio": ["a.flac", None, "c.flac", "d.flac"],
            "text": pa.array(["Hello.", "x", None, b"caf\xe9"], pa.binary()),
            "speaker": pa.array([7, 8, None, 9]),
            "start": pa.array([0.5, 0.0, float("nan"), 1.0]),
            "channel": pa.array([1.0, None, None, None]),
            "day": pa.array([datetime.date(2026, 8, 1)] * 4),
            "price": pa.array([decimal.Decimal("1.50")] * 4),
            "level": pa.array([float("nan")] * 4),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=2)
    good, *bad = read(str(tmp_path / "m.parquet"))
    assert (good.text, good.speaker, good.start, good.channel) == ("Hello.", "7", 0.5, 1)
    assert good.extra == {"day": "2026-08-01", "price": "1.50", "level": None}
    assert [item.reason for item in bad] == ["missing-audio", "bad-field", "not-utf8"]
    assert [item.where for item in bad] == ["m.parquet:2", "m.parquet:3", "m.parquet:4"]


def test_a_folder_of_parquet_files_is_read_in_order(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, start in (("part-1", 2), ("part-0", 0)):
        audio = [f"{number}.flac" for number in (start, start + 1)]
        pq.write_table(pa.table({"audio": audio}), tmp_path / f"{name}.parquet")
    manifest = open_manifest(str(tmp_path))
    assert [item.audio for item in manifest] == [str(tmp_path / f"{number}.flac") for number in range(4)]
    assert len(manifest.fingerprint()["files"]) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b"", "is empty"),
        ("m.jsonl", b"\n \n", "is empty"),
        ("m.jsonl", b"PAR1....", "is not JSON Lines"),
        ("m.jsonl", '{"audio": "a.flac"}'.encode("utf-16"), "is not JSON Lines"),
        ("m.jsonl", b'{"audio_filepath": "a.flac"}', "no column 'audio'; it has 'audio_filepath'"),
        ("m.csv", b"", "is empty"),
        ("m.csv", b"path,text\na.flac,x\n", "no column 'audio'; it has 'path', 'text'"),
        ("m.csv", b"audio,text,text\n", "'text' twice"),
        ("m.csv", b'"audio\n', "header cannot be read"),
        ("m.tsv", b"audio,text\na.flac,x\n", "no column 'audio'"),
        ("m.parquet", b"no parquet", "is not a Parquet file"),
        ("m.jsonl.gz", b"\x1f\x8b\x08", "gzip data"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_up_front(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=message) as refused:
        open_manifest(str(tmp_path / name))
    assert name in str(refused.value)


def test_what_is_not_there_is_refused_up_front(tmp_path: Path) -> None:
    for url in (
        str(tmp_path / "none.jsonl"),
        str(tmp_path / "none.parquet"),
        "memory://none/m.jsonl",
        "nope://a/b.csv",
    ):
        with pytest.raises(ManifestError, match="cannot be opened"):
            open_manifest(url)
    with pytest.raises(ManifestError, match="holds no manifest and no recording"):
        open_manifest(str(tmp_path))
    write_rows(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ManifestError, match=r"name the one to read: a\.jsonl"):
        open_manifest(str(tmp_path))
    with pytest.raises(ManifestError, match="unknown kind"):
        open_manifest(str(tmp_path / "a.jsonl"), kind="xml")


def test_reading_is_lazy_and_can_be_repeated(tmp_path: Path) -> None:
    manifest = open_manifest(write_rows(tmp_path / "m.jsonl", *[{**GOOD, "id": str(n)} for n in range(5)]))
    first = iter(manifest)
    assert [next(first).id, next(first).id] == ["0", "1"]
    assert [item.id for item in manifest] == ["0", "1", "2", "3", "4"]
    assert next(first).id == "2"


def test_relative_paths_follow_the_manifest_or_the_audio_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").mkdir()
    paths = ["../audio/a.flac", "/abs/b.flac", "s3://bucket/c.flac", "file:///abs/d.flac"]
    write_rows(tmp_path / "lists" / "m.jsonl", *({"audio": path} for path in paths))
    monkeypatch.chdir(tmp_path)
    elsewhere = ["/abs/b.flac", "s3://bucket/c.flac", "/abs/d.flac"]
    assert [i.audio for i in read("lists/m.jsonl")] == [str(tmp_path / "audio" / "a.flac"), *elsewhere]
    with_root = [i.audio for i in read("lists/m.jsonl", audio_root="s3://corpus/x/")]
    assert with_root == ["s3://corpus/audio/a.flac", *elsewhere]


def test_a_fingerprint_is_reused_until_the_file_changes(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "m.jsonl"
    manifest = open_manifest(write_rows(path, GOOD))
    known = manifest.fingerprint()
    assert known["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads(json.dumps(known)) == manifest.fingerprint(known) == known
    # Where size and time agree the content is not read again: what was known is what comes back.
    marked = {**known, "files": [{**known["files"][0], "sha256": "as known"}]}
    assert manifest.fingerprint(marked)["sha256"] == "as known"
    write_rows(path, {**GOOD, "text": "Hullo."})
    os.utime(path, (1, 1))
    changed = manifest.fingerprint(marked)
    assert changed["size"] == known["size"]
    assert changed["sha256"] not in ("as known", known["sha256"])


def test_real_speech(shared_data: Path) -> None:
    items = read(str(shared_data / "librispeech-test-other" / "manifest.jsonl"))
    assert len(items) >= 50
    for item in items:
        check(item)
        assert os.path.isfile(item.audio) and item.text and item.speaker and item.duration
