"""An actor between the driver of a training and its workers, which outlives these when they are started again."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Desk:
    """Whether to stop, what no restart would mend, what came out."""

    def __init__(self) -> None:
        self.asked, self.metrics = False, {}
        self.error: Exception | None = None
        """What the driver is to raise."""

    def ask(self) -> None:
        self.asked = True

    def was_asked(self) -> bool:
        return self.asked

    def give_up(self, error: Exception) -> None:
        self.error = self.error or error

    def given_up(self) -> Exception | None:
        return self.error

    def finish(self, metrics: dict[str, Any]) -> None:
        self.metrics = metrics

    def results(self) -> dict[str, Any]:
        return self.metrics


def opened() -> Any:
    """A handle of a new desk, on the driver's own node: any other may be lost and the training goes on."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Desk).remote()


def question(desk: Any) -> Callable[[], bool]:
    """Whether a stop was asked for, as a function that never waits: its answer is to what it asked some steps ago."""
    import ray

    waiting = []

    def asked_to_stop() -> bool:
        if not waiting:
            waiting.append(desk.was_asked.remote())
        ready, _ = ray.wait(waiting, timeout=0)
        if not ready:
            return False
        waiting.clear()
        return ray.get(ready[0])

    return asked_to_stop


@contextmanager
def on_term(job: str, ask: Callable[[], object]) -> Iterator[None]:
    """SIGTERM (what `ray job stop` and machines that go away send) calls `ask` and is told of in the name of `job`;
    outside the main thread, which alone can be told how to take signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def taken(number, frame) -> None:
        print(f"{job}: asked to stop; writing a checkpoint after this step", file=sys.stderr, flush=True)
        ask()

    before = signal.signal(signal.SIGTERM, taken)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
