"""Speaking: rows on their own, prompts gone on from, randomness that belongs to the row, states left alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.delay import EOS, OFFSET
from model.lina import Batch, Lina
from model.lina_config import LinaConfig, ModelError
from model.sampling import Policy, Prompt, _drawn, _uniform, advance, begin, speak, taken

SMALL = LinaConfig(
    width=32,
    encoder_layers=1,
    decoder_layers=1,
    heads=2,
    key_width=16,
    value_width=32,
    attention_head=8,
    text_layers=1,
    text_heads=2,
    position_width=12,
    position_kernel=5,
    vocabulary=10,
    codebooks=3,
    codebook_size=8,
)
FREE = Policy(temperature=(1.0,), top_k=(0,), max_frames=40)


def network(mixer: str = "gla", codebooks: int = 3) -> Lina:
    torch.manual_seed(0)
    model = Lina(dataclasses.replace(SMALL, mixer=mixer, codebooks=codebooks)).double()
    # a head as of a trained model: sure of itself, not uniform
    torch.nn.init.normal_(model.heads.weight, std=0.3)
    return model


def texts(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 10, (rows, 6), generator=generator), torch.arange(rows) % 5 + 2


def voices(model: Lina, rows: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = model.config.state_shape(rows)
    memories = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(model.config.layers)]
    return model.initial_state(memories)


def leaves(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [] if tree is None else [leaf for part in tree for leaf in leaves(part)]


@pytest.mark.parametrize("mixer", ["gla", "attention"])
@settings(max_examples=4)
@given(rows=st.integers(1, 5), prompted=st.lists(st.integers(0, 7), min_size=5, max_size=5), voiced=st.booleans())
def test_a_row_says_the_same_alone_and_in_any_batch(mixer, rows: int, prompted: list[int], voiced: bool) -> None:
    model = network(mixer)
    phones, lengths = texts(rows)
    codes = torch.randint(0, 8, (rows, 3, max(prompted)), generator=torch.Generator().manual_seed(1))
    prompt = Prompt(codes, torch.tensor(prompted[:rows]))
    state = voices(model, rows) if voiced and mixer == "gla" else None
    seeds = list(range(100, 100 + rows))
    together = speak(model, phones, lengths, FREE, seeds, state, prompt)
    for row in range(rows):
        pick = torch.tensor([row])
        one = Prompt(codes[pick, :, : prompted[row]], prompt.lengths[pick])
        own_text = phones[pick, : lengths[row]]
        alone = speak(model, own_text, lengths[pick], FREE, [seeds[row]], taken(state, pick), one)[0]
        assert torch.equal(alone.codes, together[row].codes)
        assert alone.finished == together[row].finished
        torch.testing.assert_close(alone.attention, together[row].attention, rtol=0, atol=1e-9)


def test_rows_end_by_themselves_and_are_cut_at_the_limit() -> None:
    model = network()
    phones, lengths = texts(24)
    speech = speak(model, phones, lengths, FREE, range(24))
    counts = [s.codes.shape[1] for s in speech]
    assert len({n for n, s in zip(counts, speech, strict=True) if s.finished}) > 3
    assert all(n == 40 for n, s in zip(counts, speech, strict=True) if not s.finished)
    for s, n in zip(speech, lengths, strict=True):
        assert s.codes.shape[0] == 3
        assert s.codes.min() >= 0
        assert s.codes.max() < 8
        assert s.attention.shape == (s.codes.shape[1] + 2, n)
        torch.testing.assert_close(s.attention.sum(1), torch.ones(len(s.attention), dtype=torch.float64))
    short = speak(model, phones, lengths, dataclasses.replace(FREE, max_frames=5), range(24))
    for a, b in zip(short, speech, strict=True):
        assert torch.equal(a.codes, b.codes[:, :5])
    late = speak(model, phones, lengths, dataclasses.replace(FREE, min_frames=7), range(24))
    assert min(s.codes.shape[1] for s in late) >= 7


@pytest.mark.parametrize("mixer", ["gla", "attention"])
@pytest.mark.parametrize("prompted", [0, 6])
def test_what_is_said_is_drawn_from_what_the_parallel_pass_says(mixer: str, prompted: int) -> None:
    """Prompt and speech, taken as training data, give at each step the distribution that was drawn from."""
    model = network(mixer, codebooks=5).eval()
    phones, lengths = texts(12)
    codes = torch.randint(0, 8, (12, 5, prompted), generator=torch.Generator().manual_seed(2))
    prompt = Prompt(codes, torch.full((12,), prompted))
    said = speak(model, phones, lengths, FREE, range(12), None, prompt)
    finished = [row for row in range(12) if said[row].finished]
    assert len(finished) >= 3
    for row in finished:
        whole = torch.cat([codes[row], said[row].codes], 1)
        frames, pick = whole.shape[1], slice(row, row + 1)
        logits = model(Batch(phones[pick], lengths[pick], whole[None], torch.tensor([frames]))).logits[0]
        for codebook in range(5):
            steps = torch.arange(prompted, frames + (codebook == 0)) + codebook
            possible = logits[steps, codebook].clone()
            possible[:, : EOS if codebook == 0 else OFFSET] = -torch.inf
            possible[0, EOS] = -torch.inf
            drawn = _drawn(possible, 1.0, 0, torch.full_like(steps, row), (steps + 1) * 5 + codebook)
            assert torch.equal(drawn[: frames - prompted] - OFFSET, whole[codebook, prompted:])
            assert codebook or drawn[-1] == EOS


def test_each_codebook_has_a_rule_of_its_own() -> None:
    """The first is drawn from its five likeliest codes, the others take the likeliest that the parallel pass gives."""
    model = network().eval()
    phones, lengths = texts(16)
    frames, policy = 12, Policy(temperature=(1.0, 0.0), top_k=(5,), min_frames=12, max_frames=12)
    first, second = (
        torch.stack([row.codes for row in speak(model, phones, lengths, policy, [seed] * 16)]) for seed in (0, 1)
    )
    logits = model(Batch(phones, lengths, first, torch.full((16,), frames))).logits[..., OFFSET:]
    for codebook in range(3):
        # Rows that are cut say a code where the parallel pass is told the end: only steps before that are compared
        codes, given = first[:, codebook, : frames - codebook], logits[:, codebook:frames, codebook]
        likelier = (given > given.gather(2, codes[..., None])).sum(2)
        assert likelier.max() == (0 if codebook else 4)
    assert (first[:, 0] != second[:, 0]).any(1).all()


@pytest.mark.parametrize("mixer", ["gla", "attention"])
def test_going_on_from_a_prompt_is_going_on(mixer: str) -> None:
    """Having said n frames, or being given them as a prompt: with one seed, what is said next is the same."""
    model = network(mixer)
    phones, lengths = texts(3)
    policy = dataclasses.replace(FREE, max_frames=20, min_frames=20)
    whole = speak(model, phones, lengths, policy, [0] * 3)
    prompt = Prompt(torch.stack([s.codes[:, :9] for s in whole]), torch.tensor([9, 4, 0]))
    rest = speak(model, phones, lengths, dataclasses.replace(policy, min_frames=11), [0] * 3, None, prompt)
    for n, one, other in zip([9, 4, 0], whole, rest, strict=True):
        assert torch.equal(other.codes[:, :11], one.codes[:, n : n + 11])


def test_states_and_models_are_left_as_they_were() -> None:
    model = network().train()
    state = voices(model, 3)
    before = [leaf.clone() for leaf in leaves(state)]
    phones, lengths = texts(3)
    first = speak(model, phones, lengths, FREE, [1, 2, 3], state)
    second = speak(model, phones, lengths, FREE, [1, 2, 3], state)
    assert all(torch.equal(one, other) for one, other in zip(before, leaves(state), strict=True))
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(first, second, strict=True))
    assert model.training
    unvoiced = speak(model, phones, lengths, FREE, [1, 2, 3])
    assert any(not torch.equal(one.codes, other.codes) for one, other in zip(first, unvoiced, strict=True))


def test_progress_is_not_changed_by_steps() -> None:
    model = network().eval()
    phones, lengths = texts(2)
    progress = begin(model, phones, lengths, [5, 6])
    for _ in range(3):
        progress, _ = advance(model, progress, FREE)
    before = [leaf.clone() for leaf in leaves(progress)]
    one, _ = advance(model, progress, FREE)
    other, _ = advance(model, progress, FREE)
    assert torch.equal(one.tokens, other.tokens)
    assert all(torch.equal(x, y) for x, y in zip(before, leaves(progress), strict=True))


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 6).expand(40_000, -1)
    place = torch.arange(40_000)
    seeds = torch.full((40_000,), -3)
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 3)):
        drawn = _drawn(logits, temperature, top_k, seeds, place)
        kept = logits[0].clone()
        if top_k:
            kept[kept < kept.topk(top_k).values[-1]] = -torch.inf
        expected = (kept / temperature).softmax(0)
        measured = torch.bincount(drawn, minlength=6) / len(drawn)
        # five standard deviations of 40,000 draws
        assert (measured - expected).abs().max() < 5 * (0.25 / 40_000) ** 0.5
        assert (measured[expected == 0] == 0).all()


def test_randomness_is_even_and_unrelated_between_seeds_and_places() -> None:
    seeds = torch.tensor([0, 1, 2**32, -1])
    draws = torch.stack([_uniform(seeds, torch.full((4,), place), 5000) for place in (0, 1, 2)]).flatten(0, 1)
    assert draws.min() > 0
    assert draws.max() < 1
    assert (draws.mean(1) - 0.5).abs().max() < 5 * (1 / 12 / 5000) ** 0.5
    correlation = torch.corrcoef(draws) - torch.eye(12)
    assert correlation.abs().max() < 5 / 5000**0.5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"temperature": (-1.0,)}, "temperature must be"),
        ({"temperature": ()}, "temperature must be"),
        ({"temperature": (float("nan"),)}, "temperature must be"),
        ({"top_k": (-1,)}, "top_k must be"),
        ({"min_frames": 50, "max_frames": 40}, "min_frames ≤ max_frames"),
    ],
)
def test_impossible_policies_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        Policy(**changes)


def test_rows_that_do_not_fit_together_are_refused() -> None:
    model = network()
    phones, lengths = texts(3)
    with pytest.raises(ModelError, match="3 texts need as many lengths and seeds, not 3 and 2"):
        begin(model, phones, lengths, [1, 2])
    with pytest.raises(ModelError, match=r"prompts must be \[3, 3, N\], not \[3, 2, 4\]"):
        begin(model, phones, lengths, [1, 2, 3], None, Prompt(torch.zeros(3, 2, 4), torch.ones(3)))
