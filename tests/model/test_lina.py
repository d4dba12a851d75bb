"""The network: sizes as published, steps that equal the whole, rows that do not see each other, learning."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.delay import BOS, EOS, PAD, begun, delayed, undelayed
from model.flops import training_flops
from model.lina import Batch, Lina, losses, main
from model.lina_config import PRESETS, PUBLISHED, LinaConfig, ModelError
from model.mixers import parameters

SMALL = LinaConfig(
    width=32,
    encoder_layers=2,
    decoder_layers=1,
    heads=2,
    key_width=16,
    value_width=32,
    attention_head=8,
    text_layers=2,
    text_heads=2,
    position_width=12,
    position_kernel=5,
    vocabulary=10,
    codebooks=3,
    codebook_size=8,
    text_dropout=0.0,
)
MIXERS = ("gla", "attention")


def network(mixer: str = "gla", **changes) -> Lina:
    torch.manual_seed(0)
    return Lina(dataclasses.replace(SMALL, mixer=mixer, **changes)).double().eval()


def utterances(phones: list[int], frames: list[int], seed: int = 0, config: LinaConfig = SMALL) -> Batch:
    """Random utterances of these lengths, with padding that is not zero where it must not matter."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(phones)
    text = torch.randint(1, config.vocabulary, (rows, max(phones)), generator=generator)
    codes = torch.randint(0, config.codebook_size, (rows, config.codebooks, max(frames)), generator=generator)
    return Batch(text, torch.tensor(phones), codes, torch.tensor(frames))


def memories(model: Lina, rows: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = model.config.state_shape(rows)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(model.config.layers)]


def tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [] if tree is None else [leaf for part in tree for leaf in tensors(part)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Lina(PRESETS[name])
    assert abs(parameters(model) / PUBLISHED[name] - 1) <= 0.05


def test_presets_have_the_phonemes_of_the_pipeline() -> None:
    from pipeline.phonemes import INVENTORY

    assert {config.vocabulary for config in PRESETS.values()} == {len(INVENTORY)}


@pytest.mark.parametrize("name", PRESETS)
def test_the_softmax_twin_is_as_large(name: str) -> None:
    with torch.device("meta"):
        gla, attention = (Lina(dataclasses.replace(PRESETS[name], mixer=mixer)) for mixer in MIXERS)
    assert abs(parameters(attention) / parameters(gla) - 1) <= 0.002


def test_work_is_counted_as_the_mathematics_asks_for_it() -> None:
    """A step costs both twins what their equal parameters do; beyond, GLA's state is constant, softmax's past grows."""
    gla, attention = (dataclasses.replace(PRESETS["169m"], mixer=mixer) for mixer in MIXERS)
    one, many = 64, 4096

    def work(sizes: LinaConfig, steps: int) -> float:
        return training_flops(sizes, steps, 0, 0, steps * steps)

    assert work(gla, many) == pytest.approx(many / one * work(gla, one))
    state = 3 * 4 * gla.layers * gla.key_width * gla.value_width / gla.heads
    pairs = 3 * 2 * gla.layers * attention.attention_width
    for steps in (one, many):
        assert work(attention, steps) - work(gla, steps) == pytest.approx(pairs * steps**2 - state * steps)


def test_sizes_are_printed(monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "bad.json").write_text('{"width": 31}')
    monkeypatch.setattr(sys, "argv", ["lina", "--config", "169m"])
    main()
    printed = capsys.readouterr().out
    assert "166,411,678" in printed
    assert "-0.7%" in printed
    assert ["text_encoder", "44,099,580", "26.5%"] in [line.split() for line in printed.splitlines()]
    monkeypatch.setattr(sys, "argv", ["lina", "--config", str(tmp_path / "bad.json")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "width 31 is no multiple of text_heads 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 0}, "width must be a whole number from 8"),
        ({"width": True}, "width must be a whole number"),
        ({"heads": 5}, "key_width 96 is no multiple of heads 5"),
        ({"mixer": "mamba"}, "mixer must be 'gla' or 'attention'"),
        ({"dropout": float("nan")}, "dropout must be at least 0"),
        ({"position_kernel": 4}, "position_kernel odd"),
        ({"layers": 3}, "unknown field 'layers'"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        LinaConfig.from_dict(LinaConfig().to_dict() | changes)
    assert LinaConfig.from_dict(LinaConfig().to_dict()) == LinaConfig()


def test_delay_pattern() -> None:
    codes = torch.tensor([[[1, 2, 3], [4, 5, 6]], [[1, 0, 0], [4, 0, 0]]])
    tokens = delayed(codes, torch.tensor([3, 1]))
    assert tokens[0].T.tolist() == [[BOS, 4, 5, 6, EOS, EOS], [BOS, BOS, 7, 8, 9, EOS]]
    assert tokens[1].T.tolist() == [[BOS, 4, EOS, EOS, PAD, PAD], [BOS, BOS, 7, EOS, PAD, PAD]]
    assert begun(codes, torch.tensor([3, 1]))[0][0].T.tolist() == [[BOS, 4, 5, 6], [BOS, BOS, 7, 8]]


@given(frames=st.lists(st.integers(0, 9), min_size=1, max_size=4), codebooks=st.integers(1, 5))
def test_delay_is_undone(frames: list[int], codebooks: int) -> None:
    codes = torch.randint(0, 8, (len(frames), codebooks, max(frames)))
    for row, count in enumerate(frames):
        tokens = delayed(codes, torch.tensor(frames))[row, 1 : count + codebooks + 1]
        assert torch.equal(undelayed(tokens), codes[row, :, :count])


def test_loss_counts_codes_and_ends_alone() -> None:
    config = SMALL
    tokens = delayed(torch.zeros(2, 3, 5, dtype=torch.int64), torch.tensor([5, 2]))[:, 1:]
    logits = torch.zeros(*tokens.shape, config.tokens, dtype=torch.float64)
    loss, codebooks, rows, counts = losses(logits, tokens)
    # codebook i has n codes and 3 - i ends
    assert counts.tolist() == [3 * 5 + 6, 3 * 2 + 6]
    uniform = torch.tensor(config.tokens, dtype=torch.float64).log()
    torch.testing.assert_close(loss, uniform)
    torch.testing.assert_close(codebooks, uniform.expand(3))
    torch.testing.assert_close(rows, counts * uniform)
    logits[0, 0, 0, tokens[0, 0, 0]] = 3.0
    assert losses(logits, tokens)[1][0] < uniform
    assert losses(logits, tokens)[1][1] == codebooks[1]


@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=8)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 80)), min_size=1, max_size=4))
def test_a_row_depends_on_nothing_but_itself(mixer: str, sizes: list[tuple[int, int]]) -> None:
    model = network(mixer)
    batch = utterances([phones for phones, _ in sizes], [frames for _, frames in sizes])
    together = model(batch)
    for row, (phones, frames) in enumerate(sizes):
        alone = model(
            Batch(
                batch.phones[row : row + 1, :phones],
                batch.phone_lengths[row : row + 1],
                batch.codes[row : row + 1, :, :frames],
                batch.code_lengths[row : row + 1],
            )
        )
        steps = frames + SMALL.codebooks
        torch.testing.assert_close(together.logits[row, :steps], alone.logits[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.row_losses[row], alone.row_losses[0], rtol=0, atol=1e-9)
        assert together.row_tokens[row] == alone.row_tokens[0]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("taps", [0, 4])
def test_steps_equal_the_parallel_pass(mixer: str, taps: int) -> None:
    model = network(mixer, short_conv=taps)
    batch = utterances([7, 4], [70, 70])
    state = model.initial_state(memories(model, 2)) if mixer == "gla" else None
    whole = model(batch, state)
    text = model.read(batch.phones, batch.phone_lengths)
    tokens = delayed(batch.codes, batch.code_lengths)[:, :-1]
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            logits, state, attention = model.step(tokens[:, t], text, state)
            torch.testing.assert_close(logits, whole.logits[:, t], rtol=0, atol=1e-10)
            torch.testing.assert_close(attention, whole.attention[:, t], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
@given(cuts=st.lists(st.integers(0, 40), min_size=2, max_size=2), second=st.integers(1, 20))
@settings(max_examples=8)
def test_rows_that_stand_at_different_places_go_on_together(mixer: str, cuts: list[int], second: int) -> None:
    """Unequal numbers of steps taken together leave each row's state as its own steps alone leave it."""
    model = network(mixer)
    batch = utterances([6, 6], [60, 60])
    text = model.read(batch.phones, batch.phone_lengths)
    x = model.embed(delayed(batch.codes, batch.code_lengths))
    whole, _, _ = model.advance(x, text)
    before = x[:, : max(cuts)]
    _, state, _ = model.advance(before, text, None, torch.tensor(cuts)) if max(cuts) else (None, None, None)
    kept = [leaf.clone() for leaf in tensors(state)]
    following = torch.stack([x[row, cut : cut + second] for row, cut in enumerate(cuts)])
    lengths = torch.tensor([second, second - 1])
    after, state_after, _ = model.advance(following, text, state, lengths)
    for row, cut in enumerate(cuts):
        n = lengths[row]
        torch.testing.assert_close(after[row, :n], whole[row, cut : cut + n], rtol=0, atol=1e-10)
    last = torch.stack([x[row, cut + n] for row, (cut, n) in enumerate(zip(cuts, lengths, strict=True))])
    final, _, _ = model.advance(last[:, None], text, state_after)
    for row, cut in enumerate(cuts):
        torch.testing.assert_close(final[row, 0], whole[row, cut + lengths[row]], rtol=0, atol=1e-10)
    assert all(torch.equal(one, other) for one, other in zip(kept, tensors(state), strict=True))


def test_memories_set_each_row_and_get_gradients() -> None:
    model = network()
    batch = utterances([5, 5], [12, 9])
    chosen = [memory.requires_grad_() for memory in memories(model, 2)]
    position = torch.randn(2, 2, 3, 6, dtype=torch.float64).requires_grad_()
    output = model(batch, model.initial_state(chosen, position))
    swapped = model(batch, model.initial_state([m[[0, 0]] for m in chosen], position[[0, 0]]))
    torch.testing.assert_close(output.row_losses[0], swapped.row_losses[0])
    assert abs(output.row_losses[1] - swapped.row_losses[1]) > 1e-3
    for gradient in torch.autograd.grad(output.row_losses[0], [*chosen, position]):
        assert gradient[0].abs().max() > 0
        assert gradient[1].abs().max() == 0
    one = [memory[:1] for memory in chosen]
    for_all = model(batch, model.initial_state(one, batch=2))
    each = model(batch, model.initial_state([m.expand(2, -1, -1, -1) for m in one]))
    assert torch.equal(for_all.logits, each.logits)


def test_memories_that_do_not_fit_are_refused() -> None:
    model = network()
    with pytest.raises(ModelError, match="memories of 3 layers, found 2"):
        model.initial_state(memories(model, 1)[:2])
    with pytest.raises(ModelError, match=r"layer 0 must be \[B, H, d_k, d_v\] = \[1, 2, 8, 16\], not \[1, 2, 16, 8\]"):
        model.initial_state([m.mT for m in memories(model, 1)])
    with pytest.raises(ModelError, match="no memory to set"):
        network("attention").initial_state([])


def test_text_may_be_of_any_length() -> None:
    """The released code ends at 2,000; here places far beyond are still told apart."""
    model = network()
    positions = model.cross_attention.positions(torch.ones(1, 5000, dtype=torch.bool))[0]
    near = torch.cdist(positions[4000:4001], positions)[0]
    assert near.argmin() == 4000
    assert near[torch.arange(5000) != 4000].min() > 1e-3
    assert torch.isfinite(model(utterances([2500], [4])).loss)


@pytest.mark.parametrize("mixer", MIXERS)
def test_recomputed_activations_give_the_same_gradients(mixer: str) -> None:
    model, batch = network(mixer).train(), utterances([5, 3], [20, 30])
    kept = torch.autograd.grad(model(batch).loss, list(model.parameters()))
    model.activation_checkpointing = True
    again = torch.autograd.grad(model(batch).loss, list(model.parameters()))
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_every_parameter_is_trained() -> None:
    model = network().train()
    gradients = torch.autograd.grad(model(utterances([5, 3], [20, 30])).loss, list(model.parameters()))
    still = [name for (name, _), g in zip(model.named_parameters(), gradients, strict=True) if g.abs().max() == 0]
    # a bias of keys moves all scores of a softmax alike
    assert all("project.bias" in name for name in still)


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_learns_what_the_text_says(mixer: str) -> None:
    """Each phoneme is spoken as three frames of its own codes: predictable from the text and the way so far alone."""
    torch.manual_seed(0)
    model = Lina(dataclasses.replace(SMALL, mixer=mixer, text_layers=1, encoder_layers=1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=8e-3)
    generator = torch.Generator().manual_seed(1)

    def spoken() -> Batch:
        text = torch.randint(1, 8, (8, 4), generator=generator)
        codes = text.repeat_interleave(3, 1)[:, None].expand(-1, 3, -1)
        return Batch(text, torch.full((8,), 4), codes, torch.full((8,), 12))

    first = model(spoken()).loss.item()
    for _ in range(80):
        optimiser.zero_grad()
        model(spoken()).loss.backward()
        optimiser.step()
    assert first > 2.2
    assert model.eval()(spoken()).loss.item() < 1.2


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_follows_float32(mixer: str) -> None:
    """Stored in bfloat16, and with automatic mixed precision: losses and gradients stay near those of float32."""
    model, batch = network(mixer).float(), utterances([5, 3], [20, 30])

    def trained(loss) -> tuple[float, torch.Tensor]:
        return loss.item(), torch.autograd.grad(loss, model.encoder[0].mixer.project.weight)[0].float()

    exact, gradient = trained(model(batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = trained(model(batch).loss)
    model.bfloat16()
    for loss, rough in (mixed, trained(model(batch).loss)):
        assert abs(loss - exact) < 0.05
        assert torch.cosine_similarity(rough.flatten(), gradient.flatten(), dim=0) > 0.98
