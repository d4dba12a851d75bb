"""Voice files (`model.voice_file`) as the voices of a synthesizer."""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate

from infra import storage
from model.checkpoint import ModelCard
from model.initial_state import memories
from model.voice_file import VoiceError, unpack
from pipeline.speech_lines import Voice

_LONGEST_CONSENT = 300
"""Bytes, as JSON, of the consent record that go into every file of speech; the voice's file has all of it."""
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError, ImportError)
"""What is no failure of the storage, and is the same when it is asked again."""


def read_voice(url: str, card: ModelCard, name: str | None = None) -> Voice:
    """A voice that can be spoken with.

    Args:
        url: of its file, local or any fsspec URL.
        card: of the model that it must belong to.
        name: what it is called; None takes the speaker's name from the file.

    Raises:
        VoiceError (a ModelError): no file that can be read, a damaged one, or a voice of another model.
    """
    try:
        return stored_voice(url, card, name)
    except OSError as error:
        raise VoiceError(f"voice {url} cannot be read ({error})") from None


def stored_voice(url: str, card: ModelCard, name: str | None = None) -> Voice:
    """As `read_voice`; but raises OSError where the storage failed, which says nothing of the voice."""
    try:
        content = storage.read_bytes(url)
    except _LASTING as error:
        raise VoiceError(f"voice {url} cannot be read ({error})") from None
    try:
        file = unpack(content, card.sizes, card.fingerprint)
    except VoiceError as error:
        raise VoiceError(f"{url}: {error}") from None
    dense = memories(file.factors, file.scale)
    return Voice(
        name or file.speaker,
        [memory[None] for memory in dense.layers],
        None if dense.position is None else dense.position[None],
        _short("{who}, {when}: {scope}".format(**file.consent)),
        hashlib.sha256(content).hexdigest(),
    )


def _short(text: str) -> str:
    """The beginning of a text that takes at most `_LONGEST_CONSENT` bytes as JSON, and is Unicode."""
    text = text[:_LONGEST_CONSENT].encode("utf-8", "replace").decode()
    sizes = (len(json.dumps(sign, ensure_ascii=False).encode()) - 2 for sign in text)
    most = sum(total <= _LONGEST_CONSENT for total in accumulate(sizes))
    return text[:most]
