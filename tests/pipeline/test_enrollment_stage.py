"""The enrollment stage on Ray Serve, where a tuner's thread fails: its process ends, and another one goes on."""

from pathlib import Path

import pytest

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


@pytest.fixture
def stage(local_ray, tmp_path, monkeypatch):
    from ray import serve

    monkeypatch.setattr(enrollment_stage, "VoiceTuner", Faulty)
    settings = {"steps": 2, "eval_every": 2, "batch": 2, "device": "cpu", "max_replicas": 1, "slots": 3}
    config = StageConfig(model=write_speaker(tmp_path)[0], owner=str(tmp_path / "broken"), **settings)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    yield serve.run(enrollment_stage.build(config), name="faulty", route_prefix=None)
    serve.shutdown()


def test_how_many_tuners_there_can_be_is_told(local_ray, tmp_path, capsys):
    model = write_speaker(tmp_path)[0]
    enrollment_stage.build(StageConfig(model=model, device="cpu"))
    (line,) = capsys.readouterr().out.splitlines()
    assert "at most 2 tuners" in line and "--max-replicas" in line
    enrollment_stage.build(StageConfig(model=model, device="cpu", max_replicas=2))
    assert not capsys.readouterr().out


def test_a_tuner_that_fails_costs_nobody_else_its_voice(stage):
    asked = [stage.enroll.remote(request_of(speaker)) for speaker in range(1, 5)]
    results = [answer.result(timeout_s=200) for answer in asked]
    assert ["voice" in result for result in results] == [True, True, False, True]
    error = results[2]["error"]
    assert error["reason"] == "lost" and "4 times" in error["detail"] and "Died" in error["detail"]
    assert stage.progress.remote("r1").result()["attempts"] > 1
