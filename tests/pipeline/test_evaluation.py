"""Measures that follow what they are said to measure, on real speech, and the table that compares systems by them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from model.codec import Codec
from model.codec_config import CodecConfig
from pipeline import measures
from pipeline.evaluation import Clip, Row, compare, evaluate_codec, interval, table
from pipeline.measures import EvaluationError, WordErrors

RATE = 24000
PHRASES = st.lists(st.sampled_from("red blue apple river window walked slowly Martha".split()), min_size=1, max_size=8)


def heard_nothing(_samples: np.ndarray, _rate: int) -> str:
    return ""


def noisy(samples: np.ndarray, snr_db: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32)
    return samples + noise * np.sqrt(np.mean(samples**2) * 10 ** (-snr_db / 10))


@pytest.fixture(scope="module")
def clips(shared_data: Path) -> list[Clip]:
    """Three short utterances: two of one speaker, one of another."""
    folder = shared_data / "librispeech-test-other"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: line["duration"])
    speaker = lines[0]["speaker"]
    first, second = [line for line in lines if line["speaker"] == speaker and line["duration"] > 3][:2]
    other = next(line for line in lines if line["gender"] != first["gender"] and line["duration"] > 3)
    made = []
    for line in (first, second, other):
        samples, rate = soundfile.read(folder / line["audio"], dtype="float32")
        made.append(Clip(line["id"], measures.at_rate(samples, rate, RATE), RATE, line["text"]))
    return made


def test_only_words_count_not_their_spelling() -> None:
    assert measures.count_errors("Twenty-four apples, please.", "24 apples please") == WordErrors(3, 0, 16, 0)
    assert measures.count_errors("They won't see the colour.", "they will not see the color").word_errors == 0
    assert measures.count_errors("Birds sing well", "birds well").word_errors == 1
    assert measures.count_errors("birds sing well", "")[:2] == (3, 3)
    assert measures.count_errors("", "somebody spoke")[:2] == (0, 2)


@given(PHRASES, PHRASES)
def test_errors_are_a_distance(one: list[str], other: list[str]) -> None:
    errors = measures.count_errors(" ".join(one), " ".join(other))
    assert errors.words == len(one)
    assert abs(len(one) - len(other)) <= errors.word_errors <= max(len(one), len(other))
    assert (errors.word_errors == 0) == (one == other)
    assert errors.word_errors == measures.count_errors(" ".join(other), " ".join(one)).word_errors


def test_error_rates_weigh_words_not_utterances() -> None:
    errors = [WordErrors(9, 0, 40, 0), WordErrors(1, 1, 5, 5)]
    assert measures.word_error_rate(errors) == pytest.approx(0.1)


def test_voices_are_told_apart(clips: list[Clip]) -> None:
    one, again, other = (measures.voice_print(clip.samples, clip.rate) for clip in clips)
    assert measures.similarity(one, one) == pytest.approx(1.0, abs=1e-6)
    assert measures.similarity(one, again) > 0.75 > measures.similarity(one, other)
    with pytest.raises(measures.NoVoice, match="no voice"):
        measures.voice_print(np.zeros(RATE, np.float32), RATE)


def test_more_noise_is_worse_by_every_measure(clips: list[Clip]) -> None:
    clean = clips[0].samples
    versions = [clean, noisy(clean, 15), noisy(clean, 0)]
    for measure, better in (
        (lambda x: measures.intelligibility(clean, x, RATE), 1),
        (lambda x: measures.predicted_mos(x, RATE), 1),
        (lambda x: measures.dnsmos(x, RATE), 1),
        (lambda x: measures.mel_distance(clean, x, RATE), -1),
    ):
        best, middle, worst = (better * measure(version) for version in versions)
        assert best > middle > worst
    assert measures.intelligibility(clean, clean, RATE) == pytest.approx(1.0, abs=1e-6)
    assert measures.mel_distance(clean, clean, RATE) == 0.0


def test_a_clip_too_short_to_judge_is_left_out_not_counted_as_bad(clips: list[Clip]) -> None:
    short = Clip("short", clips[0].samples[RATE : RATE + RATE // 8], RATE, "")
    assert np.isnan(measures.intelligibility(short.samples, short.samples, RATE))
    _, same = compare([short, clips[0]], {"same": lambda samples, rate: samples}, heard_nothing)
    assert same.figures["stoi"].value == pytest.approx(1.0, abs=1e-6)
    assert same.figures["similarity"].value == pytest.approx(1.0, abs=1e-6)


@given(st.sampled_from([100.0, 440.0, 2000.0, 7000.0]), st.sampled_from([8000, 16000, 24000, 44100]))
def test_a_tone_is_where_it_belongs_on_the_mel_scale(frequency: float, rate: int) -> None:
    if frequency > rate * 0.4:
        return
    tone = np.sin(2 * np.pi * frequency * np.arange(rate // 2) / rate).astype(np.float32)
    band = int(measures.log_mel(tone, rate).mean(axis=1).argmax())
    place = np.log10(1 + frequency / 700) / np.log10(1 + rate / 1400) * 81 - 1
    assert abs(band - place) <= 1.5


def test_perplexity_is_how_many_entries_are_in_use() -> None:
    codes = [np.array([[0, 1, 2, 3], [5, 5, 5, 5]]), np.array([[0, 1, 2, 3], [5, 5, 5, 5]])]
    assert measures.perplexity(codes, 8) == pytest.approx([4.0, 1.0])
    with pytest.raises(EvaluationError, match="8 entries"):
        measures.perplexity([np.array([[8]])], 8)
    with pytest.raises(EvaluationError, match="no codes"):
        measures.perplexity([], 8)


def test_a_cut_in_the_middle_of_a_vowel_clicks(clips: list[Clip]) -> None:
    speech = clips[0].samples
    loudest = int(np.abs(speech[RATE : 2 * RATE]).argmax()) + RATE
    faded = speech.copy()
    faded[-240:] *= np.linspace(1, 0, 240, dtype=np.float32)
    assert measures.clicks(faded, speech[: loudest + 1], RATE)
    assert not measures.clicks(faded, faded * 0.5, RATE)
    assert not measures.clicks(speech[: loudest + 1], speech[: loudest + 1], RATE), "the original ends so, too"


def test_opus_is_better_with_more_bits(clips: list[Clip]) -> None:
    clean = clips[0].samples
    for rate in (16000, RATE, 22050):
        sounded = measures.at_rate(clean, RATE, rate)
        coded = {kbits: measures.opus(sounded, rate, kbits) for kbits in (6, 12, 32)}
        assert {len(decoded) for decoded in coded.values()} == {len(sounded)}
        stoi = [measures.intelligibility(sounded, decoded, rate) for decoded in coded.values()]
        assert 0.7 < stoi[0] < stoi[1] < stoi[2] <= 1.0
    with pytest.raises(EvaluationError, match="6 to 256 kbit/s"):
        measures.opus(clean, RATE, 3)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(EvaluationError, match=r"needs jiwer: .*pip install 'lina-ray\[asr,eval\]'"):
        measures.count_errors("a", "b")


def test_a_codec_is_compared_with_the_original_and_opus(clips: list[Clip]) -> None:
    codec = Codec.random(CodecConfig("small", filters=4, codebooks=4, ratios=(8, 5, 4, 2)))
    seen = []
    rows = evaluate_codec(
        clips[:1],
        codec,
        opus_kbits=(24,),
        progress=lambda done, total: seen.append((done, total)),
    )
    original, random, opus = rows
    assert seen == [(1, 1)]
    assert [row.system for row in rows] == ["original", codec.config.name, "Opus 24 kbit/s"]
    assert original.figures["wer"].value < 0.3, "the recogniser reads real speech"
    assert random.figures["wer"].value > 0.7, "and nothing from a codec that has learnt nothing"
    assert random.figures["wer_added"].value == pytest.approx(
        random.figures["wer"].value - original.figures["wer"].value
    )
    assert opus.figures["similarity"].value > 0.95 > random.figures["similarity"].value
    assert opus.figures["stoi"].value > 0.95 > random.figures["stoi"].value
    assert all(f.low <= f.value <= f.high for row in rows for f in row.figures.values())
    assert len(random.codebooks) == 4 and all(1 <= use <= 1024 for use in random.codebooks)
    assert all(rate > 0 for rate in random.extra.values()) and len(random.extra) == 2

    lines = table(rows).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[2].startswith("| original |") and lines[2].count("—") == 5
    metrics = random.metrics("codec/")
    assert metrics[f"codec/{codec.config.name}.stoi"] == random.figures["stoi"].value
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-") for name in metrics
    )


def test_a_codec_stands_beside_fewer_of_its_codebooks_encodec_and_opus(
    clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of EnCodec's codebooks, each of 1024 entries at 75 frames a second, four are 3 kbit/s."""
    for judge in ("predicted_mos", "dnsmos"):  # seconds a row, and the same for every codec
        monkeypatch.setattr(measures, judge, lambda samples, rate: 3.0)
    config = CodecConfig("small", filters=4, lstm_layers=0, codebooks=8)
    codec, encodec = Codec.random(config), Codec.random(config, seed=1)
    clip = Clip("x", clips[0].samples[RATE : 2 * RATE], RATE, "")
    original, *rows = evaluate_codec([clip], codec, heard_nothing, codebooks=4, prefixes=(4, 2, 9), encodec=encodec)
    systems = {row.system: row.figures for row in rows}
    name = codec.config.name
    expected = {
        f"{name}, 150 codes/s": codec.encode([clip.samples], 2),
        name: codec.encode([clip.samples], 4),
        "EnCodec 3 kbit/s": encodec.encode([clip.samples], 4),
        "EnCodec 6 kbit/s": encodec.encode([clip.samples], 8),
    }
    assert [*systems] == [*expected, "Opus 6 kbit/s", "Opus 12 kbit/s"] and original.system == "original"
    for system, codes in expected.items():
        (decoded,) = (codec if name in system else encodec).decode(codes)
        assert systems[system]["mel"].value == measures.mel_distance(clip.samples, decoded, RATE)
    assert len({figures["mel"].value for figures in systems.values()}) == 6
    opus, better = (systems[f"Opus {kbits} kbit/s"] for kbits in (6, 12))
    assert 0.7 < opus["stoi"].value < better["stoi"].value and opus["mel"].value > better["mel"].value


def test_intervals_narrow_with_more_clips_and_are_the_same_every_time() -> None:
    errors, words = np.array([0.0, 1, 3, 0, 2, 0]), np.array([9.0, 8, 11, 3, 7, 6])
    few, many = interval(errors, words), interval(np.tile(errors, 9), np.tile(words, 9))
    assert few == interval(errors, words)
    assert few.value == many.value == pytest.approx(6 / 44)
    assert few.low <= many.low < many.value < many.high <= few.high
    assert 2 < (few.high - few.low) / (many.high - many.low) < 4.5, "nine times the clips: a third of the width"


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_an_interval_of_equal_clips_is_a_point(words: list[int]) -> None:
    wholes = np.array(words, dtype=float)
    assert interval(wholes * 0.5, wholes) == pytest.approx((0.5, 0.5, 0.5))


def test_silence_has_no_likeness_and_clips_without_text_no_word_errors(clips: list[Clip]) -> None:
    unknown = [Clip("x", clips[0].samples, RATE, " ")]
    rows = compare(unknown, {"silence": lambda samples, rate: np.zeros_like(samples)}, heard_nothing)
    assert "wer" not in rows[0].figures and "WER" not in table(rows)
    assert rows[1].figures["similarity"].value == 0.0


def test_numbers_below_the_table_keep_three_digits_and_no_exponent() -> None:
    extra = {"factor": 0.03412, "rate": 70.84, "none": 0.0, "many": 12345.6, "thousand": 999.7}
    lines = table([Row("ours", {}, extra=extra)]).splitlines()
    assert [line.partition(": ")[2] for line in lines if ": " in line] == ["0.0341", "70.8", "0", "12,346", "1,000"]


def test_what_cannot_be_compared_is_refused(clips: list[Clip]) -> None:
    codec = Codec.random(CodecConfig("small", filters=4, codebooks=2, ratios=(8, 5, 4, 2)))
    with pytest.raises(EvaluationError, match="no clips"):
        compare([], {}, heard_nothing)
    with pytest.raises(EvaluationError, match="16000 Hz, the codec 24000"):
        evaluate_codec([Clip("x", clips[0].samples, 16000, "")], codec, heard_nothing)
