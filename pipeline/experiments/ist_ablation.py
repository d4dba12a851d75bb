"""Which way of giving a voice is worth it: none, prompts, tuned memories of every rank, tuned weights (fig. 4, 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.evaluation import Figure
from pipeline.experiments import voices
from pipeline.experiments.adapting import ORIGINALS, Kit, cells_of, work  # noqa: F401 (the work of this experiment's cells)
from pipeline.experiments.cells import Cell, Outcome
from pipeline.experiments.claims import Claim, compared, mean, paired, shown, table, verdicts
from pipeline.experiments.config import ExperimentsConfig
from pipeline.plots import INK, MARK, in_style, row_of_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

PAPER_LR = 2**-3
PAPER_RANKS = {1: 4.512, 2: 4.519, 4: 4.550, 8: 4.631, 16: 4.780, 32: 4.948, 64: 5.251}
"""Figure 5, LibriTTS: the best test loss by rank, mean of 20 speakers; WavTokenizer's 4096 codes, so not our scale."""
PAPER_CURVE = {"no voice": 6.10, "continuation": 5.21, "IST after 100 steps": 4.46}
"""Figure 4, one speaker and style of Expresso."""


def methods(config: ExperimentsConfig) -> list[dict[str, Any]]:
    """The grid, in the order of the report."""
    found: list[dict[str, Any]] = [{"name": name} for name in ORIGINALS] if config.listen else []
    found += [{"name": "nothing"}]
    for name in ("prompt", "memory"):
        found += [{"name": name, "samples": count, "sets": config.prompt_sets} for count in config.prompts]
    found += [{"name": "ist", "rank": rank, "lr": lr, "position": False} for rank in config.ranks for lr in config.lrs]
    found += [{"name": "ist", "rank": config.ranks[0], "lr": lr, "position": True} for lr in config.lrs[-1:]]
    found += [{"name": "lora", "rank": rank, "lr": lr} for rank in config.lora_ranks for lr in config.lora_lrs]
    return found + [{"name": "full", "lr": lr} for lr in config.full_lrs]


def cells(kit: Kit) -> list[Cell]:
    return cells_of(kit, methods(kit.config))


def summary(config: ExperimentsConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """By method: loss and best with intervals, gain over no voice, size, curve; the paper's claims."""
    groups = voices.by(outcomes, lambda settings: voices.label(settings["method"]))
    kinds = {voices.label(one["settings"]["method"]): one["settings"]["method"] for one in outcomes}
    base = voices.numbers(groups["no voice"])
    rows, lost = [], []
    for name, people in groups.items():
        losses = voices.numbers(people)
        if kinds[name]["name"] in ORIGINALS:
            continue
        lost += [f"{name} for {speaker}" for speaker in people if speaker not in losses]
        if not losses:
            continue
        row = {"method": name, **kinds[name], "speakers": len(losses), "loss": mean(losses.values())}
        row |= {"gain": paired(losses, base)}
        if best := voices.numbers(people, "best"):
            row |= {"best": mean(best.values()), "curve": _mean_curve([people[speaker] for speaker in losses])}
            row |= {"parameters": next(iter(people.values()))["parameters"]}
        rows.append(row)
    return {"rows": rows, "lost": lost, "claims": _claims(groups, kinds), "heard": _heard(groups)}


def section(config: ExperimentsConfig, found: dict[str, Any]) -> list[str]:
    """Markdown of the report."""
    rows = [
        (
            row["method"],
            f"{row['parameters']:,}" if "parameters" in row else "—",
            shown(row["loss"]),
            shown(row["gain"]),
            shown(row.get("best")),
        )
        for row in found["rows"]
    ]
    lines = table(["method", "numbers tuned", "held-out loss, last step", "minus no voice", "lowest on the way"], rows)
    count = max(row["speakers"] for row in found["rows"])
    lines += [
        "",
        f"{count} unseen speakers, {config.steps} steps of {config.batch} samples; nats a token, mean over speakers "
        "with 95 % bootstrap intervals. The lowest loss on the way is picked by the held-out samples themselves: the "
        "paper's figure 5 is such a number.",
        "",
        *([f"No finite loss, and so not in the table: {', '.join(found['lost'])}.", ""] if found["lost"] else []),
        "The paper (other codec and data, so only differences compare): "
        + ", ".join(f"{name} {loss:.2f}" for name, loss in PAPER_CURVE.items())
        + "; lowest loss by rank: "
        + ", ".join(f"{rank}: {loss:.2f}" for rank, loss in PAPER_RANKS.items())
        + ".",
        "",
        *verdicts(found["claims"]),
        *voices.heard_section(found["heard"]),
    ]
    return lines


def figures(found: dict[str, Any]) -> dict[str, Picture]:
    return {"losses": _losses(found["rows"]), "ranks": _ranks(found["rows"])}


def metrics(found: dict[str, Any]) -> dict[str, float]:
    return {f"loss.{row['method']}": row["loss"].value for row in found["rows"]}


def _claims(groups: dict[str, voices.Rows], kinds: dict[str, dict[str, Any]]) -> list[Claim]:
    """Figures 4 and 5 as differences that the paper has below zero."""
    people = len(groups["no voice"])
    best = {name: voices.numbers(rows, "best") for name, rows in groups.items() if kinds[name]["name"] == "ist"}
    plain = {name: kinds[name] for name in best if not kinds[name]["position"]}
    tuned = next((name for name, m in plain.items() if m["rank"] == 1 and m["lr"] == PAPER_LR), None)
    prompt = next((name for name, m in kinds.items() if m["name"] == "prompt" and m["samples"] == 1), None)
    gain = paired(voices.numbers(groups[tuned]), voices.numbers(groups[prompt])) if tuned and prompt else None
    claims = [
        compared(
            "IST at rank 1 and 2^-3 loses less than continuation of one prompt",
            "4.46 against 5.21 (figure 4)",
            "IST minus continuation",
            gain,
            people,
        )
    ]
    by_rank = _best_by_rank(best, plain)
    others = [rank for rank in by_rank if rank != 1]
    for rank in others:
        name = f"rank {rank}" if rank else "whole matrices"
        claims.append(
            compared(
                f"rank 1 loses less than {name}",
                f"{PAPER_RANKS[1]} against {PAPER_RANKS[rank]} (figure 5, LibriTTS)"
                if rank in PAPER_RANKS
                else "said of full rank, no number given",
                f"lowest loss of rank 1 minus {name}",
                paired(by_rank[1], by_rank[rank]) if 1 in by_rank else None,
                people,
            )
        )
    slower = [name for name, m in plain.items() if m["rank"] == 1 and m["lr"] < PAPER_LR]
    if tuned and slower:
        nearest = max(slower, key=lambda name: plain[name]["lr"])
        claims.append(
            compared(
                f"at rank 1 a learning rate of 2^-3 reaches less than {plain[nearest]['lr']:g}",
                "4.51 at 2^-3, 4.54 at 2^-4, 4.60 at 2^-5 (figure 5, LibriTTS)",
                f"lowest loss at 0.125 minus {plain[nearest]['lr']:g}",
                paired(best[tuned], best[nearest]),
                people,
            )
        )
    return claims


def _best_by_rank(best: dict[str, dict[str, float]], plain: dict[str, dict[str, Any]]) -> dict[int, dict[str, float]]:
    """The losses by speaker of each rank, at the learning rate that is best for it on average, as figure 5 has them."""
    found: dict[int, dict[str, float]] = {}
    for name, method in plain.items():
        losses, known = best[name], found.get(method["rank"])
        if losses and (known is None or np.mean(list(losses.values())) < np.mean(list(known.values()))):
            found[method["rank"]] = losses
    return found


def _mean_curve(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Over speakers whose loss ended finite, at the steps where all of theirs were."""
    curves = [{step: loss for step, loss in row["curve"] if loss is not None} for row in rows]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [[step, float(np.mean([curve[step] for curve in curves]))] for step in steps]


def _heard(groups: dict[str, voices.Rows]) -> list[Any]:
    return voices.heard(groups.items())


@in_style
def _losses(rows: Sequence[dict[str, Any]]) -> Picture:
    """Held-out loss while tuning, and where it starts without: the paper's figure 4."""
    from matplotlib import colormaps

    figure, (axes,) = row_of_axes(1)
    lines = [row for row in rows if "curve" in row]
    shades = colormaps["viridis"](np.linspace(0.0, 0.88, max(1, len(lines))))
    for row, shade in zip(lines, shades, strict=False):
        axes.plot(*zip(*row["curve"], strict=True), color=shade, lw=1.5, label=row["method"])
    flat: dict[str, int] = {}
    for row in [row for row in rows if "curve" not in row]:
        style = ("-", "--", ":", "-.")[flat.setdefault(row["name"], 0) % 4]
        flat[row["name"]] += 1
        colour = {"nothing": "#9aa5ad", "prompt": MARK, "memory": "#c98b2b"}[row["name"]]
        axes.axhline(row["loss"].value, color=colour, lw=1.1, ls=style, label=row["method"])
    axes.set(title="Held-out loss", xlabel="step", ylabel="nats a token")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@in_style
def _ranks(rows: Sequence[dict[str, Any]]) -> Picture:
    """The lowest held-out loss by rank and learning rate: the paper's figure 5."""
    figure, (axes,) = row_of_axes(1)
    tuned = [row for row in rows if row["name"] == "ist" and not row["position"]]
    ranks = list(dict.fromkeys(row["rank"] for row in tuned))
    for number, lr in enumerate(sorted({row["lr"] for row in tuned})):
        there = [row for row in tuned if row["lr"] == lr]
        places = [ranks.index(row["rank"]) + 0.06 * number for row in there]
        figures_: list[Figure] = [row["best"] for row in there]
        errors = [[f.value - f.low for f in figures_], [f.high - f.value for f in figures_]]
        values = [f.value for f in figures_]
        axes.errorbar(places, values, yerr=errors, marker="o", capsize=3, lw=1.2, label=f"lr {lr:g}")
    axes.set_xticks(range(len(ranks)), [str(rank) if rank else "full" for rank in ranks])
    axes.set(title="Lowest held-out loss by rank", xlabel="rank of the tuned memories", ylabel="nats a token")
    for row in rows:
        if row["name"] == "nothing":
            axes.axhline(row["loss"].value, color=INK, lw=1, ls=":", label="no voice")
    axes.legend(frameon=False, fontsize=8)
    return figure
