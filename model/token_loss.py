"""Cross-entropy through frozen output heads, without ever holding all logits.

Logits, loss and the gradient of the hidden states are made in one visit, a few hundred steps of one codebook at a time,
which stay in a core's cache. That needs frozen heads: with trained ones their gradient would have to be kept as well.
"""

from __future__ import annotations

import torch

from model.delay import BOS, PAD
from model.frozen_linear import ROWS, frozen_linear

BLOCK = 1 << 20
"""Bytes of logits at a time on a CPU: about a core's second-level cache."""
GPU_BLOCK = 1 << 28


def row_losses(hidden: torch.Tensor, heads: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums of cross-entropies by row, [B], as `model.lina.losses` has them; gradients reach `hidden` alone.

    Args:
        hidden: [B, T, width], normed.
        heads: [K · tokens, width], frozen.
        targets: int64 [B, T, K]; padding and the starts that fill the delay do not count.

    Raises:
        ValueError: heads that want a gradient, which they would not get.
    """
    if heads.requires_grad:
        raise ValueError("the heads want a gradient; freeze them, or use model.lina.losses")
    return _RowLosses.apply(hidden, heads, targets, hidden.requires_grad and torch.is_grad_enabled())


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, heads, targets, differentiate):
        batch, time, codebooks = targets.shape
        flat, weights = hidden.reshape(batch * time, -1), heads.unflatten(0, (codebooks, -1))
        size = (GPU_BLOCK if hidden.is_cuda else BLOCK) // (weights.shape[1] * weights.element_size())
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        sums = torch.zeros(batch, dtype=exact, device=hidden.device)
        slope = torch.zeros_like(flat) if differentiate else None
        for weight, wanted in zip(weights, targets.flatten(0, 1).unbind(1), strict=True):
            counted = torch.nonzero((wanted != PAD) & (wanted != BOS)).flatten()
            for places in counted.split(max(ROWS, size // ROWS * ROWS)):
                each, back = _block(flat[places], weight, wanted[places, None], differentiate, exact)
                sums.index_add_(0, places // time, each)
                if differentiate:
                    slope.index_add_(0, places, back)
        ctx.slope = slope.view_as(hidden) if differentiate else None
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsums):
        return ctx.slope * dsums[:, None, None].to(ctx.slope.dtype), None, None, None


def _block(x, weight, wanted, differentiate, exact):
    """(cross-entropies [n], their gradients with respect to x [n, width] or None)."""
    logits = frozen_linear(x, weight).to(exact)
    chosen = logits.gather(1, wanted).squeeze(1)
    highest = logits.amax(1, keepdim=True)
    likely = logits.sub_(highest).exp_()
    total = likely.sum(1, keepdim=True)
    each = (total.log() + highest).squeeze(1) - chosen
    if not differentiate:
        return each, None
    likely.div_(total).scatter_add_(1, wanted, torch.full_like(total, -1))
    return each, frozen_linear(likely.to(weight.dtype), weight.mT)
