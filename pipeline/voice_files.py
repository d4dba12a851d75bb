"""Voices in a folder: found, described, checked, copied and removed.

<voices>/<tenant>/<key>.safetensors        named `speaker`, or `tenant/speaker` where the tenant is another one
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra import storage
from model.voice_file import LARGEST_HEADER, SUFFIX, Voice, VoiceError, read_record, unpack
from pipeline.enroll_config import SHARED, TENANT
from pipeline.enrollment_files import FOLDER
from pipeline.keys import id_of
from pipeline.speakers import file_key
from pipeline.utterances import Unusable


class NoSuchVoice(VoiceError):
    """There is no such voice, or no such folder."""


@dataclass(frozen=True)
class VoiceFile:
    """Where a voice is."""

    folder: str
    tenant: str
    speaker: str

    @property
    def name(self) -> str:
        return f"{self.tenant}/{self.speaker}"

    @property
    def url(self) -> str:
        return storage.join(self.folder, self.tenant, f"{file_key(self.speaker)}{SUFFIX}")

    def record(self) -> dict[str, Any]:
        """What the file says of itself; its factors are not read. Raises VoiceError."""
        try:
            return read_record(storage.read_range(self.url, 0, LARGEST_HEADER + 8))
        except OSError as error:
            raise VoiceError(f"{self.url} cannot be read ({error})") from None
        except VoiceError as error:
            raise VoiceError(f"{self.url}: {error}") from None

    def content(self) -> tuple[bytes, Voice]:
        """The whole file, checked. Raises VoiceError."""
        try:
            content = storage.read_bytes(self.url)
            return content, unpack(content)
        except OSError as error:
            raise VoiceError(f"{self.url} cannot be read ({error})") from None
        except VoiceError as error:
            raise VoiceError(f"{self.url}: {error}") from None

    def delete(self) -> None:
        """Removes the voice, and what the enroll job noted of it. Raises NoSuchVoice where there is none."""
        if not storage.exists(self.url):
            raise NoSuchVoice(f"there is no voice {self.name!r} in {self.folder}")
        storage.remove(self.url)
        storage.remove(storage.join(self.folder, FOLDER, self.tenant, f"{file_key(self.speaker)}.json"))


def named(folder: str, name: str, tenant: str = SHARED) -> VoiceFile:
    """The voice that a name means: a file of `tenant`, or, written `other/speaker`, of another one.

    A speaker's name may have slashes itself: what is there as it stands comes first.

    Raises:
        NoSuchVoice: no such voice, or a name that none can have.
    """
    candidates = [VoiceFile(folder, tenant, name)]
    first, slash, rest = name.partition("/")
    if slash and rest and TENANT.fullmatch(first):
        candidates.append(VoiceFile(folder, first, rest))
    try:
        for candidate in candidates:
            if storage.exists(candidate.url):
                return candidate
    except Unusable as error:
        raise NoSuchVoice(f"no voice can have this name: {error.detail}") from None
    raise NoSuchVoice(f"there is no voice {name!r} of tenant {tenant!r} in {folder}; jobs/voices.py list shows them")


def found(folder: str, tenant: str | None = None) -> Iterator[VoiceFile]:
    """All voices of a folder, or of one tenant in it, by tenant and speaker. Raises NoSuchVoice without a folder."""
    fs, path = storage.filesystem(folder)
    if not fs.isdir(path):
        raise NoSuchVoice(f"{folder} is no folder of voices; name one with --voices")
    inside = sorted(
        entry["name"].rstrip("/").rpartition("/")[2]
        for entry in fs.ls(path, detail=True)
        if entry["type"] == "directory"
    )
    for owner in inside:
        if TENANT.fullmatch(owner) and tenant in (None, owner):
            for name in storage.names(storage.join(folder, owner)):
                if (speaker := speaker_of(name)) is not None:
                    yield VoiceFile(folder, owner, speaker)


def speaker_of(name: str) -> str | None:
    """Whose voice a file of this name is; None for a name that is not given to voices."""
    key = name.removesuffix(SUFFIX)
    try:
        speaker = id_of(key)
        return speaker if f"{file_key(speaker)}{SUFFIX}" == name else None
    except (UnicodeDecodeError, Unusable):
        return None
