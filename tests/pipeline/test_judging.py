"""Recordings judged while their storage fails now and then: a failure is nobody's wrong word."""

from __future__ import annotations

import json
from collections import Counter
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem

from infra import storage
from pipeline import system_evaluation
from pipeline.evaluate_config import EvaluateConfig
from pipeline.evaluation_sets import Item
from pipeline.judging import FOLDER, Judge, Task
from pipeline.measures import EvaluationError
from tests.corpora import voiced

QUICK = {"recogniser": "whisper-tiny.en"}


class Shaky(MemoryFileSystem):
    """Files in memory whose opening fails as often as `faults` says."""

    protocol = "shaky"
    store: ClassVar[dict] = {}
    faults: ClassVar[Counter] = Counter()

    def _open(self, path, *args, **more):
        name = path.rpartition("/")[2]
        if self.faults[name] > 0:
            self.faults[name] -= 1
            raise OSError(f"{name}: slow down")
        return super()._open(path, *args, **more)


@pytest.fixture
def shaky(monkeypatch, tmp_path) -> str:
    """A folder with two recordings on a storage that fails."""
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    Shaky.faults.clear()
    for number, name in enumerate(("said.wav", "prompt.wav")):
        soundfile.write(tmp_path / name, voiced(np.random.default_rng(number), 1.5, 16_000), 16_000)
        storage.write_bytes(f"shaky://folder/{name}", (tmp_path / name).read_bytes())
    return "shaky://folder"


def test_a_storage_that_fails_is_asked_again_and_never_held_against_a_recording(shaky, tmp_path):
    judge = Judge(str(tmp_path), "whisper-tiny.en")
    task = Task("ours", "a", "Rain.", f"{shaky}/said.wav", f"{shaky}/prompt.wav")
    chunks = pa.table({"chunk": [json.dumps(("ours-0", [task]))]})
    for broken in ("said.wav", "prompt.wav"):
        Shaky.faults[broken] = 3
        given = judge(chunks)
        assert given["rows"].to_pylist() == [None] and "slow down" in given["lost"][0].as_py()
        assert not storage.names(storage.join(str(tmp_path), FOLDER))
    Shaky.faults.update({"said.wav": 2, "prompt.wav": 2})
    given = judge(chunks)
    (row,) = json.loads(given["rows"][0].as_py())
    assert given["lost"].to_pylist() == [None] and storage.names(storage.join(str(tmp_path), FOLDER)) == [
        "ours-0.jsonl"
    ]
    assert "missing" not in row and row["seconds"] == pytest.approx(1.5)
    assert row["likeness"] is not None  # the prompt that failed before is not given up for good
    gone = judge.judge(task._replace(recording=f"{shaky}/none.wav"))
    assert gone["word_errors"] == gone["words"] == 1 and "missing-file" in gone["missing"]


def test_chunks_that_cannot_be_kept_are_told_with_the_reason(local_ray, tmp_path):
    config = EvaluateConfig(set="set.jsonl", systems=(f"ours={tmp_path}",), output=str(tmp_path), actors=1, **QUICK)
    evaluation = system_evaluation.plan(config, [Item("a", "Rain.")], [])
    (tmp_path / FOLDER).write_text("where a folder should be")
    with pytest.raises(EvaluationError, match=r"1 chunks were lost 3 times over, and the same command .*File exists"):
        system_evaluation.run(evaluation, lambda rows: None)
    (tmp_path / FOLDER).unlink()
    system_evaluation.run(evaluation, lambda rows: None)
    assert not evaluation.missing()


def test_another_prompt_is_another_judgement(tmp_path):
    config = EvaluateConfig(set="set.jsonl", systems=(f"ours={tmp_path}",), output=str(tmp_path / "out"), chunk=1)
    items = [Item(name, "Rain.", prompt=str(tmp_path / f"prompt-{name}.wav")) for name in "ab"]
    for name in "ab":
        (tmp_path / f"prompt-{name}.wav").write_bytes(b"one")

    def planned() -> list[str]:
        return [chunk.name for chunk in system_evaluation.plan(config, items, []).chunks]

    before = planned()
    assert planned() == before
    (tmp_path / "prompt-b.wav").write_bytes(b"another")
    after = planned()
    assert after[0] == before[0] and after[1] != before[1]
