"""Files on disk, in memory and on a real S3 server: written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from time import sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import storage


@pytest.fixture(params=["disk", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, on each kind of storage."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return str(tmp_path / "new") if request.param == "disk" else f"memory://{tmp_path.name}"


def test_what_is_written_is_read_listed_and_removed(base: str) -> None:
    url = storage.join(base, "a", "b.bin")
    assert not storage.exists(url) and storage.names(storage.join(base, "a")) == []
    storage.write_bytes(url, b"old")
    storage.write_bytes(url, b"new bytes")
    storage.write_text(storage.join(base, "a", "ü.txt"), "grün")
    assert storage.read_bytes(url) == b"new bytes" and storage.exists(url)
    assert storage.read_range(url, 4, 7) == b"byt" and storage.read_range(url, 4, 99) == b"bytes"
    assert storage.read_text(storage.join(base, "a", "ü.txt")) == "grün"
    assert storage.names(storage.join(base, "a")) == ["b.bin", "ü.txt"]
    storage.remove(url)
    storage.remove(url)
    assert storage.names(storage.join(base, "a")) == ["ü.txt"]
    storage.remove(base)
    assert not storage.exists(storage.join(base, "a", "ü.txt"))


def test_a_listing_sees_what_another_process_wrote(base: str) -> None:
    if base.startswith("memory"):
        pytest.skip("memory is of one process")
    storage.write_bytes(storage.join(base, "first"), b"")
    assert storage.names(base) == ["first"]
    write = f"from infra import storage; storage.write_bytes({storage.join(base, 'second')!r}, b'2')"
    subprocess.run([sys.executable, "-c", write], check=True, cwd=Path(storage.__file__).parents[1])
    assert storage.names(base) == ["first", "second"]


def test_a_listing_hides_nothing_that_others_do_afterwards(bucket: str, tmp_path: Path) -> None:
    import boto3

    base, others = f"{bucket}/{tmp_path.name}", boto3.client("s3")
    there = {"Bucket": bucket.removeprefix("s3://"), "Key": f"{tmp_path.name}/there"}
    new, there_url = there | {"Key": f"{tmp_path.name}/new"}, storage.join(base, "there")
    storage.write_bytes(there_url, b"1")
    before = storage.version(there_url)
    assert storage.names(base) == ["there"]
    others.put_object(**new, Body=b"2")
    others.put_object(**there, Body=b"other")
    assert storage.exists(storage.join(base, "new"))
    storage.names(base)
    others.put_object(**there, Body=b"longer")
    assert storage.version(there_url)[0] == "6" != before[0]
    storage.names(base)
    others.delete_object(**there)
    assert not storage.exists(there_url)
    storage.names(base)
    others.put_object(**there, Body=b"again")
    storage.remove(there_url)
    assert storage.names(base) == ["new"]


def test_nothing_is_told_of_what_cannot_be_asked(tmp_path: Path) -> None:
    for url in (str(tmp_path / "none"), "nowhere://bucket/a", "oss://bucket/a"):
        assert storage.version(url) == []


def test_upload_brings_a_file_whole(base: str, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "local").write_bytes(content)
    storage.upload(str(tmp_path / "local"), storage.join(base, "there"))
    assert storage.read_bytes(storage.join(base, "there")) == content and storage.names(base) == ["there"]
    with pytest.raises(FileNotFoundError):
        storage.upload(str(tmp_path / "missing"), storage.join(base, "there"))
    assert storage.read_bytes(storage.join(base, "there")) == content


def test_download_brings_files_and_folders(base: str, tmp_path: Path) -> None:
    for name in ("a.bin", "deeper/b.bin"):
        storage.write_bytes(storage.join(base, "folder", name), name.encode())
    storage.download(storage.join(base, "folder", "a.bin"), str(tmp_path / "one"))
    assert (tmp_path / "one").read_bytes() == b"a.bin"
    storage.download(storage.join(base, "folder"), str(tmp_path / "all"))
    found = {str(f.relative_to(tmp_path / "all")): f.read_bytes() for f in (tmp_path / "all").rglob("*.bin")}
    assert found == {"a.bin": b"a.bin", "deeper/b.bin": b"deeper/b.bin"}


def test_a_service_that_does_not_answer_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        for ask in (lambda url: storage.read_range(url, 0, 5), storage.read_bytes, storage.exists, storage.names):
            with pytest.raises(OSError, match=r"s3://bucket/a: .*connect"):
                ask("s3://bucket/a")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400))
def test_a_range_is_a_slice(content: bytes, start: int, length: int) -> None:
    storage.write_bytes("memory://ranges/x", content)
    assert storage.read_range("memory://ranges/x", start, start + length) == content[start : start + length]


WRITER = """
import sys
from infra import storage
url, number = sys.argv[1], 0
print("ready", flush=True)
while True:
    number += 1
    storage.write_bytes(url, b"%d " % number * 200_000)
"""


def test_a_killed_writer_leaves_the_old_content_or_the_new_and_traces_that_go_away(tmp_path: Path) -> None:
    root = Path(storage.__file__).parents[1]
    file = tmp_path / "target"
    storage.write_bytes(str(file), b"0 " * 200_000)
    for attempt in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(file)], cwd=root, stdout=subprocess.PIPE
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        sleep(0.003 + 0.017 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        words = file.read_bytes().split()
        assert len(words) == 200_000 and len(set(words)) == 1, "one whole version"
    storage.write_bytes(str(tmp_path / f".target{storage._TEMPORARY}12345678"), b"half")
    assert storage.remove_leftovers(str(tmp_path)) >= 1
    assert storage.names(str(tmp_path)) == ["target"]


def test_a_failing_writer_leaves_the_old_content_and_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "target"
    storage.write_bytes(str(file), b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(str(file), "text")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old" and storage.names(str(tmp_path)) == ["target"]


@pytest.mark.parametrize(
    ("base", "path", "expected"),
    [
        ("/data/corpus", "a/b.flac", "/data/corpus/a/b.flac"),
        ("/data/corpus", "../b.flac", "/data/b.flac"),
        ("/data/corpus", "/x/b.flac", "/x/b.flac"),
        ("/data/corpus", "s3://bucket/b.flac", "s3://bucket/b.flac"),
        ("s3://bucket/corpus", "a/b.flac", "s3://bucket/corpus/a/b.flac"),
        ("s3://bucket/corpus", "/x/b.flac", "/x/b.flac"),
    ],
)
def test_relative_paths_are_those_of_the_folder(base: str, path: str, expected: str) -> None:
    assert storage.relative_to(base, path) == expected


def test_absolute_paths_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/../b") == str(tmp_path / "b")
    assert storage.absolute(f"file://{tmp_path}/c") == str(tmp_path / "c")
    assert storage.absolute("gs://bucket/folder/") == "gs://bucket/folder"
    assert storage.is_local("a:b/c") and not storage.is_local("memory://x")
