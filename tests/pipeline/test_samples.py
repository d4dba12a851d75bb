"""Samples beside their recordings, and shards that are damaged in any way: told, never a crash."""

import hashlib
import types

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from jobs.verify import here
from pipeline import codec_weights, samples, shards, validation, verification
from pipeline.plan import Plan, read_rows, shard_digest
from pipeline.planning import Sizes, make_round
from pipeline.shards import Sample
from pipeline.stages import Job, Write
from pipeline.tokenize_config import TokenizeConfig, identity
from pipeline.utterances import Unusable, Utterance
from tests.corpora import voiced

RATE = 24_000
CODEC = {"name": "tests", "digest": "0", "sample_rate": RATE, "frame_rate": 75, "codebooks": 8, "codebook_size": 1024}


def plan_of(folder, **changes) -> Plan:
    return Plan(identity(TokenizeConfig(**changes)), CODEC, "codec", {"sha256": "0"}, f"{folder}/", {})


@pytest.fixture
def stereo(tmp_path):
    """Two different voices, the right one with every tenth sample at full scale."""
    left, right = (voiced(np.random.default_rng(n), 1.0, RATE) for n in (0, 1))
    right[::10] = 1.0
    soundfile.write(tmp_path / "both.wav", np.stack([left, right], 1), RATE, "FLOAT")
    return left, right


def sample_of(**source) -> Sample:
    meta = {"id": "a", "text": "hello", "source": {"audio": "both.wav", "start": 0.0, "duration": None, **source}}
    return Sample("a", np.zeros((8, 75), np.uint16), "HH", meta)


def test_a_recording_comes_back_from_its_channel_under_the_plans_limits(tmp_path, stereo):
    left, right = stereo
    assert np.array_equal(samples.original(plan_of(tmp_path), sample_of(channel=0)), left)
    lenient = plan_of(tmp_path, max_clipped_fraction=0.2)
    assert np.array_equal(samples.original(lenient, sample_of(channel=1)), right)
    with pytest.raises(Unusable, match="clipped"):
        samples.original(plan_of(tmp_path), sample_of(channel=1))


@pytest.mark.parametrize("channel, kept", [(None, {}), (1, {"channel": 1})])
def test_a_sample_tells_its_channel_where_there_is_one(channel, kept):
    job = Job(TokenizeConfig(), "", "", (), CODEC, {})
    planned = {"id": "a", "key": "a", "speaker": "", "language": "en", "extra": "", "channel": channel}
    planned |= {"audio": "both.wav", "start": 0.0, "duration": None}
    row = {"text": "hello", "samples": RATE, "phones": "HH", "codes": np.zeros(600, np.uint16).tobytes()}
    source = Write(job)._sample(planned, row).meta["source"]
    assert source == {"audio": "both.wav", "start": 0.0, "duration": None, **kept}


def test_samples_without_their_recordings_are_left_out_and_counted(tmp_path, stereo, capsys):
    gone = [sample_of(audio="gone.wav"), sample_of(channel=1)]
    there = sample_of(channel=0)
    assert [sample for sample, _ in here(plan_of(tmp_path), [*gone, there])] == [there]
    assert "2 of 3 samples" in capsys.readouterr().out
    assert here(plan_of(tmp_path), gone) == []


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A shard of four samples as a job leaves it, without the job."""
    output = str(tmp_path_factory.mktemp("dataset"))
    items = [Utterance(f"u{n}", f"/corpus/{n}.wav", "hello", "s", duration=1.0 + n) for n in range(4)]
    round_, _ = make_round(items, TokenizeConfig(), Sizes(1200.0, "/corpus"), "plan.parquet", output=output)
    plan = plan_of("/corpus").with_round(round_)
    random = np.random.default_rng(0)
    made = [
        Sample(item.id, random.integers(0, 1024, (8, 75 * (n + 1))).astype(np.uint16), "HH", {"seconds": n + 1.0})
        for n, item in enumerate(items)
    ]
    made = [sample._replace(meta=sample.meta | {"speaker": "s"}) for sample in made]
    facts = {"plan": shard_digest(read_rows(output, round_, 0)), "codec": CODEC, "versions": {}}
    shards.write_shard(output, 0, made, [], facts)
    return types.SimpleNamespace(url=output, plan=plan)


def damaged(dataset, url, data):
    with open(url, "rb") as file:
        whole = file.read()
    try:
        with open(url, "wb") as file:
            file.write(data(whole))
        return verification.check_shard(dataset.plan, dataset.url, 0).faults
    finally:
        with open(url, "wb") as file:
            file.write(whole)


@given(place=st.integers(0, 10**9), value=st.integers(1, 255), cut=st.booleans())
def test_any_damage_to_a_tar_is_its_sha256_first_of_all(dataset, place, value, cut):
    def damage(whole: bytes) -> bytes:
        at = place % len(whole)
        return whole[:at] if cut else whole[:at] + bytes([whole[at] ^ value]) + whole[at + 1 :]

    assert verification.check_shard(dataset.plan, dataset.url, 0).faults == []
    faults = damaged(dataset, shards.tar_url(dataset.url, 0), damage)
    assert faults and "sha256" in faults[0].what and {fault.where for fault in faults} == {"000000"}


@pytest.mark.parametrize("url", [shards.sidecar_url, shards.index_url])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\x00"])
def test_what_stands_beside_a_tar_is_named_when_damaged(dataset, url, content):
    assert damaged(dataset, url(dataset.url, 0), lambda whole: content)


def test_a_header_that_is_no_tar_is_a_fault(dataset):
    faults = damaged(dataset, shards.tar_url(dataset.url, 0), lambda whole: hashlib.sha256(whole).digest() * 64)
    assert ["sha256" in faults[0].what, "ReadError" in faults[-1].what] == [True, True]


def test_a_validation_looks_for_its_codec_once_and_never_on_the_internet(tmp_path, monkeypatch, capsys):
    def fetched(_):
        raise AssertionError("EnCodec's weights were fetched")

    monkeypatch.setenv("LINA_RAY_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(codec_weights, "_encodec_file", fetched)
    Plan({}, CODEC, "encodec_24khz", {}, "", {}).save(str(tmp_path))
    config, codes = types.SimpleNamespace(data=str(tmp_path)), [np.zeros((8, 3), np.int64)]
    assert validation._decoded(config, codes) is None and validation._decoded(config, codes) is None
    assert capsys.readouterr().out.count("nothing to hear: EnCodec's weights are not at hand") == 1
