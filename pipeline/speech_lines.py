"""What is asked of a synthesizer and what it gives back: lines, voices, pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.speech_faults import Findings

if TYPE_CHECKING:
    import torch

    from model.voice_samples import Sample


@dataclass(frozen=True)
class Voice:
    """Who speaks: memories that speech starts from (Lina-Speech, section 3.3)."""

    name: str
    memories: Sequence[torch.Tensor]
    """For each encoder layer, then each decoder layer: [1, heads, d_k, d_v]."""
    position: torch.Tensor | None = None
    """Of the position network, where that was tuned."""
    consent: str = ""
    """Where the speaker's consent is on record."""
    digest: str = ""
    """Of the voice's file."""


@dataclass(frozen=True)
class Prompt:
    """Somebody's speech, which the model reads and goes on from (Lina-Speech, section 4.3)."""

    sample: Sample
    digest: str = ""
    """Of its codes and phonemes."""


@dataclass(frozen=True)
class Line:
    """Something to say."""

    text: str
    voice: Voice | None = None
    """None speaks as the model does without any, or as its prompt does."""
    seed: int = 0
    prompt: Prompt | None = None


@dataclass(frozen=True)
class Piece:
    """A part of a line, as it was said."""

    text: str
    frames: int
    seed: int
    """Of the attempt that was kept."""
    attempts: int
    findings: Findings
    """Of that attempt."""


@dataclass(frozen=True)
class Spoken:
    """A line, as it was said."""

    samples: np.ndarray
    """float32 [time]."""
    rate: int
    pieces: tuple[Piece, ...]
    took: float = 0.0
    """Seconds of computing, all attempts; of steps that were shared with other pieces, a share."""

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    @property
    def attempts(self) -> int:
        """Of all pieces together; one a piece where all went well."""
        return sum(piece.attempts for piece in self.pieces)

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with it after all attempts, of `speech_faults.FAULTS`; empty for good speech."""
        return tuple(sorted({fault for piece in self.pieces for fault in piece.findings.faults}))


def derived(*parts: object) -> int:
    """A seed that belongs to these parts: any change gives another one."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
