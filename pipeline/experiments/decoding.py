"""What speaking costs: time and memory of a model's steps by rows and length (the paper's figure 3).

All rows say the same number of frames; their ends are never drawn. A row's state is what the model must remember of it:
of constant size with gated linear attention, growing by a step a frame with softmax attention.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from model.lina_config import LinaConfig
from pipeline.experiments.cells import Cell

if TYPE_CHECKING:
    import torch

KIND = "decoding"
_PHONES = 90
"""Of the text: about what eight seconds of reading hold."""
ROUNDS = 5
"""Of the same: as many as a difference needs to decide anything (`claims.FEWEST`)."""


def work(cell: Cell, kit: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of settings sizes, batch, frames (ascending), rounds and device, untrained weights: ({parameters, state_bytes},
    {elapsed, rounds, peak_bytes}); lists over `frames`, the state's bytes those of all rows, the seconds those of the
    fastest round; `rounds` has such a list of each."""
    import torch

    from model.lina import Lina
    from model.mixers import parameters
    from model.sampling import Policy, advance, begin

    settings = cell.settings
    torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"])
    clock = time.process_time if settings["clock"] == "cpu" and device.type == "cpu" else time.perf_counter
    sizes, batch, frames = LinaConfig.from_dict(settings["sizes"]), settings["batch"], settings["frames"]
    torch.manual_seed(0)
    model = Lina(sizes).to(device).eval()
    phones = torch.randint(5, sizes.vocabulary, (1, _PHONES)).expand(batch, -1).to(device)
    policy = Policy(min_frames=frames[-1] + 1, max_frames=frames[-1] + 1)
    text = (phones, torch.full((batch,), _PHONES, device=device), range(batch))
    rounds, states = [], []
    with torch.inference_mode():
        for last in (8, *[frames[-1]] * settings["rounds"]):  # the first, short one warms up
            before, seen, states = _reset_peak(device), [], []
            progress = begin(model, *text)
            _wait(device)
            start = clock()
            for step in range(1, last + 1):
                progress, _ = advance(model, progress, policy)
                if step in frames:
                    _wait(device)
                    seen.append(clock() - start)
                    states.append(sum(part.numel() * part.element_size() for part in tensors(progress.state)))
            peak = _peak(device)
            rounds.append(seen)
    used = None if before is None or peak is None else max(0, peak - before)
    fastest = min(rounds[1:], key=lambda seen: seen[-1])
    machine = {"elapsed": fastest, "rounds": rounds[1:], "peak_bytes": used}
    return {"parameters": parameters(model), "state_bytes": states}, machine


def tensors(nested: Any) -> Iterator[torch.Tensor]:
    """All tensors of nested tuples."""
    import torch

    if isinstance(nested, torch.Tensor):
        yield nested
    elif nested is not None:
        for part in nested:
            yield from tensors(part)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Forgets the largest memory so far; bytes in use now, None where the system does not say."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    """Bytes of a line of Linux's account of this process."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            found = [line.split() for line in file if line.startswith(f"{name}:")]
    except OSError:
        return None
    return 1024 * int(found[0][1]) if found else None
