"""glibc's allocator, told to keep what is freed.

A training step frees hundreds of megabytes and needs them again in the next one; handing them to the kernel in between
costs a fifth to a third of a step on CPUs.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Of malloc.h."""


def keep_memory() -> bool:
    """From now on, large blocks come from the heap and the heap does not shrink; False where there is no glibc.

    For processes that compute the same sizes over and over; their memory stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 256 << 20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
