"""`/v1/voices`: which there are, how a new one is made from recordings, and how one is taken away."""

# Annotations are looked at where they stand, for `Depends`: no `from __future__ import annotations` here.
import asyncio
import json
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import FormData, UploadFile

from infra import storage
from model.voice_file import CONSENT, VoiceError, check_consent
from pipeline.service.config import NAME, ServiceConfig
from pipeline.service.enrolling import Enrollment, Enrollments, Full
from pipeline.service.enrollment_link import NoStage
from pipeline.service.errors import Refusal, busy
from pipeline.service.recordings import Recording, check
from pipeline.service.service import Service, no_voice
from pipeline.service.tenants import Tenant
from pipeline.service.voice_library import DEFAULT, Entry, UnknownVoice, describe

_LONGEST_CONSENT = 3000
"""Bytes of a consent record as it stands in a voice's file, which leaves the tuning's record more than it takes."""
_LONGEST_TRANSCRIPT = 2000
_SEED = re.compile(r"-?[0-9]{1,18}")
_AT_ONCE = 16
"""Voices' headers that are read at a time."""
_FIELDS = ("id", "consent", "seed", *(f"consent_{part}" for part in CONSENT))


def router(service: Service) -> APIRouter:
    answers = _Answers(service)

    @asynccontextmanager
    async def looking(_: Any) -> AsyncIterator[None]:
        look = asyncio.create_task(answers.enrollments.stage.look())
        yield
        look.cancel()

    routes = APIRouter(prefix="/v1/voices", tags=["voices"], lifespan=looking)
    Known, Counted = Annotated[Tenant, Depends(service.known)], Annotated[Tenant, Depends(service.counted)]

    @routes.get("")
    async def voices(
        tenant: Known, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: str = ""
    ) -> dict[str, Any]:
        """The voices that you may speak with, and those that are being made, in the order of their ids."""
        return await answers.listed(tenant.name, limit, after)

    @routes.post("", status_code=202, openapi_extra=_documented(service.config))
    async def enroll(request: Request, tenant: Counted) -> JSONResponse:
        """Makes a voice of recordings and what is said in them. Needs the speaker's consent."""
        return await answers.enroll(request, tenant.name)

    @routes.get("/{id:path}")
    async def voice(id: str, tenant: Known) -> dict[str, Any]:
        """A voice, or how far one is that is being made."""
        return await answers.shown(tenant, id)

    @routes.delete("/{id:path}")
    async def delete(id: str, tenant: Known) -> dict[str, Any]:
        """Takes a voice of yours away, or ends its making. From then on nobody speaks with it."""
        await answers.delete(tenant, id)
        return {"id": id, "object": "voice.deleted", "deleted": True}

    return routes


class _Answers:
    """What the routes answer."""

    def __init__(self, service: Service) -> None:
        self.service, self.config, self.library = service, service.config, service.library
        self.enrollments = Enrollments(service.config, service.library, service.reader)
        self.reading = ThreadPoolExecutor(_AT_ONCE, "voices")

    async def listed(self, tenant: str, limit: int, after: str) -> dict[str, Any]:
        entries, making = await asyncio.gather(
            asyncio.to_thread(self.library.entries, tenant), asyncio.to_thread(self.enrollments.of, tenant)
        )
        known = {entry.id: entry for entry in entries}
        waiting = {enrollment.id: enrollment for enrollment in making if enrollment.id not in known}
        ids = [id for id in sorted({*known, *waiting}) if id > after]
        default = {"id": DEFAULT, "object": "voice", "shared": True, "status": "ready"}
        chosen, loop = ids[:limit], asyncio.get_running_loop()
        shown = [loop.run_in_executor(self.reading, self._described, known.get(id), waiting.get(id)) for id in chosen]
        described = [voice for voice in await asyncio.gather(*shown) if voice]
        return {
            "object": "list",
            "data": described if after else [default, *described],
            "last_id": chosen[-1] if chosen else None,
            "has_more": len(ids) > limit,
        }

    async def enroll(self, request: Request, tenant: str) -> JSONResponse:
        try:
            async with self.enrollments.place(tenant) as place:
                return await self._enrolled(request, tenant, place)
        except NoStage as error:
            raise Refusal(503, error.code, f"Voices cannot be made here: {error}") from error
        except Full:
            raise busy(
                f"{self.config.most_enrolling} of your voices are being made: wait for one of them",
                "too_many_enrollments",
                30,
            ) from None

    async def _enrolled(self, request: Request, tenant: str, place: str) -> JSONResponse:
        enrollments, most = self.enrollments, self.config.most_samples
        await enrollments.stage.agree()
        async with request.form(max_files=most, max_fields=most + len(_FIELDS), max_part_size=1 << 14) as form:
            id, consent, seed = _told(form)
            recordings = await _recordings(form, self.config)
        entry = self.library.entry(tenant, id)
        async with enrollments.changing(tenant):
            if await asyncio.to_thread(_exists, entry):
                raise Refusal(409, "voice_exists", f"You have a voice {id!r}: delete it first, or name another", "id")
            old = await asyncio.to_thread(enrollments.find, tenant, id)
            if old and old.open:
                raise Refusal(409, "voice_exists", f"A voice {id!r} is being made", "id")
            enrollment = await enrollments.begin(place, entry, tenant, recordings, consent, seed)
        return JSONResponse(_of(enrollment), 202, headers={"Location": f"/v1/voices/{id}"})

    async def shown(self, tenant: Tenant, id: str) -> dict[str, Any]:
        enrollment = await self._enrollment(tenant, id)
        if enrollment and not await asyncio.to_thread(_exists, self.library.entry(tenant.name, id)):
            return _of(enrollment) | {"progress": await self.enrollments.progress(enrollment)}
        shown = await asyncio.to_thread(self._described, await self.service.voice(tenant, id), None)
        if shown is None:
            raise no_voice(id)
        return shown

    async def delete(self, tenant: Tenant, id: str) -> None:
        async with self.enrollments.changing(tenant.name):
            enrollment = await self._enrollment(tenant, id)
            if enrollment:
                await self.enrollments.cancel(tenant.name, enrollment)
            try:
                entry = await self.service.voice(tenant, id)
            except Refusal:
                if not enrollment:
                    raise
            else:
                if not entry.shared:
                    await asyncio.to_thread(self.library.delete, entry)
                elif not enrollment:
                    what = f"Voice {id!r} is everybody's: only the operator deletes it"
                    raise Refusal(403, "shared_voice", what, "id")

    async def _enrollment(self, tenant: Tenant, id: str) -> Enrollment | None:
        return await asyncio.to_thread(self.enrollments.find, tenant.name, id) if NAME.fullmatch(id) else None

    def _described(self, entry: Entry | None, enrollment: Enrollment | None) -> dict[str, Any] | None:
        """None for a voice that was deleted meanwhile."""
        try:
            return describe(self.library, entry) if entry else _of(enrollment)
        except UnknownVoice:
            return None


def _exists(entry: Entry) -> bool:
    return storage.exists(entry.url)


def _of(enrollment: Enrollment) -> dict[str, Any]:
    """An enrollment as the interface shows it."""
    shown = {"id": enrollment.id, "object": "voice", "shared": False, "status": enrollment.status}
    shown |= {"created": int(enrollment.created), "rejected_samples": enrollment.rejects}
    return shown | ({"error": enrollment.error} if enrollment.error else {})


def _told(form: FormData) -> tuple[str, dict[str, str], int | None]:
    """(id, consent, seed) of a form."""
    strange = sorted(set(form) - {*_FIELDS, "samples", "transcripts"})
    if strange:
        raise Refusal(400, "unknown_parameter", f"{strange[0][:80]} is no field of an enrollment", strange[0][:80])
    texts = {name: _text(form, name) for name in _FIELDS}
    id = texts["id"]
    if not id or not NAME.fullmatch(id) or id == DEFAULT:
        what = f"an id has 1 to 64 letters, digits, _ and -, and is not {DEFAULT!r}"
        raise Refusal(400, "invalid_value", what, "id")
    consent = {part: texts[f"consent_{part}"] or "" for part in CONSENT}
    if texts["consent"]:
        try:
            consent = json.loads(texts["consent"])
        except (ValueError, RecursionError):
            raise Refusal(400, "invalid_value", "consent must be JSON: who, when, scope", "consent") from None
    try:
        check_consent(consent, id)
    except VoiceError as error:
        raise Refusal(400, "no_consent", str(error), "consent") from None
    _check_size(consent)
    seed = texts["seed"]
    if seed and not _SEED.fullmatch(seed):
        raise Refusal(400, "invalid_value", "seed must be a whole number of at most 18 digits", "seed")
    return id, consent, int(seed) if seed else None


def _check_size(consent: dict[str, str]) -> None:
    try:
        # Twice: the file's header is JSON that has the record as a text.
        size = len(json.dumps(json.dumps(consent, ensure_ascii=False), ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise Refusal(400, "invalid_value", "consent has characters that are not Unicode", "consent") from None
    if size > _LONGEST_CONSENT:
        what = f"the consent record takes {size:,} bytes, at most {_LONGEST_CONSENT:,} fit: name a document instead"
        raise Refusal(400, "string_above_max_length", what, "consent")


def _text(form: FormData, name: str) -> str | None:
    values = form.getlist(name)
    if len(values) > 1 or any(not isinstance(value, str) for value in values):
        raise Refusal(400, "invalid_value", f"{name} must be one text", name)
    return values[0] if values else None


async def _recordings(form: FormData, config: ServiceConfig) -> list[Recording]:
    files, texts = form.getlist("samples"), form.getlist("transcripts")
    if not files or not all(isinstance(file, UploadFile) for file in files):
        raise Refusal(400, "missing_parameter", "samples: send at least one audio file", "samples")
    if len(texts) != len(files) or not all(isinstance(text, str) for text in texts):
        what = f"{len(files)} samples need as many transcripts, in their order, not {len(texts)}"
        raise Refusal(400, "invalid_value", what, "transcripts")
    recordings, seconds = [], 0.0
    for place, (file, text) in enumerate(zip(files, texts, strict=True)):
        if not text.strip() or len(text) > _LONGEST_TRANSCRIPT:
            what = (
                f"transcript {place} must say what is said in its sample, in at most {_LONGEST_TRANSCRIPT} characters"
            )
            raise Refusal(400, "invalid_value", what, f"transcripts.{place}")
        content = await file.read()
        try:
            seconds += await asyncio.to_thread(check, content, config)
        except ValueError as error:
            raise Refusal(400, "invalid_audio", f"sample {place} {error}", f"samples.{place}") from None
        recordings.append(Recording(content, text))
    if not config.least_seconds <= seconds <= config.most_seconds:
        least, most = config.least_seconds, config.most_seconds
        what = f"the samples have {seconds:.1f} s together; a voice is made of {least:g} to {most:g} s"
        raise Refusal(400, "invalid_audio", what, "samples")
    return recordings


def _documented(config: ServiceConfig) -> dict[str, Any]:
    text = {"type": "string"}
    properties: dict[str, Any] = {
        "id": text | {"pattern": f"^{NAME.pattern}$"},
        "samples": {"type": "array", "items": text | {"format": "binary"}, "maxItems": config.most_samples},
        "transcripts": {"type": "array", "items": text, "description": "What is said in each sample"},
        "consent": text | {"description": "JSON with who, when, scope; or give these:"},
        **{f"consent_{part}": text for part in CONSENT},
        "seed": {"type": "integer"},
    }
    schema = {"type": "object", "required": ["id", "samples", "transcripts"], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
