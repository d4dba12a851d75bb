"""What `device: auto` means: a GPU where there is one, else the CPU."""

from __future__ import annotations

AUTO, CPU, CUDA = "auto", "cpu", "cuda"


def of_cluster(device: str) -> str:
    """Where a job's workers compute: `auto` is decided by the GPUs that are up now on the Ray that is connected."""
    import ray

    if device != AUTO:
        return device
    return CUDA if ray.cluster_resources().get("GPU", 0) > 0 else CPU


def of_process(device: str) -> str:
    """Where this process computes: `auto` is decided by the GPUs that it sees."""
    import torch

    if device != AUTO:
        return device
    return CUDA if torch.cuda.is_available() else CPU
