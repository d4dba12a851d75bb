"""What is answered without a model: the documentation, who asks, and what is told of requests that went badly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import requests

from pipeline.service import guesses
from pipeline.service.app import resolved
from pipeline.service.config import ServiceConfig
from pipeline.service.engine import Begun, SpeechRequest
from pipeline.service.guesses import A_MINUTE, Guesses
from pipeline.service.service import Service, _lost
from tests.pipeline.service.in_process import Handle, serving
from tests.pipeline.service.test_service import error_of


def test_the_documentation_is_there_without_any_foreign_host():
    with serving(Service(ServiceConfig(), None, None)) as url:
        answer = requests.get(f"{url}/docs", timeout=60)
        page, paths = answer.text, requests.get(f"{url}/openapi.json", timeout=60).json()["paths"]
        linked = [requests.get(url + path, timeout=60) for path in re.findall(r'(?:href|src)="([^"]*)"', page)]
        for path in ("/redoc", "/docs/oauth2-redirect"):
            error_of(requests.get(url + path, timeout=60), 404, "not_found")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert len(linked) == 4 and all(one.ok for one in linked)
    for text in (page, *(one.text for one in linked)):
        assert not [host for host in re.findall(r"//([\w.-]+)", text) if host != "www.w3.org"]  # the namespace of SVG
    for path, methods in paths.items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
    assert "<code>voice</code></th><td>string or {id: string}, &quot;default&quot; where it is left out</td>" in page
    assert "<code>samples</code></th><td>any number of: file, needed</td>" in page
    assert "As listed by GET /v1/voices; `default` is the model&#x27;s own" in page


class Faulty:
    """An engine that says what nobody understands, and knows it."""

    async def speak(self, request: SpeechRequest) -> AsyncIterator[Any]:
        yield Begun(24_000, "m" * 64, "", "")
        yield np.zeros(2400, np.float32)
        faults = ["loop", "unfinished"] if request.seed else []
        yield {"pieces": 1, "attempts": 3, "faults": faults, "coverage": 0.4321}

    async def facts(self) -> dict[str, Any]:
        return {"requests": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_faults_of_what_was_said_are_logged_and_counted(serve_log, stream):
    with serving(Service(ServiceConfig(), Handle(Faulty()), None)) as url:
        for seed in (0, 7, 8):
            body = {"model": "lina", "input": "A secret.", "response_format": "wav", "seed": seed, "stream": stream}
            assert requests.post(f"{url}/v1/audio/speech", json=body, timeout=60).ok
        health = requests.get(f"{url}/healthz", timeout=60).json()
    assert (health["said"], health["faulty"]) == (3, 2)
    told = [record.getMessage() for record in serve_log.records if record.name == "ray.serve"]
    assert told == ["speech of voice default has faults: loop, unfinished; coverage 0.4321"] * 2


def test_an_engine_is_lost_whatever_killed_it():
    from ray import exceptions

    for gone in ("NodeDiedError", "OutOfMemoryError"):
        assert _lost(getattr(exceptions, gone)("killed")), gone
    assert _lost(exceptions.ActorDiedError()) and _lost(exceptions.WorkerCrashedError())
    assert not _lost(exceptions.GetTimeoutError("slow")) and not _lost(MemoryError())


def test_tokens_cannot_be_tried_out_at_full_speed(tmp_path):
    digest = hashlib.sha256(b"right").hexdigest()
    (tmp_path / "tokens.yaml").write_text(f"tenants: {{a: {{tokens: [{digest}]}}}}")

    def asked(token: str | None) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.get(f"{url}/v1/models", headers=headers, timeout=60)

    with serving(Service(ServiceConfig(tokens=str(tmp_path / "tokens.yaml")), None, None)) as url:
        for token in (None, "old") * A_MINUTE:  # neither is a guess
            error_of(asked(token), 401, "invalid_api_key")
        assert asked("right").ok
        statuses = [asked(f"guess {number}").status_code for number in range(2 * A_MINUTE)]
        assert statuses[: A_MINUTE - 1] == [401] * (A_MINUTE - 1) and statuses[-1] == 429
        refused = asked("right")
        assert "unknown tokens came from 127.0.0.1" in error_of(refused, 429, "too_many_unknown_tokens")
        assert int(refused.headers["retry-after"]) >= 1
        error_of(asked(None), 401, "invalid_api_key")


def test_guesses_are_forgiven_steadily_and_counted_by_address(monkeypatch):
    now = 0.0
    noted = Guesses(lambda: now)
    for number in range(A_MINUTE):
        assert noted.wait("2001:db8::1") == 0
        noted.note(f"2001:db8::{number:x}", str(number))
    assert noted.wait("2001:db8::ffff") == pytest.approx(60 / A_MINUTE)
    assert noted.wait("2001:db8:0:1::1") == noted.wait("192.0.2.1") == 0
    now = 60 / A_MINUTE
    assert noted.wait("2001:db8::1") == 0
    noted.note("2001:db8::1", "x")
    assert noted.wait("2001:db8::1") == pytest.approx(60 / A_MINUTE)
    monkeypatch.setattr(guesses, "_MOST", 3)
    for number in range(9):
        noted.note(f"::ffff:192.0.2.{number}", "x")
    assert len(noted._seen) <= 3 and "192.0.2.8" in noted._seen


def test_paths_mean_the_same_wherever_ray_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {name: f"some/{name}" for name in ("model", "voices", "tokens", "codec")}
    found = resolved(ServiceConfig(**paths))
    assert {name: getattr(found, name) for name in paths} == {
        name: str(tmp_path / path) for name, path in paths.items()
    }
    assert found.codec_weights is None
    found = resolved(ServiceConfig(codec="encodec_24khz", codec_weights="encodec.th"))
    assert (found.codec, found.codec_weights) == ("encodec_24khz", str(tmp_path / "encodec.th"))
    found = resolved(ServiceConfig(codec="demo", voices="s3://voices"))
    assert (found.codec, found.voices, found.tokens) == ("demo", "s3://voices", None)
    assert resolved(ServiceConfig()).codec is None
