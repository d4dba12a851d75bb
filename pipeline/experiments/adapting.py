"""A cell of the experiments on unseen speakers: some of them are given a voice by one method, and it is measured.

    nothing                     the model without any voice
    prompt (samples)            continuation: the prompt's text and codes stand before those of what is said
    memory (samples)            the memories that the model reaches by reading each prompt; the mean of several
    ist (rank, lr, position)    Initial-State Tuning, `model.voice_tuning`
    lora (rank, lr), full (lr)  tuned weights, `model.weight_tuning`
    recorded, codec             no voice of a model: other held-out recordings, as they are and as the codec gives them

Losses are means over the tokens of what a speaker holds out. Nothing stops early and nothing is picked by the held-out
loss: `loss` is that after the last step; `best`, the lowest on the way, stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.codec_weights import ResolvedCodec
from pipeline.experiments.cells import Cell
from pipeline.experiments.config import ExperimentsConfig
from pipeline.experiments.people import Person, divided, samples_of
from pipeline.synthesis import ModelFiles

if TYPE_CHECKING:
    from model.initial_state import Memories
    from model.lina import Lina
    from model.voice_samples import Sample

KIND = "voices"
ORIGINALS = ("recorded", "codec")


@dataclass(frozen=True)
class Kit:
    """What all cells of an experiment share."""

    config: ExperimentsConfig
    files: ModelFiles
    fingerprint: str
    codec: ResolvedCodec
    device: str
    folder: str
    people: dict[str, dict[str, Person]]
    """By condition and name."""


class Task(NamedTuple):
    """A speaker in a cell."""

    name: str
    tuned: list[Sample]
    held: list[Sample]


class Given(NamedTuple):
    """What a method gave a speaker: numbers, and one of the ways to speak with it."""

    row: dict[str, Any]
    memories: Memories | None = None
    prompt: Sample | None = None
    model: Lina | None = None


def cells_of(
    kit: Kit,
    methods: Sequence[dict[str, Any]],
    condition: str = "clean",
    seed: int = 0,
    places: dict[str, tuple[int, ...]] | None = None,
    speak: bool = False,
) -> list[Cell]:
    """A cell for each method and group of speakers.

    Args:
        methods: each with its `name` and what else it takes.
        places: of the samples to tune on, by speaker; None takes all that are not held out. Others are left out.
        speak: whether all voices speak; otherwise the first `listen` ones do, and those are judged in any case.
    """
    config, clean = kit.config, kit.people["clean"]
    rows = []
    for name, person in kit.people[condition].items():
        if name not in clean or (places is not None and name not in places):
            continue
        tuned = divided(person, config)[0] if places is None else places[name]
        held = divided(clean[name], config)[1]
        row = {"name": name, "condition": condition, "tokens": person.digest, "tuned": list(tuned)}
        rows.append(row | {"clean": clean[name].digest, "held": list(held)})
    judged = list(clean)[: config.listen]
    found = []
    for method in methods:
        there = [row for row in rows if method["name"] not in ORIGINALS or row["name"] in judged]
        for start in range(0, len(there), config.together):
            group = there[start : start + config.together]
            names = [row["name"] for row in group]
            settings = {"model": kit.fingerprint, "method": method, "people": group, "seed": config.seed + seed}
            if "lr" in method:
                settings |= {name: getattr(config, name) for name in ("steps", "batch", "eval_every")}
            speaking = names if speak else [name for name in names if name in judged]
            if speaking:
                settings["speak"] = {"who": speaking, "sentences": config.sentences}
            if heard := [name for name in speaking if name in judged]:
                settings["judge"] = {"who": heard, "recogniser": config.recogniser}
            found.append(Cell(KIND, settings))
    return found


def work(cell: Cell, kit: Kit) -> tuple[dict[str, Any], dict[str, Any]]:
    """({speaker: row}, {}) of a cell of this kind: `loss`, how much was tuned on, what the method notes, `speech`."""
    import torch

    from model.checkpoint import unpack
    from pipeline.experiments.speaking import originals, speak

    torch.set_num_threads(kit.config.threads)
    settings = cell.settings
    if settings["method"]["name"] in ORIGINALS:
        return originals(cell, kit), {}
    model, card = unpack(kit.files.config, kit.files.weights, kit.device)
    ids = {phone: number for number, phone in enumerate(card.inventory)}
    tasks = [_task(kit, row, ids) for row in settings["people"]]
    given = _METHODS[settings["method"]["name"]](model, tasks, settings, ids["<space>"])
    rows = {name: one.row for name, one in given.items()}
    for row in settings["people"]:
        person = kit.people[row["condition"]][row["name"]]
        seconds = sum(person.samples[place]["seconds"] for place in row["tuned"])
        rows[row["name"]] |= {"samples": len(row["tuned"]), "speech_seconds": round(seconds, 3)}
    if "speak" in settings:
        for name, speech in speak(cell, kit, given).items():
            rows[name] |= {"speech": speech}
    return rows, {}


def prompt_sets(count: int, size: int, most: int, seed: int) -> list[tuple[int, ...]]:
    """At most `most` sets of `size` of `count` places, as unlike as can be; fewer places make smaller sets."""
    from model.voice_samples import shuffled

    order, size = shuffled(count, seed, -2), min(size, count)
    sets = (tuple(order[(number * size + i) % count] for i in range(size)) for number in range(-(-count // size)))
    return list(sets)[:most]


def _task(kit: Kit, row: dict[str, Any], ids: dict[str, int]) -> Task:
    samples = samples_of(kit.people[row["condition"]][row["name"]], ids)
    clean = samples_of(kit.people["clean"][row["name"]], ids)
    return Task(row["name"], [samples[place] for place in row["tuned"]], [clean[place] for place in row["held"]])


def _nothing(model: Lina, tasks: Sequence[Task], settings: dict[str, Any], space: int) -> dict[str, Given]:
    from model.weight_tuning import mean_loss

    return {task.name: Given({"loss": mean_loss(model, task.held)}) for task in tasks}


def _prompt(model: Lina, tasks: Sequence[Task], settings: dict[str, Any], space: int) -> dict[str, Given]:
    from model.continuation import continued_losses, joined

    found = {}
    for task in tasks:
        sets = _sets(task, settings)
        sums = [pair for prompts in sets for pair in continued_losses(model, prompts, task.held, space)]
        loss = sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)
        found[task.name] = Given({"loss": loss, "prompts": len(sets)}, prompt=joined(sets[0], space))
    return found


def _memory(model: Lina, tasks: Sequence[Task], settings: dict[str, Any], space: int) -> dict[str, Given]:
    from model.state_pass import read_start
    from model.weight_tuning import mean_loss

    found = {}
    for task in tasks:
        read = [read_start(model, prompts) for prompts in _sets(task, settings)]
        losses = [mean_loss(model, task.held, memories) for memories in read]
        found[task.name] = Given({"loss": sum(losses) / len(losses), "prompts": len(read)}, memories=read[0])
    return found


def _sets(task: Task, settings: dict[str, Any]) -> list[list[Sample]]:
    from model.initial_state import number

    method = settings["method"]
    seed = number(settings["seed"], "prompts", task.name)
    places = prompt_sets(len(task.tuned), method["samples"] or len(task.tuned), method["sets"], seed)
    return [[task.tuned[place] for place in chosen] for chosen in places]


def _ist(model: Lina, tasks: Sequence[Task], settings: dict[str, Any], space: int) -> dict[str, Given]:
    """Held-out losses are measured here and not by the tuner, which would pick the state by them."""
    from model.initial_state import Recipe, memories, number
    from model.voice_tuning import Tuner
    from model.weight_tuning import mean_loss

    method = settings["method"]
    tuning = {name: settings[name] for name in ("steps", "batch")} | {name: method[name] for name in ("rank", "lr")}
    recipe = Recipe(**tuning, position=method["position"], held_out=0.0, patience=0)
    tuner, curves, ended = Tuner(model, recipe, max(1, len(tasks))), {task.name: [] for task in tasks}, {}
    for task in tasks:
        tuner.join(task.name, task.tuned, held_out=(), seed=number(settings["seed"], task.name))
    steps = 0
    while True:
        for task in tasks:
            due = steps % settings["eval_every"] == 0 and task.name in tuner.active
            if due or (task.name in ended and curves[task.name][-1][0] < ended[task.name].steps):
                now = ended.get(task.name) or tuner.look(task.name)
                loss = mean_loss(model, task.held, memories(now.factors, recipe.scale))
                curves[task.name].append((now.steps, loss))
        if not tuner.active:
            break
        ended |= {voice.speaker: voice for voice in tuner.step()}
        steps += 1
    found = {}
    for task in tasks:
        voice, size = ended[task.name], sum(values.numel() for values in ended[task.name].factors.values())
        row = _row(curves[task.name], size) | {"ended": voice.reason}
        found[task.name] = Given(row, memories=memories(voice.factors, recipe.scale))
    return found


def _weights(model: Lina, tasks: Sequence[Task], settings: dict[str, Any], space: int) -> dict[str, Given]:
    from model.weight_tuning import WeightRecipe, tune_weights

    tuning = {name: settings[name] for name in ("steps", "batch", "eval_every", "seed")}
    method = settings["method"]
    recipe = WeightRecipe(rank=method.get("rank", 0), lr=method["lr"], **tuning)
    found = {}
    for task in tasks:
        tuned = tune_weights(model, task.tuned, task.held, recipe, task.name)
        found[task.name] = Given(_row(tuned.curve, tuned.parameters), model=tuned.model)
    return found


def _row(curve: Sequence[tuple[int, float]], parameters: int) -> dict[str, Any]:
    best = min((loss for _, loss in curve if math.isfinite(loss)), default=math.nan)
    return {"loss": curve[-1][1], "best": best, "curve": curve, "parameters": parameters}


_METHODS = {"nothing": _nothing, "prompt": _prompt, "memory": _memory, "ist": _ist, "lora": _weights, "full": _weights}
