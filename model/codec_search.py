"""Codes of latents: residual vector quantisation (EnCodec section 3.2), greedy or with several candidates.

Greedily each codebook in turn takes the code that is nearest to what is left, although another one may leave a rest
that the codebooks behind it meet better. Keeping the best few sums instead (a beam search, as long known for residual
quantisers) costs an encoder's time only; the decoder doesn't know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Distance = Callable[["torch.Tensor"], "torch.Tensor"]
"""[rows, dimension] to [rows, size]: |x - c|² of each code c, less |x|², which is the same for all."""

_ROWS = {"cpu": 64}
"""Latents searched at a time, so that their candidates' distances stay in a CPU's cache; on a GPU many more."""


def nearest_codes(latent: torch.Tensor, codebooks: torch.Tensor, search: int = 1) -> torch.Tensor:
    """
    Args:
        latent: [batch, frames, dimension].
        codebooks: [depth, size, dimension].
        search: sums of codes that are kept from codebook to codebook; 1 is greedy.

    Returns:
        int64 [batch, depth, frames].
    """
    rows = latent.reshape(-1, latent.shape[-1])
    codes = search_codes(rows, codebooks, [_distance(codebook) for codebook in codebooks], search)
    return codes.view(-1, latent.shape[0], latent.shape[1]).transpose(0, 1)


def search_codes(
    rows: torch.Tensor, codebooks: torch.Tensor, distances: Sequence[Distance], search: int
) -> torch.Tensor:
    """int64 [depth, rows] of rows [rows, dimension], with `distances` to the codes of each of the codebooks."""
    import torch

    if search == 1:
        return _greedy(rows, codebooks, distances)
    parts = rows.split(_ROWS.get(rows.device.type, 4096))
    return torch.cat([_beam(part, codebooks, distances, search) for part in parts], dim=1)


def _greedy(residual: torch.Tensor, codebooks: torch.Tensor, distances: Sequence[Distance]) -> torch.Tensor:
    import torch

    codes = []
    for codebook, distance in zip(codebooks, distances, strict=True):
        chosen = distance(residual).argmin(dim=1)
        residual = residual - codebook[chosen]
        codes.append(chosen)
    return torch.stack(codes)


def _beam(rows: torch.Tensor, codebooks: torch.Tensor, distances: Sequence[Distance], search: int) -> torch.Tensor:
    import torch

    count, size = len(rows), codebooks.shape[1]
    everyone = torch.arange(count, device=rows.device).unsqueeze(1)
    residual, error = rows.unsqueeze(1), rows.new_zeros(count, 1)
    codes = torch.empty(count, 1, 0, dtype=torch.int64, device=rows.device)
    for level, (codebook, distance) in enumerate(zip(codebooks, distances, strict=True)):
        kept = residual.shape[1]
        total = distance(residual.flatten(0, 1)).view(count, kept, size) + error.unsqueeze(2)
        wanted = 1 if level == len(codebooks) - 1 else min(search, kept * size)
        error, place = total.flatten(1).topk(wanted, largest=False, sorted=False)
        parent, chosen = place // size, place % size
        residual = residual[everyone, parent] - codebook[chosen]
        codes = torch.cat([codes[everyone, parent], chosen.unsqueeze(2)], dim=2)
    return codes[:, 0].t()


def _distance(codebook: torch.Tensor) -> Distance:
    import torch

    sizes, directions = codebook.pow(2).sum(1), codebook.t()
    return lambda rows: torch.addmm(sizes, rows, directions, beta=1, alpha=-2)
