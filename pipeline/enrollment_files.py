"""What an enroll job keeps on disk, beside its voices.

<output>/<tenant>/<key>.safetensors            a voice; once it is there, its speaker is done
<output>/.enrollment/settings.json             what the folder is bound to
<output>/.enrollment/<tenant>/<key>.json       a speaker's row of the report, its samples that could not be used, and
                                               digests of its recordings' sizes and times and of the voice's record
<output>/report.html, voices.csv, voices.json, quarantine.jsonl, summary.json        of the last batch
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from infra import storage
from model.voice_file import LARGEST_HEADER, SUFFIX, VoiceError, read_record
from pipeline import json_lines
from pipeline.plan import PlanError, differences
from pipeline.speakers import Speaker
from pipeline.utterances import Reject, Unusable

FOLDER = ".enrollment"


@dataclass(frozen=True)
class VoiceFolder:
    """One tenant's voices in an output."""

    output: str
    tenant: str
    settings: dict[str, Any]
    """What every voice of it is made with: model, codec, dtype, recipe.*, and how samples are read."""

    def voice_url(self, key: str) -> str:
        return storage.join(self.output, self.tenant, f"{key}{SUFFIX}")

    def source(self, speaker: Speaker) -> str:
        """Digest of all that a speaker's voice depends on beside model and recipe; equal means up to date."""
        rest = {n: v for n, v in self.settings.items() if n != "model" and not n.startswith("recipe.")}
        parts = (speaker.told, speaker.consent, rest)
        return _digest(parts)

    def recordings(self, speaker: Speaker) -> str:
        """Digest of sizes and times of a speaker's recordings. Not in the voice, whose bytes have no clock."""
        return _digest([storage.version(sample.audio) for sample in speaker.samples])

    def known(self, speaker: Speaker) -> dict[str, Any] | None:
        """What is noted of a speaker whose voice is up to date; None where it is to be tuned.

        Raises:
            Unusable: `other-voice`: there is one of another model or recipe, which is not ours to replace.
        """
        url = self.voice_url(speaker.key)
        if not storage.exists(url):
            return None
        try:
            record = read_record(storage.read_range(url, 0, LARGEST_HEADER + 8))
        except (VoiceError, FileNotFoundError):
            return None
        found, recipe = {"model": record["model"]}, record["training"].get("recipe")
        found |= {f"recipe.{name}": value for name, value in recipe.items()} if isinstance(recipe, dict) else {}
        expected = {n: v for n, v in self.settings.items() if n == "model" or n.startswith("recipe.")}
        if changed := differences(found, expected):
            raise Unusable("other-voice", f"{url} was made otherwise ({'; '.join(changed[:3])}); delete it first")
        if record["training"].get("source") != self.source(speaker):
            return None
        note = self.note(speaker.key) or {"row": _row_of(record), "rejects": []}
        if "recordings" not in note:
            return note
        # A killed writer may have left the note of a voice that never came.
        same = note["voice"] == _digest(record) and note["recordings"] == self.recordings(speaker)
        return note if same else None

    def note(self, key: str) -> dict[str, Any] | None:
        """What `write` noted."""
        url = storage.join(self.output, FOLDER, self.tenant, f"{key}.json")
        try:
            return json.loads(storage.read_bytes(url))
        except (FileNotFoundError, ValueError):
            return None

    def write(
        self, speaker: Speaker, voice: bytes, row: dict[str, Any], rejects: list[Reject], recordings: str = ""
    ) -> dict[str, Any]:
        """Keeps a voice; the voice itself goes last. Returns the note.

        Args:
            recordings: their digest before they were read; without one, only `source` says what is up to date.
        """
        note = {"row": row, "rejects": [reject._asdict() for reject in rejects]}
        note |= {"recordings": recordings, "voice": _digest(read_record(voice))} if recordings else {}
        json_lines.write(storage.join(self.output, FOLDER, self.tenant, f"{speaker.key}.json"), [note])
        storage.write_bytes(self.voice_url(speaker.key), voice)
        return note

    def check(self) -> None:
        """Raises PlanError where the output is bound to other settings, with what differs."""
        url = storage.join(self.output, FOLDER, "settings.json")
        if storage.exists(url) and (changed := differences(json.loads(storage.read_text(url)), self.settings)):
            raise PlanError(
                f"{self.output} holds voices that were made otherwise; choose another --output, or undo:\n  "
                + "\n  ".join(changed)
            )

    def bind(self) -> None:
        """Binds the output to these settings; before its first voice is written."""
        url = storage.join(self.output, FOLDER, "settings.json")
        if not storage.exists(url):
            storage.write_text(url, json.dumps(self.settings, indent=2) + "\n")

    def remove_leftovers(self) -> None:
        """Takes away what killed writers left; only local files are written under temporary names."""
        for folder in ((self.tenant,), (FOLDER,), (FOLDER, self.tenant)) if storage.is_local(self.output) else ():
            storage.remove_leftovers(storage.join(self.output, *folder))


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _row_of(record: dict[str, Any]) -> dict[str, Any]:
    """The report's row of a voice of which nothing but the file is left."""
    training = record["training"]
    names = ("held_out", "steps", "best_step", "base_loss", "continuation_loss", "tuned_loss", "curve")
    row = {"speaker": record["speaker"], "samples": training.get("samples", 0) + training.get("held_out", 0)}
    row |= {"seconds": training.get("data_seconds"), "ended": training.get("reason")}
    return row | {name: training.get(name) for name in names}
