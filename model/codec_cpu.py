"""EnCodec's encoder on CPUs: the same arithmetic as its modules, several times as fast.

Three things cost the modules their speed (figures: one AVX-512 core, the published 24 kHz sizes). Channels-first
convolutions reorder their data on the way in and out; MKL's matrix products run at 90 GFLOP/s where oneDNN's run at
210; and an utterance's activations, 3 MB a layer for each second, come from fresh pages of the kernel every time. So:

* activations are [time, channels] and weights packed once for oneDNN; a convolution of stride r and kernel 2r is two
  matrix products on views, the residual sum is part of the last one, and ELU writes straight behind the padding of the
  next convolution;
* an utterance goes through the convolutions in blocks that stay in the cache. Each layer keeps the few samples that its
  kernel still needs, so blocks change nothing: it is one convolution, computed piece by piece;
* utterances are spread over threads, one each; only the LSTM, whose steps wait for each other, takes them as one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from model.codec_config import CodecConfig
from model.codec_search import search_codes

_mkldnn = torch.ops.mkldnn

Carry = list[torch.Tensor | None]
"""A list of one: what a convolution has seen last, None before its first block."""

Stage = Callable[[torch.Tensor, Carry], torch.Tensor]
"""[time, channels in] and the carry, which it updates, to [time / stride, channels out]."""


def available() -> bool:
    """Whether this build of PyTorch has oneDNN's packed operators."""
    return torch.backends.mkldnn.is_available() and hasattr(_mkldnn, "_linear_pointwise")


class FastEncoder:
    """
    Args:
        encoder: a `SEANetEncoder` in float32 on the CPU, without weight norm, built by `build_networks`.
        codebooks: float32 [codebooks, size, dimension].
        config: the sizes of both.
        threads: how many utterances are worked on at once; None means PyTorch's number of threads.
        block: frames computed at a time; tuned to the second-level cache, it has no effect on the codes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        codebooks: torch.Tensor,
        config: CodecConfig,
        threads: int | None = None,
        block: int = 32,
    ) -> None:
        layers = list(encoder.model)
        self.config, self.block = config, max(block, 2)
        self.threads = threads or torch.get_num_threads()
        self.stages: list[Stage] = [_Convolution(layers[0], activate=False)]
        lstms = [layer for layer in layers if hasattr(layer, "lstm")]
        for layer in layers[1:-2]:
            if hasattr(layer, "block"):
                self.stages.append(_Residual(layer))
            elif hasattr(layer, "conv"):
                self.stages.append(_Downsampling(layer))
        self.lstm = lstms[0] if lstms else None
        self.last = _Convolution(layers[-1], activate=True)
        self.codebooks = codebooks
        self.searches = [_Linear(-2 * codebook, codebook.pow(2).sum(1)) for codebook in codebooks]

    def codes(self, waves: list[torch.Tensor], depth: int) -> list[torch.Tensor]:
        """int64 [depth, frames] of each wave float32 [frames · hop]; frames reach at least the last kernel's size."""
        inner, before = max(1, self.threads // max(1, len(waves))), torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                latents = list(pool.map(_on_threads(inner, self._convolutions), waves))
                latents = _on_threads(self.threads, self._recurrent)(latents)
                return list(pool.map(_on_threads(inner, lambda latent: self._quantise(latent, depth)), latents))
        finally:
            torch.set_num_threads(before)  # New threads start with the number that was set last, by any thread.

    def _convolutions(self, wave: torch.Tensor) -> torch.Tensor:
        """[frames, channels] of a wave [frames · hop]."""
        carries: list[Carry] = [[None] for _ in self.stages]
        pieces = []
        for piece in _blocks(wave, self.block * self.config.hop, 2 * self.config.hop):
            x = piece.unsqueeze(1)
            for stage, carry in zip(self.stages, carries, strict=True):
                x = stage(x, carry)
            pieces.append(x)
        return torch.cat(pieces)

    def _recurrent(self, latents: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.lstm is None or not latents:
            return latents
        padded = nn.utils.rnn.pad_sequence(latents)
        output = self.lstm.lstm(padded)[0] + padded
        return [output[: len(latent), row] for row, latent in enumerate(latents)]

    def _quantise(self, latent: torch.Tensor, depth: int) -> torch.Tensor:
        residual = self.last(latent, [None])
        return search_codes(residual, self.codebooks[:depth], self.searches[:depth], self.config.search)


def _on_threads(count: int, function: Callable) -> Callable:
    """`function` of one argument, with so many threads inside PyTorch's operators while it runs."""

    def run(argument):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            with torch.inference_mode():
                return function(argument)
        finally:
            torch.set_num_threads(before)

    return run


class _Linear:
    """x [rows, inputs] → x · weightᵀ + bias [+ addend], packed for oneDNN."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = _mkldnn._reorder_linear_weight(weight.contiguous()), bias

    def __call__(self, x: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        if addend is None:
            return _mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return _mkldnn._linear_pointwise.binary(x, addend, self.weight, self.bias, "add")


class _Convolution:
    """ELU, then a causal convolution of stride 1 on [time, channels]."""

    def __init__(self, layer: nn.Module, activate: bool) -> None:
        conv = layer.conv.conv
        self.activate, self.dilation = activate, conv.dilation[0]
        self.padding = (conv.kernel_size[0] - 1) * self.dilation
        weight = conv.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        sample = [1, conv.in_channels, 1, 1024]
        self.weight = _mkldnn._reorder_convolution_weight(weight, [0, 0], [1, 1], [1, self.dilation], 1, sample)
        self.bias = conv.bias

    def __call__(self, x: torch.Tensor, carry: Carry) -> torch.Tensor:
        padded = _activated_behind(x, carry, self.padding, self.activate).t()[None, :, None]
        out = _mkldnn._convolution_pointwise(
            padded, self.weight, self.bias, [0, 0], [1, 1], [1, self.dilation], 1, "none", [], ""
        )
        return out[0, :, 0].t()


class _Downsampling:
    """ELU, then a convolution of stride r and kernel 2r: a matrix for r rows side by side, one for the r before."""

    def __init__(self, layer: nn.Module) -> None:
        conv = layer.conv.conv
        self.stride = conv.stride[0]
        weight = conv.weight.permute(0, 2, 1).flatten(1)
        before, now = weight.chunk(2, dim=1)
        self.before, self.now = _Linear(before, conv.bias), _Linear(now, None)

    def __call__(self, x: torch.Tensor, carry: Carry) -> torch.Tensor:
        padded = _activated_behind(x, carry, self.stride, True)
        rows = padded.view(-1, self.stride * x.shape[1])
        return self.now(rows[1:], self.before(rows[:-1]))


class _Residual:
    """shortcut(x) + 1×1(ELU(k×1(ELU(x))))."""

    def __init__(self, layer: nn.Module) -> None:
        self.first = _Convolution(layer.block[1], activate=True)
        self.second, self.shortcut = _pointwise(layer.block[3]), _pointwise(layer.shortcut)

    def __call__(self, x: torch.Tensor, carry: Carry) -> torch.Tensor:
        return self.second(torch.nn.functional.elu_(self.first(x, carry)), self.shortcut(x))


def _pointwise(layer: nn.Module) -> _Linear:
    conv = layer.conv.conv
    return _Linear(conv.weight[:, :, 0], conv.bias)


def _activated_behind(x: torch.Tensor, carry: Carry, padding: int, activate: bool) -> torch.Tensor:
    """[padding + time, channels]: what came before `x` (at the very start its reflection), then ELU(x) or x itself."""
    padded = x.new_empty(padding + x.shape[0], x.shape[1])
    behind = padded[padding:]
    if activate:
        torch.ops.aten.elu.out(x, out=behind)
    else:
        behind.copy_(x)
    if padding:
        padded[:padding] = behind[1 : padding + 1].flip(0) if carry[0] is None else carry[0]
        carry[0] = padded[-padding:].clone()
    return padded


def _blocks(wave: torch.Tensor, size: int, least: int) -> list[torch.Tensor]:
    """Pieces of `size` samples; what is left joins the last piece if it is shorter than `least`."""
    ends = list(range(size, len(wave), size))
    if ends and len(wave) - ends[-1] < least:
        ends.pop()
    return list(torch.tensor_split(wave, ends))
