"""The demo's own parts: who is enrolled, what they say, and the page that shows the chain from corpus to voice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from infra import storage
from pipeline.utterances import Unusable

SENTENCE = "Good morning. The old sailor carried a yellow lamp along the river."
CONSENT = {"who": "nobody: a synthetic voice", "when": "2025-01-01", "scope": "demonstrating voice enrollment"}
_LEAST = 2
"""Recordings of a speaker: one to compare with, and others to tune on."""


class Step(NamedTuple):
    """A command of the chain, as it was typed, and how long it took."""

    what: str
    command: str
    seconds: float


def unseen_speakers(corpus: str, count: int) -> dict[str, list[dict[str, Any]]]:
    """The first speakers that were kept aside, with their rows of the manifest.

    Raises:
        Unusable: there are not that many with enough recordings.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for line in storage.read_text(storage.join(corpus, "manifest.jsonl")).splitlines():
        row = json.loads(line)
        if row["split"] == "heldout":
            found.setdefault(row["speaker"], []).append(row)
    chosen = [(name, rows) for name, rows in sorted(found.items()) if len(rows) >= _LEAST][:count]
    if len(chosen) < count:
        raise Unusable("no-speakers", f"{corpus} keeps {len(chosen)} usable speakers aside, {count} are needed")
    return dict(chosen)


def write_inputs(corpus: str, speakers: dict[str, list[dict[str, Any]]]) -> tuple[str, str]:
    """Writes whom to enroll and what they are to say; returns both files. The first recording of each is kept apart, to
    compare with."""
    enrolled = [
        {
            "speaker": name,
            "samples": [{"audio": row["audio"], "text": row["text"]} for row in rows[1:]],
            "consent": CONSENT,
        }
        for name, rows in speakers.items()
    ]
    items = [
        {"id": name, "text": SENTENCE, "voice": name, "prompt": rows[0]["audio"], "prompt_text": rows[0]["text"]}
        for name, rows in speakers.items()
    ]
    files = [storage.join(corpus, name) for name in ("speakers.jsonl", "set.jsonl")]
    for file, rows in zip(files, (enrolled, items), strict=True):
        storage.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return files[0], files[1]


def write_page(corpus: str, evaluation: str, steps: Sequence[Step]) -> str:
    """The page of the demo: each unseen voice as recorded and as synthesised, figures, and the chain's times; of what
    is missing, why it is; returns where it is.

    Args:
        evaluation: output of `jobs/evaluate.py` on what `write_inputs` wrote.
    """
    from pipeline.audio import read_segment
    from pipeline.evaluation_sets import read
    from pipeline.listening import Listened, Recording
    from pipeline.listening import write_page as page

    items, _ = read(storage.join(corpus, "set.jsonl"))
    lines = storage.read_text(storage.join(evaluation, "scores.jsonl")).splitlines()
    scores = {row["id"]: row for row in map(json.loads, lines) if row["system"] == "model"}
    rows = []
    for item in items:
        score = scores[item.id]
        recordings = [Recording("recorded, not heard in tuning", *read_segment(item.prompt), item.prompt_text)]
        if "missing" not in score:
            spoken = storage.join(evaluation, "speech", f"{item.key}.wav")
            recordings.append(Recording("synthesised", *read_segment(spoken), f"heard: {score['heard']}"))
        facts = {"WER": f"{score['word_errors']} of {score['words']} words"}
        facts |= {} if score["likeness"] is None else {"similarity": f"{score['likeness']:.3f}"}
        facts |= {"DistillMOS": f"{score['mos']:.2f}"} if "mos" in score else {}
        facts |= {"missing": score["missing"]} if "missing" in score else {}
        rows.append(Listened(item.id, item.text, recordings, item.voice, facts))
    notes = "From recordings to voices that the model never heard: what was typed, and how long it took.\n"
    if missing := [item.id for item in items if "missing" in scores[item.id]]:
        notes += f"Missing, each with its reason below: {', '.join(missing)}.\n"
    return page(rows, corpus, "lina-ray, from end to end", notes + times(steps))


def times(steps: Sequence[Step]) -> str:
    """A Markdown table of the chain's times."""
    lines = ["| step | seconds | command |", "|---|---|---|"]
    lines += [f"| {step.what} | {step.seconds:.0f} | {step.command} |" for step in steps]
    return "\n".join([*lines, f"| all | {sum(step.seconds for step in steps):.0f} | |"])
