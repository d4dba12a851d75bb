"""The enrollment stage: a Ray Serve application that tunes many speakers' voices at once.

    enroll = serve.get_deployment_handle("EnrollmentStage", "enrollment")
    done = await enroll.enroll.remote({
        "id": "my-17",                                    # the caller's choice; left out, the stage makes one up
        "speaker": "ada", "consent": {"who": …, "when": …, "scope": …},
        "samples": [{"codes": uint16 [K, frames], "phones": "HH AH0 L OW1"}, …],     # or "text" instead of "phones"
        "seed": None, "timeout_s": None, "source": None,
    })                                                    # {"voice": bytes of the file, "row": {…}} or {"error": {…}}
    await enroll.progress.remote("my-17")                 # state, place in the queue, steps, losses; None: not known
    await enroll.cancel.remote("my-17")

Two deployments. `EnrollmentStage`, one replica without a GPU, is the desk: every request passes it, so that it alone
knows everybody's order and progress, however many tune. `VoiceTuner`, a replica a GPU (or some CPUs), holds a
continuous batch (`pipeline.tuning_batch`) and streams each request's progress and voice back to the desk. The number
of tuners follows the number of requests; a tuner that dies loses nothing, for the desk hands its requests on again.
A tuner whose thread fails, out of GPU memory, say, ends its process: it would be idle, and draw all requests to it.
When the desk itself dies, callers get an error and ask again: the same request gives the same voice.

`app` builds it from `StageConfig`'s fields: infra/configs/serve.yaml names it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from infra import config as configs
from infra import devices, storage
from pipeline.enroll_config import StageConfig
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    from ray.serve import Application

NAME, DESK, TUNER = "enrollment", "EnrollmentStage", "VoiceTuner"
_JOINT_SLOTS, _APART_SLOTS = 64, 4
_SPARE = 1000
"""Requests at the desk beyond those that wait: who asks for progress, who cancels."""


def app(args: dict[str, Any]) -> Application:
    """The application, from fields of `StageConfig`. Raises ConfigError for what they cannot be."""
    return build(configs.load(StageConfig, overrides=args))


def build(config: StageConfig) -> Application:
    """The application, for the cluster that this process is connected to.

    Raises:
        ModelError: a recipe that cannot be.
    """
    from ray import serve

    config.recipe()
    given, config = config.max_replicas, resolved(config)
    if given is None:
        kind = "GPUs" if config.device == "cuda" else "CPUs"
        print(
            f"enrollment: at most {config.max_replicas} tuners, for the {kind} that are up now; "
            "max_replicas (--max-replicas) sets another number, for a cluster that grows",
            flush=True,
        )
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    ongoing = config.slots + max(2, config.slots // 4)
    tuner = serve.deployment(
        VoiceTuner,
        name=TUNER,
        max_ongoing_requests=ongoing,
        ray_actor_options=_resources(config),
        logging_config=quiet,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        **_scaling(config),
    )
    desk = serve.deployment(
        EnrollmentStage,
        name=DESK,
        num_replicas=1,
        max_ongoing_requests=config.queue + config.max_replicas * ongoing + _SPARE,
        ray_actor_options={"num_cpus": 0},
        logging_config=quiet,
        graceful_shutdown_timeout_s=5,
    )
    return desk.bind(config, tuner.bind(config))


def resolved(config: StageConfig) -> StageConfig:
    """With everything decided that depends on the cluster."""
    import dataclasses

    import ray

    resources = ray.cluster_resources()
    device = devices.of_cluster(config.device)
    batching = config.batching
    if batching == "auto":
        batching = "joint" if device == "cuda" else "apart"
    most = config.max_replicas
    if most is None:
        fits = resources.get("GPU", 1) if device == "cuda" else resources.get("CPU", 1) / max(config.threads, 1)
        most = max(config.min_replicas, math.floor(fits))
    return dataclasses.replace(
        config,
        model=storage.absolute(config.model),
        device=device,
        batching=batching,
        max_replicas=most,
        slots=config.slots or (_JOINT_SLOTS if batching == "joint" else _APART_SLOTS),
    )


def _resources(config: StageConfig) -> dict[str, Any]:
    gpus = {"num_gpus": config.replica_gpus} if config.device == "cuda" else {}
    return {"num_cpus": config.replica_cpus, **gpus}


def _scaling(config: StageConfig) -> dict[str, Any]:
    if config.max_replicas == config.min_replicas:
        return {"num_replicas": config.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.slots,
            "upscale_delay_s": config.upscale_delay,
            "downscale_delay_s": config.downscale_delay,
            "metrics_interval_s": 1,
            "look_back_period_s": max(2, min(config.upscale_delay, 10)),
        }
    }


class EnrollmentStage:
    """The desk."""

    def __init__(self, config: StageConfig, tuners: Any) -> None:
        from ray.exceptions import RayError

        from model.checkpoint import CONFIG_FILE, read_card
        from pipeline.enrollment_desk import Desk

        self.config = config
        self.card = read_card(storage.read_bytes(storage.join(config.model, CONFIG_FILE)))
        self._tuners = tuners.options(stream=True)
        self._desk = Desk(self._on_a_replica, config.queue, config.timeout, config.attempts, (RayError,))

    async def enroll(self, request: dict[str, Any]) -> dict[str, Any]:
        """A voice: `voice`, the bytes of its file, and `row`, what the report says of it; or `error`."""
        try:
            checked = await self._checked(request)
        except Unusable as error:
            return {"error": {"reason": error.reason, "detail": error.detail}}
        return await self._desk.enroll(checked)

    async def progress(self, id: str) -> dict[str, Any] | None:
        """How far a request is, see `Desk.progress`."""
        return self._desk.progress(id)

    async def cancel(self, id: str) -> bool:
        """Drops a request; whether there was one."""
        return self._desk.cancel(id)

    async def about(self) -> dict[str, Any]:
        """What voices are made with, who started this, and how much there is to do."""
        from pipeline.enrolled import recipe_record

        return {
            "model": self.card.fingerprint,
            "codec": self.card.codec.digest,
            "dtype": self.config.dtype,
            "recipe": recipe_record(self.config.recipe()),
            "slots": self.config.slots,
            "max_replicas": self.config.max_replicas,
            "owner": self.config.owner,
            **self._desk.counts(),
        }

    async def _checked(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises Unusable."""
        from pipeline.speakers import checked_consent

        speaker, samples = request.get("speaker"), request.get("samples")
        if not isinstance(speaker, str) or not speaker:
            raise Unusable("no-speaker", "the request names no speaker")
        consent = checked_consent(request.get("consent"), speaker)
        if not isinstance(samples, list | tuple) or not samples:
            raise Unusable("no-samples", f"speaker {speaker!r} has no samples")
        if any("phones" not in sample for sample in samples):
            samples = await asyncio.to_thread(_with_phones, samples)
        return {**request, "samples": samples, "consent": consent}

    async def _on_a_replica(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        events = self._tuners.tune.remote(request)
        try:
            async for event in events:
                yield event
        finally:
            events.cancel()


class VoiceTuner:
    """A model with a continuous batch of speakers."""

    def __init__(self, config: StageConfig) -> None:
        from infra.allocator import keep_memory
        from model.checkpoint import unpack
        from pipeline.phonemes import SPACE
        from pipeline.synthesis import read_model
        from pipeline.tuning_batch import TuningBatch

        keep_memory()
        files = read_model(config.model)
        model, self.card = unpack(files.config, files.weights, config.device, config.dtype)
        self.recipe = config.recipe()
        self._ids = {phone: number for number, phone in enumerate(self.card.inventory)}
        self._batch = TuningBatch(
            model,
            self.recipe,
            config.slots,
            _memory_bytes(config),
            waiting=2 * config.slots + _SPARE,
            apart=config.batching == "apart",
            threads=config.threads,
            space=self._ids.get(SPACE),
            on_fault=_end_process,
        )

    async def tune(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Events of a request: how far it is, and at the end its voice, or why there is none."""
        from pipeline.speaker_samples import to_samples
        from pipeline.tuning_batch import Progress, Request

        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()
        id = request["id"]
        try:
            samples = to_samples(request["samples"], self._ids)
            asked = Request(request["speaker"], samples, request.get("seed"))
            self._batch.submit(id, asked, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        except Unusable as error:
            yield {"error": {"reason": error.reason, "detail": error.detail}}
            return
        try:
            while isinstance(event := await events.get(), Progress):
                yield vars(event)
        finally:
            self._batch.cancel(id)
        if isinstance(event, Unusable):
            yield {"error": {"reason": event.reason, "detail": event.detail}}
            return
        if isinstance(event, Exception):
            raise event
        seconds = sum(sample.codes.shape[1] for sample in samples) / self.card.codec.frame_rate
        yield self._made(request, event, seconds)

    def _made(self, request: dict[str, Any], tuned: Any, seconds: float) -> dict[str, Any]:
        from pipeline.enrolled import report_row, voice_bytes

        try:
            content = voice_bytes(
                tuned, self.recipe, self.card.fingerprint, request["consent"], request.get("source"), seconds
            )
        except Unusable as error:
            return {"error": {"reason": error.reason, "detail": error.detail}}
        return {"voice": content, "row": report_row(tuned, seconds, len(content))}


def _end_process(fault: BaseException) -> None:
    """Serve replaces a replica that is gone at once; one that only fails draws requests until it is found unhealthy."""
    try:
        logging.getLogger("ray.serve").critical("the tuning thread failed: its process ends", exc_info=fault)
        logging.shutdown()  # writes what handlers hold back
    finally:
        os._exit(1)


def _with_phones(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raises Unusable."""
    from pipeline.phonemes import phonemise, to_text

    def phones(sample: dict[str, Any]) -> str:
        if isinstance(sample.get("text"), str):
            return to_text(phonemise(sample["text"]))
        raise Unusable("no-text", "a sample has neither phones nor text")

    return [s if "phones" in s else {**s, "phones": phones(s)} for s in samples]


def _memory_bytes(config: StageConfig) -> int:
    import torch

    if config.memory_gigabytes is not None:
        return int(config.memory_gigabytes * (1 << 30))
    return torch.cuda.mem_get_info()[0] // 2 if config.device == "cuda" else 2 << 30
