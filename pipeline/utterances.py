"""What a corpus is made of: the utterances that a manifest names, and the rejects that it could not use."""

from __future__ import annotations

from typing import Any, NamedTuple


class Utterance(NamedTuple):
    """A stretch of one audio file with its text, as a manifest describes it."""

    id: str
    """Unique in the corpus; '' when the manifest gives none (the planner then derives one)."""
    audio: str
    """Absolute path or fsspec URL of the recording."""
    text: str | None = None
    """What is said; None when nobody has transcribed it."""
    speaker: str = ""
    start: float = 0.0
    """Seconds into the recording."""
    duration: float | None = None
    """Seconds; None means to the end of the recording."""
    language: str = "en"
    channel: int | None = None
    """Which channel to take; None averages all of them."""
    extra: dict[str, Any] = {}  # noqa: RUF012 (shared by all that have none: copied when extended, never changed)
    """Every other column of the manifest, kept in the sample's JSON."""
    where: str = ""
    """Where the manifest says it: `train.jsonl:17`."""


class Reject(NamedTuple):
    """Something that could not be used, and why. It goes to the quarantine; it never stops a job."""

    id: str
    stage: str
    """Of a corpus: `manifest`, `plan`, `segment`, `decode`, `transcribe`, `phonemise` or `write`; of people to enroll
    `speakers` or `enroll`, too; of a script `script`, `voice` or `prompt`; of a set to evaluate on `set`."""
    reason: str
    """One kebab-case word from a small vocabulary, for counting: `missing-file`, `too-long`, `no-text`."""
    detail: str
    """What exactly was wrong, with the numbers, and what to do about it where that is known."""
    where: str = ""
    """The manifest line or recording that it came from."""


class Unusable(Exception):
    """Raised by whatever processes one utterance when that utterance cannot be used; becomes a `Reject`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)
