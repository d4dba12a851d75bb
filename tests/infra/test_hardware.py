"""What GPUs are said to reach, by the names that their driver gives them."""

from __future__ import annotations

import pytest

from infra.hardware import _published


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 495),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 836, 418),
        ("NVIDIA H200", 989, 495),
        ("NVIDIA H200 NVL", 836, 418),
        ("NVIDIA GH200 480GB", 989, 495),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA L40", 181, 91),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA GeForce RTX 4090", 165, 83),
    ],
)
def test_a_known_gpu_has_its_makers_figures(name: str, half: int, single: int) -> None:
    assert (_published(name, True), _published(name, False)) == (half * 1e12, single * 1e12)


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA L40G", "NVIDIA A10", "Tesla T4"]
)
def test_another_gpu_is_measured(name: str) -> None:
    assert _published(name, True) is None
