"""Learning beside a transform codec's lanes: what of a decoder may change while speech goes on through it.

The lanes of `model.codec_initial` carry samples raised by an offset ten times as large. Whatever reads them with
weights that learn freely learns the offset first and hears the samples as its noise; whatever moves them is
heard at once. So lanes stay, and of what reads them only the part that doesn't see the offset learns: changes whose
sum over the lanes is nothing. What is beside them may add to them, from nothing at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from model.codec_config import CodecConfig, CodecError
from model.codec_initial import SAMPLE_GAIN, SAMPLE_OFFSET, fits, lanes_held, parts

Projection = Callable[[torch.Tensor], torch.Tensor]
"""A change of a parameter to the part of it that leaves the lanes alone; applied twice it does no more than once."""


class Lanes:
    """
    Args:
        decoder: a `SEANetDecoder` without weight norm that began as a transform codec.
        config: its sizes.

    Raises:
        CodecError: they have no room for lanes.
    """

    def __init__(self, decoder: nn.Module, config: CodecConfig) -> None:
        if not fits(config):
            raise CodecError(f"codec {config.name!r} cannot keep lanes, for which its sizes have no room")
        strides, held = config.ratios, lanes_held(config)[::-1]
        convolutions, blocks = parts(decoder)
        first, last, ups = convolutions[0], convolutions[-1], convolutions[1:-1]
        self.projections: dict[nn.Parameter, Projection] = {first.bias: _kept_rows(2 * config.dimension)}
        entering, raised = 2 * config.dimension, False  # the expander's outputs bear no offset
        for up, stage, stride, lanes in zip(ups, blocks, strides, held, strict=True):
            self.projections[up.weight] = _upwards(entering, lanes, stride, raised)
            self.projections[up.bias] = _kept_rows(lanes)
            for block in stage:
                shortcut, inner = block.shortcut.conv.conv, block.block[1].conv.conv
                self.projections[shortcut.weight] = _across(lanes, lanes)
                self.projections[shortcut.bias] = _kept_rows(lanes)
                self.projections[inner.weight] = _across(lanes, 0)
            entering, raised = lanes, True
        self.last = last
        self.projections |= {last.weight: _across(1, 1), last.bias: _kept_rows(1)}

    def require(self) -> None:
        """Raises CodecError where the decoder's weights are not those of a transform codec."""
        weight, bias = 1 / SAMPLE_GAIN, -SAMPLE_OFFSET / SAMPLE_GAIN
        if self.last.weight[0, 0, -1] != weight or self.last.bias != bias:
            raise CodecError(
                "keep_lanes is for a decoder that began as a transform codec, and that of start_from has no lanes; "
                "leave keep_lanes out"
            )

    def project_gradients(self) -> None:
        for parameter, project in self.projections.items():
            parameter.grad = project(parameter.grad)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """An optimiser's step inside changes nothing that must stay, though it scales each weight's change apart."""
        before = {parameter: parameter.detach().clone() for parameter in self.projections}
        yield
        with torch.no_grad():
            for parameter, project in self.projections.items():
                parameter.copy_(before[parameter] + project(parameter - before[parameter]))


def _kept_rows(count: int) -> Projection:
    """The first `count` stay."""
    return lambda change: torch.cat([torch.zeros_like(change[:count]), change[count:]])


def _across(lanes: int, kept: int) -> Projection:
    """Weights [outputs, inputs, taps]: from lanes to the first `kept` outputs they stay, to others their sum stays."""

    def project(change: torch.Tensor) -> torch.Tensor:
        read = change[:, :lanes]
        read = read - read.mean((1, 2), keepdim=True)
        return torch.cat([_kept_rows(kept)(read), change[:, lanes:]], dim=1)

    return project


def _upwards(lanes: int, kept: int, stride: int, raised: bool) -> Projection:
    """The same for transposed weights [inputs, outputs, 2 · stride]; lanes without an offset are read freely."""

    def project(change: torch.Tensor) -> torch.Tensor:
        read = change[:lanes]
        if raised:  # a sample comes from two taps of every input
            taps = read.unflatten(2, (2, stride))
            read = (taps - taps.mean((0, 2), keepdim=True)).flatten(2)
        read = torch.cat([torch.zeros_like(read[:, :kept]), read[:, kept:]], dim=1)
        return torch.cat([read, change[lanes:]])

    return project
