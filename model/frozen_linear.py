"""Linear layers whose weights are frozen: no gradient of them, and on CPUs the faster of two libraries.

PyTorch's float32 products on CPUs are MKL's, which leaves AVX-512 unused on AMD processors: on a Zen 5 core it reached
90 GFLOP/s where oneDNN, which PyTorch carries, too, reached 210 to 230 (2048 × 192 × 192 … 1027). oneDNN makes code for
each number of rows that it has not met, 1 to 2 ms, so it is used for multiples of `ROWS` alone; callers pad to those.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

ROWS = 64


class FrozenLinear(nn.Linear):
    """What `model.frozen_layers.freeze` makes of a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x, self.weight, self.bias)


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weightᵀ + bias, with a gradient of x alone unless the weight wants one: x [..., in], weight [out, in]."""
    if weight.requires_grad or not _suits(x, weight):
        return F.linear(x, weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (weight,) = ctx.saved_tensors
        return _product(slope, weight.mT, None), None, None


def _suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    rows = x.numel() // max(1, x.shape[-1])
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and rows > 0
        and rows % ROWS == 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # The operation that torch.compile makes of a linear layer.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
