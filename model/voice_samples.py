"""A speaker's samples: what is held out, and which are tuned on at which step, as pure functions."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from model.initial_state import Recipe, number
from model.lina_config import LinaConfig, ModelError


class Sample(NamedTuple):
    """One utterance of a speaker."""

    phones: torch.Tensor
    """int [J], `<bos>` and `<eos>` included."""
    codes: torch.Tensor
    """int [K, N]; codebooks that the model does not read may follow."""


def checked(samples: Sequence[Sample], config: LinaConfig, speaker: str) -> list[Sample]:
    """Samples as the model reads them, int64, on the CPU.

    Raises:
        ModelError: none at all, an empty text, no frames, too few codebooks, ids that the model has not.
    """
    if not samples:
        raise ModelError(f"speaker {speaker!r} has no samples: nothing to tune on")
    good = []
    for place, (phones, codes) in enumerate(samples):
        phones, codes = (torch.as_tensor(part).to("cpu", torch.int64) for part in (phones, codes))
        where = f"sample {place} of speaker {speaker!r}"
        if phones.ndim != 1 or codes.ndim != 2 or codes.shape[0] < config.codebooks:
            raise ModelError(
                f"{where}: expected phones [J] and codes [K ≥ {config.codebooks}, N], found {list(phones.shape)} and "
                f"{list(codes.shape)}"
            )
        if not len(phones) or not codes.shape[1]:
            raise ModelError(f"{where} has {len(phones)} phonemes and {codes.shape[1]} frames: both must be there")
        codes = codes[: config.codebooks].contiguous()
        for what, ids, size in (("phonemes", phones, config.vocabulary), ("codes", codes, config.codebook_size)):
            if ids.min() < 0 or ids.max() >= size:
                raise ModelError(f"{where}: {what} must be from 0 to {size - 1}, found {ids.min()} to {ids.max()}")
        good.append(Sample(phones, codes))
    return good


def split(count: int, recipe: Recipe, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(tuned on, held out): ascending places of a speaker's samples; with one sample, nothing is held out."""
    held = min(max(1, round(recipe.held_out * count)), count // 2, recipe.held_out_most) if recipe.held_out else 0
    order = shuffled(count, seed, -1)
    return tuple(sorted(order[held:])), tuple(sorted(order[:held]))


def batch_at(count: int, size: int, seed: int, step: int) -> dict[int, int]:
    """How often each of `count` samples is in the batch of `size` at a step, counted from 0: {place: times}.

    Batches are cut from endless shuffled epochs, each sample once an epoch; with fewer samples than `size` some are in
    a batch twice, and are computed once, with twice the weight.
    """
    stream = range(step * size, (step + 1) * size)
    return dict(sorted(Counter(shuffled(count, seed, at // count)[at % count] for at in stream).items()))


@functools.lru_cache(maxsize=4096)
def shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """An order of 0 … count - 1."""
    return tuple(sorted(range(count), key=lambda place: number(seed, "epoch", epoch, place)))
