"""From a manifest to a verified dataset on a real Ray, and again, whatever happened in between."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from safetensors.torch import load, save

from jobs.tokenize import tokenize
from model.codec import Codec
from model.codec_config import CodecError
from pipeline import samples, tokenization, verification
from pipeline.finalize import read_summary
from pipeline.plan import PlanError
from pipeline.tokenize_config import TokenizeConfig
from tests.corpora import write_codec, write_corpus
from tests.pipeline.bad_input import write_bad_corpus

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return write_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """140 utterances: two shards of 70 at the smallest, more with a smaller shard size."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 140)


def config_of(corpus, output, codec, **fields):
    defaults = {"input": str(corpus), "output": str(output), "codec": codec, "tracking": "none"}
    return TokenizeConfig(**defaults | {"shard_megabytes": 0.05, "batch_seconds": 12.0, "device": "cpu"} | fields)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, codec, local_ray):
    output = tmp_path_factory.mktemp("undisturbed") / "tokens"
    assert tokenize(config_of(corpus, output, codec), False, False) == 0
    return output


def contents(output: Path) -> dict[str, bytes]:
    """Every file that a shard's work leaves."""
    files = [path for name in ("shards", "quarantine") for path in sorted((output / name).iterdir())]
    return {str(path.relative_to(output)): path.read_bytes() for path in files} | {
        "dataset.json": (output / "dataset.json").read_bytes()
    }


def faults_of(output):
    plan = verification.load_plan(str(output))
    return verification.verify(plan, str(output), lambda checked: None)


def test_every_utterance_is_in_a_shard_and_verifies(undisturbed, codec):
    summary = read_summary(str(undisturbed))
    assert summary["samples"] == summary["utterances"] == 140 and len(summary["shardlist"]) > 4
    plan = verification.load_plan(str(undisturbed))
    assert faults_of(undisturbed) == []
    spread = list(samples.sample_spread(plan, str(undisturbed), 9))
    assert len(spread) == 9
    assert verification.check_decoding(spread, samples.codec_of(plan)) == []
    assert abs(len(samples.original(plan, spread[0])) / 24_000 - spread[0].meta["seconds"]) < 1e-4
    assert "140 of 140" in (undisturbed / "README.md").read_text()
    assert (undisturbed / "plots/spectrograms.png").stat().st_size > 10_000


def test_running_again_does_nothing(undisturbed, corpus, codec):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert tokenize(config_of(corpus, undisturbed, codec), False, False) == 0
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}


def test_other_actors_and_another_place_give_the_same_bytes(tmp_path, undisturbed, corpus, codec):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in corpus.parent.iterdir():
        os.link(path, moved / path.name)
    config = config_of(moved / corpus.name, tmp_path / "tokens", codec, codec_actors=1, wave_batches=16)
    assert tokenize(config, False, False) == 0
    mine, theirs = contents(tmp_path / "tokens"), contents(undisturbed)
    assert mine == theirs


def test_what_is_missing_is_made_again_and_nothing_else(tmp_path, undisturbed, corpus, codec):
    output = shutil.copytree(undisturbed, tmp_path / "tokens")
    config = config_of(corpus, output, codec)
    (output / "shards/000001.json").unlink()
    (output / "shards/000001.tar").write_bytes(b"half a tar")
    (output / "shards/.000002.tar.part-deadbeef").write_bytes(b"left by a killed writer")
    (output / "shards/000003.index.parquet").unlink()
    (output / "shards/000003.json").unlink()
    kept = (output / "shards/000002.tar").stat().st_mtime_ns
    assert [fault.where for fault in faults_of(output)] == ["000001", "000003"]
    assert tokenize(config, False, False) == 0
    assert contents(output) == contents(undisturbed)
    assert (output / "shards/000002.tar").stat().st_mtime_ns == kept


def test_verify_names_what_is_damaged(tmp_path, undisturbed):
    output = shutil.copytree(undisturbed, tmp_path / "tokens")
    assert faults_of(output) == []
    data = bytearray((output / "shards/000002.tar").read_bytes())
    data[700] ^= 1
    (output / "shards/000002.tar").write_bytes(data)
    faults = faults_of(output)
    assert faults and {fault.where for fault in faults} == {"000002"} and "sha256" in faults[0].what


@pytest.mark.parametrize(
    "change, told", [({"codebooks": 4}, "codebooks: 8 → 4"), ({"min_seconds": 0.5}, "min_seconds")]
)
def test_a_changed_configuration_is_refused_with_what_differs(undisturbed, corpus, codec, change, told):
    with pytest.raises(PlanError, match=told):
        tokenize(config_of(corpus, undisturbed, codec, **change), False, False)


@pytest.fixture(scope="module")
def other_codec(codec, tmp_path_factory):
    """`codec` with other random weights, and the same in all else that an identity tells."""
    folder = tmp_path_factory.mktemp("other-codec")
    config = Codec.load(codec).config
    Codec.random(dataclasses.replace(config, name=config.name.removeprefix("random-for-tests-")), seed=1).save(folder)
    return str(folder)


def test_another_codec_makes_and_decodes_nothing_of_a_dataset(undisturbed, corpus, codec, other_codec):
    before, mine, other = (contents(undisturbed), *(Codec.load(c).identity.digest for c in (codec, other_codec)))
    told = f"codec digest: '{mine}' → '{other}'"
    with pytest.raises(PlanError, match=f"planned otherwise; choose another --output, or undo:\\n  {told}$"):
        tokenize(config_of(corpus, undisturbed, other_codec), False, False)
    assert contents(undisturbed) == before
    plan = verification.load_plan(str(undisturbed))
    with pytest.raises(CodecError, match=f"made with another codec; name that one with --codec: {told}$"):
        samples.codec_of(plan, other_codec)


def test_a_codec_may_move_and_its_decoder_may_change(tmp_path, undisturbed, corpus, codec):
    """Codes stay what they are, so nothing is made again."""
    moved = Codec.load(shutil.copytree(codec, tmp_path / "moved"))
    weights = load(moved.weights)
    weights["decoder.model.0.conv.conv.bias"] += 0.1
    Codec(moved.config, save(weights)).save(tmp_path / "moved")
    before = contents(undisturbed)
    assert tokenize(config_of(corpus, undisturbed, str(tmp_path / "moved")), False, False) == 0
    assert contents(undisturbed) == before
    plan = verification.load_plan(str(undisturbed))
    assert samples.codec_of(plan, str(tmp_path / "moved")).digest != moved.digest


def test_a_shard_of_another_codec_is_a_fault(tmp_path, undisturbed, other_codec):
    output = shutil.copytree(undisturbed, tmp_path / "tokens")
    sidecar = output / "shards/000001.json"
    facts = json.loads(sidecar.read_text())
    assert facts["codec"] == verification.load_plan(str(output)).codec
    sidecar.write_text(json.dumps(facts | {"codec": Codec.load(other_codec).identity.to_dict()}))
    (fault,) = faults_of(output)
    assert fault.where == "000001" and "made with another codec than the plan's" in fault.what


def test_a_changed_manifest_is_refused(tmp_path, undisturbed, corpus, codec):
    changed = shutil.copytree(corpus.parent, tmp_path / "corpus", copy_function=os.link) / corpus.name
    changed.unlink()
    changed.write_text(corpus.read_text().replace("spk0/0000", "spk0/other"))
    with pytest.raises(PlanError, match="manifest sha256"):
        tokenize(config_of(changed, undisturbed, codec), False, False)


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, corpus, codec, capsys):
    assert tokenize(config_of(corpus, tmp_path / "tokens", codec), True, False) == 0
    assert "140 utterances" in capsys.readouterr().out
    assert tokenize(config_of(corpus, tmp_path / "tokens", codec, device="auto"), True, False) == 0
    assert "on cpu (auto: no GPU is up; --device cuda waits for one)" in capsys.readouterr().out.splitlines()[0]
    assert not (tmp_path / "tokens").exists()


def test_codec_actors_ask_for_gpus_where_the_codec_runs_on_them(tmp_path, corpus, codec):
    from pipeline import codec_weights, tokenization
    from pipeline.stages import Job

    config = config_of(corpus, tmp_path, codec, device="cuda", codec_gpus=0.5)
    identity = codec_weights.resolve(codec).identity.to_dict()
    stage = tokenization.graph(Job(config, "", "", (), identity, {}), None, [(0, 0)])._logical_plan.dag
    asked = {}
    while stage.input_dependencies:
        asked[stage.name] = stage.ray_remote_args.get("num_gpus", 0)
        (stage,) = stage.input_dependencies
    assert asked.pop("MapBatches(Encode)") == 0.5 and set(asked.values()) == {0}


@pytest.mark.parametrize(
    "up, limits, device, fields, expected",
    [
        ({"CPU": 8.0}, None, "cpu", {}, (10, 10)),
        ({"CPU": 1.0}, None, "cpu", {}, (1, 1)),
        ({"GPU": 2.0}, None, "cuda", {}, (2, 2)),
        ({}, None, "cuda", {}, (100, 1)),
        ({}, None, "cpu", {}, (100, 1)),
        ({}, None, "cuda", {"codec_actors": 7}, (7, 1)),
        ({"CPU": 2.0}, {"CPU": 32, "GPU": 16}, "cuda", {}, (16, 1)),
        ({"CPU": 8.0}, {"CPU": 32}, "cpu", {}, (45, 10)),
    ],
)
def test_codec_actors_grow_with_a_cluster_that_grows(monkeypatch, up, limits, device, fields, expected):
    from ray._private.state import state

    monkeypatch.setattr("ray.cluster_resources", lambda: up)
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: limits)
    config = TokenizeConfig(device=device, **fields)
    strategy = tokenization._codec_resources(config, 100)["compute"]
    assert (strategy.max_size, strategy.initial_size) == expected


def test_more_actors_than_the_cluster_has_room_for_change_nothing(tmp_path, monkeypatch, undisturbed, corpus, codec):
    monkeypatch.setattr(tokenization, "_amounts", lambda kind: (0.0, math.inf))
    assert tokenize(config_of(corpus, tmp_path / "tokens", codec), False, False) == 0
    assert contents(tmp_path / "tokens") == contents(undisturbed)


def test_one_command_makes_what_is_missing_and_retries_its_rejects(tmp_path, codec, monkeypatch, tracking_uri):
    import mlflow

    corpus = write_corpus(tmp_path / "corpus", 130)
    hidden = corpus.parent / "0003.flac"
    audio = hidden.read_bytes()
    hidden.unlink()
    monkeypatch.chdir(corpus.parent)
    config = config_of("manifest.jsonl", tmp_path / "tokens", codec, tracking="")
    assert tokenize(config, False, False) == 0
    before = read_summary(config.output)
    assert before["rejects"] == {"decode/missing-file": 1} and len(before["shardlist"]) > 1
    hidden.write_bytes(audio)
    (tmp_path / "tokens/shards/000001.json").unlink()
    assert tokenize(config, False, True) == 0
    summary = read_summary(config.output)
    assert (summary["samples"], summary["rejects"]) == (130, {})

    client = mlflow.MlflowClient(tracking_uri)
    run = client.get_run(json.loads((tmp_path / "tokens/mlflow-run.json").read_text())["run_id"])
    assert run.data.params["input"] == str(corpus)
    sources = {i.dataset.name: json.loads(i.dataset.source)["uri"] for i in run.inputs.dataset_inputs}
    assert sources["manifest.jsonl"] == str(corpus)
    hours = client.get_metric_history(run.info.run_id, "hours")
    assert max(metric.value for metric in hours) == pytest.approx(summary["hours"], rel=0.01)
    assert max(metric.step for metric in hours) == len(verification.load_plan(config.output).shards)
    latest = [metric.value for metric in hours if metric.step == len(before["shardlist"])]
    assert latest == pytest.approx([before["hours"]] * 2, rel=0.01)


def test_rejects_are_tried_again_and_only_they(tmp_path, codec):
    corpus = write_corpus(tmp_path / "corpus", 30)
    rows = [json.loads(line) | {"duration": None} for line in corpus.read_text().splitlines()]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hidden = {name: (corpus.parent / name).read_bytes() for name in ("0003.flac", "0017.flac", "0021.flac")}
    for name in hidden:
        (corpus.parent / name).unlink()
    config = config_of(corpus, tmp_path / "tokens", codec)
    assert tokenize(config, False, False) == 3
    assert read_summary(config.output)["rejects"] == {"decode/missing-file": 3}
    before = (tmp_path / "tokens/shards/000000.tar").read_bytes()
    for name in ("0003.flac", "0017.flac"):
        (corpus.parent / name).write_bytes(hidden[name])
    config = dataclasses.replace(config, max_reject_fraction=0.5)
    assert tokenize(config, False, True) == 0
    summary = read_summary(config.output)
    assert (summary["samples"], summary["utterances"], summary["rejects"]) == (29, 30, {"decode/missing-file": 1})
    assert (tmp_path / "tokens/shards/000000.tar").read_bytes() == before
    assert faults_of(tmp_path / "tokens") == []
    soundfile.write(corpus.parent / "0021.flac", np.zeros(61 * 16_000), 16_000)
    assert tokenize(config, False, True) == 0
    summary = read_summary(config.output)
    assert (summary["utterances"], summary["rejects"]) == (30, {"plan/too-long": 1})
    assert faults_of(tmp_path / "tokens") == []
    assert tokenize(config, False, True) == 0
    assert read_summary(config.output) == summary, "what planning refused is not taken up twice"


def test_copies_are_found_by_their_audio_and_text(tmp_path, codec):
    corpus = write_corpus(tmp_path / "corpus", 20)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    wave, rate = soundfile.read(corpus.parent / rows[2]["audio"])
    soundfile.write(corpus.parent / "copy.wav", wave, rate)
    rows += [rows[2] | {"id": "copy", "audio": "copy.wav"}, rows[2] | {"id": "other-text", "text": "another sentence."}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(corpus, tmp_path / "tokens", codec)
    assert tokenize(config, False, False) == 0
    lines = "".join(path.read_text() for path in sorted((tmp_path / "tokens/quarantine").glob("0*.jsonl")))
    (reject,) = map(json.loads, lines.splitlines())
    assert (reject["stage"], reject["reason"]) == ("write", "duplicate-audio") and rows[2]["id"] in reject["detail"]
    assert tokenize(config, False, True) == 0, "a copy is not tried again"
    assert read_summary(config.output)["rejects"] == {"write/duplicate-audio": 1}


def test_every_kind_of_bad_input_is_in_the_quarantine_with_its_reason(tmp_path, codec):
    faults = write_bad_corpus(tmp_path / "corpus")
    config = config_of(tmp_path / "corpus/manifest.jsonl", tmp_path / "tokens", codec)
    assert tokenize(config, False, False) == 3, "more than max_reject_fraction was rejected"
    summary = read_summary(config.output)
    assert summary["samples"] == 1 and summary["utterances"] == len(faults)
    lines = [line for path in (tmp_path / "tokens/quarantine").iterdir() for line in path.read_text().splitlines()]
    found = {reject["where"]: (reject["stage"], reject["reason"]) for reject in map(json.loads, lines)}
    expected = {f"manifest.jsonl:{n}": (f.stage, f.reason) for n, f in enumerate(faults, 1) if f.reason}
    assert found == expected and len(lines) == len(expected)
    assert all(json.loads(line)["detail"] for line in lines)
    assert faults_of(tmp_path / "tokens") == []
    assert tokenize(dataclasses.replace(config, max_reject_fraction=1.0), False, False) == 0


def write_long_recording(path, shared_data):
    """Over a minute of real speech with pauses."""
    pieces = [soundfile.read(path)[0] for path in sorted((shared_data / "librispeech-test-other/audio").iterdir())[:8]]
    silence = np.zeros(12_000)
    long = np.concatenate([part for piece in pieces for part in (piece, silence)])
    soundfile.write(path, long, 16_000)
    return long


def test_segments_of_a_retried_recording_are_not_taken_up_again(tmp_path, codec, shared_data):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,audio,speaker\nbook,long.flac,reader\n")
    config = config_of(manifest, tmp_path / "tokens", codec, keep_untranscribed=True, max_reject_fraction=1.0)
    assert tokenize(config, False, False) == 0
    assert read_summary(config.output)["rejects"] == {"decode/missing-file": 1}
    write_long_recording(tmp_path / "long.flac", shared_data)
    assert tokenize(config, False, True) == 0
    summary = read_summary(config.output)
    assert summary["samples"] == summary["utterances"] >= 6 and summary["rejects"] == {}
    assert tokenize(config, False, True) == 0
    assert read_summary(config.output) == summary


def test_recordings_without_text_are_cut_heard_or_kept(tmp_path, codec, shared_data):
    """A recording of over a minute, made of real speech: quarantined, kept in segments, or transcribed."""
    long = write_long_recording(tmp_path / "long.flac", shared_data)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("audio,speaker\nlong.flac,reader\n")
    assert len(long) > 60 * 16_000
    assert tokenize(config_of(manifest, tmp_path / "none", codec), False, False) == 3
    assert set(read_summary(str(tmp_path / "none"))["rejects"]) == {"plan/no-text"}

    kept = config_of(manifest, tmp_path / "kept", codec, keep_untranscribed=True, batch_seconds=60)
    assert tokenize(kept, False, False) == 0
    summary = read_summary(kept.output)
    assert summary["samples"] >= 6 and 0.7 * len(long) / 16_000 < summary["seconds"] <= len(long) / 16_000

    pytest.importorskip("faster_whisper", reason="the asr extra is not installed")
    heard = config_of(manifest, tmp_path / "heard", codec, transcribe="whisper-tiny.en", batch_seconds=60)
    assert tokenize(heard, False, False) == 0
    plan = verification.load_plan(heard.output)
    texts = [s.meta["text"] for s in samples.sample_spread(plan, heard.output, 100)]
    assert len(texts) == summary["samples"] and sum(len(text.split()) for text in texts) > 100


def test_workers_killed_at_random_change_nothing(tmp_path, undisturbed, corpus, codec):
    """SIGKILL to decoding, encoding, collecting and writing processes while they work."""
    chance = random.Random(7)
    over = threading.Event()
    killed = []

    def kill() -> None:
        while not over.wait(chance.uniform(0.5, 2.0)):
            workers = [p for p in psutil.process_iter(["cmdline"]) if _is_worker_of(p, os.getpid())]
            if workers and len(killed) < 5:
                victim = chance.choice(workers)
                killed.append(victim.info["cmdline"][0])
                os.kill(victim.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        deadline = time.monotonic() + 120
        output = tmp_path / "tokens"
        while not len(killed) >= 2 and time.monotonic() < deadline:
            if output.exists():
                for sidecar in (output / "shards").glob("*.json"):
                    sidecar.unlink()
            assert tokenize(config_of(corpus, output, codec), False, False) == 0
    finally:
        over.set()
        thread.join()
    assert len(killed) >= 2
    assert contents(output) == contents(undisturbed)


def _is_worker_of(process: psutil.Process, driver: int) -> bool:
    try:
        title = (process.info["cmdline"] or [""])[0]
        return title.startswith("ray::") and "MapBatches" in title and driver in [p.pid for p in process.parents()]
    except psutil.Error:
        return False
