"""What the machine under a job can do, for figures that mean something."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DENSE_TFLOPS = {
    # Without sparsity, from NVIDIA's data sheets: (bf16 on tensor cores, float32 as TF32 on tensor cores). The first
    # whose words are in a GPU's name counts.
    "H200 NVL": (836, 418),
    "H200": (989, 495),
    "GH200": (989, 495),
    "H100 PCIe": (756, 378),
    "H100 NVL": (836, 418),
    "H100": (989, 495),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L40": (181, 91),
    "L4": (121, 60),
    "RTX 4090": (165, 83),
}


def peak_flops(device: torch.device, bf16: bool) -> float:
    """FLOP a second that matrix products reach: of a known GPU what its maker says, else measured here in a moment."""
    import torch

    if device.type == "cuda" and (published := _published(torch.cuda.get_device_name(device), bf16)):
        return published
    size = 4096 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        c = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    del c
    return best


def _published(name: str, bf16: bool) -> float | None:
    """What the maker says of a GPU of this name; None of one that is not known, a laptop's or a part of one, say."""
    if re.search(r"\b(Laptop|Max-Q|MIG|D)\b", name):
        return None
    for known, (half, single) in _DENSE_TFLOPS.items():
        if re.search(rf"\b{known}\b", name):
            return (half if bf16 else single) * 1e12
    return None


def memory_bytes(device: torch.device) -> int:
    """The most that this process has held: on the GPU, or of the machine's memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
