"""Manifests on object storage: an S3 server on loopback, spoken to over HTTP by s3fs as in production."""

from __future__ import annotations

import gzip
import json
from typing import Any

import fsspec
import pytest

from pipeline.manifests import ManifestError, open_manifest
from pipeline.utterances import Reject, Utterance

BUCKET = "lina"


@pytest.fixture(scope="module")
def s3(bucket: str) -> Any:
    """The file system of a fresh server with one bucket."""
    return fsspec.filesystem("s3")


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_relative_audio_paths_become_urls(s3: Any) -> None:
    rows = [{"audio": path, "text": "Hi."} for path in ("a.flac", "../b.flac", "s3://other/c.flac", "gs://x/d.flac")]
    s3.pipe_file(f"{BUCKET}/lists/train.jsonl.gz", gzip.compress(lines(*rows) + b"{broken\n"))
    *good, bad = open_manifest(f"s3://{BUCKET}/lists/train.jsonl.gz")
    assert [item.audio for item in good] == [
        f"s3://{BUCKET}/lists/a.flac",
        f"s3://{BUCKET}/b.flac",
        "s3://other/c.flac",
        "gs://x/d.flac",
    ]
    assert (bad.reason, bad.where) == ("not-json", "train.jsonl.gz:5")


def test_a_manifest_larger_than_a_request(s3: Any) -> None:
    rows = [{"id": str(number), "audio": "a.flac", "text": f"{number} " * 200} for number in range(12_000)]
    s3.pipe_file(f"{BUCKET}/large.jsonl", lines(*rows))
    assert [(item.id, item.text) for item in open_manifest(f"s3://{BUCKET}/large.jsonl")] == [
        (row["id"], row["text"]) for row in rows
    ]


def test_csv_and_parquet(s3: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    s3.pipe_file(f"{BUCKET}/t/m.csv", b"audio,text\na.flac,Hi.\n")
    (item,) = open_manifest(f"s3://{BUCKET}/t/m.csv")
    assert (item.audio, item.text) == (f"s3://{BUCKET}/t/a.flac", "Hi.")
    for name in ("x", "y"):
        with s3.open(f"{BUCKET}/parquet/{name}.parquet", "wb") as file:
            pq.write_table(pa.table({"audio": [f"{name}.flac"]}), file)
    items = list(open_manifest(f"s3://{BUCKET}/parquet"))
    assert [item.audio for item in items] == [f"s3://{BUCKET}/parquet/{name}.flac" for name in ("x", "y")]


def test_recordings_in_a_folder(s3: Any) -> None:
    told = json.dumps({"speaker": "84", "voice_activity": [[0.0, 4.0], [4.5, 9.0]]}).encode()
    for number in range(40):
        s3.pipe_file(f"{BUCKET}/unlab/84/book/{number:02d}.flac", b"fLaC")
        if number != 7:
            s3.pipe_file(f"{BUCKET}/unlab/84/book/{number:02d}.json", b"{" if number == 8 else told)
    items = list(open_manifest(f"s3://{BUCKET}/unlab/"))
    assert [item.where for item in items] == [f"84/book/{number:02d}.flac" for number in range(40)]
    assert [item.where for item in items if isinstance(item, Reject)] == ["84/book/08.flac"]
    spoken = [item for item in items if isinstance(item, Utterance)]
    assert {item.speaker for item in spoken} == {"84"}
    assert [item.audio for item in spoken if item.duration is None] == [f"s3://{BUCKET}/unlab/84/book/07.flac"]
    assert {(item.start, item.duration) for item in spoken if item.duration} == {(0.0, 9.0)}


def test_a_fingerprint_follows_the_etag(s3: Any) -> None:
    url = f"s3://{BUCKET}/f.jsonl"
    s3.pipe_file(f"{BUCKET}/f.jsonl", lines({"audio": "a.flac"}))
    manifest = open_manifest(url)
    known = manifest.fingerprint()
    marked = {**known, "files": [{**known["files"][0], "sha256": "as known"}]}
    assert manifest.fingerprint(marked)["sha256"] == "as known"
    s3.ls(BUCKET)  # what this process has listed may be out of date: the change comes from another one
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(f"{BUCKET}/f.jsonl", lines({"audio": "b.flac"}))
    changed = manifest.fingerprint(marked)
    assert changed["size"] == known["size"] and changed["sha256"] not in ("as known", known["sha256"])


def test_what_is_not_there_is_refused_up_front(s3: Any) -> None:
    for url in (f"s3://{BUCKET}/none.jsonl", f"s3://{BUCKET}/none.parquet", "s3://no-such-bucket/m.csv"):
        with pytest.raises(ManifestError, match="cannot be opened"):
            open_manifest(url)
    s3.pipe_file(f"{BUCKET}/docs/readme.txt", b"x")
    with pytest.raises(ManifestError, match="no manifest and no recording"):
        open_manifest(f"s3://{BUCKET}/docs")
