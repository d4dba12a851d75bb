"""Voices as a user asks for them: what cannot be read or written is told with the option that named it."""

import sys

import pytest

from tests.pipeline.speaking_model import write_speaker, write_voice


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--out", "x.safetensors", "--model", "nowhere"], "--model nowhere is no model: config.json cannot be read"),
        (["--out", "x.safetensors", "--model", "damaged"], "--model damaged is no model: config.json cannot be read"),
        (["--out", "file/x.safetensors"], "--out file/x.safetensors cannot be written"),
        (["--out", "voices"], "--out voices cannot be written"),
        (["--out", "nothing://x"], "--out nothing://x cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_told(monkeypatch, capsys, tmp_path, words, reason):
    from jobs import voices

    model, _ = write_speaker(tmp_path)
    write_voice(tmp_path / "voices/shared/ann.safetensors", model)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{}")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["voices", "export", "ann", "--voices", "voices", *words])
    assert voices.main() == 2
    assert capsys.readouterr().err.startswith(f"voices: {reason}")
    assert not (tmp_path / "x.safetensors").exists()
