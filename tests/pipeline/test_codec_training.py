"""Training a codec from a manifest: pools, resuming after a kill, several workers, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from infra import storage
from model.codec import Codec
from model.codec_config import CodecError
from model.codec_training.trainer import CodecTrainer
from pipeline import audio, codec_weights, training_desk
from pipeline.codec_pools import make_pools
from pipeline.codec_training import train
from pipeline.speech_pool import Augmentation, SpeechPool
from pipeline.train_codec_config import TrainCodecConfig

SMALL = dict(
    name="tiny", filters=4, ratios=(5, 4, 4), dimension=8, lstm_layers=0, codebooks=2, codebook_size=16, batch=2,
    segment=0.2, warmup=2, quantise_from=3, log_every=2, save_every=2, evaluate_every=100, tracking="none", threads=1,
    device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        time = np.arange(24_000) / 24_000
        wave = 0.1 * sum(np.sin(2 * np.pi * k * rng.uniform(90, 200) * time) / k for k in range(1, 9))
        soundfile.write(folder / f"{number}.wav", wave + 0.003 * rng.standard_normal(len(time)), 24_000)
        rows.append({"id": f"{number}", "audio": f"{number}.wav", "text": "a", "speaker": "s", "split": "train"})
    rows[4]["split"] = "heldout"
    rows.append({"id": "gone", "audio": "gone.wav", "text": "a", "speaker": "s", "split": "train"})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return manifest


def settings(corpus: Path, folder: Path, /, **values) -> TrainCodecConfig:
    return TrainCodecConfig(**({"data": str(corpus), "output": str(folder), "steps": 6} | SMALL | values))


def test_cut_off_and_resumed_ends_in_the_same_weights(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    train(settings(corpus, tmp_path / "whole"))
    steps = SpeechPool.batch

    def dies_at_step_5(pool, seed, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return steps(pool, seed, step, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SpeechPool, "batch", dies_at_step_5)
        train(settings(corpus, tmp_path / "cut"))
    train(settings(corpus, tmp_path / "cut"))
    whole, cut = (Codec.load(tmp_path / name / "export") for name in ("whole", "cut"))
    assert whole.digest == cut.digest
    assert whole.encode([np.zeros(4000, np.float32)])[0].shape == (2, 50)


def test_a_job_that_is_told_to_end_keeps_what_it_reached(corpus: Path, tmp_path: Path, project: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALL | {"save_every": 100_000, "ratios": [5, 4, 4]}))
    command = [sys.executable, str(project / "jobs/train_codec.py"), "--config", str(tmp_path / "config.yaml")]
    command += ["--data", str(corpus), "--output", str(tmp_path / "run")]
    with subprocess.Popen([*command, "--steps", "100000"], stdout=subprocess.PIPE, text=True) as job:
        told = next(line for line in job.stdout if line.startswith("step 4 "))
        assert " left " in told
        job.send_signal(signal.SIGTERM)
        *_, last = job.stdout
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"]
    assert (job.returncode, last) == (
        0,
        f"train_codec: stopped after step {step} of 100000; the same command goes on\n",
    )
    more = subprocess.run([*command, "--steps", str(step + 2)], capture_output=True, text=True)
    steps = [int(line.split()[1]) for line in more.stdout.splitlines() if line.startswith("step ")]
    assert more.returncode == 0 and min(steps) > step, more.stderr


def test_a_storage_that_fails_costs_only_what_it_never_gives(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    read, failed = audio.clean_audio, set()

    def shaky(url: str, *more, **named) -> np.ndarray:
        if url.endswith("1.wav") or url not in failed:
            failed.add(url)
            raise OSError("the storage has a bad moment")
        return read(url, *more, **named)

    monkeypatch.setattr(audio, "clean_audio", shaky)
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    make_pools(settings(corpus, tmp_path))
    facts = json.loads((tmp_path / "data.json").read_text())
    assert facts["rejects"] == {"missing-file": 1, "storage-error": 1}
    assert (facts["utterances"], facts["valid_utterances"]) == (3, 1)  # one is held out


def test_what_a_pass_did_not_get_changes_nothing_for_the_others(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """The first to be read is validated on, whether or not the pass over those to train on could read it."""
    read, asked = audio.clean_audio, []

    def shaky(url: str, *more, **named) -> np.ndarray:
        asked.append(url)
        if url.endswith("0.wav") and asked.count(url) <= 3:
            raise OSError("the storage has a bad moment")
        return read(url, *more, **named)

    make_pools(settings(corpus, tmp_path / "quiet"))
    monkeypatch.setattr(audio, "clean_audio", shaky)
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    make_pools(settings(corpus, tmp_path / "shaky"))
    quiet, other = (json.loads((tmp_path / name / "data.json").read_text()) for name in ("quiet", "shaky"))
    assert other["digest"] == quiet["digest"] and other["rejects"]["storage-error"] == 1


def test_codebooks_can_start_without_a_step(corpus: Path, tmp_path: Path) -> None:
    train(settings(corpus, tmp_path, steps=0, quantise_from=0))
    codec = Codec.load(tmp_path / "export")
    wave = 0.2 * np.sin(np.arange(8000) / 20).astype(np.float32)
    assert len(np.unique(codec.encode([wave])[0][0])) > 3
    assert train(settings(corpus, tmp_path, steps=2, quantise_from=0))["mel"] > 0


def test_a_decoder_trained_further_keeps_the_codes(corpus: Path, tmp_path: Path) -> None:
    train(settings(corpus, tmp_path / "first"))
    export = tmp_path / "first" / "export"
    others = {"name": "other", "filters": 8, "codebooks": 4, "start_from": str(export)}
    train(settings(corpus, tmp_path / "decoder", decoder_only=True, **others))
    train(settings(corpus, tmp_path / "whole", **others))
    first, decoder, whole = (Codec.load(tmp_path / name / "export") for name in ("first", "decoder", "whole"))
    assert first.identity == decoder.identity and first.digest != decoder.digest
    assert whole.config == dataclasses.replace(first.config, name="other")
    assert whole.identity.digest != first.identity.digest


def test_a_transform_codec_and_then_what_is_beside_its_lanes(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """As the configurations of `demo-6k` do it: codebooks without a step, then its decoder."""
    sizes = dict(kernel_size=3, last_kernel_size=3, filters=10, dimension=40, search=4, level=0.1, half_precision=True)
    seen, batch = [], CodecTrainer.step
    monkeypatch.setattr(CodecTrainer, "step", lambda self, audio: [seen.append(audio), batch(self, audio)][1])
    first = settings(corpus, tmp_path / "first", steps=0, quantise_from=0, start_quiet=1.0, start_latents=500, **sizes)
    train(first)
    start = Codec.load(tmp_path / "first" / "export")
    assert (start.config.search, start.config.level) == (4, 0.1)
    further = dict(start_from=str(tmp_path / "first" / "export"), decoder_only=True, keep_lanes=True, segment=0.5)
    train(settings(corpus, tmp_path / "second", half_precision=True, **further))
    learnt = Codec.load(tmp_path / "second" / "export")
    assert learnt.identity == start.identity and learnt.config == start.config and learnt.digest != start.digest
    loudness = torch.cat(seen).pow(2).mean(dim=1).sqrt()
    assert len(loudness) == 12 and 0.03 < loudness.min() < 0.09 < loudness.max() < 0.15
    with pytest.raises(CodecError, match="differ in keep_lanes"):
        train(settings(corpus, tmp_path / "second", **(further | {"keep_lanes": False})))


def test_codecs_of_other_kinds_are_no_start(corpus: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(settings(corpus, tmp_path).codec(), residual_kernel_size=5)
    Codec.random(config).save(tmp_path / "wide")
    with pytest.raises(CodecError, match="residual_kernel_size 5"):
        train(settings(corpus, tmp_path / "run", start_from=str(tmp_path / "wide")))
    with pytest.raises(CodecError, match="no codec"):
        train(settings(corpus, tmp_path / "run", start_from=str(tmp_path / "nothing")))
    assert not (tmp_path / "run").exists()


def test_encodecs_own_weights_can_be_given(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """A small codec stands in for EnCodec's, and is fetched once."""
    Codec.random(settings(corpus, tmp_path).codec()).save(tmp_path / "begin")
    asked, found = [], codec_weights.resolve(str(tmp_path / "begin"))
    monkeypatch.setattr(codec_weights, "resolve", lambda *what: asked.append(what) or found)
    monkeypatch.chdir(tmp_path)
    train(settings(corpus, Path("run"), start_from="encodec_24khz", codec_weights="encodec.th", steps=1))
    assert asked == [("encodec_24khz", str(tmp_path / "encodec.th"))]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["started_from"] == found.digest


def test_a_run_keeps_to_the_codec_that_it_started_from(corpus: Path, tmp_path: Path) -> None:
    config = settings(corpus, tmp_path).codec()
    for seed, name in enumerate(("one", "two")):
        Codec.random(config, seed=seed).save(tmp_path / name)
    one, two = ({"start_from": str(tmp_path / name)} for name in ("one", "two"))
    train(settings(corpus, tmp_path / "run", steps=2, **one))
    with pytest.raises(CodecError, match=r"started from the weights [0-9a-f]{12}….* not from those of .*two"):
        train(settings(corpus, tmp_path / "run", **two))
    train(settings(corpus, tmp_path / "run", steps=4))  # not named: goes on, where that codec has gone, too
    train(settings(corpus, tmp_path / "run", **one))
    train(settings(corpus, tmp_path / "random", steps=4))
    with pytest.raises(CodecError, match="random weights"):
        train(settings(corpus, tmp_path / "random", **one))


def test_corpora_are_opened_as_tokenize_opens_them(corpus: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.txt"
    table.write_text("audio\n0.wav\n1.wav\n2.wav\n", encoding="utf-8")
    named = {"kind": "csv", "audio_root": str(corpus.parent)}
    make_pools(settings(table, tmp_path / "table", **named))
    recordings = {"corpus": "librilight", "root": str(corpus.parent)}
    make_pools(settings(tmp_path / "not-read", tmp_path / "folder", **recordings))
    facts = [json.loads((tmp_path / name / "data.json").read_text()) for name in ("table", "folder")]
    assert [made["manifest"]["kind"] for made in facts] == ["csv", "librilight"]
    assert [(made["utterances"], made["valid_utterances"]) for made in facts] == [(2, 1), (5, 1)]


def test_pools_leave_out_what_is_held_out_or_unusable(corpus: Path, tmp_path: Path) -> None:
    make_pools(settings(corpus, tmp_path))
    facts = json.loads((tmp_path / "data.json").read_text())
    assert facts["utterances"] == 4 and facts["valid_utterances"] == 1 and facts["rejects"] == {"missing-file": 1}


def test_what_comes_first_need_not_be_usable(corpus: Path, tmp_path: Path) -> None:
    *rows, gone = map(json.loads, corpus.read_text().splitlines())
    manifest = corpus.parent / "late.jsonl"
    manifest.write_text("\n".join(map(json.dumps, (rows[4], gone, *rows[:2]))), encoding="utf-8")
    make_pools(settings(manifest, tmp_path / "two"))
    facts = json.loads((tmp_path / "two" / "data.json").read_text())
    assert (facts["utterances"], facts["valid_utterances"], facts["rejects"]) == (1, 1, {"missing-file": 1})
    manifest.write_text("\n".join(map(json.dumps, (gone, rows[0]))), encoding="utf-8")
    with pytest.raises(CodecError, match=r"two utterances are the least; rejects \{'missing-file': 1\}"):
        make_pools(settings(manifest, tmp_path / "one"))


def test_a_corpus_may_move_but_not_change(corpus: Path, tmp_path: Path) -> None:
    moved = corpus.parent / "moved.jsonl"
    moved.write_bytes(corpus.read_bytes())
    run = settings(moved, tmp_path / "run")
    make_pools(settings(corpus, tmp_path / "run"))
    make_pools(run)
    moved.write_text("\n".join(corpus.read_text().splitlines()[:3]), encoding="utf-8")
    with pytest.raises(CodecError, match=r"sha256.*another --output, or delete .*data\.json"):
        make_pools(run)
    (tmp_path / "run" / "data.json").unlink()
    make_pools(run)
    assert json.loads((tmp_path / "run" / "data.json").read_text())["utterances"] == 2


def test_what_a_run_tracks(corpus: Path, tmp_path: Path, tracking_uri: str) -> None:
    import mlflow

    train(settings(corpus, tmp_path / "run", tracking=tracking_uri))
    train(settings(corpus, tmp_path / "run", tracking=tracking_uri, steps=8))
    client = mlflow.MlflowClient(tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("codec").experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "mel")] == [2, 4, 6, 8]
    assert run.data.metrics["valid.perplexity.1"] >= 1
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"listen", "spectrograms"}


def test_two_ray_workers_share_one_codec(
    corpus: Path, tmp_path: Path, local_ray, tracking_uri: str, monkeypatch
) -> None:
    """All paths are relative ones, which are the caller's."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    database = os.path.relpath(tracking_uri.removeprefix("sqlite:///"))
    Codec.random(settings(corpus, tmp_path).codec()).save(tmp_path / "begin")
    paths = {"start_from": "begin", "tracking": f"sqlite:///{database}"}
    train(settings(Path(os.path.relpath(corpus)), Path("two"), workers=2, **paths))
    client = mlflow.MlflowClient(tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("codec").experiment_id])
    assert run.info.status == "FINISHED"
    assert Codec.load(tmp_path / "two" / "export").identity.name == "tiny"
    state = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6


def test_workers_that_are_asked_to_stop_end_together(corpus: Path, tmp_path: Path, local_ray, monkeypatch) -> None:
    @contextmanager
    def at_once(job, ask):
        ask()
        yield

    monkeypatch.setattr(training_desk, "on_term", at_once)
    reached = train(settings(corpus, tmp_path, workers=2, steps=100_000, save_every=100_000))
    assert 0 < reached["step"] < 100_000
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == reached["step"]


def test_workers_are_not_started_again_for_what_would_come_again(corpus: Path, tmp_path: Path, local_ray) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CodecError, match="no checkpoint"):
        train(settings(corpus, tmp_path, workers=2))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"batch": 3, "workers": 2}, "workers"),
        ({"segment": 0.001}, "two frames"),
        ({"steps": -1}, "steps"),
        ({"steps": 3}, "quantise_from 3 must be below steps 3"),
        ({"steps": 0}, "quantise_from 3 must be below steps 0"),
        ({"filters": 0}, "filters"),
        ({"decoder_only": True}, "start_from"),
        ({"keep_lanes": True}, "keep_lanes needs decoder_only"),
        ({"search": 0}, "search must be a whole number"),
        ({"level": 2.0}, "level must be a number from 0 to 0.5"),
        ({"codec_weights": "x.th"}, "codec_weights needs start_from encodec_24khz"),
        ({"corpus": "vctk"}, "root is missing"),
        ({"full_depth": 0.7, "first_alone": 0.4}, "one whole"),
        ({"output": "s3://bucket/run"}, "mounted"),
    ],
)
def test_impossible_settings_are_refused(corpus: Path, tmp_path: Path, values: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(corpus, tmp_path, **values)


def test_checkpoints_of_others_are_refused(corpus: Path, tmp_path: Path) -> None:
    train(settings(corpus, tmp_path, steps=4))
    with pytest.raises(CodecError, match="architecture"):
        train(settings(corpus, tmp_path, filters=8))
    (tmp_path / "checkpoint.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CodecError, match="no checkpoint"):
        train(settings(corpus, tmp_path))


def test_batches_are_a_function_of_seed_step_and_worker() -> None:
    rng = np.random.default_rng(0)
    pool = SpeechPool((3000 * rng.standard_normal(90_000)).astype(np.int16), np.array([40_000, 41_000, 90_000]), 24_000)
    always = Augmentation(speed=1, band=1, noise=1, room=1, second_voice=1)
    for varied in (None, Augmentation(), always):
        first = pool.batch(1, 7, 0, 3, 4800, varied)
        assert first.shape == (3, 4800) and first.dtype == np.float32 and np.isfinite(first).all()
        assert np.abs(first).max() <= 1
        np.testing.assert_array_equal(first, pool.batch(1, 7, 0, 3, 4800, varied))
        for other in ((2, 7, 0), (1, 8, 0), (1, 7, 1)):
            assert not np.array_equal(first, pool.batch(*other, 3, 4800, varied))


UNVARIED = Augmentation(speed=0, band=0, noise=0, room=0, second_voice=0, lowest_level=-1)
"""Segments as they were recorded, but for a peak of -1 dB."""
RATE = 24_000


def pool_of(*waves: np.ndarray) -> SpeechPool:
    samples = [np.round(32_767 * wave).astype(np.int16) for wave in waves]
    return SpeechPool(np.concatenate(samples), np.cumsum([len(wave) for wave in samples]), RATE)


def varied(pool: SpeechPool, samples: int, rows: int = 100, **chances: float) -> np.ndarray:
    """[rows, samples] with nothing varied but what is named."""
    return pool.batch(0, 1, 0, rows, samples, dataclasses.replace(UNVARIED, **chances))


def tone(frequency: float, samples: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(samples) / RATE)


def hiss(samples: int = 4800) -> np.ndarray:
    return np.random.default_rng(5).uniform(-0.5, 0.5, samples)


def decibels(ratio: np.ndarray) -> np.ndarray:
    return 10 * np.log10(ratio)


@pytest.mark.parametrize("name", ["speed", "band", "noise", "room"])
def test_segments_are_varied_as_often_as_asked(name: str) -> None:
    pool = pool_of(hiss())
    recorded = pool.utterance(0) * 10 ** (-1 / 20) / np.abs(pool.utterance(0)).max()
    for chance in (0.0, 0.3, 1.0):
        rows = varied(pool, 4800, rows=300, **{name: chance})
        changed = np.abs(rows - recorded).max(axis=1) > 1e-5
        assert changed.mean() == pytest.approx(chance, abs=0.1 * (0 < chance < 1))


def test_levels_are_spread_evenly_and_are_all_that_changes() -> None:
    pool = pool_of(hiss())
    rows = varied(pool, 4800, rows=300, lowest_level=-20)
    peaks = np.abs(rows).max(axis=1)
    levels = 2 * decibels(peaks)
    assert -20.01 < levels.min() < -19 and -2 < levels.max() < -0.99
    assert levels.mean() == pytest.approx(-10.5, abs=1.3) and levels.std() == pytest.approx(19 / 12**0.5, abs=0.8)
    recorded = pool.utterance(0) / np.abs(pool.utterance(0)).max()
    np.testing.assert_allclose(rows / peaks[:, None], np.tile(recorded, (300, 1)), atol=1e-5)


def test_another_speed_moves_the_pitch() -> None:
    pool = pool_of(tone(1000, 2 * RATE))
    spectra = np.abs(np.fft.rfft(varied(pool, RATE // 2, speed=1) * np.hanning(RATE // 2)))
    octaves = np.log2(2 * spectra.argmax(axis=1) / 1000)
    assert np.abs(octaves).max() < 0.325 and octaves.min() < -0.28 and octaves.max() > 0.28
    assert octaves.mean() == pytest.approx(0, abs=0.08)


def test_noise_fills_the_pauses_10_to_45_db_under_the_speech() -> None:
    pool = pool_of(np.concatenate([tone(1000), np.zeros(RATE)]))
    assert not varied(pool, 2 * RATE, rows=1)[:, RATE:].any()
    rows = varied(pool, 2 * RATE, rows=60, noise=1)
    both, noise = (np.mean(part**2, axis=1) for part in (rows[:, :RATE], rows[:, RATE:]))
    below = decibels((both - noise) / 2 / noise)  # half of the segment is speech
    assert 9 < below.min() < 14 and 41 < below.max() < 46
    power = np.abs(np.fft.rfft(rows[:, RATE:] * np.hanning(RATE))) ** 2
    falls = decibels(power[:, 200:400].mean(axis=1) / power[:, 6400:12_000].mean(axis=1)) / 5
    assert -1 < falls.min() < 0.6 and 5 < falls.max() < 7  # dB an octave


def test_a_room_leaves_a_tail_behind_the_direct_sound() -> None:
    click = np.zeros(RATE)
    click[4800] = 1
    rows = varied(pool_of(click), RATE, rows=60, room=1)
    direct, behind = np.abs(rows[:, 4800]), rows[:, 4801:]
    assert np.abs(rows[:, :4800]).max() < 1e-6 and np.argmax(np.abs(rows), axis=1).tolist() == [4800] * 60
    loudness = np.sqrt((behind**2).sum(axis=1)) / direct
    assert 0.09 < loudness.min() < 0.2 and 0.6 < loudness.max() < 0.71
    first = np.argmax(np.abs(behind) > 1e-5, axis=1) / RATE
    assert 0.0009 < first.min() < 0.003 and 0.008 < first.max() < 0.0105
    early, late = ((behind[:, a : a + 1200] ** 2).sum(axis=1) for a in (480, 1680))
    decays = 60 / (decibels(early / late) / 0.05)  # s to 60 dB down
    assert 0.08 < decays.min() < 0.15 and 0.45 < decays.max() < 0.8


def test_a_narrow_band_loses_what_lies_above_it_and_nothing_else() -> None:
    pool = pool_of(hiss(12_000))
    spectra, whole = (
        np.abs(np.fft.rfft(rows)) for rows in (varied(pool, 12_000, band=1), varied(pool, 12_000, rows=1))
    )
    kept = spectra / whole
    kept /= kept[:, 500:1500].mean(axis=1, keepdims=True)  # bins of 2 Hz
    highest = [2 * np.flatnonzero(row > 0.01).max() for row in kept]
    assert 3400 < min(highest) < 4100 and 8600 < max(highest) < 9001
    np.testing.assert_allclose(kept[:, 50:1700], 1, atol=0.01)


def test_a_second_voice_is_another_utterance_not_louder_than_the_first() -> None:
    pool = pool_of(tone(500, 12_000), tone(2000, 12_000))
    spectra = np.abs(np.fft.rfft(varied(pool, 12_000, second_voice=1)))
    voices = np.sort(spectra[:, [250, 1000]], axis=1)
    two = voices[voices[:, 0] > 0.01 * voices[:, 1]]
    assert 30 < len(two) < 70, "both are drawn from the same two utterances"
    below = 2 * decibels(two[:, 1] / two[:, 0])
    assert below.min() < 2 and 13 < below.max() < 15.01
    alone = np.sort(np.abs(np.fft.rfft(varied(pool, 12_000)))[:, [250, 1000]], axis=1)
    assert (alone[:, 0] < 0.01 * alone[:, 1]).all()
