"""Tokenizes on a Ray cluster of several nodes while something is killed; the bytes must be those of a quiet run.

    python -m tests.chaos --times 100          # 100 random kills of drivers, workers and nodes, each compared
    python -m tests.chaos --seed 17            # one of them again

A run is a process of its own that starts a cluster of three one-CPU nodes and tokenizes a small corpus on it. The
victim is killed from outside, with SIGKILL, at a random moment; then the same command runs until it succeeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.ray_sessions import cluster_of

VICTIMS = ("driver", "worker", "node")
ROOT = Path(__file__).resolve().parents[1]
SHARDS = 8


def contents(output: Path) -> dict[str, str]:
    """sha256 of every file that is a function of the plan."""
    files = [p for name in ("shards", "quarantine") for p in (output / name).iterdir()] + [output / "dataset.json"]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def start_run(arguments: list[str], nodes: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.chaos", "--run", str(nodes), *arguments]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish_run(run: subprocess.Popen, patience: float = 300.0) -> int:
    """The exit code; raises with the output when a run hangs."""
    try:
        output, _ = run.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        end(run)
        raise AssertionError(f"a run hung: {run.communicate()[0].decode()[-3000:]}") from None
    if run.returncode not in (0, -signal.SIGKILL):
        told = [line for line in output.decode().splitlines() if "[state-dump]" not in line]  # of a killed raylet
        print("\n".join(told)[-6000:], file=sys.stderr)
    return run.returncode


def end(run: subprocess.Popen) -> None:
    """Kills a run's driver and whatever it leaves behind."""
    family = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()


def disturb(arguments: list[str], output: Path, victims: Sequence[str], chance: random.Random, nodes: int = 3) -> str:
    """One run with kills in it, and runs until one succeeds; returns what was done."""
    run = start_run(arguments, nodes)
    told = []
    for victim, shards in zip(victims, sorted(chance.sample(range(SHARDS - 1), len(victims))), strict=True):
        while run.poll() is None and len(list(output.glob("shards/0*.json"))) < shards:
            time.sleep(0.02)
        # Without a shard: some moment of starting, planning or first decoding
        delay = chance.uniform(0.0, 1.5 if shards else 12.0)
        time.sleep(delay)
        told.append(f"{_kill(run, victim, chance)} killed {delay:.1f} s after {shards} shards")
    what = ", ".join(told)
    code = finish_run(run)
    again = 0
    while code != 0 and again < 3:
        again += 1
        code = finish_run(start_run(arguments, nodes))
    assert code == 0, f"the run did not succeed: {what}"
    return f"{what}, {again} runs more"


def _kill(run: subprocess.Popen, victim: str, chance: random.Random) -> str:
    if run.poll() is not None:
        return "nobody (it had finished)"
    if victim == "driver":
        end(run)
        return "driver"
    family = psutil.Process(run.pid).children(recursive=True)
    if victim == "node":
        raylets = sorted((p for p in family if p.name() == "raylet"), key=lambda p: p.create_time())
        chosen = raylets[1:]  # the first is the head's, which Ray does not survive
    else:
        chosen = [p for p in family if "MapBatches" in _title(p)] or [
            p for p in family if _title(p).startswith("ray::")
        ]
    if not chosen:
        return f"nobody (no {victim} was there yet)"
    process = chance.choice(chosen)
    name = _title(process)[:40]
    process.send_signal(signal.SIGKILL)
    return f"{victim} {name}"


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""


def _run(nodes: int, arguments: list[str]) -> int:
    """What a run's process does: a cluster of `nodes` on loopback, and the job on it."""
    from infra import config
    from jobs.tokenize import tokenize
    from pipeline.tokenize_config import TokenizeConfig

    parser = argparse.ArgumentParser()
    config.add_arguments(parser, TokenizeConfig)
    settings = config.from_arguments(TokenizeConfig, parser.parse_args(arguments))
    with cluster_of(nodes):
        return tokenize(settings, False, False)


def main() -> int:
    from tests.corpora import write_codec, write_corpus

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        fixed = ["--input", str(write_corpus(work / "corpus", 140)), "--codec", write_codec(work / "codec")]
        fixed += SETTINGS
        assert finish_run(start_run([*fixed, "--output", str(work / "quiet")], 3)) == 0
        expected = contents(work / "quiet")
        for number in range(options.times):
            chance = random.Random(options.seed + number)
            output = work / f"run-{number}"
            what = disturb([*fixed, "--output", str(output)], output, [chance.choice(VICTIMS)], chance)
            same = contents(output) == expected
            print(json.dumps({"seed": options.seed + number, "what": what, "same": same}), flush=True)
            if not same:
                return 1
    return 0


SETTINGS = ["--tracking", "none", "--device", "cpu", "--shard-megabytes", "0.05", "--batch-seconds", "12"]

if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(_run(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
