"""A grid that is interrupted goes on, to the same results; what it leaves behind is all there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.experiments import cells as grid
from pipeline.experiments.cells import Cell
from pipeline.experiments.config import ExperimentsConfig
from pipeline.experiments.running import perform
from tests.pipeline.speaking_model import write_speaker
from tests.pipeline.speech_samples import write_speakers


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ExperimentsConfig:
    folder = tmp_path_factory.mktemp("experiments")
    model, codec = write_speaker(folder, ends=1.5)
    speakers = write_speakers(folder / "speakers", 3, 4)
    lines = speakers.read_text().splitlines()
    lonely = json.loads(lines[0]) | {"speaker": "lonely"}
    lonely["samples"] = lonely["samples"][:1]
    speakers.write_text("\n".join([json.dumps(lonely), *lines]) + "\n")
    return ExperimentsConfig(
        model=model,
        codec=codec,
        speakers=str(speakers),
        output=str(folder / "whole"),
        people=3,
        together=1,
        steps=3,
        eval_every=2,
        batch=2,
        ranks=(1, 0),
        lrs=(0.125,),
        lora_ranks=(2,),
        prompts=(1, 2),
        amounts=(0.6, 1.4),
        conditions=("noise:10", "level:-20"),
        seeds=2,
        sentences=1,
        tracking="none",
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(config, local_ray) -> dict[str, Any]:
    """Results of an undisturbed run."""
    done = perform("ist-ablation", config)
    assert done.left_out == [
        {"speaker": "lonely", "condition": "clean", "reason": "1 usable samples, 2 are needed (gave too few)"}
    ]
    return results(config, "ist-ablation")


def results(config: ExperimentsConfig, name: str) -> dict[str, Any]:
    """results.json without what belongs to the machine."""
    found = json.loads(Path(config.output, name, "results.json").read_text())
    assert all(cell.pop("machine")["seconds"] > 0 for cell in found["cells"])
    return found


def test_an_interrupted_grid_does_the_rest_and_ends_in_the_same_results(config, whole, tmp_path):
    class Killed(BaseException):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what == "voices" and done >= 3:
            raise Killed

    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    with pytest.raises(Killed):
        perform("ist-ablation", cut, kill)
    folder = tmp_path / "cut/ist-ablation/cells"
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    assert not (tmp_path / "cut/report.md").exists()
    asked: dict[str, int] = {}
    perform("ist-ablation", cut, lambda what, done, total: asked.setdefault(what, total - done) and None)
    after = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    assert before.items() <= after.items() and len(before) < len(after)
    assert asked["recordings"] == 0 and 0 < asked["voices"] <= len(whole["cells"]) - 3
    assert results(cut, "ist-ablation") == whole


def test_the_same_again_computes_nothing_and_another_grid_only_what_it_adds(config, whole):
    folder = Path(config.output, "ist-ablation", "cells")
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    perform("ist-ablation", config)
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")} == before
    perform("ist-ablation", dataclasses.replace(config, ranks=(1, 0, 2)))
    after = {file.name for file in folder.glob("*.json")}
    assert len(after) - len(before) == 2  # a cell for each of two speakers
    perform("ist-ablation", config)
    assert results(config, "ist-ablation") == whole


def test_results_name_every_method_with_losses_and_sizes(whole):
    rows = {row["method"]: row for row in whole["summary"]["rows"]}
    assert list(rows)[:3] == ["no voice", "continuation, 1 sample", "continuation, 2 samples"]
    assert {"IST rank 1, lr 0.125", "IST full, lr 0.125", "IST rank 1, lr 0.125, position network"} <= rows.keys()
    tuned = rows["IST rank 1, lr 0.125"]
    assert tuned["speakers"] == 2 and [step for step, _ in tuned["curve"]] == [0, 2, 3]
    assert tuned["curve"][-1][1] == pytest.approx(tuned["loss"]["value"]) and tuned["parameters"] == 96
    assert tuned["gain"]["value"] == pytest.approx(tuned["loss"]["value"] - rows["no voice"]["loss"]["value"])
    assert rows["all weights, lr 0.0003"]["parameters"] == 44_326 > rows["LoRA rank 2, lr 0.003"]["parameters"]
    # Tuning starts at the model itself, but for IST's drawn memories
    assert rows["all weights, lr 0.0003"]["curve"][0][1] == pytest.approx(rows["no voice"]["loss"]["value"], abs=1e-4)
    assert {claim["verdict"] for claim in whole["summary"]["claims"]} and "cells" in whole


def test_all_experiments_on_speakers_end_in_plots_and_one_report(config, whole):
    for name in ("data-amount", "robustness"):
        done = perform(name, config)
        pictures = [file for file in done.files if file.endswith(".png")]
        assert pictures and all(Path(file).stat().st_size > 5000 for file in pictures)
        assert done.files[-1] == str(Path(config.output, "report.md"))
    report = Path(config.output, "report.md").read_text()
    places = [report.index(f"`{name}`") for name in ("ist-ablation", "data-amount", "robustness")]
    assert places == sorted(places)
    assert "| Lina-Speech's authors, 23 demo samples | 9.9 | 0.856 | 4.32 |" in report
    assert "2 speakers are few" in report and "1 left out: lonely" in report
    linked = [line[line.index("(") + 1 : -1] for line in report.splitlines() if line.startswith("![")]
    assert len(linked) == 5 and all(Path(config.output, file).exists() for file in linked)
    robust = results(config, "robustness")["summary"]
    assert [row["condition"] for row in robust["conditions"]] == ["clean", "noise:10", "level:-20"]
    assert all(0 <= row["failures"]["value"] <= 1 for row in robust["conditions"])
    assert all(len(person["losses"]) == 2 for person in robust["people"])
    clean, noisy, _ = (row["loss"]["value"] for row in robust["conditions"])
    assert clean != noisy


def square(cell: Cell, kit: Any) -> tuple[Any, dict[str, Any]]:
    return {"square": cell.settings["x"] ** 2, "infinite": float("inf")}, {"kit": kit}


def test_a_cells_name_is_all_that_it_depends_on(tmp_path):
    cells = [Cell("square", {"x": x, "deep": {"b": 1, "a": 2}}) for x in (1, 2)]
    assert cells[0].name == Cell("square", {"deep": {"a": 2, "b": 1}, "x": 1}).name != cells[1].name
    assert Cell("cube", cells[0].settings).name != cells[0].name
    grid.perform(str(tmp_path), square, "kit", cells[1])
    assert grid.missing(str(tmp_path), [*cells, *cells]) == cells[:1]
    (outcome,) = grid.read(str(tmp_path), cells[1:])
    assert outcome["result"] == {"square": 4, "infinite": None} and outcome["machine"]["kit"] == "kit"


@pytest.mark.parametrize("gone", ["NodeDiedError", "OutOfMemoryError"])
def test_workers_that_are_lost_are_told_in_one_line(tmp_path, monkeypatch, gone):
    import ray
    from ray import exceptions

    def lost(ready):
        raise getattr(exceptions, gone)("killed")

    class Task:
        def __init__(self, work):
            pass

        def options(self, **options):
            return self

        def remote(self, *given):
            return "a task"

    for name, double in (("put", id), ("remote", Task), ("wait", lambda refs: (refs[:1], refs[1:])), ("get", lost)):
        monkeypatch.setattr(ray, name, double)
    with pytest.raises(grid.ExperimentError, match=r"^a cell's workers died again and again: killed$"):
        grid.run(str(tmp_path), [Cell("square", {"x": 1})], square, None)


def broken(cell: Cell, kit: Any) -> tuple[Any, dict[str, Any]]:
    raise grid.ExperimentError("no such thing")


def test_what_goes_wrong_in_a_cell_is_told_as_it_is(tmp_path, local_ray):
    with pytest.raises(grid.ExperimentError, match="no such thing"):
        grid.run(str(tmp_path), [Cell("broken", {})], broken, None)
    assert grid.missing(str(tmp_path), [Cell("broken", {})])
