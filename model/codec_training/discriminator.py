"""EnCodec's multi-scale STFT discriminator (section 3.3), its hinge losses and the feature matching."""

from __future__ import annotations

import torch
from torch import nn

Judgement = tuple[list[torch.Tensor], list[list[torch.Tensor]]]
"""Logits of each scale, and each scale's feature maps."""


def build_discriminator(filters: int, windows: tuple[int, ...]) -> nn.Module:
    """Called with audio [batch, 1, samples] it returns a `Judgement`."""
    from model.encodec_package import discriminators

    return discriminators().MultiScaleSTFTDiscriminator(
        filters=filters,
        in_channels=1,
        out_channels=1,
        n_ffts=list(windows),
        hop_lengths=[window // 4 for window in windows],
        win_lengths=list(windows),
    )


def discriminator_loss(real: Judgement, fake: Judgement) -> torch.Tensor:
    """Hinge: real logits above 1, fake ones below -1."""
    terms = [torch.relu(1 - r).mean() + torch.relu(1 + f).mean() for r, f in zip(real[0], fake[0], strict=True)]
    return torch.stack(terms).mean()


def adversarial_loss(fake: Judgement) -> torch.Tensor:
    return torch.stack([torch.relu(1 - logits).mean() for logits in fake[0]]).mean()


def feature_loss(real: Judgement, fake: Judgement) -> torch.Tensor:
    """Mean relative difference of feature maps, over scales and layers."""
    terms = [
        (f - r.detach()).abs().mean() / r.detach().abs().mean().clamp(min=1e-6)
        for real_maps, fake_maps in zip(real[1], fake[1], strict=True)
        for r, f in zip(real_maps, fake_maps, strict=True)
    ]
    return torch.stack(terms).mean()
