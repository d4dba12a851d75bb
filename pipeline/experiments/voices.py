"""What the experiments on unseen speakers have in common: numbers by speaker, and what was heard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeline.evaluation import Row
from pipeline.evaluation import table as heard_table
from pipeline.experiments.cells import Outcome
from pipeline.experiments.claims import YARDSTICK, table

_PLAIN = {"nothing": "no voice", "recorded": "recorded speech", "codec": "recorded speech through the codec"}

Rows = dict[str, dict[str, Any]]
"""A speaker's row of results, by speaker."""


def by(outcomes: Sequence[Outcome], key: Callable[[dict[str, Any]], Any]) -> dict[Any, Rows]:
    """The rows of all groups of speakers, by what `key` makes of a cell's settings, in the order of the grid."""
    found: dict[Any, Rows] = {}
    for outcome in outcomes:
        found.setdefault(key(outcome["settings"]), {}).update(outcome["result"])
    return found


def numbers(rows: Rows, name: str = "loss") -> dict[str, float]:
    """One number of each speaker; those without are left out."""
    return {speaker: row[name] for speaker, row in rows.items() if row.get(name) is not None}


def label(method: dict[str, Any]) -> str:
    """A method in a few words."""
    kind = method["name"]
    if kind in ("prompt", "memory"):
        what = "continuation" if kind == "prompt" else "memory read from"
        count = method["samples"]
        return f"{what}, {'all samples' if not count else f'{count} sample' + 's' * (count > 1)}"
    if kind in _PLAIN:
        return _PLAIN[kind]
    rank = {"lora": f" rank {method.get('rank')}", "full": ""}.get(kind)
    if rank is None:
        rank = f" rank {method['rank']}" if method["rank"] else " full"
    name = {"ist": "IST", "lora": "LoRA", "full": "all weights"}[kind]
    return f"{name}{rank}, lr {method['lr']:g}" + (", position network" if method.get("position") else "")


def speech_of(rows: Rows) -> list[dict[str, Any]]:
    return [one for row in rows.values() for one in row.get("speech", ())]


def heard(groups: Iterable[tuple[str, Rows]]) -> list[Row]:
    """WER, similarity and opinion of whoever was judged."""
    from pipeline.system_evaluation import figures

    found = []
    for name, rows in groups:
        if judged := [one for one in speech_of(rows) if "words" in one]:
            found.append(figures(name, judged))
    return found


def heard_section(rows: Sequence[Row]) -> list[str]:
    """Markdown: what was heard, beside the authors' own samples."""
    if not rows:
        return ["Nothing was judged: `--listen N` lets N speakers be heard.", ""]
    return [heard_table(rows), "", "Beside these, with the same judges:", "", *yardstick(), ""]


def yardstick() -> list[str]:
    return table(["who", "WER %", "similarity", "DistillMOS"], YARDSTICK)


def failures(rows: Rows) -> dict[str, float]:
    """Share of a speaker's sentences that went wrong at the first attempt, by speaker."""
    spoke = {name: row["speech"] for name, row in rows.items() if row.get("speech")}
    return {name: sum(bool(one["faults"]) for one in said) / len(said) for name, said in spoke.items()}
