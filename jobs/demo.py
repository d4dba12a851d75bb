#!/usr/bin/env python
"""The whole chain on this machine, with nothing but what the packages and this repository bring.

    python jobs/demo.py

A small corpus is synthesised and tokenized, a model is trained on it for a few steps, two speakers that the embedded
model never heard are enrolled, say a sentence, and are judged; data/demo/index.html shows it. What is typed is printed;
the same command again makes what is missing. Exit codes: 0 done; 3 done, but a voice is missing, which the page says;
otherwise that of the command that failed.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import shlex
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPEAKERS = 2
INCOMPLETE = 3
"""Exit code of a command that did what it could."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="data/demo", help="folder of everything (default: data/demo)")
    parser.add_argument("--skip-training", action="store_true", help="leave out the few steps of training")
    arguments = parser.parse_args()

    from pipeline import demo_chain

    folder, steps = arguments.output, []
    first = [
        ("a corpus", ["jobs/make_demo_corpus.py", "--engine", "hibari", "--output", folder]),
        ("tokens", ["jobs/tokenize.py", "--input", f"{folder}/manifest.jsonl", "--codec", "demo"]),
    ]
    first[1][1].extend(["--output", f"{folder}/tokens"])
    if not arguments.skip_training:
        config = os.path.join(ROOT, "infra", "configs", "pretrain", "demo.yaml")
        words = ["--config", config, "--data", f"{folder}/tokens", "--output", f"{folder}/model"]
        first.append(("a model, for a few steps", ["jobs/pretrain.py", *words]))
    for what, words in first:
        if code := typed(what, words, steps):
            return code
    people, said = demo_chain.write_inputs(folder, demo_chain.unseen_speakers(folder, SPEAKERS))
    voices, judged = f"{folder}/voices", f"{folder}/evaluation"
    from pipeline.enroll_config import SHARED
    from pipeline.synthesize_config import DEMO_MODEL

    last = [
        ("two voices, enrolled", ["jobs/enroll.py", "--speakers", people, "--output", voices]),
        ("two sentences, said and judged", ["jobs/evaluate.py", "--set", said, "--model", DEMO_MODEL]),
    ]
    last[1][1].extend(["--voices", f"{voices}/{SHARED}", "--codec", "demo", "--output", judged])
    codes = []
    for what, words in last:
        codes.append(typed(what, words, steps))
        if codes[-1] not in (0, INCOMPLETE):
            return codes[-1]
    print(demo_chain.times(steps))
    print(f"open      {demo_chain.write_page(folder, judged, steps)}")
    return max(codes)


def typed(what: str, words: list[str], steps: list) -> int:
    """Runs a command of the project, printed as a person would type it; notes its time; returns its exit code."""
    from pipeline.demo_chain import Step

    words = [os.path.relpath(word) if os.path.isabs(word) else word for word in words]
    command = shlex.join(["python", *words])
    print(f"\n— {what}\n$ {command}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *words[1:]], check=False).returncode
    steps.append(Step(what, command, time.monotonic() - start))
    return code


if __name__ == "__main__":
    sys.exit(main())
