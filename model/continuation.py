"""Prompt continuation (Lina-Speech, section 4.3): the model reads somebody's speech, and goes on in that voice.

The prompts' transcripts stand before the text that is to be said, and their codes before what is to come; so the text
that the model attends to is all of it, unlike from a memory alone (`model.state_pass.read_memories`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.delay import BOS, delayed
from model.lina import Lina, losses
from model.sampling import Policy, Prompt, Speech, speak
from model.state_pass import grouped, padded, steps_of
from model.voice_samples import Sample


def joined(samples: Sequence[Sample], space: int) -> Sample:
    """One utterance of several: phones between one `<bos>` and one `<eos>`, `space` between them; codes end to end."""
    between = torch.tensor([space])
    phones = [samples[0].phones[:1]]
    for place, sample in enumerate(samples):
        phones += [between, sample.phones[1:-1]] if place else [sample.phones[1:-1]]
    codebooks = min(len(sample.codes) for sample in samples)
    codes = torch.cat([sample.codes[:codebooks] for sample in samples], 1)
    return Sample(torch.cat([*phones, samples[-1].phones[-1:]]), codes)


@torch.no_grad()
def continued_losses(
    model: Lina, prompts: Sequence[Sample], targets: Sequence[Sample], space: int
) -> list[tuple[float, int]]:
    """(sum of cross-entropies, tokens) of each target, said after all prompts; tokens of prompts do not count.

    Without prompts these are the losses of the targets alone.
    """
    return losses_after(model, [(prompts, target) for target in targets], space)


@torch.no_grad()
def losses_after(
    model: Lina, pairs: Sequence[tuple[Sequence[Sample], Sample]], space: int, group_steps: int = 0
) -> list[tuple[float, int]]:
    """`continued_losses` of many (prompts, target), in groups of rows · longest ≤ `group_steps`, each at least one."""
    whole = [joined([*prompts, target], space) for prompts, target in pairs]
    frames = [sum(prompt.codes.shape[1] for prompt in prompts) for prompts, _ in pairs]
    found = [(0.0, 0)] * len(pairs)
    for group in grouped([steps_of(sample) for sample in whole], group_steps):
        phones, phone_lengths, codes, lengths = padded([whole[i] for i in group], model.norm.weight.device)
        tokens = delayed(codes[:, : model.config.codebooks], lengths)
        wanted = tokens[:, 1:].clone()
        for row, i in enumerate(group):
            for codebook in range(model.config.codebooks):
                wanted[row, : frames[i] + codebook, codebook] = BOS
        logits, _, _ = model.advance(model.embed(tokens[:, :-1]), model.read(phones, phone_lengths))
        _, _, sums, counts = losses(logits, wanted)
        for i, *pair in zip(group, sums.tolist(), counts.tolist(), strict=True):
            found[i] = tuple(pair)
    return found


def continued_speech(
    model: Lina, prompt: Sample, phones: torch.Tensor, space: int, policy: Policy, seed: int
) -> tuple[Speech, int]:
    """Says one text after a prompt, in the plainest way: what says many at once is tested against it.

    Args:
        phones: int [J] of what is to be said, `<bos>` and `<eos>` included.

    Returns:
        (what was said, the prompt not included; how many phones stand before those of the text itself)
    """
    device = model.norm.weight.device
    codes = prompt.codes[: model.config.codebooks]
    text = joined([prompt, Sample(phones, codes[:, :0])], space).phones[None].to(device)
    given = Prompt(codes[None].to(device), torch.tensor([codes.shape[1]], device=device))
    lengths = torch.tensor([text.shape[1]], device=device)
    (speech,) = speak(model, text, lengths, policy, [seed], prompt=given)
    return speech, text.shape[1] - (len(phones) - 1)
