"""The network as a function of its initial memories alone: what does not depend on them is computed once a sample.

With frozen weights the texts' memories, the embedded codes and the first layer's queries, keys, values and gates are
constants of a sample, for its short convolution starts at zero, too. And the first layer is linear in its memory:

    o_t = o_t(0) + scale · (q_t ⊙ exp(g_1 + … + g_t)) S0

so a sample keeps o(0) and the decayed queries, and that layer's recurrence never runs again. Dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from model.cross_attention import TextMemory
from model.delay import begun, delayed
from model.frozen_linear import ROWS
from model.gla import gla
from model.initial_state import Memories
from model.layers import at_least_float32, within
from model.lina import Lina
from model.mixers import GLAState
from model.token_loss import row_losses as token_losses
from model.voice_samples import Sample


class Prepared(NamedTuple):
    """All that a step needs of a sample of T steps and J phonemes."""

    x: torch.Tensor
    """[T, width]: the embedded codes."""
    queries: torch.Tensor
    """[T, heads, d_k]: the first layer's, scaled and decayed from the start."""
    output: torch.Tensor
    """[T, heads, d_v]: the first layer's from a memory of zeros."""
    gate: torch.Tensor
    """[T, value_width]: the first layer's output gate."""
    targets: torch.Tensor
    """int64 [T, K]."""
    keys: torch.Tensor
    """[J, width], this and what follows: the text's memory."""
    values: torch.Tensor
    positions: torch.Tensor

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self)


def steps_of(sample: Sample) -> int:
    """Of the model over a whole sample."""
    return sum(sample.codes.shape)


def tokens_of(sample: Sample) -> int:
    """Whose losses are counted: all codes, and the end of codebook i, K - i times."""
    codebooks, frames = sample.codes.shape
    return codebooks * frames + codebooks * (codebooks + 1) // 2


@torch.no_grad()
def prepared(model: Lina, samples: Sequence[Sample]) -> list[Prepared]:
    """What does not depend on memories, of samples of about one length: a batch."""
    phones, phone_lengths, codes, code_lengths = padded(samples, model.norm.weight.device)
    text = model.read(phones, phone_lengths)
    tokens = delayed(codes, code_lengths)
    x, block = model.embed(tokens[:, :-1]), model.encoder[0]
    mixer, normed = block.mixer, block.norms[0](x)
    mixed, gate = mixer.project(normed).split(mixer.sizes, -1)
    if mixer.conv is not None:
        mixed, _ = mixer.conv(mixed)
    q, k, v = (part.unflatten(-1, (mixer.heads, -1)) for part in mixed.split(mixer.parts, -1))
    g = F.logsigmoid(at_least_float32(mixer.decay(normed))).unflatten(-1, (mixer.heads, -1)) / mixer.divisor
    output, _ = gla(q, k, v, g)
    queries = (q * q.shape[-1] ** -0.5 * g.cumsum(1).exp()).to(x.dtype)
    silu, targets, rows = F.silu(gate), tokens[:, 1:], []
    for row, sample in enumerate(samples):
        steps, places = steps_of(sample), len(sample.phones)
        audio = (part[row, :steps].clone() for part in (x, queries, output, silu, targets))
        rows.append(Prepared(*audio, *(part[row, :places].clone() for part in text[:3])))
    return rows


def row_losses(model: Lina, rows: Sequence[Prepared], memories: Memories | None) -> torch.Tensor:
    """Sums of a row's tokens' cross-entropies, [B]: `Output.row_losses` of the whole model, to rounding.

    Args:
        rows: of `prepared`.
        memories: a row each, [B, layers, …]; None means zeros.
    """
    columns = list(zip(*rows, strict=True))
    # As many steps together as `frozen_linear` is fast for.
    unit = ROWS // math.gcd(ROWS, len(rows))
    time = -(-max(map(len, columns[0])) // unit) * unit
    x, queries, output, gate, targets = (_stacked(column, time) for column in columns[:5])
    texts = [_stacked(column, max(map(len, column))) for column in columns[5:]]
    lengths = torch.tensor([len(row.keys) for row in rows], device=x.device)
    text = TextMemory(*texts, within(lengths, texts[0].shape[1]))
    states = [None] * model.config.layers
    position = None
    if memories is not None:
        states = [GLAState(memory, None) for memory in memories.layers.unbind(1)]
        position = None if memories.position is None else GLAState(memories.position, None)
        output = output + (queries.transpose(1, 2) @ states[0].memory.to(queries.dtype)).transpose(1, 2)
    first, split = model.encoder[0], model.config.encoder_layers
    x = x + first.mixer.out(first.mixer.norm(output).flatten(2) * gate)
    x = x + first.feed(first.norms[1](x))
    for block, state in zip(model.encoder[1:], states[1:split], strict=True):
        x, _ = block(x, state)
    read, _, _ = model.cross_attention(x, text, position)
    x = x + read
    for block, state in zip(model.decoder, states[split:], strict=True):
        x, _ = block(x, state)
    return token_losses(model.norm(x), model.heads.weight, targets)


@torch.no_grad()
def read_memories(model: Lina, samples: Sequence[Sample], group_steps: int = 4096) -> Memories:
    """The memories that the model itself reaches after reading each sample with its text, [samples, layers, …].

    It reads up to the last frame and not the end tokens: it is still speaking.
    """
    found: list = [None] * len(samples)
    device = model.norm.weight.device
    for group in grouped([steps_of(sample) for sample in samples], group_steps):
        phones, phone_lengths, codes, code_lengths = padded([samples[i] for i in group], device)
        tokens, lengths = begun(codes, code_lengths)
        _, state, _ = model.advance(model.embed(tokens), model.read(phones, phone_lengths), None, lengths)
        layers = torch.stack([layer.memory for layer in (*state.encoder, *state.decoder)], 1)
        for row, i in enumerate(group):
            found[i] = layers[row], state.position.memory[row]
    return Memories(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def read_start(model: Lina, samples: Sequence[Sample]) -> Memories:
    """Warm start: the mean over a speaker's samples of the memories that the model reaches, [layers, …]."""
    read = read_memories(model, samples)
    return Memories(read.layers.mean(0), read.position.mean(0))


def grouped(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of rows, the longest first, in groups of rows · longest ≤ budget, of 1, 2, 4, 8 … rows each.

    Powers of two, because `row_losses` then pads the least.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        most = min(len(order), max(1, budget // max(1, lengths[order[0]])))
        size = 1 << most.bit_length() - 1
        yield order[:size]
        order = order[size:]


def _stacked(parts: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
    """[B, longest, …] of parts [their own length, …], zeros after them."""
    whole = parts[0].new_zeros(len(parts), longest, *parts[0].shape[1:])
    for row, part in zip(whole, parts, strict=True):
        row[: len(part)] = part
    return whole


def padded(samples: Iterable[Sample], device: torch.device) -> tuple[torch.Tensor, ...]:
    """(phones [B, J], their lengths, codes [B, K, N], their lengths)."""
    samples = list(samples)
    phones = pad_sequence([sample.phones for sample in samples], batch_first=True)
    codes = pad_sequence([sample.codes.T for sample in samples], batch_first=True).transpose(1, 2)
    sizes = ([len(sample.phones) for sample in samples], [sample.codes.shape[1] for sample in samples])
    return tuple(part.to(device) for part in (phones, torch.tensor(sizes[0]), codes, torch.tensor(sizes[1])))
