"""The service in the foreground of a terminal, until Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from infra import cluster
from pipeline import serve_instance
from pipeline.service import tenants
from pipeline.service.config import LARGEST_UPLOAD, PROXY_CALLBACK, SHARED, ServeConfig
from pipeline.synthesis import read_model

if TYPE_CHECKING:
    from ray.serve import Application


class ServiceError(RuntimeError):
    """The service did not come up."""


def run(config: ServeConfig) -> int:
    """Serves until it is interrupted or terminated, also while it starts; returns the exit code.

    Raises:
        ServiceError, ConfigError, ModelError, CodecError, ClusterError: why it cannot be.
    """
    try:
        _check(config)
        os.environ.update(PROXY_CALLBACK | {LARGEST_UPLOAD: str(config.upload_bytes)})
        with cluster.connect():
            # Ray's own handler would make an exit code of the signal's number
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with _serving(config):
                _tell_and_wait(config)
    except KeyboardInterrupt:
        print("serve     stopped before it had started", flush=True)
    return 0


def _tell_and_wait(config: ServeConfig) -> None:
    """Says what is served where, until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"serve     http://{host}:{config.port}  (page: /, interface: /docs)")
    if config.tokens is None:
        print("tokens    none: whoever asks on this machine is served, nobody else (see --tokens)")
    tenant = config.tenant if config.tokens is None else "TENANT"
    print(f"voices    {config.voices}/{tenant} and {config.voices}/{SHARED}", flush=True)
    stopped.wait()
    print("serve     stopping", flush=True)


def _check(config: ServeConfig) -> None:
    """What can be known before anything is started."""
    from pipeline.service.engine import codec_for

    tenants.read(config)
    codec_for(config, read_model(config.model))
    if not os.environ.get("RAY_ADDRESS"):
        _check_free(config)


def _check_running(config: ServeConfig, names: Collection[str]) -> None:
    """Raises ServiceError where the Serve of this cluster has other ideas; its address cannot be changed."""
    from ray import serve

    if taken := [name for name in names if name in serve.status().applications]:
        raise ServiceError(f"the cluster runs an application {taken[0]!r} already: `serve status` shows it")
    at = serve_instance.listening()
    if at is None:
        raise ServiceError(
            "Serve runs on this cluster already and takes no HTTP requests, as an enrollment job starts it: wait for "
            "its end, or end it with `serve shutdown`"
        )
    if (at.host, at.port) != (config.host, config.port):
        raise ServiceError(
            f"Serve runs on this cluster already and listens at {at.host}:{at.port}, which cannot be changed: ask for "
            f"that with --host {at.host} --port {at.port}, or end it with `serve shutdown`"
        )


def _check_free(config: ServeConfig) -> None:
    """Raises ServiceError where nobody can listen at the address."""
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            what = f"{config.host}:{config.port} cannot be had ({error.strerror}): choose another --port"
            raise ServiceError(what) from None


@contextlib.contextmanager
def _serving(config: ServeConfig) -> Iterator[None]:
    """The applications. In a cluster whose Serve runs already, these are started and deleted, and nothing else."""
    from ray import serve

    from pipeline.service import app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    builders: dict[str, Callable[[], Application]] = {app.NAME: lambda: app.build(config.service())}
    if config.enrollment:
        builders = {"enrollment": lambda: _enrollment(config), **builders}
    there = serve_instance.runs()
    if there:
        _check_running(config, builders)
    else:
        _check_free(config)
    try:
        if not there:
            at = {"host": config.host, "port": config.port}
            serve.start(http_options=at, logging_config={"log_level": "WARNING"})
        try:
            targets = [
                serve.RunTarget(build(), name, route_prefix="/" if name == app.NAME else None)
                for name, build in builders.items()
            ]
            serve.run_many(targets)
        except RuntimeError as error:
            raise ServiceError(f"the service did not start: {error}") from None
        yield
    finally:
        if serve_instance.runs():
            serve_instance.end(builders, started=not there)


def _enrollment(config: ServeConfig) -> Application:
    """The enrollment stage, sharing the machine with speech."""
    from pipeline.enroll_config import StageConfig
    from pipeline.enrollment_stage import build

    return build(
        StageConfig(
            model=config.model,
            device=config.device,
            steps=config.enroll_steps,
            slots=config.enroll_slots,
            threads=config.threads,
            replica_cpus=0.25,
            max_replicas=1,
            timeout=config.enroll_timeout_s,
            queue=64,
        )
    )
