"""Pictures of evaluations: figures by system, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.evaluation import COLUMNS, Row
from pipeline.plots import INK, PALE, in_style, row_of_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@in_style
def systems(rows: Sequence[Row], measures: Sequence[str] = ("wer", "similarity", "mos")) -> Figure:
    """A panel for each measure that somebody has: a bar a system, its 95 % interval on it."""
    shown = [name for name in measures if any(name in row.figures for row in rows)]
    figure, panels = row_of_axes(max(1, len(shown)))
    for axes, name in zip(panels, shown, strict=False):
        heading, factor, decimals = COLUMNS[name]
        there = [row for row in rows if name in row.figures]
        values = [row.figures[name].value * factor for row in there]
        low = [(row.figures[name].value - row.figures[name].low) * factor for row in there]
        high = [(row.figures[name].high - row.figures[name].value) * factor for row in there]
        places = range(len(there))
        axes.bar(places, values, color=PALE, width=0.7)
        axes.errorbar(places, values, yerr=[low, high], fmt="none", ecolor=INK, capsize=3)
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.{decimals}f}", (place, 0), ha="center", va="bottom", fontsize=8, color=INK)
        axes.set_xticks(places, [row.system for row in there], rotation=40, ha="right", rotation_mode="anchor")
        axes.set(title=heading)
        axes.grid(axis="x", visible=False)
    return figure
