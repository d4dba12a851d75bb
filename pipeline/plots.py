"""The pictures of a dataset's card. Each is a function of numbers alone and gives a matplotlib figure."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infra import storage
from pipeline.census import Census, Histogram
from pipeline.measures import log_mel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE, MARK = "#22577a", "#c7d9e5", "#d1495b"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "figure.dpi": 110,
    "svg.hashsalt": "lina",
}


@dataclass(frozen=True)
class Pair:
    """An utterance before and after the codec."""

    title: str
    original: np.ndarray
    """float32 [time], within ±1."""
    decoded: np.ndarray
    """float32 [time], within ±1."""
    rate: int
    """Samples a second of both."""


def draw_plots(dataset: str, census: Census, pairs: Sequence[Pair] = ()) -> list[str]:
    """Writes `plots/*.png` of the dataset and returns their names relative to it, in the order of the card."""
    figures = {
        "durations": lambda: durations(census.seconds),
        "phone_rates": lambda: phone_rates(census.phone_rates),
        "speakers": lambda: speakers(census),
        "codebooks": lambda: codebooks(census),
        "spectrograms": lambda: spectrograms(pairs),
    }
    there = {
        "phone_rates": census.phone_rates.total > 0,
        "codebooks": census.codes_from > 0,
        "spectrograms": len(pairs) > 0,
    }
    names = [f"plots/{name}.png" for name in figures if census.seconds.total and there.get(name, True)]
    for name in names:
        storage.write_bytes(storage.join(dataset, name), png(figures[name[6:-4]]()))
    return names


def png(figure: Figure) -> bytes:
    """The figure as a PNG; equal figures are equal bytes."""
    import warnings

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # Names in scripts that the font lacks show as boxes.
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def in_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Makes a function that draws a figure draw it in this project's style."""

    @functools.wraps(draw)
    def styled(*arguments) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*arguments)

    return styled


@in_style
def durations(seconds: Histogram) -> Figure:
    figure, (axes,) = row_of_axes(1)
    _bars(axes, seconds)
    axes.set(title=f"{seconds.total:,} utterances, {seconds.sum / 3600:,.2f} hours", xlabel="seconds an utterance")
    return figure


@in_style
def phone_rates(rates: Histogram) -> Figure:
    figure, (axes,) = row_of_axes(1)
    _bars(axes, rates)
    axes.set(title="How fast they speak", xlabel="phonemes a second")
    return figure


@in_style
def speakers(census: Census) -> Figure:
    """Hours of each speaker, the largest first: bars with names, or a curve when there are too many to name."""
    ranked = sorted(census.speakers.items(), key=lambda item: (-item[1][1], item[0]))
    total = np.array([seconds for _, (_, seconds) in ranked])
    unit, scale = ("hours", 3600) if total.max(initial=0.0) >= 7200 else ("minutes", 60)
    figure, (axes,) = row_of_axes(1)
    many = len(ranked) > 40
    if many:
        axes.fill_between(np.arange(1, len(total) + 1), total / scale, color=PALE, step="mid")
        axes.step(np.arange(1, len(total) + 1), total / scale, color=INK, where="mid")
        axes.set(xlabel="speakers, by how much they say", xlim=(0.5, len(total) + 0.5))
        half = int(np.searchsorted(np.cumsum(total), total.sum() / 2)) + 1
        axes.axvline(half, color=MARK, lw=1.2)
        axes.annotate(f" {half:,} speakers are half of it", (half, axes.get_ylim()[1] * 0.95), color=MARK, va="top")
    else:
        axes.bar(np.arange(len(total)), total / scale, color=INK, width=0.75)
        names = [_shortened(name or "(unnamed)") for name, _ in ranked]
        axes.set_xticks(np.arange(len(total)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axes.grid(axis="x", visible=False)
    beyond = " of those kept by name" if census.unnamed_speakers[0] else ""
    axes.set(title=f"{len(ranked):,} speakers{beyond}", ylabel=f"{unit} a speaker", ylim=(0, None))
    return figure


@in_style
def codebooks(census: Census) -> Figure:
    """How much of each codebook is in use: its perplexity, and how often its entries occur."""
    books, entries = census.codes.shape
    figure, (left, right) = row_of_axes(2)
    perplexity = census.perplexity()
    places = np.arange(1, books + 1)
    left.bar(places, np.full(books, entries), color=PALE, width=0.75, label=f"of {entries} entries")
    left.bar(places, perplexity, color=INK, width=0.75, label="in effective use")
    for place, value in zip(places, perplexity, strict=True):
        left.annotate(f"{value:.0f}", (place, value), ha="center", va="bottom", fontsize=8, color=INK)
    left.set_xticks(places)
    left.set(title="Perplexity", xlabel="codebook", ylabel="entries", ylim=(0, entries * 1.05))
    left.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderpad=0.1)
    left.grid(axis="x", visible=False)
    shades = _shades(books)
    for book in range(books):
        share = np.sort(census.codes[book])[::-1] / max(census.codes[book].sum(), 1)
        used = share[share > 0]
        label = f"{book + 1}: {len(used)} occur"
        right.plot(np.arange(1, len(used) + 1), 100 * used, color=shades[book], lw=1.4, label=label)
    right.axhline(100 / entries, color="#888888", lw=1, ls=":")
    right.set(title=f"Use of entries, {census.codes_from:,} utterances", xscale="log", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    right.set(xlabel="entry, the most frequent first", ylabel="% of frames")
    right.legend(frameon=False, fontsize=7, loc="lower left", title="codebook", title_fontsize=8)
    return figure


@in_style
def spectrograms(pairs: Sequence[Pair]) -> Figure:
    """Log-mel spectrograms of each pair, the original on the left, all on one colour scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 + 1.9 * len(pairs)), layout="constrained")
    grid = figure.subplots(len(pairs), 2, squeeze=False, sharex="row", sharey="row")
    for row, pair in zip(grid, pairs, strict=True):
        for axes, samples, what in zip(row, (pair.original, pair.decoded), ("original", "decoded"), strict=True):
            mel = log_mel(samples, pair.rate)
            extent = (0, len(samples) / pair.rate, 0, len(mel))
            shown = axes.imshow(mel, origin="lower", aspect="auto", extent=extent, vmin=-4, vmax=1.5, cmap="magma")
            axes.grid(visible=False)
            axes.set_title(f"{_shortened(pair.title, 40)}, {what}", fontsize=9)
        row[0].set_ylabel("mel band")
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    figure.colorbar(shown, ax=grid, label="log₁₀ magnitude", shrink=0.8, pad=0.01)
    return figure


def _bars(axes: Axes, histogram: Histogram) -> None:
    """A histogram of about fifty bars over all but the outermost per mille, its median and its 99th percentile."""
    lowest, highest = (histogram.quantile(share) / histogram.width for share in (0.001, 0.999))
    first = int(0.8 * lowest) if lowest > 0.4 * highest else 0
    last = int(highest) + 2
    step = max(1, -(-(last - first) // 50))
    counts = np.add.reduceat(histogram.counts[first:last], np.arange(0, last - first, step))
    edges = (first + np.arange(len(counts)) * step) * histogram.width
    axes.bar(edges, counts, width=step * histogram.width * 0.92, align="edge", color=INK)
    for share, name, line in ((0.5, "median", "-"), (0.99, "99 % are below", "--")):
        value = histogram.quantile(share)
        axes.axvline(value, color=MARK, lw=1.3, ls=line, label=f"{name} {value:.1f}")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderpad=0.1)
    axes.set(ylabel="utterances", xlim=(edges[0], edges[-1] + step * histogram.width))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def row_of_axes(columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of one row of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 if columns > 1 else 8, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _shades(count: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0.0, 0.88, count))


def _shortened(text: str, length: int = 18) -> str:
    text = text.replace("$", "＄")  # matplotlib would read what stands between two as a formula
    return text if len(text) <= length else text[: length - 1] + "…"
