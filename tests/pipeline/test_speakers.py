"""Who is to be enrolled: JSONL, folders, consent, and what of them cannot be used."""

import json

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from infra import storage
from pipeline.keys import id_of
from pipeline.manifests.errors import ManifestError
from pipeline.speakers import Consents, Speaker, file_key, read_speakers
from pipeline.utterances import Reject, Unusable
from tests.corpora import voiced
from tests.pipeline.speech_samples import CONSENT

GOOD = {"speaker": "ann", "samples": [{"audio": "a.wav", "text": "One."}, "b.wav"], "consent": CONSENT}


def write_lines(folder, *rows):
    file = folder / "speakers.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(file)


def test_a_line_is_a_speaker(tmp_path):
    (speaker,) = read_speakers(write_lines(tmp_path, GOOD))
    assert speaker.name == speaker.key == "ann" and speaker.consent == CONSENT and speaker.where == "speakers.jsonl:1"
    assert [(s.audio, s.text) for s in speaker.samples] == [(f"{tmp_path}/a.wav", "One."), (f"{tmp_path}/b.wav", None)]
    other = GOOD | {"samples": [{"audio": "a.wav", "text": "Two."}, "b.wav"]}
    assert next(read_speakers(write_lines(tmp_path, other))).told != speaker.told


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not-json"),
        ("[]", "not-json"),
        (GOOD | {"speaker": " "}, "no-speaker"),
        (GOOD | {"speaker": "../x"}, "bad-id"),
        (GOOD | {"speaker": "x" * 200}, "id-too-long"),
        ({"speaker": "ann", "samples": ["a.wav"]}, "no-consent"),
        (GOOD | {"consent": {"who": "Ann", "when": "today"}}, "no-consent"),
        (GOOD | {"consent": CONSENT | {"scope": " "}}, "no-consent"),
        (GOOD | {"consent": "yes"}, "no-consent"),
        (GOOD | {"samples": []}, "no-samples"),
        (GOOD | {"samples": "a.wav"}, "no-samples"),
        (GOOD | {"samples": [{"text": "One."}]}, "missing-audio"),
        (GOOD | {"samples": [{"audio": "a.wav", "text": 5}]}, "bad-field"),
        (GOOD | {"samples": [7]}, "bad-field"),
    ],
)
def test_a_bad_line_is_told_and_the_rest_goes_on(tmp_path, row, reason):
    parts = list(read_speakers(write_lines(tmp_path, row, "", GOOD, GOOD)))
    assert isinstance(parts[0], Reject) and (parts[0].reason, parts[0].where) == (reason, "speakers.jsonl:1")
    assert isinstance(parts[1], Speaker) and parts[1].where == "speakers.jsonl:3"
    assert parts[2].reason == "duplicate-speaker" and len(parts) == 3


def test_a_folder_holds_a_folder_a_speaker(tmp_path):
    random = np.random.default_rng(0)
    for name in ("ann", "bob", "none", ".hidden"):
        (tmp_path / "all" / name).mkdir(parents=True)
    for file in ("ann/1.wav", "ann/2.flac", "bob/1.wav", ".hidden/1.wav"):
        soundfile.write(tmp_path / "all" / file, voiced(random, 0.5, 16_000), 16_000)
    (tmp_path / "all/ann/1.txt").write_text(" One.\n")
    (tmp_path / "all/ann/notes.md").write_text("not a sample")
    (tmp_path / "all/ann/consent.json").write_text(json.dumps(CONSENT))
    ann, bob, none = read_speakers(str(tmp_path / "all"))
    assert [(s.id, s.text) for s in ann.samples] == [("1", "One."), ("2", None)] and ann.consent == CONSENT
    assert bob.reason == "no-consent" and none.reason == "no-consent"
    (tmp_path / "consents.json").write_text(json.dumps(CONSENT))
    again = list(read_speakers(str(tmp_path / "all"), Consents(str(tmp_path / "consents.json"))))
    assert [getattr(part, "reason", "") for part in again] == ["", "", "no-samples"]


def test_a_folder_that_may_not_be_read_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    for name in ("ann", "bob"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "1.wav", np.zeros(1600), 16_000)
        (tmp_path / name / "consent.json").write_text(json.dumps(CONSENT))
    names = storage.names

    def forbidden(url: str) -> list[str]:
        if url.endswith("ann"):
            raise PermissionError(13, "Permission denied", url)
        return names(url)

    monkeypatch.setattr(storage, "names", forbidden)
    ann, bob = read_speakers(str(tmp_path))
    assert isinstance(bob, Speaker) and isinstance(ann, Reject) and ann.reason == "unreadable-folder"
    assert "Permission denied" in ann.detail and ann.where == str(tmp_path / "ann")


def test_consent_in_bulk(tmp_path):
    bob = CONSENT | {"who": "Bob"}
    file = tmp_path / "consent"

    def of(content, speaker, given=None):
        file.write_text(content)
        return Consents(str(file)).of(speaker, given)["who"]

    lines = "\n".join(json.dumps({"speaker": name, **record}) for name, record in (("ann", CONSENT), ("bob", bob)))
    assert of(lines, "bob") == "Bob" and of(json.dumps({"bob": bob}), "bob") == "Bob"
    assert of(json.dumps({"speaker": "bob", "consent": bob}), "bob") == "Bob"
    assert of(json.dumps(bob), "anybody") == "Bob" and of(json.dumps(bob), "ann", CONSENT) == "Ann Example"
    assert of(lines, "bob", CONSENT) == "Bob"
    for content, speaker in ((lines, "carl"), (json.dumps({"bob": {"who": "Bob"}}), "bob"), ("{}", "ann")):
        with pytest.raises(Unusable, match="no-consent"):
            of(content, speaker)
    for content in ("nothing", "[1, 2]", '{"speaker": "ann"}\n7'):
        with pytest.raises(ManifestError, match="consent"):
            of(content, "ann")


def test_nothing_there_is_said_at_once(tmp_path):
    with pytest.raises(ManifestError, match=r"none\.jsonl"):
        next(read_speakers(str(tmp_path / "none.jsonl")))
    with pytest.raises(ManifestError, match="none"):
        Consents(str(tmp_path / "none"))


@given(st.text(min_size=1, max_size=30))
def test_a_file_has_one_name_and_the_speaker_can_be_read_from_it(name):
    try:
        key = file_key(name)
    except Unusable as error:
        assert error.reason in ("bad-id", "id-too-long")
        return
    assert "/" not in key and "." not in key and id_of(key) == name
