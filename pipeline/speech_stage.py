"""The stage of Ray Data that speaks: a chunk of a script's lines becomes files, and a list of what became of each."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from infra import storage
from model.lina_config import ModelError
from model.sampling import Policy
from pipeline import json_lines
from pipeline.codec_weights import ResolvedCodec
from pipeline.keys import key_of
from pipeline.scripts import Chunk, ScriptLine
from pipeline.speakers import file_key
from pipeline.speaking_prompts import read_prompt
from pipeline.speaking_voices import stored_voice
from pipeline.speech_files import Provenance, SpeechFileError, decode, encode
from pipeline.speech_lines import Line, Prompt, Spoken, Voice, derived
from pipeline.synthesis import ModelFiles, Synthesizer
from pipeline.synthesize_config import SynthesizeConfig
from pipeline.utterances import Unusable

FOLDER = ".synthesis"
"""Of the output, for what became of each chunk; keys of lines have no dots, so no line's file is in it."""
_log = logging.getLogger(__name__)


class SynthesisError(RuntimeError):
    """Speech that could not be made."""


@dataclass(frozen=True)
class Work:
    """What every worker knows."""

    config: SynthesizeConfig
    model: str
    """The model's fingerprint."""
    settings: str
    """How lines are said, as JSON."""

    @classmethod
    def of(cls, config: SynthesizeConfig, settings: dict[str, Any]) -> Work:
        return cls(config, settings["model"], json.dumps(settings, sort_keys=True))


def synthesizer_of(config: SynthesizeConfig, files: ModelFiles, codec: ResolvedCodec) -> Synthesizer:
    """A synthesizer as a configuration asks for it. Raises ModelError, CodecError."""
    import torch

    torch.set_num_threads(config.threads)
    policy = Policy(config.temperature, config.top_k)
    return Synthesizer(files, codec, config.device, config.dtype, policy, rows=config.rows, retries=config.retries)


def describe(spoken: Spoken) -> dict[str, Any]:
    """What is reported of a line that was said."""
    return {
        "seconds": round(spoken.seconds, 3),
        "pieces": len(spoken.pieces),
        "attempts": spoken.attempts,
        "faults": list(spoken.faults),
        "coverage": round(min(piece.findings.coverage for piece in spoken.pieces), 4),
    }


def provenance_of(model: str, voice: Voice | None, text: str, details: dict[str, Any]) -> Provenance:
    if voice is None:
        return Provenance(model, text=text, details=details)
    return Provenance(model, voice.name, voice.consent, text, {**details, "voice_file": voice.digest})


class Speak:
    """An actor that owns a synthesizer; a call is a chunk, whose lines share one continuous batch."""

    def __init__(self, work: Work, shipped: Any) -> None:
        """`shipped` is (ModelFiles, ResolvedCodec) or a Ray reference to them: they reach a node once."""
        import ray

        files, codec = ray.get(shipped) if isinstance(shipped, ray.ObjectRef) else shipped
        self.work = work
        self.synthesizer = synthesizer_of(work.config, files, codec)
        self.voice = lru_cache(maxsize=256)(self._voice)
        self.prompt = lru_cache(maxsize=256)(self._prompt)

    def __call__(self, table):
        """`table` has a column chunk, of `scripts.Chunk` as JSON; gives a column rows, what became of its lines: none
        for a chunk that the storage kept from being done, which is missing then."""
        import pyarrow as pa

        rows = []
        for chunk in table["chunk"].to_pylist():
            name, lines = json.loads(chunk)
            try:
                rows.append(json.dumps(self._said(Chunk(name, tuple(ScriptLine(*line) for line in lines)))))
            except OSError as error:
                _log.warning("chunk %s is not done, for the storage failed again and again: %s", name, error)
        return pa.table({"rows": pa.array(rows, pa.large_string())})

    def _said(self, chunk: Chunk) -> list[dict[str, Any]]:
        """What became of a chunk's lines, written. Raises OSError: the storage failed, and it is not written."""
        rows: dict[int, dict[str, Any]] = {}
        faults: list[OSError] = []
        # To its end even then: what is being said would be in the way of the next chunk.
        for number, spoken in self.synthesizer.speak(self._lines(chunk, rows, faults)):
            if not faults:
                try:
                    rows[number] = self._written(chunk.lines[number], spoken)
                except OSError as error:
                    faults.append(error)
        if faults:
            raise faults[0]
        ordered = [rows[number] for number in range(len(chunk.lines))]
        url = storage.join(self.work.config.output, FOLDER, f"{chunk.name}.jsonl")
        storage.patiently(partial(json_lines.write, url, ordered))
        return ordered

    def _lines(
        self, chunk: Chunk, rows: dict[int, dict[str, Any]], faults: list[OSError]
    ) -> Iterator[tuple[int, Line]]:
        """What of a chunk is to be said, the longest texts first, so that no single one is left at the end; the rest
        goes into `rows`. Ends with the first of `faults`, which the storage's go into."""
        for number in sorted(range(len(chunk.lines)), key=lambda n: -len(chunk.lines[n].text)):
            if faults:
                return
            line = chunk.lines[number]
            try:
                voice, prompt = self._started(line)
                known = self._kept(line, voice, prompt)
            except Unusable as error:
                rows[number] = _reject(line, "prompt" if line.prompt else "voice", error.reason, error.detail)
                continue
            except OSError as error:
                faults.append(error)
                return
            if known:
                rows[number] = known
            else:
                yield number, Line(line.text, voice, derived(self.work.config.seed, line.id), prompt)

    def _started(self, line: ScriptLine) -> tuple[Voice | None, Prompt | None]:
        """What a line starts from. Raises Unusable, OSError."""
        voice = self.voice(line.voice) if line.voice else None
        return voice, self.prompt(*line[4:]) if line.prompt else None

    def _prompt(self, url: str, text: str, version: str) -> Prompt:
        """Raises Unusable, OSError."""
        return read_prompt(url, text, self.synthesizer)

    def _voice(self, name: str) -> Voice:
        """Raises Unusable, OSError."""
        if not self.work.config.voices:
            raise Unusable("no-voices", f"voice {name!r} is asked for, but no folder of voices was named by --voices")
        try:
            # The first refuses what would leave the folder; enrolled voices lie under the others.
            keys = dict.fromkeys((name, key_of(name), file_key(name)))
        except Unusable as error:
            raise Unusable("bad-voice", f"voice {error.detail}") from None
        urls = [storage.join(self.work.config.voices, f"{key}.safetensors") for key in keys]
        url = storage.patiently(lambda: next(filter(storage.exists, urls), None))
        if url is None:
            files = " or ".join(f"{key}.safetensors" for key in keys)
            raise Unusable("unknown-voice", f"{self.work.config.voices} has no {files}")
        try:
            return storage.patiently(partial(stored_voice, url, self.synthesizer.card, name))
        except ModelError as error:
            raise Unusable("unusable-voice", str(error)) from None

    def _kept(self, line: ScriptLine, voice: Voice | None, prompt: Prompt | None) -> dict[str, Any] | None:
        """What is known of a line whose file is there and says that it was made for this request."""
        content = storage.patiently(partial(_content, self._url(line)))
        if content is None:
            return None
        try:
            samples, rate, provenance = decode(content)
        except SpeechFileError:
            return None
        details = provenance.details if provenance else {}
        report = details.get("report")
        if report is None or details.get("request") != self._request(line, voice, prompt):
            return None
        # libsndfile reads what is there of a file that was cut off.
        whole = round(len(samples) / rate, 3) == report["seconds"]
        return self._row(line, report) if whole else None

    def _written(self, line: ScriptLine, spoken: Spoken | Exception) -> dict[str, Any]:
        if isinstance(spoken, Unusable):
            return _reject(line, "phonemise", spoken.reason, spoken.detail)
        if isinstance(spoken, ModelError):
            return _reject(line, "voice", "unusable-voice", str(spoken))
        (voice, prompt), report = self._started(line), describe(spoken)
        details = {"request": self._request(line, voice, prompt), "report": report}
        details |= {"prompt": prompt.digest} if prompt else {}
        provenance = provenance_of(self.work.model, voice, line.text, details)
        try:
            content = encode(spoken.samples, spoken.rate, provenance, self.work.config.format)
        except SpeechFileError as error:
            return _reject(line, "write", "no-file", f"{error} (faults: {', '.join(spoken.faults) or 'none'})")
        storage.patiently(partial(storage.write_bytes, self._url(line), content))
        return self._row(line, report) | {"took": round(spoken.took, 4)}

    def _url(self, line: ScriptLine) -> str:
        return storage.join(self.work.config.output, f"{line.key}.{self.work.config.format}")

    def _row(self, line: ScriptLine, report: dict[str, Any]) -> dict[str, Any]:
        file = f"{line.key}.{self.work.config.format}"
        return {"id": line.id, "file": file, "voice": line.voice, "text": line.text, **report}

    def _request(self, line: ScriptLine, voice: Voice | None, prompt: Prompt | None) -> str:
        """Digest of all that a file's speech depends on."""
        parts = (self.work.settings, line.id, line.text, line.voice, voice.digest if voice else "")
        parts += (prompt.digest,) if prompt else ()
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _content(url: str) -> bytes | None:
    """A file's bytes; None where there is none."""
    return storage.read_bytes(url) if storage.exists(url) else None


def _reject(line: ScriptLine, stage: str, reason: str, detail: str) -> dict[str, Any]:
    return {"id": line.id, "stage": stage, "reason": reason, "detail": detail, "voice": line.voice, "text": line.text}
