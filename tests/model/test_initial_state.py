"""Initial states: shapes, starts that belong to their speaker alone, and factors of dense memories."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.initial_state import Memories, Recipe, drawn, factorised, mean_start, memories, number, shapes
from model.lina import Lina
from model.lina_config import PRESETS, LinaConfig, ModelError

SMALL = LinaConfig(
    width=16,
    encoder_layers=2,
    decoder_layers=1,
    heads=2,
    key_width=8,
    value_width=16,
    text_layers=1,
    text_heads=2,
    position_width=12,
    vocabulary=6,
    codebooks=2,
    codebook_size=8,
)


def dense(seed: int, position: bool = False) -> Memories:
    generator = torch.Generator().manual_seed(seed)
    layers = torch.randn(3, 2, 4, 8, generator=generator, dtype=torch.float64)
    return Memories(layers, torch.randn(2, 3, 6, generator=generator, dtype=torch.float64) if position else None)


@given(rank=st.integers(0, 9), position=st.booleans(), speakers=st.integers(1, 3), scale=st.floats(0.01, 2))
def test_memories_are_sums_of_outer_products(rank: int, position: bool, speakers: int, scale: float) -> None:
    recipe = Recipe(rank=rank, position=position)
    each = [drawn(SMALL, recipe, seed, torch.float64) for seed in range(speakers)]
    stacked = memories({name: torch.stack([one[name] for one in each]) for name in each[0]}, scale)
    assert stacked.layers.shape == (speakers, 3, 2, 4, 8)
    assert (stacked.position is not None) == position
    for speaker, factors in enumerate(each):
        alone = memories(factors, scale)
        torch.testing.assert_close(stacked.layers[speaker], alone.layers)
        if position:
            torch.testing.assert_close(stacked.position[speaker], alone.position)
        for layer, head in ((0, 1), (2, 0)):
            if rank:
                k, v = factors["k"][layer, :, head], factors["v"][layer, :, head]
                expected = scale * sum(torch.outer(k[r], v[r]) for r in range(rank))
            else:
                expected = scale * factors["full"][layer, head]
            torch.testing.assert_close(alone.layers[layer, head], expected)


@pytest.mark.parametrize("name", ["tiny", "60m", "169m", "311m"])
def test_memories_fit_every_preset(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = Lina(config)
    for rank in (0, 1):
        start = memories(drawn(config, Recipe(rank=rank, position=True), 0), 0.02)
        state = model.initial_state(list(start.layers.unsqueeze(1)), start.position[None])
        assert len(state.encoder) + len(state.decoder) == config.layers
    numbers = sum(values.numel() for values in drawn(config, Recipe(), 0).values())
    assert numbers == config.layers * (config.key_width + config.value_width)


def test_starts_are_the_releases_and_the_speakers_own() -> None:
    """Moments as released; a tensor depends on the seed alone: not on dtype or on what else is tuned."""
    config = PRESETS["tiny"]
    start = drawn(config, Recipe(rank=64), 7)
    assert start["k"].std().item() == pytest.approx(1, rel=0.02)
    assert start["v"].std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(start["k"].mean()) < 0.02
    assert drawn(config, Recipe(rank=0), 7)["full"].std().item() == pytest.approx(0.02, rel=0.02)
    again = drawn(config, Recipe(rank=64, position=True), 7, torch.float64)
    assert torch.equal(again["k"].float(), start["k"])
    assert not torch.equal(drawn(config, Recipe(rank=64), 8)["k"], start["k"])
    flat = start["k"].flatten(), drawn(config, Recipe(rank=64), 8)["k"].flatten()
    assert abs(torch.corrcoef(torch.stack(flat))[0, 1]) < 0.02


def test_numbers_are_the_same_everywhere() -> None:
    assert number(123, "ada") == 11505386689941177679
    assert number(1, "23") != number("12", "3")


@settings(max_examples=20)
@given(rank=st.integers(0, 3), seed=st.integers(0, 9), position=st.booleans())
def test_factors_are_the_nearest_of_their_rank(rank: int, seed: int, position: bool) -> None:
    memory, recipe = dense(seed, position), Recipe(rank=rank, position=position, scale=0.3)
    factors = factorised(memory, recipe)
    assert {name: tuple(values.shape) for name, values in factors.items()} == shapes(SMALL, rank, position)
    near = memories(factors, recipe.scale)
    for exact, found in zip(memory, near, strict=True):
        if exact is None:
            continue
        left = torch.linalg.svdvals(exact)[..., rank:] if rank else torch.zeros(1)
        error = (exact - found).square().sum()
        torch.testing.assert_close(error, left.square().sum().to(error), rtol=1e-8, atol=1e-12)
    if rank:
        norms = factors["k"].norm(dim=-1)
        torch.testing.assert_close(norms, torch.full_like(norms, 2.0))


def test_factors_of_too_high_a_rank_can_still_learn() -> None:
    memory = memories({name: values.double() for name, values in drawn(SMALL, Recipe(), 0).items()}, 1.0)
    factors = factorised(memory, Recipe(rank=3))
    torch.testing.assert_close(memories(factors, 0.02).layers, memory.layers)
    assert factors["v"][:, 1:].abs().max() < 1e-12
    assert factors["k"][:, 1:].norm(dim=-1).min() > 1.9
    with pytest.raises(ModelError, match="rank 5 is more than memories of \\[4, 8\\] have; use at most 4, or 0"):
        factorised(memory, Recipe(rank=5))


def test_the_mean_voice_is_that_of_memories_not_of_factors() -> None:
    """(k, v) and (-k, -v) are one voice: its mean with itself is itself."""
    one = {name: values.double() for name, values in drawn(SMALL, Recipe(), 3).items()}
    mirrored = {name: -values for name, values in one.items()}
    mean = mean_start([(one, 0.02), (mirrored, 0.02)], Recipe())
    torch.testing.assert_close(memories(mean, 0.02).layers, memories(one, 0.02).layers)
    other = {name: values.double() for name, values in drawn(SMALL, Recipe(rank=2), 4).items()}
    mixed = mean_start([(one, 0.02), (other, 0.5)], Recipe(rank=3))
    expected = (memories(one, 0.02).layers + memories(other, 0.5).layers) / 2
    torch.testing.assert_close(memories(mixed, 0.02).layers, expected)
    with pytest.raises(ModelError, match="the mean of no voices"):
        mean_start([], Recipe())
    with pytest.raises(ModelError, match="different models"):
        mean_start([(one, 0.02), (drawn(PRESETS["tiny"], Recipe(), 0), 0.02)], Recipe())
    with pytest.raises(ModelError, match="the dense memories have none"):
        mean_start([(one, 0.02)], Recipe(position=True))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": -1}, "rank must be a whole number of at least 0"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"steps": True}, "steps must be a whole number"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"clip": float("inf")}, "clip must be at least 0 and below inf"),
        ({"held_out": 1.0}, "held_out must be at least 0 and below 1"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"schedule": "linear"}, "schedule must be 'constant' or 'cosine'"),
    ],
)
def test_impossible_recipes_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        dataclasses.replace(Recipe(), **changes)


def test_the_recipe_is_the_papers() -> None:
    recipe = Recipe()
    assert (recipe.lr, recipe.batch, recipe.steps, recipe.rank, recipe.scale) == (0.125, 8, 100, 1, 0.02)
    assert not recipe.position


def test_softmax_attention_has_no_memory() -> None:
    with pytest.raises(ModelError, match="no memory to tune"):
        shapes(dataclasses.replace(SMALL, mixer="attention", attention_head=4), 1)
