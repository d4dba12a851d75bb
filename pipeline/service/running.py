"""The service in the foreground of a terminal, until Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator

from infra import cluster
from model.codec_config import CodecError
from pipeline.service import tenants
from pipeline.service.config import ServeConfig
from pipeline.synthesis import read_model


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
    with cluster.connect(), _serving(config):
        where = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
        print(f"serve     {where}  (page: /, interface: /docs)", flush=True)
        if config.tokens is None:
            print(
                "tokens    none: only this machine is served, whoever asks there (--tokens FILE changes it)", flush=True
            )
        print(
            f"voices    {config.voices}/{config.tenant if config.tokens is None else 'TENANT'} and shared", flush=True
        )
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
            raise ServiceError(f"{config.host}:{config.port} cannot be had ({error.strerror}): choose another --port")


@contextlib.contextmanager
def _serving(config: ServeConfig) -> Iterator[None]:
    from ray import serve

    from pipeline.service import app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": config.host, "port": config.port}, logging_config={"log_level": "WARNING"})
    try:
        if config.enrollment:
            _start(lambda: _enrollment(config), "enrollment", None)
        _start(lambda: app.build(config.service()), app.NAME, "/")
        yield
    finally:
        serve.shutdown()


def _start(build, name: str, prefix: str | None) -> None:
    from ray import serve

    try:
        serve.run(build(), name=name, route_prefix=prefix)
    except (CodecError, RuntimeError) as error:
        raise ServiceError(f"application {name!r} did not start: {error}") from None


def _enrollment(config: ServeConfig):
    """The enrollment stage, sharing the machine with speech."""
    from pipeline.enroll_config import StageConfig
    from pipeline.enrollment_stage import build

    slots = {"slots": config.enroll_slots} if config.enroll_slots else {}
    return build(
        StageConfig(
            model=config.model,
            device=config.device,
            steps=config.enroll_steps,
            threads=config.threads,
            replica_cpus=0.25,
            max_replicas=1,
            timeout=config.enroll_timeout_s,
            queue=64,
            **slots,
        )
    )
