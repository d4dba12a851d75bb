"""A copy of the project with a cluster of its own, in which commands are typed as a user types them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra import cluster
from tests.corpora import write_codec, write_corpus

RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, project):
    """A copy of the code, so that what a job writes into its folder lands outside the real one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("infra", "jobs", "model", "pipeline"):
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_corpus(folder / "corpus", 80)
    write_codec(folder / "codec")
    return folder


@pytest.fixture(scope="module")
def submit(checkout):
    """Types `ray job submit …` in the checkout whose cluster runs."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = cluster.start(checkout, dashboard_port=port, num_cpus=2, object_store_memory=200 << 20)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    environment |= {"RAY_API_SERVER_ADDRESS": running.dashboard, "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}"}

    def typed(*words, ray=("job", "submit")):
        command = [RAY, *ray, *words]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=240)

    yield typed
    cluster.stop(checkout, patience=2.0)  # its jobs are done: there is nothing to save
