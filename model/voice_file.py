"""A voice as one open file: safetensors with its factors, and one JSON record of what they are and who agreed to them.

    k [layers, rank, heads, d_k], v [layers, rank, heads, d_v], or full, as in `model.initial_state`; all float32
    __metadata__["voice"]: format, layout, speaker, rank, scale, model, training, consent, digest

`model` is the fingerprint of the model that it belongs to; `digest` is over the factors and the rest of the record.
Equal voices give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.lina_config import LinaConfig, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from model.initial_state import Factors, Recipe
    from model.lina import Lina, LinaState
    from model.tuned import Tuned

FORMAT, LAYOUT, SUFFIX = "lina-ray-voice/1", "[layers, rank, heads, d]", ".safetensors"
CONSENT = ("who", "when", "scope")
"""What a consent record says, each a text: who agreed, when, and to what (or where that is written)."""
LARGEST_RECORD = 6_500
"""Bytes of the record as it stands in the file: with it, a voice of the 311 M model at rank 1 stays under 130 kB."""
LARGEST_HEADER = 16_384
"""Bytes of a header that is parsed at all."""
_KINDS = {
    "format": str,
    "layout": str,
    "speaker": str,
    "rank": int,
    "scale": float,
    "model": str,
    "training": dict,
    "consent": dict,
    "digest": str,
}


class VoiceError(ModelError):
    """A voice that cannot be used: damaged, of another model, without consent, or made to do harm."""


@dataclass(frozen=True, eq=False)
class Voice:
    """A speaker's initial state."""

    speaker: str
    factors: Factors
    """Of one speaker, as `model.initial_state` has them."""
    rank: int
    """0 for whole matrices."""
    scale: float
    model: str
    """Fingerprint of the model that it belongs to."""
    training: dict[str, Any]
    """Plain JSON: how it was made."""
    consent: dict[str, str]
    """Who agreed, when, and to what."""

    def __post_init__(self) -> None:
        if not isinstance(self.speaker, str) or not self.speaker:
            raise VoiceError(f"a voice needs a speaker's name, not {self.speaker!r}")
        number = isinstance(self.scale, float) and math.isfinite(self.scale) and self.scale > 0
        if not number or isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise VoiceError(f"a voice needs a scale above 0 and a rank, not {self.scale!r} and {self.rank!r}")
        check_consent(self.consent, self.speaker)

    @classmethod
    def of(cls, tuned: Tuned, recipe: Recipe, model: str, consent: dict[str, str]) -> Voice:
        """What tuning gave, with the recipe in its training record. Raises VoiceError without consent."""
        training = tuned.record() | {"recipe": vars(recipe) | {"betas": list(recipe.betas)}}
        return cls(tuned.speaker, tuned.factors, recipe.rank, float(recipe.scale), model, training, consent)


def check_consent(consent: Any, speaker: str) -> None:
    """Raises VoiceError unless a consent record says who, when and to what."""
    whole = isinstance(consent, dict) and sorted(consent) == sorted(CONSENT)
    if not whole or not all(isinstance(text, str) and text.strip() for text in consent.values()):
        raise VoiceError(f"speaker {speaker!r} has no consent record: a voice needs {', '.join(CONSENT)}, each a text")


def pack(voice: Voice) -> bytes:
    """The file of a voice.

    Raises:
        VoiceError: factors that are not finite or not this rank's, a record that is no JSON or too long.
    """
    from safetensors.torch import save as save_tensors

    tensors = {name: values.detach().to("cpu").float().contiguous() for name, values in sorted(voice.factors.items())}
    _check_names(tensors, voice.rank)
    _check_finite(tensors, voice.speaker)
    record = {
        "format": FORMAT,
        "layout": LAYOUT,
        "speaker": voice.speaker,
        "rank": voice.rank,
        "scale": voice.scale,
        "model": voice.model,
        "training": voice.training,
        "consent": voice.consent,
    }
    try:
        text = _canonical(record | {"digest": _digest(record, tensors)})
    except (TypeError, ValueError, RecursionError) as error:
        raise VoiceError(f"voice of {voice.speaker!r}: its record cannot be written as JSON: {error}") from None
    if (size := len(json.dumps(text, ensure_ascii=False).encode())) > LARGEST_RECORD:
        raise VoiceError(
            f"voice of {voice.speaker!r}: its record takes {size} bytes, at most {LARGEST_RECORD} fit; let the "
            "consent's scope name a document instead, or shorten the training record"
        )
    # One entry alone: safetensors writes several in any order.
    return save_tensors(tensors, metadata={"voice": text})


def unpack(data: bytes, config: LinaConfig | None = None, model: str | None = None) -> Voice:
    """A voice from its file.

    Args:
        config, model: sizes and fingerprint of the model that it is for; None does not ask.

    Raises:
        VoiceError: anything but a whole, unchanged, finite voice of that model, with what is wrong.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    record, header = _parsed(data)
    whose = f"voice of {record['speaker']!r}"
    if model is not None and record["model"] != model:
        raise VoiceError(
            f"{whose} belongs to model {record['model'][:16]}…, not to {model[:16]}…: a voice works with the "
            "model that it was tuned for alone; enroll the speaker again with this one"
        )
    _check_names(header, record["rank"])
    if config is not None:
        _check_shapes(header, config, record["rank"], whose)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise VoiceError(f"{whose} is no complete safetensors file: {error}") from None
    digest = record.pop("digest")
    if any(str(values.dtype) != "torch.float32" for values in tensors.values()):
        raise VoiceError(f"{whose} must have factors of float32")
    _check_finite(tensors, record["speaker"])
    if _digest(record, tensors) != digest:
        raise VoiceError(f"{whose} is damaged: its contents do not have the digest that it names; fetch it again")
    fields = {name: record[name] for name in ("speaker", "rank", "scale", "model", "training", "consent")}
    return Voice(factors=tensors, **fields)


def read_record(data: bytes) -> dict[str, Any]:
    """What a voice file says of itself, from its first `LARGEST_HEADER` + 8 bytes; the factors are not looked at.

    Raises:
        VoiceError: no voice file, or a record with fields that are missing, unknown or of the wrong type.
    """
    return _parsed(data)[0]


def save(voice: Voice, path: str | Path) -> None:
    """Writes a local file, whole or not at all. Raises as `pack`."""
    path, data = Path(path), pack(voice)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def load(path: str | Path, config: LinaConfig | None = None, model: str | None = None) -> Voice:
    """A voice from a local file. Raises VoiceError as `unpack`, and for a file that cannot be read."""
    try:
        return unpack(Path(path).read_bytes(), config, model)
    except OSError as error:
        raise VoiceError(f"{path} cannot be read ({error.strerror})") from None
    except VoiceError as error:
        raise VoiceError(f"{path}: {error}") from None


def starting_state(model: Lina, voices: Sequence[Voice]) -> LinaState:
    """The start of speech with a voice a row; their ranks may differ.

    Raises:
        ModelError: voices whose factors do not fit the model.
    """
    import torch

    from model.initial_state import memories

    weight = model.norm.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for voice in voices:
        found = {name: {"shape": list(values.shape)} for name, values in voice.factors.items()}
        _check_shapes(found, model.config, voice.rank, f"voice of {voice.speaker!r}")
    dense = [
        memories({name: values.to(weight.device, dtype) for name, values in voice.factors.items()}, voice.scale)
        for voice in voices
    ]
    layers = torch.stack([memory.layers for memory in dense], 1)
    tuned = [memory.position for memory in dense if memory.position is not None]
    position = None
    if tuned:
        zeros = torch.zeros_like(tuned[0])
        position = torch.stack([zeros if memory.position is None else memory.position for memory in dense])
    return model.initial_state(list(layers), position)


def _parsed(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the record, {name of factors: {dtype, shape, data_offsets}}), checked as far as they go."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= size <= min(LARGEST_HEADER, len(data) - 8):
        raise VoiceError(
            f"no voice file: {len(data)} bytes with a header of {size}; a voice's has at most {LARGEST_HEADER} bytes"
        )
    try:
        header = json.loads(data[8 : 8 + size])
        record = json.loads(header.pop("__metadata__")["voice"], parse_constant=_no_constant)
        _canonical(record).encode()  # numbers beyond floats, halves of characters: no digest could be made of them
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VoiceError(f"no voice file: its header is not that of a voice ({error!r})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("layout") != LAYOUT:
        raise VoiceError(f'no voice file: its record lacks "format": {FORMAT!r} and "layout": {LAYOUT!r}')
    wrong = [name for name, kind in _KINDS.items() if type(record.get(name)) is not kind]
    wrong += sorted(map(repr, record.keys() - _KINDS.keys()))
    if wrong:
        raise VoiceError(f"voice file: missing, unknown or of the wrong type in its record: {', '.join(wrong)}")
    if not all(isinstance(entry, dict) for entry in header.values()):
        raise VoiceError("no voice file: its header names factors without a shape")
    check_consent(record["consent"], record["speaker"])
    return record, header


def _check_names(factors: dict[str, Any], rank: int) -> None:
    full = {"full"} if rank == 0 else {"k", "v"}
    if set(factors) not in (full, full | {f"position_{name}" for name in full}):
        raise VoiceError(
            f"a voice of rank {rank} has factors {sorted(full)}, and the same for the position or not; "
            f"found {sorted(factors)}"
        )


def _check_shapes(header: dict[str, Any], config: LinaConfig, rank: int, whose: str) -> None:
    from model.initial_state import shapes

    expected = shapes(config, rank, any(name.startswith("position") for name in header))
    wrong = [
        f"{name} {header.get(name, {}).get('shape')}, not {list(shape)}"
        for name, shape in expected.items()
        if header.get(name, {}).get("shape") != list(shape)
    ]
    if wrong:
        raise VoiceError(f"{whose} does not fit the model's sizes: it has {'; '.join(wrong)}")


def _check_finite(tensors: Factors, speaker: str) -> None:
    if bad := [name for name, values in tensors.items() if not values.isfinite().all()]:
        raise VoiceError(f"voice of {speaker!r}: {bad[0]} has values that are not finite")


def _digest(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the record without its digest, and each factor's name, shape and bytes, in the order of names."""
    digest = hashlib.sha256(_canonical(record).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _no_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")
