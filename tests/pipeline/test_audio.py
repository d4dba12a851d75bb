"""Recordings in: formats, seeking, remote storage, and every way in which they can be bad."""

from __future__ import annotations

import json
import logging
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio import REASONS, SignalLimits, check_signal, clean_audio, probe, read_segment, resample
from pipeline.utterances import Unusable
from tests.corpora import voiced
from tests.pipeline.bad_input import patched, with_flac_samples, write_audio

RATE = 22_050
FORMATS = {
    "speech.wav": {"subtype": "PCM_16"},
    "float.wav": {"subtype": "FLOAT"},
    "speech.flac": {"subtype": "PCM_24"},
    "speech.mp3": {"bitrate_mode": "VARIABLE", "compression_level": 0.5},
    "constant.mp3": {"bitrate_mode": "CONSTANT", "compression_level": 0.5},
    "speech.ogg": {"subtype": "VORBIS"},
    "speech.opus": {"format": "OGG", "subtype": "OPUS"},
    "speech.w64": {},
    "speech.aiff": {},
}


@pytest.fixture(scope="module")
def stereo() -> np.ndarray:
    """float32 [n, 2], 12 s: two voices."""
    return np.stack([voiced(np.random.default_rng(seed), 12.0, RATE) for seed in (1, 2)], axis=1)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory, stereo: np.ndarray) -> Path:
    """The same 12 s in every format; Opus at one of its own rates."""
    folder = tmp_path_factory.mktemp("recordings")
    for name, options in FORMATS.items():
        rate = 24_000 if name.endswith("opus") else RATE
        with soundfile.SoundFile(folder / name, "w", rate, 2, **options) as file:
            for start in range(0, len(stereo), 10_000):
                file.write(stereo[start : start + 10_000])
    return folder


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bad")
    return folder, {name: reason for name, _, reason in write_audio(folder)}


def reason_of(url: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(Unusable) as caught:
        clean_audio(str(url), *args, **options)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("name", FORMATS)
def test_a_segment_read_by_seeking_is_that_part_of_the_whole(recordings: Path, name: str) -> None:
    url = str(recordings / name)
    whole, rate = read_segment(url)
    info = probe(url)
    assert (info.frames, info.sample_rate, info.channels) == (len(whole), rate, 2)
    assert abs(info.seconds - len(whole) / rate) < 1e-9
    for start, duration in ((0.0, 1.5), (3.3337, 2.0), (info.seconds - 0.5, None)):
        part, _ = read_segment(url, start, duration)
        first = round(start * rate)
        expected = whole[first : first + round(duration * rate)] if duration else whole[first:]
        assert part.dtype == np.float32 and part.shape == expected.shape
        np.testing.assert_allclose(part, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["speech.wav", "speech.flac", "speech.ogg", "speech.mp3"])
def test_channels_are_averaged_or_chosen(recordings: Path, stereo: np.ndarray, name: str) -> None:
    tolerance = 2e-4 if name in ("speech.wav", "speech.flac") else 0.1
    for channel, expected in ((None, stereo.mean(axis=1)), (0, stereo[:, 0]), (1, stereo[:, 1])):
        samples, _ = read_segment(str(recordings / name), channel=channel)
        assert np.abs(samples - expected).mean() < tolerance
    assert reason_of(recordings / name, channel=2) == "bad-channel"


def test_a_remote_segment_costs_its_own_bytes(recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real S3 server on loopback, through s3fs."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        file_system = fsspec.get_filesystem_class("s3")
        file_system.clear_instance_cache()
        monkeypatch.setattr(file_system, "retries", 1)
        s3 = fsspec.filesystem("s3")
        s3.mkdir("speech")
        random = np.random.default_rng(0).integers(-3000, 3000, (16_000 * 400,), dtype=np.int16)
        soundfile.write(recordings / "book.flac", random, 16_000)
        s3.put_file(str(recordings / "book.flac"), "speech/book.flac")
        s3.put_file(str(recordings / "speech.ogg"), "speech/speech.ogg")

        fetched = 0
        fetch = s3fs.core.S3File._fetch_range

        def counted(self: Any, start: int, end: int) -> bytes:
            nonlocal fetched
            fetched += end - start
            return fetch(self, start, end)

        monkeypatch.setattr("s3fs.core.S3File._fetch_range", counted)
        size = os.path.getsize(recordings / "book.flac")
        part, _ = read_segment("s3://speech/book.flac", 300.0, 5.0)
        np.testing.assert_array_equal(part, random[16_000 * 300 : 16_000 * 305].astype(np.float32) / 32768)
        assert 0 < fetched < size / 3, f"{fetched} of {size} bytes"
        np.testing.assert_array_equal(
            clean_audio("s3://speech/speech.ogg", 2.0, 3.0), clean_audio(str(recordings / "speech.ogg"), 2.0, 3.0)
        )
        assert reason_of("s3://speech/nothing.flac") == "missing-file"
        assert reason_of("s3://nowhere/nothing.flac") == "missing-file"
        server.stop()
        with pytest.raises(OSError):  # the storage's fault, not the recording's: to be tried again
            read_segment("s3://speech/book.flac", 100.0, 5.0)
    finally:
        server.stop()
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_resampling_keeps_what_is_heard_and_removes_what_would_alias() -> None:
    time = np.arange(48_000) / 48_000
    tone, high = np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 15_000 * time)
    low = resample((tone + high).astype(np.float32), 48_000)
    expected = np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000)
    assert low.dtype == np.float32 and len(low) == 24_000
    np.testing.assert_allclose(low[500:-500], expected[500:-500], atol=2e-3)
    assert resample(low, 24_000) is low


def test_every_bad_recording_has_its_reason(bad: tuple[Path, dict[str, str]], capfd: pytest.CaptureFixture) -> None:
    folder, reasons = bad
    found = {name: reason_of(folder / name) for name in reasons}
    assert found == reasons
    assert set(found.values()) <= set(REASONS)
    assert len(clean_audio(str(folder / "good.wav"))) == 3 * 24_000


@pytest.mark.parametrize("times", [(math.nan, None), (math.inf, 1.0), (-0.1, 1.0), (0.0, -1.0), (0.0, math.nan)])
def test_times_that_are_no_times(bad: tuple[Path, dict[str, str]], times: tuple) -> None:
    assert reason_of(bad[0] / "good.wav", *times) == "bad-times"


def test_segments_outside_the_recording(bad: tuple[Path, dict[str, str]]) -> None:
    folder = bad[0]
    assert reason_of(folder / "good.wav", 3.0) == "start-past-end"
    assert reason_of(folder / "good.wav", 1e300, 1.0) == "start-past-end"
    assert reason_of(folder / "good.wav", 2.0, 1.2) == "end-past-end"
    assert reason_of(folder / "half.wav", 1.0, 1.0) == "truncated"
    assert reason_of(folder / "good.wav", max_seconds=2.9) == "too-long"
    assert reason_of(folder / "good.wav", 0.0, 0.0) == "empty"
    assert len(read_segment(str(folder / "good.wav"), 2.0, 1.05)[0]) == 16_000  # durations are rounded in manifests
    assert len(read_segment(str(folder / "half.wav"), 0.2, 1.0)[0]) == 16_000  # the part that is there


@pytest.mark.parametrize(
    "url", ["", "a\0b.wav", "x" * 300 + ".wav", "\ud800.wav", "nope://a/b.wav", "memory://a/b.wav"]
)
def test_names_of_nothing(url: str) -> None:
    assert reason_of(url) in ("missing-file", "not-a-file")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert reason_of(tmp_path / "pipe.wav") == "not-a-file"
    assert reason_of("/dev/zero") == "not-a-file"


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "locked.wav"
    soundfile.write(path, np.zeros(100), 16_000)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert reason_of(path) == "no-permission"


def test_streamed_files_without_a_length(tmp_path: Path, bad: tuple[Path, dict[str, str]]) -> None:
    """FFmpeg writes such WAVs to a pipe, and FLAC encoders such FLACs: usable, though nobody knows how long."""
    wav = (bad[0] / "good.wav").read_bytes()
    (tmp_path / "streamed.wav").write_bytes(patched(wav, wav.index(b"data") + 4, b"\xff\xff\xff\xff"))
    soundfile.write(tmp_path / "a.flac", voiced(np.random.default_rng(0), 3.0, 16_000), 16_000)
    (tmp_path / "streamed.flac").write_bytes(with_flac_samples((tmp_path / "a.flac").read_bytes(), 0))
    for name in ("streamed.wav", "streamed.flac"):
        assert len(read_segment(str(tmp_path / name), 1.0)[0]) == 32_000
        assert len(read_segment(str(tmp_path / name), 1.0, 0.5)[0]) == 8_000
        assert reason_of(tmp_path / name, max_seconds=2.0) == "too-long"
    assert probe(str(tmp_path / "streamed.wav")).frames == 48_000
    with pytest.raises(Unusable, match="unknown-length"):
        probe(str(tmp_path / "streamed.flac"))


def test_long_and_wide_recordings_stay_small_in_memory(tmp_path: Path, bad: tuple[Path, dict[str, str]]) -> None:
    """Ten hours are 1.2 GB as float32, 3 s of 1000 channels 192 MB; neither may ever be held."""
    ten_hours = bad[0] / "ten-hours.flac"
    wide = np.zeros((48_000, 1000), np.int16)
    wide[:, 3] = voiced(np.random.default_rng(0), 3.0, 16_000) * 32767
    soundfile.write(tmp_path / "wide.wav", wide, 16_000)
    tracemalloc.start()
    try:
        assert reason_of(ten_hours) == "too-long"
        assert reason_of(ten_hours, 35_990.0) == "silent"
        assert probe(str(ten_hours)).seconds == 36_000
        assert len(read_segment(str(tmp_path / "wide.wav"), channel=3)[0]) == 48_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20, f"{peak >> 20} MiB"


def test_limits_of_a_signal_are_those_given() -> None:
    speech = voiced(np.random.default_rng(0), 2.0, 16_000)
    level = check_signal(speech, 16_000)
    assert level.peak == pytest.approx(np.abs(speech).max()) and level.clipped == 0
    assert level.dbfs == pytest.approx(10 * np.log10(np.mean(speech.astype(np.float64) ** 2)))
    for limits, reason in (
        (SignalLimits(min_seconds=2.1), "too-short"),
        (SignalLimits(min_dbfs=level.dbfs + 1), "too-quiet"),
        (SignalLimits(max_peak=level.peak / 2), "too-loud"),
        (SignalLimits(silence_dbfs=0.0), "silent"),
    ):
        with pytest.raises(Unusable, match=reason):
            check_signal(speech, 16_000, limits)


@settings(max_examples=200)
@given(
    name=st.sampled_from(["speech.wav", "speech.flac", "speech.mp3", "speech.ogg", "speech.opus", "speech.aiff"]),
    damage=st.lists(st.tuples(st.integers(0, 150) | st.integers(0, 1 << 17), st.integers(0, 255)), max_size=8),
    kept=st.none() | st.integers(0, 1 << 17),
)
def test_any_damage_gives_samples_or_a_reason(
    recordings: Path, name: str, damage: list[tuple[int, int]], kept: int | None
) -> None:
    """Bytes are overwritten, most of them in the header, and the end is cut off."""
    data = bytearray((recordings / name).read_bytes()[:kept])
    for place, value in damage:
        data[place : place + 1] = [value] if place < len(data) else []
    (recordings / f"damaged-{name}").write_bytes(data)
    url = str(recordings / f"damaged-{name}")
    for use in (lambda: clean_audio(url), lambda: probe(url), lambda: read_segment(url, 1.0, 0.5)):
        try:
            use()
        except Unusable as error:
            assert error.reason in REASONS


def test_normal_corpora_pass_whole(shared_data: Path) -> None:
    for manifest in sorted(shared_data.glob("*/manifest.jsonl")):
        for line in manifest.read_text().splitlines()[::7]:
            row = json.loads(line)
            samples = clean_audio(str(manifest.parent / row["audio"]))
            assert abs(len(samples) / 24_000 - row["duration"]) < 0.02, row["id"]
