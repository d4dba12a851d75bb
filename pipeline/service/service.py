"""What the routes of the ingress share: who asks, the engines, the voices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from pipeline.service import tenants
from pipeline.service.config import ServiceConfig
from pipeline.service.engine import Begun, Refused, SpeechRequest
from pipeline.service.errors import Refusal, busy
from pipeline.service.tenants import Tenant
from pipeline.service.voice_library import Entry, UnknownVoice, VoiceLibrary

logger = logging.getLogger("ray.serve")
ATTEMPTS = 4
"""Engines that a request may lose before anything of it was heard."""
_bearer = HTTPBearer(auto_error=False, description="A tenant's token; not needed where the service has none")


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
        self.rates = tenants.Rates()
        self.library = VoiceLibrary(config.voices)
        self.reader = reader
        self._engine = engine

    @property
    def private(self) -> bool:
        """Nobody has to show a token."""
        return self.tenants is None

    def known(self, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Tenant:
        """Who asks."""
        if self.tenants is None:
            return Tenant(self.config.tenant, self.config.requests_per_minute)
        tenant = self.tenants.of(credentials.credentials) if credentials else None
        if tenant is None:
            what = "That token is not known" if credentials else "Send `Authorization: Bearer <token>`"
            raise Refusal(401, "invalid_api_key", what, headers={"WWW-Authenticate": "Bearer"})
        return tenant

    def counted(self, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Tenant:
        """Who asks, for something that costs."""
        tenant = self.known(credentials)
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
            raise Refusal(
                404, "voice_not_found", f"No voice {id[:80]!r}: GET /v1/voices lists yours", "voice"
            ) from None

    async def facts(self) -> dict[str, Any]:
        return await self._engine.facts.remote()

    @asynccontextmanager
    async def speech(self, request: SpeechRequest) -> AsyncIterator[tuple[Begun, AsyncIterator[Any]]]:
        """What an engine says: (its beginning, then speech and the report); the first speech is there already.

        An engine that dies before that is replaced by another, which says the same. Leaving the block frees its row.
        """
        from ray.exceptions import RayActorError

        for attempt in range(ATTEMPTS):
            answer = self._engine.options(stream=True).speak.remote(request)
            try:
                begun = _checked(await anext(answer))
                first = _checked(await anext(answer))
            except RayActorError:
                logger.warning("an engine died before it said anything (%d of %d)", attempt + 1, ATTEMPTS)
                await asyncio.sleep(0.2 * 2**attempt)
                continue
            except BaseException as error:
                answer.cancel()
                raise _as_refusal(error) from error
            try:
                yield begun, _rest(first, answer)
            finally:
                answer.cancel()
            return
        raise Refusal(503, "engine_lost", "Every engine that took this up died before it said anything; try again")


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


def _as_refusal(error: BaseException) -> BaseException:
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(error, BackPressureError):
        return busy("As many requests wait as may: try again after a few seconds", "engine_overloaded", 2)
    if isinstance(error, DeploymentUnavailableError):
        return Refusal(503, "engine_unavailable", "The engine cannot be started; the service's log says why")
    return error
