"""Where requests for voices are taken in and followed until they are done: order, limits, time, progress, and retries.

A desk hands every request on at once, in order of arrival, to whatever tunes (`pipeline.enrollment_stage`: replicas
behind a Serve handle, which queues them in that order). A request whose replica dies is handed on again: tuning is a
pure function, so nothing but time is lost. What kills replicas may be one of the requests, and takes its neighbours
with it: who was lost twice is tuned with nobody beside it, so that only who is lost alone is given up. A desk lives in
one event loop and keeps nothing on disk.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.utterances import Unusable

Tune = Callable[[dict[str, Any]], AsyncGenerator[dict[str, Any], None]]
"""Events of a request: any number with `steps`, the last one with `voice`, or with `error`."""
_REMEMBERED = 10_000
"""Requests that are done and can still be asked for."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
"""Seconds before a request that was lost is handed on again."""
_LOST_TOGETHER = 2
"""Times that a request is lost before it is suspected: from then on it is tuned alone."""


@dataclass
class _Ticket:
    """A request, as far as it is."""

    id: str
    speaker: str
    number: int
    arrived: float
    state: str = "waiting"
    attempts: int = 0
    ended: float | None = None
    told: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None
    task: asyncio.Task | None = None
    dropped: bool = False


class Desk:
    """
    Args:
        tune: what tunes a request.
        queue: requests that may wait for a slot; more are refused.
        timeout: seconds that a request may take, unless it says otherwise.
        attempts: how often a request is handed on before it is given up; where there are several, the last one alone.
        lost: exceptions of `tune` that say that whoever tuned is gone.
    """

    def __init__(
        self, tune: Tune, queue: int, timeout: float, attempts: int, lost: tuple[type[Exception], ...]
    ) -> None:
        self.tune, self.queue, self.timeout, self.attempts, self.lost = tune, queue, timeout, attempts, lost
        self._open: OrderedDict[str, _Ticket] = OrderedDict()
        self._done: OrderedDict[str, _Ticket] = OrderedDict()
        self._numbers = itertools.count()
        self._turns = _Turns()

    async def enroll(self, request: dict[str, Any]) -> dict[str, Any]:
        """The last event of a request: `voice` and `row`, or `error` with a reason and a detail.

        Its reasons are `busy`, `duplicate-request`, `timeout`, `cancelled`, `lost`, and what tuning itself refuses.
        """
        try:
            ticket = self._taken(request)
        except Unusable as error:
            return _failed(error.reason, error.detail)
        seconds = request.get("timeout_s") or self.timeout
        ticket.task = asyncio.ensure_future(self._followed(ticket, {**request, "id": ticket.id}))
        try:
            async with asyncio.timeout(seconds):
                result = await ticket.task
        except TimeoutError:
            result = _failed("timeout", f"not done after {seconds:g} s; it was {_where(ticket)}")
        except asyncio.CancelledError:
            if not ticket.dropped:  # the caller has gone
                self._close(ticket, _failed("cancelled", "the caller has gone"))
                raise
            result = _failed("cancelled", f"cancelled while it was {_where(ticket)}")
        except Exception as error:
            self._close(ticket, _failed("failed", repr(error)))
            raise
        return self._close(ticket, result)

    def progress(self, id: str) -> dict[str, Any] | None:
        """How far a request is; None for one that is not known (any more).

        `state` is waiting, tuning, done or failed; with `place` in the queue from 1 on, `steps` of at most `of`, losses
        as far as they are known, `seconds` since it arrived, `attempts`, and `error` where it failed.
        """
        ticket = self._open.get(id) or self._done.get(id)
        if ticket is None:
            return None
        place = None
        if ticket.state == "waiting":
            place = 1 + sum(t.state == "waiting" and t.number < ticket.number for t in self._open.values())
        seconds = round((ticket.ended or time.monotonic()) - ticket.arrived, 3)
        known = {"id": id, "speaker": ticket.speaker, "state": ticket.state, "place": place, "seconds": seconds}
        return {**known, "attempts": ticket.attempts, "error": ticket.error, **ticket.told}

    def cancel(self, id: str) -> bool:
        """Drops a request; whether there was one."""
        ticket = self._open.get(id)
        if ticket is None or ticket.task is None:
            return False
        ticket.dropped = True
        ticket.task.cancel()
        return True

    def counts(self) -> dict[str, int]:
        """How many requests wait, and how many are being tuned."""
        waiting = self._waiting()
        return {"waiting": waiting, "tuning": len(self._open) - waiting}

    def _waiting(self) -> int:
        return sum(ticket.state == "waiting" for ticket in self._open.values())

    def _taken(self, request: dict[str, Any]) -> _Ticket:
        """Raises Unusable."""
        id = request.get("id") or uuid.uuid4().hex
        if id in self._open:
            raise Unusable("duplicate-request", f"request {id!r} is being worked on")
        if len(self._open) >= self.queue and self._waiting() >= self.queue:
            raise Unusable("busy", f"{self.queue} speakers are waiting already; try again later")
        ticket = self._open[id] = _Ticket(id, request["speaker"], next(self._numbers), time.monotonic())
        return ticket

    async def _followed(self, ticket: _Ticket, request: dict[str, Any]) -> dict[str, Any]:
        fault = "no event came"
        for attempt in range(self.attempts):
            ticket.attempts = attempt + 1
            alone = attempt >= max(1, min(_LOST_TOGETHER, self.attempts - 1))
            try:
                async with self._turns.turn(alone), aclosing(self.tune(request)) as events:
                    async for event in events:
                        if "voice" in event or "error" in event:
                            return event
                        ticket.state = "tuning"
                        ticket.told = event
            except self.lost as error:
                fault = f"{type(error).__name__}: {error}"
            ticket.state, ticket.told = "waiting", {}
            if attempt + 1 < self.attempts:
                await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt))
        beside = " with nobody beside it" if self.attempts > 1 else ""
        times = f"whoever tuned it was lost {self.attempts} times, last{beside}"
        return _failed("lost", f"{times}; the log of the tuners says why. It went with {fault[:500]}")

    def _close(self, ticket: _Ticket, result: dict[str, Any]) -> dict[str, Any]:
        del self._open[ticket.id]
        ticket.error, ticket.task, ticket.ended = result.get("error"), None, time.monotonic()
        ticket.state = "failed" if ticket.error else "done"
        if row := result.get("row"):
            ticket.told = {**ticket.told, "steps": row["steps"], "held_out_loss": row.get("tuned_loss")}
        self._done[ticket.id] = ticket
        while len(self._done) > _REMEMBERED:
            self._done.popitem(last=False)
        return result


class _Turns:
    """Lets in any number together, or one alone, in order of arrival."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._together = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def turn(self, alone: bool) -> AsyncIterator[None]:
        if alone:
            async with self._door:  # held to the end: nobody follows
                await self._empty.wait()
                yield
            return
        async with self._door:
            self._together += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._together -= 1
            if not self._together:
                self._empty.set()


def _failed(reason: str, detail: str) -> dict[str, Any]:
    return {"error": {"reason": reason, "detail": detail}}


def _where(ticket: _Ticket) -> str:
    if ticket.state == "waiting":
        return "waiting"
    return f"at step {ticket.told.get('steps', 0)} of {ticket.told.get('of', '?')}"
