"""EnCodec's causal convolution without the cost of `reflection_pad1d`, which takes a seventh of its encoder's time.

The reflection at the left edge is a few mirrored samples: copying them in front gives the same numbers as PyTorch's
general reflection, which visits every sample of the output one by one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def with_cheap_padding(network: nn.Module) -> nn.Module:
    """Changes every `SConv1d` of a causal network in place; parameters and names stay."""
    from model.encodec_package import seanet

    for module in network.modules():
        if isinstance(module, seanet().SConv1d):
            module.__class__ = _causal_convolution()
    return network


@functools.cache
def _causal_convolution() -> type:
    import torch

    from model.encodec_package import seanet

    class CausalConvolution(seanet().SConv1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = self.conv.conv
            kernel, stride, dilation = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
            left = (kernel - 1) * dilation - (stride - 1)
            if x.shape[-1] % stride or x.shape[-1] <= left:
                return super().forward(x)
            return self.conv(torch.cat([x[..., 1 : left + 1].flip(-1), x], dim=-1) if left else x)

    return CausalConvolution
