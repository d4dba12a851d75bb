"""Recordings that came over HTTP become what a voice is tuned on: a deployment of Ray Serve that owns a codec.

What a request brings are bytes; they are read from files with names of our own, in a folder that lives as long.
"""

from __future__ import annotations

import asyncio
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.service.config import ServiceConfig
from pipeline.utterances import Reject, Utterance


class Recording(NamedTuple):
    """One sample of a voice."""

    content: bytes
    """Of an audio file."""
    text: str


class Read(NamedTuple):
    """What became of recordings."""

    samples: list[dict[str, Any]]
    """As the enrollment stage takes them."""
    seconds: float
    """Of those."""
    rejects: list[dict[str, Any]]
    """sample (its place, from 0), reason, detail."""


class SampleReader:
    """One replica; the codec is loaded with the first recordings."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self._encoder: Any = None
        self._reading = ThreadPoolExecutor(1)

    async def read(self, recordings: list[Recording]) -> Read:
        """Codes and phonemes of recordings. Raises CodecError, ModelError where the service is set up wrongly."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, self._read, recordings)

    def _read(self, recordings: list[Recording]) -> Read:
        if self._encoder is None:
            self._encoder = _encoder(self.config)
        with tempfile.TemporaryDirectory(prefix="lina-samples-") as folder:
            samples = []
            for place, recording in enumerate(recordings):
                file = Path(folder, f"{place:04d}")
                file.write_bytes(recording.content)
                samples.append(Utterance(str(place), str(file), recording.text, where=f"sample {place}"))
            encoded, rejects = self._encoder.encode(samples)
            told = [_told(reject, samples) for reject in rejects]
        return Read([sample.to_request() for sample in encoded], sum(sample.seconds for sample in encoded), told)


def _told(reject: Reject, samples: list[Utterance]) -> dict[str, Any]:
    """A reject, without the names of our files."""
    place = int(reject.where.removeprefix("sample "))
    return {"sample": place, "reason": reject.reason, "detail": reject.detail.replace(samples[place].audio, "it")}


def check(content: bytes, config: ServiceConfig) -> float:
    """Seconds of an audio file, from its header.

    Raises:
        ValueError: no audio file, or too short or long.
    """
    import io

    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            seconds = file.frames / file.samplerate
    except (soundfile.SoundFileError, ValueError, ZeroDivisionError):
        raise ValueError("is no audio file that can be read: send WAV, FLAC, MP3 or Ogg") from None
    if not config.shortest_sample_s <= seconds <= config.longest_sample_s:
        least, most = config.shortest_sample_s, config.longest_sample_s
        raise ValueError(f"is {seconds:.2f} s long; recordings have {least:g} to {most:g} s")
    return seconds


def _encoder(config: ServiceConfig) -> Any:
    from pipeline.service.engine import codec_for
    from pipeline.speaker_samples import SampleEncoder
    from pipeline.synthesis import read_model
    from pipeline.tokenize_config import TokenizeConfig

    codec = codec_for(config, read_model(config.model))
    settings = TokenizeConfig(
        codebooks=codec.identity.codebooks,
        device="cpu",
        batch_seconds=40.0,
        segment_seconds=min(15.0, config.longest_sample_s),
        min_seconds=min(config.shortest_sample_s, 0.3),
        max_seconds=config.longest_sample_s + 1,
    )
    return SampleEncoder(settings, codec, codec.identity.to_dict())
