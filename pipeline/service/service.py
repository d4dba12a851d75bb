"""What the routes of the ingress share: who asks, the engines, the voices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from infra.ray_errors import lost_worker
from pipeline.service import tenants
from pipeline.service.config import ServiceConfig
from pipeline.service.engine import Begun, Refused, SpeechRequest
from pipeline.service.errors import Refusal, busy
from pipeline.service.guesses import Guesses
from pipeline.service.tenants import Tenant
from pipeline.service.voice_library import DEFAULT, Entry, UnknownVoice, VoiceLibrary

logger = logging.getLogger("ray.serve")
_PATIENCE = 10.0
"""Seconds that an engine has to say how it is."""
ATTEMPTS = 6
"""Engines that a request may lose before anything of it was heard."""
_bearer = HTTPBearer(auto_error=False, description="A tenant's token; not needed where the service has none")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


class Service:
    """
    Args:
        engine, reader: handles of `SpeechEngine` and `recordings.SampleReader`.

    Raises:
        ConfigError: a tokens file that cannot be used.
    """

    def __init__(self, config: ServiceConfig, engine: Any, reader: Any) -> None:
        self.config = config
        self.tenants = tenants.read(config)
        self.rates, self.guesses = tenants.Rates(), Guesses()
        self.library = VoiceLibrary(config.voices)
        self.reader = reader
        self._engine = engine
        self.said = self.faulty = 0
        """Requests that were said to their end since this replica started, and those of them with faults."""

    @property
    def private(self) -> bool:
        """Nobody has to show a token."""
        return self.tenants is None

    def known(self, request: Request, credentials: _Credentials) -> Tenant:
        """Who asks."""
        if self.tenants is None:
            return Tenant(self.config.tenant, self.config.requests_per_minute)
        if credentials is None:
            raise _no_tenant("Send `Authorization: Bearer <token>`")
        token, address = credentials.credentials, request.client.host if request.client else ""
        if seconds := self.guesses.wait(address):  # before it is looked at, or guesses would go on being tried
            text = f"Too many unknown tokens came from {address}; the next one is looked at in {seconds:.1f} s"
            raise busy(text, "too_many_unknown_tokens", seconds)
        tenant = self.tenants.of(token)
        if tenant is None:
            self.guesses.note(address, token)
            raise _no_tenant("That token is not known")
        return tenant

    def counted(self, request: Request, credentials: _Credentials) -> Tenant:
        """Who asks, for something that costs."""
        tenant = self.known(request, credentials)
        if seconds := self.rates.wait(tenant):
            raise busy(
                f"More than {tenant.requests_per_minute} requests a minute; the next one may come in {seconds:.1f} s",
                "rate_limit_exceeded",
                seconds,
            )
        return tenant

    async def voice(self, tenant: Tenant, id: str) -> Entry:
        """A voice that a tenant may speak with."""
        try:
            return await asyncio.to_thread(self.library.find, tenant.name, id)
        except UnknownVoice:
            raise no_voice(id) from None

    async def facts(self) -> dict[str, Any]:
        """What an engine says of itself."""
        try:
            return await asyncio.wait_for(self._engine.facts.remote(), _PATIENCE)
        except Exception as error:  # whatever keeps it from answering
            raise Refusal(503, "engine_unavailable", "No engine answers; the service's log says why") from error

    def note(self, request: SpeechRequest, report: dict[str, Any]) -> None:
        """Takes down how a request went. What its text was is nobody's business."""
        self.said += 1
        if report["faults"]:
            self.faulty += 1
            faults, voice = ", ".join(report["faults"]), request.voice or DEFAULT
            logger.warning("speech of voice %s has faults: %s; coverage %.4g", voice, faults, report["coverage"])

    @asynccontextmanager
    async def speech(self, request: SpeechRequest) -> AsyncIterator[tuple[Begun, AsyncIterator[Any]]]:
        """What an engine says: (its beginning, then speech and the report); the first speech is there already.

        An engine that dies before that is replaced by another, which says the same. Leaving the block frees its row.
        """
        try:
            async with asyncio.timeout(self.config.timeout_s):
                begun, first, answer = await self._begun(request)
        except TimeoutError:
            text = f"Nothing was said within {self.config.timeout_s:g} s: try again, or with a shorter text"
            raise Refusal(504, "timeout", text) from None
        try:
            yield begun, _rest(first, answer)
        finally:
            answer.cancel()

    async def _begun(self, request: SpeechRequest) -> tuple[Begun, Any, Any]:
        """(how it began, its first speech, what gives the rest)."""
        from ray.exceptions import RayError

        for attempt in range(ATTEMPTS):
            answer = self._engine.options(stream=True).speak.remote(request)
            try:
                return _checked(await anext(answer)), _checked(await anext(answer)), answer
            except BaseException as error:
                answer.cancel()
                if not isinstance(error, RayError) or not _lost(error):
                    raise _as_refusal(error) from error
            logger.warning("an engine was lost before it said anything (%d of %d)", attempt + 1, ATTEMPTS)
            await asyncio.sleep(0.25 * 2**attempt)
        raise Refusal(503, "engine_lost", "Every engine that took this up was lost before it said anything; try again")


def _no_tenant(what: str) -> Refusal:
    return Refusal(401, "invalid_api_key", what, headers={"WWW-Authenticate": "Bearer"})


def no_voice(id: str) -> Refusal:
    return Refusal(404, "voice_not_found", f"No voice {id[:80]!r}: GET /v1/voices lists yours", "voice")


async def _rest(first: Any, answer: Any) -> AsyncIterator[Any]:
    yield first
    async for item in answer:
        yield _checked(item)


def _checked(item: Any) -> Any:
    if isinstance(item, Refused):
        if item.status == 429:
            raise busy(item.message, item.code, 2)
        raise Refusal(*item)
    return item


def _lost(error: Exception) -> bool:
    """Whether the engine is gone, or has stopped and will be replaced."""
    from pipeline.service.engine import Stopped

    return isinstance(error, lost_worker()) or isinstance(getattr(error, "cause", None), Stopped)


def _as_refusal(error: BaseException) -> BaseException:
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(error, BackPressureError):
        return busy("As many requests wait as may: try again after a few seconds", "engine_overloaded", 2)
    if isinstance(error, DeploymentUnavailableError):
        return Refusal(503, "engine_unavailable", "The engine cannot be started; the service's log says why")
    return error
