"""`POST /v1/audio/speech` and the list of models, as OpenAI's clients ask for them."""

# Annotations are looked at where they stand, for `Depends`: no `from __future__ import annotations` here.
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from pipeline.service.encoding import MEDIA, STREAMED, Encoder, whole
from pipeline.service.engine import Begun, SpeechRequest
from pipeline.service.errors import Refusal
from pipeline.service.service import Service
from pipeline.service.tenants import Tenant
from pipeline.service.voice_library import DEFAULT
from pipeline.speech_files import Provenance, SpeechFileError


class VoiceId(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str


class Speech(BaseModel):
    """What to say, and how."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field(description="As listed by GET /v1/models")
    input: str = Field(description="The text")
    voice: str | VoiceId = Field(DEFAULT, description="As listed by GET /v1/voices; `default` is the model's own")
    response_format: str = Field("mp3", description=f"{', '.join(MEDIA)}; pcm is signed 16-bit little-endian, mono")
    speed: float = Field(1.0, description="Only 1: the model has no other")
    instructions: str | None = Field(None, description="Not supported")
    stream_format: str = Field("audio", description="Only audio")
    seed: int = Field(
        0, description="The same seed says the same; another one says it otherwise", ge=-(2**63), lt=2**63
    )
    stream: bool = Field(
        True,
        description="Send speech while it is said. Otherwise all sentences are examined, and said again where that "
        "failed, before anything is sent. FLAC is never streamed",
    )


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["speech"])
    config = service.config
    model = {"id": config.name, "object": "model", "created": 0, "owned_by": "lina-ray"}

    @routes.get("/models")
    async def models(tenant: Annotated[Tenant, Depends(service.known)]) -> dict[str, Any]:
        """The one model that speaks here."""
        return {"object": "list", "data": [model]}

    @routes.get("/models/{id}")
    async def one_model(id: str, tenant: Annotated[Tenant, Depends(service.known)]) -> dict[str, Any]:
        """That model, where it has this name."""
        _check_model(id, config.name)
        return model

    @routes.post("/audio/speech", response_class=Response, responses=_documented())
    async def speak(wanted: Speech, tenant: Annotated[Tenant, Depends(service.counted)]) -> Response:
        """Says a text."""
        _check(wanted, config.name, config.longest_text)
        id = wanted.voice if isinstance(wanted.voice, str) else wanted.voice.id
        voice = None if id == DEFAULT else (await service.voice(tenant, id)).url
        form, streamed = wanted.response_format, wanted.stream and wanted.response_format in STREAMED
        request = SpeechRequest(wanted.input, voice, "" if id == DEFAULT else id, wanted.seed, streamed)
        if streamed:
            return await _streamed(service, request, form)
        async with service.speech(request) as (begun, items):
            samples, report = [item async for item in items]
        service.note(request, report)
        try:
            provenance = _provenance(request, begun, {"report": report})
            content = await asyncio.to_thread(whole, form, samples, begun.rate, provenance)
        except SpeechFileError as error:
            raise _no_file(error) from None
        return Response(content, media_type=_media(form, begun.rate), headers={"X-Lina-Report": json.dumps(report)})

    return routes


async def _streamed(service: Service, request: SpeechRequest, form: str) -> Response:
    """An answer that begins when the first speech is there: what goes wrong before has a status of its own.

    What goes wrong later ends the connection without the end of the body, which clients report as an error.
    """
    context = service.speech(request)
    begun, items = await context.__aenter__()
    try:
        encoder = Encoder(form, begun.rate, _provenance(request, begun, {}))
    except BaseException as error:
        await context.__aexit__(type(error), error, error.__traceback__)
        if isinstance(error, SpeechFileError):
            raise _no_file(error) from None
        raise

    async def content() -> AsyncIterator[bytes]:
        try:
            async for item in items:
                if not isinstance(item, np.ndarray):
                    service.note(request, item)
                elif ready := encoder.add(item):
                    yield ready
            if rest := encoder.end():
                yield rest
        finally:
            await context.__aexit__(None, None, None)

    return StreamingResponse(content(), media_type=_media(form, begun.rate))


def _provenance(request: SpeechRequest, begun: Begun, details: dict[str, Any]) -> Provenance:
    details = {"seed": request.seed, **({"voice_file": begun.voice_digest} if begun.voice_digest else {}), **details}
    return Provenance(begun.model, request.voice_name, begun.consent, request.text, details)


def _no_file(error: SpeechFileError) -> Refusal:
    return Refusal(500, "no_speech", f"What was said cannot be sent as a file: {error}")


def _media(form: str, rate: int) -> str:
    return f"{MEDIA[form]};rate={rate};channels=1" if form == "pcm" else MEDIA[form]


def _check_model(id: str, name: str) -> None:
    if id != name:
        raise Refusal(404, "model_not_found", f"No model {id[:80]!r}: this service has {name!r}", "model")


def _check(wanted: Speech, name: str, longest: int) -> None:
    _check_model(wanted.model, name)
    if wanted.response_format not in MEDIA:
        known = ", ".join(MEDIA)
        text = f"response_format {wanted.response_format[:40]!r} is not made here; these are: {known}"
        raise Refusal(400, "unsupported_value", text, "response_format")
    if wanted.speed != 1:
        text = f"speed {wanted.speed:g} is not supported: the model speaks at speed 1"
        raise Refusal(400, "unsupported_value", text, "speed")
    if wanted.instructions:
        text = "instructions are not supported: how it is said is the voice's"
        raise Refusal(400, "unsupported_value", text, "instructions")
    if wanted.stream_format != "audio":
        text = f"stream_format {wanted.stream_format[:40]!r} is not supported: only audio"
        raise Refusal(400, "unsupported_value", text, "stream_format")
    if len(wanted.input) > longest:
        text = f"input has {len(wanted.input):,} characters, at most {longest:,} are taken: split it"
        raise Refusal(400, "string_above_max_length", text, "input")


def _documented() -> dict[int, Any]:
    return {200: {"description": "Speech", "content": {media: {} for media in MEDIA.values()}}}
