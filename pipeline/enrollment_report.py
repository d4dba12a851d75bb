"""What an enroll job reports: a table as CSV and JSON, a page that needs nothing but itself, the quarantine, totals."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from infra import storage
from pipeline.enrollment import Batch, quarantine_line
from pipeline.enrollment_page import page
from pipeline.utterances import Reject

COLUMNS = ("speaker", "samples", "held_out", "rejected_samples", "seconds", "steps", "best_step", "ended")
COLUMNS += ("tuning_seconds", "wall_seconds", "base_loss", "continuation_loss", "tuned_loss", "similarity", "wer")
COLUMNS += ("bytes", "file")
FILES = ("report.html", "voices.csv", "voices.json", "quarantine.jsonl", "summary.json")
_MEANS = ("seconds", "steps", "tuning_seconds", "base_loss", "continuation_loss", "tuned_loss", "similarity", "wer")


@dataclass
class Results:
    """What became of a batch's speakers, gathered as they are done."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    sample_rejects: list[dict[str, Any]] = field(default_factory=list)
    known: int = 0
    """Whose voices were there before."""
    said: dict[str, bytes] = field(default_factory=dict)
    """By speaker: Opus files of the report's sentence."""
    notes: list[str] = field(default_factory=list)
    """What of the report is missing, and why."""

    def take(self, result: dict[str, Any] | Reject, known: bool) -> None:
        if isinstance(result, Reject):
            self.rejects.append(result)
            return
        self.rows.append(result["row"])
        self.sample_rejects += result["rejects"]
        self.known += known

    @property
    def reject_fraction(self) -> float:
        return len(self.rejects) / max(len(self.rows) + len(self.rejects), 1)


def write(batch: Batch, results: Results, wall_seconds: float) -> dict[str, Any]:
    """Writes `FILES` into the output, the summary last, and returns it."""
    rows = sorted(results.rows, key=lambda row: row["speaker"])
    rows = [row | {"file": _file(batch, row["speaker"])} for row in rows]
    summary = _summary(batch, results, rows, wall_seconds)
    rejects = [*results.rejects, *results.sample_rejects]
    contents = {
        "voices.csv": _csv(rows),
        "voices.json": json.dumps(rows, ensure_ascii=False, indent=1) + "\n",
        "quarantine.jsonl": "".join(sorted(map(quarantine_line, rejects))),
        "report.html": page(summary, rows, results.rejects, results.sample_rejects, results.said),
        "summary.json": json.dumps(summary, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in contents.items():
        storage.write_text(storage.join(batch.config.output, name), text)
    batch.folder.remove_leftovers()
    return summary


def metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Flat numbers for tracking."""
    flat = {name: summary[name] for name in ("speakers", "enrolled", "known", "rejected", "voices_an_hour")}
    flat |= {
        "reject_fraction": summary["rejected"] / max(summary["speakers"], 1),
        "wall_seconds": summary["wall_seconds"],
    }
    flat |= {f"mean_{name}": value for name, value in summary["means"].items()}
    return flat | {f"rejects/{reason}": count for reason, count in summary["rejects"].items()}


def _summary(batch: Batch, results: Results, rows: Sequence[dict[str, Any]], wall: float) -> dict[str, Any]:
    made = len(rows) - results.known
    means = {}
    for name in _MEANS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            means[name] = round(statistics.fmean(values), 6)
    reasons = Counter(reject.reason for reject in results.rejects)
    return {
        "speakers": len(rows) + len(results.rejects),
        "enrolled": made,
        "known": results.known,
        "rejected": len(results.rejects),
        "rejects": dict(sorted(reasons.items())),
        "rejected_samples": dict(sorted(Counter(r["reason"] for r in results.sample_rejects).items())),
        "ended": dict(sorted(Counter(row["ended"] for row in rows if row["ended"]).items())),
        "hours": round(sum(row["seconds"] or 0 for row in rows) / 3600, 4),
        "wall_seconds": round(wall, 3),
        "voices_an_hour": round(3600 * made / max(wall, 1e-9), 1),
        "means": means,
        "tenant": batch.config.tenant,
        "model": {"folder": batch.config.model, "fingerprint": batch.card.fingerprint},
        "settings": batch.folder.settings,
        "notes": results.notes,
    }


def _file(batch: Batch, speaker: str) -> str:
    from pipeline.speakers import file_key

    return batch.folder.voice_url(file_key(speaker)).removeprefix(f"{batch.config.output}/")


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
