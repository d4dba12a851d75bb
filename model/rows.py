"""Rows of a batch, taken out and put together: of tensors [B, …] and of any nesting of tuples of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def taken(progress, rows: torch.Tensor):
    """The given rows, int [R], of a progress or anything in it."""
    if isinstance(progress, torch.Tensor):
        return progress[rows]
    if progress is None:
        return None
    return _like(progress, [taken(part, rows) for part in progress])


def joined(parts: Sequence, rows: Sequence[int]):
    """Several batches as one, in their order.

    Args:
        parts: of one structure; what one has longer than another (texts, prompts, pasts) is padded with zeros on its
            right, and so is None where another has a tensor: nothing and zeros are the same start.
        rows: how many each has.
    """
    known = next((part for part in parts if part is not None), None)
    if known is None:
        return None
    if not isinstance(known, torch.Tensor):
        columns = ([None if part is None else part[i] for part in parts] for i in range(len(known)))
        return _like(known, [joined(column, rows) for column in columns])
    shapes = [part.shape[1:] for part in parts if part is not None]
    whole = known.new_zeros(sum(rows), *(max(sizes) for sizes in zip(*shapes, strict=True)))
    begin = 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None:
            whole[(slice(begin, begin + count), *(slice(size) for size in part.shape[1:]))] = part
        begin += count
    return whole


def trimmed(progress):
    """Without the places that no row fills (of texts and of softmax attention's pasts), as rows that left them."""
    if progress is None or isinstance(progress, torch.Tensor):
        return progress
    if "filled" not in getattr(progress, "_fields", ()):
        return _like(progress, [trimmed(part) for part in progress])
    kept = progress.filled.any(0)
    if bool(kept.all()):
        return progress
    # Tensors are [B, places, width] or [B, H, places, d], and `filled` itself.
    return type(progress)(*(part[:, kept] if part.ndim < 4 else part[:, :, kept] for part in progress))


def put(progress, part, rows: torch.Tensor) -> None:
    """Writes `part` over the given rows, int [R], of a progress or anything in it, where that lies.

    What is shorter in `part` is padded with zeros, and so is None, as by `joined`; what is longer is cut.
    """
    if isinstance(progress, torch.Tensor):
        whole = progress.new_zeros(len(rows), *progress.shape[1:])
        if part is not None:
            common = (..., *(slice(min(sizes)) for sizes in zip(progress.shape[1:], part.shape[1:], strict=True)))
            whole[common] = part[common]
        progress.index_copy_(0, rows, whole)
    elif progress is not None:
        for number, own in enumerate(progress):
            put(own, None if part is None else part[number], rows)


def leaves(progress) -> list[torch.Tensor]:
    """All tensors of a progress, in their order."""
    if isinstance(progress, torch.Tensor):
        return [progress]
    return [] if progress is None else [leaf for part in progress for leaf in leaves(part)]


def _like(container, parts: list):
    return type(container)(*parts) if hasattr(container, "_fields") else tuple(parts)
