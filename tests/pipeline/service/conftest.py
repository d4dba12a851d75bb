"""One running service for the tests of a module: a model with random weights, three tenants, the enrollment stage."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.service.config import LARGEST_UPLOAD, PROXY_CALLBACK
from tests.pipeline.speaking_model import write_speaker, write_voice

SETTINGS: dict[str, Any] = {
    "dtype": "float64",
    "rows": 3,
    "waiting": 2,
    "retries": 1,
    "upload_mb": 1.5,
    "most_samples": 5,
    "longest_sample_s": 20.0,
    "least_seconds": 2.0,
    "most_seconds": 10.0,
    "most_enrolling": 1,
    "requests_per_minute": 100_000,
}


@dataclass(frozen=True)
class Running:
    """A service, and how a tenant asks it."""

    url: str
    folder: Path
    model: str
    codec: str

    def ask(self, method: str, path: str, token: str | None = "token-a", **more: Any) -> requests.Response:
        headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **more.pop("headers", {})}
        return requests.request(method, self.url + path, headers=headers, timeout=120, **more)

    def say(self, text: str = "The boat sailed past.", token: str = "token-a", stream: bool = False, **fields: Any):
        """Asks for speech; `stream` here is whether this side waits for all of it."""
        body = {"model": "lina", "input": text, "voice": "ann", "response_format": "wav"} | fields
        return self.ask("POST", "/v1/audio/speech", token, json=body, stream=stream)

    def health(self) -> dict[str, Any]:
        return self.ask("GET", "/healthz", None).json()


@pytest.fixture(scope="module")
def bounded_proxy() -> Iterator[None]:
    """For a Ray that is started after it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (PROXY_CALLBACK | {LARGEST_UPLOAD: "1500000"}).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def service(tmp_path_factory, bounded_proxy, local_ray) -> Iterator[Running]:
    from ray import serve

    from pipeline.enroll_config import StageConfig
    from pipeline.enrollment_stage import build
    from pipeline.service.app import app

    folder = tmp_path_factory.mktemp("service")
    model, codec = write_speaker(folder, ends=0.0)
    for voice in ("a/ann", "b/bert", "shared/sam", "shared/LJ%20Speech"):
        write_voice(folder / "voices" / f"{voice}.safetensors", model, seed=len(voice))
    (folder / "tokens.yaml").write_text(
        "tenants:\n"
        + "".join(f"  {name}: {{tokens: [{_digest(f'token-{name}')}]}}\n" for name in "ab")
        + f"  slow: {{tokens: [{_digest('token-slow')}], requests_per_minute: 2}}\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    stage = StageConfig(model=model, steps=4, slots=2, replica_cpus=0.25, max_replicas=1, eval_every=2)
    args = {"model": model, "codec": codec, "voices": str(folder / "voices"), "tokens": str(folder / "tokens.yaml")}
    enrollment = serve.RunTarget(build(stage), "enrollment", route_prefix=None)
    serve.run_many([enrollment, serve.RunTarget(app(args | SETTINGS), "speech")])
    try:
        yield Running(f"http://127.0.0.1:{port}", folder, model, codec)
    finally:
        serve.shutdown()


@pytest.fixture
def serve_log(caplog, monkeypatch):
    """`caplog` of Ray Serve's logger, whose level and parents depend on what ran and was imported before."""
    logger = logging.getLogger("ray.serve")
    caplog.set_level(logging.WARNING, logger.name)
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def chromium():
    """A browser on this machine, without a screen."""
    import shutil

    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: install the package chromium, or name one in $CHROMIUM")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    quiet += ["--autoplay-policy=no-user-gesture-required"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
