"""Long recordings: where speech is found, and what every way of cutting must keep."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio import read_segment, resample
from pipeline.segmentation import Segment, cut, quietest_place, speech_spans, vad_spans
from pipeline.utterances import Unusable
from tests.pipeline.bad_input import with_flac_samples, write_long_silence

EPSILON = 1e-6
Spans = list[tuple[float, float]]


@st.composite
def speech(draw: st.DrawFn) -> Spans:
    """Ordered spans of 0.05 to 40 s with pauses of 0 to 5 s, in milliseconds as detectors give them."""
    spans, now = [], draw(st.integers(0, 10**6))
    for pause, length in draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(50, 40_000)), max_size=25)):
        spans.append(((now + pause) / 1000, (now + pause + length) / 1000))
        now += pause + length
    return spans


LIMITS = st.tuples(st.floats(1, 30), st.floats(0, 20), st.floats(0, 3))
"""Target, how much longer a segment may be, longest silence."""


def ends(segment: Segment) -> tuple[float, float]:
    return segment.start, segment.start + segment.duration


@given(speech(), LIMITS, st.booleans())
def test_every_way_of_cutting_keeps_the_laws(spans: Spans, limits: tuple[float, float, float], quiet: bool) -> None:
    target, most, max_silence = limits[0], limits[0] + limits[1], limits[2]
    segments = cut(spans, target, most, max_silence, (lambda a, b: a + (b - a) * 0.7) if quiet else None)
    assert all(0 < segment.duration <= most for segment in segments)
    for before, after in pairwise(segments):
        assert before.start + before.duration <= after.start + EPSILON
    for start, end in spans:
        inside = [s for s in segments if ends(s)[0] < end - EPSILON and ends(s)[1] > start + EPSILON]
        assert sum(min(end, ends(s)[1]) - max(start, ends(s)[0]) for s in inside) == pytest.approx(
            end - start, abs=1e-5
        )
        if end - start <= most - EPSILON:
            assert len(inside) == 1
    gaps = [(b[1], a[0]) for b, a in pairwise(spans) if a[0] - b[1] > max_silence + EPSILON]
    for start, end in gaps:
        assert not any(ends(s)[0] < start and ends(s)[1] > end for s in segments)
    starts, stops = {s for s, _ in spans}, [e for _, e in spans]
    if all(end - start <= most for start, end in spans):  # then no cut is anywhere but at a pause
        assert all(segment.start in starts for segment in segments)
        assert all(min(abs(ends(segment)[1] - stop) for stop in stops) < EPSILON for segment in segments)


@given(speech(), LIMITS)
def test_order_overlaps_and_empty_spans_do_not_matter(spans: Spans, limits: tuple[float, float, float]) -> None:
    target, most, max_silence = limits[0], limits[0] + limits[1], limits[2]
    noisy = spans[::-1] + [(start, start) for start, _ in spans] + [(a, (a + b) / 2) for a, b in spans]
    assert cut(noisy, target, most, max_silence) == cut(spans, target, most, max_silence)


def test_lengths_come_near_the_target() -> None:
    random = np.random.default_rng(0)
    spans, now = [], 0.0
    for length, pause in zip(random.uniform(1, 6, 2000), random.uniform(0.2, 0.9, 2000), strict=True):
        spans.append((now, now + length))
        now += length + pause
    durations = np.array([segment.duration for segment in cut(spans, 15.0, 30.0, 0.8)])
    durations = durations[durations > 8]  # what lies between two dropped silences may be short
    assert abs(np.median(durations) - 15) < 1.5 and np.percentile(durations, 90) < 20


def test_a_longer_pause_is_preferred() -> None:
    spans = [(0.0, 5.0), (5.1, 10.0), (10.7, 15.0), (15.1, 20.0)]
    assert cut(spans, 10.0, 20.0, 1.0) == [Segment(0.0, 10.0), Segment(10.7, 20.0 - 10.7)]


def test_speech_without_a_pause_is_cut_only_where_it_must_be() -> None:
    assert cut([(10.0, 100.0)], 15.0, 30.0, 0.5) == [Segment(10.0, 30.0), Segment(40.0, 30.0), Segment(70.0, 30.0)]
    assert cut([(0.0, 30.0)], 15.0, 30.0, 0.5) == [Segment(0.0, 30.0)]
    asked = []

    def quietest(earliest: float, latest: float) -> float:
        asked.append((earliest, latest))
        return 24.0

    assert cut([(0.0, 40.0)], 15.0, 30.0, 0.5, quietest) == [Segment(0.0, 24.0), Segment(24.0, 16.0)]
    assert asked == [(10.0, 30.0)]


def test_what_cannot_be_cut_is_refused() -> None:
    for limits in ((0, 30, 1), (31, 30, 1), (10, 30, -1)):
        with pytest.raises(ValueError, match="target_seconds"):
            cut([(0, 1)], *limits)
    for span in ((float("nan"), 1.0), (0.0, float("inf")), (-1.0, 2.0)):
        with pytest.raises(Unusable, match="bad-times"):
            cut([(0.0, 5.0), span], 15, 30, 1)
    assert cut([], 15, 30, 1) == []


@pytest.fixture(scope="module")
def talk(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spans]:
    """Four real utterances with 3 s of silence between them at 22.05 kHz stereo, and where they are."""
    folder = shared_data / "librispeech-test-other"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()[2:6]]
    pieces, places, now = [np.zeros(3 * 22_050, np.float32)], [], 3.0
    for row in rows:
        samples, rate = read_segment(str(folder / row["audio"]))
        pieces += [resample(samples, rate, 22_050), np.zeros(3 * 22_050, np.float32)]
        places.append((now, now + len(pieces[-2]) / 22_050))
        now = places[-1][1] + 3
    path = tmp_path_factory.mktemp("talk") / "talk.flac"
    soundfile.write(path, np.repeat(np.concatenate(pieces)[:, None], 2, axis=1), 22_050)
    return path, places


def test_real_speech_is_found_and_silence_is_not(talk: tuple[Path, Spans]) -> None:
    path, places = talk
    spans = vad_spans(str(path))
    for start, end in spans:
        assert any(a - 0.1 < start and end < b + 0.1 for a, b in places), (start, end)
    for a, b in places:
        assert sum(end - start for start, end in spans if a - 0.1 < start < b) > 0.6 * (b - a)
    segments = cut(spans, 15.0, 30.0, 2.0)
    assert len(segments) == len(places)
    for segment, (a, b) in zip(segments, places, strict=True):
        assert a - 0.1 < segment.start and segment.start + segment.duration < b + 0.1


def test_streaming_finds_what_the_whole_finds(talk: tuple[Path, Spans], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of any length go through the same network state."""
    path, _ = talk
    samples, rate = read_segment(str(path), max_seconds=100)
    whole = speech_spans(samples, rate)
    for seconds in (0.9, 7.3):
        monkeypatch.setattr("pipeline.segmentation._PIECE_SECONDS", seconds)
        np.testing.assert_allclose(vad_spans(str(path)), whole, atol=0.033)


def test_nothing_but_noise_is_no_speech() -> None:
    noise = np.random.default_rng(0).standard_normal(5 * 16_000).astype(np.float32) * 0.05
    assert speech_spans(noise, 16_000) == speech_spans(np.zeros(0, np.float32), 8_000) == []


def test_a_long_recording_is_streamed(tmp_path: Path) -> None:
    """Ten minutes at 16 kHz are 38 MB; a piece of them is 2 MB."""
    write_long_silence(tmp_path / "long.flac", hours=1 / 6, rate=16_000)
    tracemalloc.start()
    try:
        assert vad_spans(str(tmp_path / "long.flac")) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20, f"{peak >> 20} MiB"


def test_a_recording_that_ends_too_early_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    tone = (0.1 * np.sin(np.arange(48_000) / 9)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", tone, 16_000)
    (tmp_path / "lie.flac").write_bytes(with_flac_samples((tmp_path / "a.flac").read_bytes(), 96_000))
    for name, reason in (("lie.flac", "truncated"), ("missing.flac", "missing-file")):
        with pytest.raises(Unusable) as caught:
            vad_spans(str(tmp_path / name))
        assert caught.value.reason == reason


def test_the_quietest_place_of_a_recording(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).standard_normal(20 * 16_000).astype(np.float32) * 0.1
    samples[round(12.3 * 16_000) : round(12.4 * 16_000)] *= 0.01
    soundfile.write(tmp_path / "noise.wav", samples, 16_000)
    place = quietest_place(str(tmp_path / "noise.wav"))
    assert 12.3 < place(8.0, 18.0) < 12.4
    assert 8.0 <= place(8.0, 8.001) <= 8.001
    first, second = cut([(0.0, 20.0)], 10.0, 14.0, 1.0, place)
    assert 12.3 < second.start < 12.4 and first.duration == pytest.approx(second.start)


def test_spans_that_touch_but_for_rounding_stay_apart() -> None:
    spans = [(4.163936330096346, 19.163936330096348), (19.163936330096345, 27.163936330096345)]
    first, second = cut(spans, 1.0, 15.5, 0.0)
    assert ends(first)[1] <= second.start == spans[0][1]
