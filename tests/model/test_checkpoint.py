"""Models on disk: what is loaded is what was saved, and nothing else is loaded at all."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, ModelCard, fingerprint, load, pack, read_card, save, unpack
from model.codec_config import CodecIdentity
from model.lina import Lina
from model.lina_config import LinaConfig, ModelError

SMALL = LinaConfig(
    width=16,
    encoder_layers=1,
    decoder_layers=1,
    heads=2,
    key_width=8,
    value_width=16,
    text_layers=1,
    text_heads=2,
    position_width=8,
    position_kernel=3,
    vocabulary=4,
    codebooks=2,
    codebook_size=8,
)
CODEC = CodecIdentity("some-codec", "ab" * 32, 24_000, 75.0, 8, 8)
CARD = ModelCard(SMALL, ("<pad>", "<bos>", "<eos>", "É"), CODEC, {"steps": 3, "dataset": "cd" * 32})


def network() -> Lina:
    torch.manual_seed(0)
    return Lina(SMALL)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return pack(network(), CARD)


def refused(files: dict[str, bytes], reason: str, **changed: bytes) -> None:
    with pytest.raises(ModelError, match=reason):
        unpack(changed.get("config", files[CONFIG_FILE]), changed.get("weights", files[WEIGHTS_FILE]))


def reissued(files: dict[str, bytes], weights: bytes | None = None, **fields) -> dict[str, bytes]:
    """Files that somebody made on purpose: changed, with a fingerprint that fits."""
    weights = files[WEIGHTS_FILE] if weights is None else weights
    values = json.loads(files[CONFIG_FILE]) | fields
    sizes, codec = LinaConfig.from_dict(values["sizes"]), CodecIdentity.from_dict(values["codec"])
    card = ModelCard(sizes, tuple(values["inventory"]), codec, values["training"])
    config = card.to_dict() | {"fingerprint": fingerprint(card, weights)}
    return {"config": json.dumps(config).encode(), "weights": weights}


def test_round_trip(tmp_path) -> None:
    model = network()
    saved = save(model, CARD, tmp_path / "export")
    loaded, card = load(tmp_path / "export")
    assert card == saved
    assert card == dataclasses.replace(CARD, fingerprint=card.fingerprint)
    assert len(card.fingerprint) == 64
    assert not loaded.training
    for (name, one), (other_name, other) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_equal_models_have_equal_files_and_others_another_fingerprint(files) -> None:
    assert pack(network(), CARD) == files
    other = network()
    with torch.no_grad():
        other.norm.weight[3] += 1e-7
    prints = {json.loads(pack(network(), dataclasses.replace(CARD, training={}))[CONFIG_FILE])["fingerprint"]}
    prints |= {json.loads(pack(other, CARD)[CONFIG_FILE])["fingerprint"]}
    prints |= {json.loads(files[CONFIG_FILE])["fingerprint"]}
    assert len(prints) == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_may_be_stored_small(files, dtype: str) -> None:
    small = pack(network(), CARD, dtype)
    assert len(small[WEIGHTS_FILE]) < 0.6 * len(files[WEIGHTS_FILE])
    model, _ = unpack(small[CONFIG_FILE], small[WEIGHTS_FILE])
    assert model.norm.weight.dtype == torch.float32
    wanted = network().heads.weight.to(getattr(torch, dtype)).float()
    assert torch.equal(model.heads.weight, wanted)


def test_what_is_not_finite_is_not_saved() -> None:
    model = network()
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    assert pack(model, CARD)
    with pytest.raises(ModelError, match=r"norm\.weight, are not finite as float16"):
        pack(model, CARD, "float16")


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_is_refused(files, data) -> None:
    """Or is none, as another kind of white space, or 75e0 for 75.0."""
    name = data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    content = bytearray(files[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 2))
        content[place] ^= data.draw(st.integers(1, 255))
    try:
        card = read_card(bytes(content)) if name == CONFIG_FILE else None
    except ModelError:
        return
    if card is None or card != read_card(files[CONFIG_FILE]):
        changed = {**files, name: bytes(content)}
        refused(changed, "fingerprint|safetensors|sizes")


def test_damage_and_foreign_files_are_told_apart(files, tmp_path) -> None:
    weights = files[WEIGHTS_FILE]
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    refused(files, "damaged or of another model; fetch both again", weights=flipped)
    refused(files, "fingerprint", weights=weights[: len(weights) // 2])
    refused(files, "is not JSON", config=b"\x80\x04]")
    refused(files, "is not JSON", config=b"[" * 200_000)
    refused(files, "no model's has more than", config=b" " * (1 << 21))
    refused(files, 'lacks "format"', config=b"{}")
    refused(files, "is not JSON: NaN", config=files[CONFIG_FILE].replace(b'"dropout": 0.0', b'"dropout": NaN'))
    refused(files, "is not JSON", config=files[CONFIG_FILE].replace(b'"dropout": 0.0', b'"dropout": 1e999'))
    refused(files, "is not JSON", config=files[CONFIG_FILE].replace(b'"lina-ray/1"', b'"\\ud800"'))
    with pytest.raises(ModelError, match=r"is no model: .*config.json cannot be read"):
        load(tmp_path)
    values = json.loads(files[CONFIG_FILE])
    for change, reason in (
        ({"surprise": 1}, "surprise"),
        ({"inventory": ["a", 1]}, "inventory must be a list of texts"),
        ({"inventory": ["a"]}, "inventory has 1 different phonemes"),
        ({"inventory": ["a"] * 4}, "inventory has 1 different phonemes"),
        ({"codec": values["codec"] | {"codebook_size": 16}}, "do not fit codec"),
        ({"codec": {"name": "x"}}, "codec identity"),
        ({"sizes": values["sizes"] | {"width": 10**9}}, "width must be a whole number"),
    ):
        refused(files, reason, config=json.dumps(values | change).encode())


def test_hostile_weights_with_a_fingerprint_that_fits_are_refused(files) -> None:
    weights = files[WEIGHTS_FILE]
    size = struct.unpack("<Q", weights[:8])[0]
    header, body = json.loads(weights[8 : 8 + size]), weights[8 + size :]

    def with_header(changed: dict) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + body

    def attempt(content: bytes, reason: str) -> None:
        refused(files, reason, **reissued(files, content))

    attempt(pickle.dumps({"weights": 1}), "safetensors")
    attempt(b"", "no complete safetensors file: 0 bytes")
    attempt(struct.pack("<Q", 1 << 62) + weights[8:], "no complete safetensors file")
    attempt(weights[:-4], "no complete safetensors file")
    attempt(weights[:8] + b"\xff" * size + body, "no safetensors file")
    entry = header["norm.weight"]
    attempt(
        with_header({**header, "norm.weight": entry | {"shape": [4, 4]}}), r"norm.weight is F32 \[4, 4\], not \[16\]"
    )
    attempt(with_header({**header, "norm.weight": entry | {"dtype": "I32"}}), "norm.weight is I32")
    attempt(with_header({**header, "norm.weight": entry | {"data_offsets": [0, 1 << 60]}}), "no complete safetensors")
    attempt(with_header({name: e for name, e in header.items() if name != "norm.weight"}), "missing norm.weight")
    attempt(with_header(header | {"os.system": entry}), "unknown os.system")
    begin = 8 + size + entry["data_offsets"][0]
    attempt(
        weights[:begin] + struct.pack("<f", float("inf")) + weights[begin + 4 :], "norm.weight has values that are not"
    )


def test_a_card_goes_with_its_model() -> None:
    with pytest.raises(ModelError, match="other sizes than the model"):
        pack(Lina(dataclasses.replace(SMALL, text_layers=2)), CARD)
    with pytest.raises(ModelError, match="do not fit codec 'some-codec' with 1 of 8"):
        dataclasses.replace(CARD, codec=dataclasses.replace(CODEC, codebooks=1))
