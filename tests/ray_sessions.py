"""Several Rays in one process, one after another, without one's leftovers reaching into the next."""

from __future__ import annotations

import gc


def end() -> None:
    """Disconnects from Ray and disarms what is left of it.

    Ray numbers actors anew in each session, so two sessions of a process use the same ids, and a handle of an ended
    session that Python collects later takes the next session's actor with that id away: it dies with "all references
    to the actor were removed", often before it has started.
    """
    import ray
    from ray.actor import ActorHandle

    gc.collect()
    ray.shutdown()
    gc.collect()
    for kept in gc.get_objects():
        # Not isinstance: proxies among all of the process's objects may answer that by doing something
        if type(kept) is ActorHandle:
            kept._ray_weak_ref = True
