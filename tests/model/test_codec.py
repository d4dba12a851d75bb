"""The codec: padding changes nothing, files come back as they were, wrong ones are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from model.codec import CONFIG_FILE, WEIGHTS_FILE, Codec
from model.codec_config import CodecConfig, CodecError, CodecIdentity
from model.codec_initial import variance_preserving

SMALL = CodecConfig("small", filters=4, dimension=16, lstm_layers=1, codebooks=4, codebook_size=64)
DILATED = CodecConfig(
    "dilated", filters=4, ratios=(5, 4, 3), dimension=8, residual_layers=2, lstm_layers=0, codebooks=2
)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.random(SMALL, seed=1)


@pytest.fixture(scope="module")
def exact(codec: Codec) -> Codec:
    return Codec(codec.config, codec.weights, dtype="float64")


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=5), position=st.integers(0, 4))
def test_codes_do_not_depend_on_the_batch(exact: Codec, lengths: list[int], position: int) -> None:
    waves = [noise(n, seed=i) for i, n in enumerate(lengths)]
    position %= len(waves)
    alone, together = exact.encode([waves[position]])[0], exact.encode(waves)[position]
    assert alone.shape == (4, -(-lengths[position] // exact.hop))
    assert alone.dtype == np.uint16
    np.testing.assert_array_equal(alone, together)


DEEP = CodecConfig(
    "deep", filters=2, ratios=(2, 5, 6), dimension=8, residual_layers=4, lstm_layers=0, codebooks=2, codebook_size=32
)


def test_the_widest_mirror_is_known() -> None:
    """16 samples of dilated branches where a frame has 2 of them; otherwise 6 frames of the last kernel."""
    assert DEEP.shortest == 9 and SMALL.shortest == DILATED.shortest == 7


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(frames=st.lists(st.integers(1, 24), min_size=2, max_size=5), seed=st.integers(0, 9))
def test_the_shortest_utterance_depends_on_no_other(frames: list[int], seed: int) -> None:
    """Mirrored edges, widest where dilations are, never reach into a batch's padding, in either direction."""
    codec = Codec.random(DEEP, seed=1, dtype="float64")
    waves = [noise(count * codec.hop, seed=seed + i) for i, count in enumerate(frames)]
    together = codec.encode(waves)
    for wave, codes in zip(waves, together, strict=True):
        np.testing.assert_array_equal(codec.encode([wave])[0], codes)
    for codes, wave in zip(together, codec.decode(together), strict=True):
        np.testing.assert_allclose(codec.decode([codes])[0], wave, atol=1e-6)


def test_encoding_leaves_threads_as_they_were(codec: Codec) -> None:
    import threading

    import torch

    seen = []
    for _ in range(3):
        codec.encode([noise(9000, seed=i) for i in range(6)])
        new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        new.start()
        new.join()
    assert seen == [torch.get_num_threads()] * 3


def test_gpus_encode_in_full_precision() -> None:
    import torch

    from model.codec import full_precision

    before = torch.backends.cudnn.allow_tf32
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("config", [SMALL, DILATED])
def test_fast_encoder_gives_the_codes_of_encodecs_modules(config: CodecConfig) -> None:
    fast = Codec.random(config, seed=2)
    if fast.fast is None:
        pytest.skip("this build of PyTorch has no oneDNN")
    # one shorter than the last kernel, one of a single block, one of many blocks with a rest, one whole number of hops
    waves = [noise(n, seed=n) for n in (fast.hop, 7 * fast.hop, 33_333, 32 * fast.hop * 3)]
    modules = Codec(fast.config, fast.weights, dtype="float64").encode(waves)
    for ours, theirs in zip(fast.encode(waves), modules, strict=True):
        assert (ours[0] == theirs[0]).mean() >= 0.995
        assert len(np.unique(theirs[0])) > min(5, theirs.shape[1] // 2)


def test_codes_are_those_of_the_encodec_package() -> None:
    """Its own classes at a smaller size, its own loop, its own weights: given to us as a state dict."""
    import torch

    from model.codec import weights_from_training
    from model.encodec_package import package

    encodec = package()
    torch.manual_seed(0)
    sizes = dict(n_filters=8, dimension=32, causal=True, norm="weight_norm", lstm=2)
    seanet, quantiser = encodec.modules.seanet, encodec.quantization.ResidualVectorQuantizer(32, n_q=8, bins=256)
    encoder, decoder = seanet.SEANetEncoder(**sizes), seanet.SEANetDecoder(**sizes)
    theirs = encodec.EncodecModel(encoder, decoder, quantiser, [6.0], 24_000, 1).eval()
    config = CodecConfig("encodec", filters=8, dimension=32, codebooks=8, codebook_size=256)
    wave = noise(30_000)
    with torch.no_grad():
        variance_preserving(encoder, decoder)
        residual = encoder(torch.from_numpy(wave)[None, None])[0].t()
        for layer in quantiser.vq.layers:
            layer._codebook.embed.copy_(residual[torch.randint(len(residual), (256,))] + 0.3 * torch.randn(256, 32))
            residual = residual - layer.decode(layer.encode(residual.t()[None]))[0].t()
        expected = theirs.encode(torch.from_numpy(wave)[None, None])[0][0][0].numpy()
        audio = theirs.decode([(torch.from_numpy(expected)[None], None)])[0, 0].numpy()
    ours = Codec(config, weights_from_training(config, theirs.state_dict()))
    codes = ours.encode([wave])[0]
    assert codes.shape == expected.shape == (8, 94)
    assert (codes == expected).mean() >= 0.98
    np.testing.assert_allclose(ours.decode([expected])[0], audio, atol=1e-4 * np.abs(audio).max())


def test_real_weights_give_the_published_codes(shared_data: Path) -> None:
    import soundfile
    import soxr

    from infra.storage import cache_folder
    from pipeline.codec_weights import ENCODEC_URL, resolve

    weights = os.environ.get("ENCODEC_WEIGHTS") or str(cache_folder() / Path(ENCODEC_URL).name)
    if not Path(weights).exists() or not (shared_data / "encodec-golden").exists():
        pytest.skip("EnCodec's weights or the clip with its codes are not at hand; set ENCODEC_WEIGHTS=FILE")
    wave, rate = soundfile.read(shared_data / "encodec-golden" / "speech.wav", dtype="float32", always_2d=True)
    wave = soxr.resample(wave.mean(axis=1), rate, 24_000).astype(np.float32)
    codes = resolve("encodec_24khz", weights).build().encode([wave], 8)[0]
    expected = np.load(shared_data / "encodec-golden" / "codes.npy")
    assert codes.shape == expected.shape
    assert (codes[0] == expected[0]).mean() >= 0.95


def test_threads_do_not_change_codes(codec: Codec) -> None:
    waves = [noise(n, seed=n) for n in (5000, 20_000, 9999)]
    one, two = (Codec(codec.config, codec.weights, threads=n).encode(waves) for n in (1, 2))
    assert all((a == b).mean() >= 0.995 for a, b in zip(one, two, strict=True))


def test_fewer_codebooks_are_a_prefix(codec: Codec) -> None:
    wave = noise(8000)
    np.testing.assert_array_equal(codec.encode([wave], 2)[0], codec.encode([wave])[0][:2])


def test_decoded_lengths_and_batch(codec: Codec) -> None:
    codes = codec.encode([noise(4000), noise(12_345)])
    together, alone = codec.decode(codes), codec.decode([codes[0]])[0]
    assert [len(wave) for wave in together] == [item.shape[1] * codec.hop for item in codes]
    np.testing.assert_allclose(together[0], alone, atol=1e-5)
    assert codec.decode([]) == [] and codec.encode([]) == []


def test_saved_and_loaded_is_the_same_codec(codec: Codec, tmp_path: Path) -> None:
    codec.save(tmp_path)
    loaded = Codec.load(tmp_path, digest=codec.digest)
    assert loaded.identity == codec.identity and loaded.config == codec.config
    assert CodecIdentity.from_dict(json.loads(json.dumps(codec.identity.to_dict()))) == codec.identity
    np.testing.assert_array_equal(loaded.encode([noise(5000)])[0], codec.encode([noise(5000)])[0])


def test_random_codecs_say_so_and_repeat(codec: Codec) -> None:
    assert codec.identity.name == "random-for-tests-small"
    assert Codec.random(SMALL, seed=1).identity == codec.identity
    assert Codec.random(SMALL, seed=2).identity != codec.identity


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), "cannot be read"),
        (lambda folder: _edit(folder / WEIGHTS_FILE, lambda data: data[:-1000]), "safetensors"),
        (lambda folder: _edit(folder / WEIGHTS_FILE, lambda data: b""), "safetensors"),
        (lambda folder: _edit(folder / WEIGHTS_FILE, lambda data: b"\xff" * 8 + data[8:]), "safetensors"),
        (lambda folder: _edit(folder / WEIGHTS_FILE, lambda data: b"\x80\x04K\x01."), "safetensors"),
        (lambda folder: _config(folder, filters=8), "do not fit the architecture"),
        (lambda folder: _config(folder, codebooks=5), "missing quantizer"),
        (lambda folder: _config(folder, filters=-1), "filters"),
        (lambda folder: _config(folder, filters=10**9), "filters"),
        (lambda folder: _config(folder, filters="4"), "filters"),
        (lambda folder: _config(folder, ratios=[]), "ratios"),
        (lambda folder: _config(folder, ratios=[0, 4]), "ratios"),
        (lambda folder: _config(folder, ratios="84"), "ratios"),
        (lambda folder: _config(folder, codebook_size=100), "power of two"),
        (lambda folder: _config(folder, name="../x"), "name"),
        (lambda folder: _config(folder, surprise=1), "unknown field 'surprise'"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "expected an object"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "not JSON"),
    ],
)
def test_bad_folders_are_refused(codec: Codec, tmp_path: Path, damage, says: str) -> None:
    codec.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CodecError, match=says):
        Codec.load(tmp_path)


def test_another_digest_is_refused(codec: Codec) -> None:
    with pytest.raises(CodecError, match="sha256"):
        Codec(codec.config, codec.weights, digest="0" * 64)


def test_weights_that_are_not_finite_are_refused(codec: Codec) -> None:
    from safetensors.torch import load, save

    tensors = load(codec.weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * float("nan")
    with pytest.raises(CodecError, match="not finite"):
        Codec(codec.config, save(tensors))


@pytest.mark.parametrize("wave", [np.zeros(0, np.float32), np.zeros((2, 5), np.float32), np.zeros(9, np.float64)])
def test_what_is_no_waveform_is_refused(codec: Codec, wave: np.ndarray) -> None:
    with pytest.raises(CodecError, match="waveform"):
        codec.encode([wave])


def test_what_are_no_codes_is_refused(codec: Codec) -> None:
    for codes in (
        np.full((4, 3), 64),
        np.full((4, 3), -1),
        np.zeros((4, 0), int),
        np.zeros((4, 3)),
        np.zeros((9, 3), int),
    ):
        with pytest.raises(CodecError):
            codec.decode([codes])
    with pytest.raises(CodecError, match="codebooks"):
        codec.encode([noise(100)], 5)


def test_identities_are_compared(codec: Codec) -> None:
    other = Codec.random(SMALL, seed=9).identity
    codec.identity.require(codec.identity, "the dataset")
    with pytest.raises(CodecError, match=r"the dataset belongs to another codec \(digest"):
        codec.identity.require(other, "the dataset")
    tensors = load(codec.weights)
    decoder, encoder = (next(name for name in sorted(tensors) if name.startswith(part)) for part in ("decoder", "enc"))
    speaks_otherwise, hears_otherwise = (
        Codec(codec.config, save({**tensors, name: tensors[name] + 1})) for name in (decoder, encoder)
    )
    codec.identity.require(speaks_otherwise.identity, "the dataset")
    assert speaks_otherwise.digest != codec.digest and hears_otherwise.identity != codec.identity
    known = codec.identity.to_dict()
    assert CodecIdentity.from_dict(known | {"frame_rate": 75}).frame_rate == 75.0
    wrong = ({"name": None}, {"digest": 5}, {"sample_rate": 24_000.9}, {"codebooks": True}, {"frame_rate": "75"})
    for broken in ({}, {"name": "x"}, known | {"extra": 1}, *(known | change for change in wrong)):
        with pytest.raises(CodecError):
            CodecIdentity.from_dict(broken)


def _edit(file: Path, change) -> None:
    file.write_bytes(change(file.read_bytes()))


def _config(folder: Path, **values) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
