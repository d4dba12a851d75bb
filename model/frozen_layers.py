"""The layers of a model whose weights are frozen, with only the gradients that are left, written out.

Left to itself, autograd goes several times over memory in these: a slice's gradient is a block of zeros and a copy, a
norm is six operations. Without gradients of weights, each is a few passes. Results are those of `model.layers`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.frozen_linear import FrozenLinear
from model.layers import RMSNorm, ShortConv, SwiGLU, at_least_float32


def freeze(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, without gradients of its weights, its layers made fast; for good."""
    for module in model.eval().requires_grad_(False).modules():
        module.__class__ = _FROZEN.get(type(module), type(module))
    return model


class FrozenSwiGLU(SwiGLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(_Gated.apply(self.up(x)))


class FrozenRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Normed.apply(x, self.weight, self.eps)


class FrozenShortConv(ShortConv):
    def forward(self, x, past=None, lengths=None):
        if past is not None or lengths is not None or x.shape[1] < self.taps:
            return super().forward(x, past, lengths)
        return _Convolved.apply(x, self.weight), x[:, x.shape[1] - self.taps + 1 :].detach()


class _Gated(torch.autograd.Function):
    """silu(a) · b of [..., a b]."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        gate, value = both.chunk(2, -1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        (both,) = ctx.saved_tensors
        gate, value = both.chunk(2, -1)
        result = torch.empty_like(both)
        dgate, dvalue = result.chunk(2, -1)
        torch.mul(slope, F.silu(gate), out=dvalue)
        dgate.copy_(torch.ops.aten.silu_backward(slope * value, gate))
        return result


class _Normed(torch.autograd.Function):
    """x / rms(x) · weight, computed in float32 at least."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = at_least_float32(x)
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        x, weight, inverse = ctx.saved_tensors
        wide, slope = at_least_float32(x), at_least_float32(slope * weight)
        along = (slope * wide).mean(-1, keepdim=True) * inverse.square()
        return torch.addcmul(slope, wide, along, value=-1).mul_(inverse).to(x.dtype), None, None


class _Convolved(torch.autograd.Function):
    """silu of a causal depthwise convolution that starts at zeros: x [B, T, width], weight [width, taps]."""

    @staticmethod
    def forward(ctx, x, weight):
        taps = weight.shape[1]
        out = x * weight[:, -1]
        for late in range(1, taps):
            out[:, late:].addcmul_(x[:, :-late], weight[:, taps - 1 - late])
        ctx.save_for_backward(out, weight)
        return F.silu(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        out, weight = ctx.saved_tensors
        taps = weight.shape[1]
        slope = torch.ops.aten.silu_backward(slope, out)
        result = slope * weight[:, -1]
        for late in range(1, taps):
            result[:, :-late].addcmul_(slope[:, late:], weight[:, taps - 1 - late])
        return result, None


_FROZEN = {nn.Linear: FrozenLinear, SwiGLU: FrozenSwiGLU, RMSNorm: FrozenRMSNorm, ShortConv: FrozenShortConv}
