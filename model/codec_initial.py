"""Initial weights that let speech through: unit variance from layer to layer, no biases.

PyTorch's default loses a factor of about three in variance at each of some thirty convolutions: the encoder's output
then hardly depends on its input (its standard deviation over time was 0.0005), and thousands of steps go into finding
it again.
"""

from __future__ import annotations

import math

import torch
from torch import nn

SPEECH_LEVEL = 0.1
"""Root mean square of the waveforms."""
ELU_POWER = 0.645
"""Mean square of ELU(x) for standard normal x."""


@torch.no_grad()
def variance_preserving(encoder: nn.Module, decoder: nn.Module) -> None:
    """Initialises EnCodec's networks, with or without weight norm, in place."""
    from model.encodec_package import seanet

    for network in (encoder, decoder):
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                # Of a residual block, shortcut and branch each give half of the variance
                share = 0.5 if ".shortcut." in name or ".block.3." in name else 1.0
                power = 1.0 if ".shortcut." in name else ELU_POWER
                _draw(module, share / power)
    _draw(first_convolution(encoder), 1 / SPEECH_LEVEL**2)
    _draw(first_convolution(decoder), 1.0)
    last = [m for m in decoder.modules() if isinstance(m, seanet().SConv1d)][-1]
    _draw(last.conv.conv, SPEECH_LEVEL**2 / ELU_POWER)


def first_convolution(network: nn.Module) -> nn.Conv1d:
    return network.model[0].conv.conv


def _draw(conv: nn.Conv1d | nn.ConvTranspose1d, gain: float) -> None:
    """Normal weights that turn a mean square of 1 / gain into 1."""
    taps = conv.kernel_size[0] / (conv.stride[0] if isinstance(conv, nn.ConvTranspose1d) else 1)
    direction = getattr(conv, "weight_v", conv.weight)
    direction.normal_(0, math.sqrt(gain / (conv.in_channels * taps)))
    if hasattr(conv, "weight_g"):
        conv.weight_g.copy_(torch.linalg.vector_norm(direction.flatten(1), dim=1).view_as(conv.weight_g))
    if conv.bias is not None:
        conv.bias.zero_()
