"""A continuous batch of speakers being tuned, in a thread of its own: they join between two steps and leave when done.

    batch = TuningBatch(model, Recipe(), slots=64)
    batch.submit("a1", Request("ada", samples), on_event=events.put)     # events: Progress …, then a Tuned or an error
    batch.cancel("a1")
    batch.close()

Who waits is taken in order, nobody overtakes, and nobody is taken for whom there is no memory, unless it is alone. A
speaker's result is a pure function of its samples, seed, recipe and model. With `apart` that holds to the last bit:
nothing of another speaker is in any product of its own.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from model.initial_state import Recipe, number
from model.lina import Lina
from model.lina_config import LinaConfig, ModelError
from model.state_pass import steps_of
from model.tuned import Tuned
from model.voice_samples import Sample
from model.voice_tuning import Tuner
from pipeline.utterances import Unusable

_REPORT_SECONDS = 0.5
"""Between two reports of one speaker's progress."""


@dataclass(frozen=True)
class Request:
    """A speaker to tune."""

    speaker: str
    samples: Sequence[Sample]
    seed: int | None = None
    """None derives one from the recipe's and the speaker's name."""


@dataclass(frozen=True)
class Progress:
    """How far a speaker is."""

    steps: int
    of: int
    """Steps at most."""
    train_loss: float | None = None
    base_loss: float | None = None
    held_out_loss: float | None = None


Event = Progress | Tuned | Exception
OnEvent = Callable[[Event], Any]


@dataclass
class _Taken:
    """A request that is in the batch."""

    request: Request
    on_event: OnEvent
    bytes: int
    told: float = 0.0


class TuningBatch:
    """
    Args:
        slots: speakers tuned at once at most.
        memory_bytes: of what is kept of samples; the slots that this allows are fewer when speakers say much.
        waiting: requests that may wait; more are refused.
        apart: compute each speaker by itself.
        threads: of PyTorch; None leaves them.
        space: of `model.voice_tuning.Tuner`.
        on_fault: called in the batch's thread with what ended it, before anybody else is told.
    """

    def __init__(
        self,
        model: Lina,
        recipe: Recipe,
        slots: int = 64,
        memory_bytes: int = 2 << 30,
        waiting: int = 1000,
        apart: bool = False,
        threads: int | None = None,
        space: int | None = None,
        on_fault: Callable[[BaseException], Any] | None = None,
    ) -> None:
        self.model, self.recipe, self.slots, self.memory_bytes = model, recipe, slots, memory_bytes
        self.most_waiting, self._threads, self._on_fault = waiting, threads, on_fault
        self._tuners = (Apart if apart else Tuner)(model, recipe, slots, memory_bytes, space=space)
        self._waiting: OrderedDict[str, tuple[Request, OnEvent]] = OrderedDict()
        self._taken: dict[str, _Taken] = {}
        self._cancelled: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        self.fault: BaseException | None = None
        """What ended the thread, if anything did."""
        self._thread = threading.Thread(target=self._run, name="tuning", daemon=True)
        self._thread.start()

    def submit(self, id: str, request: Request, on_event: OnEvent) -> None:
        """Takes a request up.

        Args:
            on_event: called in the batch's thread: any number of times with a `Progress`, then once with the `Tuned`
                or the exception that ended it; it must return at once.

        Raises:
            Unusable: `busy` where too many wait; `duplicate-request` where the id is in use.
        """
        with self._changed:
            if self.fault or self._closing:
                raise RuntimeError("the batch has ended") from self.fault
            if id in self._waiting or id in self._taken:
                raise Unusable("duplicate-request", f"request {id!r} is being worked on")
            if len(self._waiting) >= self.most_waiting:
                raise Unusable("busy", f"{len(self._waiting)} speakers are waiting already; try again later")
            self._waiting[id] = (request, on_event)
            self._changed.notify()

    def cancel(self, id: str) -> None:
        """Drops a request, waiting or being tuned, without an event; nothing happens where there is none."""
        with self._changed:
            if self._waiting.pop(id, None) is None and id in self._taken:
                self._cancelled.add(id)
                self._changed.notify()

    def waiting(self) -> tuple[str, ...]:
        """Ids of who waits, in order."""
        with self._changed:
            return tuple(self._waiting)

    def active(self) -> tuple[str, ...]:
        """Ids of who is being tuned."""
        with self._changed:
            return tuple(self._taken)

    def close(self) -> None:
        """Ends the thread after the present step; what is unfinished gets no event."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        if self._threads:
            import torch

            torch.set_num_threads(self._threads)
        try:
            while self._admitted():
                for tuned in self._tuners.step():
                    self._end(tuned.speaker, tuned)
                self._report()
        except BaseException as error:
            with self._changed:
                self.fault = error
                left = [on_event for _, on_event in self._waiting.values()]
                left += [taken.on_event for taken in self._taken.values()]
            if self._on_fault:
                self._on_fault(error)
            for on_event in left:
                on_event(RuntimeError(f"the tuning thread ended: {error!r}"))
            raise

    def _admitted(self) -> bool:
        """Lets go who was cancelled, takes in who fits, waits until there is something to do; False at the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self._taken)
                if self._closing:
                    return False
                gone, self._cancelled = self._cancelled, set()
                for id in gone & self._taken.keys():
                    self._taken.pop(id)
                    self._tuners.leave(id)
                following = self._next()
            if following is None:
                return True
            self._join(*following)

    def _next(self) -> tuple[str, Request, OnEvent] | None:
        """The one who waits longest, if there is a slot and memory."""
        if not self._waiting or not self._tuners.free:
            return None
        id, (request, on_event) = next(iter(self._waiting.items()))
        size = self._size(request)
        used = sum(taken.bytes for taken in self._taken.values())
        if self._taken and used + size > self.memory_bytes:
            return None
        del self._waiting[id]
        self._taken[id] = _Taken(request, on_event, size)
        return id, request, on_event

    def _size(self, request: Request) -> int:
        size = sum(sample_bytes(sample, self.model.config, self._item) for sample in request.samples)
        return min(size, self.memory_bytes)

    @property
    def _item(self) -> int:
        return self.model.norm.weight.element_size()

    def _join(self, id: str, request: Request, on_event: OnEvent) -> None:
        seed = number(self.recipe.seed, request.speaker) if request.seed is None else request.seed
        try:
            self._tuners.join(id, request.samples, seed=seed)
        except ModelError as error:
            with self._changed:
                self._taken.pop(id)
            on_event(Unusable("bad-samples", str(error).replace(repr(id), repr(request.speaker))))
        else:
            on_event(Progress(0, self.recipe.steps))

    def _end(self, id: str, tuned: Tuned) -> None:
        with self._changed:
            taken = self._taken.pop(id)
            self._cancelled.discard(id)
        taken.on_event(dataclasses.replace(tuned, speaker=taken.request.speaker))

    def _report(self) -> None:
        now = time.monotonic()
        due = [(id, taken) for id, taken in self._taken.items() if now - taken.told >= _REPORT_SECONDS]
        for id, taken in due:
            taken.told = now
            taken.on_event(_progress(self._tuners.look(id), self.recipe))


class Apart:
    """Tuners of one slot each behind the interface of one: what a speaker's numbers are depends on it alone.

    A share of the memory is each one's own, so that what is kept does not depend on the company either.
    """

    def __init__(self, model: Lina, recipe: Recipe, slots: int, memory_bytes: int, space: int | None = None) -> None:
        self.model, self.recipe, self.slots, self.memory_bytes = model, recipe, slots, memory_bytes
        self.space = space
        self._tuners: dict[str, Tuner] = {}

    @property
    def free(self) -> int:
        return self.slots - len(self._tuners)

    def join(self, speaker: str, samples: Sequence[Sample], seed: int | None = None) -> None:
        tuner = Tuner(self.model, self.recipe, 1, self.memory_bytes, space=self.space)
        tuner.join(speaker, samples, seed=seed)
        self._tuners[speaker] = tuner

    def leave(self, speaker: str) -> Tuned:
        return self._tuners.pop(speaker).leave(speaker)

    def look(self, speaker: str) -> Tuned:
        return self._tuners[speaker].look(speaker)

    def step(self) -> list[Tuned]:
        done = [tuned for tuner in self._tuners.values() for tuned in tuner.step()]
        for tuned in done:
            del self._tuners[tuned.speaker]
        return done


def sample_bytes(sample: Sample, config: LinaConfig, item: int) -> int:
    """About what `model.state_pass.Prepared` takes of a sample, with numbers of `item` bytes."""
    a_step = config.width + config.key_width + 2 * config.value_width
    return steps_of(sample) * (a_step * item + 8 * config.codebooks) + 3 * len(sample.phones) * config.width * item


def _progress(tuned: Tuned, recipe: Recipe) -> Progress:
    last = tuned.train_losses[-1] if tuned.train_losses else None
    return Progress(tuned.steps, recipe.steps, last, tuned.base_loss, tuned.tuned_loss)
