"""What Ray raises where a worker is gone, whatever it was that it worked on."""

from __future__ import annotations


def lost_worker() -> tuple[type[Exception], ...]:
    """For `except` and `isinstance`; a function, for ray takes seconds to import."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    # One that the memory monitor killed is no RayActorError, even if it was an actor.
    return RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError
