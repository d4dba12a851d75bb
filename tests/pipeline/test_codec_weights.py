"""Where codecs come from: the embedded one is pinned, others are checked, and nothing is ever guessed."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch

from model.codec import CONFIG_FILE, WEIGHTS_FILE, Codec, read_config
from model.codec_config import CodecConfig, CodecError
from pipeline import codec_weights
from pipeline.codec_weights import EMBEDDED, resolve
from pipeline.demo_speech import Voices
from pipeline.demo_voices import speakers
from pipeline.measures import intelligibility


@pytest.mark.parametrize(("name", "intelligible"), [("demo", 0.6), ("demo-6k", 0.8)])
def test_an_embedded_codec_codes_speech(name: str, intelligible: float) -> None:
    found, embedded = resolve(name), EMBEDDED[name]
    assert (found.digest, found.identity.digest) == (embedded.digest, embedded.codes)
    assert found.identity.name == f"codec-{name}"
    assert 4 <= found.identity.codebooks <= 8 and found.identity.frame_rate <= 75
    speaker, text = speakers(2, engine="hibari")[0], "The old boat sailed slowly past the green island."
    wave = Voices().say(text, speaker)
    codec = found.build()
    (decoded,) = codec.decode(codec.encode([wave]))
    # What has learnt nothing is unintelligible: below 0.3
    assert intelligibility(wave, decoded[: len(wave)], 24_000) > intelligible


def test_embedded_codecs_stay_small() -> None:
    assert sum((codec.folder / WEIGHTS_FILE).stat().st_size for codec in EMBEDDED.values()) <= 12_000_000


def test_a_changed_embedded_codec_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = EMBEDDED["demo"]
    weights = bytearray((demo.folder / WEIGHTS_FILE).read_bytes())
    weights[-1] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(weights))
    (tmp_path / CONFIG_FILE).write_bytes((demo.folder / CONFIG_FILE).read_bytes())
    monkeypatch.setitem(EMBEDDED, "demo", dataclasses.replace(demo, folder=tmp_path))
    with pytest.raises(CodecError, match="sha256"):
        resolve("demo")


def test_a_folder_on_any_storage(tmp_path: Path) -> None:
    import fsspec

    codec = Codec.random(CodecConfig("small", filters=2, dimension=8, lstm_layers=0, codebooks=2, codebook_size=16))
    codec.save(tmp_path)
    memory = fsspec.filesystem("memory")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        memory.pipe_file(f"/codecs/small/{name}", (tmp_path / name).read_bytes())
    assert resolve(str(tmp_path)).identity == resolve("memory://codecs/small").identity == codec.identity


def test_no_weights_name_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINA_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(codec_weights, "ENCODEC_URL", f"file://{tmp_path}/absent/encodec_24khz-d7cc33bc.th")
    with pytest.raises(CodecError, match=r"--codec-weights PATH\|URL.*--codec demo-6k.*--codec demo"):
        resolve()


def test_downloaded_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state dict of the published sizes stands in for the published file, with its own digest expected."""
    from model.codec import build_networks, codebook_name
    from model.codec_config import ENCODEC_24KHZ

    encoder, decoder = build_networks(ENCODEC_24KHZ, "weight_norm")
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    state |= {codebook_name(level): torch.randn(1024, 128) for level in range(32)}
    published = tmp_path / "published" / "encodec.th"
    published.parent.mkdir()
    torch.save(state, published)
    monkeypatch.setattr(codec_weights, "ENCODEC_SHA256", hashlib.sha256(published.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(codec_weights, "ENCODEC_URL", f"file://{published}")
    monkeypatch.setenv("LINA_RAY_CACHE", str(tmp_path / "cache"))
    first = resolve()
    published.unlink()
    assert resolve().identity == first.identity and first.identity.codebooks == 32
    (tmp_path / "cache" / "encodec.th").write_bytes(b"damaged")
    with pytest.raises(CodecError, match="delete it"):
        resolve()


def test_what_is_no_weights_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "encodec.th"
    file.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CodecError, match="sha256"):
        resolve("encodec_24khz", str(file))
    monkeypatch.setattr(codec_weights, "ENCODEC_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    with pytest.raises(CodecError, match="no state dict"):
        resolve("encodec_24khz", str(file))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nonsense",), "unknown codec"),
        (("demo", "x.th"), "goes with --codec encodec_24khz"),
        (("./no/such/folder",), "cannot be read"),
        (("encodec_24khz", "/no/such/file.th"), "cannot be read"),
    ],
)
def test_what_cannot_be_found_says_so(arguments: tuple, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        resolve(*arguments)


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_configuration_is_readable(name: str) -> None:
    config = read_config((EMBEDDED[name].folder / CONFIG_FILE).read_bytes())
    assert config.hop == 24_000 / config.frame_rate
