"""Shards: bytes that depend on the samples alone, that WebDataset reads, and whose damage shows."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import shards
from pipeline.shards import Sample, read_samples, tar_bytes, write_shard

FACTS = {"plan": "0" * 64, "codec": {"name": "c"}, "versions": {}}


def sample(key, frames=7, codebooks=4, **meta):
    codes = (np.arange(codebooks * frames, dtype=np.uint16) * 37 % 1024).reshape(codebooks, frames)
    return Sample(key, codes, "HH AH0 <space> .", {"id": key, "speaker": "s", "seconds": frames / 75} | meta)


keys = st.from_regex(r"[A-Za-z0-9_%-]{1,40}(/[A-Za-z0-9_%-]{1,40})?", fullmatch=True)


@settings(max_examples=40)
@given(st.dictionaries(keys, st.tuples(st.integers(0, 300), st.text(max_size=20)), max_size=8))
def test_what_is_written_is_read(content):
    written = [sample(key, frames, text=text) for key, (frames, text) in sorted(content.items())]
    data, spans = tar_bytes(written)
    read = list(read_samples(data))
    assert [(s.key, s.phones, s.meta) for s in read] == [(s.key, s.phones, s.meta) for s in written]
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(read, written, strict=True))
    for (offset, size), expected in zip(spans, written, strict=True):
        (alone,) = read_samples(data[offset : offset + size])
        assert alone.key == expected.key and np.array_equal(alone.codes, expected.codes)


def test_the_order_of_samples_does_not_change_the_bytes(tmp_path):
    many = [sample(f"a/{i}", 5 + i) for i in range(20)]
    first = write_shard(str(tmp_path / "x"), 3, many, [], FACTS)
    second = write_shard(str(tmp_path / "y"), 3, many[::-1], [], FACTS)
    assert first == second
    for name in ("shards/000003.tar", "shards/000003.index.parquet", "shards/000003.json", "quarantine/000003.jsonl"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    data = (tmp_path / "x/shards/000003.tar").read_bytes()
    assert hashlib.sha256(data).hexdigest() == first["sha256"] and len(data) == first["bytes"]


def test_headers_hold_no_clock_and_no_owner():
    data, _ = tar_bytes([sample("k")])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_the_sidecar_counts_and_the_index_finds(tmp_path):
    reject = {"key": "bad", "stage": "decode", "reason": "silent", "detail": "d", "where": "m:3", "id": "bad"}
    sidecar = write_shard(str(tmp_path), 0, [sample("b", 75), sample("a", 150)], [reject], FACTS)
    assert (sidecar["samples"], sidecar["frames"], sidecar["seconds"]) == (2, 225, 3.0)
    assert sidecar["rejects"] == {"decode/silent": 1}
    assert json.loads((tmp_path / "quarantine/000000.jsonl").read_text()) == reject
    index = pq.read_table(tmp_path / "shards/000000.index.parquet").to_pylist()
    assert [(row["key"], row["frames"], row["phones"], row["speaker"]) for row in index] == [
        ("a", 150, 4, "s"),
        ("b", 75, 4, "s"),
    ]


def test_plain_webdataset_reads_our_shards(tmp_path):
    import webdataset

    write_shard(str(tmp_path), 0, [sample(f"x/{i}", 10 + i, text="hé") for i in range(5)], [], FACTS)
    rows = list(webdataset.WebDataset(str(tmp_path / "shards/000000.tar"), shardshuffle=False).decode())
    assert [row["__key__"] for row in rows] == [f"x/{i}" for i in range(5)]
    assert rows[2]["codes.npy"].shape == (4, 12) and rows[2]["codes.npy"].dtype == np.uint16
    assert rows[2]["json"]["text"] == "hé" and rows[2]["phones.txt"] == "HH AH0 <space> .\n"


def test_an_empty_shard_is_a_valid_tar(tmp_path):
    sidecar = write_shard(str(tmp_path), 0, [], [], FACTS)
    data = (tmp_path / "shards/000000.tar").read_bytes()
    assert sidecar["samples"] == 0 and list(read_samples(data)) == []


@pytest.mark.parametrize("member", ["k.exe", "k.codes.npy"])
def test_a_foreign_or_missing_member_is_an_error(member):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(member))
    with pytest.raises(ValueError, match="members"):
        list(read_samples(buffer.getvalue()))


def sample_with(codes: bytes) -> bytes:
    """A tar of one sample whose codes are these bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in ((shards.CODES, codes), (shards.META, b"{}"), (shards.PHONES, b"")):
            header = tarfile.TarInfo(f"k.{name}")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **options)
    return content.getvalue()


def test_an_array_of_objects_is_not_unpickled():
    with pytest.raises(ValueError, match="allow_pickle"):
        list(read_samples(sample_with(npy(np.array([{"a": 1}], dtype=object), allow_pickle=True))))


def test_codes_that_others_wrote_are_read_and_cut_ones_refused():
    (read,) = read_samples(sample_with(npy(np.asfortranarray(sample("k").codes))))
    assert np.array_equal(read.codes, sample("k").codes)
    with pytest.raises(ValueError, match=r"26 codes where the header says \(4, 7\)"):
        list(read_samples(sample_with(npy(sample("k").codes)[:-4])))
    with pytest.raises(ValueError, match="expected uint16"):
        list(read_samples(sample_with(npy(np.zeros((4, 7), np.int32)))))


def test_our_headers_are_read_without_pythons_parser(monkeypatch):
    """It is not safe where threads share it."""

    def fails(*_):
        raise SystemError("AST constructor recursion depth mismatch")

    data, _ = tar_bytes([sample("k")])
    monkeypatch.setattr("ast.literal_eval", fails)
    (read,) = read_samples(data)
    assert np.array_equal(read.codes, sample("k").codes)
