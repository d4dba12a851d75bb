"""Gated linear attention: every way to compute it gives what the definition in float64 gives, gradients included."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import gla_chunked
from model.gla import gla, recurrent_gla

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dstate")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference from the definition in float64, as a share of the largest value, at least 1."""


def arguments(batch, time, heads, d_k, d_v, strength, forgetting, seed=0):
    """Random q, k, v, g, state in float64; some gates forget everything, the others are up to `strength`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(batch, time, heads, d_k), normal(batch, time, heads, d_k), normal(batch, time, heads, d_v)
    g = -strength * torch.rand(batch, time, heads, d_k, generator=generator, dtype=torch.float64).pow(4)
    g[torch.rand(g.shape, generator=generator) < forgetting] = -torch.inf
    return q, k, v, g, normal(batch, heads, d_k, d_v)


def with_gradients(operation, values, dtype):
    """(o, final state, gradients of all values) for fixed random gradients of o and the final state."""
    leaves = [x.to(dtype).requires_grad_() for x in values]
    o, state = operation(*leaves)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, state)]
    return [o, state, *torch.autograd.grad([o, state], leaves, weights, materialize_grads=True)]


def oracle(*values):
    return recurrent_gla(*values, scale=values[0].shape[-1] ** -0.5)


def each_alone(bounds):
    """The definition of packed sequences: every one by itself."""

    def operation(q, k, v, g, states):
        parts = [
            oracle(*(x[:, start:end] for x in (q, k, v, g)), states[i : i + 1])
            for i, (start, end) in enumerate(itertools.pairwise(bounds.tolist()))
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([state for _, state in parts])

    return operation


def assert_equal(ours, truth, dtype):
    for name, one, other in zip(NAMES, ours, truth, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max().item() if other.numel() else 0.0
        difference = (one.double() - other).abs().max().item() if other.numel() else 0.0
        assert difference <= TOLERANCE[dtype] * max(scale, 1.0), f"{name} differs by {difference:.1e} of {scale:.1e}"


@settings(max_examples=40)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32]),
    batch=st.integers(1, 3),
    time=st.one_of(st.integers(1, 10), st.integers(11, 200)),
    heads=st.integers(1, 3),
    d_k=st.integers(1, 9),
    d_v=st.integers(1, 9),
    strength=st.sampled_from([0.0, 0.04, 1.0, 5.0, 30.0, 1e3, 1e6]),
    forgetting=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
)
def test_chunks_agree_with_the_definition(dtype, batch, time, heads, d_k, d_v, strength, forgetting) -> None:
    values = arguments(batch, time, heads, d_k, d_v, strength, forgetting, seed=time)
    assert_equal(with_gradients(gla, values, dtype), with_gradients(oracle, values, torch.float64), dtype)


@pytest.mark.parametrize("width", [1, 2, 8, 32, 64])
def test_halving_goes_as_far_as_the_gates_demand(width: int) -> None:
    """One block of `width` steps decays right below the limit in float32, one of twice as many beyond it."""
    values = arguments(1, 64, 1, 4, 4, 0.0, 0.0)
    values[3][:, :width] = -0.9 * gla_chunked.LIMIT / width
    values[3][:, width:] = -0.9 * gla_chunked.LIMIT / width
    assert gla_chunked._safe_width(values[3].transpose(1, 2)) == width
    truth = with_gradients(oracle, values, torch.float64)
    assert_equal(with_gradients(gla, values, torch.float32), truth, torch.float32)


def test_a_written_out_product_would_overflow_where_ours_does_not() -> None:
    values = arguments(1, 64, 1, 4, 4, 0.0, 0.0)
    values[3][:, 10:20] = -12.0
    q, k, v, g, state = (x.float() for x in values)
    sums = g.cumsum(1)
    factored = torch.einsum("bthd,bshd->bhts", q * sums.exp(), k * (-sums).exp()).tril()
    assert not torch.isfinite(factored).all()
    o, final = gla(q, k, v, g, state)
    truth, truth_final = oracle(*values)
    torch.testing.assert_close(o.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final.double(), truth_final, rtol=1e-5, atol=1e-5)


def test_small_decays_beside_forgetting_keep_their_digits() -> None:
    """Differences of long sums would lose what is small beside 1e4: a relative error of 1e-3 in float32."""
    values = arguments(1, 64, 1, 4, 4, 0.02, 0.0)
    values[3][:, 5:50:3] = -9e3
    ours, _ = gla(*(x.float() for x in values))
    torch.testing.assert_close(ours.double(), oracle(*values)[0], rtol=1e-5, atol=1e-6)


@settings(max_examples=12)
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=5), strength=st.sampled_from([0.1, 50.0]))
def test_packed_sequences_are_as_those_alone(lengths: list[int], strength: float) -> None:
    total, bounds = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    q, k, v, g, _ = arguments(1, total, 2, 3, 5, strength, 0.0)
    states = arguments(len(lengths), 1, 2, 3, 5, 1.0, 0.0, seed=1)[4]

    def packed(*values):
        return gla(*values, cu_seqlens=bounds)

    ours, truth = (with_gradients(f, (q, k, v, g, states), torch.float64) for f in (packed, each_alone(bounds)))
    assert_equal(ours, truth, torch.float64)


def test_a_sequence_in_pieces_is_the_whole() -> None:
    q, k, v, g, state = arguments(2, 150, 2, 4, 6, 2.0, 0.02)
    whole, final = gla(q, k, v, g, state)
    pieces, at = [], 0
    for size in (1, 70, 3, 64, 12):
        o, state = gla(*(x[:, at : at + size] for x in (q, k, v, g)), state)
        pieces.append(o)
        at += size
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


def test_the_gradient_of_the_state_alone_is_the_same() -> None:
    """Where weights are frozen, a voice's state is all that is asked for."""
    q, k, v, g, state = arguments(2, 150, 2, 4, 6, 2.0, 0.02)
    state.requires_grad_()
    alone = torch.autograd.grad(gla(q, k, v, g, state)[0].sin().sum(), state)[0]
    everything = [x.clone().requires_grad_() for x in (q, k, v, g, state)]
    together = torch.autograd.grad(gla(*everything)[0].sin().sum(), everything)[4]
    assert alone.abs().max() > 0
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


def test_arguments_stay_as_they_are_and_states_stay_precise() -> None:
    values = [x.bfloat16() for x in arguments(1, 70, 1, 4, 4, 1.0, 0.0)]
    before = [x.clone() for x in values]
    o, state = gla(*values)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(values, before, strict=True))
    truth, _ = oracle(*(x.double() for x in values))
    torch.testing.assert_close(o.double(), truth, rtol=1e-2, atol=1e-2)


def test_not_a_number_is_not_hidden() -> None:
    q, k, v, g, state = arguments(1, 70, 1, 4, 4, 1.0, 0.0)
    g[0, 30, 0, 1] = torch.nan
    o, _ = gla(q, k, v, g, state)
    assert torch.isfinite(o[:, :30]).all() or torch.isnan(o[:, :30]).any()
    assert torch.isnan(o[:, 30:]).all()


def test_not_a_number_spoils_no_strong_gates_beside_it() -> None:
    """Their chunks are halved as without it: one factored product of them would overflow."""
    values = arguments(2, 64, 1, 4, 4, 1.0, 0.0)
    values[3][0, 10:20] = -100.0
    alone, _ = gla(*(x[:1].float() for x in values))
    values[3][1, 30, 0, 1] = torch.nan
    o, _ = gla(*(x.float() for x in values))
    assert torch.isnan(o[1]).any() and torch.isfinite(o[0]).all()
    torch.testing.assert_close(o[:1], alone)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v, g, state = arguments(2, 5, 2, 3, 4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"initial_state must be \[N, H, d_k, d_v\] = \[2, 2, 3, 4\]"):
        gla(q, k, v, g, state.mT)
    with pytest.raises(ValueError, match="expected q, k, g"):
        gla(q, k[:, :4], v, g, state)
    with pytest.raises(ValueError, match="one row"):
        gla(q, k, v, g, state, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="rise from 0 to 5"):
        gla(*(x[:1] for x in (q, k, v, g)), cu_seqlens=torch.tensor([0, 4]))


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
KERNEL_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2}
"""Norm of the difference, as a share: flash-linear-attention rounds float32 to TF32 within products."""


def assert_kernels_agree(values, dtype, bounds=None) -> None:
    """On the GPU, q, k and v of this dtype, gates and states of float32, with the definition in float64 on the CPU."""
    pytest.importorskip("fla.ops.gla")
    q, k, v, g, state = values
    values = *(x.to(dtype).double() for x in (q, k, v)), g.float().double(), state.float().double()

    def kernels(q, k, v, g, state):
        narrow = (x.to(dtype).cuda() for x in (q, k, v))
        o, state = gla(*narrow, g.cuda(), state.cuda(), cu_seqlens=None if bounds is None else bounds.cuda())
        assert o.dtype == dtype
        assert state.dtype == torch.float32
        return o.float().cpu(), state.cpu()

    ours = with_gradients(kernels, values, torch.float32)
    truth = with_gradients(oracle if bounds is None else each_alone(bounds), values, torch.float64)
    for name, one, other in zip(NAMES, ours, truth, strict=True):
        assert one.shape == other.shape
        difference, size = (one - other).norm().item(), other.norm().item()
        assert difference <= KERNEL_TOLERANCE[dtype] * size, f"{name} differs by {difference:.1e} of {size:.1e}"


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", [1, 5, 15, 16, 70, 300])
def test_kernels_agree_with_the_definition(time: int, dtype: torch.dtype) -> None:
    assert_kernels_agree(arguments(2, time, 2, 32, 64, 0.3, 0.0), dtype)


@on_gpu
@pytest.mark.parametrize("d_k, d_v", [(24, 48), (128, 256)])
def test_kernels_agree_at_the_sizes_of_models(d_k: int, d_v: int) -> None:
    """`tiny`, whose widths are no powers of 2, and the published 169 M model."""
    assert_kernels_agree(arguments(1, 100, 4, d_k, d_v, 0.3, 0.0), torch.float32)


@on_gpu
@pytest.mark.parametrize("time", [9, 150])
def test_kernels_agree_where_gates_forget(time: int) -> None:
    assert_kernels_agree(arguments(2, time, 2, 32, 64, 2.0, 0.02), torch.float32)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[20], [4, 0, 1, 6], [0, 5, 90, 0, 1, 64, 16, 0]])
def test_kernels_keep_packed_sequences_apart(lengths: list[int], dtype: torch.dtype) -> None:
    """Some empty, some shorter than a chunk's smallest, alone and beside long ones."""
    q, k, v, g, _ = arguments(1, sum(lengths), 2, 32, 64, 0.3, 0.0)
    states = arguments(len(lengths), 1, 2, 32, 64, 1.0, 0.0, seed=1)[4]
    assert_kernels_agree((q, k, v, g, states), dtype, torch.tensor([0, *lengths]).cumsum(0))
