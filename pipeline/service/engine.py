"""The engine: a deployment of Ray Serve whose replicas each hold the model, the codec and one batch for everybody."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from pipeline.service.config import ServiceConfig

logger = logging.getLogger("ray.serve")


class Stopped(RuntimeError):
    """The engine has ended, or failed: nothing more can be said."""


class SpeechRequest(NamedTuple):
    """What an ingress asks of an engine."""

    text: str
    voice: str | None
    """URL of the voice's file; None is the model's own voice."""
    voice_name: str
    seed: int
    stream: bool


class Refused(NamedTuple):
    """A request that was not carried out, or not to its end."""

    status: int
    code: str
    message: str
    param: str | None = None


class Begun(NamedTuple):
    """A request that was taken up."""

    rate: int
    """Samples a second."""
    model: str
    """Fingerprint."""
    consent: str
    voice_digest: str


class SpeechEngine:
    """One replica."""

    def __init__(self, config: ServiceConfig) -> None:
        import torch

        from infra import devices
        from infra.allocator import keep_memory
        from model.sampling import Policy
        from pipeline.service.speaker import Speaker
        from pipeline.synthesis import Synthesizer, read_model

        keep_memory()
        torch.set_num_threads(config.threads)
        device, files = devices.of_process(config.device), read_model(config.model)
        policy = Policy(config.temperature, config.top_k)
        self.config = config
        self.synthesizer = Synthesizer(
            files, codec_for(config, files), device, config.dtype, policy, rows=config.rows, retries=config.retries
        )
        self.speaker = Speaker(self.synthesizer, config.most_requests, config.pieces_ahead, config.first_seconds)
        self._preparing = ThreadPoolExecutor(1)
        """Phonemes and voices: apart from the event loop, one after another."""
        # What is loaded with the first text is loaded before it comes.
        self._prepared(SpeechRequest("Good morning.", None, "", 0, True))

    async def speak(self, request: SpeechRequest) -> AsyncIterator[Any]:
        """A `Begun`, then speech (float32 [time] each), then a dict, the report; or a `Refused` at any place."""
        from model.lina_config import ModelError
        from pipeline.service.speaker import Full, Said
        from pipeline.utterances import Unusable

        if len(self.speaker) >= self.config.most_requests:  # before any work
            yield self._full()
            return
        loop, heard = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(item: Any) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, item)

        try:
            takes, begun = await loop.run_in_executor(self._preparing, self._prepared, request)
            spoken = self.speaker.submit(takes, request.stream, deliver)
        except Unusable as error:
            yield Refused(400, error.reason.replace("-", "_"), error.detail, "input")
            return
        except ModelError as error:
            where = request.voice or ""  # is nobody's business
            text = str(error).replace(where, request.voice_name) if where else str(error)
            yield Refused(409, "unusable_voice", text, "voice")
            return
        except OSError as error:
            logger.warning("voice %s cannot be read: %s", request.voice, error)
            yield Refused(503, "storage_unavailable", "the storage of the voices does not answer: try again", "voice")
            return
        except Full:
            yield self._full()
            return
        try:
            yield begun
            async with asyncio.timeout(self.config.timeout_s):
                while True:
                    item = await heard.get()
                    if isinstance(item, Exception):
                        raise item
                    if isinstance(item, Said):
                        yield report(item)
                        return
                    yield item
        except TimeoutError:
            yield Refused(
                504, "timeout", f"the speech did not end within {self.config.timeout_s:g} s; shorten the text"
            )
        finally:
            self.speaker.leave(spoken)

    async def facts(self) -> dict[str, Any]:
        card = self.synthesizer.card
        return {
            "model": card.fingerprint,
            "codec": card.codec.name,
            "rate": card.codec.sample_rate,
            "requests": len(self.speaker),
            "process": os.getpid(),
        }

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if self.speaker.failure is not None:
            raise RuntimeError("the engine's thread has ended") from self.speaker.failure

    def _prepared(self, request: SpeechRequest) -> tuple[list, Begun]:
        from infra import storage
        from pipeline.speaking_voices import stored_voice
        from pipeline.speech_lines import Line

        card, voice = self.synthesizer.card, None
        if request.voice is not None:
            voice = storage.patiently(partial(stored_voice, request.voice, card, request.voice_name))
        takes = self.synthesizer.takes("", Line(request.text, voice, request.seed))
        consent, digest = (voice.consent, voice.digest) if voice else ("", "")
        return takes, Begun(card.codec.sample_rate, card.fingerprint, consent, digest)

    def _full(self) -> Refused:
        return Refused(429, "engine_overloaded", "as much is being said as can be: try again after a few seconds")


def report(said: Any) -> dict[str, Any]:
    """How a request went, as plain JSON."""
    pieces = said.pieces
    return {
        "pieces": len(pieces),
        "attempts": sum(piece.attempts for piece in pieces),
        "faults": sorted({fault for piece in pieces for fault in piece.findings.faults}),
        "coverage": round(min(piece.findings.coverage for piece in pieces), 4),
    }


def codec_for(config: ServiceConfig, files: Any) -> Any:
    """The codec that is asked for, or the model's own. Raises CodecError, ModelError."""
    from pipeline.bulk_synthesis import codec_of
    from pipeline.synthesize_config import SynthesizeConfig

    wanted = SynthesizeConfig(text="", model=config.model, codec=config.codec, codec_weights=config.codec_weights)
    return codec_of(wanted, files)
