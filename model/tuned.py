"""What tuning a speaker gives: factors, and the record of how they came about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.initial_state import Factors


@dataclass(frozen=True)
class Tuned:
    """A voice, and how it came about. Losses are means over the tokens of the held-out samples; None without any."""

    speaker: str
    factors: Factors
    """Of the best held-out loss; without held-out samples, the last ones."""
    reason: str
    """Why it ended: `steps`, the recipe's limit; `converged`; `reached`, its target; `diverged`; `left`."""
    steps: int
    """Taken."""
    best_step: int
    """After how many the factors were as they are here."""
    samples: int
    """Tuned on."""
    held_out: int
    """Samples."""
    base_loss: float | None
    """From memories of zeros: no voice at all."""
    continuation_loss: float | None
    """Without a voice, after one prompt: text and codes of the longest sample tuned on stand before the sample's
    (`model.continuation`). None where the tuner was not told how texts are joined."""
    tuned_loss: float | None
    curve: tuple[tuple[int, float], ...]
    """(steps taken, held-out loss)."""
    train_losses: tuple[float, ...]
    """Of each step's batch, before the step."""
    seconds: float
    """Of wall time: its share, by the lengths of its rows, of the steps that it took part in."""
    seed: int

    def record(self) -> dict[str, Any]:
        """Plain JSON, without the factors."""
        plain = {
            name: value for name, value in vars(self).items() if name not in ("factors", "train_losses", "speaker")
        }
        return plain | {"curve": [list(point) for point in self.curve], "seconds": round(self.seconds, 3)}
