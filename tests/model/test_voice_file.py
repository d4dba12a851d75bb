"""Voices on disk: what is loaded is what was saved, by someone who agreed, and nothing else is loaded at all."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

from model.initial_state import Memories, Recipe, drawn, memories
from model.lina import Batch, Lina
from model.lina_config import PRESETS, LinaConfig
from model.state_pass import padded, prepared, row_losses
from model.tuned import Tuned
from model.voice_file import Voice, VoiceError, load, pack, read_record, save, starting_state, unpack
from model.voice_samples import Sample

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
    vocabulary=6,
    codebooks=2,
    codebook_size=8,
)
MODEL = "ab" * 32
CONSENT = {"who": "Ada Müller", "when": "2026-01-31", "scope": "narration, see contract 17"}


def voice(config: LinaConfig = SMALL, seed: int = 0, **changes) -> Voice:
    recipe = Recipe(**{name: changes.pop(name) for name in ("rank", "position") if name in changes})
    fields = {
        "speaker": "ada",
        "factors": drawn(config, recipe, seed),
        "rank": recipe.rank,
        "scale": recipe.scale,
        "model": MODEL,
        "training": {"steps": 100, "curve": [[0, 3.5], [100, 2.25]]},
        "consent": CONSENT,
    }
    return Voice(**fields | changes)


def refused(data: bytes, reason: str, config: LinaConfig | None = SMALL, model: str | None = MODEL) -> None:
    with pytest.raises(VoiceError, match=reason):
        unpack(data, config, model)


def reissued(data: bytes, **fields) -> bytes:
    """A file that somebody made on purpose: its record changed, everything else as it was."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    record = json.loads(header["__metadata__"]["voice"]) | fields
    header["__metadata__"]["voice"] = json.dumps({name: value for name, value in record.items() if value is not None})
    return with_header(json.dumps(header).encode(), data[8 + size :])


def with_header(header: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


@pytest.mark.parametrize(("rank", "position"), [(1, False), (3, True), (0, False), (0, True)])
def test_round_trip(tmp_path, rank: int, position: bool) -> None:
    kept = voice(rank=rank, position=position)
    save(kept, tmp_path / "voices" / "ada.safetensors")
    found = load(tmp_path / "voices" / "ada.safetensors", SMALL, MODEL)
    assert found.factors.keys() == kept.factors.keys()
    assert all(torch.equal(values, kept.factors[name]) for name, values in found.factors.items())
    for field in dataclasses.fields(Voice):
        if field.name != "factors":
            assert getattr(found, field.name) == getattr(kept, field.name)
    assert [path.name for path in (tmp_path / "voices").iterdir()] == ["ada.safetensors"]
    record = read_record((tmp_path / "voices" / "ada.safetensors").read_bytes()[:20_000])
    assert (record["speaker"], record["rank"], record["consent"]) == ("ada", rank, CONSENT)


def test_equal_voices_have_equal_files() -> None:
    assert pack(voice()) == pack(voice())
    assert pack(voice(seed=1)) != pack(voice())
    assert pack(voice(consent=CONSENT | {"scope": "all"})) != pack(voice())


def test_a_voice_of_the_largest_model_is_small() -> None:
    """At rank 1, with a record as tuning writes it and a consent as long as fits: at most 130 kB."""
    tuned = Tuned(
        "ada", {}, "converged", 100, 90, 1000, 16, 3.1234567, 3.0123456, 2.87654321,
        tuple((step, 3.123456789 - step / 777) for step in range(0, 101, 10)), (), 12.345, 2**64 - 1,
    )  # fmt: skip
    config, scope = PRESETS["311m"], "x"
    factors = drawn(config, Recipe(), 0)
    while True:
        try:
            made = Voice.of(tuned, Recipe(), MODEL, CONSENT | {"scope": scope})
            data = pack(dataclasses.replace(made, factors=factors))
        except VoiceError as error:
            assert "let the consent's scope name a document" in str(error)
            break
        longest, scope = scope, scope + '"é' * 200
    assert len(longest) > 1000
    assert 4 * 16 * (640 + 1280) < len(data) <= 130_000
    assert unpack(data, config, MODEL).consent["scope"] == longest


def test_voices_start_the_rows_of_a_batch() -> None:
    """Voices of several ranks, with and without a tuned position, in one batch: each row as the tuner saw it."""
    torch.manual_seed(0)
    model = Lina(SMALL).double().eval().requires_grad_(False)
    voices = [voice(seed=1, rank=2, position=True), voice(seed=2), voice(seed=3, rank=0)]
    loud = [dataclasses.replace(each, scale=2.0) for each in voices]
    samples = [Sample(torch.randint(1, 6, (4,)), torch.randint(0, 8, (2, 9 + 5 * i))) for i in range(3)]
    output = model(Batch(*padded(samples, torch.device("cpu"))), starting_state(model, loud))
    silent = model(Batch(*padded(samples, torch.device("cpu"))))
    for row, each in enumerate(loud):
        dense = memories({name: values.double() for name, values in each.factors.items()}, 2.0)
        position = None if dense.position is None else dense.position[None]
        alone = row_losses(model, prepared(model, samples[row : row + 1]), Memories(dense.layers[None], position))
        torch.testing.assert_close(output.row_losses[row], alone[0], rtol=1e-10, atol=1e-10)
        assert abs(output.row_losses[row] - silent.row_losses[row]) > 1e-6
    with pytest.raises(VoiceError, match="does not fit the model's sizes"):
        starting_state(model, [voice(PRESETS["tiny"])])


def test_a_voice_of_another_model_is_refused() -> None:
    data = pack(voice())
    refused(
        data,
        "belongs to model abababababababab…, not to cdcdcdcdcdcdcdcd…: .* enroll",
        model="cd" * 32,
    )
    refused(data, r"k \[2, 1, 2, 4\], not \[6, 1, 4, 24\]", config=PRESETS["tiny"])
    assert unpack(data).model == MODEL


@pytest.mark.parametrize("consent", [None, {}, CONSENT | {"when": " "}, CONSENT | {"who": 3}, CONSENT | {"more": "x"}])
def test_without_consent_there_is_no_voice(consent) -> None:
    with pytest.raises(VoiceError, match="speaker 'ada' has no consent record: a voice needs who, when, scope"):
        voice(consent=consent)
    if consent is not None:
        refused(reissued(pack(voice()), consent=consent), "no consent record")


def test_what_is_no_voice_is_not_saved() -> None:
    for changes, reason in (
        ({"factors": {"k": torch.zeros(2, 1, 2, 4)}}, r"factors \['k', 'v'\]"),
        ({"factors": voice().factors | {"v": torch.full((2, 1, 2, 8), torch.nan)}}, "v has values that are not finite"),
        ({"factors": voice().factors | {"v": torch.full((2, 1, 2, 8), 1e300, dtype=torch.float64)}}, "not finite"),
        ({"training": {"loss": float("nan")}}, "cannot be written as JSON"),
        ({"training": {"model": object()}}, "cannot be written as JSON"),
        ({"training": {"log": "x" * 7000}}, "its record takes 7[0-9]{3} bytes, at most 6500 fit"),
    ):
        with pytest.raises(VoiceError, match=reason):
            pack(voice(**changes))
    with pytest.raises(VoiceError, match="needs a speaker's name"):
        voice(speaker="")
    with pytest.raises(VoiceError, match="scale above 0"):
        voice(scale=float("inf"))


def test_damage_is_seen_wherever_it_is() -> None:
    data = pack(voice())
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 0x04
        with pytest.raises(VoiceError):
            unpack(bytes(changed), SMALL, MODEL)
    for size in (0, 7, 8, 100, len(data) - 1):
        refused(data[:size], "no voice file|no complete safetensors file")
    refused(data + b"more", "no complete safetensors file")


def test_hostile_files_are_refused() -> None:
    data = pack(voice())
    size = struct.unpack("<Q", data[:8])[0]
    tensors, record = voice().factors, json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["voice"])
    refused(struct.pack("<Q", 2**63) + data[8:], "a voice's has at most 16384 bytes")
    refused(with_header(b'{"a":"' + b"x" * 20_000 + b'"}'), "header of 20008; a voice's has at most 16384")
    refused(with_header(b"[" * 16_000), "not that of a voice")
    refused(with_header(b"\xff\xfe not JSON"), "not that of a voice")
    refused(with_header(b"[]"), "not that of a voice")
    refused(pickle.dumps({"k": 1}) * 40, "no voice file")
    refused(save_tensors(tensors), "not that of a voice")
    refused(save_tensors(tensors, metadata={"voice": "{"}), "not that of a voice")
    refused(save_tensors(tensors, metadata={"voice": "[" * 5000}), "not that of a voice")
    refused(save_tensors(tensors, metadata={"voice": '{"format": NaN}'}), "NaN is no number")
    refused(save_tensors(tensors, metadata={"voice": '{"format": 1e999}'}), "not that of a voice")
    refused(save_tensors(tensors, metadata={"voice": '{"format": "\\ud800"}'}), "not that of a voice")
    refused(save_tensors(tensors, metadata={"voice": '{"format": "other"}'}), "lacks \"format\": 'lina-ray-voice/1'")
    refused(reissued(data, run="rm -rf /"), "unknown or of the wrong type in its record: 'run'")
    refused(reissued(data, digest=None), "wrong type in its record: digest")
    refused(reissued(data, rank="1"), "wrong type in its record: rank")
    refused(reissued(data, rank=2), r"\[2, 1, 2, 4\], not \[2, 2, 2, 4\]")
    refused(reissued(data, rank=0), r"has factors \['full'\]")
    refused(reissued(data, rank=True), "wrong type in its record: rank")
    refused(reissued(data, speaker="eve"), "voice of 'eve' is damaged")
    refused(reissued(data, consent=CONSENT | {"scope": "everything"}), "is damaged")
    more = tensors | {"weights": torch.zeros(3)}
    refused(save_tensors(more, metadata={"voice": json.dumps(record)}), r"found \['k', 'v', 'weights'\]")
    wide = {name: values.double() for name, values in tensors.items()}
    refused(save_tensors(wide, metadata={"voice": json.dumps(record)}), "must have factors of float32")
    broken = {name: values * torch.inf for name, values in tensors.items()}
    refused(save_tensors(broken, metadata={"voice": json.dumps(record)}), "not finite")


@settings(max_examples=100)
@given(st.binary(max_size=300) | st.binary(max_size=200).map(with_header))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(VoiceError):
        unpack(data)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(VoiceError, match=r"gone.safetensors cannot be read \(No such file"):
        load(tmp_path / "gone.safetensors")


def test_records_are_read_without_torch(tmp_path, project) -> None:
    """Listing thousands of voices starts fast."""
    save(voice(), tmp_path / "ada.safetensors")
    code = (
        "import sys; from model.voice_file import read_record; "
        "print(read_record(open(sys.argv[1], 'rb').read())['speaker'], 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ada.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=project).stdout.split() == [
        "ada",
        "False",
    ]
