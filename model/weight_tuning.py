"""A voice by tuning weights: low-rank additions to them (Hu et al. 2021), or all of them; what states are held against.

    tuned = tune_weights(model, samples, held_out, WeightRecipe(rank=4))
    tuned.model                                  # a model of its own; the one given is as it was

The loop is that of Initial-State Tuning where it can be: the same batches by seed and step, AdamW, the same loss over
tokens, no dropout. It adapts one speaker at a time, for a speaker's weights cannot share a product with another's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from model.initial_state import Memories, number
from model.lina import Batch, Lina
from model.lina_config import ModelError
from model.state_pass import grouped, padded, steps_of, tokens_of
from model.voice_samples import Sample, batch_at, checked


@dataclass(frozen=True)
class WeightRecipe:
    """How weights are tuned."""

    rank: int = 4
    """Of what is added to each linear layer of the audio side; 0 tunes all weights of the whole model."""
    lr: float = 1e-3
    batch: int = 8
    steps: int = 100
    weight_decay: float = 0.01
    eval_every: int = 10
    seed: int = 123

    def __post_init__(self) -> None:
        for field, low in {"rank": 0, "batch": 1, "steps": 1, "eval_every": 1}.items():
            if getattr(self, field) < low:
                raise ModelError(f"weight recipe: {field} must be at least {low}, not {getattr(self, field)}")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ModelError(
                f"weight recipe: lr must be above 0 and weight_decay at least 0, not {self.lr} and {self.weight_decay}"
            )


@dataclass(frozen=True)
class TunedWeights:
    """A model that was adapted, and how that went."""

    model: Lina
    """In evaluation mode, its additions merged into its weights, as it was after the last step."""
    parameters: int
    """That were tuned."""
    curve: tuple[tuple[int, float], ...]
    """(steps taken, held-out loss)."""


class LowRank(nn.Module):
    """W + B A, with A [rank, in] ~ N(0, 1 / in) and B [out, rank] of zeros: at first exactly W."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, into) * into**-0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def copied(model: Lina) -> Lina:
    """The same model with tensors of its own and layers that can be trained, even where `model` is frozen."""
    own = Lina(model.config).to(model.norm.weight.device, model.norm.weight.dtype)
    own.load_state_dict(model.state_dict())
    return own.eval()


def low_rank(model: Lina, rank: int, seed: int = 0) -> Lina:
    """A copy whose causal blocks and cross-attention have low-rank additions, which alone want gradients."""
    own = copied(model).requires_grad_(False)
    weight = own.norm.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        for part in (own.encoder, own.cross_attention, own.decoder):
            for layer in [module for module in part.modules() if isinstance(module, nn.Linear)]:
                addition = LowRank(layer.out_features, layer.in_features, rank).to(weight.device, weight.dtype)
                parametrize.register_parametrization(layer, "weight", addition)
    return own


def merged(model: Lina) -> Lina:
    """The model itself, its low-rank additions now part of its weights."""
    for layer in [module for module in model.modules() if parametrize.is_parametrized(module)]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model.requires_grad_(False)


def tune_weights(
    model: Lina, samples: Sequence[Sample], held_out: Sequence[Sample], recipe: WeightRecipe, speaker: str = "speaker"
) -> TunedWeights:
    """Adapts a copy of a model to a speaker.

    Args:
        held_out: what is never tuned on; evaluated every `eval_every` steps and at both ends. May be empty.

    Raises:
        ModelError: samples that do not fit the model.
    """
    samples = checked(samples, model.config, speaker)
    held_out = checked(held_out, model.config, speaker) if held_out else []
    seed = number(recipe.seed, speaker)
    own = low_rank(model, recipe.rank, seed) if recipe.rank else copied(model)
    tuned = [parameter for parameter in own.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(tuned, lr=recipe.lr, weight_decay=recipe.weight_decay)
    curve = [(0, mean_loss(own, held_out))] if held_out else []
    for step in range(recipe.steps):
        times = batch_at(len(samples), recipe.batch, seed, step)
        optimiser.zero_grad()
        _loss(own, [samples[place] for place in times], list(times.values())).backward()
        optimiser.step()
        if held_out and ((step + 1) % recipe.eval_every == 0 or step + 1 == recipe.steps):
            curve.append((step + 1, mean_loss(own, held_out)))
    return TunedWeights(merged(own), sum(parameter.numel() for parameter in tuned), tuple(curve))


@torch.no_grad()
def mean_loss(model: Lina, samples: Sequence[Sample], memories: Memories | None = None, group_steps: int = 2048):
    """Mean cross-entropy, a float, over the tokens of samples, each read from the same memories [layers, …]."""
    total = 0.0
    for places in grouped([steps_of(sample) for sample in samples], group_steps):
        batch, state = Batch(*padded([samples[place] for place in places], model.norm.weight.device)), None
        if memories is not None:
            position = None if memories.position is None else memories.position[None]
            state = model.initial_state([memory[None] for memory in memories.layers], position, len(places))
        total += float(model(batch, state).row_losses.double().sum())
    return total / sum(tokens_of(sample) for sample in samples)


def _loss(model: Lina, rows: Sequence[Sample], times: Sequence[int]) -> torch.Tensor:
    """Mean over the tokens of rows, each counted so many times."""
    output = model(Batch(*padded(rows, model.norm.weight.device)))
    weights = torch.tensor(times, dtype=output.row_losses.dtype, device=output.row_losses.device)
    return (output.row_losses * weights).sum() / (output.row_tokens * weights).sum()
