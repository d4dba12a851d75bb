"""Experiments as a user types them: what is refused before any work, and how fast it says so."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "NAME"),
        (["ist-abalation"], "invalid choice"),
        (["ist-ablation"], "needs speakers that the model never heard"),
        (["robustness", "--ranks", "1,-2"], "ranks must be different numbers at least 0"),
        (["data-amount", "--amounts", "soon"], "amounts must be comma-separated floats"),
        (["robustness", "--conditions", "noise"], "'noise' is not clean, noise:DB"),
    ],
)
def test_wrong_commands_are_refused_at_once(monkeypatch, capsys, tmp_path, words, message):
    from jobs import experiments

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments.os.path, "isdir", lambda path: True)
    monkeypatch.setattr(sys, "argv", ["experiments", *words])
    try:
        code = experiments.main()
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_an_embedded_model_one_is_to_be_named(monkeypatch, capsys):
    from jobs import experiments

    monkeypatch.setattr(experiments.os.path, "isdir", lambda path: False)
    monkeypatch.setattr(sys, "argv", ["experiments", "robustness", "--speakers", "x.jsonl"])
    assert experiments.main() == 2
    assert "no embedded model; name an exported one with --model" in capsys.readouterr().err


def test_help_does_not_wait_for_heavy_libraries(project):
    code = "import sys; sys.argv = ['x', '--help']\ntry:\n import jobs.experiments as e; e.main()\n"
    code += "except SystemExit: print(sorted({'torch', 'ray', 'numpy', 'pyarrow', 'nltk'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip().endswith("[]") and "--lora-ranks" in shown.stdout, shown.stdout[-300:] + shown.stderr


def test_a_speaker_is_heard_and_judged_and_recordings_that_are_gone_are_told_without_a_stack(
    monkeypatch, capsys, tmp_path, local_ray
):
    from jobs import experiments
    from tests.pipeline.speaking_model import write_speaker
    from tests.pipeline.speech_samples import write_speakers

    def typed(listen: int) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["experiments", *words.split(), "--listen", str(listen)])
        return experiments.main(), capsys.readouterr().err

    model, codec = write_speaker(tmp_path, ends=1.5)
    speakers = write_speakers(tmp_path / "speakers", 2, 4)
    words = f"ist-ablation --model {model} --codec {codec} --speakers {speakers} --people 2 --steps 1 --ranks 1 "
    words += "--lora-ranks= --lrs 0.1 --prompts 1 --device cpu --tracking none --recogniser whisper-tiny.en "
    words += "--held-out 0.5 --sentences 1"  # one that voices are held against, one that is heard as it was recorded
    monkeypatch.chdir(tmp_path)
    code, told = typed(listen=1)
    assert (code, "Traceback" in told) == (0, False), told[-3000:]
    found = json.loads((tmp_path / "out/experiments/ist-ablation/results.json").read_text())
    report, heard = (tmp_path / "out/experiments/report.md").read_text(), found["summary"]["heard"]
    originals = ["recorded speech", "recorded speech through the codec"]
    assert [row["system"] for row in heard] == [*originals, *(row["method"] for row in found["summary"]["rows"])]
    for cell, row in zip(found["cells"], heard, strict=True):
        (said,) = cell["result"]["spk-000"]["speech"]
        assert "speech" not in cell["result"].get("spk-001", {})
        wrong, likeness = row["wer"]["value"], row["similarity"]["value"]
        assert (wrong, likeness) == pytest.approx((said["word_errors"] / said["words"], said["likeness"]))
        (line,) = (line for line in report.splitlines() if line.startswith(f"| {row['system']} | 100.0 ["))
        assert f" | {100 * wrong:.1f} [" in line and f" | {likeness:.3f} [" in line
    recorded, decoded = (row["similarity"]["value"] for row in heard[:2])
    assert decoded < recorded < 0.99  # not of a recording with itself

    for file in speakers.parent.glob("*.wav"):
        file.unlink()
    code, told = typed(listen=2)
    assert (code, "Traceback" in told) == (2, False) and "experiments: missing-file: " in told, told[-3000:]


def test_an_experiment_is_done_and_tracked(project, tracking_uri, tmp_path):
    """Decoding of untrained twins, which needs neither model nor data."""
    from mlflow import MlflowClient

    command = [sys.executable, str(project / "jobs" / "experiments.py"), "gla-vs-attention", "--output", "out"]
    command += ["--batches", "1,2", "--seconds", "0.2,0.4", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "audio-s/s, gla" in done.stdout and (tmp_path / "out/gla-vs-attention/decoding.png").stat().st_size > 5000
    assert "`gla-vs-attention`" in (tmp_path / "out/report.md").read_text()
    client = MlflowClient(tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("experiments").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["audio_rate.gla.2"] > 0
    assert {"results.json", "report.md", "decoding.png"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }
