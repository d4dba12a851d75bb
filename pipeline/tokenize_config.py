"""What a tokenize job can be told. `CHANGEABLE` lists what a dataset is not bound to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from infra import tracking
from infra.config import option
from pipeline.corpus_options import CorpusOptions

if TYPE_CHECKING:
    from pipeline.audio import SignalLimits


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(CorpusOptions):
    """From a corpus to token shards."""

    input: str = option("data/demo/manifest.jsonl", "manifest, folder of recordings or corpus; any fsspec URL")
    output: str = option("data/demo/tokens", "folder of the dataset; any fsspec URL")

    codec: str = option("encodec_24khz", "encodec_24khz, demo, demo-6k, or a folder with config.json and the weights")
    codec_weights: str | None = option(None, "path or URL of EnCodec's own weights, for machines without internet")
    codebooks: int = option(8, "codebooks to store; the codec's own number if it has fewer")
    device: str = option("auto", "where the codec runs", ("auto", "cpu", "cuda"))
    codec_threads: int = option(1, "CPU threads of a codec actor; part of what fixes a shard's bytes")
    batch_seconds: float = option(80.0, "seconds of padded audio that the codec encodes at once")

    shard_megabytes: float = option(100.0, "size of a shard; small corpora get smaller ones, down to 64 samples")

    transcribe: str | None = option(None, "recogniser for utterances without text: a faster-whisper name or a folder")
    keep_untranscribed: bool = option(False, "keep utterances without text, with no phonemes")
    segment_seconds: float = option(15.0, "length to aim at when long recordings are cut")
    max_silence: float = option(0.8, "seconds of silence kept inside a segment of a long recording")

    min_seconds: float = option(0.4, "shorter utterances are rejected")
    max_seconds: float = option(60.0, "longer ones are cut at pauses (without text) or rejected (with text)")
    min_chars_per_second: float = option(1.0, "less text a second means that the text is not the audio's")
    max_chars_per_second: float = option(40.0, "more text a second means that the text is not the audio's")
    max_phones_per_second: float = option(30.0, "more phones a second means that the text is not the audio's")
    max_clipped_fraction: float = option(0.05, "share of samples at full scale above which a recording is rejected")
    min_loudness_db: float = option(-60.0, "recordings with a lower RMS level, in dB of full scale, are rejected")
    max_reject_fraction: float = option(0.05, "the job ends with exit code 3 if a larger share was rejected")

    codec_actors: int | None = option(None, "codec actors at most (default: what the cluster's GPUs or CPUs allow)")
    codec_cpus: float = option(
        0.7, "CPUs that a codec actor reserves; with decode_cpus at most 1, for one CPU to do both"
    )
    codec_gpus: float = option(1.0, "GPUs that a codec actor reserves on --device cuda")
    decode_cpus: float = option(0.25, "CPUs that a task reserves that decodes, resamples and phonemises a batch")
    transcribe_actors: int = option(1, "actors that transcribe")
    wave_batches: int = option(10_000, "codec batches handed to Ray Data at a time; bounds the driver's memory")
    tracking: str = option("", tracking.OPTION)
    experiment: str = option("tokenize", "MLflow experiment")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("codebooks", "codec_threads", "batch_seconds", "shard_megabytes", "segment_seconds", "min_seconds")
        positive += ("codec_cpus", "decode_cpus", "transcribe_actors", "wave_batches", "max_phones_per_second")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not self.max_silence >= 0:
            raise ValueError(f"max_silence must be at least 0, not {self.max_silence}")
        if not self.min_seconds < self.max_seconds:
            raise ValueError(f"max_seconds ({self.max_seconds}) must be above min_seconds ({self.min_seconds})")
        if not self.segment_seconds <= self.max_seconds:
            raise ValueError(
                f"segment_seconds ({self.segment_seconds}) must not exceed max_seconds ({self.max_seconds})"
            )
        if not self.min_chars_per_second < self.max_chars_per_second:
            raise ValueError("max_chars_per_second must be above min_chars_per_second")
        if not 0 <= self.max_reject_fraction <= 1:
            raise ValueError(f"max_reject_fraction must be between 0 and 1, not {self.max_reject_fraction}")
        if self.transcribe and self.keep_untranscribed:
            raise ValueError("keep_untranscribed: choose it or transcribe, not both")


CHANGEABLE = frozenset(
    ["input", "output", "root", "audio_root", "codec", "codec_weights", "codec_actors", "codec_cpus", "codec_gpus"]
    + ["decode_cpus", "transcribe_actors", "wave_batches", "tracking", "experiment", "max_reject_fraction"]
)
"""Fields that may change between two runs over one output: they do not change a shard's bytes, or what they name is
compared itself (the manifest by its content, the codec by its weights)."""


def identity(config: TokenizeConfig) -> dict[str, Any]:
    """The part of a configuration that a dataset is bound to."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in CHANGEABLE}


def signal_limits(config: Mapping[str, Any]) -> SignalLimits:
    """What a usable utterance sounds like, by the fields of a configuration or by those that a plan keeps."""
    from pipeline.audio import SignalLimits

    return SignalLimits(
        min_seconds=config["min_seconds"],
        min_dbfs=config["min_loudness_db"],
        max_clipped=config["max_clipped_fraction"],
    )
