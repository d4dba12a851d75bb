"""A residual vector quantiser that learns: codebooks follow the data by exponential moving averages.

As in EnCodec (section 3.2) and SoundStream: a straight-through estimate for the encoder, a commitment loss, codes that
nobody uses restarted from the batch, and quantiser dropout so that every prefix of the codebooks decodes. Codebooks
start from k-means of the latents that the encoder gave before quantisation was switched on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from model.codec_config import CodecConfig
from model.codec_search import nearest_codes


class Quantised(NamedTuple):
    latent: torch.Tensor
    """[batch, dimension, frames]: the sum of the chosen codes. It has no gradient: that is passed straight through."""
    codes: torch.Tensor
    """int64 [batch, codebooks, frames], all levels."""
    commitment: torch.Tensor
    """Scalar: mean squared distance of the latent to its codes' sum at each level in use, added up over levels."""


class ResidualQuantiser(nn.Module):
    """
    Args:
        config: sizes.
        decay: of the moving averages, a step.
        dead_below: a code is restarted when its moving share of vectors falls below this fraction of an even share.
        recent: latents kept for the k-means start.
    """

    def __init__(self, config: CodecConfig, decay: float = 0.99, dead_below: float = 0.1, recent: int = 32_768) -> None:
        super().__init__()
        levels, size, width = config.codebooks, config.codebook_size, config.dimension
        self.decay, self.dead_below, self.search = decay, dead_below, config.search
        self.register_buffer("embed", torch.zeros(levels, size, width))
        self.register_buffer("sums", torch.zeros(levels, size, width))
        self.register_buffer("counts", torch.zeros(levels, size))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("recent", torch.zeros(max(recent, size), width))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.int64))

    def remember(self, latent: torch.Tensor) -> None:
        """Keeps latents [batch, dimension, frames] for the start, the newest over the oldest."""
        rows = latent.detach().transpose(1, 2).reshape(-1, latent.shape[1])[-len(self.recent) :]
        slots = (self.remembered + torch.arange(len(rows), device=rows.device)) % len(self.recent)
        self.recent[slots] = rows
        self.remembered += len(rows)

    def start(self, generator: torch.Generator, iterations: int = 10, quiet: float = 0.0) -> None:
        """Sets all codebooks by k-means, level by level on what the levels before left over: the first worker's.

        A latent of energy e weighs e^-quiet: at 0 loud ones, which lie far apart, take most codes; at 1 errors count
        relative to the loudness.
        """
        residual = self.recent[: int(self.remembered.clamp(max=len(self.recent)))]
        if len(residual) == 0:
            raise ValueError("the codebooks cannot start before any latents were remembered")
        energy = residual.pow(2).sum(1)
        weights = (energy + 0.02 * energy.mean()).pow(-quiet)  # silence doesn't weigh without bound
        for level in range(len(self.embed)):
            centres = kmeans(residual, self.embed.shape[1], iterations, generator, weights)
            nearest = nearest_rows(residual, centres)
            self._set(level, centres, torch.bincount(nearest, minlength=len(centres)).clamp(min=1) / len(residual))
            residual = residual - centres[nearest]
        self.recent = self.recent[:0].clone()  # no checkpoint needs to carry them any more
        for values in (self.embed, self.sums, self.counts):
            broadcast_from_first(values)
        self.started.fill_(True)

    def begin(self, level: int, centres: torch.Tensor) -> None:
        """Sets a codebook to `centres` [size, dimension], as if all were used evenly."""
        self._set(level, centres.float().to(self.embed.device), torch.full_like(self.counts[level], 1 / len(centres)))

    def forward(
        self, latent: torch.Tensor, depths: torch.Tensor, generator: torch.Generator | None = None
    ) -> Quantised:
        """
        Args:
            latent: [batch, dimension, frames].
            depths: int64 [batch]: how many codebooks each row uses.
            generator: draws the vectors that restart dead codes; needed while training.
        """
        batch, width, frames = latent.shape
        vectors = latent.transpose(1, 2).reshape(-1, width)
        residual, total = vectors.detach(), torch.zeros_like(vectors)
        row_depths = depths.repeat_interleave(frames)
        codes, distances = [], []
        # Codebooks that follow the data need the nearest code of each in turn
        found = None if self.training else nearest_codes(latent.detach().transpose(1, 2), self.embed, self.search)
        for level in range(len(self.embed)):
            nearest = nearest_rows(residual, self.embed[level]) if found is None else found[:, level].flatten()
            chosen = self.embed[level][nearest]
            used = (row_depths > level).to(vectors.dtype).unsqueeze(1)
            # The encoder is pulled towards the sum of the codes so far, as its residual is towards the next one
            distances.append((used * (vectors - total - chosen)).pow(2).sum() / (used.sum().clamp(min=1) * width))
            if self.training:
                self._follow(level, residual, nearest, generator)
            total = total + used * chosen
            residual = residual - chosen
            codes.append(nearest)
        return Quantised(
            total.view(batch, frames, width).transpose(1, 2),
            torch.stack(codes, 1).view(batch, frames, -1).transpose(1, 2),
            torch.stack(distances).sum(),
        )

    @torch.no_grad()
    def _follow(self, level: int, vectors: torch.Tensor, nearest: torch.Tensor, generator: torch.Generator) -> None:
        """Moves a level's codes towards the mean of their vectors and restarts dead ones."""
        size = self.embed.shape[1]
        counts = torch.bincount(nearest, minlength=size).to(vectors.dtype)
        sums = torch.zeros_like(self.sums[level]).index_add_(0, nearest, vectors)
        counts, sums = average_over_workers(counts / len(vectors), sums / len(vectors))
        self.counts[level].lerp_(counts, 1 - self.decay)
        self.sums[level].lerp_(sums, 1 - self.decay)
        dead = self.counts[level] < self.dead_below / size
        if dead.any():
            drawn = vectors[torch.randint(len(vectors), (int(dead.sum()),), generator=generator).to(vectors.device)]
            self.counts[level][dead] = 1 / size
            self.sums[level][dead] = broadcast_from_first(drawn) / size
        self.embed[level] = self.sums[level] / self.counts[level].unsqueeze(1)

    def _set(self, level: int, centres: torch.Tensor, shares: torch.Tensor) -> None:
        self.embed[level], self.counts[level] = centres, shares
        self.sums[level] = centres * shares.unsqueeze(1)


def nearest_rows(vectors: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """int64 [n]: the nearest of `centres` [size, width] to each of `vectors` [n, width]."""
    sizes, directions = centres.pow(2).sum(1), centres.t()
    parts = vectors.split(65_536)  # all distances of an hour's frames at once would be gigabytes
    return torch.cat([torch.addmm(sizes, part, directions, alpha=-2).argmin(dim=1) for part in parts])


def kmeans(
    vectors: torch.Tensor, size: int, iterations: int, generator: torch.Generator, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`size` centres [size, width] of `vectors` [n, width], means by `weights` [n] or plain ones; a centre that loses
    all its vectors is drawn anew."""
    weights = vectors.new_ones(len(vectors)) if weights is None else weights / weights.mean()
    weighted = vectors * weights.unsqueeze(1)
    centres = vectors[torch.randint(len(vectors), (size,), generator=generator).to(vectors.device)].clone()
    for _ in range(iterations):
        nearest = nearest_rows(vectors, centres)
        shares = vectors.new_zeros(size).index_add_(0, nearest, weights)
        sums = torch.zeros_like(centres).index_add_(0, nearest, weighted)
        drawn = vectors[torch.randint(len(vectors), (size,), generator=generator).to(vectors.device)]
        centres = torch.where((shares > 0).unsqueeze(1), sums / shares.clamp(min=1e-9).unsqueeze(1), drawn)
    return centres


def perplexity(codes: torch.Tensor, size: int) -> float:
    """exp(entropy) of how often each of `size` codes is used: `size` when evenly, 1 when always the same."""
    shares = torch.bincount(codes.flatten(), minlength=size).double()
    shares = shares / shares.sum()
    return float(torch.exp(-(shares * torch.log(shares.clamp(min=1e-12))).sum()))


def average_over_workers(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Means over all data-parallel workers, so that codebooks stay equal on them; the values themselves on one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for value in values:
            torch.distributed.all_reduce(value)
            value /= torch.distributed.get_world_size()
    return values


def on_all_workers(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on every data-parallel worker: they go on, or give a step up, together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        agreed = torch.tensor(float(flag), device=device)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
        return bool(agreed > 0)
    return flag


def broadcast_from_first(value: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(value, 0)
    return value
