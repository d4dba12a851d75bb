"""Layers of frozen weights: the same results and input gradients as those they stand for, in every case."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.frozen_layers import FrozenLinear, freeze
from model.frozen_linear import ROWS, frozen_linear
from model.layers import RMSNorm, ShortConv, SwiGLU


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = {"gated": SwiGLU(8), "norm": RMSNorm(8), "conv": ShortConv(8, 4), "linear": nn.Linear(8, 5)}[name]
    if name == "norm":
        layer.weight.data.normal_()
    return layer


def outcome(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, torch.autograd.grad((y * weight).sum(), x)[0]


@pytest.mark.parametrize("name", ["gated", "norm", "conv", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(max_examples=10)
@given(rows=st.integers(1, 5), time=st.integers(1, 70))
def test_results_and_gradients_are_those_of_the_layer(name: str, dtype: torch.dtype, rows: int, time: int) -> None:
    layer = made(name).to(dtype)
    frozen = freeze(copy.deepcopy(layer))
    x = torch.randn(rows, time, 8).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    for one, other in zip(outcome(layer, x), outcome(frozen, x), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        one, other = layer(x), frozen(x)
        for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (one, other)), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_convolution_goes_on_from_its_past() -> None:
    layer = made("conv").double()
    frozen, x = freeze(copy.deepcopy(layer)), torch.randn(2, 30, 8, dtype=torch.float64)
    whole, _ = layer(x)
    first, past = frozen(x[:, :17])
    second, _ = frozen(x[:, 17:], past)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    lengths = torch.tensor([17, 3])
    torch.testing.assert_close(frozen(x, None, lengths)[1], layer(x, None, lengths)[1])


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, 3 * ROWS])
def test_a_weight_that_wants_a_gradient_gets_it(rows: int) -> None:
    x, weight = torch.randn(rows, 8), torch.randn(5, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(frozen_linear(x, weight).sum(), weight)
    torch.testing.assert_close(gradient, x.sum(0).expand(5, -1))


def test_products_of_many_rows_go_through_onednn(monkeypatch) -> None:
    used = []
    product = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr("model.frozen_linear._product", lambda *a: used.append(1) or product(*a, "none", [], ""))
    layer = freeze(nn.Linear(8, 5))
    assert type(layer) is FrozenLinear
    outcome(layer, torch.randn(2, ROWS, 8))
    assert len(used) == 2
    for x in (torch.randn(ROWS - 1, 8), torch.randn(0, 8), torch.randn(ROWS, 8).double()):
        frozen_linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    assert len(used) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(ROWS, 8)).dtype == torch.bfloat16
