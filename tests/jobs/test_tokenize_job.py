"""The commands as a user types them, in a copy of the project with a cluster of its own."""

import json
import re
import subprocess
import sys
import time

import pytest

from tests.chaos import contents

QUICK = ["--shard-megabytes", "0.05", "--batch-seconds", "12", "--device", "cpu"]


def direct(checkout, *words):
    command = [sys.executable, "jobs/tokenize.py", *words]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=240)


def shards_of(output):
    return {name: digest for name, digest in contents(output).items() if name != "dataset.json"}


def test_a_submitted_job_tokenizes_verifies_and_is_tracked(checkout, submit):
    done = submit(
        *["--", "python", "jobs/tokenize.py", "--input", "corpus/manifest.jsonl", "--output", "out/tokens"],
        *["--codec", "codec", *QUICK],
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "80 of 80 utterances" in done.stdout and "audio" in done.stdout
    verified = submit("--working-dir", ".", "--", "python", "jobs/verify.py", str(checkout / "out/tokens"))
    assert verified.returncode == 0 and "nothing is wrong" in verified.stdout, verified.stdout[-3000:]

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{checkout}/mlflow.db")
    run = client.get_run(json.loads((checkout / "out/tokens/mlflow-run.json").read_text())["run_id"])
    summary = json.loads((checkout / "out/tokens/dataset.json").read_text())
    assert run.info.status == "FINISHED" and run.data.tags["plan"] == summary["plan"]
    assert run.data.metrics["total_samples"] == 80 and run.data.metrics["hours_an_hour"] > 0
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"manifest.jsonl", "tokens"}
    assert {"README.md", "dataset.json", "plots"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_workers_traceback_is_whole_and_its_tokenize_is_pythons(checkout, submit):
    stages = checkout / "pipeline/stages.py"
    code = stages.read_text()
    planted = 'import tokenize, linecache; raise RuntimeError(f"planted; tokenize is {tokenize.__file__}")'
    stages.write_text(re.sub(r'( +)""" *`batches` has columns', rf"\1{planted}\n\g<0>", code, count=1))
    assert planted in stages.read_text()
    try:
        failed = submit(
            *["--", "python", "jobs/tokenize.py", "--input", "corpus/manifest.jsonl", "--output", "out/planted"],
            *["--codec", "codec", "--tracking", "none", *QUICK],
        )
    finally:
        stages.write_text(code)
    assert failed.returncode != 0
    shown = failed.stdout + failed.stderr
    assert 'raise RuntimeError(f"planted; tokenize is {tokenize.__file__}")' in shown, shown[-3000:]
    (path,) = set(re.findall(r"RuntimeError: planted; tokenize is (\S+)", shown))
    assert path.endswith(f"python{sys.version_info[0]}.{sys.version_info[1]}/tokenize.py")
    assert "has no attribute 'open'" not in shown


def test_a_stopped_job_leaves_whole_shards_and_goes_on_where_it_was(checkout, submit):
    command = ["--input", "corpus/manifest.jsonl", "--output", "out/stopped", "--codec", "codec", "--tracking", "none"]
    started = submit("--no-wait", "--submission-id", "stop-me", "--", "python", "jobs/tokenize.py", *command, *QUICK)
    assert started.returncode == 0, started.stderr
    output = checkout / "out/stopped"
    deadline = time.monotonic() + 120
    while not list(output.glob("shards/0*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert submit("stop-me", ray=("job", "stop")).returncode == 0
    left = {path.name for path in (output / "shards").iterdir()}
    for name in left:
        if re.fullmatch(r"\d{6}\.json", name):
            assert {f"{name[:6]}.tar", f"{name[:6]}.index.parquet"} <= left
    done = direct(checkout, *command, *QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert shards_of(output) == shards_of(checkout / "out/tokens")
    assert not [path for path in (output / "shards").iterdir() if ".part-" in path.name]


def test_verify_writes_what_there_is_to_hear_and_fails_on_damage(checkout, submit):
    output = checkout / "out/tokens"
    words = ["jobs/verify.py", "out/tokens", "--samples", "3", "--listen", "out/listen"]
    heard = subprocess.run([sys.executable, *words], cwd=checkout, capture_output=True, text=True, timeout=240)
    assert heard.returncode == 0 and "decoded   3 samples" in heard.stdout, heard.stdout + heard.stderr[-2000:]
    page = (checkout / "out/listen/index.html").read_text()
    assert page.count("<audio") == 6 and len(list((checkout / "out/listen").rglob("*.wav"))) == 6

    tar = output / "shards/000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    try:
        failed = subprocess.run([sys.executable, *words[:2]], cwd=checkout, capture_output=True, text=True, timeout=240)
    finally:
        tar.write_bytes(whole)
    assert failed.returncode == 1 and "fault     000001: the tar's sha256" in failed.stdout, failed.stdout
    none = subprocess.run(
        [sys.executable, *words[:1], "corpus"], cwd=checkout, capture_output=True, text=True, timeout=240
    )
    assert none.returncode == 2 and "no plan.json" in none.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        (["--shard-megabits", "3"], "unrecognized arguments"),
        (["--batch-seconds", "soon"], "batch_seconds must be float"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda"),
        (["--min-seconds", "9", "--max-seconds", "3"], "max_seconds"),
        (["--corpus", "ljspeech"], "root is missing"),
        (["--max-silence", "-0.1"], "max_silence must be at least 0"),
    ],
)
def test_a_wrong_command_is_refused_before_ray_starts(checkout, words, told):
    refused = direct(checkout, *words)
    assert refused.returncode == 2 and told in refused.stderr


def test_what_is_not_there_is_named(checkout):
    refused = direct(checkout, "--input", "no/such.jsonl", "--codec", "codec", "--output", "out/x")
    assert refused.returncode == 2 and "no/such.jsonl" in refused.stderr and "Traceback" not in refused.stderr
    (checkout / "bad.yaml").write_text("shard_megabyte: 3\n")
    refused = direct(checkout, "--config", "bad.yaml")
    assert refused.returncode == 2 and "did you mean 'shard_megabytes'" in refused.stderr


def test_help_is_quick_to_import(checkout):
    """Help must not wait for torch, ray or any other heavy library."""
    code = "import sys; sys.argv = ['x', '--help']; sys.path[0] = '.'\ntry:\n import jobs.tokenize as t; t.main()\n"
    code += "except SystemExit: print(sorted({'torch', 'ray', 'mlflow', 'lhotse', 'pyarrow'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip().endswith("[]"), shown.stdout[-300:] + shown.stderr
