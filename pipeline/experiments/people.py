"""The speakers of an experiment: their recordings as tokens, by the code that enrolls them, and what is held out."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.codec_weights import ResolvedCodec
from pipeline.experiments.cells import Cell, ExperimentError
from pipeline.experiments.cells import run as run_cells
from pipeline.experiments.config import ExperimentsConfig, condition_of
from pipeline.speakers import Speaker, read_speakers
from pipeline.utterances import Reject, Unusable, Utterance

if TYPE_CHECKING:
    from model.voice_samples import Sample

KIND = "tokens"
_HOLDS = 2
"""Goes up when cells come to hold more of the same samples."""
_LEAST = 2
"""Samples: one to tune on, one to measure on."""


@dataclass(frozen=True)
class Person:
    """A speaker under a condition, as tokens."""

    name: str
    condition: str
    digest: str
    """Of the tokens."""
    samples: tuple[dict[str, Any], ...]
    """text, phones, codes (base64 of uint16), frames, seconds, the place of each in what the speaker gave, and start,
    duration and channel of it in that recording, which may have been cut."""
    sources: tuple[str, ...] = ()
    """URLs of all that the speaker gave."""

    def recorded(self, place: int) -> tuple[np.ndarray, int]:
        """(float32 [time], samples a second): a sample as it was given, of clean speech.

        Raises:
            Unusable, OSError: the recording cannot be read any more.
        """
        from pipeline.audio import read_segment

        row = self.samples[place]
        return read_segment(self.sources[row["place"]], row["start"], row["duration"], channel=row["channel"])


@dataclass(frozen=True)
class _Kit:
    config: ExperimentsConfig
    codec: ResolvedCodec
    codebooks: int
    device: str
    speakers: dict[str, Speaker]


def gather(
    folder: str,
    name: str,
    config: ExperimentsConfig,
    codec: ResolvedCodec,
    codebooks: int,
    device: str,
    conditions: Sequence[str],
    on_done: Callable[[int, int], None],
) -> tuple[dict[str, dict[str, Person]], list[dict[str, str]]]:
    """({condition: {speaker: person}}, who was left out and why); under every condition the same order of speakers.

    Raises:
        ExperimentError: nobody can be used.
        ManifestError: the speakers' file cannot be read.
    """
    speakers, left_out = _chosen(config, config.people_of(name))
    kit = _Kit(config, codec, codebooks, device, speakers)
    cells = [_cell(kit, speaker, condition) for condition in conditions for speaker in speakers.values()]
    gpus = config.gpus if device == "cuda" else 0
    outcomes = run_cells(folder, cells, encode, kit, on_done, config.threads, gpus)
    found: dict[str, dict[str, Person]] = {condition: {} for condition in conditions}
    for outcome in outcomes:
        result, speaker, condition = outcome["result"], *(outcome["settings"][n] for n in ("speaker", "condition"))
        if len(result["samples"]) < _LEAST:
            reasons = ", ".join(sorted({reject["reason"] for reject in result["rejects"]})) or "gave too few"
            reason = f"{len(result['samples'])} usable samples, {_LEAST} are needed ({reasons})"
            left_out.append({"speaker": speaker, "condition": condition, "reason": reason})
            continue
        person = Person(speaker, condition, result["digest"], tuple(result["samples"]), tuple(result["sources"]))
        found[condition][speaker] = person
    if not any(found.values()):
        first = f"; first: {left_out[0]['speaker']}: {left_out[0]['reason']}" if left_out else ""
        raise ExperimentError(f"{config.speakers} has no speaker that can be used{first}")
    return found, left_out


def encode(cell: Cell, kit: _Kit) -> tuple[dict[str, Any], dict[str, Any]]:
    """The work of a cell of kind `tokens`."""
    import torch

    from pipeline.speaker_samples import SampleEncoder, settings_of

    torch.set_num_threads(kit.config.threads)
    speaker = kit.speakers[cell.settings["speaker"]]
    kind, number = condition_of(cell.settings["condition"])
    settings = settings_of(kit.config.enrolling(), kit.codebooks, kit.device)
    encoder = SampleEncoder(settings, kit.codec, kit.codec.identity.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        given, rejects = list(speaker.samples), []
        if kind != "clean":
            given, rejects = _degraded(given, kind, number, kit.config, folder)
        encoded, refused = encoder.encode(given)
    rows = [
        {
            "codes": base64.b64encode(np.ascontiguousarray(sample.codes, "<u2").tobytes()).decode(),
            "frames": sample.codes.shape[1],
            "phones": sample.phones,
            "text": sample.text,
            "seconds": sample.seconds,
            "place": next(i for i, one in enumerate(speaker.samples) if sample.where == (one.where or one.audio)),
        }
        for sample in encoded
    ]
    rejects = [{"reason": reject.reason, "where": reject.where} for reject in [*rejects, *refused]]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    for row, sample in zip(rows, encoded, strict=True):
        row |= {name: getattr(sample.source, name) for name in ("start", "duration", "channel")}
    sources = [one.audio for one in speaker.samples]
    return {"samples": rows, "rejects": rejects, "digest": digest, "sources": sources}, {}


def samples_of(person: Person, ids: dict[str, int]) -> list[Sample]:
    """As tuners take them. Raises Unusable."""
    from pipeline.speaker_samples import to_samples

    rows = [{"phones": row["phones"], "codes": codes_of(row)} for row in person.samples]
    return to_samples(rows, ids)


def codes_of(row: dict[str, Any]) -> np.ndarray:
    """uint16 [K, frames] of a row of a person's samples."""
    return np.frombuffer(base64.b64decode(row["codes"]), "<u2").reshape(-1, row["frames"])


def divided(person: Person, config: ExperimentsConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(to tune on, held out): ascending places in `person.samples`, by what the speaker gave: the same recordings are
    held out under every condition."""
    from model.initial_state import Recipe, number
    from model.voice_samples import split

    recipe = Recipe(held_out=config.held_out, held_out_most=config.held_out_most)
    _, held = split(max(_LEAST, len(person.sources)), recipe, number(config.seed, "held out", person.name))
    places = [row["place"] for row in person.samples]
    apart = [place for place, given in enumerate(places) if given in held]
    if not apart or len(apart) == len(places):  # what was held out cannot be used, or nothing else can
        apart = [0]
    return tuple(place for place in range(len(places)) if place not in apart), tuple(apart)


def _chosen(config: ExperimentsConfig, most: int) -> tuple[dict[str, Speaker], list[dict[str, str]]]:
    from infra import storage
    from pipeline.speakers import Consents

    chosen: dict[str, Speaker] = {}
    left_out = []
    for part in read_speakers(storage.absolute(config.speakers), Consents(config.consent_file)):
        if isinstance(part, Reject):
            left_out.append({"speaker": part.id, "condition": "", "reason": f"{part.reason}: {part.detail}"})
            continue
        chosen[part.name] = part
        if len(chosen) == most:
            break
    return chosen, left_out


def _cell(kit: _Kit, speaker: Speaker, condition: str) -> Cell:
    """Tokens depend on the recordings as they were given, not on who computes them."""
    told = hashlib.sha256(speaker.told.encode()).hexdigest()
    settings = {
        "speaker": speaker.name,
        "condition": condition,
        "samples": told,
        "first": speaker.samples[0].audio,
        "codec": kit.codec.identity.digest,
        "codebooks": kit.codebooks,
        "read": kit.config.enrolling().token_settings(),
        "holds": _HOLDS,
    }
    return Cell(KIND, settings | ({} if condition == "clean" else {"seed": kit.config.seed}))


def _degraded(
    samples: Sequence[Utterance], kind: str, number: float, config: ExperimentsConfig, folder: str
) -> tuple[list[Utterance], list[Reject]]:
    """The recordings as files in a folder, made worse; and those that cannot be read."""
    import soundfile

    from model.initial_state import number as seeded
    from pipeline.audio import read_segment
    from pipeline.experiments.degrading import degraded

    worse, rejects = [], []
    for place, sample in enumerate(samples):
        where = sample.where or sample.audio
        try:
            wave, rate = read_segment(sample.audio, sample.start, sample.duration, channel=sample.channel)
        except (Unusable, OSError) as error:
            reason, detail = getattr(error, "reason", "storage-error"), getattr(error, "detail", str(error))
            rejects.append(Reject(sample.speaker, "decode", reason, detail, where))
            continue
        seed = seeded(config.seed, sample.speaker, place, kind)
        file = os.path.join(folder, f"{place}.wav")
        soundfile.write(file, degraded(wave, rate, kind, number, seed), rate, subtype="FLOAT")
        worse.append(sample._replace(audio=file, start=0.0, duration=None, channel=None, where=where))
    return worse, rejects
