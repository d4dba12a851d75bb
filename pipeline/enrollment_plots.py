"""The pictures of an enrollment report: functions of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.plots import INK, MARK, PALE, in_style, row_of_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOSSES = {
    "base_loss": ("no voice", "#9aa5ad"),
    "continuation_loss": ("after a prompt", "#c98b2b"),
    "tuned_loss": ("tuned", INK),
}


@in_style
def amounts(rows: Sequence[dict[str, Any]]) -> Figure:
    """How much each speaker says, and how many steps it took."""
    figure, (left, right) = row_of_axes(2)
    seconds = _column(rows, "seconds")
    scale, unit = (60, "minutes") if len(seconds) and np.median(seconds) >= 120 else (1, "seconds")
    _histogram(left, seconds / scale, f"{unit} of speech", "How much they say")
    _histogram(right, _column(rows, "steps"), "steps", "How long tuning took")
    return figure


@in_style
def losses(rows: Sequence[dict[str, Any]]) -> Figure:
    """Held-out losses: every speaker in the order of its tuned loss, and what tuning gained over a prompt."""
    figure, (left, right) = row_of_axes(2)
    shown = sorted((row for row in rows if row.get("tuned_loss") is not None), key=lambda row: row["tuned_loss"])
    places = np.arange(1, len(shown) + 1)
    for name, (label, colour) in _LOSSES.items():
        values = [np.nan if row.get(name) is None else row[name] for row in shown]
        marks = {"marker": "o", "ms": 4, "ls": ""} if len(shown) <= 100 else {"lw": 1.2}
        left.plot(places, values, color=colour, label=label, **marks)
    left.set(title="Held-out loss", xlabel="speakers, the best one first", ylabel="nats a token")
    left.xaxis.set_major_locator(_whole())
    left.legend(frameon=False, fontsize=8)
    gained = np.array(
        [row["continuation_loss"] - row["tuned_loss"] for row in shown if row.get("continuation_loss") is not None]
    )
    _histogram(right, gained, "nats a token", "Gain over a prompt")
    right.axvline(0, color="#888888", lw=1, ls=":")
    return figure


@in_style
def curves(rows: Sequence[dict[str, Any]], most: int = 400) -> Figure:
    """Each speaker's held-out loss by step, relative to its start; the median thick."""
    figure, (axes,) = row_of_axes(1)
    found = [np.array(row["curve"]) for row in rows if row.get("curve")]
    found = [curve for curve in found if len(curve) > 1]
    for curve in found[:: max(1, len(found) // most)]:
        axes.plot(curve[:, 0], curve[:, 1] - curve[0, 1], color=PALE, lw=0.8)
    steps = sorted({int(step) for curve in found for step in curve[:, 0]})
    middle = [np.median([c[np.searchsorted(c[:, 0], s, side="right") - 1, 1] - c[0, 1] for c in found]) for s in steps]
    axes.plot(steps, middle, color=INK, lw=2, label="median; who has ended keeps the last loss")
    axes.set(title="Held-out loss while tuning, against its start", xlabel="step", ylabel="nats a token")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _histogram(axes: Axes, values: np.ndarray, label: str, title: str) -> None:
    values = values[np.isfinite(values)]
    axes.set(title=title, xlabel=label, ylabel="speakers")
    if not len(values):
        axes.annotate("nothing was held out", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#888888")
        return
    axes.hist(values, bins=min(40, max(8, int(2 * len(values) ** 0.5))), color=INK, rwidth=0.92)
    median = float(np.median(values))
    axes.axvline(median, color=MARK, lw=1.3, label=f"median {median:.3g}")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, borderpad=0.1)
    axes.yaxis.set_major_locator(_whole())


def _whole() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=6)


def _column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows if row.get(name) is not None], dtype=np.float64)
