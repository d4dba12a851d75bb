"""Parts that every block is made of. Shapes are [batch, time, width] unless said otherwise."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich 2019), computed in float32 at least."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = at_least_float32(x)
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """down(silu(a) · b) with a, b = up(x) (Shazeer 2020); as released, 4/3 of the width is hidden."""

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * width // 3 if hidden is None else hidden
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class ShortConv(nn.Module):
    """Causal depthwise convolution of a few taps, then SiLU; what it remembers are the last inputs."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.taps, self.weight = taps, nn.Parameter(torch.empty(width, taps).uniform_(-(taps**-0.5), taps**-0.5))

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: [B, T, width].
            past: [B, taps - 1, width], the inputs before; None means zeros.
            lengths: [B], how many steps of x count; None means all.

        Returns:
            ([B, T, width], the past of what follows)
        """
        remembered = self.taps - 1
        if past is None:
            past = x.new_zeros(x.shape[0], remembered, x.shape[2])
        seen, time = torch.cat([past, x], 1), x.shape[1]
        out = seen[:, :time] * self.weight[:, 0]
        for tap in range(1, self.taps):
            out = torch.addcmul(out, seen[:, tap : tap + time], self.weight[:, tap])
        if lengths is None:
            return F.silu(out), seen[:, time:]
        last = lengths[:, None] + torch.arange(remembered, device=x.device)
        return F.silu(out), seen.gather(1, last[..., None].expand(-1, -1, x.shape[2]))


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021) on the first half of each head's dimensions, as released.

    Args:
        x: [B, H, T, d], d a multiple of 4.
        positions: int [T] or [B, T].
    """
    turned = x.shape[-1] // 2
    speeds = 10_000 ** (-torch.arange(0, turned, 2, device=x.device, dtype=torch.float64) / turned)
    angles = positions.to(torch.float64)[..., None] * speeds
    if angles.ndim == 3:
        angles = angles.unsqueeze(1)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other, rest = x.split([turned // 2, turned // 2, x.shape[-1] - turned], -1)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine, rest], -1)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, H · d] to [B, H, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def within(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """bool [B, longest]: which places of rows padded on their right are filled; lengths [B]."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class TextBlock(nn.Module):
    """Pre-norm transformer block over text: every place sees every other that is filled."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        # Heads are joined by the next block's projections: there is none of its own, as released.
        self.project = nn.Linear(width, 3 * width)
        self.feed, self.dropout = SwiGLU(width), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        """x [B, J, width], filled bool [B, J] with at least one place a row."""
        x = x + self.dropout(self._attend(self.norms[0](x), filled))
        return x + self.dropout(self.feed(self.norms[1](x)))

    def _attend(self, x: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.project(x).chunk(3, -1))
        positions = torch.arange(x.shape[1], device=x.device)
        q, k = rotate(q, positions), rotate(k, positions)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=filled[:, None, None])
        return o.transpose(1, 2).flatten(2)
