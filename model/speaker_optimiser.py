"""AdamW over stacked speakers: clipping, moments, step counts and learning rates are each speaker's own.

Loshchilov and Hutter 2019, in PyTorch's form; a speaker's numbers are those of `torch.optim.AdamW` over its factors.
"""

from __future__ import annotations

import math

import torch

from model.initial_state import Factors, Recipe


class SpeakerAdamW:
    """Tunes the slots of stacked factors, [slots, …], in place.

    Args:
        factors: of all slots; the optimiser changes them, and owns nothing else of them.
    """

    def __init__(self, factors: Factors, recipe: Recipe) -> None:
        self.factors, self.recipe = factors, recipe
        self._first = {name: torch.zeros_like(values) for name, values in factors.items()}
        self._second = {name: torch.zeros_like(values) for name, values in factors.items()}
        self._steps = [0] * len(next(iter(factors.values())))

    def begin(self, slot: int, start: Factors) -> None:
        """A new speaker in a slot."""
        self._steps[slot] = 0
        for name, values in self.factors.items():
            values[slot] = start[name].to(values)
            self._first[name][slot] = 0
            self._second[name][slot] = 0

    def update(self, slots: list[int], gradients: Factors) -> None:
        """One step of the speakers in some slots, from their gradients [len(slots), …]."""
        recipe, (one, two) = self.recipe, self.recipe.betas
        if recipe.clip:
            norms = gradient_norms(gradients)
            fits = (recipe.clip / (norms + 1e-6)).clamp(max=1)
            gradients = {name: _along(fits, values) * values for name, values in gradients.items()}
        like = next(iter(gradients.values()))
        index = torch.tensor(slots, device=like.device)
        rates = [learning_rate(recipe, self._steps[slot]) for slot in slots]
        for slot in slots:
            self._steps[slot] += 1
        counts = [self._steps[slot] for slot in slots]
        kept, sizes, roots = (
            torch.tensor(values, dtype=like.dtype, device=like.device)
            for values in (
                [1 - rate * recipe.weight_decay for rate in rates],
                [rate / (1 - one**count) for rate, count in zip(rates, counts, strict=True)],
                [math.sqrt(1 - two**count) for count in counts],
            )
        )
        for name, gradient in gradients.items():
            first = self._first[name][index].lerp_(gradient, 1 - one)
            second = self._second[name][index].mul_(two).addcmul_(gradient, gradient, value=1 - two)
            change = first / (second.sqrt() / _along(roots, second) + recipe.eps)
            values = self.factors[name][index] * _along(kept, change) - _along(sizes, change) * change
            for store, new in ((self._first, first), (self._second, second), (self.factors, values)):
                store[name][index] = new


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of a speaker's step, counted from 0."""
    rate = recipe.lr * min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else recipe.lr
    if recipe.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))
    return rate


def gradient_norms(gradients: Factors) -> torch.Tensor:
    """[speakers]: over all of a speaker's factors."""
    return sum(values.flatten(1).square().sum(1) for values in gradients.values()).sqrt()


def _along(by_speaker: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[speakers], such that it multiplies [speakers, …]."""
    return by_speaker.view(-1, *[1] * (values.ndim - 1))
