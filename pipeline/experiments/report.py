"""What an experiment leaves behind: results.json, its plots, its section, and one report of all that were done."""

from __future__ import annotations

import json
from typing import Any

from infra import storage
from pipeline.evaluation import Figure, Row
from pipeline.experiments.claims import Claim
from pipeline.experiments.config import NAMES
from pipeline.experiments.voices import yardstick

RESULTS, SECTION, REPORT = "results.json", "section.md", "report.md"
_TITLES = {
    "gla-vs-attention": "Gated linear attention against softmax attention",
    "ist-ablation": "Ways of giving a voice",
    "data-amount": "How much of a speaker is enough",
    "robustness": "Speaker by speaker, and with bad recordings",
}


def write(output: str, name: str, results: dict[str, Any], lines: list[str], pictures: dict[str, Any]) -> list[str]:
    """Writes all of it; returns the URLs, the report's last."""
    from pipeline.plots import png

    folder, written = storage.join(output, name), []
    for picture, figure in pictures.items():
        written.append(storage.join(folder, f"{picture}.png"))
        storage.write_bytes(written[-1], png(figure))
    shown = [part for picture in pictures for part in (f"![{picture}]({name}/{picture}.png)", "")]
    files = {
        SECTION: "\n".join([f"## {_TITLES[name]}: `{name}`", "", *lines, *shown]).rstrip() + "\n",
        RESULTS: json.dumps(told(results), indent=1, sort_keys=True, allow_nan=False) + "\n",
    }
    for file, content in files.items():
        written.append(storage.join(folder, file))
        storage.write_text(written[-1], content)
    written.append(storage.join(output, REPORT))
    storage.write_text(written[-1], report(output))
    return written


def report(output: str) -> str:
    """Markdown of the sections that are there, in the order of the paper."""
    lines = [
        "# Experiments",
        "",
        "Written by `jobs/experiments.py` from its results; verdicts are computed from differences and their 95 % "
        "bootstrap intervals. Losses of the paper are of other codes and other data: only differences compare.",
        "",
        *yardstick(),
    ]
    sections = [storage.join(output, name, SECTION) for name in NAMES]
    there = [storage.read_text(section) for section in sections if storage.exists(section)]
    return "\n".join(lines) + "\n\n" + "\n".join(there)


def told(value: Any) -> Any:
    """As plain JSON, with names."""
    if isinstance(value, Figure | Claim):
        return value._asdict()
    if isinstance(value, Row):
        return {name: told(figure) for name, figure in value.figures.items()} | {"system": value.system}
    if isinstance(value, dict):
        return {str(name): told(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [told(inner) for inner in value]
    return value
