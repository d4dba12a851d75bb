"""One step through DeepSpeed: the same under every stage of ZeRO, exact after a resume, unmoved by bad gradients."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infra import storage
from model.checkpoint import unpack
from model.lina import Batch, Lina
from pipeline import model_export
from pipeline import training_checkpoints as checkpoints
from pipeline.phonemes import INVENTORY
from pipeline.pretrain_config import PretrainConfig
from tests.pipeline.process_group import process_group  # noqa: F401 (used by all tests here)
from tests.pipeline.speaking_tokens import IDENTITY, write_sizes

CPU = torch.device("cpu")
STAGES = ("0", "1", "2", "3")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sizes(tmp_path_factory.mktemp("sizes"))


def recipe(sizes: str, **changes) -> PretrainConfig:
    settings = {"model": sizes, "steps": 40, "warmup": 4, "learning_rate": 3e-3, "text_dropout": 0.1, "zero": "0"}
    return PretrainConfig(**settings | changes)


def engine(config: PretrainConfig, bf16: bool = False, **options):
    from pipeline.training_engine import Engine

    return Engine(config, CPU, bf16, **options)


def batch(seed: int, rows: int = 4) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    frames, phones = torch.randint(5, 20, (rows,), generator=draw), torch.randint(3, 9, (rows,), generator=draw)
    return Batch(
        torch.randint(1, len(INVENTORY), (rows, int(phones.max())), generator=draw),
        phones,
        torch.randint(0, 32, (rows, 4, int(frames.max())), generator=draw),
        frames,
    )


def rows_of(whole: Batch, first: int, last: int) -> Batch:
    part = Batch(*(value[first:last] for value in whole))
    return part._replace(codes=part.codes[:, :, : int(part.code_lengths.max())])


def losses(training, steps: range) -> list[float]:
    return [training.step(n, [batch(n % 3)]).loss for n in steps]


def test_stages_and_precisions_learn_alike(sizes: str) -> None:
    reference = losses(engine(recipe(sizes)), range(12))
    assert reference[9] < reference[0] - 0.05
    for zero in STAGES:
        assert losses(engine(recipe(sizes, zero=zero)), range(12)) == pytest.approx(reference, abs=2e-5), zero
        assert losses(engine(recipe(sizes, zero=zero), bf16=True), range(12)) == pytest.approx(reference, abs=0.03), (
            zero
        )


@pytest.mark.parametrize("zero", STAGES)
def test_how_a_batch_is_cut_does_not_matter(sizes: str, zero: str) -> None:
    """Rows of unequal lengths: a mean of micro-batches' means would give something else."""
    whole, halves = recipe(sizes, zero=zero, text_dropout=0.0), recipe(sizes, zero=zero, text_dropout=0.0, accumulate=2)
    one, two = engine(whole), engine(halves)
    for number in range(4):
        rows = batch(number)
        first = one.step(number, [rows])
        second = two.step(number, [rows_of(rows, 0, 1), rows_of(rows, 1, 4)])
        assert second.loss == pytest.approx(first.loss, abs=1e-5)
        assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)
        assert second.tokens == first.tokens
    assert two.step(4, [batch(4), None]).loss == pytest.approx(one.step(4, [batch(4)]).loss, abs=1e-5)


@pytest.mark.parametrize("zero", STAGES)
def test_gradients_that_are_not_finite_change_nothing(sizes: str, zero: str) -> None:
    training = engine(recipe(sizes, zero=zero))
    losses(training, range(3))
    before = training.weights()
    poison = training.deepspeed.module.model.heads.register_forward_hook(lambda module, given, out: out * math.nan)
    result = training.step(3, [batch(0)])
    poison.remove()
    assert result.skipped and math.isnan(result.loss)
    assert all(torch.equal(before[name], value) for name, value in training.weights().items())
    after = training.step(4, [batch(1)])
    assert not after.skipped and math.isfinite(after.loss)


def test_a_gradient_far_out_of_the_usual_is_skipped(sizes: str) -> None:
    training = engine(recipe(sizes, explode=5.0, steps=100))
    assert not any(training.step(n, [batch(n % 3)]).skipped for n in range(60))
    before = training.weights()
    spike = training.deepspeed.module.model.heads.register_forward_hook(lambda module, given, out: out * 300)
    result = training.step(60, [batch(0)])
    spike.remove()
    assert result.skipped and result.grad_norm > 5 * math.exp(training.optimiser.usual[0])
    assert all(torch.equal(before[name], value) for name, value in training.weights().items())


def test_a_batch_of_which_nothing_could_be_read_is_left_out(sizes: str) -> None:
    training = engine(recipe(sizes))
    before = training.weights()
    training.added_up = lambda values: values * 2  # as if another worker had the same
    result = training.step(0, [None], stop=True, bad=3)
    assert result.skipped and result.tokens == 0 and result.stop and result.bad == 6
    assert all(torch.equal(before[name], value) for name, value in training.weights().items())


FACTS = {
    "identity": {},
    "dataset": "0" * 64,
    "run_id": "",
}


def facts(config: PretrainConfig) -> dict:
    model = {
        "sizes": config.sizes().to_dict(),
        "inventory": list(INVENTORY),
        "codec": IDENTITY,
        "training": {"name": "test"},
    }
    return FACTS | {"model": model}


@pytest.mark.parametrize("zero", STAGES)
def test_a_resumed_run_is_the_same_bit_for_bit_and_exports_what_it_learnt(
    sizes: str, tmp_path: Path, zero: str
) -> None:
    config = recipe(sizes, zero=zero)
    undisturbed = engine(config)
    expected = losses(undisturbed, range(8))
    first = engine(config)
    losses(first, range(5))
    checkpoints.save(first, str(tmp_path), 5, facts(config), keep=2)
    found, universal = checkpoints.prepare(str(tmp_path), 1, int(zero))
    assert found.step == 5 and not universal
    second = engine(config)
    checkpoints.load(second, found)
    assert second.optimiser.usual == first.optimiser.usual
    assert losses(second, range(5, 8)) == expected[5:]
    checkpoints.save(second, str(tmp_path), 8, facts(config), keep=2)
    model_export.export(model_export.find(str(tmp_path)), str(tmp_path / "export"))
    model, card = unpack(*((tmp_path / "export" / name).read_bytes() for name in ("config.json", "model.safetensors")))
    assert card.training == {"name": "test", "step": 8} and card.codec.to_dict() == IDENTITY
    assert all(torch.equal(value, second.weights()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("zero", "bf16"), [("1", False), ("2", True), ("3", True)])
def test_a_checkpoint_for_any_number_of_workers_is_the_same_run(
    sizes: str, tmp_path: Path, zero: str, bf16: bool
) -> None:
    """DeepSpeed gives all groups of ZeRO 3 the first one's options, and all of its states one tensor as their step."""
    config = recipe(sizes, zero=zero)
    first = engine(config, bf16)
    losses(first, range(5))
    checkpoints.save(first, str(tmp_path), 5, facts(config), keep=2)
    expected = losses(first, range(5, 8))
    found, universal = checkpoints.prepare(str(tmp_path), 2, int(zero))
    assert universal and found.facts["world"] == 1
    second = engine(config, bf16, load_universal=True)
    checkpoints.load(second, found)
    assert [group["weight_decay"] for group in second.optimiser.param_groups] == [config.weight_decay, 0.0]
    steps = [state["step"] for state in second.optimiser.state.values()]
    assert [int(step) for step in steps] == [5, 5] and len({step.data_ptr() for step in steps}) == 2
    assert losses(second, range(5, 8)) == expected


def test_one_worker_and_two_are_the_same_run(sizes: str, tmp_path: Path, bucket: str) -> None:
    """Two from the beginning, two after one, one after two; the checkpoints of two lie on object storage."""
    from tests.pipeline.two_workers import SAVED, STAGES, STEPS

    expected = {}
    for zero in STAGES:
        alone = engine(recipe(sizes, zero=zero, text_dropout=0.0))
        expected[zero] = [alone.step(n, [batch(n)]).loss for n in range(SAVED)]
        checkpoints.save(alone, str(tmp_path / f"one-{zero}"), SAVED, facts(alone.config), keep=1)
        checkpoints.prepare(str(tmp_path / f"one-{zero}"), 2, int(zero))
        expected[zero] += [alone.step(n, [batch(n)]).loss for n in range(SAVED, STEPS)]
    command = [sys.executable, "-m", "tests.pipeline.two_workers"]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path), sizes, bucket], cwd=ROOT) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    seen = json.loads((tmp_path / "losses.json").read_text())
    for zero in STAGES:
        assert seen[zero]["shared"] + seen[zero]["grown"] == pytest.approx(expected[zero], abs=1e-5), zero
        found, universal = checkpoints.prepare(f"{bucket}/two-{zero}", 1, int(zero))
        assert found.facts["world"] == 2 and universal == (zero != "0")
        alone = engine(recipe(sizes, zero=zero, text_dropout=0.0), load_universal=universal)
        checkpoints.load(alone, found)
        again = [alone.step(n, [batch(n)]).loss for n in range(SAVED, STEPS)]
        assert again == pytest.approx(expected[zero][SAVED:], abs=1e-5), zero


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(("zero", "file"), [("0", "mp_rank_00_model_states.pt"), ("1", "*optim_states.pt")])
def test_a_checkpoint_that_would_run_code_is_refused(sizes: str, tmp_path: Path, zero: str, file: str) -> None:
    config, made = recipe(sizes, zero=zero), tmp_path / "made"
    training = engine(config)
    checkpoints.save(training, str(tmp_path), 1, facts(config), keep=1)
    (parts,) = (tmp_path / "checkpoints" / checkpoints.name_of(1)).glob(file)
    torch.save(torch.load(parts, weights_only=False) | {"more": Hostile(made)}, parts)
    note = parts.with_name(checkpoints.FACTS)
    noted = json.loads(note.read_text())
    note.write_text(json.dumps(noted | {"files": noted["files"] | {parts.name: parts.stat().st_size}}))
    found, says = checkpoints.newest(str(tmp_path)), rf"{parts.name} names posix.mkdir, which is no data"
    with pytest.raises(checkpoints.CheckpointError, match=says):
        model_export.read_weights(found)
    with pytest.raises(checkpoints.CheckpointError, match=says):
        checkpoints.load(training, found)
    if zero != "0":
        with pytest.raises(checkpoints.CheckpointError, match=says):
            checkpoints.prepare(str(tmp_path), 2, int(zero))
    assert not made.exists()
    torch.load(parts, weights_only=False)
    assert made.exists(), "the file is what it is meant to be"


def test_a_damaged_checkpoint_is_passed_over_and_old_ones_go(sizes: str, tmp_path: Path, capsys) -> None:
    config = recipe(sizes)
    training = engine(config)
    for step in (1, 2, 3, 4):
        checkpoints.save(training, str(tmp_path), step, facts(config), keep=3)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == [checkpoints.name_of(step) for step in (2, 3, 4)]
    weights = folder / checkpoints.name_of(4) / "mp_rank_00_model_states.pt"
    weights.write_bytes(weights.read_bytes()[:-10])
    (folder / checkpoints.name_of(3) / checkpoints.FACTS).unlink()
    assert checkpoints.newest(str(tmp_path)).step == 2
    assert "has lost mp_rank_00_model_states.pt" in (said := capsys.readouterr().err) and "not finished" in said
    assert f"using an earlier checkpoint: {folder / checkpoints.name_of(2)}" in said
    assert checkpoints.opened(str(folder / checkpoints.name_of(4))) is None
    assert "earlier" not in capsys.readouterr().err, "it has looked at one alone"


def test_what_was_never_finished_costs_no_finished_checkpoint(sizes: str, tmp_path: Path) -> None:
    """Killed while it wrote step 3, resumed from 2, and stopped before it came to 3 again."""
    config, folder = recipe(sizes), tmp_path / "checkpoints"
    training = engine(config)
    checkpoints.save(training, str(tmp_path), 20, facts(config), keep=1)
    unfinished = folder / checkpoints.name_of(30)
    unfinished.mkdir()
    (unfinished / "mp_rank_00_model_states.pt").write_bytes(b"half")
    checkpoints.save(training, str(tmp_path), 25, facts(config), keep=1)
    assert checkpoints.newest(str(tmp_path)).step == 25
    assert [path.name for path in folder.iterdir()] == [checkpoints.name_of(25)]
    (folder / checkpoints.name_of(22)).mkdir()
    checkpoints.save(training, str(tmp_path), 28, facts(config), keep=2)
    assert sorted(path.name for path in folder.iterdir()) == [checkpoints.name_of(step) for step in (25, 28)]


def test_a_storage_that_does_not_answer_is_no_missing_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "read_bytes", lambda url: (_ for _ in ()).throw(TimeoutError("no answer")))
    with pytest.raises(TimeoutError):
        checkpoints.opened("s3://bucket/run/checkpoints/step-00000001")


def test_checkpoints_live_on_object_storage_too(sizes: str, bucket: str) -> None:
    config = recipe(sizes, zero="1")
    training = engine(config)
    expected = losses(training, range(3))
    checkpoints.save(training, f"{bucket}/run", 3, facts(config), keep=1)
    expected += losses(training, range(3, 5))
    resumed = engine(config)
    checkpoints.load(resumed, checkpoints.prepare(f"{bucket}/run", 1, 1)[0])
    assert losses(resumed, range(3, 5)) == expected[3:]


def test_an_upload_is_tried_again_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_checkpoint(parent: str, tag: str, save_latest: bool) -> None:
        Path(parent, tag).mkdir()
        Path(parent, tag, "weights.pt").write_bytes(b"weights")

    def shaky(local: str, url: str) -> None:
        tries.append(url)
        if len(tries) != 2:
            raise OSError("the storage has a bad moment")
        upload(local, url)

    deepspeed, optimiser = SimpleNamespace(save_checkpoint=save_checkpoint), SimpleNamespace(usual=[])
    training = SimpleNamespace(rank=0, world=1, stage=0, deepspeed=deepspeed, optimiser=optimiser)
    upload, tries, run = storage.upload, [], f"memory://{tmp_path.name}"
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(storage, "upload", shaky)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    checkpoints.save(training, run, 1, {}, keep=1)
    assert checkpoints.newest(run).step == 1 and len(tries) == 2
    with pytest.raises(OSError, match="bad moment"):
        checkpoints.save(training, run, 2, {}, keep=1)
    assert len(tries) == 5 and not list(tmp_path.iterdir())


def test_another_stage_of_zero_that_cannot_go_on_is_refused(sizes: str, tmp_path: Path) -> None:
    config = recipe(sizes, zero="3")
    checkpoints.save(engine(config), str(tmp_path), 1, facts(config), keep=1)
    with pytest.raises(checkpoints.CheckpointError, match="stage 3, which stage 1 cannot continue; use --zero 3"):
        checkpoints.prepare(str(tmp_path), 1, 1)
    with pytest.raises(checkpoints.CheckpointError, match="neither a finished checkpoint nor a run"):
        model_export.find(str(tmp_path / "nothing"))


def test_tokens_are_counted_as_the_model_counts_them(sizes: str) -> None:
    from pipeline.training_engine import tokens_by_codebook

    torch.manual_seed(0)
    model = Lina(recipe(sizes).sizes())
    rows = batch(7)
    assert int(tokens_by_codebook(rows.code_lengths, 4).sum()) == int(model(rows).row_tokens.sum())


def test_the_learning_rate_climbs_and_falls_as_a_cosine(sizes: str) -> None:
    config = recipe(sizes, steps=1000, warmup=100, learning_rate=1.0, final_rate=0.1)
    assert [config.learning_rate_at(step) for step in (0, 49, 99, 100)] == pytest.approx([0.01, 0.5, 1.0, 1.0])
    assert config.learning_rate_at(550) == pytest.approx(0.55) and config.learning_rate_at(1000) == pytest.approx(0.1)
    falling = [config.learning_rate_at(step) for step in range(100, 1001)]
    assert falling == sorted(falling, reverse=True)
