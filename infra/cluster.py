"""Ray on one machine: a cluster to submit jobs to, or Ray for one process alone. Nothing listens beyond loopback.

    python -m infra.cluster start|status|stop      # what `make cluster` and `make cluster-stop` run

`start` runs a Ray head in the project's folder, so that `ray job submit -- python jobs/tokenize.py` finds its files
without being told where they are. `stop` ends the processes of that cluster and no others: each inherits a mark in its
environment or writes into the cluster's folder, whereas `ray stop` would end whatever Ray runs on the machine. Whoever
may log in to this machine can submit jobs in your name, unless RAY_AUTH_MODE=token is exported where you start and
submit.

Jobs call `connect()`. Within a submitted job it joins the job's cluster; anywhere else it starts Ray for this process
alone, with all CPUs and GPUs of the machine, and takes it away at exit.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
_MARK = "LINA_RAY_CLUSTER"
_LOOPBACK = "127.0.0.1"
_SAME_LOOPBACK = "[::ffff:127.0.0.1]"
_GIB = 1 << 30


KEEP_WORKERS = {"RAY_idle_worker_killing_time_threshold_ms": "300000"}
"""For the environment of whatever starts Ray. By default Ray ends workers beyond one a CPU that were idle for a second,
and starts new ones for the next tasks. Where tasks reserve less than a CPU, as ours that decode and phonemise do, that
took a third of the machine: every new process imports its libraries and loads its dictionary again."""


STOP_PATIENTLY = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
"""For the environment of whatever starts Ray: seconds between a job's SIGTERM and its SIGKILL. By default it is three,
and a training that is stopped writes a checkpoint first. The actor that runs the job's command reads it, so it counts
on the node where that runs: the head, unless a job asks for another."""


class ClusterError(RuntimeError):
    """The cluster cannot be started, found or stopped: says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster that `start` made, as it is noted in `<folder>/.cache/cluster.json`."""

    mark: str
    pid: int
    dashboard: str
    address: str
    """host:port of the head, for RAY_ADDRESS and `ray.init`."""
    temporary: str
    """Ray's sessions, logs and spilled objects; removed by `stop`."""
    folder: str

    def processes(self) -> list[psutil.Process]:
        """Every living process of this cluster: the head, its workers, and the jobs that they run."""
        return _belonging(self.mark, self.temporary)


def start(
    folder: Path = ROOT,
    dashboard_port: int = 8265,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_memory: int | None = None,
) -> Cluster:
    """Starts a head in `folder` and waits until jobs can be submitted to it; gives back the one that runs already.

    Args:
        object_store_memory: Bytes of shared memory; default: a quarter of what is free, at most 8 GiB.

    Raises:
        ClusterError: the port is taken, or Ray did not come up (with the end of its log).
    """
    if running := find(folder):
        return running
    stop(folder)  # What a killed head left.
    _refuse_taken(dashboard_port)
    _token()
    temporary = tempfile.mkdtemp(prefix="lina-ray-", dir="/tmp")
    log, port, mark = Path(temporary, "head.log"), _free_port(), uuid.uuid4().hex
    arguments = {
        "port": port,
        "dashboard-host": _LOOPBACK,
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": _free_port(),
        "ray-client-server-port": _free_port(),
        "object-store-memory": object_store_memory or _object_store_memory(),
        "temp-dir": temporary,
        "num-cpus": num_cpus,
        "num-gpus": num_gpus,
    }
    head = _started_head(arguments, folder, mark, log)
    cluster = Cluster(
        mark=mark,
        pid=head.pid,
        dashboard=f"http://{_LOOPBACK}:{dashboard_port}",
        address=f"{_LOOPBACK}:{port}",
        temporary=temporary,
        folder=str(folder),
    )
    try:
        _note(folder).parent.mkdir(exist_ok=True)
        _note(folder).write_text(json.dumps(dataclasses.asdict(cluster), indent=1))
        _wait_until_up(cluster, head, log)
    except BaseException:
        stop(folder, keep_logs=True)
        raise
    _become_current(cluster)
    return cluster


def _started_head(arguments: dict[str, Any], folder: Path, mark: str, log: Path) -> subprocess.Popen[bytes]:
    """`ray start --head` in `folder`, in a session of its own; arguments that are None are left to Ray."""
    options = [f"--{name}={value}" for name, value in arguments.items() if value is not None]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options],
            cwd=folder,
            env=_head_environment(mark),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def find(folder: Path = ROOT) -> Cluster | None:
    """The cluster that was started in `folder`, if its head is alive."""
    try:
        cluster = Cluster(**json.loads(_note(folder).read_text()))
        alive = _environment(psutil.Process(cluster.pid)).get(_MARK) == cluster.mark
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return cluster if alive else None


def stop(folder: Path = ROOT, patience: float = 15.0, keep_logs: bool = False) -> int:
    """Ends the cluster that was started in `folder`, and what a killed head left of it; returns how many processes.

    Args:
        patience: Seconds given to them to end by themselves before they are killed.
    """
    try:
        cluster = Cluster(**json.loads(_note(folder).read_text()))
    except (OSError, ValueError, TypeError):
        return 0
    members = cluster.processes()
    # The head takes its own processes down in their order; jobs, and whoever is left, are ended after it.
    _end([process for process in members if process.pid == cluster.pid], patience)
    _end(cluster.processes(), patience)
    _resign(cluster)
    if not keep_logs:
        shutil.rmtree(cluster.temporary, ignore_errors=True)
    _note(folder).unlink(missing_ok=True)
    return len(members)


def nodes(cluster: Cluster) -> list[dict[str, Any]]:
    """The summaries of the cluster's nodes as its dashboard tells them."""
    answer = json.loads(_get(f"{cluster.dashboard}/api/v0/nodes?detail=1"))
    return answer["data"]["result"]["result"]


class Connection:
    """Ray as this process sees it. Leaving the `with` block, or the process, takes away a Ray that was its own."""

    def __init__(self, own_folder: str | None, lasting: bool = False) -> None:
        import ray

        self.own_folder = own_folder
        """Where a Ray of this process's own keeps its files; None in a cluster."""
        self.lasting = lasting
        """Whether somebody else in this process connected, and will disconnect."""
        self.cpus: float = ray.cluster_resources().get("CPU", 0.0)
        atexit.register(self.close)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        import ray

        atexit.unregister(self.close)
        if self.lasting:
            return
        ray.shutdown()
        if self.own_folder:
            shutil.rmtree(self.own_folder, ignore_errors=True)


def connect(num_cpus: int | None = None, object_store_memory: int | None = None) -> Connection:
    """Joins the cluster of the job that this process is, or starts Ray on this machine for this process alone.

    Args:
        num_cpus: How many tasks of one CPU may run at once on a Ray of our own; default: those of this
            machine. A cluster has as many as it has.
        object_store_memory: Bytes of shared memory for a Ray of our own; default: a quarter of what is free, at most
            8 GiB.

    Raises:
        ClusterError: nothing answers at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address or address.startswith((_LOOPBACK, _SAME_LOOPBACK, "localhost")):
        _stay_on_loopback()
    import logging

    import ray

    if ray.is_initialized():
        return Connection(None, lasting=True)
    if address:
        _refuse_silent(address)
        ray.init(logging_level=logging.WARNING)
        return Connection(None)
    _sweep()
    folder = _own_folder()
    os.environ.update(KEEP_WORKERS | {_MARK: folder})
    # The workers import this project wherever the caller stands.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=object_store_memory or _object_store_memory(),
        include_dashboard=False,
        logging_level=logging.WARNING,
        _temp_dir=folder,
    )
    return Connection(folder)


def is_own() -> bool:
    """Whether `connect` started Ray for this process alone: nothing outlives it there, and it has no dashboard."""
    return _MARK in os.environ and not os.environ.get("RAY_ADDRESS")


def _stay_on_loopback() -> None:
    """Keeps Ray on 127.0.0.1, without a token file in HOME and without reports; must precede `ray.init`."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if constants := sys.modules.get("ray._private.ray_constants"):
        constants.ENABLE_RAY_CLUSTER = False  # Ray reads the variable once, when it is imported.


def _head_environment(mark: str) -> dict[str, str]:
    own_bin = str(Path(sys.executable).parent)
    return {
        **STOP_PATIENTLY,
        **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")},
        **KEEP_WORKERS,
        _MARK: mark,
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
        # On Linux, too, this is what makes every part of Ray listen on 127.0.0.1 alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # The `python` of a job's command line is this one, whether or not its caller activated the environment.
        "PATH": os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)]),
    }


def _object_store_memory() -> int:
    return max(_GIB // 8, min(8 * _GIB, psutil.virtual_memory().available // 4))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return probe.getsockname()[1]


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError as error:
            raise ClusterError(
                f"port {port} of {_LOOPBACK} cannot be had ({error.strerror}), perhaps because another Ray cluster has "
                "its dashboard there: stop what listens there, or choose another with --dashboard-port and export "
                f"RAY_API_SERVER_ADDRESS=http://{_LOOPBACK}:PORT where you type `ray job submit`"
            ) from None


def _refuse_silent(address: str) -> None:
    """Ray itself would wait for minutes before it said so."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at RAY_ADDRESS={address} ({error}): start that cluster, or unset the variable to use "
            "this machine alone"
        ) from None


def _wait_until_up(cluster: Cluster, head: subprocess.Popen[bytes], log: Path, patience: float = 120.0) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and head.poll() is None:
        try:
            _get(f"{cluster.dashboard}/api/jobs/")
            if any(node["state"] == "ALIVE" for node in nodes(cluster)):
                return
        except (urllib.error.URLError, OSError):
            pass  # Nothing listens there yet.
        time.sleep(0.3)
    what = f"ended with code {head.returncode}" if head.poll() is not None else f"did not answer for {patience:.0f} s"
    end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ClusterError(f"the Ray head {what}; its logs are in {cluster.temporary}; the end of {log}:\n{end}")


def _get(url: str) -> bytes:
    request = urllib.request.Request(url, headers=_token())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
        return answer.read()


def _token() -> dict[str, str]:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return {}
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError

    try:
        return get_auth_headers_if_auth_enabled({})
    except AuthenticationError as error:
        raise ClusterError(str(error)) from None


def _belonging(mark: str, folder: str) -> list[psutil.Process]:
    """Processes with `mark` in their environment, or, as some of Ray's overwrite theirs, with logs open in `folder`."""

    def belongs(process: psutil.Process) -> bool:
        if _environment(process).get(_MARK) == mark:
            return True
        with contextlib.suppress(psutil.Error, OSError):
            return any(file.path.startswith(f"{folder}/session_") for file in process.open_files())
        return False

    return [process for process in psutil.process_iter() if process.pid != os.getpid() and belongs(process)]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _end(processes: list[psutil.Process], patience: float) -> None:
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                ask(process)
        _, processes = psutil.wait_procs(processes, timeout=patience)


def _note(folder: Path) -> Path:
    return Path(folder, ".cache", "cluster.json")


def _current() -> Path:
    """The file in which Ray's own commands look for the cluster that they are meant for."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")


def _become_current(cluster: Cluster) -> None:
    """Lets `ray job submit` find this cluster, unless the one that it finds now is alive."""
    try:
        host, _, port = _current().read_text().strip().rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return
    except (OSError, ValueError):
        _current().parent.mkdir(parents=True, exist_ok=True)
        # Ray's commands turn a literal 127.0.0.1 into the machine's outer address, where nobody listens.
        _current().write_text(cluster.address.replace(_LOOPBACK, _SAME_LOOPBACK))


def _resign(cluster: Cluster) -> None:
    if _current().is_file() and _current().read_text().strip() == cluster.address.replace(_LOOPBACK, _SAME_LOOPBACK):
        _current().unlink()


def _own_folder() -> str:
    """A new folder for Ray's files, locked as long as this process lives."""
    folder = tempfile.mkdtemp(prefix="lina-ray-own-", dir="/tmp")
    lock = os.open(Path(folder, "lock"), os.O_CREAT | os.O_RDWR)  # Closed by the end of the process, however it ends.
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder


def _sweep() -> None:
    """Removes what processes left that were killed while they had a Ray of their own."""
    for folder in Path("/tmp").glob("lina-ray-own-*"):
        with contextlib.suppress(OSError), open(folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end(_belonging(str(folder), str(folder)), patience=3)
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.cluster", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("start", "status", "stop"))
    parser.add_argument("--folder", type=Path, default=ROOT, help="where jobs run (default: the project's root)")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="default: %(default)s, as `ray job` expects")
    parser.add_argument("--num-cpus", type=int, help="default: all of this machine")
    parser.add_argument("--num-gpus", type=int, help="default: all of this machine")
    parser.add_argument(
        "--object-store-memory", type=int, metavar="BYTES", help="default: 1/4 of free memory, <= 8 GiB"
    )
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.command == "stop":
        ended = stop(folder)
        print(f"stopped the cluster of {folder} ({ended} processes)" if ended else f"no cluster runs in {folder}")
        return 0
    try:
        if options.command == "start":
            start(folder, options.dashboard_port, options.num_cpus, options.num_gpus, options.object_store_memory)
        return _print_status(folder)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _print_status(folder: Path) -> int:
    """Raises ClusterError where the head lives and its dashboard does not answer."""
    cluster = find(folder)
    if cluster is None:
        print(f"no cluster runs in {folder}; `make cluster` starts one")
        return 3
    try:
        found = nodes(cluster)
    except OSError as error:
        raise ClusterError(
            f"the head of {folder} lives (pid {cluster.pid}), but its dashboard {cluster.dashboard} does not answer "
            f"({error}): see {cluster.temporary}, or end it with `make cluster-stop`"
        ) from None
    for node in found:
        has = {"CPU": 0.0, "GPU": 0.0, "memory": 0.0, "object_store_memory": 0.0, **node["resources_total"]}
        memory, objects = has["memory"] / _GIB, has["object_store_memory"] / _GIB
        print(f"node {node['node_ip']} {node['state'].lower()}: {has['CPU']:g} CPUs, {has['GPU']:g} GPUs, ", end="")
        print(f"{memory:.1f} GiB memory, {objects:.1f} GiB for objects")
    print(f"dashboard {cluster.dashboard}   address {cluster.address}   head pid {cluster.pid}   folder {folder}")
    print("submit with:  ray job submit -- python jobs/tokenize.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
