"""Whole training runs on Ray: killed, stopped, resumed on another number of workers, and still the same losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.training_checkpoints import newest
from tests.chaos import finish_run
from tests.pipeline.speaking_tokens import write_sizes, write_tokens

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS, SAVED = 90, 30


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pretrain")
    settings = {
        "data": write_tokens(folder / "tokens"),
        "model": write_sizes(folder),
        "cache": str(folder / "cache"),
        "steps": STEPS,
        "budget": 300,
        "learning_rate": 0.003,
        "warmup": 10,
        "text_dropout": 0.0,
        "valid_fraction": 0.1,
        "save_every": SAVED,
        "evaluate_every": STEPS,
        "keep": 9,
        "min_seconds": 0.1,
        "threads": 1,
        "tracking": f"sqlite:///{folder}/mlflow.db",
    }
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def start(arguments: list[str], output: Path, workers: int, nodes: int | None = None) -> subprocess.Popen:
    words = [*arguments, "--output", str(output), "--workers", str(workers)]
    command = [sys.executable, "-m", "tests.pretrain_run", str(nodes or workers), *words]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def losses(output: Path) -> dict[int, float]:
    """By step, what the run last said of it; a line that is being written does not count."""
    file = output / "losses.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def wait_for(output: Path, step: int, run: subprocess.Popen) -> None:
    while run.poll() is None and max(losses(output), default=0) < step:
        time.sleep(0.02)
    assert run.poll() is None, run.communicate()[0].decode()[-3000:]


def family_of(run: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a run, the oldest first: the first raylet is the head's, which Ray does not survive."""
    return sorted(psutil.Process(run.pid).children(recursive=True), key=psutil.Process.create_time)


def workers_of(run: subprocess.Popen) -> list[psutil.Process]:
    """The two that train, the older first."""
    workers = [process for process in family_of(run) if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2
    return workers


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    """The output of an undisturbed run of two workers on two nodes."""
    output = tmp_path_factory.mktemp("quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")  # the run takes less than the usual ten seconds
        assert finish_run(start(arguments, output, 2)) == 0
    return output


def test_it_learns_validates_exports_and_is_tracked(quiet: Path, arguments: list[str]) -> None:
    from mlflow import MlflowClient

    from model.checkpoint import load

    found = losses(quiet)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < 0.6 * found[1]
    _, card = load(quiet / "export")
    assert card.training["step"] == STEPS and card.codec.name == "random-codes"
    client = MlflowClient(arguments[arguments.index("--tracking") + 1])
    run = client.get_run(json.loads((quiet / "mlflow-run.json").read_text())["run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["fingerprint"] == card.fingerprint
    assert run.data.metrics["loss"] == pytest.approx(found[STEPS])
    assert run.data.metrics["valid.loss"] < 0.6 * found[1] and "mfu" in run.data.metrics
    assert run.data.metrics["system/cpu_utilization_percentage"] > 0
    assert (run.data.params["steps"], run.data.params["learning_rate"]) == (str(STEPS), "0.003")
    (given,) = run.inputs.dataset_inputs
    data, digest = arguments[arguments.index("--data") + 1], card.training["dataset"]
    assert json.loads(given.dataset.source) == {"uri": data} and given.dataset.name == Path(data).name
    assert json.loads(given.dataset.profile) == {"digest": digest} and run.data.tags["dataset"] == digest
    assert client.get_latest_versions(quiet.name)[0].run_id == run.info.run_id
    pictures = client.list_artifacts(run.info.run_id, f"spoken/step-{STEPS:08d}")
    assert any(file.path.endswith(".png") for file in pictures)


def test_the_losses_are_those_that_they_were(quiet: Path) -> None:
    """Golden: a change of the numbers must be meant. Machines round differently, and steps add that up."""
    golden = json.loads(GOLDEN.read_text())
    found = losses(quiet)
    for step, loss in golden.items():
        assert found[int(step)] == pytest.approx(loss, rel=2e-4), f"step {step}"


def test_a_killed_worker_and_a_lost_node_change_no_loss(quiet: Path, arguments: list[str], tmp_path: Path) -> None:
    """The third node stands by, as a cluster that grows would bring it."""
    run = start(arguments, tmp_path, 2, nodes=3)
    wait_for(tmp_path, SAVED + 5, run)
    workers_of(run)[1].kill()
    wait_for(tmp_path, 2 * SAVED + 5, run)
    _, *others = (process for process in family_of(run) if process.name() == "raylet")
    assert len(others) == 2
    owners = [worker.ppid() for worker in workers_of(run)]
    next(raylet for raylet in others if raylet.pid in owners).kill()
    assert finish_run(run) == 0
    assert losses(tmp_path) == losses(quiet)
    exported = [(folder / "export" / "model.safetensors").read_bytes() for folder in (tmp_path, quiet)]
    assert exported[0] == exported[1]


def test_sigterm_writes_a_checkpoint_and_another_number_of_workers_goes_on_from_it(
    quiet: Path, arguments: list[str], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    run = start(arguments, tmp_path, 2)
    wait_for(tmp_path, SAVED + 5, run)
    os.kill(run.pid, signal.SIGTERM)
    assert finish_run(run) == 0
    stopped, expected = newest(str(tmp_path)), losses(quiet)
    assert SAVED + 5 <= stopped.step < STEPS and stopped.facts["world"] == 2
    assert losses(tmp_path) == {step: expected[step] for step in range(1, stopped.step + 1)}
    note = json.loads((tmp_path / "mlflow-run.json").read_text())
    assert finish_run(start(arguments, tmp_path, 1)) == 0
    found = losses(tmp_path)
    assert max(abs(found[step] - expected[step]) for step in range(1, STEPS + 1)) < 1e-5
    assert newest(str(tmp_path)).facts["world"] == 1
    assert json.loads((tmp_path / "mlflow-run.json").read_text()) == note
    client = MlflowClient(arguments[arguments.index("--tracking") + 1])
    steps = [metric.step for metric in client.get_metric_history(note["run_id"], "loss")]
    assert sorted(steps) == list(range(1, STEPS + 1))
