"""Weights of a codec that has learnt nothing, for tests and timing.

The networks are initialised under a seed so that speech passes through. The codebooks are drawn from the residuals that
such an encoder gives for a synthetic signal, level by level, so codes spread over them as a trained codec's do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from model.codec_config import CodecConfig

if TYPE_CHECKING:
    import torch


def random_weights(config: CodecConfig, seed: int) -> bytes:
    import torch

    from model.codec import build_networks, codebook_name, weights_from_training
    from model.codec_initial import variance_preserving

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        encoder, decoder = build_networks(config, norm="none")
        variance_preserving(encoder, decoder)
        residual = encoder(torch.from_numpy(_signal(config, seed))[None, None])[0].t()
        state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        state |= {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
        for level in range(config.codebooks):
            codebook = _draw(residual, config.codebook_size)
            state[codebook_name(level)] = codebook
            residual = residual - codebook[torch.cdist(residual, codebook).argmin(dim=1)]
        return weights_from_training(config, state)


def _draw(residual: torch.Tensor, size: int) -> torch.Tensor:
    """`size` residuals, each a little beside the vector it was drawn from, so that the next level has residuals."""
    import torch

    chosen = residual[torch.randint(len(residual), (size,))]
    return (chosen + 0.3 * residual.std(dim=0) * torch.randn_like(chosen)).contiguous()


def _signal(config: CodecConfig, seed: int) -> np.ndarray:
    """Gliding harmonics and noise with moving levels, float32, two frames for each codebook entry, 20 s at most."""
    rng = np.random.default_rng(seed)
    samples = min(2 * config.codebook_size * config.hop, 20 * config.sample_rate)
    time = np.arange(samples) / config.sample_rate
    pitch = 120 * 2 ** (0.8 * np.sin(2 * np.pi * 0.4 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / config.sample_rate
    voiced = sum(np.sin(k * phase) * rng.uniform(0.2, 1) / k for k in range(1, 20))
    knots = rng.uniform(0, 1, int(10 * time[-1]) + 2)
    level = np.interp(10 * time, np.arange(len(knots)), knots)
    return (0.15 * level * voiced + 0.05 * (1 - level) * rng.standard_normal(samples)).astype(np.float32)
