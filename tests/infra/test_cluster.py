"""A cluster started, used and stopped for real, beside another one that must not notice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import psutil
import pytest

from infra import cluster

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listeners(processes: list[psutil.Process]) -> set[str]:
    """The addresses on which they wait for connections; IPv4 seen through an IPv6 socket is still IPv4."""
    sockets = [socket for process in processes for socket in process.net_connections("inet")]
    return {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets if socket.status == psutil.CONN_LISTEN}


def plain_shell() -> dict[str, str]:
    """The environment of somebody who has set nothing up for Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name == "RAY_TMPDIR"}


def small(folder: Path, port: int) -> cluster.Cluster:
    return cluster.start(folder, dashboard_port=port, num_cpus=1, object_store_memory=128 << 20)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """Somebody else's cluster on this machine."""
    folder = tmp_path_factory.mktemp("beside")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        yield small(folder, free_port())
        cluster.stop(folder)


def test_a_job_runs_as_typed_and_stop_ends_this_cluster_alone(
    beside: cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "hello.py").write_text(
        textwrap.dedent(
            f"""
            import json, os, sys
            sys.path[0] = {str(cluster.ROOT)!r}
            from infra.cluster import connect
            import ray

            with connect() as session:
                where = ray.get(ray.remote(lambda: os.getcwd()).remote())
                json.dump([os.getcwd(), where, session.cpus, session.own_folder, sys.executable], open("out.json", "w"))
            """
        )
    )
    started = small(tmp_path, free_port())
    try:
        assert small(tmp_path, free_port()) == started, "starting twice gives the cluster that runs"
        with pytest.raises(cluster.ClusterError, match=r"port \d+ of 127.0.0.1 cannot be had.*--dashboard-port"):
            cluster.start(tmp_path / "elsewhere", dashboard_port=int(started.dashboard.rsplit(":", 1)[1]))

        command = [RAY, "job", "submit", "--", "python", "hello.py"]
        job = subprocess.run(command, env=plain_shell(), capture_output=True, text=True, timeout=120)
        assert job.returncode == 0, job.stdout + job.stderr
        folder = str(tmp_path)
        assert json.loads((tmp_path / "out.json").read_text()) == [
            folder,
            folder,
            1.0,
            None,
            str(Path(RAY).with_name("python")),
        ]

        members = started.processes()
        assert len(members) >= 5 and started.pid in {process.pid for process in members}
        assert listeners(members) == {"127.0.0.1"}
    finally:
        cluster.stop(tmp_path)
    assert not psutil.wait_procs(members, timeout=10)[1], "every process of the cluster has ended"
    assert started.processes() == [] and not Path(started.temporary).exists()
    assert cluster.find(tmp_path) is None and cluster.stop(tmp_path) == 0
    assert [node["state"] for node in cluster.nodes(beside)] == ["ALIVE"], "the other cluster lives on"


def test_a_job_that_is_stopped_has_time_to_save(beside: cluster.Cluster) -> None:
    """Longer than the three seconds that Ray gives by itself."""
    folder = Path(beside.folder)
    (folder / "saves.py").write_text(
        textwrap.dedent(
            """
            import pathlib, signal, sys, time

            def save(number, frame):
                time.sleep(5)
                pathlib.Path("saved").touch()
                sys.exit(0)

            signal.signal(signal.SIGTERM, save)
            pathlib.Path("going").touch()
            time.sleep(120)
            """
        )
    )
    shell = plain_shell() | {"RAY_API_SERVER_ADDRESS": beside.dashboard}

    def typed(*words: str) -> None:
        done = subprocess.run([RAY, "job", *words], env=shell, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    typed("submit", "--no-wait", "--submission-id", "saves", "--", "python", "saves.py")
    for _ in range(600):
        if (folder / "going").exists():
            break
        sleep(0.1)
    typed("stop", "saves")
    assert (folder / "saved").exists()


def test_stop_clears_up_after_a_killed_head(beside: cluster.Cluster) -> None:
    os.kill(beside.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(beside.pid)], timeout=10)
    assert cluster.find(Path(beside.folder)) is None
    cluster.stop(Path(beside.folder))
    assert beside.processes() == [] and not Path(beside.temporary).exists()


def test_a_head_whose_dashboard_does_not_answer_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dashboard = f"http://127.0.0.1:{free_port()}"
    alone = cluster.Cluster("mark", 123, dashboard, "127.0.0.1:1", "/tmp/lina-ray-x", str(tmp_path))
    monkeypatch.setattr(cluster, "find", lambda folder: alone)
    monkeypatch.setattr(sys, "argv", ["cluster", "status", "--folder", str(tmp_path)])
    assert cluster.main() == 1
    assert f"lives (pid 123), but its dashboard {dashboard} does not answer" in capsys.readouterr().err


def test_token_mode_without_a_token_says_how_to_get_one(tmp_path: Path) -> None:
    # A process of its own: Ray reads the mode once, and a driver that wants tokens refuses what its own GCS says.
    words = ["start", "--folder", str(tmp_path), "--dashboard-port", str(free_port())]
    shell = plain_shell() | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "infra.cluster", *words]
    done = subprocess.run(command, cwd=cluster.ROOT, env=shell, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "get-auth-token --generate" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and cluster.find(tmp_path) is None


ALONE = f"""
import os, sys, time
sys.path[0] = {str(cluster.ROOT)!r}
from infra.cluster import connect
session = connect(num_cpus=2, object_store_memory=128 << 20)
import ray

@ray.remote
def folder():
    import infra
    return infra.__path__[0]

with connect() as again:  # Who is connected stays so.
    assert again.cpus == session.cpus and again.own_folder is None
print(session.cpus, ray.get(folder.remote()), session.own_folder, flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_ray_of_ones_own_stays_on_loopback_and_goes_with_its_process(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    command = [sys.executable, str(script), "60"]
    alone = subprocess.Popen(command, cwd=tmp_path, env=plain_shell(), stdout=subprocess.PIPE, text=True)
    assert alone.stdout is not None
    cpus, infra, folder = alone.stdout.readline().split()
    assert (float(cpus), infra) == (2.0, str(cluster.ROOT / "infra"))
    members = psutil.Process(alone.pid).children(recursive=True)
    assert len(members) >= 3 and listeners(members) == {"127.0.0.1"}

    alone.kill()
    alone.wait()
    # Ray's own agents outlive it by a minute: whoever comes next removes what is left.
    command = [sys.executable, str(script), "0"]
    after = subprocess.run(command, cwd=tmp_path, env=plain_shell(), check=True, capture_output=True, text=True)
    assert not psutil.wait_procs(members, timeout=5)[1] and not Path(folder).exists()
    assert not Path(after.stdout.split()[2]).exists(), "and nothing is left by one that ends well"


def test_status_of_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "infra.cluster", "status", "--folder", str(tmp_path)]
    status = subprocess.run(command, cwd=cluster.ROOT, capture_output=True, text=True)
    assert status.returncode == 3 and "make cluster" in status.stdout


def test_an_address_where_nobody_answers_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(cluster.ClusterError, match=r"nothing answers at RAY_ADDRESS=.*unset the variable"):
        cluster.connect()
