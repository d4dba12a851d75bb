"""How much of a speaker is enough: held-out loss against seconds of speech, from many short samples or from one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from pipeline.experiments import voices
from pipeline.experiments.adapting import Kit, cells_of, work  # noqa: F401 (the work of this experiment's cells)
from pipeline.experiments.cells import Cell, Outcome
from pipeline.experiments.claims import compared, mean, paired, shown, table, verdicts
from pipeline.experiments.config import ExperimentsConfig
from pipeline.experiments.people import divided
from pipeline.plots import INK, MARK, in_style, row_of_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

ALL = 0.0
"""The amount that means all that there is."""
_NEAR = (0.7, 1.3)
"""Shares of an amount between which speech counts as that much."""
_LONGEST_PROMPT = 20.0
"""Seconds of a prompt at most: longer ones are far from what models are trained on, and cost."""
_IST = {"name": "ist", "rank": 1, "lr": 2**-3, "position": False}
PAPER_LEAST = 45.0
"""Seconds of the least that the paper tunes on."""


def subsets(seconds: Sequence[float], amounts: Sequence[float], seed: int) -> dict[float, tuple[int, ...]]:
    """Places of samples that together are as long as each amount, each subset within the next; `ALL` are all.

    Amounts that cannot be had to about a third, or give the same samples as a lower one or all, are left out.
    """
    from model.voice_samples import shuffled

    order = list(shuffled(len(seconds), seed, -3))
    found: dict[float, tuple[int, ...]] = {}
    everything, chosen = tuple(range(len(seconds))), []
    for amount in sorted(amounts):
        if not chosen:  # the sample that is nearest to the least amount
            chosen.append(min(order, key=lambda place: abs(seconds[place] - amount)))
        for place in order:
            if place not in chosen and sum(seconds[i] for i in chosen) + seconds[place] <= 1.1 * amount:
                chosen.append(place)
        new = tuple(sorted(chosen))
        there = _about(sum(seconds[place] for place in chosen), amount)
        if there and new not in (*found.values(), everything):
            found[amount] = new
    return found | {ALL: everything}


def single(seconds: Sequence[float], amounts: Sequence[float]) -> dict[float, tuple[int, ...]]:
    """The place of one sample about as long as each amount, where there is one."""
    nearest = {amount: min(range(len(seconds)), key=lambda i: abs(seconds[i] - amount)) for amount in amounts}
    return {amount: (place,) for amount, place in nearest.items() if _about(seconds[place], amount)}


def cells(kit: Kit) -> list[Cell]:
    from model.initial_state import number

    config, found = kit.config, cells_of(kit, [{"name": "nothing"}])
    by_data: dict[tuple[str, float], dict[str, tuple[int, ...]]] = {}
    for name, person in kit.people["clean"].items():
        tuned = divided(person, config)[0]
        seconds = [person.samples[place]["seconds"] for place in tuned]
        seed = number(config.seed, "amounts", name)
        for data, chosen in (
            ("many", subsets(seconds, config.amounts, seed)),
            ("one", single(seconds, config.amounts)),
        ):
            for amount, places in chosen.items():
                by_data.setdefault((data, amount), {})[name] = tuple(tuned[place] for place in places)
    for (data, amount), places in sorted(by_data.items()):
        methods = [_IST, {"name": "memory", "samples": 0, "sets": 1}]
        if ALL < amount <= _LONGEST_PROMPT:
            methods.append({"name": "prompt", "samples": 0, "sets": 1})
        methods = [method | {"data": data, "amount": amount} for method in methods]
        found += cells_of(kit, methods, places=places)
    return found


def summary(config: ExperimentsConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Rows by data, amount and method; gains of tuning over continuation of the same data; the least that pays."""
    groups = voices.by(outcomes, lambda settings: _key(settings["method"]))
    base = groups.pop(("", ALL, "nothing"))
    rows = []
    for (data, amount, name), people in groups.items():
        losses = voices.numbers(people)
        row = {"data": data, "amount": amount, "method": name, "speakers": len(losses)}
        row |= {"seconds": mean(row["speech_seconds"] for row in people.values()), "loss": mean(losses.values())}
        rows.append(row | {"gain": paired(losses, voices.numbers(base))})
    gains = []
    for data, amount in dict.fromkeys((row["data"], row["amount"]) for row in rows):
        there = {
            name: voices.numbers(groups[(data, amount, name)]) for d, a, name in groups if (d, a) == (data, amount)
        }
        other = "prompt" if "prompt" in there else "memory"
        gain = {"data": data, "amount": amount, "against": other, "gain": paired(there["ist"], there[other])}
        seconds = mean(row["speech_seconds"] for row in groups[(data, amount, "ist")].values())
        gains.append(gain | {"speakers": len(there["ist"]), "seconds": seconds})
    found = {"rows": rows, "gains": gains, "base": mean(voices.numbers(base).values()), "least": least(gains)}
    enough = [gain for gain in gains if gain["data"] == "many" and gain["seconds"].value >= PAPER_LEAST]
    found["claims"] = [
        compared(
            "from 45 s on, IST at rank 1 loses less than continuation",
            "45 s to 20 min of speech; 4.46 against 5.21 (figure 4)",
            f"IST minus continuation, {_amount(enough[0]['amount'])}" if enough else "",
            enough[0]["gain"] if enough else None,
            enough[0]["speakers"] if enough else 0,
        )
    ]
    heard = [(f"{name}, {data}, {_amount(amount)}", people) for (data, amount, name), people in groups.items()]
    return found | {"heard": voices.heard(heard)}


def least(gains: Sequence[dict[str, Any]]) -> float | None:
    """The smallest amount, of many samples, from which on tuning always beats continuation, intervals included."""
    rising = sorted((gain for gain in gains if gain["data"] == "many"), key=lambda gain: gain["amount"] or 1e9)
    pays = None
    for gain in reversed(rising):
        if gain["gain"] is None or gain["gain"].high >= 0:
            break
        pays = gain["amount"]
    return pays


def section(config: ExperimentsConfig, found: dict[str, Any]) -> list[str]:
    by_data = {}
    for row in found["rows"]:
        by_data.setdefault((row["data"], row["amount"]), {})[row["method"]] = row
    gains = {(gain["data"], gain["amount"]): gain for gain in found["gains"]}
    rows = []
    for (data, amount), there in sorted(by_data.items(), key=lambda item: (item[0][0], item[0][1] or 1e9)):
        losses = [shown(there[name]["loss"]) if name in there else "—" for name in ("memory", "prompt", "ist")]
        gain, first = gains[(data, amount)], there["ist"]
        rows.append(
            (data, _amount(amount), f"{first['seconds'].value:.1f}", first["speakers"], *losses, shown(gain["gain"]))
        )
    head = ("samples", "amount", "seconds in fact", "speakers", "memory read", "continuation", "IST rank 1")
    pays = found["least"]
    told = "no amount that was tried" if pays is None else _amount(pays)
    return [
        *table((*head, "IST minus continuation"), rows),
        "",
        f"Without any voice: {shown(found['base'])}. Tuning beats continuation of the same speech, interval included, "
        f"from **{told}** on (of many samples). Nobody has published this curve; the paper tunes on 45 s to 20 min. "
        "Where no prompt was measured, the memory read from the samples stands for continuation.",
        "",
        *verdicts(found["claims"]),
        *voices.heard_section(found["heard"]),
    ]


def figures(found: dict[str, Any]) -> dict[str, Picture]:
    return {"amounts": _amounts(found)}


def metrics(found: dict[str, Any]) -> dict[str, float]:
    named = {f"loss.{row['method']}.{row['data']}.{_amount(row['amount'])}": row["loss"].value for row in found["rows"]}
    return named | ({} if found["least"] is None else {"least_seconds": found["least"]})


def _key(method: dict[str, Any]) -> tuple[str, float, str]:
    return method.get("data", ""), method.get("amount", ALL), method["name"]


def _about(seconds: float, amount: float) -> bool:
    return _NEAR[0] * amount <= seconds <= _NEAR[1] * amount


def _amount(amount: float) -> str:
    return f"{amount:g} s" if amount else "all"


@in_style
def _amounts(found: dict[str, Any]) -> Picture:
    """What each way of giving a voice gains, speaker by speaker, by how much speech it is given."""
    figure, (axes,) = row_of_axes(1)
    ways = {"ist": ("IST rank 1", INK), "memory": ("memory read", "#c98b2b"), "prompt": ("continuation", "#9aa5ad")}
    for (name, (what, colour)), (data, line, mark) in product(ways.items(), (("many", "-", "o"), ("one", ":", "s"))):
        rows = [row for row in found["rows"] if (row["method"], row["data"]) == (name, data)]
        rows.sort(key=lambda row: row["seconds"].value)
        if not rows:
            continue
        gains = [row["gain"] for row in rows]
        errors = [[f.value - f.low for f in gains], [f.high - f.value for f in gains]]
        places = [row["seconds"].value for row in rows]
        label = f"{what}, {data} sample{'s' * (data == 'many')}"
        values = [f.value for f in gains]
        axes.errorbar(places, values, yerr=errors, color=colour, ls=line, marker=mark, capsize=3, lw=1.3, label=label)
    axes.axhline(0.0, color=MARK, lw=1.1, label="no voice")
    axes.set(title="How much speech is enough", xlabel="seconds of a speaker", ylabel="nats a token, minus no voice")
    axes.set_xscale("log")
    ticks = sorted({row["amount"] or round(row["seconds"].value) for row in found["rows"]})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
