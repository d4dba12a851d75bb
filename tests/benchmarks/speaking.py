"""How a model says sentences that it never saw: in its own voice, in voices that it learned from, in new ones.

    python tests/benchmarks/speaking.py --corpora data/lm/bodies,data/lm/voices --model data/lm/model/export

Speakers are taken from the demo corpora that the model's data were made of: those of split `train` were heard, those of
`heldout` were not. Each is enrolled by jobs/enroll.py and then says sentences of its own, which jobs/evaluate.py has
transcribed and compared; what has a fault is said again, twice at most. `prompt` goes on from a speaker's recording
instead. Sentences are unseen as far as --corpora tells, so name all of the model's.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import json
import re
import subprocess
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSENT = {"who": "nobody: a synthetic voice", "when": "2026-11-29", "scope": "measurement"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default="data/demo", help="folders of jobs/make_demo_corpus.py, comma-separated")
    parser.add_argument("--model", default="model/weights/lina-demo", help="folder of an exported model")
    parser.add_argument("--codec", default="demo")
    parser.add_argument("--speakers", type=int, default=6, help="of each corpus, heard and new ones each")
    parser.add_argument("--samples", type=int, default=12, help="recordings that a speaker is enrolled from")
    parser.add_argument("--sentences", type=int, default=5, help="that a speaker says")
    parser.add_argument("--steps", type=int, default=20, help="of Initial-State Tuning")
    parser.add_argument("--output", type=Path, default=Path("out/speaking"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [row for folder in options.corpora.split(",") for row in manifest(folder)]
    texts = unseen_sentences({row["text"] for row in rows})
    kinds = {"heard": "train", "new": "heldout"}
    chosen = {kind: speakers_of(rows, split, options) for kind, split in kinds.items()}
    people = [person for group in chosen.values() for person in group]
    say("own", [{"text": text} for text in islice(texts, len(people) * options.sentences // 2)], options)
    enroll(people, options)
    for kind, group in chosen.items():
        items = [asked(person, next(texts)) for person in group for _ in range(options.sentences)]
        say(f"{kind}, prompt", items, options)
        say(f"{kind}, enrolled", items, options, voices=True)


def manifest(folder: str) -> list[dict]:
    """Its rows, with absolute paths and speakers' names that differ between corpora."""
    path = Path(folder).resolve()
    rows = [json.loads(line) for line in (path / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row | {"audio": str(path / row["audio"]), "speaker": f"{path.name}-{row['speaker']}"} for row in rows]


def unseen_sentences(seen: set[str]):
    """Sentences of 4 to 14 words out of the corpora's grammar that none of their utterances holds."""
    from pipeline.demo_text import sentences

    heard = " ".join(seen)
    for text in sentences(seed=999):
        if 4 <= len(text.split()) <= 14 and not re.search(r"[.!?] ", text) and text not in heard:
            yield text


def speakers_of(rows: list[dict], split: str, options: argparse.Namespace) -> list[dict]:
    """The first speakers of each corpus, as lines for jobs/enroll.py."""
    samples: dict[str, list[dict]] = {}
    for row in rows:
        if row["split"] == split:
            samples.setdefault(row["speaker"], []).append({"audio": row["audio"], "text": row["text"]})
    chosen: list[str] = []
    for corpus in dict.fromkeys(name.split("-")[0] for name in samples):
        names = [name for name in samples if name.split("-")[0] == corpus]
        chosen += names[: options.speakers]
    return [{"speaker": name, "samples": samples[name][: options.samples], "consent": CONSENT} for name in chosen]


def enroll(people: list[dict], options: argparse.Namespace) -> None:
    listed = write(options.output / "speakers.jsonl", people)
    run("enroll.py", speakers=listed, model=options.model, output=options.output / "voices", steps=options.steps)


def say(name: str, items: list[dict], options: argparse.Namespace, voices: bool = False) -> None:
    """Says and judges, in enrolled voices or not; prints the rows of the report."""
    folder = options.output / re.sub(r"\W+", "-", name)
    hidden = () if voices else ("voice",)
    lines = [{"id": f"{n:03d}"} | {k: v for k, v in item.items() if k not in hidden} for n, item in enumerate(items)]
    listed = write(options.output / f"{folder.name}.jsonl", lines)
    arguments = {"voices": options.output / "voices" / "shared"} if voices else {}
    printed = run("evaluate.py", set=listed, model=options.model, codec=options.codec, output=folder, **arguments)
    print(f"{name} ({len(items)} sentences)\n{printed}\n", flush=True)


def asked(person: dict, text: str) -> dict:
    """An item in somebody's voice, whose first recording is the prompt, and what the result is compared with."""
    first = person["samples"][0]
    return {"text": text, "voice": person["speaker"], "prompt": first["audio"], "prompt_text": first["text"]}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(job: str, **options: object) -> str:
    """The output of one of jobs/, which must succeed."""
    arguments = [f"--{name}={value}" for name, value in options.items()] + ["--tracking", "none"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / job), *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
