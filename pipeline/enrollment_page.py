"""The page of an enrollment report: one HTML file with its pictures and its audio inside."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import enrollment_plots
from pipeline.plots import png
from pipeline.utterances import Reject

_MOST_REJECTS = 500
"""That the page shows; quarantine.jsonl has all."""


def page(
    summary: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    rejects: Sequence[Reject],
    sample_rejects: Sequence[dict[str, Any]],
    said: Mapping[str, bytes],
) -> str:
    """The whole page.

    Args:
        rows: of `enrolled.report_row`, in the order shown.
        said: Ogg Opus files by speaker.
    """
    parts = [
        _tiles(summary),
        "".join(f"<p class=bad>{html.escape(note)}</p>" for note in summary.get("notes", ())),
        _pictures(rows),
        _voices(rows, said),
        _rejected(rejects, sample_rejects),
        _making(summary),
    ]
    return _PAGE.format(
        title=f"{summary['enrolled'] + summary['known']:,} voices",
        style=_STYLE,
        script=_SCRIPT,
        body="\n".join(part for part in parts if part),
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    means = summary["means"]
    tiles = [
        (f"{summary['enrolled'] + summary['known']:,}", f"voices of {summary['speakers']:,} speakers"),
        (f"{summary['known']:,}", "were there before"),
        (f"{summary['rejected']:,}", "speakers rejected"),
        (f"{summary['hours']:.2f} h", "of speech"),
        (f"{summary['voices_an_hour']:,.0f}", "voices an hour"),
    ]
    if "tuned_loss" in means:
        gain = means["tuned_loss"] - means["base_loss"]
        tiles.append((f"{means['tuned_loss']:.3f}", f"mean held-out loss, {gain:+.3f} to no voice"))
    if "similarity" in means:
        tiles.append((f"{means['similarity']:.3f}", "mean similarity"))
    if "wer" in means:
        tiles.append((f"{100 * means['wer']:.1f} %", "mean word error rate"))
    return '<div class="tiles">' + "".join(f"<div><b>{big}</b>{small}</div>" for big, small in tiles) + "</div>"


def _pictures(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    figures = {"how much they say, how long it took": enrollment_plots.amounts(rows)}
    if any(row.get("tuned_loss") is not None for row in rows):
        figures["held-out losses"] = enrollment_plots.losses(rows)
        figures["held-out loss by step"] = enrollment_plots.curves(rows)
    images = [f'<img alt="{alt}" src="{_data("image/png", png(figure))}">' for alt, figure in figures.items()]
    return '<div class="plots">' + "\n".join(images) + "</div>"


def _voices(rows: Sequence[dict[str, Any]], said: Mapping[str, bytes]) -> str:
    if not rows:
        return ""
    heard = [name for name in ("similarity", "wer") if any(row.get(name) is not None for row in rows)]
    heads = ["speaker", "speech, s", "samples", "left out", "steps", "ended", "tuning, s", "wall, s"]
    heads += ["no voice", "prompt", "tuned", "held-out loss"] + heard + (["listen"] if said else [])
    body = []
    for row in rows:
        ended = row.get("ended") or ""
        cells = [
            f"<td class=name>{html.escape(row['speaker'])}",
            _number(row.get("seconds"), 1),
            _number(row.get("samples"), 0),
            _number(row.get("rejected_samples"), 0),
            _number(row.get("steps"), 0),
            f"<td class={'bad' if ended == 'diverged' else 'soft'}>{html.escape(ended)}",
            _number(row.get("tuning_seconds"), 2),
            _number(row.get("wall_seconds"), 2),
            *(_number(row.get(name), 3) for name in ("base_loss", "continuation_loss", "tuned_loss")),
            f"<td>{_spark(row.get('curve') or [])}",
            *(_number(row.get(name), 3) for name in heard),
        ]
        if said:
            content = said.get(row["speaker"])
            source = f'<audio controls preload=none src="{_data("audio/ogg", content)}"></audio>' if content else ""
            cells.append(f"<td>{source}")
        body.append(f"<tr>{''.join(cells)}")
    head = "".join(f"<th>{name}" for name in heads)
    return (
        '<h2>Voices</h2><p class=soft>A click on a heading sorts.</p><div class="wide"><table class="sorts">'
        f"<thead><tr>{head}<tbody>{chr(10).join(body)}</table></div>"
    )


def _rejected(rejects: Sequence[Reject], sample_rejects: Sequence[dict[str, Any]]) -> str:
    if not rejects and not sample_rejects:
        return "<h2>What could not be used</h2><p>Nothing: every speaker has a voice, of all samples.</p>"
    counts = Counter(reject.reason for reject in rejects)
    text = "<h2>What could not be used</h2>"
    if rejects:
        listed = ", ".join(f"{count:,} {html.escape(reason)}" for reason, count in counts.most_common())
        text += f"<p>Speakers without a voice: {listed}.</p>" + _reasons([r._asdict() for r in rejects])
    if sample_rejects:
        text += f"<p>Samples of speakers with a voice that were left out: {len(sample_rejects):,}.</p>"
        text += _reasons(sample_rejects)
    return text


def _reasons(rejects: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"<tr><td class=name>{html.escape(row['id'] or '–')}<td class=bad>{html.escape(row['reason'])}"
        f"<td>{html.escape(row['detail'])}<td class=soft>{html.escape(row['where'])}"
        for row in sorted(rejects, key=lambda row: (row["reason"], row["id"]))[:_MOST_REJECTS]
    ]
    more = (
        f"<p>… and {len(rejects) - _MOST_REJECTS:,} more in quarantine.jsonl.</p>"
        if len(rejects) > _MOST_REJECTS
        else ""
    )
    return (
        '<div class="wide"><table class="texts"><thead><tr><th>speaker<th>reason<th>detail<th>where'
        f"<tbody>{chr(10).join(lines)}</table></div>{more}"
    )


def _making(summary: Mapping[str, Any]) -> str:
    shown = {"model": summary["model"]["folder"], "tenant": summary["tenant"], **summary["settings"]}
    rows = "".join(f"<tr><td>{html.escape(k)}<td><code>{html.escape(str(v))}</code>" for k, v in shown.items())
    return f"<details><summary>How they were made</summary><table>{rows}</table></details>"


def _number(value: float | None, digits: int) -> str:
    return "<td class=soft>–" if value is None else f"<td data-v={value}>{value:,.{digits}f}"


def _spark(curve: Sequence[Sequence[float]]) -> str:
    """The held-out loss by step as a small line."""
    if len(curve) < 2:
        return ""
    low, high = min(loss for _, loss in curve), max(loss for _, loss in curve)
    last = max(step for step, _ in curve) or 1
    points = " ".join(
        f"{80 * step / last:.1f},{18 - 16 * (loss - low) / max(high - low, 1e-9):.1f}" for step, loss in curve
    )
    return f'<svg viewBox="0 0 80 20" width=80 height=20><polyline points="{points}"/></svg>'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#e2e5e8, #3a3a3a); --soft: light-dark(#6b7680, #a0a0a0);
  --tile: light-dark(#f4f7f9, #262a2d); --ink: light-dark(#22577a, #7db4d8); --bad: light-dark(#b3261e, #ff8a80) }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.6rem; margin: 0 0 1rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin-bottom: 1.4rem }
.tiles div { background: var(--tile); border-radius: 8px; padding: .7rem 1.1rem; color: var(--soft); font-size: 13px }
.tiles b { display: block; font-size: 1.5rem; color: var(--ink); font-weight: 600 }
.plots { display: flex; flex-direction: column; gap: 1rem }
.plots img { width: 100%; max-width: 1000px; border-radius: 6px; background: #fff }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; width: 100% }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 600 } .sorts th { cursor: pointer }
.name, th:first-child, .texts td, .texts th, details td { text-align: left }
.name { font-weight: 600 } .texts td { white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.soft { color: var(--soft) } .bad { color: var(--bad) } p.soft { margin: 0 0 .6rem; font-size: 13px }
polyline { fill: none; stroke: var(--ink); stroke-width: 1.5 } svg { vertical-align: middle }
audio { height: 30px; width: 220px; vertical-align: middle } details { margin: 2rem 0 } code { font-size: 12px }
"""
_SCRIPT = """
const key = (row, n) => row.cells[n].dataset.v === undefined ? row.cells[n].textContent : +row.cells[n].dataset.v;
const compare = (x, y) => {
  if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
  return x < y ? -1 : x > y ? 1 : 0;
};
for (const head of document.querySelectorAll(".sorts th")) head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], n = head.cellIndex, turn = head.dataset.down ? -1 : 1;
  if (turn > 0) head.dataset.down = 1; else delete head.dataset.down;
  body.append(...[...body.rows].sort((a, b) => turn * compare(key(a, n), key(b, n))));
});
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title>
<style>{style}</style></head>
<body><h1>{title}</h1>
{body}
<script>{script}</script></body></html>
"""
