"""Initial states: what Initial-State Tuning tunes (Lina-Speech, section 3.3), as low-rank factors.

Each GLA layer and head starts from a memory S0 = scale · Σ_r k_r v_rᵀ instead of zeros. A speaker's factors are a few
tensors by name, and any dimensions may stand in front, [speakers, …] in the tuner:

    k  [layers, rank, heads, d_k]      v  [layers, rank, heads, d_v]        rank ≥ 1
    full  [layers, heads, d_k, d_v]                                         rank 0: whole matrices, S0 = scale · full
    position_k, position_v or position_full                                 the same for the position network, one layer

Layers are those of the encoder, then those of the decoder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.lina_config import LinaConfig, ModelError
from model.mixers import position_widths

Factors = dict[str, torch.Tensor]
"""A speaker's, or many speakers' with one dimension more in front; the names stand above."""


@dataclass(frozen=True)
class Recipe:
    """How voices are tuned. The defaults are the paper's; where it is silent, the released code's, else as said."""

    rank: int = 1
    """Of a layer's and head's memory; 0 tunes whole matrices."""
    lr: float = 2**-3
    batch: int = 8
    """Samples a step."""
    steps: int = 100
    """At most."""
    schedule: str = "constant"
    """Of the learning rate over `steps`: `constant`, or `cosine`, which ends at zero."""
    warmup: int = 0
    """Steps over which the learning rate rises to `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """AdamW's; not published: PyTorch's default."""
    clip: float = 0.0
    """Largest norm of a speaker's gradient; 0 does not clip, as released."""
    scale: float = 0.02
    """Of S0."""
    spread: float = 0.02
    """Standard deviation of v at the start, of whole matrices, too; that of k is 1."""
    position: bool = False
    """Whether the position network's memory is tuned, too; neither paper nor release does it."""
    held_out: float = 0.1
    """Share of a speaker's samples that is never tuned on; at least one sample, at most half of them."""
    held_out_most: int = 16
    """Samples held out of a speaker who has very many."""
    eval_every: int = 10
    """Steps between two evaluations on what is held out."""
    patience: int = 3
    """Evaluations without a better held-out loss before a speaker stops; 0 goes on to `steps`, as published."""
    seed: int = 123

    def __post_init__(self) -> None:
        whole = {
            "rank": 0,
            "batch": 1,
            "steps": 1,
            "warmup": 0,
            "held_out_most": 0,
            "eval_every": 1,
            "patience": 0,
            "seed": 0,
        }
        for field, low in whole.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ModelError(f"tuning recipe: {field} must be a whole number of at least {low}, not {value!r}")
        # (above, or at least; below)
        bounds = {
            "lr": (0, False, 100),
            "eps": (0, False, 1),
            "scale": (0, False, 1e6),
            "weight_decay": (0, True, 100),
            "clip": (0, True, math.inf),
            "spread": (0, True, 1e6),
            "held_out": (0, True, 1),
        }
        for field, (low, equal, high) in bounds.items():
            value = getattr(self, field)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value < high or (value == low and not equal):
                least = "at least" if equal else "above"
                raise ModelError(f"tuning recipe: {field} must be {least} {low} and below {high}, not {value!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ModelError(f"tuning recipe: betas must be two numbers from 0 to below 1, not {self.betas!r}")
        if self.schedule not in ("constant", "cosine"):
            raise ModelError(f"tuning recipe: schedule must be 'constant' or 'cosine', not {self.schedule!r}")


class Memories(NamedTuple):
    """Dense memories, of one speaker or of many."""

    layers: torch.Tensor
    """[…, layers, heads, d_k, d_v]."""
    position: torch.Tensor | None
    """[…, heads, d_k, d_v] of the position network's sizes; None where it starts from zeros."""


def shapes(config: LinaConfig, rank: int, position: bool = False) -> dict[str, tuple[int, ...]]:
    """Of one speaker's factors, by name.

    Raises:
        ModelError: a model of softmax attention, which has no memory to set.
    """
    if config.mixer != "gla":
        raise ModelError("a model of softmax attention has no memory to tune; use one with mixer 'gla'")
    _, heads, d_k, d_v = config.state_shape(1)
    key, value = (width // heads for width in position_widths(config))
    if rank == 0:
        found = {"full": (config.layers, heads, d_k, d_v), "position_full": (heads, key, value)}
    else:
        found = {
            "k": (config.layers, rank, heads, d_k),
            "v": (config.layers, rank, heads, d_v),
            "position_k": (rank, heads, key),
            "position_v": (rank, heads, value),
        }
    return {name: shape for name, shape in found.items() if position or not name.startswith("position")}


def drawn(config: LinaConfig, recipe: Recipe, seed: int, dtype: torch.dtype = torch.float32) -> Factors:
    """Where a speaker starts without a warm start: k ~ N(0, 1) and v, or whole matrices, ~ N(0, spread²), as released.

    Drawn on the CPU from the speaker's own seed: nothing else has a say.
    """
    factors = {}
    for name, shape in shapes(config, recipe.rank, recipe.position).items():
        generator = torch.Generator().manual_seed(number(seed, "start", name) >> 1)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        factors[name] = (values if name.endswith("k") else values * recipe.spread).to(dtype)
    return factors


def memories(factors: Factors, scale: float) -> Memories:
    """S0 of all layers from factors, with gradients to them; dimensions in front stay in front."""

    def product(prefix: str) -> torch.Tensor | None:
        if f"{prefix}full" in factors:
            return scale * factors[f"{prefix}full"]
        if f"{prefix}k" not in factors:
            return None
        return torch.einsum("...rhk,...rhv->...hkv", scale * factors[f"{prefix}k"], factors[f"{prefix}v"])

    return Memories(product(""), product("position_"))


def factorised(dense: Memories, recipe: Recipe) -> Factors:
    """The factors of the recipe's rank that are nearest to dense memories of one speaker (Eckart and Young 1936).

    Each k has norm √d_k and a largest entry above 0, as drawn ones roughly have: so a step of tuning moves S0 as far as
    it does from a drawn start. Where a memory has a lower rank, v is 0 and k still spans something: both can learn.

    Raises:
        ModelError: a rank above that of any such memory.
    """

    def split(prefix: str, memory: torch.Tensor) -> Factors:
        if recipe.rank == 0:
            return {f"{prefix}full": memory / recipe.scale}
        if recipe.rank > min(memory.shape[-2:]):
            raise ModelError(
                f"rank {recipe.rank} is more than memories of {list(memory.shape[-2:])} have; use at most "
                f"{min(memory.shape[-2:])}, or 0 for whole matrices"
            )
        u, sizes, vh = torch.linalg.svd(memory.double() / recipe.scale, full_matrices=False)
        norm = memory.shape[-2] ** 0.5
        k, v = norm * u.mT[..., : recipe.rank, :], (sizes[..., None] * vh / norm)[..., : recipe.rank, :]
        sign = k.gather(-1, k.abs().argmax(-1, keepdim=True)).sign()
        # [layers, heads, rank, d] to [layers, rank, heads, d]
        k, v = ((part * sign).transpose(-2, -3).to(memory.dtype).contiguous() for part in (k, v))
        return {f"{prefix}k": k, f"{prefix}v": v}

    factors = split("", dense.layers)
    if recipe.position:
        if dense.position is None:
            raise ModelError("the recipe tunes the position network's memory; the dense memories have none")
        factors |= split("position_", dense.position)
    return factors


def mean_start(voices: Sequence[tuple[Factors, float]], recipe: Recipe) -> Factors:
    """Warm start at the mean voice: the mean of their S0, factorised.

    Factors themselves cannot be averaged: (k, v) and (-k, -v) are one voice.

    Args:
        voices: factors of one speaker each, with their scale; their ranks may differ.

    Raises:
        ModelError: no voice, voices of different models, no position factors where the recipe tunes them.
    """
    if not voices:
        raise ModelError("the mean of no voices: enroll some without a warm start first")
    dense = [memories(factors, scale) for factors, scale in voices]
    if len({memory.layers.shape for memory in dense}) > 1:
        raise ModelError("the mean of voices of different models: their memories have different shapes")
    positions = [memory.position for memory in dense if memory.position is not None]
    position = sum(positions) / len(dense) if positions else None
    return factorised(Memories(sum(memory.layers for memory in dense) / len(dense), position), recipe)


def number(*parts: int | str) -> int:
    """A 64-bit whole number that is a pure function of its parts, equal on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
