"""Options that all jobs share mean the same in all of them, on the command line and in a file."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import pytest

from infra.config import add_arguments, from_arguments
from pipeline.enroll_config import EnrollConfig
from pipeline.evaluate_config import EvaluateConfig
from pipeline.experiments.config import ExperimentsConfig
from pipeline.pretrain_config import PretrainConfig
from pipeline.synthesize_config import SynthesizeConfig
from pipeline.tokenize_config import TokenizeConfig
from pipeline.train_codec_config import TrainCodecConfig

NEEDED = {EnrollConfig: {"speakers": "x"}, EvaluateConfig: {"set": "x"}, SynthesizeConfig: {"script": "x"}}


@pytest.mark.parametrize(
    "kind",
    [
        *(EnrollConfig, EvaluateConfig, ExperimentsConfig, PretrainConfig),
        *(SynthesizeConfig, TokenizeConfig, TrainCodecConfig),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_none_turns_tracking_off(kind: type, in_file: bool, tmp_path: Path) -> None:
    needed = NEEDED.get(kind, {})
    words = [word for name, value in needed.items() for word in (f"--{name}", value)]
    if in_file:
        (tmp_path / "job.yaml").write_text("tracking: none\n")
        words += ["--config", str(tmp_path / "job.yaml")]
    else:
        words += ["--tracking", "none"]
    parser = argparse.ArgumentParser()
    add_arguments(parser, kind)
    assert from_arguments(kind, parser.parse_args(words)).tracking == "none"


@pytest.mark.parametrize("job", sorted(Path(__file__).parents[2].glob("jobs/*.py")), ids=lambda job: job.stem)
def test_importing_a_job_leaves_the_path_alone(monkeypatch: pytest.MonkeyPatch, job: Path) -> None:
    before = ["the caller's", *sys.path]
    monkeypatch.setattr(sys, "path", list(before))
    runpy.run_path(str(job))
    assert sys.path == before
