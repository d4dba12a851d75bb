"""The service in this process: its deployments without Ray Serve, the application behind a server on loopback."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests

from pipeline.enroll_config import StageConfig
from pipeline.enrollment_stage import EnrollmentStage, VoiceTuner
from pipeline.service.ingress import application
from pipeline.service.service import Service


class Handle:
    """Asks one replica as a handle of Ray Serve does; nothing is copied."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def options(self, **_: Any) -> Handle:
        return self

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._replica, name))


class _Method:
    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: Any) -> Any:
        answer = self._method(*args)
        return _Stream(answer) if inspect.isasyncgen(answer) else _Answer(asyncio.ensure_future(answer))


class _Answer:
    """Work that goes on when nobody waits for it any more, unless it is cancelled itself."""

    def __init__(self, task: asyncio.Future) -> None:
        self._task = task

    def __await__(self):
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        self._task.cancel()


class _Stream:
    def __init__(self, items: Any) -> None:
        self._items = items

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._items.aclose())


@contextmanager
def stage(model: str, **changes: Any) -> Iterator[Handle]:
    """An enrollment stage with one replica."""
    settings = {"model": model, "steps": 4, "slots": 2, "eval_every": 2, "device": "cpu"}
    config = StageConfig(**settings | changes)
    tuner = VoiceTuner(config)
    try:
        yield Handle(EnrollmentStage(config, Handle(tuner)))
    finally:
        tuner._batch.close()


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The address of a service's application."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(application(service), log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            while not server.started:
                time.sleep(0.01)
            requests.get(f"{url}/openapi.json", timeout=60).raise_for_status()
            yield url
        finally:
            server.should_exit = True
            thread.join()
