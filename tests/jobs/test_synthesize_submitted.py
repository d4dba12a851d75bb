"""Synthesizing with `ray job submit`: the job is killed in the middle, and the same command ends what it began."""

import json
import signal
import time

import mlflow
import pytest

from infra import cluster
from infra.tracking import known_run
from pipeline.speech_files import decode
from tests.pipeline.speaking_model import write_speaker, write_voice

LINES = 15
WORDS = ["--script", "lines.jsonl", "--model", "speaking/model", "--codec", "speaking/codec", "--voices", "speaking"]
WORDS += ["--device", "cpu", "--retries", "0", "--chunk", "2", "--rows", "2", "--actors", "1"]
WORDS += ["--max-reject-fraction", "1"]


@pytest.fixture(scope="module")
def typed(checkout, submit):
    model, _ = write_speaker(checkout / "speaking", ends=1.5)
    write_voice(checkout / "speaking" / "ann.safetensors", model)
    rows = [{"id": f"{n:02d}", "text": f"Line number {n}, of some length.", "voice": "ann"} for n in range(LINES)]
    (checkout / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda output, *options: submit(*options, "--", "python", "jobs/synthesize.py", *WORDS, "--output", output)


def kill_in_the_middle(checkout, output, name: str) -> None:
    """Kills every process of the cluster whose command line holds a name, once there is some speech."""
    wait_for(lambda: len(list(output.glob("*.wav"))) >= 3)
    killed = [p for p in cluster.find(checkout).processes() if any(name in word for word in p.cmdline())]
    for process in killed:
        process.send_signal(signal.SIGKILL)
    assert killed and len(list(output.glob("*.wav"))) < LINES


def wait_for(done) -> None:
    deadline = time.monotonic() + 200
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_whatever_is_killed_the_same_is_said_in_the_end(checkout, typed):
    driver, worker = checkout / "driver", checkout / "worker"
    assert typed(driver.name, "--no-wait").returncode == 0
    kill_in_the_middle(checkout, driver, "jobs/synthesize.py")
    done = typed(driver.name)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert typed(worker.name, "--no-wait").returncode == 0
    kill_in_the_middle(checkout, worker, "Speak")
    wait_for((worker / "summary.json").exists)
    made = {file.name: file.read_bytes() for file in driver.glob("*.wav")}
    assert sorted(made) == [f"{n:02d}.wav" for n in range(LINES)]
    assert made == {file.name: file.read_bytes() for file in worker.glob("*.wav")}
    assert all(decode(content)[2].voice == "ann" for content in made.values())
    run = mlflow.MlflowClient(f"sqlite:///{checkout}/mlflow.db").get_run(known_run(str(driver)))
    assert run.info.status == "FINISHED" and run.data.metrics["spoken"] == LINES
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["model"][:36]
