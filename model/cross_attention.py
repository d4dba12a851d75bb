"""Position-aware cross-attention: where in the text the speech is, told by positions alone (Small-E; Lina-Speech 3.2).

    Q = norm(x W_q)    K = norm(c W_k)    V = norm(c W_v)    P = positions of the text
    where  = position_network(softmax(Q Kᵀ / √width) P)       a causal block, which remembers the way so far
    result = softmax(where Pᵀ / √position_width) V

Differences from the released code: positions are a function of their number, not a table of 2,000, so a text may be of
any length; and they are made for each row up to its own end, so a row does not depend on how far its batch is padded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from model.layers import at_least_float32, within
from model.lina_config import LinaConfig
from model.mixers import GLAState, position_block


class TextMemory(NamedTuple):
    """All that the audio side needs of a text; computed once for all steps."""

    keys: torch.Tensor
    """[B, J, width]."""
    values: torch.Tensor
    """[B, J, width]."""
    positions: torch.Tensor
    """[B, J, position_width]."""
    filled: torch.Tensor
    """bool [B, J]."""


class ConvPositions(nn.Module):
    """Convolutional positions: waves of every speed, mixed, and a depthwise convolution along the text.

    The waves' speeds are π u² with u spread evenly over (0, 1) by the golden ratio: slow ones make near places alike,
    fast ones tell neighbours apart, and no two places within any text are the same. The convolution sees the text's
    two ends as such.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.width = width
        self.mix = nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, kernel, padding="same", groups=width)
        nn.init.normal_(self.mix.weight, std=math.sqrt(2 / width))
        nn.init.zeros_(self.mix.bias)
        # Starts as the place itself plus a little of its surroundings.
        nn.init.normal_(self.conv.weight, std=0.5 / math.sqrt(kernel))
        nn.init.zeros_(self.conv.bias)
        with torch.no_grad():
            self.conv.weight[:, :, kernel // 2] += 1

    def forward(self, filled: torch.Tensor) -> torch.Tensor:
        """[B, J, width] for filled bool [B, J]."""
        weight = self.mix.weight
        golden = (1 + 5**0.5) / 2
        half = torch.arange(1, self.width // 2 + 1, device=weight.device, dtype=torch.float64)
        speeds = math.pi * (half * golden).frac().square()
        angles = torch.arange(filled.shape[1], device=weight.device, dtype=torch.float64)[:, None] * speeds
        waves = torch.cat([angles.sin(), angles.cos()], 1).to(weight.dtype)
        rows = torch.where(filled[..., None], self.mix(waves), 0)
        return self.conv(rows.transpose(1, 2)).transpose(1, 2)


class CrossAttention(nn.Module):
    """One head over the text; its only memory is its position network's."""

    def __init__(self, config: LinaConfig) -> None:
        super().__init__()
        width, self.dropout = config.width, nn.Dropout(config.attention_dropout)
        self.query, self.key, self.value = (
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(3)
        )
        self.positions = ConvPositions(config.position_width, config.position_kernel)
        self.position_network = position_block(config)

    def read(self, context: torch.Tensor, lengths: torch.Tensor) -> TextMemory:
        """What a text encoding [B, J, width], padded on its right, of lengths [B], is for the audio side."""
        filled = within(lengths, context.shape[1])
        return TextMemory(self.key(context), self.value(context), self.positions(filled), filled)

    def forward(
        self,
        x: torch.Tensor,
        text: TextMemory,
        state: GLAState | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, GLAState, torch.Tensor]:
        """([B, T, width], the position network's next state, attention over the text [B, T, J]); x [B, T, width]."""
        here = self.dropout(_attention(self.query(x), text.keys, text.filled)) @ text.positions
        where, state = self.position_network(here, state, lengths)
        attention = _attention(where, text.positions, text.filled)
        return self.dropout(attention) @ text.values, state, attention


def _attention(q: torch.Tensor, k: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / √d) over the filled places: [B, T, J]."""
    scores = at_least_float32(q * q.shape[-1] ** -0.5 @ k.mT)
    return F.softmax(scores.masked_fill(~filled[:, None], -torch.inf), -1).to(q.dtype)
