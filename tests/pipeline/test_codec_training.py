"""Training a codec from a manifest: pools, resuming after a kill, several workers, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from infra import storage
from model.codec import Codec
from model.codec_config import CodecError
from pipeline import audio, codec_training, codec_weights
from pipeline.codec_pools import make_pools
from pipeline.codec_training import TrainCodecConfig, train
from pipeline.speech_pool import Augmentation, SpeechPool

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
    steps = codec_training.SpeechPool.batch

    def dies_at_step_5(pool, seed, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return steps(pool, seed, step, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(codec_training.SpeechPool, "batch", dies_at_step_5)
        train(settings(corpus, tmp_path / "cut"))
    train(settings(corpus, tmp_path / "cut"))
    whole, cut = (Codec.load(tmp_path / name / "export") for name in ("whole", "cut"))
    assert whole.digest == cut.digest
    assert whole.encode([np.zeros(4000, np.float32)])[0].shape == (2, 50)


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


def test_codecs_of_other_kinds_are_no_start(corpus: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(settings(corpus, tmp_path).codec(), kernel_size=5)
    Codec.random(config).save(tmp_path / "wide")
    with pytest.raises(CodecError, match="kernel_size 5"):
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
    codec_training.make_pools(settings(table, tmp_path / "table", **named))
    recordings = {"corpus": "librilight", "root": str(corpus.parent)}
    codec_training.make_pools(settings(tmp_path / "not-read", tmp_path / "folder", **recordings))
    facts = [json.loads((tmp_path / name / "data.json").read_text()) for name in ("table", "folder")]
    assert [made["manifest"]["kind"] for made in facts] == ["csv", "librilight"]
    assert [(made["utterances"], made["valid_utterances"]) for made in facts] == [(2, 1), (5, 1)]


def test_pools_leave_out_what_is_held_out_or_unusable(corpus: Path, tmp_path: Path) -> None:
    codec_training.make_pools(settings(corpus, tmp_path))
    facts = json.loads((tmp_path / "data.json").read_text())
    assert facts["utterances"] == 4 and facts["valid_utterances"] == 1 and facts["rejects"] == {"missing-file": 1}


def test_what_comes_first_need_not_be_usable(corpus: Path, tmp_path: Path) -> None:
    *rows, gone = map(json.loads, corpus.read_text().splitlines())
    manifest = corpus.parent / "late.jsonl"
    manifest.write_text("\n".join(map(json.dumps, (rows[4], gone, *rows[:2]))), encoding="utf-8")
    codec_training.make_pools(settings(manifest, tmp_path / "two"))
    facts = json.loads((tmp_path / "two" / "data.json").read_text())
    assert (facts["utterances"], facts["valid_utterances"], facts["rejects"]) == (1, 1, {"missing-file": 1})
    manifest.write_text("\n".join(map(json.dumps, (gone, rows[0]))), encoding="utf-8")
    with pytest.raises(CodecError, match=r"two utterances are the least; rejects \{'missing-file': 1\}"):
        codec_training.make_pools(settings(manifest, tmp_path / "one"))


def test_a_corpus_may_move_but_not_change(corpus: Path, tmp_path: Path) -> None:
    moved = corpus.parent / "moved.jsonl"
    moved.write_bytes(corpus.read_bytes())
    run = settings(moved, tmp_path / "run")
    codec_training.make_pools(settings(corpus, tmp_path / "run"))
    codec_training.make_pools(run)
    moved.write_text("\n".join(corpus.read_text().splitlines()[:3]), encoding="utf-8")
    with pytest.raises(CodecError, match=r"sha256.*another --output, or delete .*data\.json"):
        codec_training.make_pools(run)
    (tmp_path / "run" / "data.json").unlink()
    codec_training.make_pools(run)
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
