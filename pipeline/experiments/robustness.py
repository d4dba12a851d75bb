"""How evenly it works: speaker by speaker, seed by seed, and with the recordings that people really have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.experiments import voices
from pipeline.experiments.adapting import Kit, cells_of, work  # noqa: F401 (the work of this experiment's cells)
from pipeline.experiments.cells import Cell, Outcome
from pipeline.experiments.claims import compared, mean, paired, shown, table, verdicts
from pipeline.experiments.config import ExperimentsConfig
from pipeline.plots import INK, MARK, PALE, in_style, row_of_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

_IST = {"name": "ist", "rank": 1, "lr": 2**-3, "position": False}
ENOUGH = 20
"""Speakers below which the report says that they are few."""


def cells(kit: Kit) -> list[Cell]:
    config = kit.config
    found = cells_of(kit, [{"name": "nothing"}, {"name": "prompt", "samples": 1, "sets": config.prompt_sets}])
    for seed in range(config.seeds):
        found += cells_of(kit, [_IST | {"repetition": seed}], seed=seed, speak=True)
    for condition in config.conditions:
        found += cells_of(kit, [_IST | {"repetition": 0}], condition, speak=True)
    return found


def summary(config: ExperimentsConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Conditions with losses, spread and failures; speakers with their losses by seed; how often tuning loses."""
    groups = voices.by(outcomes, lambda settings: _key(settings))
    base, prompt = (voices.numbers(groups[("clean", name, 0)]) for name in ("nothing", "prompt"))
    tuned = [voices.numbers(groups[("clean", "ist", seed)]) for seed in range(config.seeds)]
    people = {name: [losses[name] for losses in tuned if name in losses] for name in base}
    people = {name: losses for name, losses in people.items() if losses}
    conditions = []
    for condition in ("clean", *config.conditions):
        rows = groups.get((condition, "ist", 0), {})
        losses, failed = voices.numbers(rows), voices.failures(rows)
        if not losses:
            continue
        row = {"condition": condition, "speakers": len(losses), "loss": mean(losses.values())}
        row |= {"spread": float(np.std(list(losses.values()))), "worst": max(losses.values())}
        row |= {"worse": paired(losses, tuned[0]), "against_base": paired(losses, base)}
        row |= {"behind_prompt": float(np.mean([losses[name] >= prompt[name] for name in losses]))}
        conditions.append(row | {"failures": mean(failed.values()) if failed else None})
    worst = {name: float(np.mean(losses)) for name, losses in people.items()}
    found = {
        "conditions": conditions,
        "people": [
            {
                "speaker": name,
                "base": base[name],
                "prompt": prompt[name],
                "losses": losses,
                "seconds": _seconds(groups, name),
            }
            for name, losses in sorted(people.items(), key=lambda item: worst[item[0]])
        ],
        "between_speakers": float(np.std(list(worst.values()))),
        "between_seeds": float(np.mean([np.std(losses) for losses in people.values()])),
        "behind_base": float(np.mean([worst[name] >= base[name] for name in worst])),
        "behind_prompt": float(np.mean([worst[name] >= prompt[name] for name in worst])),
    }
    found["claims"] = [
        compared(
            "IST beats continuation with one recipe for all speakers",
            "4.46 against 5.21 (figure 4, one speaker); learning rate 2^-3 for all",
            "IST minus continuation, all speakers and seeds",
            paired(worst, prompt),
            len(worst),
        )
    ]
    named = ((f"{name}, {condition}", rows) for (condition, name, seed), rows in groups.items() if not seed)
    return found | {"heard": voices.heard(named)}


def section(config: ExperimentsConfig, found: dict[str, Any]) -> list[str]:
    rows = [
        (
            row["condition"],
            row["speakers"],
            shown(row["loss"]),
            f"{row['spread']:.3f}",
            f"{row['worst']:.3f}",
            shown(row["worse"]),
            f"{row['behind_prompt']:.0%}",
            shown(row["failures"], 2),
        )
        for row in found["conditions"]
    ]
    head = ("enrolled with", "speakers", "held-out loss", "spread", "worst speaker", "minus clean")
    count = len(found["people"])
    few = f" {count} speakers are few: {ENOUGH} were the aim." if count < ENOUGH else ""
    return [
        *table((*head, "behind continuation", "sentences that fail"), rows),
        "",
        f"{count} unseen speakers, {config.seeds} seeds on clean speech, one on the others; what is held out is clean "
        f"everywhere.{few} The standard deviation is {found['between_speakers']:.3f} nats between speakers and "
        f"{found['between_seeds']:.3f} between seeds of one speaker. {found['behind_base']:.0%} of the speakers end no "
        f"better than without a voice, {found['behind_prompt']:.0%} no better than with a prompt of one sample. A "
        "sentence fails when its first attempt has a fault of `pipeline.speech_faults`.",
        "",
        *verdicts(found["claims"]),
        *voices.heard_section(found["heard"]),
    ]


def figures(found: dict[str, Any]) -> dict[str, Picture]:
    return {"speakers": _speakers(found["people"]), "conditions": _conditions(found["conditions"])}


def metrics(found: dict[str, Any]) -> dict[str, float]:
    named = {f"loss.{row['condition']}": row["loss"].value for row in found["conditions"]}
    named |= {f"failures.{r['condition']}": r["failures"].value for r in found["conditions"] if r["failures"]}
    return named | {name: found[name] for name in ("between_speakers", "between_seeds", "behind_base", "behind_prompt")}


def _key(settings: dict[str, Any]) -> tuple[str, str, int]:
    method = settings["method"]
    return settings["people"][0]["condition"], method["name"], method.get("repetition", 0)


def _seconds(groups: dict[Any, voices.Rows], speaker: str) -> float:
    return groups[("clean", "ist", 0)][speaker]["speech_seconds"]


@in_style
def _speakers(people: Sequence[dict[str, Any]]) -> Picture:
    """Every speaker: without a voice, after a prompt, and tuned with each seed."""
    figure, (axes,) = row_of_axes(1)
    places = range(len(people))
    axes.plot(places, [row["base"] for row in people], "o", color="#9aa5ad", ms=4, label="no voice")
    axes.plot(places, [row["prompt"] for row in people], "o", color="#c98b2b", ms=4, label="continuation")
    for place, row in zip(places, people, strict=True):
        axes.plot(
            [place] * len(row["losses"]), row["losses"], "_", color=INK, ms=9, label=None if place else "IST, seeds"
        )
    axes.set_xticks(places, [row["speaker"][:14] for row in people], rotation=60, ha="right", fontsize=7)
    axes.set(title="Held-out loss, speaker by speaker", ylabel="nats a token")
    axes.legend(frameon=False, fontsize=8)
    return figure


@in_style
def _conditions(rows: Sequence[dict[str, Any]]) -> Picture:
    """What worse recordings cost, and how often speech fails."""
    figure, (left, right) = row_of_axes(2)
    places = range(len(rows))
    for axes, name, scale in ((left, "loss", 1), (right, "failures", 100)):
        found = [row[name] for row in rows]
        values = [scale * f.value if f else 0.0 for f in found]
        errors = [
            [scale * (f.value - f.low) if f else 0.0 for f in found],
            [scale * (f.high - f.value) if f else 0.0 for f in found],
        ]
        axes.bar(places, values, color=PALE, width=0.7)
        axes.errorbar(places, values, yerr=errors, fmt="none", ecolor=INK, capsize=3)
        axes.set_xticks(places, [row["condition"] for row in rows], rotation=40, ha="right", rotation_mode="anchor")
        axes.grid(axis="x", visible=False)
    lows = [row["loss"].low for row in rows]
    left.set(title="Held-out loss by enrollment data", ylabel="nats a token", ylim=(0.95 * min(lows), None))
    left.axhline(rows[0]["loss"].value, color=MARK, lw=1, ls=":")
    right.set(title="Sentences that fail", ylabel="%")
    return figure
