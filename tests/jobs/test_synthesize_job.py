"""Speech as a user types for it: one text, and a script in bulk that is interrupted and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import read_card
from pipeline import bulk_synthesis
from pipeline.bulk_synthesis import codec_of
from pipeline.plan import PlanError
from pipeline.scripts import ScriptError
from pipeline.speaking_voices import read_voice
from pipeline.speech_files import decode
from pipeline.speech_lines import Line, derived
from pipeline.speech_stage import synthesizer_of
from pipeline.synthesis import read_model
from pipeline.synthesize_config import SynthesizeConfig
from tests.pipeline.speaking_model import write_speaker, write_voice

TEXTS = [
    "The boat sailed past.",
    "Seven birds sang about rain. Was it a quiet green island?",
    "Old stone walls, nothing else.",
]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker")
    model, codec = write_speaker(folder, ends=1.5)
    write_voice(folder / "voices" / "home" / "ann.safetensors", model)
    other, _ = write_speaker(folder / "other", seed=1)
    write_voice(folder / "voices" / "foreign.safetensors", other)
    return ["--model", model, "--codec", codec, "--voice", str(folder / "voices/home/ann.safetensors")]


def typed(project, folder, *words):
    command = [sys.executable, str(project / "jobs" / "synthesize.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_a_text_becomes_a_file_that_says_what_it_is(project, speaker, tmp_path):
    words = ["--text", TEXTS[1], "--out", "out/x.flac", "--seed", "3", "--retries", "1", *speaker]
    done = typed(project, tmp_path, *words)
    assert done.returncode == 3, done.stderr[-2000:]  # a model that has learnt nothing fails, and that is told
    assert "out/x.flac" in done.stdout and "faults: " in done.stdout and "sentences" in done.stderr
    samples, rate, told = decode((tmp_path / "out/x.flac").read_bytes())
    assert rate == 24_000 and len(samples) > 2400 and told.synthetic and told.text == TEXTS[1]
    assert told.model == read_card(Path(speaker[1], "config.json").read_bytes()).fingerprint
    assert told.voice == "ann" and told.consent == "Ann Example, 2025-03-01: tests"
    assert told.details["seed"] == 3 and told.details["report"]["attempts"] == 4


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--text", "Hello.", "--out", "x.mp3"], "x.mp3: speech is written as .wav, .flac, .opus"),
        (["--text", "Hello.", "--out", "/dev/null/x.wav"], "/dev/null/x.wav cannot be written"),
        (["--text", "🎉"], "not-speakable"),
        (["--text", "Hello.", "--codec", "demo"], "belongs to another codec"),
        (["--text", "Hello.", "--temperature", "-1"], "temperature must be"),
        (["--text", "Hello.", "--model", "nowhere"], "nowhere is no model"),
        (["--text", "Hello.", "--voice", "no.safetensors"], "voice no.safetensors cannot be read"),
        (["--text", "Hello.", "--script", "x"], "either --text or --script"),
    ],
)
def test_wrong_commands_are_refused(monkeypatch, capsys, speaker, tmp_path, words, reason):
    from jobs import synthesize

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["synthesize", *speaker, *words])
    try:
        code = synthesize.main()
    except SystemExit as error:
        code = error.code
    assert code == 2 and reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_embedded_model_and_codec_speak_unless_others_are_named(monkeypatch, project, tmp_path):
    from jobs import synthesize

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["synthesize", "--text", "Good morning.", "--out", "x.wav"])
    assert synthesize.main() == 0
    samples, rate, told = decode((tmp_path / "x.wav").read_bytes())
    embedded = read_card((project / "model/weights/lina-demo/config.json").read_bytes())
    assert rate == 24_000 and 0.3 < len(samples) / rate < 5 and np.abs(samples).max() > 0.01
    assert told.model == embedded.fingerprint and told.details["report"]["faults"] == []


def test_without_an_embedded_model_one_is_to_be_named(monkeypatch, capsys, tmp_path):
    from jobs import synthesize

    monkeypatch.setattr(synthesize, "DEMO_MODEL", SynthesizeConfig(text="x").model)
    monkeypatch.setattr(synthesize.os.path, "isdir", lambda path: False)
    monkeypatch.setattr(sys, "argv", ["synthesize", "--text", "Hello."])
    assert synthesize.main() == 2
    assert "no embedded model; name an exported one with --model" in capsys.readouterr().err


def test_help_does_not_wait_for_heavy_libraries(project):
    code = "import sys; sys.argv = ['x', '--help']\ntry:\n import jobs.synthesize as s; s.main()\n"
    code += "except SystemExit: print(sorted({'torch', 'ray', 'numpy', 'pyarrow', 'nltk'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip().endswith("[]") and "--script" in shown.stdout, shown.stdout[-300:] + shown.stderr


def config(speaker, folder, **changes) -> SynthesizeConfig:
    values = {"script": str(folder / "lines.jsonl"), "output": str(folder / "wavs"), "device": "cpu", "retries": 0}
    values |= {"chunk": 4, "rows": 3, "model": speaker[1], "codec": speaker[3], "actors": 1}
    values["voices"] = str(Path(speaker[5]).parents[1])
    return SynthesizeConfig(**values | changes)


def write_script(folder, count: int = 10):
    rows = [{"id": f"book/{n}.a", "text": TEXTS[n % 3], "voice": ["", "home/ann"][n % 2]} for n in range(count)]
    lines = [json.dumps(row) for row in rows]
    lines[2:2] = ["no json", '{"id": "../up", "text": "x"}', '{"text": "x"}', "", lines[0], '{"id": "silent"}']
    lines.append('{"id": "emoji", "text": "🎉"}')
    for voice in ("nobody", "foreign", "../home/ann"):
        lines.append(json.dumps({"id": f"zoë, {voice[:3]}", "text": "Rain.", "voice": voice}))
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")


def perform(config: SynthesizeConfig):
    bulk = bulk_synthesis.plan(config)
    rows = []
    bulk_synthesis.run(bulk, rows.extend)
    return bulk_synthesis.finish(bulk), rows


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.wav")}


def test_a_script_in_bulk_is_resumed(local_ray, speaker, tmp_path):
    write_script(tmp_path)
    summary, rows = perform(config(speaker, tmp_path))
    wanted = {f"book/{n}%2Ea.wav" for n in range(10)}
    output = tmp_path / "wavs"
    made = files(output)
    assert set(made) == wanted and len(rows) == 14
    assert summary["lines"] == 19 and summary["spoken"] == 10 and summary["attempts"] == summary["pieces"] == 13
    assert summary["rejects"] == {
        "phonemise/not-speakable": 1,
        "script/bad-id": 2,
        "script/duplicate-id": 1,
        "script/no-text": 1,
        "script/not-json": 1,
        "voice/bad-voice": 1,
        "voice/unknown-voice": 1,
        "voice/unusable-voice": 1,
    }
    manifest = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in manifest] == [f"book/{n}.a" for n in range(10)]
    quarantine = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert {row.get("where") for row in quarantine} >= {"lines.jsonl:3", "lines.jsonl:4"} and len(quarantine) == 9
    heard = {row["id"]: decode((output / row["file"]).read_bytes()) for row in manifest}
    assert all(row["seconds"] == pytest.approx(len(heard[row["id"]][0]) / 24_000, abs=1e-3) for row in manifest)
    assert [heard[row["id"]][2].voice for row in manifest] == ["", "home/ann"] * 5
    assert heard["book/1.a"][2].consent and not heard["book/0.a"][2].consent
    assert bulk_synthesis.bad_fraction(summary) == (9 + summary["failed"]) / 19

    assert perform(config(speaker, tmp_path)) == (summary, [])
    # Interrupted before a chunk was done; a file cut off; a line that was changed, and one that was added.
    (chunk,) = output.glob(".synthesis/000001-*.jsonl")
    chunk.unlink()
    damaged = output / "book/1%2Ea.wav"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 8])
    (output / "book/.2.wav.part-0badcafe").write_bytes(b"left by a killed writer")
    script = (tmp_path / "lines.jsonl").read_text().replace(TEXTS[0], "The boat sank.", 1)
    (tmp_path / "lines.jsonl").write_text(script + '{"id": "more", "text": "Rain again."}\n')
    longer, rows = perform(config(speaker, tmp_path))
    after = files(output)
    assert longer["spoken"] == 11 and len(rows) == 15 - 4  # one chunk of four is as it was
    assert {n for n in after if after[n] != made.get(n)} == {"more.wav", "book/0%2Ea.wav", "book/1%2Ea.wav"}
    assert damaged.read_bytes() == whole and not list(output.rglob("*.part-*"))
    assert chunk.exists() and len(list(output.glob(".synthesis/*.jsonl"))) == 4
    manifest = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert [row["text"] for row in manifest][::10] == ["The boat sank.", "Rain again."]
    with pytest.raises(PlanError, match="seed: 0 → 5"):
        bulk_synthesis.plan(config(speaker, tmp_path, seed=5))
    with pytest.raises(ScriptError, match=r"no\.jsonl cannot be read"):
        bulk_synthesis.plan(config(speaker, tmp_path, script=str(tmp_path / "no.jsonl"), output=str(tmp_path / "n")))


def test_any_text_and_any_speakers_name_is_said_or_told(local_ray, speaker, tmp_path):
    """Characters at which some readers end a line, halves of surrogate pairs, names that no plain file could have."""
    for name in ("Ada%20Lovelace", "J%2E%20Smith", "book%2Freader"):
        write_voice(tmp_path / "voices/shared" / f"{name}.safetensors", speaker[1])
    voices = ["Ada Lovelace", "J. Smith", "book/reader", "shared/Ada Lovelace", ""]
    rows = [{"id": f"v{n}", "text": "Rain.", "voice": voice} for n, voice in enumerate(voices)]
    rows += [{"id": "line", "text": "Good\u2028morning,\u2029green\x85island."}, {"id": "half", "text": "Rain \ud800."}]
    rows += [{"id": "\ud800", "text": "Rain."}, {"id": "a\u2028b", "text": "Rain."}]
    rows += [{"id": "odd", "text": "Rain.", "voice": "\ud800"}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = config(speaker, tmp_path, voices=str(tmp_path / "voices/shared"), chunk=20)
    summary, _ = perform(asked)
    assert perform(asked) == (summary, [])
    output = tmp_path / "wavs"
    made = {row["id"]: row for row in map(json.loads, (output / "manifest.jsonl").read_text().splitlines())}
    bad = {row["id"]: row for row in map(json.loads, (output / "quarantine.jsonl").read_text().splitlines())}
    assert made.keys() | bad.keys() == {row["id"] for row in rows} and not made.keys() & bad.keys()
    assert {"v0", "v1", "v2", "v4", "line", "a\u2028b"} <= made.keys() and made["line"]["text"] == rows[5]["text"]
    assert [decode((output / made[id]["file"]).read_bytes())[2].voice for id in ("v0", "v1", "v2")] == voices[:3]
    assert bad["\ud800"]["reason"] == "bad-id" and bad["odd"]["reason"] == "bad-voice"
    assert bad["v3"]["reason"] == "unknown-voice" and "shared/Ada%20Lovelace.safetensors" in bad["v3"]["detail"]
    # From the folder above, a voice is named with its tenant.
    output = tmp_path / "above"
    perform(config(speaker, tmp_path, voices=str(tmp_path / "voices"), chunk=20, output=str(output)))
    assert "v3" in {json.loads(row)["id"] for row in (output / "manifest.jsonl").read_text().splitlines()}


def test_bulk_says_what_each_line_says_alone(local_ray, speaker, tmp_path):
    write_script(tmp_path, 5)
    asked = config(speaker, tmp_path, dtype="float64", format="flac", chunk=50)
    summary, _ = perform(asked)
    assert summary["spoken"] == 5
    files = read_model(asked.model)
    synthesizer = synthesizer_of(asked, files, codec_of(asked, files))
    voice = read_voice(speaker[5], synthesizer.card)
    for number in range(5):
        line = Line(TEXTS[number % 3], voice if number % 2 else None, derived(asked.seed, f"book/{number}.a"))
        alone = synthesizer.say(line)
        samples, _, _ = decode((tmp_path / f"wavs/book/{number}%2Ea.flac").read_bytes())
        assert np.abs(samples - np.clip(alone.samples, -1, 1)).max() < 1e-4
