"""Tracking against MLflow itself: its database, its server, and its server's death."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from time import sleep

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from infra import storage
from infra.tracking import TrackingError, _name, resolved, track


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    inner: dict = dataclasses.field(default_factory=lambda: {"a": None, "text": "x" * 7000})


def artefacts(client: mlflow.MlflowClient, run_id: str, folder: str = "") -> set[str]:
    found = client.list_artifacts(run_id, folder)
    return {name for f in found for name in (artefacts(client, run_id, f.path) if f.is_dir else {f.path})}


def test_a_run_keeps_what_it_was_given(tracking_uri: str, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    (tmp_path / "card.md").write_text("# card")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").write_bytes(b"png")
    with track("tokenize", "demo", Settings(), {"plan": "abc"}) as run:
        run.log_metrics({"loss/train": 2.0, "loss@8": 1}, step=1)
        run.log_metrics({"loss/train": 1.0}, step=2)
        run.log_metrics({"odd": math.nan})
        run.log_text("hello", "notes/hello.txt")
        run.log_artifact(str(tmp_path / "card.md"))
        run.log_artifact(str(tmp_path / "plots"), "plots")
        run.log_figure(plt.figure(), "plots/b.png")
        run.log_input("corpus", "f" * 64, "s3://bucket/corpus")
    client = mlflow.MlflowClient(tracking_uri)
    kept = client.get_run(run.run_id)
    assert kept.info.status == "FINISHED" and kept.data.tags["plan"] == "abc"
    assert kept.data.params["sizes"] == "[1, 2]" and kept.data.params["inner.a"] == "None"
    assert kept.data.params["inner.text"].endswith("x… (7000 characters)")
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "loss/train")] == [(1, 2.0), (2, 1.0)]
    assert math.isnan(kept.data.metrics["odd"]) and kept.data.metrics[_name("loss@8")] == 1
    assert artefacts(client, run.run_id) == {"notes/hello.txt", "card.md", "plots/a.png", "plots/b.png"}
    beside = Path(tracking_uri.removeprefix("sqlite:///")).parent
    assert kept.info.artifact_uri.startswith(beside.as_uri()), "artefacts lie beside the database"
    data = kept.inputs.dataset_inputs[0].dataset
    assert (data.name, data.digest) == ("corpus", "f" * 36) and "f" * 64 in data.profile


@pytest.mark.parametrize("remote", [False, True])
def test_a_registered_model_points_at_its_files(tracking_uri: str, tmp_path: Path, bucket: str, remote: bool) -> None:
    export = f"{bucket}/export" if remote else str(tmp_path / "export")
    for name in ("config.json", "model.safetensors"):
        storage.write_text(storage.join(export, name), name)
    with track("pretrain", "night") as run:
        run.log_artifact(storage.join(export, "config.json"), "card")
        run.log_artifact(export, "export")
        run.register_model("lina", "export", {"step": "5"})
    (version,) = mlflow.MlflowClient(tracking_uri).search_model_versions("name='lina'")
    source = Path(version.source.removeprefix("file://"))
    assert {file.name: file.read_text() for file in source.iterdir()} == {
        "config.json": "config.json",
        "model.safetensors": "model.safetensors",
    }
    assert (source.parent / "card" / "config.json").read_text() == "config.json"


def test_a_run_goes_on_under_its_id_and_says_what_changed(tracking_uri: str) -> None:
    client = mlflow.MlflowClient(tracking_uri)
    with pytest.raises(ZeroDivisionError), track("pretrain", "night", {"rate": 0.1, "seed": 1}) as first:
        first.log_metrics({"loss": 3.0}, step=1)
        raise ZeroDivisionError
    assert client.get_run(first.run_id).info.status == "FAILED"
    with track("pretrain", "morning", {"rate": 0.2, "seed": 1, "new": 5}, run_id=first.run_id) as second:
        assert client.get_run(first.run_id).info.status == "RUNNING"
        second.log_metrics({"loss": 2.0}, step=2)
    kept = client.get_run(first.run_id)
    assert second.run_id == first.run_id and kept.info.status == "FINISHED" and kept.info.run_name == "night"
    assert kept.data.params == {"rate": "0.1", "seed": "1", "new": "5"} and kept.data.tags["changed.rate"] == "0.2"
    assert len(client.get_metric_history(first.run_id, "loss")) == 2

    with track("pretrain", "moved", run_id="0" * 32) as third:
        pass
    assert client.get_run(third.run_id).data.tags["continues"] == "0" * 32


def test_ctrl_c_is_told_apart_and_a_child_knows_its_parent(tracking_uri: str) -> None:
    client = mlflow.MlflowClient(tracking_uri)
    with pytest.raises(KeyboardInterrupt), track("enroll", "batch") as parent:
        with track("enroll", "ann", parent=parent.run_id) as child:
            pass
        raise KeyboardInterrupt
    assert client.get_run(parent.run_id).info.status == "KILLED"
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_system_metrics_arrive(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    client = mlflow.MlflowClient(tracking_uri)
    with track("tokenize", "machine", system_metrics=True) as run:
        for _ in range(200):
            sleep(0.1)
            if "system/cpu_utilization_percentage" in client.get_run(run.run_id).data.metrics:
                break
    assert "system/system_memory_usage_percentage" in client.get_run(run.run_id).data.metrics


def test_the_default_is_a_database_in_the_callers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _migrated_database: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.copy(_migrated_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    with track("tokenize", "here") as run:
        run.log_text("x", "x.txt")
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run.run_id).info.status == "FINISHED"
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.glob("mlruns/*/*/*/*")] == [
        f"mlruns/tokenize/{run.run_id}/artifacts/x.txt"
    ]
    assert str(tmp_path) in run.where


def test_a_database_is_the_same_one_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        resolved("sqlite:///mine/m.db")
        == f"sqlite:///{tmp_path}/mine/m.db"
        == resolved(resolved("sqlite:///mine/m.db"))
    )
    assert resolved("none") == "none" and resolved("http://host:5000") == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert resolved("") == f"sqlite:///{tmp_path}/here.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolved("") == f"sqlite:///{tmp_path}/mlflow.db"


def test_none_tracks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with track("tokenize", "nothing", Settings(), tracking="none") as run:
        run.log_metrics({"a": 1})
        run.log_text("x", "x.txt")
        run.set_tags({"a": "b"})
    assert run.run_id == "" and run.where == "not tracked" and list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    job = track("tokenize", "x", tracking="http://me:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"http://…@127.0.0.1:9 cannot be used.*--tracking none"):
        job.__enter__()


@given(st.lists(st.text(min_size=1, max_size=300), unique=True, min_size=1, max_size=4))
def test_every_name_becomes_one_that_mlflow_takes_and_stays_itself(names: list[str]) -> None:
    made = [_name(name) for name in names]
    for name in made:
        _validate_metric_name(name)
        _validate_param_name(name)
        assert len(name) <= 250
    assert len(set(made)) == len(names)


@pytest.mark.parametrize("name", ["loss/train", "codebook 1", "a.b-c_d:e"])
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert _name(name) == name


def server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """`mlflow server` on loopback, answering."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{folder}/s.db", "--artifacts-destination", str(folder / "files")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *places], stdout=log, stderr=log, env=environment, start_new_session=True, cwd=folder
        )
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return process
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, (folder / "server.log").read_text()
            sleep(0.2)
    raise AssertionError((folder / "server.log").read_text())


def end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_server_that_dies_and_returns_costs_no_metric_and_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    running = server(tmp_path, port)
    try:
        with caplog.at_level(logging.WARNING, "infra.tracking"), track("pretrain", "long", tracking=uri) as run:
            run.log_metrics({"loss": 0.0}, step=0)
            run.log_text("before", "before.txt")
            end(running)
            run._sent_at = 0.0
            for step in range(1, 2500):
                run.log_metrics({"loss": float(step)}, step=step)
            run.log_text("lost", "lost.txt")
            assert len([r for r in caplog.records if "the job goes on" in r.message]) == 1, "told once"
            running = server(tmp_path, port)
            run.log_text("after", "after.txt")
        assert "lost 1 files" in caplog.text
        client = mlflow.MlflowClient(uri)
        assert client.get_run(run.run_id).info.status == "FINISHED"
        assert len(client.get_metric_history(run.run_id, "loss")) == 2500
        assert artefacts(client, run.run_id) == {"before.txt", "after.txt"}
        assert run.where.startswith(uri)
    finally:
        end(running)
