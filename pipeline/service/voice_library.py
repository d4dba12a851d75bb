"""The voices that a tenant may speak with: its own, and the shared ones.

    <voices>/<tenant>/<voice>.safetensors      <voices>/shared/<voice>.safetensors

A tenant's own voice comes before a shared one of the same name. Ids are speakers' names; in files' names everything
but letters, digits, `_` and `-` is escaped (`pipeline.speakers.file_key`), so that no id leads out of its folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from infra import storage
from model.voice_file import LARGEST_HEADER, SUFFIX, VoiceError, read_record
from pipeline.service.config import NAME, SHARED
from pipeline.speakers import file_key
from pipeline.utterances import Unusable
from pipeline.voice_files import speaker_of

DEFAULT = "default"
"""The model's own voice, which has no file."""
_KEY = re.compile(r"[A-Za-z0-9_%-]+")


class UnknownVoice(LookupError):
    """No such voice for this tenant."""


@dataclass(frozen=True)
class Entry:
    """Where a voice is."""

    id: str
    shared: bool
    url: str


class VoiceLibrary:
    """
    Args:
        folder: local or any fsspec URL.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find(self, tenant: str, id: str) -> Entry:
        """Raises UnknownVoice, for another tenant's voice as for one that is not there."""
        for owner in (tenant, SHARED):
            entry = self.entry(owner, id)
            if storage.exists(entry.url):
                return entry
        raise UnknownVoice(id)

    def entry(self, owner: str, id: str) -> Entry:
        """Where an owner's voice would be. Raises UnknownVoice for what can be no voice's name."""
        try:
            key = file_key(id)
        except Unusable:
            raise UnknownVoice(id) from None
        if id == DEFAULT or not _KEY.fullmatch(key) or not NAME.fullmatch(owner):
            raise UnknownVoice(id)
        return Entry(id, owner == SHARED, storage.join(self.folder, owner, key + SUFFIX))

    def entries(self, tenant: str) -> list[Entry]:
        """In the order of their ids; what is hidden by a voice of the tenant's own is left out."""
        owners: dict[str, str] = {}
        for owner in (tenant, SHARED):
            for name in storage.names(storage.join(self.folder, owner)):
                if (id := speaker_of(name)) is not None:
                    owners.setdefault(id, owner)
        return [self.entry(owners[id], id) for id in sorted(owners) if id != DEFAULT]

    def record(self, entry: Entry) -> dict[str, Any]:
        """What a voice file says of itself. Raises UnknownVoice where it is gone, VoiceError for a damaged one."""
        try:
            return read_record(storage.read_range(entry.url, 0, LARGEST_HEADER + 8))
        except OSError:
            raise UnknownVoice(entry.id) from None

    def write(self, entry: Entry, content: bytes) -> None:
        storage.write_bytes(entry.url, content)

    def delete(self, entry: Entry) -> None:
        storage.remove(entry.url)


def describe(library: VoiceLibrary, entry: Entry) -> dict[str, Any]:
    """A voice as the interface shows it. Raises UnknownVoice."""
    shown: dict[str, Any] = {"id": entry.id, "object": "voice", "shared": entry.shared, "status": "ready"}
    try:
        record = library.record(entry)
    except VoiceError as error:
        return shown | {"status": "failed", "error": {"code": "damaged_voice", "message": str(error)}}
    return shown | {"model": record["model"], "consent": record["consent"], "rank": record["rank"]}
