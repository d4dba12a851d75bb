"""An actor between the driver of a training and its workers, which outlives these when they are started again."""

from __future__ import annotations

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
