"""A grid of cells: each is a unit of work that is done when its JSON is there, under the digest of all it depends on.

    <folder>/cells/<kind>-<digest>.json       {kind, settings, result, machine}; written whole, last

`result` is a function of the settings; `machine` holds what is not: seconds and peaks. A grid that was interrupted, or
grew, does what is missing; cells of other grids beside it are left alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from infra import storage
from infra.ray_errors import lost_worker

FOLDER = "cells"
VERSION = 2
"""Goes up when the same settings come to mean another result."""

Work = Callable[["Cell", Any], tuple[Any, dict[str, Any]]]
"""From a cell and what all cells share to (result, what belongs to the machine); a function of a module."""


class ExperimentError(RuntimeError):
    """An experiment that cannot be done as it was asked for: says why, and what to do."""


class Cell(NamedTuple):
    """A unit of work."""

    kind: str
    settings: dict[str, Any]
    """All that its result depends on, as plain JSON."""

    @property
    def name(self) -> str:
        told = json.dumps([VERSION, self.kind, self.settings], sort_keys=True, separators=(",", ":"))
        return f"{self.kind}-{hashlib.sha256(told.encode()).hexdigest()[:24]}"


Outcome = dict[str, Any]
"""A cell's file."""


def url_of(folder: str, cell: Cell) -> str:
    return storage.join(folder, FOLDER, f"{cell.name}.json")


def missing(folder: str, cells: Sequence[Cell]) -> list[Cell]:
    """Cells that are not done, once each; one listing."""
    there = set(storage.names(storage.join(folder, FOLDER)))
    return list({cell.name: cell for cell in cells if f"{cell.name}.json" not in there}.values())


def read(folder: str, cells: Sequence[Cell]) -> list[Outcome]:
    """What became of cells that are all done, in their order."""
    return [json.loads(storage.read_text(url_of(folder, cell))) for cell in cells]


def perform(folder: str, work: Work, kit: Any, cell: Cell) -> str:
    """Does a cell and writes it; returns its name."""
    start = time.perf_counter()
    result, machine = work(cell, kit)
    machine = {"seconds": time.perf_counter() - start} | machine
    outcome = {"kind": cell.kind, "settings": cell.settings, "result": plain(result), "machine": plain(machine)}
    storage.write_text(url_of(folder, cell), json.dumps(outcome, sort_keys=True, allow_nan=False) + "\n")
    return cell.name


def run(
    folder: str,
    cells: Sequence[Cell],
    work: Work,
    kit: Any,
    on_done: Callable[[int, int], None] = lambda done, total: None,
    cpus: float = 1,
    gpus: float = 0,
) -> list[Outcome]:
    """Does what is missing of a grid as tasks of Ray, and returns what became of all cells, in their order.

    Args:
        kit: what `work` is given with each cell; reaches a node once.
        on_done: told the cells done, and all.

    Raises:
        ExperimentError: cells whose workers died again and again; also whatever `work` raises.
    """
    import ray
    from ray.exceptions import RayTaskError

    todo, total = missing(folder, cells), len({cell.name for cell in cells})
    done = total - len(todo)
    on_done(done, total)
    if todo:
        shipped = ray.put(kit)
        task = ray.remote(perform).options(num_cpus=cpus, num_gpus=gpus, max_retries=3)
        waiting = [task.remote(folder, work, shipped, cell) for cell in todo]
        try:
            while waiting:
                (ready, *_), waiting = ray.wait(waiting)
                ray.get(ready)
                done += 1
                on_done(done, total)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except lost_worker() as error:
            raise ExperimentError(f"a cell's workers died again and again: {error}") from None
        finally:
            for ref in waiting:
                ray.cancel(ref)
    return read(folder, cells)


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite are null."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
