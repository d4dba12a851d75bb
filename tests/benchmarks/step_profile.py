"""Where the time of training steps goes, by kind of work, as torch.profiler sees it.

On a GPU its kernels count, each as what launched it, and where nothing is known of that, by its name; on a CPU the
operators do, each without those within it. What is left of the wall time is the host's: nothing ran meanwhile, or, on a
CPU, Python did, or another process.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

OPTIMISER = "optimiser"
"""The range (`torch.profiler.record_function`) that has to be around norms, clipping, AdamW and copies of weights."""
HOST, OTHERS = "nothing runs: host, gaps", "element-wise, norms, copies"
KINDS = {
    OPTIMISER: rf"\b{OPTIMISER}/",
    "between host and device": r"Memcpy (HtoD|DtoH)",
    "between workers": r"c10d::|nccl",
    "gated linear attention": r"GLA|FusedRecurrent|/(chunk|fused_recurrent)_\w*kernel",
    "loss": r"(?i:log_?softmax|nll_?loss)",
    # The cross-attention's products are plain matrices, and count as such
    "attention": r"(?i:scaled_?dot_?product|flash|fmha|softmax)",
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm)(/|$)|gemm|gemv|nvjet|cutlass|xmma",
}
"""The first that is found in a path of operators counts."""


class Profile(NamedTuple):
    seconds: float
    """Wall time of a step, with the profiler running."""
    kinds: dict[str, float]
    """Of a step, by kind, HOST included; kernels that overlap may add up to more than the step."""
    largest: list[tuple[str, str, float]]
    """(kind, kernel or operator, seconds of a step), the longest first."""


def profiled(steps: Callable[[], int], cuda: bool) -> Profile:
    """Runs `steps`, which tells how many they were; whatever is slow only once should have happened before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        count = steps()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    events = profiler.events()
    times, busy = on_gpu(events) if cuda else on_cpu(events)
    kinds = dict.fromkeys((*KINDS, OTHERS), 0.0)
    for (kind, _), microseconds in times.items():
        kinds[kind] += microseconds / 1e6 / count
    kinds[HOST] = max(0.0, seconds - busy / 1e6) / count
    largest = [(*names, microseconds / 1e6 / count) for names, microseconds in times.most_common(12)]
    return Profile(seconds / count, kinds, largest)


def on_cpu(events) -> tuple[Counter[tuple[str, str]], float]:
    """(microseconds by kind and operator, their sum); named ranges are Python's own time, and not counted."""
    times: Counter[tuple[str, str]] = Counter()
    for event in events:
        if not event.is_user_annotation:
            times[kind_of(path_of(event)), event.name] += event.self_cpu_time_total
    return times, sum(times.values())


def on_gpu(events) -> tuple[Counter[tuple[str, str]], float]:
    """(microseconds by kind and kernel, those in which any kernel ran)."""
    from torch.autograd import DeviceType

    ranges = {event.name for event in events if event.is_user_annotation}  # which appear among kernels, too
    kernels = [event for event in events if event.device_type != DeviceType.CPU and event.name not in ranges]
    unknown = Counter()
    for kernel in kernels:
        unknown[kernel.name] += kernel.time_range.elapsed_us()
    times: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        for kernel in event.kernels:
            if kernel.name not in ranges:
                times[kind_of(f"{path_of(event)}/{kernel.name}"), kernel.name] += kernel.duration
                unknown[kernel.name] -= kernel.duration
    for name, microseconds in unknown.items():
        if microseconds > 1:
            times[kind_of(f"/{name}"), name] += microseconds
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.time_range.start):
        busy += max(0.0, kernel.time_range.end - max(until, kernel.time_range.start))
        until = max(until, kernel.time_range.end)
    return times, busy


def path_of(event) -> str:
    """Names of the operators around it and its own, the outermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return "/".join(reversed(names))


def kind_of(path: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, path)), OTHERS)


def print_profiles(profiles: dict[str, Profile]) -> None:
    """The kinds of each, side by side, then the largest kernels of the last."""
    print(f"{'ms a step, share':36}" + "".join(f"{name:>20}" for name in profiles))
    for kind in (*KINDS, OTHERS, HOST):
        cells = ((p.kinds[kind], p.kinds[kind] / p.seconds) for p in profiles.values())
        print(f"{kind:36}" + "".join(f"{1e3 * seconds:12.2f} {share:7.1%}" for seconds, share in cells))
    print(f"{'the step, profiler running':36}" + "".join(f"{1e3 * p.seconds:12.2f} {'':7}" for p in profiles.values()))
    name, last = list(profiles.items())[-1]
    print(f"\nthe largest of {name}:")
    for kind, kernel, seconds in last.largest:
        print(f"{1e3 * seconds:10.2f} ms {seconds / last.seconds:7.1%}  {kind:28} {kernel[:70]}")
