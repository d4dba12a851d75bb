"""One worker's run in this process: what comes in which order, what its log counts, what is kept of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import lina
from model.checkpoint import load
from pipeline import training_loop
from pipeline import validation as validating
from pipeline.codec_weights import resolve
from pipeline.plan import Plan
from pipeline.pretrain_config import PretrainConfig
from pipeline.training_checkpoints import newest
from pipeline.training_engine import Engine, StepResult
from pipeline.training_start import PretrainError
from tests.pipeline.process_group import process_group  # noqa: F401 (used by all tests here)
from tests.pipeline.speaking_tokens import SIZES, write_sizes, write_tokens
from tests.pipeline.token_data import write_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("loop") / "tokens")


def recipe(data: str, folder: Path, **changes) -> PretrainConfig:
    settings = {
        "data": data,
        "output": str(folder / "run"),
        "name": "night",
        "model": write_sizes(folder),
        "cache": str(folder / "cache"),
        "steps": 4,
        "budget": 300,
        "warmup": 1,
        "valid_fraction": 0.2,
        "save_every": 2,
        "evaluate_every": 2,
        "speak": 0,
        "zero": "0",
        "min_seconds": 0.1,
    }
    return PretrainConfig(**settings | changes)


def train(config: PretrainConfig, uri: str = "none") -> dict:
    return training_loop.train(config, CPU, uri, lambda: False)


def log_of(config: PretrainConfig) -> list[dict]:
    return [json.loads(line) for line in Path(config.output, "losses.jsonl").read_text().splitlines()]


def test_a_validation_that_fails_costs_no_steps(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("the storage of the held-out shards is away")

    config = recipe(data, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="held-out"):
        patched.setattr(training_loop, "validate", fails)
        train(config)
    assert newest(config.output).step == 2
    assert train(config)["valid.loss"] > 0 and newest(config.output).step == 4


def test_what_a_checkpoint_and_a_validation_take_is_no_steps_time(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that runs on only in saving and validating: steps take no time at all."""
    now = [0.0]
    monkeypatch.setattr("pipeline.training_log.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(real: Callable[..., object], *given: object) -> object:
        now[0] += 1000.0
        return real(*given)

    monkeypatch.setattr(training_loop.checkpoints, "save", partial(slow, training_loop.checkpoints.save))
    monkeypatch.setattr(training_loop, "validate", partial(slow, training_loop.validate))
    config = recipe(data, tmp_path, steps=3, save_every=1, evaluate_every=2)
    train(config)
    rows = log_of(config)
    assert len(rows) == 3 and now[0] >= 5000
    assert all(row["tokens_per_second"] > 1e9 for row in rows)


def test_the_registered_model_is_the_exported_one(data: str, tmp_path: Path, tracking_uri: str) -> None:
    from mlflow import MlflowClient

    config = recipe(data, tmp_path, steps=2)
    train(config, tracking_uri)
    (version,) = MlflowClient(tracking_uri).search_model_versions("name='night'")
    source = Path(version.source.removeprefix("file://"))
    for name in ("config.json", "model.safetensors"):
        assert (source / name).read_bytes() == Path(config.output, "export", name).read_bytes()


def test_what_is_said_at_an_evaluation_can_be_heard_and_seen(tmp_path: Path, tracking_uri: str) -> None:
    import soundfile
    from matplotlib.image import imread
    from mlflow import MlflowClient

    codec, data = resolve("demo").identity.to_dict(), str(tmp_path / "tokens")
    write_dataset(data, (20, 20), codec)
    Plan(config={}, codec=codec, codec_source="demo", manifest={}, audio_base="", rejects={}).save(data)
    sizes = tmp_path / "with-1024-codes.json"
    sizes.write_text(json.dumps(SIZES | {"codebook_size": codec["codebook_size"]}))
    config = recipe(data, tmp_path, model=str(sizes), steps=2, speak=2)
    train(config, tracking_uri)
    run = json.loads(Path(config.output, "mlflow-run.json").read_text())["run_id"]
    client, folder = MlflowClient(tracking_uri), "spoken/step-00000002"
    names = [f"{folder}/{number}.{kind}" for number in range(2) for kind in ("png", "wav")]
    assert [file.path for file in client.list_artifacts(run, folder)] == names
    for name in names:
        file = client.download_artifacts(run, name, str(tmp_path))
        if name.endswith(".wav"):
            wave, rate = soundfile.read(file)
            assert rate == codec["sample_rate"] and len(wave) > 0.1 * rate and wave.std() > 0
        else:
            assert imread(file).std() > 0


def test_another_window_is_another_schedule(data: str, tmp_path: Path) -> None:
    config = recipe(data, tmp_path, steps=2)
    train(config)
    with pytest.raises(PretrainError, match="window: 128 → 1"):
        train(recipe(data, tmp_path, steps=2, window=1))
    facts = Path(newest(config.output).url, "trainer.json")
    noted = json.loads(facts.read_text())
    del noted["identity"]["window"], noted["skipped"]  # as runs left it that could not choose, and did not note it
    facts.write_text(json.dumps(noted))
    train(recipe(data, tmp_path, steps=2, cache_gib=7))


def test_a_plan_that_cannot_be_read_leaves_out_the_listening(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(write_tokens(tmp_path / "tokens"), tmp_path, steps=2, speak=2)
    Path(config.data, "plan.json").write_text("{")
    train(config)
    said = capsys.readouterr().out
    assert "nothing to hear: " in said and "plan.json is damaged" in said and "said 2 sentences" in said


def test_what_cannot_be_read_is_counted_and_validation_says_what_it_goes_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(write_tokens(tmp_path / "tokens"), tmp_path, steps=12, evaluate_every=12)
    Path(config.data, "shards", "000001.tar").unlink()
    last = train(config)
    assert last["bad_samples"] > 10 and last["valid.bad_samples"] > 0
    said = capsys.readouterr().out
    assert f"validation without {last['valid.bad_samples']} samples that cannot be read, such as sample" in said
    assert "000001.tar" in said and f"bad samples {last['bad_samples']}" in said
    for tar in Path(config.data, "shards").glob("*.tar"):
        tar.unlink()
    with pytest.raises(PretrainError, match=r"no sample of step 5 can be read, .* run jobs/verify.py on"):
        train(recipe(config.data, tmp_path / "again", max_skipped=5, steps=12))


def test_a_run_that_only_skips_stops_and_what_it_skipped_is_counted_on_when_it_is_resumed(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(steps: Container[int]) -> None:
        """Their gradients are not finite."""

        def step(engine: Engine, number: int, *given: object) -> StepResult:
            worth = math.nan if number in steps else 1.0
            hook = engine.deepspeed.module.model.heads.weight.register_hook(lambda gradient: gradient * worth)
            try:
                return real(engine, number, *given)
            finally:
                hook.remove()

        monkeypatch.setattr(Engine, "step", step)

    real, config = Engine.step, recipe(data, tmp_path, steps=8, max_skipped=3, evaluate_every=8)
    spoil({0, 1, *range(4, 8)})
    with pytest.raises(PretrainError, match="3 steps in a row, to step 7, had gradients that were not finite"):
        train(config)
    said = [line for line in capsys.readouterr().out.splitlines() if " SKIPPED: gradient not finite" in line]
    assert [line.split()[1] for line in said] == ["1", "2", "5", "6", "7"]
    assert [row["skipped_steps"] for row in log_of(config)] == [1, 2, 2, 2, 3, 4, 5]
    spoil({6})
    assert train(config)["skipped_steps"] == 5, "four up to the checkpoint of step 6, and step 7 again"


def as_typed(monkeypatch: pytest.MonkeyPatch, **values) -> int:
    """What `jobs/pretrain.py` gives back for these options, on no cluster."""
    from jobs import pretrain

    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr("sys.argv", ["pretrain.py", *words])
    monkeypatch.setattr("infra.cluster.connect", nullcontext)
    return pretrain.main()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": 20}, "budget 20 does not hold the longest sample, "),
        ({"budget": 300, "workers": 50}, "but 50 workers × accumulate 1 need 50; set budget to at least "),
        ({"max_seconds": 0.11}, "no sample is left to train on"),
    ],
)
def test_the_job_refuses_a_budget_that_cannot_be_in_one_line(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes, says: str
) -> None:
    values = {"data": data, "output": tmp_path / "run", "model": write_sizes(tmp_path), "cache": tmp_path / "cache"}
    assert as_typed(monkeypatch, **values, **{"min_seconds": 0.1} | changes) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("pretrain: ") and says in said[0]


def test_the_job_refuses_another_recipe_on_a_run_and_says_what_differs(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(data, tmp_path, steps=2)
    train(config)
    same = ("data", "output", "model", "cache", "steps", "budget", "warmup", "valid_fraction", "save_every", "zero")
    values = {name: getattr(config, name) for name in (*same, "min_seconds")}
    assert as_typed(monkeypatch, **values, learning_rate=0.002, beta2=0.9) == 2
    said = capsys.readouterr().err
    assert "learning_rate: 0.0002 → 0.002; beta2: 0.95 → 0.9" in said and "choose another --output" in said


def test_training_goes_on_from_an_exported_model_and_says_which(data: str, tmp_path: Path) -> None:
    first = recipe(data, tmp_path, steps=60, warmup=5, learning_rate=0.003, save_every=60, evaluate_every=60)
    train(first)
    exported = f"{first.output}/export"
    second = recipe(data, tmp_path, output=str(tmp_path / "second"), steps=2, start_from=exported)
    train(second)
    before, after = ([row["loss"] for row in log_of(config)] for config in (first, second))
    assert after[0] < 0.7 * before[0] and after[0] == pytest.approx(before[-1], rel=0.25)
    _, card = load(f"{second.output}/export")
    assert card.training["started_from"] == load(exported)[1].fingerprint
    assert "start_from" not in card.training["config"]


def test_nothing_is_said_where_no_sentence_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from infra.tracking import Run
    from model.lina import Lina
    from pipeline.loader import Loader
    from pipeline.schedule import Schedule
    from pipeline.token_index import TokenIndex

    config = recipe(write_tokens(tmp_path / "tokens"), tmp_path, speak=2)
    for tar in Path(config.data, "shards").glob("*.tar"):
        tar.unlink()
    with Loader(Schedule(TokenIndex.open(config.data), budget=300)) as loader:
        held = loader.load(0)[0][0]
    validating._say_some(config, Lina(config.sizes()), held, 24_000, Run(), 5)
    assert "step      5 said nothing" in capsys.readouterr().out


def test_the_papers_recipe_is_the_default(tmp_path: Path) -> None:
    config = PretrainConfig(model=write_sizes(tmp_path))
    assert (config.steps, config.budget, config.codebooks) == (500_000, 100_000, 4)
    rates = [config.learning_rate_at(step) for step in (0, 499, 999, 1000, 250_500, 500_000)]
    assert rates == pytest.approx([2e-7, 1e-4, 2e-4, 2e-4, 1e-4, 0.0])
    engine = Engine(config, CPU, False)
    assert isinstance(engine.optimiser, torch.optim.AdamW)
    assert [group["weight_decay"] for group in engine.optimiser.param_groups] == [0.1, 0.0]
    assert engine.deepspeed.gradient_clipping() == 1.0


def test_computing_blocks_again_in_backward_changes_no_number(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, which has to drop the same again."""
    blocks, checkpoint = [], lina.checkpoint
    monkeypatch.setattr(lina, "checkpoint", lambda *given, **how: blocks.append(given[0]) or checkpoint(*given, **how))

    def numbers(name: str, **changes) -> list[list[float]]:
        config = recipe(data, tmp_path / name, steps=2, dropout=0.2, zero="1", **changes)
        train(config)
        names = ("loss", "grad_norm", *(f"loss.codebook.{level}" for level in range(1, 5)))
        return [[row[name] for name in names] for row in log_of(config)]

    keeping = numbers("keeping")
    assert len(keeping) == 2 and not blocks
    assert numbers("again", activation_checkpointing=True) == keeping
    assert len(blocks) == 2 * 2, "two blocks in each of two steps"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"valid_batches": 0}, "valid_batches must be at least 1"),
        ({"speak": -1}, "speak must not be negative"),
        ({"max_bad_shards": -1}, "max_bad_shards must not be negative"),
        ({"window": 0}, "window must be at least 1"),
        ({"cache_gib": 0}, "cache_gib must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(values: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PretrainConfig(**values)


def test_the_cache_has_the_size_that_is_asked_for(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, loader = [], training_loop.Loader
    monkeypatch.setattr(training_loop, "Loader", lambda *a, **k: sizes.append(k["cache_bytes"]) or loader(*a, **k))
    train(recipe(data, tmp_path, steps=1, cache_gib=3))
    assert sizes == [3 << 30]


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        ({}, 0, ("cpu", "auto: no GPU is up; --device cuda waits for one")),
        ({"workers": 2}, 1, ("cpu", "auto: only 1 of 2 GPUs up; --device cuda waits for all")),
        ({"workers": 2}, 3, ("cuda", "auto: GPUs that are up: 3")),
        ({"device": "cuda"}, 0, ("cuda", "as --device says")),
    ],
)
def test_the_device_comes_with_its_reason(
    given: dict, gpus: int, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.pretraining import device_of

    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {}))
    assert device_of(PretrainConfig(**given)) == expected


def test_a_run_without_a_name_has_that_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.pretraining import resolve

    monkeypatch.chdir(tmp_path)
    names = {output: resolve(PretrainConfig(output=output)).name for output in ("out/ann", "s3://b/lina-169m/", "x")}
    assert names == {"out/ann": "ann", "s3://b/lina-169m/": "lina-169m", "x": "x"}
    assert resolve(PretrainConfig(name="mine", output="out/ann")).name == "mine"


@pytest.mark.parametrize(
    ("bf16", "half", "single", "told"), [(True, 4e9, 50e9, True), (True, 90e9, 50e9, False), (False, 4e9, 50e9, False)]
)
def test_bf16_where_the_cpu_is_slower_in_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bf16: bool,
    half: float,
    single: float,
    told: bool,
) -> None:
    monkeypatch.setattr(training_loop, "peak_flops", lambda device, bf16: half if bf16 else single)
    peak = training_loop._peak_flops(SimpleNamespace(device=CPU, bf16=bf16))
    assert peak == (half if bf16 else single)
    assert ("4 GFLOP/s in bf16 and 50 in fp32: a run with --precision fp32" in capsys.readouterr().out) is told
