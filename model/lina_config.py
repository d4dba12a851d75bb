"""The sizes of a Lina model: checked once, written into every checkpoint, with four presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class ModelError(ValueError):
    """A model that cannot be used: impossible sizes, a damaged or foreign file, input that does not fit it."""


@dataclass(frozen=True)
class LinaConfig:
    """Sizes of the network (Lina-Speech, section 3), all of them."""

    width: int = 192
    """Of the residual stream."""
    encoder_layers: int = 3
    """Causal blocks before the cross-attention."""
    decoder_layers: int = 3
    """Causal blocks after it."""
    mixer: str = "gla"
    """Of those blocks: `gla`, or `attention`, the paper's ablation, at an equal number of parameters."""
    heads: int = 4
    """Of gated linear attention."""
    key_width: int = 96
    """Of all GLA heads' queries and keys together; the state has key_width · value_width / heads numbers a layer."""
    value_width: int = 192
    """Of all GLA heads' values together."""
    short_conv: int = 4
    """Taps of the causal convolution on queries, keys and values; 0 for none."""
    gate_rank: int = 16
    """Rank of the projection that the decay is computed by."""
    gate_divisor: int = 16
    """log decay = logsigmoid(·) / gate_divisor: the larger, the longer the memory."""
    attention_head: int = 64
    """Width of a softmax head, where `mixer` is `attention`."""
    text_layers: int = 3
    """Non-causal transformer blocks over the phonemes."""
    text_heads: int = 4
    position_width: int = 96
    """Of the positions that the cross-attention reads the text by, and of its position network."""
    position_kernel: int = 31
    """Taps of the convolution that makes the positions; odd."""
    vocabulary: int = 81
    """Phonemes and signs, special ones included; 0 is padding."""
    codebooks: int = 4
    """Codes a frame that are modelled; a codec may give more."""
    codebook_size: int = 1024
    dropout: float = 0.0
    """Of what each block adds to the residual stream."""
    text_dropout: float = 0.1
    attention_dropout: float = 0.0
    """Of the cross-attention's weights."""

    def __post_init__(self) -> None:
        limits = {
            "width": (8, 16_384),
            "encoder_layers": (1, 256),
            "decoder_layers": (1, 256),
            "heads": (1, 256),
            "key_width": (1, 32_768),
            "value_width": (1, 32_768),
            "short_conv": (0, 16),
            "gate_rank": (1, 1024),
            "gate_divisor": (1, 1024),
            "attention_head": (4, 1024),
            "text_layers": (0, 256),
            "text_heads": (1, 256),
            "position_width": (8, 16_384),
            "position_kernel": (1, 255),
            "vocabulary": (2, 65_536),
            "codebooks": (1, 64),
            "codebook_size": (2, 65_536),
        }
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ModelError(f"model config: {field} must be a whole number from {low} to {high}, not {value!r}")
        for field in ("dropout", "text_dropout", "attention_dropout"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ModelError(f"model config: {field} must be at least 0 and below 1, not {value!r}")
        if self.mixer not in ("gla", "attention"):
            raise ModelError(f"model config: mixer must be 'gla' or 'attention', not {self.mixer!r}")
        for field, divisor in (
            ("key_width", "heads"),
            ("value_width", "heads"),
            ("width", "text_heads"),
            ("position_width", "heads"),
        ):
            if getattr(self, field) % getattr(self, divisor):
                raise ModelError(
                    f"model config: {field} {getattr(self, field)} is no multiple of {divisor} {getattr(self, divisor)}"
                )
        if self.width // self.text_heads % 4:
            raise ModelError(f"model config: width / text_heads is {self.width // self.text_heads}, no multiple of 4")
        if self.position_width % 2 or self.position_kernel % 2 == 0:
            raise ModelError("model config: position_width must be even and position_kernel odd")
        if self.mixer == "attention" and (self.attention_head % 4 or self.attention_width % self.attention_head):
            raise ModelError(
                f"model config: attention_head {self.attention_head} must be a multiple of 4 that divides "
                f"{self.attention_width}, the width of softmax attention of this size"
            )

    @property
    def attention_width(self) -> int:
        """Of all softmax heads together, such that their four projections are as large as GLA's five."""
        return (2 * self.key_width + 3 * self.value_width) // 4

    @property
    def tokens(self) -> int:
        """Ids a codebook: its codes after padding, start and end."""
        return self.codebook_size + 3

    @property
    def layers(self) -> int:
        """Causal blocks with a state that a voice sets."""
        return self.encoder_layers + self.decoder_layers

    def state_shape(self, batch: int) -> tuple[int, int, int, int]:
        """[batch, heads, d_k, d_v] of a GLA layer."""
        return batch, self.heads, self.key_width // self.heads, self.value_width // self.heads

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> LinaConfig:
        """Raises ModelError for anything but the fields above with possible values; absent ones have their default."""
        if not isinstance(values, dict):
            raise ModelError(f"model config: expected an object with fields, found {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(str(name) for name in set(values) - known):
            raise ModelError(f"model config: unknown field {', '.join(map(repr, unknown))}; known: {sorted(known)}")
        return cls(**values)


PRESETS: dict[str, LinaConfig] = {
    # For CPUs: tests, the demo.
    "tiny": LinaConfig(),
    # The authors' gla_60.yaml: wide keys and values, no short convolution.
    "60m": LinaConfig(
        width=512,
        encoder_layers=6,
        decoder_layers=6,
        key_width=512,
        value_width=1024,
        short_conv=0,
        text_layers=9,
        text_heads=8,
        position_width=128,
        attention_dropout=0.2,
    ),
    # The published 169 M model; its text encoder's heads and the paper's 311 M's are not known.
    "169m": LinaConfig(
        width=1024,
        encoder_layers=6,
        decoder_layers=6,
        key_width=512,
        value_width=1024,
        text_layers=6,
        text_heads=16,
        position_width=1024,
    ),
    "311m": LinaConfig(
        width=1280,
        encoder_layers=8,
        decoder_layers=8,
        key_width=640,
        value_width=1280,
        text_layers=6,
        text_heads=20,
        position_width=1280,
    ),
}
PUBLISHED = {"60m": 59.9e6, "169m": 167.6e6, "311m": 310.9e6}
"""Parameters of the authors' models, counted from their released code and configurations."""
