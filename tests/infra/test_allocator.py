import subprocess
import sys

import pytest

_FAULTS = """
import ctypes, resource
from infra.allocator import keep_memory
kept = {kept} and keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for turn in range(6):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(kept: bool) -> tuple[str, int]:
    script = _FAULTS.format(kept=kept)
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    return answer[0], int(answer[1])


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_used_again_without_the_kernel():
    (_, before), (kept, after) = _faults(False), _faults(True)
    assert kept == "True"
    assert before > 5 * 1000  # five times 64 MB in pages; fewer where pages are huge
    assert after < before / 20
