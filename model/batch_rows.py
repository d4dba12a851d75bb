"""Where the tensors of a continuous batch lie: in new ones after each step, or in those of a graph (`StepGraph`).

Both kinds have rows in the order in which they joined, and say the same.
"""

from __future__ import annotations

import torch

from model.lina import Lina
from model.rows import joined, put, taken, trimmed
from model.sampling import Policy, Progress, advance
from model.step_graph import Said, Shape, StepGraph, borrowed, give_back

STRIDE = 8
"""Steps that a GPU does between two looks at what they gave: a row that ended does up to seven for nothing."""


class MovingRows:
    """A step at a time, of any model on any device; as many rows as speak, and as long as the longest text."""

    def __init__(self, model: Lina, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self.progress: Progress | None = None

    def join(self, fresh: Progress) -> None:
        parts = [fresh] if self.progress is None else [self.progress, fresh]
        self.progress = joined(parts, [len(part.tokens) for part in parts])

    def keep(self, places: list[int]) -> None:
        """Lets go of all rows but some."""
        index = torch.tensor(places, dtype=torch.int64, device=self.model.norm.weight.device)
        self.progress = trimmed(taken(self.progress, index)) if places else None

    def advance(self) -> Said:
        """Takes all rows further; there must be some."""
        self.progress, attention = advance(self.model, self.progress, self.policy)
        return Said(self.progress.tokens[None], attention[None], self.progress.done[None])


class FixedRows:
    """A stride at a time, in the tensors of a graph; of models of gated linear attention, whose state does not grow."""

    def __init__(self, model: Lina, policy: Policy, stride: int = STRIDE) -> None:
        self.model, self.policy, self.stride = model, policy, stride
        self._graph: StepGraph | None = None
        self._slots: list[int] = []
        """Of each row: which one of the graph's it is."""
        self._lengths: list[tuple[int, int]] = []
        """Of each row: how many places and frames its text and its prompt have at most."""

    def join(self, fresh: Progress) -> None:
        count = len(fresh.tokens)
        self._lengths += [(fresh.text.filled.shape[1], fresh.prompt.codes.shape[2])] * count
        wanted = Shape.around(len(self._lengths), *map(max, zip(*self._lengths, strict=True)))
        if self._graph is None or not self._graph.shape.suits(wanted):
            self._move(wanted)
        free = sorted(set(range(self._graph.shape.rows)) - set(self._slots))[:count]
        put(self._graph.progress, fresh, self._index(free))
        self._slots += free

    def keep(self, places: list[int]) -> None:
        self._slots = [self._slots[place] for place in places]
        self._lengths = [self._lengths[place] for place in places]
        if not places:
            give_back(self._graph)
            self._graph = None

    def advance(self) -> Said:
        """On the CPU, whatever device the model is on."""
        said = self._graph.run(self.model)
        return Said(*(part[:, self._slots] for part in said))

    def _move(self, shape: Shape) -> None:
        """Goes on in another graph."""
        kept = None
        if self._graph is not None:
            kept = taken(self._graph.progress, self._index(self._slots))
            give_back(self._graph)
        self._graph = borrowed(self, self.model, self.policy, shape, self.stride)
        self._slots = list(range(len(self._slots)))
        if kept is not None:
            put(self._graph.progress, kept, self._index(self._slots))

    def _index(self, slots: list[int]) -> torch.Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self.model.norm.weight.device)


def rows_for(model: Lina, policy: Policy) -> MovingRows | FixedRows:
    """The faster kind."""
    fixed = model.norm.weight.is_cuda and model.config.mixer == "gla"
    return (FixedRows if fixed else MovingRows)(model, policy)
