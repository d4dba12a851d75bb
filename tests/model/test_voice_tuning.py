"""Tuning many speakers at once: each ends where it ends alone, weights stay frozen, and what is held out decides."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.continuation import continued_losses
from model.delay import delayed
from model.initial_state import Factors, Memories, Recipe, drawn, factorised, memories, number
from model.lina import Batch, Lina, losses
from model.lina_config import LinaConfig, ModelError
from model.speaker_optimiser import SpeakerAdamW, learning_rate
from model.state_pass import padded, prepared, read_memories, read_start, row_losses, steps_of, tokens_of
from model.token_loss import row_losses as token_losses
from model.tuned import Tuned
from model.voice_samples import Sample, batch_at, split
from model.voice_tuning import Tuner, tune

SMALL = LinaConfig(
    width=32,
    encoder_layers=2,
    decoder_layers=1,
    heads=2,
    key_width=16,
    value_width=32,
    text_layers=1,
    text_heads=2,
    position_width=12,
    position_kernel=5,
    vocabulary=10,
    codebooks=2,
    codebook_size=8,
    text_dropout=0.3,
    dropout=0.2,
)

SPACE = 4


@functools.cache
def network(**changes) -> Lina:
    """In float64, with layers that listen to their memory more than new ones do."""
    torch.manual_seed(0)
    model = Lina(dataclasses.replace(SMALL, **changes)).double()
    with torch.no_grad():
        for block in (*model.encoder, *model.decoder):
            block.mixer.project.weight *= 3
            block.mixer.out.weight *= 3
    return model


def speech(seed: int, lengths: list[tuple[int, int]], config: LinaConfig = SMALL) -> list[Sample]:
    """Samples of (phonemes, frames), in a voice of its own: a speaker prefers some codes."""
    generator = torch.Generator().manual_seed(seed)
    preferred = torch.rand(config.codebooks, config.codebook_size, generator=generator) ** 4
    return [
        Sample(
            torch.randint(1, config.vocabulary, (phones,), generator=generator),
            torch.multinomial(preferred, frames, replacement=True, generator=generator),
        )
        for phones, frames in lengths
    ]


def alone(model: Lina, samples: list[Sample], recipe: Recipe, seed: int, steps: int) -> Factors:
    """The same tuning, written plainly: one speaker, the whole model, PyTorch's optimiser and clipping."""
    model.eval()
    factors = {
        name: values.requires_grad_() for name, values in drawn(model.config, recipe, seed, torch.float64).items()
    }
    optimiser = torch.optim.AdamW(
        factors.values(), recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    tuning = [samples[i] for i in split(len(samples), recipe, seed)[0]]
    for step in range(steps):
        times = batch_at(len(tuning), recipe.batch, seed, step)
        chosen = [tuning[i] for i, count in times.items() for _ in range(count)]
        batch = Batch(*padded(chosen, torch.device("cpu")))
        dense = memories(factors, recipe.scale)
        state = model.initial_state(
            [memory.expand(len(chosen), -1, -1, -1) for memory in dense.layers.unsqueeze(1)],
            None if dense.position is None else dense.position.expand(len(chosen), -1, -1, -1),
        )
        optimiser.zero_grad()
        gradients = torch.autograd.grad(model(batch, state).loss, list(factors.values()))
        for values, gradient in zip(factors.values(), gradients, strict=True):
            values.grad = gradient
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(factors.values(), recipe.clip)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimiser.step()
    return {name: values.detach() for name, values in factors.items()}


def furthest(one: Factors, other: Factors) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


lengths = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 90)), min_size=1, max_size=5)
recipes = st.builds(
    Recipe,
    rank=st.integers(0, 3),
    batch=st.integers(1, 4),
    steps=st.integers(3, 5),
    schedule=st.sampled_from(["constant", "cosine"]),
    warmup=st.integers(0, 3),
    clip=st.sampled_from([0.0, 1e-2]),
    scale=st.just(1.0),
    position=st.booleans(),
    eval_every=st.integers(1, 3),
    patience=st.just(0),
)


@settings(max_examples=12)
@given(
    recipe=recipes,
    speakers=st.lists(st.tuples(lengths, st.integers(0, 5), st.integers(1, 6)), min_size=2, max_size=4),
    slots=st.integers(1, 4),
    cache_bytes=st.sampled_from([0, 40_000, 1 << 30]),
    group_steps=st.sampled_from([1, 100, 400, 10_000]),
)
def test_speakers_together_end_as_each_alone(recipe, speakers, slots, cache_bytes, group_steps) -> None:
    """Whoever joins when, leaves when, is padded to what, is cached or not: the states are those of separate runs."""
    model = network()
    tuner = Tuner(model, recipe, slots, cache_bytes, group_steps, SPACE)
    samples = {f"s{i}": speech(i, sizes) for i, (sizes, _, _) in enumerate(speakers)}
    joins = {f"s{i}": at for i, (_, at, _) in enumerate(speakers)}
    leaves = {f"s{i}": after for i, (_, _, after) in enumerate(speakers)}
    done: dict[str, Tuned] = {}
    for now in range(200):
        for name in [name for name, at in joins.items() if at <= now][: tuner.free]:
            tuner.join(name, samples[name])
            del joins[name]
        for voice in tuner.step():
            done[voice.speaker] = voice
        for name in tuner.active:
            leaves[name] -= 1
            if leaves[name] == 0:
                done[name] = tuner.leave(name)
        if len(done) == len(speakers):
            break
    assert tuner.work.kept_bytes == 0
    for name, voice in done.items():
        seed = number(recipe.seed, name)
        assert voice.seed == seed
        expected = alone(model, samples[name], recipe, seed, voice.best_step)
        assert furthest(voice.factors, expected) < 1e-10
        assert voice.reason == ("steps" if voice.steps == recipe.steps else "left")


def test_reports_do_not_depend_on_company_either() -> None:
    model, recipe = network(), Recipe(steps=6, eval_every=2, batch=4)
    speakers = [(f"s{i}", speech(i, [(3 + i, 20 + 9 * j) for j in range(6)])) for i in range(5)]
    together = {voice.speaker: voice for voice in tune(model, speakers, recipe, slots=3, space=SPACE)}
    assert set(together) == {name for name, _ in speakers}
    for name, samples in speakers:
        (single,) = tune(model, [(name, samples)], recipe, slots=1, space=SPACE)
        other = together[name]
        assert (single.steps, single.best_step, single.samples, single.held_out) == (6, other.best_step, 5, 1)
        for one, two in (
            (single.base_loss, other.base_loss),
            (single.continuation_loss, other.continuation_loss),
            (single.tuned_loss, other.tuned_loss),
            *zip(single.train_losses, other.train_losses, strict=True),
            *zip(sum(single.curve, ()), sum(other.curve, ()), strict=True),
        ):
            assert abs(one - two) < 1e-10
    assert all(voice.seconds > 0 for voice in together.values())


@settings(max_examples=15)
@given(sizes=lengths, taps=st.sampled_from([0, 4]), zeros=st.booleans())
def test_what_is_kept_of_a_sample_gives_the_whole_models_losses(sizes, taps, zeros) -> None:
    model = network(short_conv=taps)
    samples = speech(3, sizes)
    batch = Batch(*padded(samples, torch.device("cpu")))
    generator = torch.Generator().manual_seed(1)
    layers = torch.randn(len(samples), 3, *model.config.state_shape(1)[1:], generator=generator, dtype=torch.float64)
    position = torch.randn(len(samples), 2, 3, 6, generator=generator, dtype=torch.float64)
    model.eval().requires_grad_(False)
    state = None if zeros else model.initial_state(list(layers.unbind(1)), position)
    whole = model(batch, state)
    ours = row_losses(model, prepared(model, samples), None if zeros else Memories(layers, position))
    torch.testing.assert_close(ours, whole.row_losses, rtol=1e-12, atol=1e-10)
    assert [tokens_of(sample) for sample in samples] == whole.row_tokens.tolist()
    assert [steps_of(sample) for sample in samples] == (batch.code_lengths + SMALL.codebooks).tolist()


def test_total_forgetting_in_the_first_layer_is_exact() -> None:
    """Gates so strong that the decay from the start is 0 in any dtype."""
    model = Lina(SMALL).double().eval()
    with torch.no_grad():
        model.encoder[0].mixer.decay[1].bias.fill_(-5000.0)
    model.requires_grad_(False)
    samples = speech(0, [(4, 150)])
    layers = torch.randn(1, 3, *SMALL.state_shape(1)[1:], dtype=torch.float64)
    whole = model(Batch(*padded(samples, torch.device("cpu"))), model.initial_state(list(layers.unbind(1))))
    ours = row_losses(model, prepared(model, samples), Memories(layers, None))
    torch.testing.assert_close(ours, whole.row_losses, rtol=1e-12, atol=1e-10)


def test_loss_through_frozen_heads(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (3, 2, 17), generator=generator)
    targets = delayed(codes, torch.tensor([17, 3, 9]))[:, 1:]
    hidden = torch.randn(3, targets.shape[1], 32, generator=generator, dtype=torch.float64).requires_grad_()
    heads = torch.randn(2 * 11, 32, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    logits = (hidden @ heads.mT).unflatten(-1, (2, 11))
    expected = losses(logits, targets)[2]
    slope = torch.autograd.grad((expected * weights).sum(), hidden)[0]
    for block in (1, 5 * 11 * 8, 1 << 20):
        monkeypatch.setattr("model.token_loss.BLOCK", block)
        found = token_losses(hidden, heads, targets)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), hidden)[0], slope, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="freeze them"):
        token_losses(hidden, heads.requires_grad_(), targets)


def test_no_gradient_of_a_weight_exists() -> None:
    model = Lina(SMALL)
    tuner = Tuner(model, Recipe(steps=2, batch=2, position=True))
    tuner.join("a", speech(0, [(3, 20), (4, 30), (2, 9)]))
    tuner.step()
    assert not model.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    rows = prepared(model, speech(0, [(3, 20), (4, 70)]))
    layers = torch.randn(2, 3, *SMALL.state_shape(1)[1:]).requires_grad_()
    position = torch.randn(2, 2, 3, 6).requires_grad_()
    leaves, seen, waiting = set(), set(), [row_losses(model, rows, Memories(layers, position)).sum().grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    assert leaves == {id(layers), id(position)}
    assert not any(part.requires_grad for row in rows for part in row)


def test_weights_stay_as_they_were() -> None:
    model = Lina(SMALL)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    list(tune(model, [("a", speech(0, [(3, 20), (4, 30)]))], Recipe(steps=3)))
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@functools.cache
def trained() -> Lina:
    """A model that has heard many voices, each of which prefers some codes, and goes on in the voice it hears."""
    torch.manual_seed(0)
    model = Lina(dataclasses.replace(SMALL, dropout=0.0, text_dropout=0.0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        voices = [speech(1000 + 8 * step + row, [(4, 40) if row % 4 else (9, 80)])[0] for row in range(8)]
        optimiser.zero_grad()
        model(Batch(*padded(voices, torch.device("cpu")))).loss.backward()
        optimiser.step()
    return model


@pytest.mark.parametrize(("rank", "gain"), [(1, 0.15), (4, 0.15), (0, 0.03)])
def test_a_voice_is_learnt(rank: int, gain: float) -> None:
    """What was never tuned on becomes likelier, in float32, and the factors are those of the best evaluation."""
    model, samples = trained(), speech(1, [(4, 40)] * 10)
    (voice,) = tune(model, [("a", samples)], Recipe(rank=rank), space=SPACE)
    assert voice.continuation_loss < voice.base_loss - 0.02
    assert voice.tuned_loss < voice.base_loss - gain
    assert voice.tuned_loss == min(loss for _, loss in voice.curve)
    assert dict(voice.curve)[voice.best_step] == voice.tuned_loss
    (apart,) = (samples[i] for i in split(10, Recipe(), voice.seed)[1])
    dense = memories(voice.factors, Recipe().scale)
    again = row_losses(model, prepared(model, [apart]), Memories(dense.layers[None], None)).item() / tokens_of(apart)
    assert again == pytest.approx(voice.tuned_loss, rel=1e-5)
    assert json.loads(json.dumps(voice.record()))["steps"] == voice.steps


def test_baselines_mean_what_they_say() -> None:
    model = network()
    recipe, samples = Recipe(steps=1, held_out=0.3), speech(2, [(5, 30), (3, 44), (4, 12), (2, 25)])
    (voice,) = tune(model, [("a", samples)], recipe, space=SPACE)
    tuned, held = ([samples[i] for i in places] for places in split(4, recipe, voice.seed))
    batch = Batch(*padded(held, torch.device("cpu")))
    assert voice.base_loss == pytest.approx(model(batch).loss.item(), abs=1e-10)
    prompt = max(tuned, key=steps_of)
    # with the prompt's text before its own, and the prompt's codes before its own
    sums = continued_losses(model, [prompt], held, SPACE)
    expected = sum(loss for loss, _ in sums) / sum(map(tokens_of, held))
    assert voice.continuation_loss == pytest.approx(expected, abs=1e-10)
    (voice,) = tune(model, [("a", samples)], recipe)
    assert voice.continuation_loss is None


def test_it_stops_when_held_out_speech_gets_no_better() -> None:
    model = network()
    recipe = Recipe(steps=100, eval_every=2, patience=2, lr=2.0, batch=2)
    (voice,) = tune(model, [("a", speech(0, [(3, 20)] * 6))], recipe)
    assert voice.reason == "converged"
    assert voice.steps == voice.best_step + 4 < 100
    tuner = Tuner(model, Recipe(eval_every=1))
    tuner.join("a", speech(0, [(3, 40)] * 6), target=1e9)
    assert [voice.reason for voice in tuner.step()] == ["reached"]


def test_one_sample_and_a_very_short_one_are_tuned_for_themselves() -> None:
    speakers = [("one", speech(0, [(1, 1)])), ("many", speech(1, [(3, 30)] * 4))]
    one, many = sorted(tune(network(), speakers, Recipe(steps=4)), key=lambda voice: voice.held_out)
    assert (one.speaker, one.samples, one.held_out, one.tuned_loss, one.best_step) == ("one", 1, 0, None, 4)
    assert one.train_losses[-1] < one.train_losses[0]
    assert many.tuned_loss is not None


def test_a_speaker_that_diverges_harms_nobody() -> None:
    """Memories that overflow make NaN of a speaker's loss; its neighbours, with strong gates, do not notice."""
    model = Lina(SMALL).double()
    with torch.no_grad():
        for block in (*model.encoder, *model.decoder):
            block.mixer.decay[1].bias.fill_(-150.0)
    recipe = Recipe(steps=3, rank=0, scale=10)
    start = {"full": torch.full((3, 2, 8, 16), 1e308, dtype=torch.float64)}
    tuner = Tuner(model, recipe)
    samples = {name: speech(i, [(3, 80), (2, 90), (4, 70)]) for i, name in enumerate(("good", "bad", "other"))}
    tuner.join("good", samples["good"])
    tuner.join("bad", samples["bad"], start=start)
    tuner.join("other", samples["other"])
    done = {voice.speaker: voice for _ in range(3) for voice in tuner.step()}
    assert {name: voice.reason for name, voice in done.items()} == {
        "good": "steps",
        "bad": "diverged",
        "other": "steps",
    }
    for name in ("good", "other"):
        expected = alone(model, samples[name], recipe, number(recipe.seed, name), done[name].best_step)
        assert furthest(done[name].factors, expected) < 1e-10
    assert all(values.isfinite().all() for values in done["bad"].factors.values())
    assert json.dumps(done["bad"].record(), allow_nan=False), "what a voice's file says of its tuning is JSON"


@given(count=st.integers(1, 30), size=st.integers(1, 9), seed=st.integers(0, 2**64 - 1))
def test_batches_are_shuffled_epochs(count: int, size: int, seed: int) -> None:
    steps = math.lcm(count, size) // size
    batches = [batch_at(count, size, seed, step) for step in range(steps)]
    assert all(sum(batch.values()) == size for batch in batches)
    total = [sum(batch.get(place, 0) for batch in batches) for place in range(count)]
    assert total == [steps * size // count] * count
    assert batches == [batch_at(count, size, seed, step) for step in range(steps)]
    recipe = Recipe()
    tuned, held = split(count, recipe, seed)
    assert sorted(tuned + held) == list(range(count))
    assert len(held) == min(max(1, round(count * 0.1)), count // 2)
    assert split(count, dataclasses.replace(recipe, held_out=0), seed)[1] == ()
    assert len(split(1000, recipe, seed)[1]) == recipe.held_out_most


def test_memory_for_samples_is_bounded() -> None:
    model = network()
    samples = speech(0, [(4, 50)] * 8)
    size = prepared(model, samples[:1])[0].bytes
    tuner = Tuner(model, Recipe(steps=5, batch=8), cache_bytes=3 * size)
    tuner.join("a", samples)
    tuner.step()
    assert tuner.work.kept_bytes == 3 * size
    tuner.leave("a")
    assert tuner.work.kept_bytes == 0


def test_warm_start_at_what_the_model_reads() -> None:
    """The memories after reading, factorised: at full rank they are kept, at rank 1 the nearest, and both can go on."""
    model = network()
    samples = speech(0, [(4, 50), (3, 20)])
    read = read_memories(model, samples)
    mean = read_start(model, samples)
    torch.testing.assert_close(mean.layers, read.layers.mean(0))
    for rank in (0, 8):
        recipe = Recipe(rank=rank)
        torch.testing.assert_close(memories(factorised(mean, recipe), recipe.scale).layers, mean.layers)
    start = factorised(mean, Recipe())
    tuner = Tuner(model, Recipe(steps=1))
    tuner.join("a", samples, held_out=samples[:1], start=start)
    (voice,) = tuner.step()
    dense = memories(start, Recipe().scale)
    expected = row_losses(model, prepared(model, samples[:1]), Memories(dense.layers[None], None)).item()
    assert voice.curve[0] == (0, pytest.approx(expected / tokens_of(samples[0]), abs=1e-10))


def test_who_cannot_be_tuned_is_refused() -> None:
    model = network()
    tuner = Tuner(model, Recipe(), slots=1)
    good = speech(0, [(3, 9)])
    phones, codes = good[0]
    for samples, reason in (
        ([], "speaker 'a' has no samples"),
        ([Sample(phones[:0], codes)], "sample 0 of speaker 'a' has 0 phonemes and 9 frames"),
        ([good[0], Sample(phones, codes[:, :0])], "sample 1 of speaker 'a' has 3 phonemes and 0 frames"),
        ([Sample(phones, codes[:1])], "codes \\[K ≥ 2, N\\]"),
        ([Sample(phones, codes + 8)], "codes must be from 0 to 7"),
        ([Sample(phones - 10, codes)], "phonemes must be from 0 to 9"),
    ):
        with pytest.raises(ModelError, match=reason):
            tuner.join("a", samples)
    with pytest.raises(ModelError, match="the recipe asks for"):
        tuner.join("a", good, start=drawn(SMALL, Recipe(rank=2), 0))
    with pytest.raises(ModelError, match="not finite"):
        tuner.join("a", good, start={n: v * math.nan for n, v in drawn(SMALL, Recipe(), 0).items()})
    assert tuner.step() == []
    tuner.join("a", good)
    with pytest.raises(ModelError, match="all 1 slots are taken"):
        tuner.join("b", good)
    with pytest.raises(ModelError, match="being tuned already"):
        two = Tuner(model)
        two.join("a", good)
        two.join("a", good)
    with pytest.raises(ModelError, match="no memory to tune"):
        Tuner(Lina(dataclasses.replace(SMALL, mixer="attention", attention_head=8)))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_optimiser_is_adamw_by_speaker(clip: float) -> None:
    recipe = Recipe(clip=clip, weight_decay=0.1, warmup=2, schedule="cosine", steps=6)
    generator = torch.Generator().manual_seed(0)
    stacked = {
        "k": torch.randn(3, 4, generator=generator).double(),
        "v": torch.randn(3, 2, 5, generator=generator).double(),
    }
    start = {name: values.clone() for name, values in stacked.items()}
    optimiser = SpeakerAdamW(stacked, recipe)
    twins = [{name: values[slot].clone().requires_grad_() for name, values in start.items()} for slot in range(3)]
    theirs = [torch.optim.AdamW(twin.values(), 1.0, weight_decay=0.1) for twin in twins]
    taken = [0, 0, 0]
    for slots in ([0, 1, 2], [1], [2, 1], [0, 1, 2]):
        gradients = {n: torch.randn(len(slots), *v.shape[1:], generator=generator).double() for n, v in stacked.items()}
        optimiser.update(slots, gradients)
        for place, slot in enumerate(slots):
            for name, values in twins[slot].items():
                values.grad = gradients[name][place].clone()
            if clip:
                torch.nn.utils.clip_grad_norm_(twins[slot].values(), clip)
            theirs[slot].param_groups[0]["lr"] = learning_rate(recipe, taken[slot])
            theirs[slot].step()
            taken[slot] += 1
    for slot, twin in enumerate(twins):
        assert furthest({name: values[slot] for name, values in stacked.items()}, twin) < 1e-12
    optimiser.begin(1, {name: values[1] for name, values in start.items()})
    torch.testing.assert_close(stacked["k"][1], start["k"][1])
