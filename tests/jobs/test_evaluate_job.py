"""Systems judged as a user types it: real recordings, a system that lacks one, another command that goes on."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pipeline.system_evaluation import figures


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
    words += ["--tracking", "none"]

    done = typed(project, tmp_path, *words)
    assert done.returncode == 3, done.stderr[-3000:]
    assert "| reference | 100.0" in done.stdout and "| codec | 100.0" in done.stdout and "| copy | 66.7" in done.stdout
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
