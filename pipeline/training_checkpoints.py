"""Checkpoints of a training run: written by all workers, whole or not at all, the newest N kept, on any fsspec URL.

    <run>/checkpoints/step-00001000/      DeepSpeed's files and, last of all, trainer.json
    <run>/checkpoints/step-00001000-universal/   the same for another number of workers, made when it is asked for

A checkpoint is done when its `trainer.json` is there and the files that it names have the sizes that it names. On
remote storage every worker writes into a folder of its own machine and uploads what it wrote.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infra import storage
from pipeline import pickles

if TYPE_CHECKING:
    from pipeline.training_engine import Engine

FOLDER, FACTS = "checkpoints", "trainer.json"
_UNIVERSAL = "-universal"
_PROJECT = Path(__file__).resolve().parents[1]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be continued: says which, why, and what to do."""


class Checkpoint(NamedTuple):
    """A finished one."""

    url: str
    facts: dict[str, Any]
    """step, world, stage, identity, usual, files and what the run noted."""

    @property
    def step(self) -> int:
        return self.facts["step"]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def newest(run: str) -> Checkpoint | None:
    """The finished checkpoint of the highest step; damaged ones are named and passed over."""
    for passed_over, name in enumerate(reversed(_names(run))):
        if found := opened(storage.join(run, FOLDER, name)):
            if passed_over:
                print(f"using an earlier checkpoint: {found.url}", file=sys.stderr)
            return found
    return None


def opened(url: str) -> Checkpoint | None:
    """The checkpoint in a folder; None, and a line on stderr, where it was never finished or has lost files.

    Raises:
        OSError: the storage does not answer, which says nothing about the checkpoint.
    """
    found = _read(url)
    if isinstance(found, str):
        print(f"checkpoint {url} {found}", file=sys.stderr)
        return None
    return found


def save(engine: Engine, run: str, step: int, facts: dict[str, Any], keep: int) -> None:
    """Writes a checkpoint; every worker calls it. Afterwards the newest `keep` are left."""
    import torch.distributed as dist

    url = storage.join(run, FOLDER, name_of(step))
    local = storage.is_local(url)
    if engine.rank == 0:
        storage.remove(url)  # what an interrupted one left
    dist.barrier()
    with nullcontext(storage.join(run, FOLDER)) if local else _temporary() as parent:
        engine.deepspeed.save_checkpoint(parent, tag=name_of(step), save_latest=False)
        if not local:
            for file in sorted(Path(parent, name_of(step)).iterdir()):
                storage.patiently(partial(storage.upload, str(file), storage.join(url, file.name)))
    dist.barrier()
    if engine.rank == 0:
        noted = {"step": step, "world": engine.world, "stage": engine.stage, "usual": engine.optimiser.usual}
        content = json.dumps(facts | noted | {"files": _sizes(url)}, indent=1)
        storage.write_text(storage.join(url, FACTS), content + "\n")
        _remove_old(run, name_of(step), keep)
    dist.barrier()


def prepare(run: str, world: int, stage: int) -> tuple[Checkpoint, bool] | None:
    """What a run of `world` workers goes on from: the newest checkpoint, converted where their number has changed.

    Returns:
        (checkpoint, whether it is a universal one); None at the beginning. Only one worker may call it.

    Raises:
        CheckpointError: this stage of ZeRO cannot go on from it, or converting failed.
    """
    found = newest(run)
    if found is None:
        return None
    before = found.facts["stage"]
    if _family(before) != _family(stage):
        raise CheckpointError(
            f"{found.url} was written under ZeRO stage {before}, which stage {stage} cannot continue; use --zero "
            f"{before}, or start a new run"
        )
    if (found.facts["world"] == world and before == stage) or stage == 0:
        return found, False
    return _universal(found, before), True


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint into the engine; every worker calls it. Raises CheckpointError."""
    advice = "remove that folder to go on before it"
    with local_copy(checkpoint.url) as folder, engine.optimiser.keeping_its_own(), pickles.as_data():
        try:
            path, _ = engine.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{checkpoint.url} cannot be loaded: {error}; {advice}") from None
        if path is None:
            raise CheckpointError(f"DeepSpeed could not load {checkpoint.url}; {advice}")
        engine.optimiser.usual = list(checkpoint.facts["usual"])
        if engine.world > 1:
            import torch.distributed as dist

            dist.barrier()


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The files of a folder as a local folder: itself, or a copy that goes away at the end."""
    if storage.is_local(url):
        yield Path(storage.absolute(url))
        return
    with _temporary() as temporary:
        folder = Path(temporary, url.rstrip("/").rsplit("/", 1)[1])
        storage.download(url, str(folder))
        yield folder


def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lina-checkpoint-")


def _universal(checkpoint: Checkpoint, stage: int) -> Checkpoint:
    """The checkpoint for any number of workers: converted by DeepSpeed's own tool, once."""
    url = checkpoint.url + _UNIVERSAL
    facts = storage.join(url, FACTS)
    if not storage.exists(facts):
        storage.remove(url)
        with local_copy(checkpoint.url) as folder, tempfile.TemporaryDirectory() as temporary:
            target = Path(storage.absolute(url) if storage.is_local(url) else temporary, "").resolve()
            target = target if storage.is_local(url) else target / folder.name
            command = [
                *(sys.executable, "-m", "pipeline.pickles"),
                *("--input_folder", str(folder), "--output_folder", str(target)),
                *("--num_extract_workers", "1", "--num_merge_workers", "1"),
                *(["--inject_missing_state"] if stage in (1, 2) else []),
            ]
            paths = os.pathsep.join(filter(None, (str(_PROJECT), os.environ.get("PYTHONPATH"))))
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise CheckpointError(
                    f"{checkpoint.url} cannot be converted for another number of workers than the "
                    f"{checkpoint.facts['world']} that wrote it: {done.stderr.strip()[-800:]}"
                )
            if not storage.is_local(url):
                fs, path = storage.filesystem(url)
                with storage.as_os_errors(url):
                    fs.put(f"{target}/", path.rstrip("/") + "/", recursive=True)
        storage.write_text(facts, json.dumps(checkpoint.facts) + "\n")
    return Checkpoint(url, checkpoint.facts)


def _family(stage: int) -> int:
    """Stages of one family can go on from each other's checkpoints."""
    return {0: 0, 1: 1, 2: 1, 3: 3}[stage]


def _names(run: str) -> list[str]:
    """Sorted names of the run's checkpoints, finished or not."""
    url = storage.join(run, FOLDER)
    fs, path = storage.filesystem(url)
    with storage.as_os_errors(url):
        fs.invalidate_cache()
        entries = fs.ls(path, detail=False) if fs.exists(path) else []
    names = sorted(entry.rstrip("/").rsplit("/", 1)[1] for entry in entries)
    return [name for name in names if name.startswith("step-") and not name.endswith(_UNIVERSAL)]


def _read(url: str) -> Checkpoint | str:
    """The checkpoint in a folder, or why there is none. Raises OSError."""
    try:
        facts = json.loads(storage.read_bytes(storage.join(url, FACTS)))
        sizes = _sizes(url)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return f"was not finished ({error})"
    if lost := [name for name, size in facts["files"].items() if sizes.get(name) != size]:
        return f"has lost {', '.join(lost)}"
    return Checkpoint(url, facts)


def _sizes(url: str) -> dict[str, int]:
    """Bytes of each of DeepSpeed's files directly in a folder."""
    return {name: size for name, size in _files(url).items() if name != FACTS and name[0] != "."}


def _files(url: str) -> dict[str, int]:
    """Bytes of each file directly in a folder."""
    fs, path = storage.filesystem(url)
    with storage.as_os_errors(url):
        fs.invalidate_cache()
        entries = fs.ls(path, detail=True)
    return {e["name"].rsplit("/", 1)[1]: e["size"] for e in entries if e["type"] == "file"}


def _remove_old(run: str, written: str, keep: int) -> None:
    """Leaves the newest `keep` finished ones, with the one just `written`, and nothing older or unfinished."""
    names = _names(run)
    finished = [n for n in names if n == written or not isinstance(_read(storage.join(run, FOLDER, n)), str)]
    kept = {written, *finished[-keep:]}
    for name in names:
        url = storage.join(run, FOLDER, name)
        if name in kept or (name > min(kept) and FACTS in _files(url)):
            continue
        # First what makes it a finished one: a removal that is cut off must not look like a damaged checkpoint
        for folder in (url, url + _UNIVERSAL):
            storage.remove(storage.join(folder, FACTS))
            storage.remove(folder)
