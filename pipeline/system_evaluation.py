"""Systems that said the same set, judged on Ray: figures with intervals, coverage, a report.

    <output>/.scores/<chunk>.jsonl         judgements of a chunk of recordings; the chunk is done
    <output>/speech/                       what --model said (`pipeline.bulk_synthesis`)
    <output>/speed.jsonl                   how long each recording of it took
    <output>/scores.jsonl, figures.json, report.md, report.png       when everything is judged

A chunk's name has a digest of all that its judgements depend on, sizes and times of the recordings and of those that
their voices are compared with among it: the same command again judges what is new.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import storage
from pipeline import evaluation_sets, json_lines
from pipeline.evaluate_config import MODEL, RECONSTRUCTION, REFERENCE, EvaluateConfig
from pipeline.evaluation import Row, interval, table
from pipeline.evaluation_sets import Item
from pipeline.judging import FOLDER, Chunk, Judge, Task
from pipeline.measures import EvaluationError

if TYPE_CHECKING:
    from pipeline.codec_weights import ResolvedCodec
    from pipeline.utterances import Reject

_ENDINGS = (".wav", ".flac", ".opus", ".ogg", ".mp3")
_SPEED = "speed.jsonl"
ATTEMPTS = 3
"""Times over the set in which a chunk may be lost before the job gives up."""


@dataclass(frozen=True)
class Evaluation:
    """All that is settled before anything is judged."""

    config: EvaluateConfig
    items: list[Item]
    rejects: list[Reject]
    chunks: tuple[Chunk, ...]
    codec: ResolvedCodec | None
    speed: dict[str, float]
    """Seconds that a worker computes for a second of audio, of systems where it is known."""
    refused: dict[str, str]
    """Items that --model cannot say, and why."""

    @property
    def tasks(self) -> int:
        return sum(len(chunk.tasks) for chunk in self.chunks)

    def missing(self) -> list[Chunk]:
        """Chunks that are not judged; one listing."""
        names = set(storage.names(storage.join(self.config.output, FOLDER)))
        return [chunk for chunk in self.chunks if f"{chunk.name}.jsonl" not in names]


def say(config: EvaluateConfig, items: Sequence[Item]) -> None:
    """Lets --model say what of the set it has not said, and notes how long that took.

    Raises:
        ModelError, CodecError, PlanError, SynthesisError: as `pipeline.bulk_synthesis`.
    """
    from pipeline import bulk_synthesis
    from pipeline.synthesize_config import SynthesizeConfig

    output = storage.join(config.output, "speech")
    script = storage.join(config.output, "script.jsonl")
    json_lines.write(script, (_asked(config, item) for item in items))
    codec, weights = _spoken_codec(config)
    how = {"voices": config.voices, "seed": config.seed, "codec": codec, "codec_weights": weights}
    bulk = bulk_synthesis.plan(SynthesizeConfig(script=script, output=output, model=config.model, **how), prompts=True)
    bulk_synthesis.run(bulk, lambda rows: None)
    bulk_synthesis.finish(bulk)
    _note_speed(config)


def plan(config: EvaluateConfig, items: list[Item], rejects: list[Reject]) -> Evaluation:
    """Finds every system's recordings.

    Raises:
        EvaluationError: there is nothing to judge, or a folder cannot be listed.
        CodecError: the codec cannot be had.
    """
    from pipeline import codec_weights

    folders = config.folders() | ({MODEL: storage.join(config.output, "speech")} if config.model else {})
    refused = _refused(config)
    tasks = {
        name: list(_recorded(name, folder, items, refused if name == MODEL else {})) for name, folder in folders.items()
    }
    spoken = [item for item in items if item.reference]
    if spoken:
        tasks[REFERENCE] = [Task(REFERENCE, i.id, i.text, i.reference, i.likeness) for i in spoken]
    codec = codec_weights.resolve(config.codec, config.codec_weights) if config.codec else None
    if codec and spoken:
        tasks[RECONSTRUCTION] = [Task(RECONSTRUCTION, i.id, i.text, i.reference, i.likeness, True) for i in spoken]
    if not tasks:
        raise EvaluationError("nothing to judge: name systems with --systems or --model, or a set with references")
    bound = [config.recogniser, codec.digest if codec else "", config.codebooks]
    version = functools.cache(storage.version)  # one prompt serves many
    chunks = [chunk for system in sorted(tasks) for chunk in _chunks(tasks[system], config.chunk, bound, version)]
    return Evaluation(config, items, rejects, tuple(chunks), codec, _speed(config), refused)


def run(evaluation: Evaluation, on_rows: Callable[[list[dict[str, Any]]], None]) -> None:
    """Judges what is not judged yet.

    Args:
        on_rows: called with a chunk's judgements, as it is done.

    Raises:
        EvaluationError: chunks were lost `ATTEMPTS` times over.
    """
    import logging

    import pyarrow as pa
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    codec = ray.put((evaluation.codec, evaluation.config.codebooks)) if evaluation.codec else None
    reason = ""
    for _ in range(ATTEMPTS):
        if not (missing := evaluation.missing()):
            return
        most = min(evaluation.config.actors or int(ray.cluster_resources().get("CPU", 1)), len(missing))
        blocks = [pa.table({"chunk": pa.array([json.dumps(chunk)])}) for chunk in missing]
        judged = ray.data.from_arrow(blocks).map_batches(
            Judge,
            fn_constructor_args=(evaluation.config.output, evaluation.config.recogniser, codec),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
        )
        for block in judged.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for rows, lost in zip(*(block[name].to_pylist() for name in ("rows", "lost")), strict=True):
                if rows is None:
                    reason = lost
                else:
                    on_rows(json.loads(rows))
    if missing := evaluation.missing():
        raise EvaluationError(
            f"{len(missing)} chunks were lost {ATTEMPTS} times over, and the same command again takes them up: "
            + (f"the storage failed, last with: {reason}" if reason else "look into the workers' logs")
        )


def finish(evaluation: Evaluation) -> tuple[list[Row], list[dict[str, Any]]]:
    """Writes scores, figures and the report of a set that is all judged; returns the figures and the judgements."""
    output, scores = evaluation.config.output, []
    for chunk in evaluation.chunks:
        scores += json_lines.read(storage.join(output, FOLDER, f"{chunk.name}.jsonl"))
    for row in scores:
        if row["system"] == MODEL and "missing" in row:
            row["missing"] = evaluation.refused.get(row["id"], row["missing"])
    systems = list(dict.fromkeys(row["system"] for row in scores))
    order = [name for name in (REFERENCE, RECONSTRUCTION) if name in systems]
    order += [name for name in systems if name not in order]
    rows = [figures(name, [s for s in scores if s["system"] == name], evaluation.speed.get(name)) for name in order]
    json_lines.write(storage.join(output, "scores.jsonl"), scores)
    flat = {name: value for row in rows for name, value in row.metrics().items()}
    storage.write_text(storage.join(output, "figures.json"), json.dumps(flat, indent=2) + "\n")
    storage.write_text(storage.join(output, "report.md"), report(evaluation, rows, scores))
    return rows, scores


def figures(system: str, scores: Sequence[dict[str, Any]], speed: float | None = None) -> Row:
    """What a system reached: a missing recording has every word wrong and is like nobody; it has no mos.

    Args:
        scores: judgements of `pipeline.judging.Judge`.
        speed: seconds of computing a second of audio.
    """
    counted = {name: np.array([s[name] for s in scores], np.float64) for name in _COUNTS}
    found = {"coverage": interval(np.array([float("missing" not in s) for s in scores]), np.ones(len(scores)))}
    if counted["words"].sum():
        found["wer"] = interval(counted["word_errors"], counted["words"])
        found["cer"] = interval(counted["character_errors"], counted["characters"])
    for name, key in (("similarity", "likeness"), ("mos", "mos"), ("dnsmos", "dnsmos")):
        values = np.array([s[key] for s in scores if s.get(key) is not None], np.float64)
        if len(values):
            found[name] = interval(values, np.ones(len(values)))
    return Row(system, found, extra={} if speed is None else {"real-time factor": speed})


_COUNTS = ("words", "word_errors", "characters", "character_errors")


def report(evaluation: Evaluation, rows: Sequence[Row], scores: Sequence[dict[str, Any]]) -> str:
    """Markdown: the table, how it was measured, the worst lines of each system, what is missing."""
    items, config = evaluation.items, evaluation.config
    lines = [f"# {config.name}", "", table(rows), ""]
    lines += [
        f"{len(items)} items of `{config.set.rpartition('/')[2]}`. WER and CER: {config.recogniser}, beam 5, Whisper's "
        "English normaliser; a missing recording counts as all its words. SIM: Resemblyzer, to the prompt, or else the "
        "reference. In brackets: 95 % bootstrap intervals over items.",
        "",
    ]
    if config.model and (prompted := sum(bool(item.prompt and not item.voice) for item in items)):
        how = "says them in its own voice" if config.prompts == "ignore" else "goes on from the prompt"
        lines += [f"{prompted} items have a prompt and no voice: the model {how}.", ""]
    lines += [f"- {r.where}: {r.reason}: {r.detail}" for r in evaluation.rejects]
    for row in rows:
        own = [s for s in scores if s["system"] == row.system]
        lost = [s for s in own if "missing" in s]
        worst = sorted((s for s in own if "heard" in s and s["word_errors"]), key=lambda s: -s["word_errors"])[:5]
        lines += ["", f"## {row.system}", "", *(f"- missing {s['id']}: {s['missing']}" for s in lost[:20])]
        lines += [
            f"- {s['id']}, {s['word_errors']} of {s['words']} words: “{s['text']}” → “{s['heard']}”" for s in worst
        ]
    # Half a pair of surrogates can stand in JSON, and in no file of text.
    return ("\n".join(lines) + "\n").encode("utf-8", "replace").decode()


def missing_fraction(scores: Sequence[dict[str, Any]]) -> float:
    """The largest share of recordings that any system lacks."""
    systems = {s["system"] for s in scores}
    shares = [[float("missing" in s) for s in scores if s["system"] == name] for name in systems]
    return max((sum(share) / len(share) for share in shares), default=0.0)


def _spoken_codec(config: EvaluateConfig) -> tuple[str | None, str | None]:
    """(codec, its weights) of what --model says: --codec where that is the model's own, or else the model's by name.

    Raises:
        ModelError, CodecError: one of them cannot be had.
    """
    from model.checkpoint import read_card
    from pipeline import codec_weights
    from pipeline.synthesis import read_model

    if not config.codec:
        return None, config.codec_weights
    found = codec_weights.resolve(config.codec, config.codec_weights)
    wanted = read_card(read_model(config.model).config).codec
    return (config.codec, config.codec_weights) if found.identity == wanted else (None, None)


def _asked(config: EvaluateConfig, item: Item) -> dict[str, str]:
    """What --model is to say, as a line of a script."""
    line = {"id": item.id, "voice": item.voice, "text": item.text}
    if not item.prompt or item.voice or config.prompts == "ignore":
        return line
    prompt = {"prompt": item.prompt, "prompt_text": item.prompt_text}
    return line | prompt | {"prompt_version": " ".join(storage.version(item.prompt))}


def _refused(config: EvaluateConfig) -> dict[str, str]:
    """Items that --model could not say, and why; files of theirs are of another time."""
    url = storage.join(config.output, "speech", "quarantine.jsonl")
    rows = json_lines.read(url) if config.model and storage.exists(url) else []
    return {row["id"]: f"{row['reason']}: {row['detail']}" for row in rows}


def _recorded(system: str, folder: str, items: Sequence[Item], refused: Container[str]) -> Iterator[Task]:
    """A system's task of every item; without a recording where its folder has none, or the item was refused."""
    present: dict[str, set[str]] = {}
    for item in items:
        parent, _, name = item.key.rpartition("/")
        if parent not in present:
            present[parent] = set(storage.names(storage.join(folder, parent) if parent else folder))
        file = next((name + ending for ending in _ENDINGS if name + ending in present[parent]), None)
        place = storage.join(folder, parent, file) if file and item.id not in refused else ""
        yield Task(system, item.id, item.text, storage.absolute(place) if place else "", item.likeness)


def _chunks(tasks: list[Task], size: int, bound: list[Any], version: Callable[[str], list[str]]) -> Iterator[Chunk]:
    for number in range(0, len(tasks), size):
        part = tuple(tasks[number : number + size])
        urls = ((task.recording, task.likeness) for task in part)
        state = [bound, part, [[version(url) if url else [] for url in pair] for pair in urls]]
        digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
        yield Chunk(f"{part[0].system}-{number // size:05d}-{digest}", part)


def _note_speed(config: EvaluateConfig) -> None:
    """Notes how long each recording took; of one that was kept, what was noted when it was said."""
    url, names = storage.join(config.output, _SPEED), ("file", "seconds", "took")
    before = {row["file"]: row for row in json_lines.read(url)} if storage.exists(url) else {}
    rows = []
    for said in json_lines.read(storage.join(config.output, "speech", "manifest.jsonl")):
        row = said if "took" in said else before.get(said["file"], said)
        if "took" in row and row["seconds"] == said["seconds"]:
            rows.append({name: row[name] for name in names})
    json_lines.write(url, rows)


def _speed(config: EvaluateConfig) -> dict[str, float]:
    url = storage.join(config.output, _SPEED)
    rows = json_lines.read(url) if config.model and storage.exists(url) else []
    audio = sum(row["seconds"] for row in rows)
    return {MODEL: sum(row["took"] for row in rows) / audio} if audio else {}


def read_set(config: EvaluateConfig) -> tuple[list[Item], list[Reject]]:
    """The set; and its lines as meta.lst where that is asked for. Raises EvaluationError."""
    items, rejects = evaluation_sets.read(config.set)
    if config.meta:
        try:
            storage.write_text(config.meta, "".join(evaluation_sets.meta_lines(items)))
        except UnicodeEncodeError as error:
            raise EvaluationError(
                f"{config.set} has text that is not valid Unicode, as {config.meta} is: {error}"
            ) from None
    return items, rejects
