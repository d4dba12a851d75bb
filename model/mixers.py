"""What lets a step see the steps before it: gated linear attention, or softmax attention of the same size.

Both take a state and return the next one, over one step or many at once; neither changes what it is given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from model.gla import gla
from model.layers import RMSNorm, ShortConv, SwiGLU, at_least_float32, rotate, split_heads, within
from model.lina_config import LinaConfig

GAIN = 2**-2.5
"""Of the Xavier-uniform initial weights of GLA's projections, as released."""


class GLAState(NamedTuple):
    """What a GLA layer knows of the past."""

    memory: torch.Tensor
    """[B, H, d_k, d_v], float32 (float64 in a float64 model); a voice is a setting of these."""
    conv: torch.Tensor | None
    """[B, taps - 1, 2 · key_width + value_width], the last inputs of the short convolution, if there is one."""


class KVCache(NamedTuple):
    """What a softmax layer knows of the past: all of it."""

    keys: torch.Tensor
    """[B, H, past, d], positions included."""
    values: torch.Tensor
    """[B, H, past, d]."""
    filled: torch.Tensor
    """bool [B, past]: rows of unequal length have gaps."""


class GLAMixer(nn.Module):
    """Multi-head gated linear attention with an output gate (Yang et al. 2024, section 4.4).

    The gates see the input before the short convolution. Log decays are logsigmoid(·) / divisor for each key channel.
    """

    def __init__(self, width: int, heads: int, key_width: int, value_width: int, taps: int, rank: int, divisor: int):
        super().__init__()
        self.heads, self.divisor, self.sizes = heads, divisor, (2 * key_width + value_width, value_width)
        self.project = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = ShortConv(self.sizes[0], taps) if taps else None
        self.parts = (key_width, key_width, value_width)
        self.decay = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, key_width))
        self.norm, self.out = RMSNorm(value_width // heads), nn.Linear(value_width, width, bias=False)
        for weight in (
            *self.project.weight.split([*self.parts, value_width]),
            self.decay[0].weight,
            self.decay[1].weight,
            self.out.weight,
        ):
            nn.init.xavier_uniform_(weight, gain=GAIN)
        nn.init.zeros_(self.decay[1].bias)

    def forward(
        self, x: torch.Tensor, state: GLAState | None = None, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, GLAState]:
        """
        Args:
            x: [B, T, width].
            state: after the steps before; None at the start, with a memory of zeros.
            lengths: [B], how many steps of x count towards the next state; None means all.

        Returns:
            ([B, T, width], the next state)
        """
        mixed, gate = self.project(x).split(self.sizes, -1)
        past = None if state is None else state.conv
        if self.conv is not None:
            mixed, past = self.conv(mixed, past, lengths)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in mixed.split(self.parts, -1))
        g = F.logsigmoid(at_least_float32(self.decay(x))).unflatten(-1, (self.heads, -1)) / self.divisor
        if lengths is not None:
            counts = within(lengths, x.shape[1])[:, :, None, None]
            k, g = torch.where(counts, k, 0), torch.where(counts, g, 0)
        o, memory = gla(q, k, v, g, None if state is None else state.memory)
        return self.out(self.norm(o).flatten(2) * F.silu(gate)), GLAState(memory, past)


class AttentionMixer(nn.Module):
    """Causal multi-head softmax attention with rotary positions."""

    def __init__(self, width: int, inner: int, head: int) -> None:
        super().__init__()
        self.heads = inner // head
        self.project = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: torch.Tensor, state: KVCache | None = None, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, KVCache]:
        """As `GLAMixer.forward`."""
        batch, time, _ = x.shape
        q, k, v = (split_heads(part, self.heads) for part in self.project(x).chunk(3, -1))
        new = torch.ones(batch, time, dtype=torch.bool, device=x.device) if lengths is None else within(lengths, time)
        steps = torch.arange(time, device=x.device)
        past = None if state is None else state.filled.sum(1, keepdim=True)
        positions = steps if past is None else past + steps
        q, k = rotate(q, positions), rotate(k, positions)
        if state is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(o.transpose(1, 2).flatten(2)), KVCache(k, v, new)
        k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        causal = new[:, None] & (steps <= steps[:, None])
        # A padded step sees itself, so that no row of the mask is empty.
        causal = causal | torch.eye(time, dtype=torch.bool, device=x.device)
        mask = torch.cat([state.filled[:, None].expand(-1, time, -1), causal], 2)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return self.out(o.transpose(1, 2).flatten(2)), KVCache(k, v, torch.cat([state.filled, new], 1))


class CausalBlock(nn.Module):
    """Pre-norm block: x + mixer(norm(x)), then x + feed(norm(x))."""

    def __init__(self, width: int, mixer: nn.Module, dropout: float, hidden: int | None = None) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mixer, self.feed, self.dropout = mixer, SwiGLU(width, hidden), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, state=None, lengths: torch.Tensor | None = None):
        """(x [B, T, width], the next state); arguments as of the mixer."""
        mixed, state = self.mixer(self.norms[0](x), state, lengths)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feed(self.norms[1](x))), state


def gla_mixer(config: LinaConfig, width: int, key_width: int, value_width: int) -> GLAMixer:
    return GLAMixer(
        width, config.heads, key_width, value_width, config.short_conv, config.gate_rank, config.gate_divisor
    )


def causal_block(config: LinaConfig) -> CausalBlock:
    """A block of the audio encoder or decoder. A softmax block is as large as a GLA block: what GLA spends on decays
    and short convolutions goes into the hidden width of its SwiGLU."""
    width = config.width
    if config.mixer == "gla":
        return CausalBlock(width, gla_mixer(config, width, config.key_width, config.value_width), config.dropout)
    mixer = AttentionMixer(width, config.attention_width, config.attention_head)
    with torch.device("meta"):
        twin = gla_mixer(config, width, config.key_width, config.value_width)
    spare = parameters(twin) - parameters(mixer)
    return CausalBlock(width, mixer, config.dropout, 4 * width // 3 + round(spare / (3 * width + 2)))


def position_block(config: LinaConfig) -> CausalBlock:
    """The position network of the cross-attention: a GLA block, its keys and values in the model's proportions."""
    width = config.position_width
    return CausalBlock(width, gla_mixer(config, width, *position_widths(config)), config.dropout)


def position_widths(config: LinaConfig) -> tuple[int, int]:
    """Of the position network's keys and of its values."""
    unit, width = config.heads, config.position_width
    scaled = (width * inner // config.width // unit * unit for inner in (config.key_width, config.value_width))
    key_width, value_width = (max(unit, inner) for inner in scaled)
    return key_width, value_width


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
