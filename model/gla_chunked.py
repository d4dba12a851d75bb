"""Gated linear attention in chunks of matrix products, for CPUs, with its gradient written out.

A chunk of C steps needs the decayed products A_ts = Σ_d q_td k_sd exp(g_{s+1,d} + … + g_td) of all its pairs s ≤ t.
Factored as (q_t exp(P_t)) · (k_s exp(-P_s)) with running sums P it is one matrix product, and overflows as soon as a
gate forgets: exp(-P) grows without bound. So the chunk is divided in halves, the halves in halves, and so on:

- pairs that lie in different halves meet at the boundary between them: exp(from s to the boundary) · exp(from the
  boundary to t), both ≤ 1 whatever the gates are;
- halving stops at the largest block within which no channel decays below exp(-LIMIT): there the factored product,
  centred, is safe. With the gates of a model this is the chunk itself, and nothing is divided; with total forgetting
  it goes down to single steps, where no exponent is left.

Sums are taken within blocks, never as differences of longer ones, so small decays beside huge ones stay exact. Between
chunks the state is carried in a loop. Backward keeps the states between chunks and A; the rest is computed again. The
gate's gradient follows from q · dq − k · dk (Yang et al. 2024, appendix C).

Chunks of 64 are the fastest on the CPUs we had: 32 spend more on states, 128 more on pairs (a fifth each).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

CHUNK = 64
LIMIT = 60.0
"""Largest decay, as -log, over a block that is computed as one factored product: exp(±LIMIT/2) is far from overflow."""
FORGOTTEN = -1e4
"""Gates below are taken as this: exp of it is 0 in every dtype, and sums of it are finite."""


def chunked_gla(q, k, v, g, state, scale):
    """As `model.gla.recurrent_gla`, in chunks: [B, T, H, d] and a state [B, H, d_k, d_v] of one dtype."""
    return _ChunkedGLA.apply(q, k, v, g, state, scale)


class _ChunkedGLA(torch.autograd.Function):
    """Inside, tensors are [X, N, C, d]: X rows and heads, N chunks of C steps."""

    @staticmethod
    def forward(ctx, q, k, v, g, state, scale):
        size = min(CHUNK, 1 << (q.shape[1] - 1).bit_length())
        qc, kc, vc, gc = (_to_chunks(x, size) for x in (q, k, v, g))
        qc = qc * scale
        levels, whole = _levels(gc, base := _safe_width(gc))
        pairs = _decayed_products(qc, kc, levels)
        entering, final = _carry(whole.total, (kc * whole.after).mT @ vc, state.reshape(-1, *state.shape[2:]))
        o = (pairs @ vc).add_((qc * whole.before) @ entering)
        ctx.save_for_backward(q, k, v, g, pairs, entering, final)
        ctx.scale, ctx.base = scale, base
        return _from_chunks(o, v.shape), final.view(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        with torch.autocast(do.device.type, enabled=False):
            return _gradients(ctx, do, dfinal)


def _gradients(ctx, do, dfinal):
    """Of q, k, v, g, the state and, None, the scale."""
    q, k, v, g, pairs, entering, final = ctx.saved_tensors
    qc, kc, vc, gc, doc = (_to_chunks(x, pairs.shape[-1]) for x in (q, k, v, g, do))
    qc = qc * ctx.scale
    levels, whole = _levels(gc, ctx.base)
    inflow = (qc * whole.before).mT @ doc
    dleaving, dstate = _carry(whole.total, inflow, dfinal.reshape(final.shape), backwards=True)
    if not any(ctx.needs_input_grad[:4]):
        return None, None, None, None, dstate.view(dfinal.shape), None
    dq, dk = _decayed_products_backward(doc @ vc.mT, qc, kc, levels)
    dq += (doc @ entering.mT).mul_(whole.before)
    dk += (vc @ dleaving.mT).mul_(whole.after)
    dv = (pairs.mT @ doc).add_((kc * whole.after) @ dleaving)
    dg = (qc * dq).sub_(kc * dk)
    dg[:, :-1, -1] += (entering[:, 1:] * dleaving[:, :-1]).sum(-1)
    dg[:, -1, -1] += (final * dleaving[:, -1]).sum(-1)
    dg = dg.flip(2).cumsum(2).flip(2)
    gradients = (dq.mul_(ctx.scale), q), (dk, k), (dv, v), (dg, g)
    return *(_from_chunks(d, x.shape) for d, x in gradients), dstate.view(dfinal.shape), None


class _Level(NamedTuple):
    """Pairs of steps that meet at one kind of place: within blocks of `width`, or across the middle of two such."""

    width: int
    across: bool
    rise: torch.Tensor
    """Decay from the meeting place to each query, [X, N, blocks, width, d]."""
    fall: torch.Tensor
    """Decay from each key to the meeting place, [X, N, blocks, width, d]."""

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Of [X, N, C, d] the view [X, N, blocks, width, d] of the queries of this level: all, or the later halves."""
        return _halves(x, self.width, 1) if self.across else x.unflatten(2, (-1, self.width))

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        return _halves(x, self.width, 0) if self.across else x.unflatten(2, (-1, self.width))

    def pairs(self, a: torch.Tensor) -> torch.Tensor:
        """Of [X, N, C, C] the view [X, N, blocks, width, width] of this level's pairs."""
        if not self.across:
            grid = a.unflatten(3, (-1, self.width)).unflatten(2, (-1, self.width))
            return grid.diagonal(dim1=2, dim2=4).movedim(-1, 2)
        grid = a.unflatten(3, (-1, 2, self.width)).unflatten(2, (-1, 2, self.width))
        return grid[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


class _Whole(NamedTuple):
    """How a chunk meets its surroundings."""

    before: torch.Tensor
    """Decay from the chunk's start to each step and through it, [X, N, C, d]."""
    after: torch.Tensor
    """Decay from each step, without it, to the chunk's end, [X, N, C, d]."""
    total: torch.Tensor
    """Decay through the chunk, [X, N, d]."""


def _safe_width(g: torch.Tensor) -> int:
    """Width of the widest blocks, C halved some times, through none of which a channel decays below exp(-LIMIT).

    What is not a number spoils its own row alone: it says nothing about the decay of others.
    """
    width, totals = 1, [g]
    while width < g.shape[2]:
        totals.append(totals[-1].unflatten(2, (-1, 2)).sum(3))
        width *= 2
    while width > 1 and (totals.pop() < -LIMIT).any():
        width //= 2
    return width


def _levels(g: torch.Tensor, base: int) -> tuple[list[_Level], _Whole]:
    """Where pairs of steps meet, from blocks of `base` up to the chunk, and how the chunk meets its surroundings."""
    before = g.unflatten(2, (-1, base))
    before = before.clamp(min=FORGOTTEN) if base == 1 else before.cumsum(3)
    total = before[..., -1:, :].clone()
    rise = (before - total / 2).exp()
    fall = rise.reciprocal()
    if base == 1:
        rise = fall = torch.ones_like(before)
    levels = [_Level(base, False, rise, fall)]
    if base == g.shape[2]:
        middle = (total / 2).exp()
        return levels, _Whole(*(x.squeeze(2) for x in (rise * middle, fall * middle, total.exp().squeeze(3))))
    after = total - before
    while base < g.shape[2]:
        before, after, total = (x.unflatten(2, (-1, 2)) for x in (before, after, total))
        levels.append(_Level(base, True, before[:, :, :, 1].exp(), after[:, :, :, 0].exp()))
        before[:, :, :, 1] += total[:, :, :, 0]
        after[:, :, :, 0] += total[:, :, :, 1]
        before, after, total = before.flatten(3, 4), after.flatten(3, 4), total.sum(3)
        base *= 2
    return levels, _Whole(*(x.squeeze(2) for x in (before.exp(), after.exp(), total.exp().squeeze(3))))


def _decayed_products(q: torch.Tensor, k: torch.Tensor, levels: list[_Level]) -> torch.Tensor:
    """A of all chunks, [X, N, C, C], zero above the diagonal."""
    whole = None
    for level in levels:
        pairs = (level.queries(q) * level.rise) @ (level.keys(k) * level.fall).mT
        if not level.across:
            pairs.tril_()
            if len(levels) == 1:
                return pairs.squeeze(2)
            whole = q.new_zeros(*q.shape[:3], q.shape[2])
        level.pairs(whole).copy_(pairs)
    return whole


def _decayed_products_backward(da: torch.Tensor, q: torch.Tensor, k: torch.Tensor, levels: list[_Level]):
    """Gradients of q and k from that of A, whose upper triangle is ignored and may be overwritten."""
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    for level in levels:
        d = level.pairs(da)
        if not level.across:
            d = d.tril()
        level.queries(dq).add_((d @ (level.keys(k) * level.fall)).mul_(level.rise))
        level.keys(dk).add_((d.mT @ (level.queries(q) * level.rise)).mul_(level.fall))
    return dq, dk


def _carry(decay, inflow, first, backwards=False) -> tuple[torch.Tensor, torch.Tensor]:
    """States between chunks: S ← decay · S + inflow, from the first chunk to the last or the other way.

    Args:
        decay: [X, N, d_k].
        inflow: [X, N, d_k, d_v].
        first: [X, d_k, d_v].

    Returns:
        (what each chunk was given [X, N, d_k, d_v], what came out at the end [X, d_k, d_v])
    """
    given, state = torch.empty_like(inflow), first
    order = range(inflow.shape[1])
    for n in reversed(order) if backwards else order:
        given[:, n] = state
        state = torch.addcmul(inflow[:, n], decay[:, n, :, None], state)
    return given, state


def _to_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, H, d] to [B · H, N, size, d]; the last chunk is filled with zeros, which change nothing."""
    batch, time, heads, width = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -time % size)) if time % size else x
    return x.view(batch, -1, size, heads, width).permute(0, 3, 1, 2, 4).reshape(batch * heads, -1, size, width)


def _from_chunks(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `_to_chunks`: [B, T, H, d] = shape."""
    batch, time, heads, width = shape
    return x.reshape(batch, heads, -1, width)[:, :, :time].transpose(1, 2)


def _halves(x: torch.Tensor, width: int, half: int) -> torch.Tensor:
    """Of [X, N, C, d], cut into pairs of blocks, one of each pair: [X, N, C / (2 · width), width, d]."""
    return x.unflatten(2, (-1, 2, width))[:, :, :, half]
