"""What the paper found, held against what we did: a verdict is computed from a difference and its interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation import Figure, interval

AGREES, CONTRADICTS = "agrees", "**contradicts**"
UNDECIDED, EQUAL = "undecided: our interval has both", "undecided: no difference to speak of"
READABLE = 0.01
"""Nats: the paper's figures cannot be read finer."""
FEWEST = 5
"""Pairs below which a difference decides nothing, however narrow its interval."""
YARDSTICK = (
    ("Lina-Speech's authors, 23 demo samples", "9.9", "0.856", "4.32"),
    ("real speech, the same sentences", "5.6", "0.881", "4.27"),
)
"""Who, WER in %, similarity, DistillMOS: recordings that the authors published, measured with this project's judges."""


class Claim(NamedTuple):
    """A finding of the paper."""

    said: str
    paper: str
    """Its numbers."""
    ours: str
    verdict: str


def compared(
    said: str,
    paper: str,
    what: str,
    difference: Figure | None,
    pairs: int,
    unit: str = "nats a token",
    least: float = READABLE,
) -> Claim:
    """A claim that a difference is below zero.

    Args:
        what: the difference, in words.
        difference: ours, with its 95 % interval; None where nothing was measured.
        pairs: of speakers, sentences, utterances or rounds, that it is the mean of.
        least: what is nearer to zero decides nothing.
    """
    if difference is None:
        return Claim(said, paper, "not measured", "—")
    ours = f"{what}: {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] {unit}".rstrip()
    if pairs < FEWEST:
        return Claim(said, paper, ours, f"undecided: {pairs} are too few, {FEWEST} are needed")
    verdict = AGREES if difference.high < 0 else CONTRADICTS if difference.low > 0 else UNDECIDED
    return Claim(said, paper, ours, EQUAL if abs(difference.value) < least else verdict)


def mean(values: Iterable[float]) -> Figure | None:
    """With its 95 % bootstrap interval; of one value, that value three times; of none, None."""
    found = np.array(list(values), np.float64)
    if not len(found):
        return None
    return interval(found, np.ones(len(found)))


def paired(first: Mapping[Any, float], second: Mapping[Any, float]) -> Figure | None:
    """The mean of first - second over what both have, resampled in pairs; None where that is nothing."""
    both = [name for name in first if name in second]
    return mean(first[name] - second[name] for name in both) if both else None


def shown(figure: Figure | None, digits: int = 3) -> str:
    if figure is None:
        return "—"
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


def verdicts(claims: Sequence[Claim]) -> list[str]:
    """Markdown: every claim, and in one sentence which of them our result contradicts."""
    lines = table(["the paper", "its numbers", "ours", "verdict"], claims)
    against = [claim.said for claim in claims if claim.verdict == CONTRADICTS]
    said = "; ".join(against) if against else "none of these findings"
    return [*lines, "", f"**Our result contradicts: {said}.**", ""]
