"""Lengths and pauses of recordings are looked for again where the storage fails."""

import numpy as np
import pytest
import soundfile

from infra import storage
from pipeline import lengths, recording, tokenization
from pipeline.tokenize_config import TokenizeConfig
from pipeline.utterances import Utterance
from tests.corpora import voiced

CONFIG = TokenizeConfig(segment_seconds=1.0, max_seconds=2.0, keep_untranscribed=True)


@pytest.fixture
def three_seconds(tmp_path):
    soundfile.write(tmp_path / "a.wav", voiced(np.random.default_rng(0), 3.0, 16_000), 16_000)
    return Utterance("a", str(tmp_path / "a.wav"))


@pytest.fixture
def fail(monkeypatch):
    """Makes opening a recording fail at the calls that are named, counted from 0."""
    opened, real = [], recording._open_local

    def at(*calls):
        opened.clear()

        def flaky(url):
            opened.append(url)
            if len(opened) - 1 in calls:
                raise OSError("the storage has a bad moment")
            return real(url)

        monkeypatch.setattr(recording, "_open_local", flaky)

    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    return at


def cut(item):
    return list(lengths.with_lengths([item], CONFIG, lambda recordings: [[(0.0, 3.0)] for _ in recordings]))


def test_a_bad_moment_of_the_storage_changes_no_segment(three_seconds, fail):
    expected = cut(three_seconds)
    assert len(expected) >= 2 and all(type(item) is Utterance and item.duration <= 2.0 for item in expected)
    fail(0, 2)  # probing, and looking for the quietest place
    assert cut(three_seconds) == expected
    fail(0, 1)
    assert tokenization._speech_of(three_seconds.audio) is not None


def test_storage_that_is_down_fails_planning(three_seconds, fail):
    fail(0, 1, 2)
    with pytest.raises(OSError, match="bad moment"):
        cut(three_seconds)
    fail(0, 1, 2)
    with pytest.raises(OSError, match="bad moment"):
        tokenization._speech_of(three_seconds.audio)
