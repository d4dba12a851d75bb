"""The enrollment stage on Ray Serve: how many tuners there are for how many requests, and what one costs that fails."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import enrollment_stage
from pipeline.enroll_config import StageConfig
from tests.pipeline.speaking_model import write_speaker
from tests.pipeline.speech_samples import request_of


class Faulty(enrollment_stage.VoiceTuner):
    """Its first step fails in the first process, and so does every step of the speaker s3."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__(config)
        tuners, broken = self._batch._tuners, Path(config.owner)
        step = tuners.step

        def steps():
            first = not broken.exists()
            broken.touch()
            if first or any(id.startswith("r3") for id in tuners._tuners):
                raise MemoryError("CUDA out of memory")
            return step()

        tuners.step = steps


@contextmanager
def stage(folder: Path, **changes) -> Iterator[Any]:
    """A handle of a stage named `tested` with a small model."""
    from ray import serve

    settings = {"steps": 2, "eval_every": 2, "batch": 2, "device": "cpu"} | changes
    config = StageConfig(model=write_speaker(folder)[0], **settings)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    try:
        yield serve.run(enrollment_stage.build(config), name="tested", route_prefix=None)
    finally:
        serve.shutdown()


def tuners() -> int:
    from ray import serve

    states = serve.status().applications["tested"].deployments[enrollment_stage.TUNER].replica_states
    return states.get("RUNNING", 0)


def wait_until(holds: Callable[[], bool], seconds: float = 100.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not come"
        time.sleep(0.1)


def test_how_many_tuners_there_can_be_is_told(local_ray, tmp_path, capsys):
    model = write_speaker(tmp_path)[0]
    enrollment_stage.build(StageConfig(model=model, device="cpu"))
    (line,) = capsys.readouterr().out.splitlines()
    assert "at most 2 tuners" in line and "--max-replicas" in line
    enrollment_stage.build(StageConfig(model=model, device="cpu", max_replicas=2))
    assert not capsys.readouterr().out


def test_a_tuner_that_fails_costs_nobody_else_its_voice(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(enrollment_stage, "VoiceTuner", Faulty)
    with stage(tmp_path, owner=str(tmp_path / "broken"), max_replicas=1, slots=3) as handle:
        asked = [handle.enroll.remote(request_of(speaker)) for speaker in range(1, 5)]
        results = [answer.result(timeout_s=200) for answer in asked]
        attempts = handle.progress.remote("r1").result()["attempts"]
    assert ["voice" in result for result in results] == [True, True, False, True]
    error = results[2]["error"]
    assert error["reason"] == "lost" and "4 times" in error["detail"] and "Died" in error["detail"]
    assert attempts > 1


def test_tuners_come_with_a_queue_and_go_without(local_ray, tmp_path):
    scaling = {"max_replicas": 2, "slots": 2, "steps": 10, "upscale_delay": 1.0, "downscale_delay": 2.0}
    with stage(tmp_path, **scaling) as handle:
        alone = handle.enroll.remote(request_of(1)).result()
        assert tuners() == 1
        asked = [handle.enroll.remote(request_of(speaker)) for speaker in range(1, 61)]
        wait_until(lambda: tuners() == 2)
        results = [answer.result(timeout_s=200) for answer in asked]
        counts = handle.about.remote().result()
        wait_until(lambda: tuners() == 1)
    assert all("voice" in result for result in results) and results[0]["voice"] == alone["voice"]
    assert (counts["waiting"], counts["tuning"]) == (0, 0)
