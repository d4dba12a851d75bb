"""Voices that experiments made say sentences: what goes wrong is noted, and some of it is judged."""

from __future__ import annotations

import functools
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import storage
from pipeline.experiments.people import codes_of
from pipeline.listening import wav

if TYPE_CHECKING:
    from model.initial_state import Memories
    from model.voice_samples import Sample
    from pipeline.codec_weights import ResolvedCodec
    from pipeline.experiments.adapting import Given, Kit
    from pipeline.experiments.cells import Cell
    from pipeline.judging import Judge
    from pipeline.synthesis import ModelFiles, Synthesizer

_TEXTS = 20_250_301
"""Seed of the sentences: not one that a corpus is made with."""


def sentences(count: int, seed: int) -> list[str]:
    """What is said; the same for every voice."""
    from pipeline.demo_text import sentences as endless

    return list(islice((text for text in endless(_TEXTS + seed) if 5 <= len(text.split()) <= 16), count))


def speak(cell: Cell, kit: Kit, given: dict[str, Given]) -> dict[str, list[dict[str, Any]]]:
    """By speaker, a row a sentence: faults and coverage of one attempt, and the judgement where that was asked for."""
    from pipeline.speakers import file_key
    from pipeline.speech_lines import derived

    settings, found = cell.settings, {}
    for name in settings["speak"]["who"]:
        one, found[name] = given[name], []
        synthesizer = synthesizer_of(kit, one)
        for place, text in enumerate(sentences(settings["speak"]["sentences"], kit.config.seed)):
            seed = derived(settings["seed"], name, place)
            samples, row = said(synthesizer, one.memories, one.prompt, text, seed)
            if name in settings.get("judge", {"who": ()})["who"]:
                url = storage.join(kit.folder, "speech", cell.name, f"{file_key(name)}-{place}.wav")
                rate, reference = synthesizer.card.codec.sample_rate, reference_of(kit, name)
                row |= judged(kit.folder, settings["judge"]["recogniser"], samples, rate, text, url, reference)
            found[name].append(row)
    return found


def originals(cell: Cell, kit: Kit) -> dict[str, dict[str, Any]]:
    """By speaker, judgements of what it said itself: of held-out samples other than the one that voices are held
    against; of nobody who holds out a single one. With the method `codec`, of what the codec makes of them."""
    from pipeline.speakers import file_key

    settings, codec = cell.settings, kit.codec.build(kit.device)
    found: dict[str, dict[str, Any]] = {}
    for row in settings["people"]:
        name, said = row["name"], []
        person = kit.people["clean"][name]
        for place in row["held"][1 : 1 + settings["speak"]["sentences"]]:
            sample = person.samples[place]
            if settings["method"]["name"] == "codec":
                (wave,), rate = codec.decode([codes_of(sample)]), codec.config.sample_rate
            else:
                wave, rate = person.recorded(place)
            url = storage.join(kit.folder, "speech", cell.name, f"{file_key(name)}-{place}.wav")
            judgement = (settings["judge"]["recogniser"], wave, rate, sample["text"], url, reference_of(kit, name))
            said.append({"text": sample["text"], "faults": [], **judged(kit.folder, *judgement)})
        found[name] = {"speech": said}
    return found


def synthesizer_of(kit: Kit, given: Given) -> Synthesizer:
    """With the model that a method made, or the one that it was given."""
    from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, pack, read_card
    from pipeline.synthesis import ModelFiles

    files = kit.files
    if given.model is not None:
        packed = pack(given.model, read_card(files.config))
        files = ModelFiles("adapted weights", packed[CONFIG_FILE], packed[WEIGHTS_FILE])
    return single_attempts(files, kit.codec, kit.device)


def single_attempts(files: ModelFiles, codec: ResolvedCodec, device: str) -> Synthesizer:
    """A synthesizer that never says a sentence again: what is measured is the model."""
    from pipeline.synthesis import Synthesizer

    return Synthesizer(files, codec, device, retries=0)


def said(
    synthesizer: Synthesizer, memories: Memories | None, prompt: Sample | None, text: str, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """(float32 [time], text, faults, coverage and seconds) of a sentence, from memories or after a prompt."""
    from pipeline.speech_lines import Line, Prompt, Voice

    voice = None
    if memories is not None:
        position = None if memories.position is None else memories.position[None]
        voice = Voice("experiment", [memory[None] for memory in memories.layers], position)
    spoken = synthesizer.say(Line(text, voice, seed, None if prompt is None else Prompt(prompt)))
    coverage = min(piece.findings.coverage for piece in spoken.pieces)
    seconds = len(spoken.samples) / synthesizer.card.codec.sample_rate
    told = {"text": text, "faults": list(spoken.faults), "coverage": round(coverage, 4)}
    return spoken.samples, told | {"said_seconds": round(seconds, 3)}


def judged(
    folder: str, recogniser: str, samples: np.ndarray, rate: int, text: str, url: str, reference: str
) -> dict[str, Any]:
    """What `pipeline.judging.Judge` says of a recording, which is written to `url`, beside the voice of another."""
    from pipeline.judging import Task

    if len(samples):
        storage.write_bytes(url, wav(samples, rate))
    task = Task("", "", text, url if len(samples) else "", reference)
    row = _judge(folder, recogniser).judge(task)
    return {key: value for key, value in row.items() if key not in ("system", "id", "text")}


def reference_of(kit: Kit, name: str) -> str:
    """URL of a recording of the speaker that nothing is tuned on; written once."""
    from pipeline.experiments.people import divided
    from pipeline.speakers import file_key

    person = kit.people["clean"][name]
    url = storage.join(kit.folder, "speech", "reference", f"{file_key(name)}.wav")
    if not storage.exists(url):
        storage.write_bytes(url, wav(*person.recorded(divided(person, kit.config)[1][0])))
    return url


@functools.lru_cache(maxsize=1)
def _judge(folder: str, recogniser: str) -> Judge:
    """One for the life of a worker."""
    from pipeline.judging import Judge

    return Judge(folder, recogniser)
