import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from infra import storage
from pipeline import demo_chain
from pipeline.evaluation_sets import read
from pipeline.speakers import Speaker, read_speakers
from pipeline.utterances import Unusable

ROWS = [("train-0", 3), ("heldout-0", 1), ("heldout-1", 3), ("heldout-2", 2)]


@pytest.fixture
def corpus(tmp_path):
    tone = 0.1 * np.sin(np.arange(24_000) / 20).astype(np.float32)
    with (tmp_path / "manifest.jsonl").open("w") as file:
        for name, count in ROWS:
            for number in range(count):
                audio = f"{name}-{number}.wav"
                soundfile.write(tmp_path / audio, tone, 24_000)
                row = {"id": audio, "audio": audio, "text": f"Number {number}.", "speaker": name}
                file.write(json.dumps(row | {"split": name.split("-")[0]}) + "\n")
    return str(tmp_path)


def test_speakers_kept_aside_are_enrolled_without_the_recording_they_are_compared_with(corpus):
    chosen = demo_chain.unseen_speakers(corpus, 2)
    assert list(chosen) == ["heldout-1", "heldout-2"]
    people, said = demo_chain.write_inputs(corpus, chosen)
    enrolled = list(read_speakers(people))
    assert [(type(s), s.name, len(s.samples)) for s in enrolled] == [
        (Speaker, "heldout-1", 2),
        (Speaker, "heldout-2", 1),
    ]
    items, rejects = read(said)
    assert not rejects and [item.voice for item in items] == list(chosen)
    tuned = {sample.audio for speaker in enrolled for sample in speaker.samples}
    assert not tuned & {item.prompt for item in items}
    with pytest.raises(Unusable, match="keeps 2 usable speakers aside"):
        demo_chain.unseen_speakers(corpus, 3)


def test_the_page_shows_each_voice_beside_its_recording_and_what_was_typed(corpus, tmp_path):
    demo_chain.write_inputs(corpus, demo_chain.unseen_speakers(corpus, 2))
    speech = tmp_path / "judged/speech"
    speech.mkdir(parents=True)
    soundfile.write(speech / "heldout-1.wav", np.full(2400, 0.1, np.float32), 24_000)
    counts = {"words": 12, "word_errors": 2, "likeness": 0.71, "mos": 3.2}
    scores = [
        {"system": "model", "id": "heldout-1", "heard": "good <morning>", **counts},
        {
            "system": "model",
            "id": "heldout-2",
            "missing": "no-recording",
            "words": 12,
            "word_errors": 12,
            "likeness": 0.0,
        },
    ]
    (tmp_path / "judged/scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    steps = [demo_chain.Step("a corpus", "python jobs/x.py", 61.4), demo_chain.Step("voices", "python jobs/y.py", 9.6)]
    page = Path(demo_chain.write_page(corpus, str(tmp_path / "judged"), steps)).read_text()
    assert page.count("<audio") == 3 and "good &lt;morning&gt;" in page and "2 of 12 words" in page
    assert "python jobs/x.py" in page and ">71<" in page.replace("</td>", "<")
    assert "below: heldout-2." in page and "missing no-recording" in page


def test_what_is_there_is_shown_where_a_voice_is_missing(corpus, monkeypatch, capsys):
    """The commands are acted; one speaker was refused, and one sentence is missing for it."""
    from jobs import demo

    asked = []

    def acted(what: str, words: list[str], steps: list) -> int:
        asked.append(words[0])
        steps.append(demo_chain.Step(what, words[0], 1.0))
        if words[0] == "jobs/evaluate.py":
            lost = {"system": "model", "missing": "unknown-voice", "words": 12, "word_errors": 12, "likeness": 0.0}
            scores = [lost | {"id": "heldout-1"}, lost | {"id": "heldout-2"}]
            storage.write_text(f"{corpus}/evaluation/scores.jsonl", "".join(json.dumps(row) + "\n" for row in scores))
        return codes.get(words[0], 0)

    monkeypatch.setattr(demo, "typed", acted)
    monkeypatch.setattr(sys, "argv", ["demo", "--output", corpus, "--skip-training"])
    codes = {"jobs/enroll.py": 3, "jobs/evaluate.py": 3}
    assert demo.main() == 3 and asked[-2:] == ["jobs/enroll.py", "jobs/evaluate.py"]
    assert "unknown-voice" in Path(corpus, "index.html").read_text() and "open      " in capsys.readouterr().out
    codes = {"jobs/enroll.py": 1}
    assert demo.main() == 1 and asked[-1] == "jobs/enroll.py"
