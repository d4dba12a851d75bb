"""Which models training may start from, and that it starts from exactly their weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from model.checkpoint import load, save
from model.codec_config import CodecIdentity
from pipeline.phonemes import INVENTORY
from pipeline.pretrain_config import PretrainConfig
from pipeline.token_index import DataError
from pipeline.training_data import open_index
from pipeline.training_start import PretrainError, starting_card, starting_model
from tests.pipeline.speaking_model import write_speaker
from tests.pipeline.speaking_tokens import IDENTITY, write_sizes, write_tokens


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_speaker(tmp_path_factory.mktemp("start"))[0]


def config(tmp_path: Path, start_from: str, **changes) -> PretrainConfig:
    return PretrainConfig(**{"model": write_sizes(tmp_path), "start_from": start_from} | changes)


def test_the_weights_are_the_models_and_dropout_is_the_runs(exported: str, tmp_path: Path) -> None:
    model = starting_model(config(tmp_path, exported, dropout=0.3))
    assert model.config.dropout == 0.3 and model.training
    expected, _ = load(exported)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_nothing_named_is_a_random_start(tmp_path: Path) -> None:
    assert starting_card(config(tmp_path, "")) is None


def test_a_model_that_does_not_fit_is_refused_with_the_reason(exported: str, tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match="codebooks 4, not 2"):
        starting_card(config(tmp_path, exported, codebooks=2))
    with pytest.raises(PretrainError, match=r"nowhere is no exported model .*jobs/export\.py"):
        starting_card(config(tmp_path, str(tmp_path / "nowhere")))
    for elsewhere in ("nowhere://bucket/model", "oss://bucket/model"):  # no such thing, and not installed
        with pytest.raises(PretrainError, match=f"start_from {elsewhere} is no exported model"):
            starting_card(config(tmp_path, elsewhere))
        with pytest.raises(ValueError, match=f"model {elsewhere} is neither a preset"):
            PretrainConfig(model=elsewhere)
    model, card = load(exported)
    other = dataclasses.replace(card, inventory=tuple(reversed(INVENTORY)))
    save(model, other, tmp_path / "other")
    with pytest.raises(PretrainError, match="other phonemes"):
        starting_card(config(tmp_path, str(tmp_path / "other")))


def test_a_model_of_another_codec_is_refused(exported: str, tmp_path: Path) -> None:
    data = {"data": write_tokens(tmp_path / "tokens", samples=6), "cache": str(tmp_path / "cache")}
    with pytest.raises(DataError, match="name: 'random-for-tests-tests' → 'random-codes'"):
        open_index(config(tmp_path, exported, **data))
    model, card = load(exported)
    save(model, dataclasses.replace(card, codec=CodecIdentity.from_dict(IDENTITY)), tmp_path / "fitting")
    assert len(open_index(config(tmp_path, str(tmp_path / "fitting"), **data)))
