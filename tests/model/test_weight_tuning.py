"""Voices by tuned weights and by continuing a prompt: what they start from, what they leave alone, what counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.continuation import continued_losses, continued_speech, joined, losses_after
from model.delay import delayed
from model.frozen_layers import freeze
from model.lina import Batch, Lina, losses
from model.lina_config import LinaConfig, ModelError
from model.sampling import Policy
from model.state_pass import padded, read_memories
from model.voice_samples import Sample
from model.weight_tuning import WeightRecipe, copied, low_rank, mean_loss, merged, tune_weights
from tests.pipeline.speaking_tokens import SIZES
from tests.pipeline.speech_samples import samples_of

SPACE = 4


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(seed: int = 0) -> Lina:
    torch.manual_seed(seed)
    return Lina(LinaConfig(**SIZES, vocabulary=81)).double().eval()


def test_low_rank_additions_start_as_nothing_and_stay_after_merging():
    model, batch = model_of(), Batch(*padded(samples_of(0), torch.device("cpu")))
    added = low_rank(model, 3, seed=1)
    assert torch.equal(added(batch).logits, model(batch).logits)
    wanting = {name for name, parameter in added.named_parameters() if parameter.requires_grad}
    assert wanting and all(name.endswith((".a", ".b")) for name in wanting)
    with torch.no_grad():
        for name, parameter in added.named_parameters():
            if name.endswith(".b"):
                parameter.normal_()
    changed = added(batch).logits
    assert not torch.allclose(changed, model(batch).logits)
    assert merged(added).state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(added(batch).logits, changed)


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("frozen", [False, True])
def test_tuning_weights_learns_the_speaker_and_leaves_the_model_as_it_was(rank, frozen):
    model, samples = model_of(), samples_of(1)
    if frozen:
        freeze(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = WeightRecipe(rank=rank, lr=0.02, batch=4, steps=12, eval_every=5)
    tuned = tune_weights(model, samples, samples, recipe)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [step for step, _ in tuned.curve] == [0, 5, 10, 12]
    assert tuned.curve[0][1] == pytest.approx(mean_loss(model, samples))
    assert tuned.curve[-1][1] == pytest.approx(mean_loss(tuned.model, samples))
    assert tuned.curve[-1][1] < tuned.curve[0][1] - 0.05
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert tuned.parameters == everything if rank == 0 else tuned.parameters < everything / 4
    again = tune_weights(model, samples, samples, recipe)
    assert again.curve == tuned.curve


def test_the_loss_without_memories_is_that_of_the_model_and_depends_on_given_ones():
    model, samples = model_of(), samples_of(2)
    output = model(Batch(*padded(samples, torch.device("cpu"))))
    assert mean_loss(model, samples) == pytest.approx(output.loss.item())
    read = read_memories(model, samples[:1])
    given = mean_loss(model, samples, type(read)(read.layers[0], read.position[0]))
    assert abs(given - mean_loss(model, samples)) > 1e-9
    assert mean_loss(copied(freeze(model)), samples) == pytest.approx(output.loss.item())


def test_continuation_counts_the_target_alone():
    model, (prompt, other, target) = model_of(), samples_of(3, 3)
    alone = continued_losses(model, [], [target], SPACE)
    assert alone[0][0] / alone[0][1] == pytest.approx(mean_loss(model, [target]))
    (found,) = continued_losses(model, [prompt, other], [target], SPACE)
    assert found[1] == alone[0][1] and found[0] != pytest.approx(alone[0][0])
    # The whole utterance, minus the tokens of the prompts within it
    whole = joined([prompt, other, target], SPACE)
    phones, phone_lengths, codes, lengths = padded([whole], torch.device("cpu"))
    tokens = delayed(codes, lengths)
    logits, _, _ = model.advance(model.embed(tokens[:, :-1]), model.read(phones, phone_lengths))
    ahead = torch.zeros_like(tokens[:, 1:])
    frames = prompt.codes.shape[1] + other.codes.shape[1]
    for codebook in range(4):
        ahead[:, codebook : codebook + frames, codebook] = tokens[:, 1:][:, codebook : codebook + frames, codebook]
    all_of_it, of_prompts = (float(losses(logits, wanted)[2]) for wanted in (tokens[:, 1:], ahead))
    assert found[0] == pytest.approx(all_of_it - of_prompts)


def test_many_are_continued_together_as_each_alone():
    model = model_of()
    pairs = [(samples_of(n, 3)[: n % 3], samples_of(n + 9, 1 + n % 2)[-1]) for n in range(5)]
    alone = [continued_losses(model, prompts, [target], SPACE)[0] for prompts, target in pairs]
    for budget in (1, 300, 10_000):
        found = losses_after(model, pairs, SPACE, budget)
        assert [tokens for _, tokens in found] == [tokens for _, tokens in alone]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in alone])


def test_joined_utterances_are_one_text_and_one_speech():
    first, second = samples_of(4, 2)
    whole = joined([first, second], SPACE)
    assert whole.phones.tolist() == [*first.phones[:-1].tolist(), SPACE, *second.phones[1:].tolist()]
    assert torch.equal(whole.codes, torch.cat([first.codes, second.codes], 1))


def test_speech_after_a_prompt_says_where_its_own_text_begins():
    model, (prompt, target) = model_of(), samples_of(5, 2)
    speech, before = continued_speech(model, prompt, target.phones, SPACE, Policy(max_frames=9, min_frames=9), 1)
    assert speech.codes.shape == (4, 9)
    assert speech.attention.shape[1] - before == len(target.phones) - 1
    text = joined([prompt, Sample(target.phones, target.codes)], SPACE).phones
    assert text[before:].tolist() == target.phones[1:].tolist()
    shorter = prompt._replace(codes=prompt.codes[:, :-5])
    other, _ = continued_speech(model, shorter, target.phones, SPACE, Policy(max_frames=9, min_frames=9), 1)
    assert not torch.equal(other.codes, speech.codes)


@pytest.mark.parametrize(("field", "value"), [("rank", -1), ("lr", 0.0), ("steps", 0), ("weight_decay", -1.0)])
def test_impossible_recipes_are_refused(field, value):
    with pytest.raises(ModelError, match=field):
        dataclasses.replace(WeightRecipe(), **{field: value})
