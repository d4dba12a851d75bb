"""Voices on their way: from samples through the enrollment stage to a file, with a record that outlives this process.

<voices>/<tenant>/.enrolling/<voice>.json       until the voice is there, or after it failed, until it is deleted
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from infra import storage
from pipeline.service.config import ServiceConfig
from pipeline.service.enrollment_link import EnrollmentLink, OtherModel
from pipeline.service.recordings import Recording
from pipeline.service.voice_library import Entry, VoiceLibrary

logger = logging.getLogger("ray.serve")
_BEAT = 15.0
"""Seconds after which whoever follows an enrollment stamps its record anew."""
_LOST = 60.0
"""Seconds without a stamp after which nobody follows it any more; machines' clocks must differ by less."""


@dataclass(frozen=True)
class Enrollment:
    """A voice that is being made, or could not be."""

    id: str
    request: str
    """Its id at the enrollment stage."""
    created: float
    """Seconds since 1970."""
    seen: float = 0.0
    """When it was last stamped, in seconds since 1970."""
    status: str = "reading"
    """reading, tuning, failed."""
    error: dict[str, str] | None = None
    """code and message, of a failed one."""
    rejects: list[dict[str, Any]] = field(default_factory=list)
    """Samples that could not be used."""

    @property
    def open(self) -> bool:
        return self.status != "failed"


class Full(RuntimeError):
    """As many voices of a tenant are being made as may be."""


class Enrollments:
    """
    Args:
        reader: handle of `recordings.SampleReader`.
    """

    def __init__(self, config: ServiceConfig, library: VoiceLibrary, reader: Any) -> None:
        self.config, self.library, self.reader = config, library, reader
        self.stage = EnrollmentLink(config.model)
        self._tasks: dict[str, asyncio.Task] = {}
        self._places: defaultdict[str, set[str]] = defaultdict(set)
        """By tenant: requests that are being sent or worked on here."""
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def changing(self, tenant: str) -> asyncio.Lock:
        """Held while a tenant's voices come or go: who looks first may then rely on what was seen."""
        return self._changing[tenant]

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[str]:
        """Gives an enrollment to come its request id; it counts from now on, to its end or else to the block's.

        Raises:
            Full: the tenant has as many as it may.
        """
        noted = await asyncio.to_thread(self.of, tenant)
        held = self._places[tenant]
        if len(held | {enrollment.request for enrollment in noted if enrollment.open}) >= self.config.most_enrolling:
            raise Full(tenant)
        request = uuid.uuid4().hex
        held.add(request)
        try:
            yield request
        finally:
            if request not in self._tasks:
                held.discard(request)

    def of(self, tenant: str) -> list[Enrollment]:
        """A tenant's, in the order of their names."""
        found = (self.find(tenant, name.removesuffix(".json")) for name in storage.names(self._folder(tenant)))
        return [enrollment for enrollment in found if enrollment]

    def find(self, tenant: str, id: str) -> Enrollment | None:
        """A tenant's enrollment of a voice, if there is one; `id` has been checked."""
        try:
            enrollment = Enrollment(**json.loads(storage.read_bytes(self._url(tenant, id))))
        except (OSError, ValueError, TypeError):
            return None
        if enrollment.open and time.time() > enrollment.seen + _LOST:
            return replace(enrollment, status="failed", error=_error("lost", "it was interrupted: enroll it again"))
        return enrollment

    async def begin(
        self,
        request: str,
        entry: Entry,
        tenant: str,
        recordings: list[Recording],
        consent: dict[str, str],
        seed: int | None,
    ) -> Enrollment:
        """Notes an enrollment and starts it.

        Args:
            request: from `place`, within its block.
            entry: of the voice to come.
            recordings: taken out of the list once they are read.
        """
        enrollment = Enrollment(entry.id, request, time.time())
        try:
            await _in_thread(self._note, tenant, enrollment)
        except BaseException:  # nobody would follow it
            await _in_thread(self.forget, tenant, entry.id)
            raise
        task = asyncio.create_task(self._followed(enrollment, entry, tenant, recordings, consent, seed))
        self._tasks[request] = task
        task.add_done_callback(lambda _: self._end(tenant, request))
        return enrollment

    async def progress(self, enrollment: Enrollment) -> dict[str, Any] | None:
        """What the enrollment stage says of it: state, place in the queue, steps of how many, losses."""
        if enrollment.status != "tuning":
            return None
        try:
            told = await self.stage.answer("progress", enrollment.request)
        except Exception:  # whatever keeps the stage from answering, the record is there
            logger.warning("the enrollment stage does not tell its progress", exc_info=True)
            return None
        return {name: value for name, value in (told or {}).items() if name not in ("id", "speaker", "error")} or None

    async def cancel(self, tenant: str, enrollment: Enrollment) -> None:
        """Ends and forgets it: what of it was being written is whole then, and nothing follows."""
        if task := self._tasks.get(enrollment.request):
            task.cancel()
            await asyncio.wait([task])
        await _in_thread(self.forget, tenant, enrollment.id)
        # Whatever its record said: it may have gone on since, and another process may follow it.
        try:
            await self.stage.answer("cancel", enrollment.request)
        except Exception:  # it is forgotten all the same
            logger.warning("the enrollment stage does not drop %s", enrollment.request, exc_info=True)

    def forget(self, tenant: str, id: str) -> None:
        storage.remove(self._url(tenant, id))

    def _end(self, tenant: str, request: str) -> None:
        self._tasks.pop(request, None)
        self._places[tenant].discard(request)

    async def _followed(
        self,
        enrollment: Enrollment,
        entry: Entry,
        tenant: str,
        recordings: list[Recording],
        consent: dict[str, str],
        seed: int | None,
    ) -> None:
        async def stamp() -> None:
            """Says that somebody follows it, as it stands by now."""
            try:
                await _in_thread(self._renote, tenant, enrollment)
            except OSError:  # it goes on, and the next stamp may be written
                logger.warning("the record of enrollment %s cannot be written", enrollment.request, exc_info=True)

        try:
            async with asyncio.timeout(self.config.enroll_timeout_s):
                read = await _asked(self.reader.read, recordings, stamp)
                recordings.clear()
                enrollment = replace(enrollment, rejects=read.rejects)
                error, made = self._unusable(read.seconds, read.rejects), {}
                if error is None:
                    enrollment = replace(enrollment, status="tuning")
                    await _in_thread(self._renote, tenant, enrollment)
                    wanted = {"id": enrollment.request, "speaker": entry.id, "samples": read.samples}
                    wanted |= {"consent": consent, "seed": seed, "timeout_s": self.config.enroll_timeout_s}
                    made = await _asked((await self.stage.handle()).enroll, wanted, stamp)
            if "voice" in made and (why := await asyncio.to_thread(self.stage.refused, made["voice"])):
                error = _error(OtherModel.code, why)
            elif "voice" in made:
                await _in_thread(self._keep, tenant, enrollment, entry, made["voice"])
                return
            if "error" in made:
                error = _error(made["error"]["reason"].replace("-", "_"), made["error"]["detail"])
        except TimeoutError:
            error = _error("timeout", f"not done within {self.config.enroll_timeout_s:g} s")
        except Exception:  # it ends where nobody waits: the record and the log are told
            logger.exception("enrollment %s failed", enrollment.request)
            error = _error("internal_error", "The service failed; its log says how")
        await _in_thread(self._renote, tenant, replace(enrollment, status="failed", error=error))

    def _keep(self, tenant: str, enrollment: Enrollment, entry: Entry, voice: bytes) -> None:
        if self._noted(tenant, enrollment):
            self.library.write(entry, voice)
            self.forget(tenant, enrollment.id)

    def _renote(self, tenant: str, enrollment: Enrollment) -> None:
        if self._noted(tenant, enrollment):
            self._note(tenant, enrollment)

    def _noted(self, tenant: str, enrollment: Enrollment) -> bool:
        """Whether it was not deleted, which another process may have done."""
        noted = self.find(tenant, enrollment.id)
        return noted is not None and noted.request == enrollment.request

    def _unusable(self, seconds: float, rejects: list[dict[str, Any]]) -> dict[str, str] | None:
        if seconds >= self.config.least_seconds:
            return None
        first = f"; sample {rejects[0]['sample']}: {rejects[0]['detail']}" if rejects else ""
        least = self.config.least_seconds
        return _error("too_little_speech", f"{seconds:.1f} s of speech can be used, {least:g} s are needed{first}")

    def _note(self, tenant: str, enrollment: Enrollment) -> None:
        stamped = replace(enrollment, seen=time.time())
        storage.write_text(self._url(tenant, enrollment.id), json.dumps(asdict(stamped)))

    def _folder(self, tenant: str) -> str:
        return storage.join(self.config.voices, tenant, ".enrolling")

    def _url(self, tenant: str, id: str) -> str:
        return storage.join(self._folder(tenant), f"{id}.json")


async def _asked(method: Any, request: Any, meanwhile: Callable[[], Awaitable[None]]) -> Any:
    """The answer to a request; who is cancelled before takes it back.

    Args:
        meanwhile: done every `_BEAT` seconds until it is there.
    """
    answer = method.remote(request)
    waiting = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait([waiting], timeout=_BEAT))[0]:
            await meanwhile()
        return waiting.result()
    except asyncio.CancelledError:
        waiting.cancel()
        answer.cancel()
        raise


async def _in_thread(work: Callable[..., None], *args: Any) -> None:
    """Work in a thread, where nothing can stop it: who is cancelled meanwhile ends after it, not before."""
    running, cancelled = asyncio.ensure_future(asyncio.to_thread(work, *args)), None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    failure = running.exception()
    if cancelled or failure:
        raise cancelled or failure


def _error(code: str, message: str) -> dict[str, str]:
    return {"code": code, "message": message}
