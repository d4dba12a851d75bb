"""A stride of steps in tensors that stay where they are; on a GPU, as one CUDA graph.

A step is hundreds of kernels, and most of them take a GPU less time than Python takes to start them. A CUDA graph
starts all kernels of a stride at once. In return it knows one address and one shape of each tensor: there are more rows
than speak, and more places than their texts have. Spare rows say a text of padding, and nobody hears them.

A graph is captured once for each model, policy and shape, and serves one batch after another.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from model.lina import Lina
from model.rows import leaves, taken
from model.sampling import Policy, Progress, Prompt, advance, begin

KEPT = 8
"""Graphs of a model, each with a state of all its rows; the one that was not used for longest makes room."""


class Shape(NamedTuple):
    """What a graph has room for."""

    rows: int
    places: int
    """Of a text."""
    prompt: int
    """Frames."""

    @classmethod
    def around(cls, rows: int, places: int, prompt: int) -> Shape:
        """The smallest of a few: powers of two, from sizes on below which no step is faster."""
        return cls(_rounded(rows, 8), _rounded(places, 128), _rounded(prompt, 256) if prompt else 0)

    def suits(self, wanted: Shape) -> bool:
        """Whether a batch may stay here: there is room, and not for four times as many."""
        return all(own >= other for own, other in zip(self, wanted, strict=True)) and self.rows < 4 * wanted.rows


class Said(NamedTuple):
    """What S steps gave."""

    tokens: torch.Tensor
    """int64 [S, B, K]."""
    attention: torch.Tensor
    """[S, B, J]."""
    done: torch.Tensor
    """bool [S, B]: `Progress.done` after each."""


class StepGraph:
    """
    Args:
        model: in evaluation mode; it is not kept. Its weights must stay where they are.
        policy, shape: of all rows.
        stride: steps.
        pool: memory of other graphs on the same device that may be used by this one, too.
    """

    def __init__(self, model: Lina, policy: Policy, shape: Shape, stride: int, pool: tuple | None = None) -> None:
        self.policy, self.shape = policy, shape
        self.user: Callable[[], object | None] = _nobody
        """A weak reference to whoever has it; nobody else may touch it."""
        device = model.norm.weight.device
        nothing = torch.zeros(1, dtype=torch.int64, device=device)
        text = nothing[:, None].expand(-1, shape.places)
        prompt = Prompt(nothing[:, None, None].expand(-1, model.config.codebooks, shape.prompt), nothing)
        one = begin(model, text, nothing + shape.places, [0])._replace(prompt=prompt)
        one, attention = advance(model, one, policy)
        self.progress: Progress = taken(one, nothing.expand(shape.rows))
        """A row for each of the shape; `model.rows.put` writes those that are to speak. Steps replace what is in it."""
        own = (part.new_zeros(stride, shape.rows, *part.shape[1:]) for part in (one.tokens, attention, one.done))
        self._said = Said(*own)
        self.graph = _captured(lambda: self._say(model), device, pool) if device.type == "cuda" else None

    def run(self, model: Lina) -> Said:
        """Takes all rows a stride further; what they said, on the CPU and overwritten by the next run."""
        if self.graph is None:
            self._say(model)
        else:
            self.graph.replay()
        return Said(*(part.cpu() for part in self._said))

    def _say(self, model: Lina) -> None:
        """What is captured: nothing in here may depend on what is in a tensor, or come from the CPU."""
        progress = self.progress
        for step in range(len(self._said.tokens)):
            progress, attention = advance(model, progress, self.policy)
            for kept, new in zip(self._said, (progress.tokens, attention, progress.done), strict=True):
                kept[step].copy_(new)
        # Once a stride: states are large.
        for kept, new in zip(leaves(self.progress), leaves(progress), strict=True):
            if kept is not new:
                kept.copy_(new)


def borrowed(user: object, model: Lina, policy: Policy, shape: Shape, stride: int) -> StepGraph:
    """A graph that is `user`'s alone until `give_back`, or until `user` is no more. What its rows hold is no speech."""
    with _capturing:
        made = _made.setdefault(model, [])
        # A model that was moved has its weights elsewhere.
        kind = (policy, shape, stride, *(weight.data_ptr() for weight in model.parameters()))
        idle = [place for place, (_, graph) in enumerate(made) if graph.user() is None]
        place = next((place for place in idle if made[place][0] == kind), None)
        if place is not None:
            made.append(made.pop(place))
        else:
            if len(made) >= KEPT and idle:
                del made[idle[0]]
            pool = next((graph.graph.pool() for _, graph in made if graph.graph is not None), None)
            made.append((kind, StepGraph(model, policy, shape, stride, pool)))
        graph = made[-1][1]
        graph.user = weakref.ref(user)
        return graph


def give_back(graph: StepGraph) -> None:
    graph.user = _nobody


_made: weakref.WeakKeyDictionary[Lina, list[tuple[tuple, StepGraph]]] = weakref.WeakKeyDictionary()
"""By model, what was used last at the end."""
_capturing = threading.Lock()
"""A process can capture one graph at a time."""


def _nobody() -> None:
    return None


def _rounded(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Graphs that share memory must be captured on one stream."""
    return torch.cuda.Stream(device)


def _captured(work: Callable[[], None], device: torch.device, pool: tuple | None) -> torch.cuda.CUDAGraph | None:
    """Does `work` once, which compiles and tunes kernels, then as a graph. None, with a warning, if that fails."""
    with torch.cuda.device(device):
        here, side = torch.cuda.current_stream(), _side(device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            work()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, which decode, go on meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # what fails within does not
            warnings.warn(f"steps cannot be captured as a CUDA graph, and are slow: {error}", stacklevel=2)
            return None
    return graph
