"""A process group of the testing process alone, for modules that import the fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """On one thread, so that sums have one order; what training sets for the whole process is taken back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if not torch.distributed.is_initialized():  # once a process: DeepSpeed keeps groups of the first one
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
