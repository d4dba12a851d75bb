"""The arithmetic of a tuning step over the rows of many speakers: losses and gradients by speaker.

Rows of all speakers are cut into groups of like lengths within a budget of model steps. A group's gradient reaches the
memories of its rows; they are summed by speaker, and the factors' gradients follow once a step. No speaker's number
depends on which rows lay beside its own, up to rounding; non-finite ones would (a NaN hides how far gates decay, which
`model.gla_chunked` asks of a batch), so when any turns up, every speaker is computed alone.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from model.frozen_layers import freeze
from model.initial_state import Factors, Memories, memories
from model.lina import Lina
from model.state_pass import Prepared, grouped, prepared, row_losses, steps_of
from model.voice_samples import Sample


class Row(NamedTuple):
    """A sample in a step."""

    owner: int
    """Number of its speaker among those of the step."""
    key: tuple[str, int]
    """Speaker and place: what the sample is kept under."""
    sample: Sample
    weight: float
    """Of the sum of its tokens' losses, in its speaker's loss."""


class Work:
    """Computes for one model, whose weights it freezes, and keeps what does not depend on memories.

    Args:
        scale: of S0.
        cache_bytes: of what is kept. What fits stays until `forget`; the rest is computed again each time. (The least
            recently used one would always be thrown away just before it is needed: epochs are cyclic.)
        group_steps: rows · longest of a group; None picks by device.
    """

    def __init__(self, model: Lina, scale: float, cache_bytes: int = 1 << 30, group_steps: int | None = None) -> None:
        self.model = freeze(model)
        self.device = model.norm.weight.device
        self.dtype = torch.float64 if model.norm.weight.dtype == torch.float64 else torch.float32
        self.group_steps = group_steps or self._group_steps()
        self.scale, self.cache_bytes, self.kept_bytes = scale, cache_bytes, 0
        self.seconds: dict[str, float] = defaultdict(float)
        """By part: `prepare`, `forward`, `backward`, `update`, `evaluate`; on a GPU, by when it was asked for."""
        self.steps = self.padded_steps = 0
        """Model steps of rows, without and with their padding."""
        self._kept: dict[tuple[str, int], Prepared] = {}

    def _group_steps(self) -> int:
        """On a CPU what its cache likes; on a GPU what two fifths of its free memory hold of what backward needs, some
        twenty values of the model's width a block and step."""
        if self.device.type != "cuda":
            return 2048
        config, size = self.model.config, self.model.norm.weight.element_size()
        step = 20 * config.width * config.layers * max(size, 4)
        return max(2048, int(0.4 * torch.cuda.mem_get_info(self.device)[0]) // step)

    def forget(self, speaker: str) -> None:
        """Gives back the memory of a speaker's samples."""
        for key in [key for key in self._kept if key[0] == speaker]:
            self.kept_bytes -= self._kept.pop(key).bytes

    def gradients(self, factors: Factors, rows: Sequence[Row]) -> tuple[torch.Tensor, Factors]:
        """(losses [speakers], gradients [speakers, …]) of speakers' factors [speakers, …] over their rows."""
        return self._separately(factors, rows, self._gradients)

    def losses(self, dense: Memories | None, rows: Sequence[Row], speakers: int) -> torch.Tensor:
        """Losses [speakers] from memories [speakers, …], None for zeros; without gradients."""
        if dense is None:
            return self._forward(None, rows, speakers)
        parts = {name: part for name, part in dense._asdict().items() if part is not None}
        return self._separately(parts, rows, self._losses)[0]

    def _separately(
        self, by_speaker: Factors, rows: Sequence[Row], compute: Callable[..., tuple[torch.Tensor, Factors]]
    ) -> tuple[torch.Tensor, Factors]:
        """All speakers together or, where a number is not finite, each alone."""
        losses, gradients = compute(by_speaker, rows)
        finite = [losses.isfinite().all(), *(values.isfinite().all() for values in gradients.values())]
        if len(losses) == 1 or bool(torch.stack(finite).all()):
            return losses, gradients
        alone = [
            compute(
                {name: values[owner : owner + 1] for name, values in by_speaker.items()},
                [row._replace(owner=0) for row in rows if row.owner == owner],
            )
            for owner in range(len(losses))
        ]
        joined = {name: torch.cat([each[1][name] for each in alone]) for name in gradients}
        return torch.cat([each[0] for each in alone]), joined

    def _losses(self, dense: Factors, rows: Sequence[Row]) -> tuple[torch.Tensor, Factors]:
        found = Memories(dense["layers"], dense.get("position"))
        return self._forward(found, rows, len(found.layers)), {}

    @torch.no_grad()
    def _forward(self, dense: Memories | None, rows: Sequence[Row], speakers: int) -> torch.Tensor:
        losses = torch.zeros(speakers, dtype=self.dtype, device=self.device)
        for group, owners, weights in self._groups(rows):
            start = time.perf_counter()
            own = None if dense is None else _of_rows(dense, owners)
            losses.index_add_(0, owners, row_losses(self.model, group, own) * weights)
            self.seconds["evaluate"] += time.perf_counter() - start
        return losses

    def _gradients(self, factors: Factors, rows: Sequence[Row]) -> tuple[torch.Tensor, Factors]:
        leaves = {name: values.detach().requires_grad_() for name, values in factors.items()}
        dense = memories(leaves, self.scale)
        wanted = [part for part in dense if part is not None]
        slopes = [torch.zeros_like(part) for part in wanted]
        losses = torch.zeros(len(dense.layers), dtype=self.dtype, device=self.device)
        for group, owners, weights in self._groups(rows):
            start = time.perf_counter()
            own = _of_rows(dense, owners)
            weighted = row_losses(self.model, group, own) * weights
            middle = time.perf_counter()
            found = torch.autograd.grad(weighted.sum(), [part for part in own if part is not None])
            for slope, part in zip(slopes, found, strict=True):
                slope.index_add_(0, owners, part)
            losses.index_add_(0, owners, weighted.detach())
            self.seconds["forward"] += middle - start
            self.seconds["backward"] += time.perf_counter() - middle
        gradients = torch.autograd.grad(wanted, list(leaves.values()), slopes)
        return losses, dict(zip(leaves, gradients, strict=True))

    def _groups(self, rows: Sequence[Row]):
        """(prepared rows, their owners int64 [B], their weights [B]) of each group."""
        lengths = [steps_of(row.sample) for row in rows]
        for places in grouped(lengths, self.group_steps):
            group = [rows[place] for place in places]
            self.steps += sum(lengths[place] for place in places)
            self.padded_steps += len(places) * lengths[places[0]]
            owners = torch.tensor([row.owner for row in group], device=self.device)
            weights = torch.tensor([row.weight for row in group], dtype=self.dtype, device=self.device)
            yield self._prepared(group), owners, weights

    def _prepared(self, rows: Sequence[Row]) -> list[Prepared]:
        """Of a group, kept from before or made now."""
        start = time.perf_counter()
        missing = {row.key: row.sample for row in rows if row.key not in self._kept}
        made = dict(zip(missing, prepared(self.model, list(missing.values())), strict=True)) if missing else {}
        for key, ready in made.items():
            if self.kept_bytes + ready.bytes <= self.cache_bytes:
                self._kept[key] = ready
                self.kept_bytes += ready.bytes
        found = [made[row.key] if row.key in made else self._kept[row.key] for row in rows]
        self.seconds["prepare"] += time.perf_counter() - start
        return found


def _of_rows(dense: Memories, owners: torch.Tensor) -> Memories:
    """A memory a row, as leaves of the gradient."""
    wanted = torch.is_grad_enabled()
    return Memories(*(part if part is None else part.detach()[owners].requires_grad_(wanted) for part in dense))
