"""What a codec is: its identity, which every dataset, model and voice carries, and its architecture."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any


class CodecError(ValueError):
    """A codec that cannot be used: wrong digest, another architecture, a damaged file, codes of another codec."""


@dataclass(frozen=True)
class CodecIdentity:
    """Two codecs with equal identities give equal codes; datasets, models and voices of unequal ones never mix."""

    name: str
    digest: str
    """sha256 of what makes codes, encoder and codebooks, hexadecimal. A decoder may be trained further without it."""
    sample_rate: int
    """Samples a second of the audio that goes in and comes out."""
    frame_rate: float
    """Frames a second."""
    codebooks: int
    """Codes a frame, at most."""
    codebook_size: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodecIdentity:
        """Raises CodecError naming the fields that are missing, unknown or of the wrong type."""
        kinds = {
            "name": str,
            "digest": str,
            "sample_rate": int,
            "frame_rate": float,
            "codebooks": int,
            "codebook_size": int,
        }
        _refuse_unknown(values, set(kinds), "codec identity")
        whole = dict(values)
        if type(whole.get("frame_rate")) is int:
            whole["frame_rate"] = float(whole["frame_rate"])
        if wrong := [name for name, kind in kinds.items() if type(whole.get(name)) is not kind]:
            raise CodecError(f"codec identity: missing or of the wrong type: {', '.join(wrong)}")
        return cls(**whole)

    def require(self, other: CodecIdentity, what: str) -> None:
        """Raises CodecError with the differing fields unless `what` (a dataset, a voice …) was made with this codec."""
        mine, theirs = self.to_dict(), other.to_dict()
        differ = [f"{name}: {theirs[name]!r} instead of {mine[name]!r}" for name in mine if mine[name] != theirs[name]]
        if differ:
            raise CodecError(f"{what} belongs to another codec ({'; '.join(differ)}); use the codec it was made with")


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a causal, mono network of EnCodec's classes (Défossez et al. 2022, section 3)."""

    name: str
    sample_rate: int = 24_000
    filters: int = 32
    """Channels at the full sample rate; they double at every stride."""
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    """Strides of the decoder, outermost last; the encoder uses them in reverse. Their product is the hop."""
    dimension: int = 128
    """Width of the vector that is quantised."""
    residual_layers: int = 1
    lstm_layers: int = 2
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2
    """Residual branches have this many times fewer channels."""
    codebooks: int = 32
    codebook_size: int = 1024
    search: int = 1
    """Sums of codes that the encoder keeps from codebook to codebook; 1 takes the nearest of each in turn."""
    level: float = 0.0
    """Root mean square that an utterance is brought to before it is encoded, and so has when decoded; 0 leaves it."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name):
            raise CodecError(f"codec config: name {self.name!r} must be 1 to 64 letters, digits, '_', '-' or '.'")
        limits = {
            "sample_rate": (4_000, 192_000),
            "filters": (1, 512),
            "dimension": (1, 4096),
            "residual_layers": (0, 16),
            "lstm_layers": (0, 8),
            "kernel_size": (1, 63),
            "last_kernel_size": (1, 63),
            "residual_kernel_size": (1, 63),
            "dilation_base": (1, 8),
            "compress": (1, 16),
            "codebooks": (1, 64),
            "codebook_size": (2, 65_536),
            "search": (1, 64),
        }
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise CodecError(f"codec config: {field} must be a whole number from {low} to {high}, not {value!r}")
        if isinstance(self.level, bool) or not isinstance(self.level, int | float) or not 0 <= self.level <= 0.5:
            raise CodecError(f"codec config: level must be a number from 0 to 0.5, not {self.level!r}")
        if not 1 <= len(self.ratios) <= 8 or any(not isinstance(r, int) or not 2 <= r <= 64 for r in self.ratios):
            raise CodecError(f"codec config: ratios must be 1 to 8 whole numbers from 2 to 64, not {self.ratios!r}")
        if self.filters * 2 ** len(self.ratios) > 8192:
            raise CodecError(
                f"codec config: filters {self.filters} doubled {len(self.ratios)} times exceeds 8192 channels"
            )
        if self.codebook_size & (self.codebook_size - 1):
            raise CodecError(f"codec config: codebook_size must be a power of two, not {self.codebook_size}")

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return math.prod(self.ratios)

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.hop

    @property
    def shortest(self) -> int:
        """Frames from which each convolution's mirror at its left edge lies within the utterance.

        What is shorter must not stand in a batch with longer ones, whose padding it would mirror.
        """
        rate, pads = self.hop, [(self.hop, self.kernel_size - 1), (1, self.last_kernel_size - 1)]
        residual = (self.residual_kernel_size - 1) * self.dilation_base ** max(0, self.residual_layers - 1)
        for ratio in reversed(self.ratios):  # the encoder's way down; the decoder's way up has the same paddings
            pads += [(rate, residual if self.residual_layers else 0), (rate, ratio)]
            rate //= ratio
        pads += [(self.hop, self.last_kernel_size - 1), (1, self.kernel_size - 1)]
        return max(padding // samples + 1 for samples, padding in pads)

    def frames(self, samples: int) -> int:
        """Frames that `samples` of audio become: the last, partial one counts."""
        return -(-samples // self.hop)

    def to_dict(self) -> dict[str, Any]:
        """The fields; what older codecs don't have only where it is set, so that their digests stay."""
        values = dataclasses.asdict(self) | {"ratios": list(self.ratios)}
        return {k: v for k, v in values.items() if k not in _ADDED or v != _ADDED[k]}

    @classmethod
    def from_dict(cls, values: Any) -> CodecConfig:
        """Raises CodecError for anything but the fields above with possible values."""
        if not isinstance(values, dict):
            raise CodecError(f"codec config: expected an object with fields, found {type(values).__name__}")
        fields = {field.name for field in dataclasses.fields(cls)}
        _refuse_unknown(values, fields, "codec config")
        if not isinstance(values.get("name"), str):
            raise CodecError("codec config: name is missing or not text")
        if not isinstance(values.get("ratios", []), list | tuple):
            raise CodecError(f"codec config: ratios must be a list, not {values['ratios']!r}")
        return cls(**{k: tuple(v) if k == "ratios" else v for k, v in values.items()})


_ADDED = {"search": 1, "level": 0.0}
"""Fields that came later, and what codecs without them mean."""

ENCODEC_24KHZ = CodecConfig("encodec_24khz")
"""The published causal 24 kHz model: 75 frames a second, 32 codebooks of 1024 (24 kbit/s), 14.9 M parameters."""


def _refuse_unknown(values: dict[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(str(name) for name in set(values) - known)
    if unknown:
        raise CodecError(f"{what}: unknown field {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}")
