"""Initial-State Tuning of many speakers at once, exactly (Lina-Speech, section 3.3; parallel here).

    tuner = Tuner(model, Recipe(), slots=64)
    tuner.join("ada", samples)                  # at any time, between steps
    while tuner.active:
        for voice in tuner.step():              # one optimiser step of everybody; who is done leaves
            ...
    for voice in tune(model, speakers): ...     # the same, keeping the slots filled

Speakers share every matrix product and nothing else: loss, clipping, moments, step count, learning rate and end are
each speaker's own, and its batches are a pure function of its samples, its seed and its step. Whoever joins or leaves,
it ends in the same state as alone, up to rounding. Weights are frozen and the model is in evaluation mode: no dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from model.continuation import losses_after
from model.initial_state import Factors, Recipe, drawn, memories, number, shapes
from model.lina import Lina
from model.lina_config import ModelError
from model.speaker_optimiser import SpeakerAdamW
from model.state_pass import steps_of, tokens_of
from model.tuned import Tuned
from model.tuning_work import Row, Work
from model.voice_samples import Sample, batch_at, checked, split

_PROMPTED_STEPS = 8192
"""Of a group of held-out samples after their prompts: their logits, and nothing for a gradient, are held at once."""


@dataclass
class _Speaker:
    """Who takes part, and how far it is."""

    name: str
    slot: int
    seed: int
    tuning: list[tuple[int, Sample]]
    held: list[tuple[int, Sample]]
    target: float | None
    best: Factors
    best_step: int = 0
    steps: int = 0
    baselines: tuple[float | None, float | None] | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Tuner:
    """Slots that speakers join and leave between steps.

    Args:
        model: of mixer `gla`. Its weights are frozen for good, and it is put into evaluation mode.
        slots: how many speakers at most.
        cache_bytes, group_steps: of `model.tuning_work.Work`.
        space: the phone between the words of a text, by which a prompt's text and the next one are joined; without it
            continuation is not measured.

    Raises:
        ModelError: a model without memories.
    """

    def __init__(
        self,
        model: Lina,
        recipe: Recipe | None = None,
        slots: int = 64,
        cache_bytes: int = 1 << 30,
        group_steps: int | None = None,
        space: int | None = None,
    ) -> None:
        self.model, self.recipe, self.slots, self.space = model, recipe or Recipe(), slots, space
        self.shapes = shapes(model.config, self.recipe.rank, self.recipe.position)
        self.work = Work(model, self.recipe.scale, cache_bytes, group_steps)
        self._factors = {
            name: torch.zeros(slots, *shape, dtype=self.work.dtype, device=self.work.device)
            for name, shape in self.shapes.items()
        }
        self._optimiser = SpeakerAdamW(self._factors, self.recipe)
        self._speakers: dict[str, _Speaker] = {}

    @property
    def active(self) -> tuple[str, ...]:
        """Who takes part in the next step."""
        return tuple(self._speakers)

    @property
    def free(self) -> int:
        """Slots."""
        return self.slots - len(self._speakers)

    def join(
        self,
        speaker: str,
        samples: Sequence[Sample],
        held_out: Sequence[Sample] | None = None,
        seed: int | None = None,
        start: Factors | None = None,
        target: float | None = None,
    ) -> None:
        """Takes a speaker in, from the next step on.

        Args:
            samples: to tune on; a part is held out by the recipe, unless `held_out` is given.
            held_out: what is never tuned on; an empty one means that nothing is.
            seed: of its start, its split and its batches; None derives one from the recipe's and the speaker's name.
            start: factors to start from, a warm start; None draws them.
            target: it stops as soon as its held-out loss is at most this.

        Raises:
            ModelError: no free slot, a speaker who is here already, samples or factors that do not fit the model.
        """
        if not self.free:
            raise ModelError(f"all {self.slots} slots are taken: let a step finish somebody, or open more slots")
        if speaker in self._speakers:
            raise ModelError(f"speaker {speaker!r} is being tuned already")
        seed = number(self.recipe.seed, speaker) if seed is None else seed
        config = self.model.config
        good = list(enumerate(checked(samples, config, speaker)))
        if held_out is None:
            tuned, apart = ([good[i] for i in places] for places in split(len(good), self.recipe, seed))
        else:
            tuned = good
            apart = list(enumerate(checked(held_out, config, speaker), len(good))) if held_out else []
        start = drawn(config, self.recipe, seed, self.work.dtype) if start is None else self._fitting(start, speaker)
        slot = min(set(range(self.slots)) - {other.slot for other in self._speakers.values()})
        self._optimiser.begin(slot, start)
        self._speakers[speaker] = _Speaker(speaker, slot, seed, tuned, apart, target, self._copy(slot))

    def leave(self, speaker: str) -> Tuned:
        """Lets a speaker go as it is. Raises KeyError for one who is not here."""
        return self._end(self._speakers[speaker], "left")

    def look(self, speaker: str) -> Tuned:
        """How far a speaker is: what `leave` would give. Raises KeyError for one who is not here."""
        return self._record(self._speakers[speaker], "left")

    def step(self) -> list[Tuned]:
        """One step of every active speaker; those who are done leave and are returned."""
        start, speakers = time.perf_counter(), list(self._speakers.values())
        if not speakers:
            return []
        self._welcome([speaker for speaker in speakers if speaker.baselines is None])
        rows = [row for owner, speaker in enumerate(speakers) for row in self._batch(owner, speaker)]
        losses, gradients = self.work.gradients(self._stacked(speakers), rows)
        before = time.perf_counter()
        finite = torch.stack([losses, *(values.flatten(1).sum(1) for values in gradients.values())]).isfinite().all(0)
        going = [owner for owner, fine in enumerate(finite.tolist()) if fine]
        if going:
            chosen = {name: values[going] for name, values in gradients.items()}
            self._optimiser.update([speakers[owner].slot for owner in going], chosen)
        for owner, loss in enumerate(losses.tolist()):
            speakers[owner].train_losses.append(loss)
            speakers[owner].steps += owner in going
        self.work.seconds["update"] += time.perf_counter() - before
        ended = {owner: "diverged" for owner in range(len(speakers)) if owner not in going}
        self._evaluate([speakers[owner] for owner in going if self._due(speakers[owner])])
        for owner in going:
            if reason := self._reason(speakers[owner]):
                ended[owner] = reason
        self._share(time.perf_counter() - start, speakers, rows)
        return [self._end(speakers[owner], reason) for owner, reason in sorted(ended.items())]

    def _batch(self, owner: int, speaker: _Speaker) -> list[Row]:
        times = batch_at(len(speaker.tuning), self.recipe.batch, speaker.seed, speaker.steps)
        return _rows(owner, speaker, [speaker.tuning[i] for i in times], list(times.values()))

    def _welcome(self, speakers: list[_Speaker]) -> None:
        """What held-out samples lose without a voice, said after a prompt, and at the start."""
        for speaker in speakers:
            speaker.baselines = (None, None)
        speakers = [speaker for speaker in speakers if speaker.held]
        if not speakers:
            return
        rows = [row for owner, speaker in enumerate(speakers) for row in _rows(owner, speaker, speaker.held)]
        base = self.work.losses(None, rows, len(speakers)).tolist()
        for speaker, *losses in zip(speakers, base, self._continued(speakers), strict=True):
            speaker.baselines = tuple(losses)
        self._evaluate(speakers)

    def _continued(self, speakers: list[_Speaker]) -> list[float | None]:
        """What held-out samples lose after the longest sample tuned on: one prompt, and so the cost is bounded."""
        if self.space is None:
            return [None] * len(speakers)
        start = time.perf_counter()
        pairs = []
        for speaker in speakers:
            prompt = max((sample for _, sample in speaker.tuning), key=steps_of)
            pairs += [([prompt], sample) for _, sample in speaker.held]
        budget = min(_PROMPTED_STEPS, self.work.group_steps)
        found = iter(losses_after(self.model, pairs, self.space, budget))
        own = [[next(found) for _ in speaker.held] for speaker in speakers]
        self.work.seconds["evaluate"] += time.perf_counter() - start
        return [sum(loss for loss, _ in each) / sum(tokens for _, tokens in each) for each in own]

    def _evaluate(self, speakers: list[_Speaker]) -> None:
        """The held-out losses as things stand; the best factors are kept."""
        for speaker in speakers:
            if not speaker.held:
                speaker.best, speaker.best_step = self._copy(speaker.slot), speaker.steps
        speakers = [speaker for speaker in speakers if speaker.held]
        if not speakers:
            return
        rows = [row for owner, speaker in enumerate(speakers) for row in _rows(owner, speaker, speaker.held)]
        dense = memories(self._stacked(speakers), self.recipe.scale)
        for speaker, loss in zip(speakers, self.work.losses(dense, rows, len(speakers)).tolist(), strict=True):
            if math.isfinite(loss) and loss < min((other for _, other in speaker.curve), default=math.inf):
                speaker.best, speaker.best_step = self._copy(speaker.slot), speaker.steps
            speaker.curve.append((speaker.steps, loss))

    def _due(self, speaker: _Speaker) -> bool:
        return speaker.steps % self.recipe.eval_every == 0 or speaker.steps == self.recipe.steps or not speaker.held

    def _reason(self, speaker: _Speaker) -> str | None:
        """Why a speaker is done, if it is."""
        if speaker.held and self._due(speaker):
            losses = [loss for _, loss in speaker.curve]
            if speaker.target is not None and losses[-1] <= speaker.target:
                return "reached"
            if not math.isfinite(losses[-1]):
                return "diverged"
            waited = len(losses) - 1 - losses.index(min(losses))
            if self.recipe.patience and waited >= self.recipe.patience:
                return "converged"
        return "steps" if speaker.steps >= self.recipe.steps else None

    def _share(self, seconds: float, speakers: list[_Speaker], rows: list[Row]) -> None:
        total = sum(steps_of(row.sample) for row in rows)
        for row in rows:
            speakers[row.owner].seconds += seconds * steps_of(row.sample) / total

    def _end(self, speaker: _Speaker, reason: str) -> Tuned:
        self._speakers.pop(speaker.name)
        self.work.forget(speaker.name)
        return self._record(speaker, reason)

    def _record(self, speaker: _Speaker, reason: str) -> Tuned:
        base, continuation = speaker.baselines or (None, None)
        curve = tuple(point for point in speaker.curve if math.isfinite(point[1]))  # `reason` tells of the others
        return Tuned(
            speaker=speaker.name,
            factors=speaker.best,
            reason=reason,
            steps=speaker.steps,
            best_step=speaker.best_step,
            samples=len(speaker.tuning),
            held_out=len(speaker.held),
            base_loss=base,
            continuation_loss=continuation,
            tuned_loss=min((loss for _, loss in curve), default=None),
            curve=curve,
            train_losses=tuple(speaker.train_losses),
            seconds=speaker.seconds,
            seed=speaker.seed,
        )

    def _stacked(self, speakers: list[_Speaker]) -> Factors:
        slots = [speaker.slot for speaker in speakers]
        return {name: values[slots] for name, values in self._factors.items()}

    def _copy(self, slot: int) -> Factors:
        return {name: values[slot].clone() for name, values in self._factors.items()}

    def _fitting(self, start: Factors, speaker: str) -> Factors:
        found = {name: tuple(values.shape) for name, values in start.items()}
        if found != self.shapes:
            raise ModelError(f"the start of speaker {speaker!r} has factors {found}, the recipe asks for {self.shapes}")
        if not all(values.isfinite().all() for values in start.values()):
            raise ModelError(f"the start of speaker {speaker!r} has values that are not finite")
        return start


def tune(
    model: Lina,
    speakers: Iterable[tuple[str, Sequence[Sample]]],
    recipe: Recipe | None = None,
    slots: int = 64,
    cache_bytes: int = 1 << 30,
    space: int | None = None,
) -> Iterator[Tuned]:
    """Tunes speakers, many at once, in the order in which they come; voices as they are done. Raises as `join`."""
    tuner, waiting = Tuner(model, recipe, slots, cache_bytes, space=space), iter(speakers)
    coming = True
    while coming or tuner.active:
        while coming and tuner.free:
            following = next(waiting, None)
            if coming := following is not None:
                tuner.join(*following)
        yield from tuner.step()


def _rows(
    owner: int, speaker: _Speaker, samples: list[tuple[int, Sample]], times: list[int] | None = None
) -> list[Row]:
    """Rows whose weighted sums make the mean over the tokens of these samples, each as often as `times` says."""
    times = times or [1] * len(samples)
    tokens = sum(count * tokens_of(sample) for (_, sample), count in zip(samples, times, strict=True))
    return [
        Row(owner, (speaker.name, place), sample, count / tokens)
        for (place, sample), count in zip(samples, times, strict=True)
    ]
