"""What a job's exit code says: 1 where the work failed, 2 where the command was wrong; never a traceback."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infra import cluster
from model.codec_config import CodecError
from pipeline import codec_training, codec_training_loop, pretraining, tokenization
from pipeline.train_codec_config import TrainCodecConfig
from pipeline.training_start import PretrainError


def fails(error: Exception):
    def failing(*_: object) -> None:
        raise error

    return failing


@pytest.mark.parametrize(
    ("error", "code"), [(pretraining.TrainingFailed("gradients explode"), 1), (PretrainError("another recipe"), 2)]
)
def test_pretraining(monkeypatch, capsys, error: Exception, code: int) -> None:
    from jobs import pretrain

    monkeypatch.setattr(cluster, "connect", contextlib.nullcontext)
    monkeypatch.setattr(pretraining, "pretrain", fails(error))
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    assert pretrain.main() == code and str(error) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(codec_training.TrainingFailed("gradients explode"), 1), (CodecError("another codec"), 2)]
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_codec_training(monkeypatch, capsys, workers: str, error: Exception, code: int) -> None:
    from jobs import train_codec

    monkeypatch.setattr(cluster, "connect", contextlib.nullcontext)
    monkeypatch.setattr(train_codec, "train", fails(error))
    monkeypatch.setattr(sys, "argv", ["train_codec", "--workers", workers])
    assert train_codec.main() == code and str(error) in capsys.readouterr().err


def test_a_codec_whose_gradients_are_never_finite_failed() -> None:
    trainer = SimpleNamespace(
        step_number=0, step=fails(FloatingPointError("not finite")), quantiser=None, device=torch.device("cpu")
    )
    pool = SimpleNamespace(batch=lambda *_: np.zeros((1, 1), np.float32))
    config = TrainCodecConfig()
    with pytest.raises(codec_training.TrainingFailed, match="20 steps in a row"):
        codec_training_loop._Loop(config, trainer, pool, None, lambda: False, rank=1).run()


def test_tokenizing(monkeypatch, capsys) -> None:
    from jobs import tokenize

    lost = tokenization.TokenizeError("shards [3] were lost 3 times over")
    monkeypatch.setattr(cluster, "connect", contextlib.nullcontext)
    monkeypatch.setattr(tokenize, "tokenize", fails(lost))
    monkeypatch.setattr(sys, "argv", ["tokenize", "--input", "x.jsonl"])
    assert tokenize.main() == 1 and str(lost) in capsys.readouterr().err


def test_shards_that_are_always_lost_end_the_job(monkeypatch, tmp_path) -> None:
    import ray

    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(tokenization, "missing_shards", lambda plan, dataset: [3])
    monkeypatch.setattr(tokenization, "_wave", lambda plan, missing, limit: [(3, 0)])
    monkeypatch.setattr(tokenization, "graph", lambda *_: SimpleNamespace(iter_batches=lambda **_: []))
    config = tokenization.TokenizeConfig(output=str(tmp_path))
    plan = SimpleNamespace(audio_base="", rounds=(), codec={})
    with pytest.raises(tokenization.TokenizeError, match=r"shards \[3\] were lost 3 times over"):
        tokenization.run(plan, config, None, print)
