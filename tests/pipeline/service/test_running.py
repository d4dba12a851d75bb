"""The service on a cluster whose Serve others use, too: its address is true, and nothing of theirs is ended."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest
import requests

from pipeline import serve_instance
from pipeline.service.config import ServeConfig
from pipeline.service.running import ServiceError, _serving
from tests.pipeline.speaking_model import write_speaker


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_theirs(name: str = "theirs") -> None:
    from ray import serve

    class Theirs:
        def __call__(self) -> str:
            return "theirs"

    deployment = serve.deployment(Theirs).options(ray_actor_options={"num_cpus": 0})
    serve.run(deployment.bind(), name=name, route_prefix=f"/{name}")


def applications() -> set[str]:
    from ray import serve

    return set(serve.status().applications)


@pytest.fixture
def config(tmp_path, local_ray):
    from ray import serve

    model, codec = write_speaker(tmp_path, ends=1.5)
    more = {"model": model, "codec": codec, "voices": str(tmp_path / "voices"), "enrollment": False}
    yield ServeConfig(port=free_port(), **more)
    serve.shutdown()


def test_a_serve_that_runs_keeps_its_address_and_goes_on(config):
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    there = serve_instance.listening()
    elsewhere = f"listens at 127.0.0.1:{there.port}, .*--host 127.0.0.1 --port {there.port}"
    with pytest.raises(ServiceError, match=elsewhere), _serving(config):
        pass
    with _serving(ServeConfig(**vars(config) | {"port": there.port})):
        assert requests.get(f"http://127.0.0.1:{there.port}/healthz", timeout=60).ok
    assert serve_instance.runs() and not applications()  # whoever started it has not deployed anything yet


def test_a_serve_without_http_is_refused(config):
    from ray import serve

    serve.start(proxy_location="Disabled")
    with pytest.raises(ServiceError, match="takes no HTTP requests"), _serving(config):
        pass
    assert serve_instance.runs()


def test_what_was_started_is_ended_unless_others_have_come_to_use_it(config):
    with _serving(config):
        start_theirs()
    assert applications() == {"theirs"}
    serve_instance.end(["theirs"], started=True)
    assert not serve_instance.runs()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", config.port))
        taken.listen()
        with pytest.raises(ServiceError, match="choose another --port"), _serving(config):
            pass
    assert not serve_instance.runs()


def test_a_job_that_enrolls_leaves_what_others_have_started_meanwhile(config):
    from pipeline.enroll_config import StageConfig
    from pipeline.enrollment_app import stage

    enrolling = StageConfig(model=config.model, device="cpu", replica_cpus=0.25, max_replicas=1, owner="job")
    with stage(enrolling, {}):
        start_theirs()
        assert applications() == {"enrollment", "theirs"}
    assert applications() == {"theirs"}
