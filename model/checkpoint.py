"""A trained model as two open files, `model.safetensors` and `config.json`: no pickle, nothing that runs.

`config.json` has the sizes, the phoneme inventory, the codec's identity and the model's fingerprint: the sha256 of the
weights file and of the rest of the config. A voice carries the fingerprint of the model that it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.codec_config import CodecError, CodecIdentity
from model.lina_config import LinaConfig, ModelError

if TYPE_CHECKING:
    import torch

    from model.lina import Lina

CONFIG_FILE, WEIGHTS_FILE, FORMAT = "config.json", "model.safetensors", "lina-ray/1"
LARGEST_CONFIG = 1 << 20
"""Bytes of a `config.json` that is read at all."""
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What weights are stored as, by PyTorch's and by the file's names."""


@dataclass(frozen=True)
class ModelCard:
    """What stands beside the weights."""

    sizes: LinaConfig
    inventory: tuple[str, ...]
    """Phonemes and signs in the order of their ids."""
    codec: CodecIdentity
    """Of the codec whose codes the model speaks."""
    training: dict[str, Any]
    """Where it comes from, as plain JSON: dataset digest, steps, run … for people; part of the fingerprint."""
    fingerprint: str = ""
    """sha256, hexadecimal; empty before it is saved."""

    def __post_init__(self) -> None:
        if len(self.inventory) != self.sizes.vocabulary or len(set(self.inventory)) != len(self.inventory):
            raise ModelError(
                f"model config: inventory has {len(set(self.inventory))} different phonemes, the sizes say "
                f"{self.sizes.vocabulary}; a model is used with the inventory that it was trained with"
            )
        if self.sizes.codebook_size != self.codec.codebook_size or self.sizes.codebooks > self.codec.codebooks:
            raise ModelError(
                f"model config: {self.sizes.codebooks} codebooks of {self.sizes.codebook_size} do not fit codec "
                f"{self.codec.name!r} with {self.codec.codebooks} of {self.codec.codebook_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "sizes": self.sizes.to_dict(),
            "inventory": list(self.inventory),
            "codec": self.codec.to_dict(),
            "training": self.training,
            "fingerprint": self.fingerprint,
        }


def fingerprint(card: ModelCard, weights: bytes) -> str:
    """sha256 over the digest of the weights file and the config without its fingerprint, as canonical JSON."""
    config = {name: value for name, value in card.to_dict().items() if name != "fingerprint"}
    return hashlib.sha256(hashlib.sha256(weights).digest() + _canonical(config)).hexdigest()


def _canonical(config: Any) -> bytes:
    """Raises ValueError for what no digest can be made of: numbers beyond floats, halves of characters."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def pack(model: Lina, card: ModelCard, dtype: str = "float32") -> dict[str, bytes]:
    """The two files, by name. Equal models give equal bytes.

    Args:
        card: what it says as `fingerprint` is replaced.
        dtype: of the stored weights: float32, bfloat16 or float16.

    Raises:
        ModelError: weights that are not finite in this type, or a card of other sizes.
    """
    import dataclasses

    import torch
    from safetensors.torch import save

    if model.config != card.sizes:
        raise ModelError("the card has other sizes than the model")
    if dtype not in DTYPES:
        raise ModelError(f"weights are stored as one of {', '.join(DTYPES)}, not {dtype!r}")
    tensors = {n: t.detach().to("cpu", getattr(torch, dtype)).contiguous() for n, t in model.state_dict().items()}
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise ModelError(f"{len(bad)} weights, first {bad[0]}, are not finite as {dtype}: not saved")
    weights = save(tensors)
    card = dataclasses.replace(card, fingerprint=fingerprint(card, weights))
    config = json.dumps(card.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {WEIGHTS_FILE: weights, CONFIG_FILE: config.encode()}


def unpack(config: bytes, weights: bytes, device: str = "cpu", dtype: str = "float32") -> tuple[Lina, ModelCard]:
    """A model in evaluation mode from its two files.

    Raises:
        ModelError: anything but a whole, unchanged, finite model of this format, with what is wrong.
    """
    import torch

    from model.lina import Lina

    card = read_card(config)
    if (actual := fingerprint(card, weights)) != card.fingerprint:
        raise ModelError(
            f"{WEIGHTS_FILE} and {CONFIG_FILE} have fingerprint {actual[:16]}…, {CONFIG_FILE} says "
            f"{card.fingerprint[:16]}…: one of them is damaged or of another model; fetch both again"
        )
    with torch.device("meta"):
        model = Lina(card.sizes)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = _tensors(weights, expected)
    model.load_state_dict(tensors, assign=True)
    return model.to(device, getattr(torch, dtype)).eval(), card


def save(model: Lina, card: ModelCard, folder: str | Path, dtype: str = "float32") -> ModelCard:
    """Writes a model into a local folder, each file whole or not at all; returns the card with its fingerprint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = pack(model, card, dtype)
    for name, content in files.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    return read_card(files[CONFIG_FILE])


def load(folder: str | Path, device: str = "cpu", dtype: str = "float32") -> tuple[Lina, ModelCard]:
    """A model in evaluation mode from a local folder.

    Raises:
        ModelError: as `unpack`, or a file that cannot be read.
    """
    folder = Path(folder)
    try:
        config, weights = (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise ModelError(
            f"{folder} is no model: {error.filename} cannot be read ({error.strerror}); "
            f"a model is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    try:
        return unpack(config, weights, device, dtype)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def read_card(config: bytes) -> ModelCard:
    """Parses and checks a `config.json`. Raises ModelError."""
    if len(config) > LARGEST_CONFIG:
        raise ModelError(f"{CONFIG_FILE} has {len(config)} bytes; no model's has more than {LARGEST_CONFIG}")
    try:
        values = json.loads(config, parse_constant=_no_constant)
        _canonical(values)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ModelError(f"{CONFIG_FILE} is not JSON: {error}") from None
    kinds = {"format": str, "sizes": dict, "inventory": list, "codec": dict, "training": dict, "fingerprint": str}
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ModelError(f'{CONFIG_FILE} is no model\'s: it lacks "format": {FORMAT!r}')
    wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
    wrong += sorted(str(name) for name in values.keys() - kinds.keys())
    if wrong:
        raise ModelError(f"{CONFIG_FILE}: missing, unknown or of the wrong type: {', '.join(wrong)}")
    if not all(isinstance(phone, str) for phone in values["inventory"]):
        raise ModelError(f"{CONFIG_FILE}: inventory must be a list of texts")
    try:
        codec = CodecIdentity.from_dict(values["codec"])
    except CodecError as error:
        raise ModelError(f"{CONFIG_FILE}: {error}") from None
    sizes = LinaConfig.from_dict(values["sizes"])
    return ModelCard(sizes, tuple(values["inventory"]), codec, values["training"], values["fingerprint"])


def _tensors(weights: bytes, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, whose header is compared with what the sizes ask for before anything is read."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    header = _header(weights)
    missing, foreign = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected.keys())
    problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in foreign]
    for name, shape in expected.items():
        entry = header.get(name)
        if entry and (entry.get("shape") != list(shape) or entry.get("dtype") not in DTYPES.values()):
            problems.append(f"{name} is {entry.get('dtype')} {entry.get('shape')}, not {list(shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"{WEIGHTS_FILE} does not fit the sizes: {'; '.join(problems[:3])}{more}")
    try:
        tensors = load_tensors(weights)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"{WEIGHTS_FILE} is no complete safetensors file: {error}") from None
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise ModelError(f"{WEIGHTS_FILE}: {bad[0]} has values that are not finite")
    return tensors


def _header(weights: bytes) -> dict[str, Any]:
    """What a safetensors file says it holds: {name: {dtype, shape, data_offsets}}."""
    size = struct.unpack("<Q", weights[:8])[0] if len(weights) >= 8 else 0
    try:
        header = json.loads(weights[8 : 8 + size]) if 2 <= size <= len(weights) - 8 else None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{WEIGHTS_FILE} is no safetensors file: {error}") from None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ModelError(f"{WEIGHTS_FILE} is no complete safetensors file: {len(weights)} bytes, header of {size}")
    header.pop("__metadata__", None)
    return header


def _no_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")
