"""The service in the foreground of a terminal, until Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from infra import cluster
from pipeline.service import tenants
from pipeline.service.config import LARGEST_UPLOAD, PROXY_CALLBACK, SHARED, ServeConfig
from pipeline.synthesis import read_model

if TYPE_CHECKING:
    from ray.serve import Application


class ServiceError(RuntimeError):
    """The service did not come up."""


def run(config: ServeConfig) -> int:
    """Serves until it is interrupted or terminated; returns the exit code.

    Raises:
        ServiceError, ConfigError, ModelError, CodecError, ClusterError: why it cannot be.
    """
    _check(config)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    os.environ.update(PROXY_CALLBACK | {LARGEST_UPLOAD: str(config.upload_bytes)})
    with cluster.connect() as connection, _serving(config, own_ray=connection.own_folder is not None):
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"serve     http://{host}:{config.port}  (page: /, interface: /docs)")
        if config.tokens is None:
            print("tokens    none: whoever asks on this machine is served, nobody else (see --tokens)")
        tenant = config.tenant if config.tokens is None else "TENANT"
        print(f"voices    {config.voices}/{tenant} and {config.voices}/{SHARED}", flush=True)
        stopped.wait()
        print("serve     stopping", flush=True)
    return 0


def _check(config: ServeConfig) -> None:
    """What can be known before anything is started."""
    from pipeline.service.engine import codec_for

    tenants.read(config)
    codec_for(config, read_model(config.model))
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            what = f"{config.host}:{config.port} cannot be had ({error.strerror}): choose another --port"
            raise ServiceError(what) from None


@contextlib.contextmanager
def _serving(config: ServeConfig, own_ray: bool) -> Iterator[None]:
    """The applications. In a cluster whose Serve runs already, these are started and deleted, and nothing else."""
    from ray import serve

    from pipeline.service import app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    builders: dict[str, Callable[[], Application]] = {app.NAME: lambda: app.build(config.service())}
    if config.enrollment:
        builders = {"enrollment": lambda: _enrollment(config), **builders}
    running = {} if own_ray else serve.status().applications
    if taken := [name for name in builders if name in running]:
        raise ServiceError(f"the cluster runs an application {taken[0]!r} already: `serve status` shows it")
    serve.start(http_options={"host": config.host, "port": config.port}, logging_config={"log_level": "WARNING"})
    try:
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
        if running:
            for name in builders:
                serve.delete(name)
        else:
            serve.shutdown()


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
