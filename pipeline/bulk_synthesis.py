"""A script becomes a folder of speech, on Ray Data: what is there whole is not made again.

    <output>/<key>.wav                     a line, named by its id (`pipeline.keys`), its provenance in it
    <output>/.synthesis/<chunk>.jsonl      what became of a chunk of lines; written last, so the chunk is done
    <output>/.synthesis/settings.json      what the folder is bound to
    <output>/manifest.jsonl, quarantine.jsonl, summary.json        all of it, when everything is done

A chunk that was interrupted is looked at again line by line: a file that says of itself that it was made for this very
request is kept.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import devices, storage
from model.checkpoint import read_card
from model.codec_config import CodecError
from model.sampling import Policy
from pipeline import codec_weights, json_lines, scripts
from pipeline.plan import PlanError, differences
from pipeline.speech_stage import FOLDER, Speak, SynthesisError, Work
from pipeline.synthesis import ModelFiles, read_model
from pipeline.synthesize_config import SynthesizeConfig
from pipeline.utterances import Reject

if TYPE_CHECKING:
    from pipeline.codec_weights import ResolvedCodec

ATTEMPTS = 3
"""Times over the script in which a chunk may be lost before the job gives up."""
_WAVE = 4096
"""Chunks handed to Ray Data at a time."""
_SUMS = ("seconds", "pieces", "attempts")


def codec_of(config: SynthesizeConfig, files: ModelFiles) -> ResolvedCodec:
    """The codec that was asked for, or the model's own where that is one with a name.

    Raises:
        CodecError: it cannot be had, or is not the model's.
        ModelError: a damaged model.
    """
    wanted, name = read_card(files.config).codec, config.codec
    if name is None:
        embedded = {codec.codes: name for name, codec in codec_weights.EMBEDDED.items()}
        name = embedded.get(wanted.digest, wanted.name)
        if name not in codec_weights.NAMES:
            raise CodecError(f"{files.where} speaks codec {name!r}, which has no name here: give its folder by --codec")
    codec = codec_weights.resolve(name, config.codec_weights)
    codec.identity.require(wanted, f"model {files.where}")
    return codec


@dataclass(frozen=True)
class BulkPlan:
    """All that is settled before work begins."""

    config: SynthesizeConfig
    files: ModelFiles
    codec: ResolvedCodec
    settings: dict[str, Any]
    survey: scripts.Survey
    prompts: bool = False
    """Whether lines may name a prompt."""

    def missing(self) -> set[str]:
        """Names of chunks that are not done; one listing."""
        names = storage.names(storage.join(self.config.output, FOLDER))
        return set(self.survey.chunks) - {name.removesuffix(".jsonl") for name in names}

    def lines(self, chunks: Iterable[str]) -> int:
        return sum(self.survey.chunks[name] for name in chunks)

    def parts(self) -> Iterator[scripts.Chunk | Reject]:
        """The script, read anew."""
        return scripts.read(self.config.script, self.config.chunk, self.settings, self.prompts)


def plan(config: SynthesizeConfig, prompts: bool = False) -> BulkPlan:
    """Reads model, codec and script, and takes the output for these settings.

    Args:
        prompts: whether lines may name a prompt. No consent comes with one: only evaluations ask for that.

    Raises:
        ModelError, CodecError, ScriptError: they cannot be used.
        PlanError: the output was made with other settings; says which.
    """
    Policy(config.temperature, config.top_k)  # refused now, not by the first worker
    files = read_model(config.model)
    codec = codec_of(config, files)
    config = dataclasses.replace(
        config,
        output=storage.absolute(config.output),
        voices=config.voices and storage.absolute(config.voices),
        device=devices.of_cluster(config.device),
    )
    settings = config.settings() | {"model": read_card(files.config).fingerprint, "codec": codec.digest}
    survey = scripts.survey(config.script, config.chunk, settings, prompts)
    _claim(config.output, settings)
    return BulkPlan(config, files, codec, settings, survey, prompts)


def run(bulk: BulkPlan, on_rows: Callable[[list[dict[str, Any]]], None]) -> None:
    """Says every line of the script that is not said yet.

    Args:
        on_rows: called with what became of a chunk's lines, as it is done.

    Raises:
        SynthesisError: chunks did not appear in `ATTEMPTS` rounds.
    """
    import ray

    shipped = ray.put((bulk.files, bulk.codec))
    for _ in range(ATTEMPTS):
        if not (missing := bulk.missing()):
            return
        todo = (part for part in bulk.parts() if isinstance(part, scripts.Chunk) and part.name in missing)
        while wave := list(islice(todo, _WAVE)):
            for rows in _spoken(bulk, shipped, wave):
                on_rows(rows)
    if missing := bulk.missing():
        raise SynthesisError(
            f"chunks {', '.join(sorted(missing)[:3])} were lost {ATTEMPTS} times over: look into the workers' logs, or "
            "set a smaller --chunk"
        )


def finish(bulk: BulkPlan) -> dict[str, Any]:
    """Writes manifest, quarantine and summary of a script that is all done; returns the summary."""
    total, output = Counter(), bulk.config.output
    faults, rejects, folders = Counter(), Counter(bulk.survey.rejects), {""}
    with tempfile.TemporaryDirectory() as folder:
        names = ("manifest.jsonl", "quarantine.jsonl")
        manifest, quarantine = (Path(folder, name) for name in names)
        with manifest.open("w", encoding="utf-8") as made, quarantine.open("w", encoding="utf-8") as bad:
            for part in bulk.parts():
                if isinstance(part, Reject):
                    bad.write(json_lines.line(part._asdict()))
                    continue
                for row in json_lines.read(storage.join(output, FOLDER, f"{part.name}.jsonl")):
                    if "reason" in row:
                        rejects[f"{row['stage']}/{row['reason']}"] += 1
                    else:
                        total.update(spoken=1, failed=bool(row["faults"]), **{n: row[n] for n in _SUMS})
                        faults.update(row["faults"])
                        folders.add(row["file"].rpartition("/")[0])
                    (bad if "reason" in row else made).write(json_lines.line(row))
        for name in names:
            storage.upload(str(Path(folder, name)), storage.join(output, name))
    summary = {
        "lines": bulk.survey.lines,
        **{name: round(total[name], 3) for name in ("spoken", "failed", *_SUMS)},
        "faults": dict(sorted(faults.items())),
        "rejects": dict(sorted(rejects.items())),
        "settings": bulk.settings,
    }
    storage.write_text(storage.join(output, "summary.json"), json.dumps(summary, indent=2) + "\n")
    _remove_outdated(bulk, folders)
    return summary


def bad_fraction(summary: dict[str, Any]) -> float:
    """Share of the lines that were rejected or failed every attempt."""
    return (summary["failed"] + sum(summary["rejects"].values())) / max(summary["lines"], 1)


def _spoken(bulk: BulkPlan, shipped: Any, wave: list[scripts.Chunk]) -> Iterator[list[dict[str, Any]]]:
    """What became of the lines of each chunk, as Ray Data gives it."""
    import pyarrow as pa
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own bar says how far it is
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    blocks = [pa.table({"chunk": pa.array([json.dumps(chunk)])}) for chunk in wave]
    # Not map_batches, which refuses GPUs without a batch size in rows; a size would wait for blocks to join.
    dataset = ray.data.from_arrow(blocks).map_batches_internal(
        Speak,
        fn_constructor_args=(Work.of(bulk.config, bulk.settings), shipped),
        batch_size=None,
        batch_format="pyarrow",
        **_resources(bulk.config, len(wave)),
    )
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for rows in table["rows"].to_pylist():
            yield json.loads(rows)


def _resources(config: SynthesizeConfig, chunks: int) -> dict[str, Any]:
    import ray

    resources = ray.cluster_resources()
    if config.device == "cuda":
        fits, demand = int(resources.get("GPU", 0)), {"num_gpus": 1, "num_cpus": config.threads}
    else:
        fits, demand = int(resources.get("CPU", 1) / config.threads), {"num_cpus": config.threads}
    most = max(1, min(config.actors or fits, chunks))
    start = max(1, min(most, fits))
    return {"compute": ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=start), **demand}


def _claim(output: str, settings: dict[str, Any]) -> None:
    url = storage.join(output, FOLDER, "settings.json")
    if not storage.exists(url):
        storage.write_text(url, json.dumps(settings, indent=2) + "\n")
    elif changed := differences(json.loads(storage.read_text(url)), settings):
        raise PlanError(
            f"{output} holds speech that was made otherwise; choose another --output, or undo:\n  "
            + "\n  ".join(changed)
        )


def _remove_outdated(bulk: BulkPlan, folders: set[str]) -> None:
    """Takes away what became of chunks that are not in the script any more, and what killed writers left."""
    folder = storage.join(bulk.config.output, FOLDER)
    # Only local files are written under temporary names.
    for name in sorted({*folders, FOLDER}) if storage.is_local(folder) else ():
        storage.remove_leftovers(storage.join(bulk.config.output, name))
    for name in storage.names(folder):
        if name.endswith(".jsonl") and name.removesuffix(".jsonl") not in bulk.survey.chunks:
            storage.remove(storage.join(folder, name))
