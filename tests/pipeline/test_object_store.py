"""The whole way on object storage: manifest, audio and dataset in a bucket of a real S3 server on loopback."""

import json
from pathlib import Path

import pytest

from infra import storage
from jobs.tokenize import tokenize
from pipeline import verification
from pipeline.finalize import read_summary
from pipeline.tokenize_config import TokenizeConfig
from tests.corpora import write_codec, write_corpus


@pytest.fixture(scope="module")
def ray_that_knows_the_bucket(bucket, request):
    request.getfixturevalue("local_ray")  # after the bucket: workers inherit its address


@pytest.mark.usefixtures("ray_that_knows_the_bucket")
def test_a_bucket_is_tokenized_resumed_and_verified(bucket, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 24)
    for path in corpus.parent.iterdir():
        storage.upload(str(path), f"{bucket}/corpus/{path.name}")
    codec = write_codec(tmp_path / "codec")
    for path in Path(codec).iterdir():
        storage.upload(str(path), f"{bucket}/codec/{path.name}")
    config = TokenizeConfig(
        input=f"{bucket}/corpus/manifest.jsonl",
        output=f"{bucket}/tokens",
        codec=f"{bucket}/codec",
        tracking="none",
        device="cpu",
    )
    assert tokenize(config, False, False) == 0
    summary = read_summary(config.output)
    assert summary["samples"] == 24
    card = storage.read_text(f"{config.output}/README.md")
    assert "24 of 24" in card and storage.exists(f"{config.output}/plots/durations.png")

    before = storage.read_bytes(f"{config.output}/shards/000000.tar")
    storage.remove(f"{config.output}/shards/000000.json")
    storage.remove(f"{config.output}/shards/000000.tar")
    assert tokenize(config, False, False) == 0
    assert storage.read_bytes(f"{config.output}/shards/000000.tar") == before
    plan = verification.load_plan(config.output)
    assert verification.verify(plan, config.output, lambda checked: None) == []

    local = TokenizeConfig(
        input=str(corpus), output=str(tmp_path / "tokens"), codec=codec, tracking="none", device="cpu"
    )
    assert tokenize(local, False, False) == 0
    assert (tmp_path / "tokens/shards/000000.tar").read_bytes() == before, "where things lie does not change the bytes"
    assert json.loads((tmp_path / "tokens/dataset.json").read_text())["digest"] == summary["digest"]
