"""Training and exporting as a user types it: the script is run as it is, and finds its demo by itself."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from model.checkpoint import load
from tests.pipeline.speaking_tokens import write_tokens


def test_the_job_trains_on_the_demo_as_typed(checkout, submit):
    write_tokens(checkout / "data" / "demo" / "tokens", codebook_size=1024)
    demo = checkout / "infra" / "configs" / "pretrain" / "demo.yaml"
    short = {"steps": 4, "save_every": 2, "evaluate_every": 4, "warmup": 2, "min_seconds": 0.1}
    demo.write_text(yaml.safe_dump(yaml.safe_load(demo.read_text()) | short))
    done = submit("jobs/pretrain.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = re.search(
        r"step      4 loss (\S+) \[([\d. ]+)\] grad_norm [\d.]+ lr 5\.00e-04 [\d,]+ tokens/s mfu [\d.]+% "
        r"mem (\S+) GB wait [\d.]+% rows \d+\n",
        done.stdout,
    )
    assert said, done.stdout[-3000:]
    loss, codebooks, memory = float(said[1]), [float(one) for one in said[2].split()], float(said[3])
    assert len(codebooks) == 4 and sum(codebooks) / 4 == pytest.approx(loss, abs=0.02) and memory > 0
    assert "valid.loss" in done.stdout and "pretrain: loss" in done.stdout
    assert "pretrain: 1 worker on cpu (auto: no GPU is up" in done.stdout
    _, card = load(checkout / "data" / "demo" / "model" / "export")
    assert card.training["step"] == 4


def test_a_checkpoint_is_exported_as_typed(checkout):
    run = checkout / "data" / "demo" / "model"
    command = [sys.executable, "jobs/export.py", str(run / "checkpoints" / "step-00000002"), "--output", "out/two"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    _, card = load(checkout / "out" / "two")
    assert card.training["step"] == 2 and card.fingerprint in done.stdout
    assert json.loads((checkout / "out" / "two" / "config.json").read_text())["codec"]["name"] == "random-codes"
