"""Who is to be enrolled: a stream of `Speaker | Reject` from a JSONL file or a folder, one at a time.

    {"speaker": "ada", "samples": [{"audio": "ada/1.wav", "text": "Good morning."}, …],
     "consent": {"who": "Ada Example", "when": "2025-03-01", "scope": "audiobooks, contract 17"}}

A folder has a folder a speaker: recordings, transcripts beside them (`1.wav`, `1.txt`), and `consent.json`. Consent
may come from a file of its own, `consents`: one record for all, or a record each. Without one a speaker is refused.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra import storage
from model.voice_file import VoiceError, check_consent
from pipeline.keys import key_of
from pipeline.manifests import fields
from pipeline.manifests.errors import ManifestError
from pipeline.manifests.lines import LONGEST_LINE, lines
from pipeline.utterances import Reject, Unusable, Utterance

AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".sph", ".w64", ".rf64")
CONSENT_FILE = "consent.json"
MOST_SAMPLES = 100_000

Consent = dict[str, str]


@dataclass(frozen=True)
class Speaker:
    """One speaker's recordings and consent."""

    name: str
    key: str
    """Of the voice's file, without the ending."""
    samples: tuple[Utterance, ...]
    """With absolute paths or URLs."""
    consent: Consent
    where: str
    """Where it was said: `speakers.jsonl:17`, a folder."""
    told: str = ""
    """The samples as they were given, as canonical JSON: what says whether they have changed."""


class Consents:
    """Consent records from a file: JSON, one record or `{speaker: record}`, or JSONL, `speaker` and a record a line.

    Raises:
        ManifestError: a file that cannot be read, or is neither.
    """

    def __init__(self, url: str | None = None) -> None:
        self._of: dict[str, Any] = {}
        self._all: Any = None
        if url is None:
            return
        content = b"\n".join(lines(url))
        try:
            whole = json.loads(content)
        except (ValueError, RecursionError):
            self._read_lines(url, content)
            return
        if not isinstance(whole, dict):
            raise ManifestError(f"{url}: expected a consent record, {{speaker: record}}, or JSONL with a record a line")
        if "speaker" in whole and isinstance(whole["speaker"], str):
            self._of = {whole["speaker"]: _record_of(whole)}
        elif any(isinstance(value, dict) for value in whole.values()):
            self._of = whole
        else:
            self._all = whole

    def of(self, speaker: str, given: Any = None) -> Consent:
        """A speaker's record: its own in the file, then what came with its samples, then the one for all.

        Raises:
            Unusable: `no-consent`.
        """
        record = next((r for r in (self._of.get(speaker), given, self._all) if r is not None), None)
        return checked_consent(record, speaker)

    def _read_lines(self, url: str, content: bytes) -> None:
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self._of[row["speaker"]] = _record_of(row)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ManifestError(
                    f"{url}:{number}: expected {{speaker, who, when, scope}}, found {fields.shown(line[:60])}"
                ) from None


def file_key(speaker: str) -> str:
    """Name of a speaker's file, without the ending; one part, whatever the name is, and `keys.id_of` gives it back.

    Raises:
        Unusable: `bad-id`, `id-too-long`.
    """
    return key_of(speaker).replace("/", "%2F")


def checked_consent(record: Any, speaker: str) -> Consent:
    """The record, if it says who agreed, when, and to what. Raises Unusable `no-consent`."""
    try:
        check_consent(record, speaker)
    except VoiceError as error:
        raise Unusable("no-consent", str(error)) from None
    return record


def read_speakers(url: str, consents: Consents | None = None) -> Iterator[Speaker | Reject]:
    """The speakers of a JSONL file or a folder, and what of it cannot be used, in its order.

    Raises:
        ManifestError: nothing is there, or it cannot be read.
    """
    consents = consents or Consents()
    try:
        is_folder = storage.filesystem(url)[0].isdir(storage.filesystem(url)[1])
    except (OSError, ValueError, ImportError) as error:
        raise ManifestError(f"{url}: cannot be opened: {error}") from None
    seen: set[str] = set()
    for part in _from_folder(url, consents) if is_folder else _from_lines(url, consents):
        if isinstance(part, Speaker):
            if part.key in seen:
                part = Reject(
                    part.name, "speakers", "duplicate-speaker", "named before; one entry a speaker", part.where
                )
            else:
                seen.add(part.key)
        yield part


def _from_lines(url: str, consents: Consents) -> Iterator[Speaker | Reject]:
    folder, name = fields.folder_of(url), fields.name_of(url)
    for number, line in enumerate(lines(url), 1):
        if not line.strip():
            continue
        where, row = f"{name}:{number}", None
        try:
            if len(line) > LONGEST_LINE:
                raise Unusable("line-too-long", f"over {LONGEST_LINE} bytes; give a speaker fewer samples")
            row = _parsed(line)
            yield _speaker(row, folder, where, consents)
        except Unusable as error:
            speaker = row.get("speaker") if isinstance(row, dict) else ""
            yield Reject(str(speaker or "")[:200], "speakers", error.reason, error.detail, where)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unusable("not-json", f"no JSON: {error}") from None
    if not isinstance(row, dict):
        raise Unusable("not-json", f"expected an object with speaker, samples and consent, not {type(row).__name__}")
    return row


def _speaker(row: dict[str, Any], folder: str, where: str, consents: Consents) -> Speaker:
    """Raises Unusable."""
    name, given = row.get("speaker"), row.get("samples")
    if not isinstance(name, str) or not name.strip():
        raise Unusable("no-speaker", "the field 'speaker' is missing or no text")
    key = file_key(name)
    consent = consents.of(name, row.get("consent"))
    if not isinstance(given, list) or not given:
        raise Unusable("no-samples", "samples must be a list of {audio, text}, and not empty")
    if len(given) > MOST_SAMPLES:
        raise Unusable("too-many-samples", f"{len(given)} samples, at most {MOST_SAMPLES}")
    samples = []
    for place, sample in enumerate(given):
        sample = {"audio": sample} if isinstance(sample, str) else sample
        if not isinstance(sample, dict):
            raise Unusable("bad-field", f"sample {place} must be {{audio, text}}, not {fields.shown(sample)}")
        found = fields.utterance({**sample, "speaker": name}, folder, f"{where}, sample {place}")
        if isinstance(found, Reject):
            raise Unusable(found.reason, f"sample {place}: {found.detail}")
        samples.append(found)
    told = json.dumps(given, sort_keys=True, separators=(",", ":"), default=str)
    return Speaker(name, key, tuple(samples), consent, where, told)


def _from_folder(url: str, consents: Consents) -> Iterator[Speaker | Reject]:
    root = storage.absolute(url)
    fs, path = storage.filesystem(root)
    try:
        entries = sorted(fs.ls(path, detail=True), key=lambda entry: entry["name"])
    except OSError as error:
        raise ManifestError(f"{url}: cannot be listed: {error}") from None
    for entry in entries:
        name = posixpath.basename(entry["name"].rstrip("/"))
        if entry["type"] != "directory" or name.startswith("."):
            continue
        folder = storage.join(root, name)
        try:
            yield _speaker_of_folder(name, folder, consents)
        except Unusable as error:
            yield Reject(name, "speakers", error.reason, error.detail, folder)


def _speaker_of_folder(name: str, folder: str, consents: Consents) -> Speaker:
    """Raises Unusable."""
    key = file_key(name)
    try:
        there = storage.names(folder)
    except OSError as error:
        raise Unusable("unreadable-folder", f"{folder} cannot be listed: {error}") from None
    given = _json_file(storage.join(folder, CONSENT_FILE)) if CONSENT_FILE in there else None
    consent = consents.of(name, given)
    samples, told = [], []
    for file in there:
        stem, ending = posixpath.splitext(file)
        if ending.lower() not in AUDIO or file.startswith("."):
            continue
        text = _text_file(storage.join(folder, f"{stem}.txt")) if f"{stem}.txt" in there else None
        samples.append(Utterance(stem, storage.join(folder, file), text, name, where=storage.join(folder, file)))
        told.append({"audio": file, "text": text})
    if not samples:
        raise Unusable("no-samples", f"no recording in the folder; audio files end in {', '.join(AUDIO)}")
    return Speaker(name, key, tuple(samples), consent, folder, json.dumps(told, sort_keys=True, separators=(",", ":")))


def _text_file(url: str) -> str:
    try:
        return storage.read_text(url).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable("bad-transcript", f"{url} cannot be read: {error}") from None


def _json_file(url: str) -> Any:
    try:
        return json.loads(storage.read_bytes(url))
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable("no-consent", f"{url} cannot be read: {error}") from None


def _record_of(row: dict[str, Any]) -> Any:
    return row["consent"] if "consent" in row else {name: value for name, value in row.items() if name != "speaker"}
