"""The ways in and out on object storage: what is read and what is written lies in a bucket of a real S3 server."""

import dataclasses
import json
from pathlib import Path

import pytest

from infra import storage
from jobs import synthesize
from jobs.tokenize import tokenize
from model.checkpoint import read_card
from pipeline import verification
from pipeline.finalize import read_summary
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining import pretrain
from pipeline.speech_stage import FOLDER
from pipeline.synthesize_config import SynthesizeConfig
from pipeline.tokenize_config import TokenizeConfig
from pipeline.training_checkpoints import newest
from tests.corpora import write_codec, write_corpus
from tests.pipeline.speaking_model import write_speaker, write_voice
from tests.pipeline.speaking_tokens import write_sizes, write_tokens


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


@pytest.mark.usefixtures("ray_that_knows_the_bucket")
def test_a_model_is_trained_from_a_bucket_into_another_place_there(bucket, tmp_path, capsys):
    tokens = tmp_path / "tokens"
    write_tokens(tokens)
    put(tokens, f"{bucket}/train/tokens")
    storage.upload(write_sizes(tmp_path), f"{bucket}/train/sizes.json")
    config = PretrainConfig(
        data=f"{bucket}/train/tokens",
        output=f"{bucket.replace('s3:', 's3a:')}/train/run",  # a name that PyArrow does not know
        model=f"{bucket}/train/sizes.json",
        cache=str(tmp_path / "cache"),
        steps=3,
        budget=300,
        warmup=1,
        save_every=2,
        evaluate_every=3,
        valid_fraction=0.1,
        min_seconds=0.1,
        speak=0,
        threads=1,
        tracking="none",
    )
    assert pretrain(config)["valid.loss"] > 0
    config = dataclasses.replace(config, output=f"{bucket}/train/run")
    assert newest(config.output).step == 3
    card = read_card(storage.read_bytes(f"{config.output}/export/config.json"))
    assert card.training["step"] == 3
    assert pretrain(config) == {} and "nothing is left of 3 steps" in capsys.readouterr().out


def put(folder: Path, url: str) -> None:
    """Every file below `folder`, under the same name below `url`."""
    for path in folder.rglob("*"):
        if path.is_file():
            storage.upload(str(path), f"{url}/{path.relative_to(folder)}")


@pytest.mark.usefixtures("ray_that_knows_the_bucket")
def test_a_script_in_a_bucket_is_said_there_and_goes_on(bucket, tmp_path):
    local = tmp_path / "say"
    model, _ = write_speaker(local, ends=1.5)
    write_voice(local / "voices" / "ann.safetensors", model)
    rows = [{"id": f"{n}", "text": f"Line number {n}.", "voice": "ann"} for n in range(6)]
    (local / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    put(local, f"{bucket}/say")

    def said(where: str, output: str) -> dict[str, bytes]:
        config = SynthesizeConfig(
            script=f"{where}/lines.jsonl",
            voices=f"{where}/voices",
            model=f"{where}/model",
            codec=f"{where}/codec",
            output=output,
            max_reject_fraction=1.0,
            tracking="none",
            device="cpu",
            retries=0,
            chunk=2,
        )
        assert synthesize.perform(config) == 0
        names = [name for name in storage.names(output) if name.endswith(".wav")]
        return {name: storage.read_bytes(f"{output}/{name}") for name in names}

    wanted = said(str(local), str(tmp_path / "wavs"))
    assert len(wanted) == len(rows) and said(f"{bucket}/say", f"{bucket}/wavs") == wanted
    storage.remove(f"{bucket}/wavs/{next(iter(wanted))}")
    for name in storage.names(f"{bucket}/wavs/{FOLDER}"):
        if name.endswith(".jsonl"):
            storage.remove(f"{bucket}/wavs/{FOLDER}/{name}")
    assert said(f"{bucket}/say", f"{bucket}/wavs") == wanted
