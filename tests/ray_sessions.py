"""Several Rays in one process, one after another, without one's leftovers reaching into the next."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from infra.cluster import KEEP_WORKERS


@contextmanager
def cluster_of(nodes: int) -> Iterator[None]:
    """Ray on this machine as a cluster of nodes of one CPU each; a lost one is noticed within seconds."""
    os.environ |= KEEP_WORKERS | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    import ray
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 4}
    # Ray writes the newest cluster's address there, and does not make the folder
    os.makedirs(os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray"), exist_ok=True)
    # Not in a test's own folder: the sockets' paths must stay under 108 bytes
    folder = tempfile.mkdtemp(prefix="lr-", dir="/tmp")
    node = {"num_cpus": 1, "object_store_memory": 150_000_000}
    head = node | {"include_dashboard": False, "temp_dir": folder, "_system_config": quick}
    # No autoscaler, and nobody whom workers' output would be brought to: these take seconds to start
    head |= {"no_monitor": True, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes - 1):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    end()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def end() -> None:
    """Disconnects from Ray and disarms what is left of it.

    Ray numbers actors anew in each session, so two sessions of a process use the same ids, and a handle of an ended
    session that Python collects later can take the next session's actor with that id away: it dies with "all references
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
