"""Gated linear attention (Yang et al. 2024): one operation, several ways to compute it.

    S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t        o_t = scale · q_t S_t

Layout, everywhere: q, k and g (logarithms of the decay, ≤ 0) are [batch, time, heads, d_k], v and o [batch, time,
heads, d_v], states [batch, heads, d_k, d_v]. `gla` picks flash-linear-attention's kernels on CUDA and our chunks
(`model.gla_chunked`) elsewhere; `recurrent_gla` is the definition above, a step at a time, and what both are held to.
"""

from __future__ import annotations

import functools
import warnings

import torch

from model.gla_chunked import chunked_gla

SHORT = 3
"""Up to this many steps the recurrence itself is the fastest on a CPU."""


def gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated linear attention over whole sequences, from a state of each sequence to its next.

    Args:
        q, k, g: [B, T, H, d_k]; g is the logarithm of the decay, down to -inf (forget everything).
        v: [B, T, H, d_v].
        initial_state: [N, H, d_k, d_v], a state a sequence; None means zeros.
        scale: of q; None means d_k^-0.5.
        cu_seqlens: int [N + 1], bounds of sequences packed one after another in one row (B = 1); some may be empty.

    Returns:
        o [B, T, H, d_v] of v's dtype and the final state [N, H, d_k, d_v], float32 (float64 for float64 input). No
        argument is changed. Gradients reach q, k, v, g and initial_state.

    Raises:
        ValueError: shapes that do not belong together.
    """
    sequences = _checked(q, k, v, g, initial_state, cu_seqlens)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = q.new_zeros(sequences, q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.is_cuda and dtype == torch.float32 and _kernels():
        return _fla(q, k, v, g, initial_state.float(), scale, cu_seqlens)
    arguments = [x.to(dtype) for x in (q, k, v, g)]
    if cu_seqlens is None:
        o, state = _computed(*arguments, initial_state.to(dtype), scale)
        return o.to(v.dtype), state
    rows, steps, longest = _unpacked(cu_seqlens, q.shape[1])
    padded = [x.new_zeros(sequences, longest, *x.shape[2:]).index_put((rows, steps), x[0]) for x in arguments]
    o, state = _computed(*padded, initial_state.to(dtype), scale)
    return o[rows, steps].unsqueeze(0).to(v.dtype), state


def recurrent_gla(q, k, v, g, state, scale):
    """The definition, a step at a time: arguments and results as those of `gla`, all of one dtype, no packing."""
    decays, outputs = g.exp(), []
    for t in range(q.shape[1]):
        state = decays[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return (torch.stack(outputs, 1) if outputs else v), state


def _computed(q, k, v, g, state, scale):
    # Automatic mixed precision would round the decays' products to 8 bits.
    with torch.autocast(q.device.type, enabled=False):
        return (recurrent_gla if q.shape[1] <= SHORT else chunked_gla)(q, k, v, g, state, scale)


def _checked(q, k, v, g, initial_state, cu_seqlens) -> int:
    """How many sequences there are. Raises ValueError for shapes that do not belong together."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, g {list(g.shape)}"
    if q.ndim != 4 or q.shape != k.shape or q.shape != g.shape or q.shape[:3] != v.shape[:3] or v.ndim != 4:
        raise ValueError(f"expected q, k, g [B, T, H, d_k] and v [B, T, H, d_v], found {shapes}")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"packed sequences lie in one row; found {q.shape[0]} rows: flatten them into [1, B · T, …]")
    # Not on a GPU: looking would wait for it.
    if (
        cu_seqlens is not None
        and not cu_seqlens.is_cuda
        and (cu_seqlens[0] != 0 or cu_seqlens[-1] != q.shape[1] or bool((cu_seqlens.diff() < 0).any()))
    ):
        raise ValueError(f"cu_seqlens must rise from 0 to {q.shape[1]}, found {cu_seqlens.tolist()}")
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    expected = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(f"initial_state must be [N, H, d_k, d_v] = {list(expected)}, not {list(initial_state.shape)}")
    return sequences


def _unpacked(cu_seqlens: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(sequence of each step, its place there, length of the longest)"""
    lengths = cu_seqlens.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    steps = torch.arange(total, device=lengths.device) - cu_seqlens[:-1][rows]
    return rows, steps, int(lengths.max()) if len(lengths) else 0


@functools.cache
def _kernels() -> bool:
    """Whether flash-linear-attention can be imported; says once what is lost if not."""
    try:
        import fla.ops.gla  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a torchaudio built for another CUDA, which its imports reach
        warnings.warn(
            f"flash-linear-attention cannot be imported ({error}): gated linear attention runs on the GPU without "
            "fused kernels, several times slower; install the extra `gpu` (`make install EXTRAS=…,gpu`)",
            stacklevel=2,
        )
        return False
    return True


def _fla(q, k, v, g, initial_state, scale, cu_seqlens):
    """flash-linear-attention 0.6: the gate is called `g` in one kernel and `gk` in the other, states are float32 and,
    by these operations' default, [d_k, d_v] (its layers keep them transposed; said here so that it stays so)."""
    from fla.ops.gla import chunk_gla, fused_recurrent_gla

    shared = dict(
        scale=scale,
        initial_state=initial_state.contiguous(),
        output_final_state=True,
        state_v_first=False,
        cu_seqlens=cu_seqlens,
    )
    # Sums of gates within a chunk are subtracted from one another: -inf less -inf is no number. exp(-88) is 0.
    q, k, v, g = (x.contiguous() for x in (q, k, v, g.clamp(min=-88)))
    # A chunk's tensor-core path wants 16 steps and more; fewer are stepped.
    if q.shape[1] < 16:
        o, state = fused_recurrent_gla(q, k, v, gk=g, **shared)
    else:
        o, state = chunk_gla(q, k, v, g=g, **shared)
    return o.to(v.dtype), state
