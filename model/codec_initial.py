"""Initial weights that let speech through: unit variance from layer to layer, and lanes that make a transform codec.

PyTorch's default loses a factor of about three in variance at each of some thirty convolutions: the encoder's output
then hardly depends on its input (its standard deviation over time was 0.0005), and thousands of steps go into finding
it again.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from model.codec_config import CodecConfig

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


@torch.no_grad()
def transform_codec(encoder: nn.Module, decoder: nn.Module, config: CodecConfig) -> bool:
    """Makes newly initialised networks start as a working transform codec, and says whether their sizes allow it.

    Some channels of each layer become lanes that hand the samples on, raised so far that they are positive, where ELU
    is the identity: strides lay neighbours side by side, the last one takes the DCT of a frame. Two channels a
    coefficient, one of them negated, make ELU the compander of the latent, which high coefficients enter raised: quiet
    sounds get finer steps than loud ones. The decoder runs backwards. The other channels stay random and see the lanes,
    but give nothing to them: training decides what they are for. With k-means codebooks of an hour of speech this is
    already an intelligible codec, of voices that it never heard, too.
    """
    if not fits(config):
        return False
    strides, held = config.ratios[::-1], lanes_held(config)
    raised = (1 + torch.arange(config.dimension) * config.sample_rate / (2 * config.hop) / CORNER).sqrt().unsqueeze(1)
    transform = dct(config.hop)[: config.dimension]
    _lay_encoder(encoder, strides, held, transform * raised * COEFFICIENT_GAIN)
    _lay_decoder(decoder, strides, held, transform / raised / COEFFICIENT_GAIN)
    return True


def lanes_held(config: CodecConfig) -> list[int]:
    """Lanes of each layer, from the full sample rate on: as many as it has samples for one of its own."""
    strides = config.ratios[::-1]
    return [math.prod(strides[:i]) for i in range(len(strides))]


def fits(config: CodecConfig) -> bool:
    """Whether networks of these sizes have room for the lanes and for two channels a coefficient."""
    widths = [config.filters * 2**i for i in range(len(config.ratios) + 1)]
    room = all(lanes <= width for lanes, width in zip(lanes_held(config), widths, strict=False))
    return room and config.dimension <= config.hop and 2 * config.dimension <= widths[-1]


CORNER = 300.0
"""Hz above which coefficients are raised, by 3 dB an octave."""
SAMPLE_GAIN, SAMPLE_OFFSET = 4.0, 4.0
"""Lanes carry samples times the gain, plus the offset: positive wherever samples are within ±1."""
COEFFICIENT_GAIN = 12.0
"""Coefficients times this enter the compander ELU(x) - ELU(-x), whose slope is 2 at silence and 1 where it is loud."""
LATENT_GAIN = 0.2
EXPANDER = 0.49774556, 1.32198582, 1.95664558
"""(k, t, b) such that b (ELU(k y - t) - ELU(-k y - t)) undoes the compander, within 5 % from silence to 40 dB above."""


def dct(size: int) -> torch.Tensor:
    """The orthonormal DCT-II as a matrix [coefficients, samples]."""
    k, n = torch.arange(size).unsqueeze(1), torch.arange(size).unsqueeze(0)
    matrix = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _lay_encoder(encoder: nn.Module, strides: tuple[int, ...], held: list[int], analysis: torch.Tensor) -> None:
    convolutions, blocks = parts(encoder)
    first, last, latents = convolutions[0], convolutions[-1], range(len(analysis))
    _set_rows(first, _moves(first, 1, {(0, 0, -1): SAMPLE_GAIN}))
    _level(first, 0, 1)
    for stage, (stride, lanes) in enumerate(zip(strides, held, strict=True)):
        _lay_blocks(blocks[stage], lanes)
        step = convolutions[1 + stage]
        if stage < len(strides) - 1:
            moves = {(j * lanes + lane, lane, stride + j): 1.0 for j in range(stride) for lane in range(lanes)}
            _set_rows(step, _moves(step, stride * lanes, moves))
            _level(step, lanes, stride * lanes)
        else:
            weight = torch.zeros(len(analysis), *step.weight.shape[1:])
            # As half precision keeps them: rounded later, they would let the offset into silence
            halved = (analysis / SAMPLE_GAIN).half().float().view(-1, stride, lanes)
            weight[:, :lanes, stride:] = halved.transpose(1, 2)
            _set_rows(step, torch.cat([weight, -weight]))
            _level(step, lanes, 0)
    pairs = {(d, d, -1): LATENT_GAIN for d in latents} | {(d, d + len(latents), -1): -LATENT_GAIN for d in latents}
    _set_rows(last, _moves(last, len(latents), pairs))


def _lay_decoder(decoder: nn.Module, strides: tuple[int, ...], held: list[int], synthesis: torch.Tensor) -> None:
    convolutions, blocks = parts(decoder)
    first, last, latents = convolutions[0], convolutions[-1], range(len(synthesis))
    slope, threshold, gain = EXPANDER
    slope /= LATENT_GAIN
    pairs = {(d, d, -1): slope for d in latents} | {(d + len(latents), d, -1): -slope for d in latents}
    _set_rows(first, _moves(first, 2 * len(latents), pairs))
    first.bias[: 2 * len(latents)] = -threshold
    for stage, (stride, lanes) in enumerate(zip(strides[::-1], held[::-1], strict=True)):
        step = convolutions[1 + stage]
        weight = _effective(step).clone()
        weight[:, :lanes] = 0
        if stage == 0:
            spread = synthesis.view(-1, stride, lanes).transpose(1, 2) * SAMPLE_GAIN * gain
            weight[: 2 * len(latents), :lanes, :stride] = torch.cat([spread, -spread])
            step.bias[:lanes] = SAMPLE_OFFSET
        else:
            weight[: stride * lanes, lanes:] -= weight[: stride * lanes, lanes:].mean(0)  # of the offset, nothing
            for j in range(stride):
                for lane in range(lanes):
                    weight[j * lanes + lane, lane, j] = 1.0
        # A transposed convolution's weight norm is over its inputs
        _assign(step, weight)
        _lay_blocks(blocks[stage], lanes)
    _set_rows(last, _moves(last, 1, {(0, 0, -1): 1 / SAMPLE_GAIN}))
    last.bias.fill_(-SAMPLE_OFFSET / SAMPLE_GAIN)


def parts(network: nn.Module) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """The convolutions between blocks in order, and the residual blocks of each stage."""
    outer = [getattr(m, "conv", None) or getattr(m, "convtr", None) for m in network.model]
    convolutions = [getattr(m, "conv", None) or m.convtr for m in outer if m is not None]
    blocks: list[list[nn.Module]] = []
    upwards = any(isinstance(m, nn.ConvTranspose1d) for m in convolutions)
    for module in network.model:
        if hasattr(module, "block"):
            blocks[-1].append(module)
        elif hasattr(module, "convtr") or (hasattr(module, "conv") and not upwards):
            blocks.append([])
    return convolutions, blocks


def _lay_blocks(blocks: list[nn.Module], lanes: int) -> None:
    """Residual blocks that pass lanes through."""
    for block in blocks:
        shortcut, inner, outer = (m.conv.conv for m in (block.shortcut, block.block[1], block.block[3]))
        _set_rows(shortcut, _moves(shortcut, lanes, {(lane, lane, 0): 1.0 for lane in range(lanes)}))
        _level(shortcut, lanes, lanes)
        _level(inner, lanes, 0)
        if hasattr(outer, "weight_g"):
            outer.weight_g[:lanes] = 0  # directions stay random, so that they can be learnt
        else:
            outer.weight[:lanes] = 0


def _level(conv: nn.Conv1d, entering: int, leaving: int) -> None:
    """Sets the biases: the first `entering` inputs bear the lanes' offset, the first `leaving` outputs shall, others
    not."""
    conv.bias.copy_(-_effective(conv)[:, :entering].sum((1, 2)) * SAMPLE_OFFSET)
    conv.bias[:leaving] += SAMPLE_OFFSET


def _moves(conv: nn.Module, rows: int, entries: dict[tuple[int, int, int], float]) -> torch.Tensor:
    """Weights of `rows` output channels that see nothing but `entries` {(output, input, tap): weight}."""
    weight = torch.zeros(rows, *_effective(conv).shape[1:])
    for place, value in entries.items():
        weight[place] = value
    return weight


def _set_rows(conv: nn.Module, rows: torch.Tensor) -> None:
    weight = _effective(conv).clone()
    weight[: len(rows)] = rows
    _assign(conv, weight)


def _effective(conv: nn.Module) -> torch.Tensor:
    if hasattr(conv, "weight_g"):
        return torch._weight_norm(conv.weight_v, conv.weight_g, 0)
    return conv.weight


def _assign(conv: nn.Module, weight: torch.Tensor) -> None:
    if hasattr(conv, "weight_g"):
        # Rows of zeros keep a direction, so that they stay finite and can be learnt
        size = torch.linalg.vector_norm(weight.flatten(1), dim=1).view_as(conv.weight_g)
        conv.weight_v.copy_(torch.where(size > 0, weight, conv.weight_v))
        conv.weight_g.copy_(size)
    else:
        conv.weight.copy_(weight)
