"""The delay pattern (MusicGen, Copet et al. 2023, section 2.2): codebook i is i steps late, so one step gives one code
of each codebook and a codebook sees the ones before it of its own frame.

Ids of a codebook: 0 padding, 1 start, 2 end, code + 3. With K codebooks, N frames become N + K + 1 steps:

    codebook 0   1 a a a 2 2       a, b: codes of K = 2 codebooks, N = 3 frames
    codebook 1   1 1 b b b 2
"""

from __future__ import annotations

import torch

PAD, BOS, EOS, OFFSET = 0, 1, 2, 3


def delayed(codes: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Tokens of whole utterances.

    Args:
        codes: int [B, K, N], padded on the right with anything.
        lengths: int [B], frames of each row.

    Returns:
        int64 [B, N + K + 1, K]; a row of n frames ends with `EOS` at its step n + K and is `PAD` after it.
    """
    batch, codebooks, frames = codes.shape
    steps = torch.arange(frames + codebooks + 1, device=codes.device)[None, :, None]
    late = torch.arange(1, codebooks + 1, device=codes.device)
    frame = (steps - late).expand(batch, -1, -1)
    ends = lengths[:, None, None]
    shifted = codes.long().transpose(1, 2) + OFFSET
    tokens = shifted.gather(1, frame.clamp(0, frames - 1)) if frames else torch.full_like(frame, EOS)
    tokens = tokens.masked_fill(frame >= ends, EOS).masked_fill(frame < 0, BOS)
    return tokens.masked_fill(steps > ends + codebooks, PAD)


def begun(codes: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of utterances that go on: as `delayed`, up to the last step whose tokens are all known.

    Returns:
        (int64 [B, N + 1, K], steps of each row [B] = frames + 1); the tokens after a row's own steps do not count.
    """
    return delayed(codes, lengths)[:, : codes.shape[2] + 1], lengths + 1


def undelayed(tokens: torch.Tensor) -> torch.Tensor:
    """Codes [K, N] of one row's tokens [T, K] after its start: the frames at the front whose codes are all there."""
    steps, codebooks = tokens.shape
    frames = max(0, steps - codebooks + 1)
    frame = torch.stack([tokens[i : i + frames, i] for i in range(codebooks)])
    whole = (frame >= OFFSET).all(0).long().cumprod(0).bool()
    return frame[:, whole] - OFFSET
