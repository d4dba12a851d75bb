"""A batch of speakers becomes a folder of voices: read one by one, tokenized, tuned by the stage, written whole.

The same batch again does only what is missing: a speaker is done when its voice file is there, of this model and
recipe, made from these recordings and this consent. Speakers pass in the order in which they are read, so many at a
time as fill all tuners; the driver holds no more of them. Whoever cannot be enrolled goes to the quarantine with the
reason.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from infra import devices, storage
from infra.ray_errors import lost_worker
from model.checkpoint import CONFIG_FILE, ModelCard, read_card
from model.lina_config import ModelError
from pipeline.bulk_synthesis import codec_of
from pipeline.codec_weights import ResolvedCodec
from pipeline.enroll_config import EnrollConfig
from pipeline.enrolled import recipe_record
from pipeline.enrollment_app import EnrollmentError, about_tuning
from pipeline.enrollment_files import VoiceFolder
from pipeline.enrollment_stage import resolved
from pipeline.speaker_samples import SampleEncoder, settings_of
from pipeline.speakers import Consents, Speaker, read_speakers
from pipeline.synthesis import ModelFiles
from pipeline.utterances import Reject, Unusable

ATTEMPTS = 5
"""Times that a speaker is asked for when the stage itself is lost."""
ENCODINGS = 3
"""Workers that may die while they read a speaker's samples."""
_BUSY_SECONDS = 2.0
_STORAGE = "storage-error"
_INCOMPLETE = "incomplete"
"""In place of the digest of recordings of which the storage did not give all: equal to none."""

OnResult = Callable[[dict[str, Any] | Reject, bool], None]
"""Told of each speaker: its note or its reject, and whether it was done before."""


@dataclass(frozen=True)
class Batch:
    """All that is settled before work begins."""

    config: EnrollConfig
    card: ModelCard
    codec: ResolvedCodec
    consents: Consents
    folder: VoiceFolder
    about: dict[str, Any]
    """What the stage must say of itself."""

    def speakers(self) -> Iterator[Speaker | Reject]:
        return read_speakers(self.config.speakers, self.consents)


def prepare(config: EnrollConfig) -> Batch:
    """Reads model, codec and consent, and looks whether the output is for them.

    Raises:
        ModelError, CodecError, ManifestError, TranscriptionUnavailable: something cannot be used.
        PlanError: the output was made otherwise; says how.
    """
    config = dataclasses.replace(
        config,
        model=storage.absolute(config.model),
        speakers=storage.absolute(config.speakers),
        output=storage.absolute(config.output),
    )
    if config.transcribe:
        from pipeline.transcription import Transcriber

        Transcriber(config.transcribe)  # a missing recogniser is told now, not by the first worker
    files = _config_of(config.model)
    card, codec = read_card(files.config), codec_of(config, files)
    recipe = recipe_record(config.recipe())
    about = about_tuning(
        {"model": card.fingerprint, "codec": card.codec.digest, "dtype": config.dtype, "recipe": recipe}
    )
    folder = VoiceFolder(config.output, config.tenant, about | config.token_settings())
    batch = Batch(config, card, codec, Consents(config.consent_file), folder, about)
    next(iter(batch.speakers()), None)  # refused now if there is nothing to read
    folder.check()
    return batch


def run(batch: Batch, open_stage: Callable[[], Any], on_result: OnResult) -> None:
    """Enrolls every speaker that is not done.

    Args:
        open_stage: gives a handle of the stage; called once, by the first speaker with samples to tune on.

    Raises:
        ManifestError: the speakers' file cannot be read to its end.
        EnrollmentError: the stage was lost for good; also what `open_stage` raises.
    """
    import ray

    stage = resolved(batch.config.stage())
    limit = batch.config.in_flight or 2 * stage.slots * stage.max_replicas + 2
    one_pass = _Run(batch, open_stage, ray.put(batch.codec), on_result)
    try:
        asyncio.run(one_pass.all(limit))
    finally:
        for encoder in one_pass.encoders:
            ray.kill(encoder)


class _Run:
    """One pass over the speakers, in one event loop."""

    def __init__(self, batch: Batch, open_stage: Callable[[], Any], shipped: Any, on_result: OnResult) -> None:
        """`shipped` is a Ray reference to the codec."""
        self.batch, self.open_stage, self.shipped, self.on_result = batch, open_stage, shipped, on_result
        self.encoders: list[Any] = []
        self._free: asyncio.Queue = asyncio.Queue()
        self._opening: asyncio.Future | None = None
        self._prefix = uuid.uuid4().hex[:12]

    async def all(self, limit: int) -> None:
        speakers, pending, number = self.batch.speakers(), set(), 0
        try:
            while (part := await asyncio.to_thread(next, speakers, None)) is not None:
                if isinstance(part, Reject):
                    self.on_result(part, False)
                    continue
                pending.add(asyncio.create_task(self._one(part, f"{self._prefix}-{number}")))
                number += 1
                if len(pending) >= limit:
                    pending = await _some_done(pending)
            while pending:
                pending = await _some_done(pending)
        finally:
            for task in pending:
                task.cancel()

    async def _one(self, speaker: Speaker, id: str) -> None:
        try:
            if note := await _stored(self.batch.folder.known, speaker):
                self.on_result(note, True)
            else:
                self.on_result(await self._enrolled(speaker, id), False)
        except Unusable as error:
            self.on_result(_rejected(speaker, error), False)

    async def _enrolled(self, speaker: Speaker, id: str) -> dict[str, Any]:
        """Raises Unusable."""
        start = time.monotonic()
        recordings = await _stored(self.batch.folder.recordings, speaker)
        samples, rejects = await self._encoded(speaker)
        if any(reject.reason == _STORAGE for reject in rejects):
            recordings = _INCOMPLETE  # the next batch makes the voice again, of what was not given to this one
        if not samples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r.reason for r in rejects).items())
            detail = f"none of {len(speaker.samples)} samples can be used ({reasons}); first: {rejects[0].detail}"
            raise Unusable("no-usable-samples", detail)
        request = {
            "id": id,
            "speaker": speaker.name,
            "samples": [sample.to_request() for sample in samples],
            "consent": speaker.consent,
            "source": self.batch.folder.source(speaker),
        }
        result = await self._asked(request)
        if "error" in result:
            raise Unusable(result["error"]["reason"], result["error"]["detail"])
        row = result["row"] | {"rejected_samples": len(rejects), "wall_seconds": round(time.monotonic() - start, 3)}
        return await _stored(self.batch.folder.write, speaker, result["voice"], row, rejects, recordings)

    async def _encoded(self, speaker: Speaker) -> tuple[list[Any], list[Reject]]:
        """(samples, rejects). Raises Unusable where worker after worker died of them."""
        for _ in range(ENCODINGS):
            if not self.encoders:
                self._add_encoders(_tokenizers(self.batch.config))
            encoder = await self._free.get()
            try:
                return await encoder.encode.remote(list(speaker.samples))
            except lost_worker() as error:
                if getattr(error, "actor_init_failed", False):
                    raise EnrollmentError(f"who reads samples does not start: {error}") from None
                fault = str(error)
                self.encoders.remove(encoder)
                encoder = None
            finally:
                if encoder is None:
                    self._add_encoders(1)
                else:
                    self._free.put_nowait(encoder)
        raise Unusable("worker-lost", f"{ENCODINGS} workers died while they read its samples: {fault[:300]}")

    def _add_encoders(self, count: int) -> None:
        for _ in range(count):
            self.encoders.append(_encoder(self.batch, self.shipped))
            self._free.put_nowait(self.encoders[-1])

    async def _stage(self) -> Any:
        if self._opening is None:
            self._opening = asyncio.ensure_future(asyncio.to_thread(self._opened))
        return await asyncio.shield(self._opening)

    def _opened(self) -> Any:
        stage = self.open_stage()
        storage.patiently(self.batch.folder.bind)
        return stage

    async def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the stage says, asked again while it is full, and when it was lost: it gives the same voice then."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        stage, lost = await self._stage(), 0
        while True:
            try:
                result = await stage.enroll.remote(request)
            except (RayError, RayServeException) as error:
                lost += 1
                if lost == ATTEMPTS:
                    raise EnrollmentError(f"the enrollment stage was lost {lost} times: {error}") from error
                request = request | {"id": f"{request['id'].partition('.')[0]}.{lost}"}
                await asyncio.sleep(2.0**lost)
                continue
            if result.get("error", {}).get("reason") != "busy":
                return result
            await asyncio.sleep(_BUSY_SECONDS)


async def _stored(ask: Callable[..., Any], *args: Any) -> Any:
    """What a function of the storage gives. Raises Unusable `storage-error` where that failed again and again."""
    try:
        return await asyncio.to_thread(storage.patiently, partial(ask, *args))
    except OSError as error:
        raise Unusable(_STORAGE, f"the storage failed three times: {error}") from None


async def _some_done(pending: set[asyncio.Task]) -> set[asyncio.Task]:
    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return pending


def _rejected(speaker: Speaker, error: Unusable) -> Reject:
    return Reject(speaker.name, "enroll", error.reason, error.detail, speaker.where)


def _encoder(batch: Batch, shipped: Any) -> Any:
    import ray

    config, identity = batch.config, batch.codec.identity.to_dict()
    device = devices.of_cluster(config.device)
    gpus = {"num_gpus": config.codec_gpus} if device == "cuda" else {}
    actor = ray.remote(SampleEncoder).options(num_cpus=config.codec_cpus, **gpus)
    return actor.remote(settings_of(config, batch.card.sizes.codebooks, device), shipped, identity)


def _tokenizers(config: EnrollConfig) -> int:
    import ray

    if config.tokenizers:
        return config.tokenizers
    on_gpu = devices.of_cluster(config.device) == "cuda"
    return max(1, int(ray.cluster_resources()["GPU"])) if on_gpu else 1


def _config_of(folder: str) -> ModelFiles:
    """A model's files without its weights, which only tuners read."""
    try:
        return ModelFiles(folder, storage.read_bytes(storage.join(folder, CONFIG_FILE)), b"")
    except storage.UNREADABLE as error:
        raise ModelError(
            f"{folder} is no model: {CONFIG_FILE} cannot be read ({error}); jobs/export.py makes a model's folder: "
            "name it with --model"
        ) from None


def quarantine_line(reject: Reject | dict[str, Any]) -> str:
    """A line of quarantine.jsonl."""
    row = reject._asdict() if isinstance(reject, Reject) else reject
    return json.dumps({"speaker": row["id"], **{n: row[n] for n in ("stage", "reason", "detail", "where")}}) + "\n"
