"""Systems judged as a user types it: real recordings, a system that lacks one, another command that goes on."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from model.codec_config import CodecError
from pipeline import scripts
from pipeline.evaluate_config import EvaluateConfig
from pipeline.evaluation_sets import Item
from pipeline.json_lines import read, write
from pipeline.judging import FOLDER
from pipeline.measures import EvaluationError
from pipeline.system_evaluation import figures, finish, plan, read_set, say
from tests.corpora import voiced
from tests.pipeline.speaking_model import write_speaker, write_voice


def typed(project, folder, *words):
    command = [sys.executable, str(project / "jobs" / "evaluate.py"), *words]
    return subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=400)


def test_a_missing_recording_is_all_its_words_wrong_and_nobodys_voice():
    said = {"words": 4, "word_errors": 1, "characters": 20, "character_errors": 2, "likeness": 0.9, "mos": 4.0}
    lost = {"words": 4, "word_errors": 4, "characters": 20, "character_errors": 20, "likeness": 0.0, "missing": "gone"}
    row = figures("a", [said | {"dnsmos": 3.0}, lost], speed=0.5)
    assert {name: figure.value for name, figure in row.figures.items()} == pytest.approx(
        {"coverage": 0.5, "wer": 5 / 8, "cer": 22 / 40, "similarity": 0.45, "mos": 4.0, "dnsmos": 3.0}
    )
    assert row.extra == {"real-time factor": 0.5}


def test_real_recordings_beside_their_codec_and_a_system_that_lacks_one(project, shared_data, tmp_path):
    folder = shared_data / "vctk"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines = sorted(lines, key=lambda line: line["duration"])[:3]
    with (tmp_path / "set.jsonl").open("w") as file:
        for line in lines:
            item = {"id": line["id"], "text": line["text"], "reference": str(folder / line["audio"])}
            file.write(json.dumps(item) + "\n")
    (tmp_path / "wavs").mkdir()
    shutil.copy(folder / lines[0]["audio"], tmp_path / "wavs" / f"{lines[0]['id']}.flac")
    shutil.copy(folder / lines[1]["audio"], tmp_path / "wavs" / f"{lines[1]['id']}.flac")
    words = ["--set", "set.jsonl", "--systems", "copy=wavs", "--codec", "demo", "--output", "out", "--chunk", "3"]
    words += ["--tracking", "none", "--meta", "meta.lst"]

    done = typed(project, tmp_path, *words)
    assert done.returncode == 3, done.stderr[-3000:]
    assert "| reference | 100.0" in done.stdout and "| codec | 100.0" in done.stdout and "| copy | 66.7" in done.stdout
    meta = [f"{line['id']}|||{line['text']}|{folder / line['audio']}" for line in lines]
    assert (tmp_path / "meta.lst").read_text().splitlines() == meta
    scores = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    by_system = {name: [s for s in scores if s["system"] == name] for name in ("reference", "codec", "copy")}
    assert [len(rows) for rows in by_system.values()] == [3, 3, 3]
    assert by_system["copy"][0]["likeness"] == pytest.approx(1.0, abs=1e-3)
    assert by_system["copy"][0]["heard"] == by_system["reference"][0]["heard"] != ""
    assert by_system["copy"][2]["word_errors"] == by_system["copy"][2]["words"] > 0
    assert by_system["codec"][0]["likeness"] < 0.99 and by_system["reference"][0]["likeness"] is None
    report = (tmp_path / "out/report.md").read_text()
    assert f"missing {lines[2]['id']}" in report and (tmp_path / "out/report.png").stat().st_size > 5000

    shutil.copy(folder / lines[2]["audio"], tmp_path / "wavs" / f"{lines[2]['id']}.flac")
    judged = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out/.scores").iterdir()}
    done = typed(project, tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| copy | 100.0" in done.stdout
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out/.scores").iterdir()}
    assert judged.items() <= after.items() and len(after) == len(judged) + 1


def test_a_model_speaks_through_the_codec_that_is_its_own(local_ray, tmp_path):
    model, codec = write_speaker(tmp_path, ends=1.5)
    items = [Item("a", "Good\u2028morning."), Item("b", "Rain \ud800.")]

    def config(**changes) -> EvaluateConfig:
        return EvaluateConfig(set="set.jsonl", model=model, output=str(tmp_path / "out"), **changes)

    for other in ({}, {"codec": "demo"}):  # a codec without a name, which no other can stand in for
        with pytest.raises(CodecError, match="give its folder by --codec"):
            say(config(**other), items)
    with pytest.raises(CodecError, match=r"--codec-weights .*none\.th"):
        say(config(codec="encodec_24khz", codec_weights=str(tmp_path / "none.th")), items)
    say(config(codec=codec), items)
    said = [json.loads(line) for line in (tmp_path / "out/speech/manifest.jsonl").read_text().splitlines()]
    assert said[0]["id"] == "a" and said[0]["text"] == items[0].text


def prompted(folder) -> list[Item]:
    """Four prompts: with its words, without, of a recording that is missing, and beside a voice."""
    model, _ = write_speaker(folder, ends=1.5)
    write_voice(folder / "voices/ann.safetensors", model)
    soundfile.write(folder / "p.wav", voiced(np.random.default_rng(1), 0.8, 16_000), 16_000)
    here, gone = str(folder / "p.wav"), str(folder / "gone.wav")
    told = [Item("own", "Rain."), Item("told", "Rain.", "", here, "Green island.")]
    return [
        *told,
        Item("silent", "Rain.", "", here),
        Item("gone", "Rain.", "", gone, "Green."),
        Item("ann", "Rain.", "ann", here),
    ]


def heard(output) -> dict[str, bytes]:
    return {file.stem: file.read_bytes() for file in (output / "speech").glob("*.wav")}


def test_items_with_a_prompt_are_said_in_its_voice_or_not_at_all(local_ray, tmp_path):
    items, output = prompted(tmp_path), tmp_path / "out"

    def config(**changes) -> EvaluateConfig:
        same = {"set": "set.jsonl", "model": str(tmp_path / "model"), "voices": str(tmp_path / "voices")}
        return EvaluateConfig(**same, codec=str(tmp_path / "codec"), output=str(output), **changes)

    say(config(prompts="ignore"), items)
    ignored = heard(output)
    assert ignored.keys() == {item.id for item in items}
    say(config(), items)
    said = heard(output)
    assert {name for name in said if said[name] != ignored[name]} == {"told"}
    (chunk,) = scripts.read(f"{output}/script.jsonl", 9, {})  # no consent comes with a prompt: others pass it over
    assert not any(line.prompt for line in chunk.lines)
    # Of what was refused, files of another time are there, and are not judged.
    evaluation = plan(config(), items, [])
    lacking = {task.id for chunk in evaluation.chunks for task in chunk.tasks if not task.recording}
    assert lacking == {"silent", "gone"}
    counts = {"words": 1, "word_errors": 1, "characters": 4, "character_errors": 4}
    for chunk in evaluation.chunks:
        scores = [{"system": task.system, "id": task.id, "text": task.text, **counts} for task in chunk.tasks]
        rows = [score | ({"missing": "no-recording"} if score["id"] in lacking else {}) for score in scores]
        write(f"{output}/{FOLDER}/{chunk.name}.jsonl", rows)
    reasons = {row["id"]: row["missing"] for row in finish(evaluation)[1] if "missing" in row}
    assert "give its words as prompt_text" in reasons["silent"] and reasons["gone"].startswith("missing-file: ")
    report = (output / "report.md").read_text()
    assert "- missing silent: no-prompt-text" in report and "the model goes on from the prompt" in report
    # Another recording in the prompt's place is another voice.
    soundfile.write(items[1].prompt, voiced(np.random.default_rng(2), 0.9, 16_000), 16_000)
    say(config(), items)
    again = heard(output)
    assert {name for name in again if again[name] != said[name]} == {"told"}


def test_the_speed_is_that_of_speaking_whenever_it_was_said(local_ray, tmp_path):
    _, codec = write_speaker(tmp_path, ends=1.5)
    items = [Item(str(number), "Good morning, green island.") for number in range(4)]

    def speed(count: int) -> float:
        config = EvaluateConfig(set="x", model=str(tmp_path / "model"), codec=codec, output=str(tmp_path / "out"))
        start = time.monotonic()
        say(config, items[:count])
        spent.append(time.monotonic() - start)
        return plan(config, items[:count], []).speed["model"]

    spent, listed = [], tmp_path / "out/speech/manifest.jsonl"
    first = speed(3)
    rows = read(str(listed))
    assert first == pytest.approx(sum(r["took"] for r in rows) / sum(r["seconds"] for r in rows))
    assert sum(row["took"] for row in rows) < spent[0] / 2  # no start of workers, no loading
    assert speed(3) == first
    longer = speed(4)  # three files are kept, and what is known of them, too
    more = read(str(listed))
    assert ["took" in row for row in more] == [False] * 3 + [True]
    took = sum(row["took"] for row in (*rows, more[3]))
    assert longer == pytest.approx(took / sum(row["seconds"] for row in more))


def test_texts_that_no_file_of_text_can_hold_are_reported_all_the_same(tmp_path):
    from infra import storage

    rows = [{"id": "a", "text": "Good\u2028morning."}, {"id": "b", "text": "Rain \ud800."}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvaluateConfig(set=str(tmp_path / "set.jsonl"), systems=(f"a={tmp_path}",), output=str(tmp_path / "out"))
    items, rejects = read_set(config)
    evaluation = plan(config, items, rejects)
    counts = {"words": 2, "word_errors": 1, "characters": 9, "character_errors": 1, "heard": "rain"}
    scores = [{"system": "a", **row, **counts} for row in rows]
    content = "".join(json.dumps(score, ensure_ascii=score["id"] == "b") + "\n" for score in scores)
    storage.write_text(f"{tmp_path}/out/{FOLDER}/{evaluation.chunks[0].name}.jsonl", content)
    assert finish(evaluation)[1] == scores
    assert "“Rain ?.” → “rain”" in (tmp_path / "out/report.md").read_text()
    with pytest.raises(EvaluationError, match="text that is not valid Unicode"):
        read_set(EvaluateConfig(set=config.set, systems=config.systems, meta=str(tmp_path / "meta.lst")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--set"),
        (["--set", "none.jsonl", "--systems", "a=b"], "none.jsonl cannot be read"),
        (["--set", "none.jsonl", "--systems", "reference=b"], "with a name of its own"),
    ],
)
def test_wrong_commands_are_refused_at_once(project, tmp_path, words, message):
    done = typed(project, tmp_path, *words)
    assert done.returncode == 2 and message in done.stderr
