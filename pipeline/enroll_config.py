"""What the enrollment stage and the enroll job can be told.

`StageConfig` is the Serve application's (`args` in infra/configs/serve.yaml); `EnrollConfig` adds what the job does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from infra import tracking
from infra.config import option
from pipeline.synthesize_config import DEMO_MODEL

if TYPE_CHECKING:
    from model.initial_state import Recipe

_RECIPE = ("rank", "lr", "batch", "steps", "schedule", "warmup", "weight_decay", "clip", "scale", "position")
_RECIPE += ("held_out", "held_out_most", "eval_every", "patience", "seed")
_TOKENS = ("min_seconds", "max_seconds", "max_clipped_fraction", "min_loudness_db", "transcribe")
TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
SHARED = "shared"
"""The tenant whose voices everybody may use."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The Serve application that tunes voices."""

    model: str = option(DEMO_MODEL, "folder of an exported model; any fsspec URL that every node reads")
    device: str = option("auto", "where the model runs", ("auto", "cpu", "cuda"))
    dtype: str = option("float32", "of the model", ("float32", "float64", "bfloat16"))

    rank: int = option(1, "of a voice's factors in each layer and head; 0 for whole matrices")
    lr: float = option(0.125, "learning rate")
    batch: int = option(8, "samples of a speaker a step")
    steps: int = option(100, "steps of a speaker at most")
    schedule: str = option("constant", "of the learning rate over the steps", ("constant", "cosine"))
    warmup: int = option(0, "steps over which the learning rate rises")
    weight_decay: float = option(0.01, "of AdamW")
    clip: float = option(0.0, "largest norm of a speaker's gradient; 0 does not clip")
    scale: float = option(0.02, "of the initial memories")
    position: bool = option(False, "tune the memory of the position network, too")
    held_out: float = option(0.1, "share of a speaker's samples that is never tuned on, which decides when to stop")
    held_out_most: int = option(16, "samples held out of a speaker with very many")
    eval_every: int = option(10, "steps between two looks at what is held out")
    patience: int = option(3, "looks without a better loss before a speaker stops; 0 always takes all steps")
    seed: int = option(123, "of everything random")

    slots: int | None = option(None, "speakers that a replica tunes at once at most (default: 64 jointly, 4 apart)")
    memory_gigabytes: float | None = option(
        None,
        "what a replica keeps of speakers' samples; bounds the slots, too (default: 2, on a GPU half of what it has)",
    )
    batching: str = option(
        "auto",
        "joint: speakers share every matrix product, and results depend on their company by rounding; apart: each is "
        "computed by itself, to the same bytes in any company; auto: joint on GPUs, apart on CPUs, which it fills",
        ("auto", "joint", "apart"),
    )
    threads: int = option(1, "CPU threads of a replica; part of what fixes a voice's bytes")
    replica_cpus: float = option(0.5, "CPUs that a replica reserves")
    replica_gpus: float = option(0.75, "GPUs that a replica reserves where it runs on one; leaves some for a codec")
    min_replicas: int = option(1, "replicas that are always there")
    max_replicas: int | None = option(None, "replicas at most (default: what the cluster's GPUs or CPUs allow)")
    upscale_delay: float = option(5.0, "seconds of a long queue before another replica is started")
    downscale_delay: float = option(60.0, "seconds of idleness before a replica is taken away")
    queue: int = option(1000, "speakers that may wait; more are refused with `busy`")
    timeout: float = option(3600.0, "seconds after which a speaker is given up, unless the request says otherwise")
    attempts: int = option(4, "replicas that a speaker may lose, the last ones alone on them, before it is given up")
    owner: str = option("", "which job started the application, and so stops it; empty for a service")

    def __post_init__(self) -> None:
        for name in ("slots", "threads", "min_replicas", "queue", "attempts", "timeout"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        if self.memory_gigabytes is not None and not self.memory_gigabytes > 0:
            raise ValueError(f"memory_gigabytes must be above 0, not {self.memory_gigabytes}")

    def recipe(self) -> Recipe:
        """How voices are tuned. Raises ModelError for values that cannot be."""
        from model.initial_state import Recipe

        return Recipe(**{name: getattr(self, name) for name in _RECIPE})


@dataclass(frozen=True, kw_only=True)
class EnrollConfig(StageConfig):
    """From recordings of many speakers to a voice file each."""

    speakers: str | None = option(
        None, "JSONL with a line each: speaker, samples [{audio, text}], consent; or a folder with a folder a speaker"
    )
    output: str = option("out/voices", "folder of the voices; any fsspec URL")
    tenant: str = option(SHARED, "whose voices they are: the folder in --output that they go to")
    consent_file: str | None = option(
        None, "JSON or JSONL with speakers' consent records, or one record for all: who, when, scope"
    )

    codec: str | None = option(
        None, "encodec_24khz, demo, demo-6k or a folder (default: the model's, if that has a name)"
    )
    codec_weights: str | None = option(None, "path or URL of EnCodec's own weights, for machines without internet")
    transcribe: str | None = option(None, "recogniser for samples without text: a faster-whisper name or a folder")
    min_seconds: float = option(0.3, "shorter samples are rejected")
    max_seconds: float = option(60.0, "longer samples are rejected, without text cut at pauses")
    segment_seconds: float = option(10.0, "length to aim at when long samples are cut")
    max_clipped_fraction: float = option(0.05, "share of a sample at full scale above which it is rejected")
    min_loudness_db: float = option(-60.0, "samples with a lower RMS level, in dB of full scale, are rejected")
    batch_seconds: float = option(40.0, "seconds of padded audio that the codec encodes at once")
    tokenizers: int | None = option(None, "workers that read and encode (default: one, on GPUs one each)")
    codec_cpus: float = option(0.5, "CPUs that such a worker reserves")
    codec_gpus: float = option(0.25, "GPUs that such a worker reserves on --device cuda")
    in_flight: int | None = option(None, "speakers between reading and writing at most (default: fills all replicas)")

    listen: int = option(0, "voices that say a sentence for the report, measured with the eval extra")
    sentence: str = option("The quick brown fox jumps over the lazy dog.", "what they say")
    child_runs: bool = option(False, "an MLflow run for each speaker, too")
    max_reject_fraction: float = option(0.05, "exit code 3 if a larger share of the speakers was rejected")
    tracking: str = option("", tracking.OPTION)
    experiment: str = option("enroll", "MLflow experiment")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.speakers:
            raise ValueError("speakers is missing: give --speakers, a JSONL file or a folder with a folder a speaker")
        if not TENANT.fullmatch(self.tenant):
            raise ValueError(f"tenant must be letters, digits, _ and -, at most 64, not {self.tenant!r}")
        if not 0 < self.min_seconds < self.max_seconds:
            raise ValueError(f"max_seconds ({self.max_seconds}) must be above min_seconds ({self.min_seconds}) above 0")
        if not 0 < self.segment_seconds <= self.max_seconds:
            raise ValueError(f"segment_seconds must be above 0 and at most max_seconds, not {self.segment_seconds}")
        if not 0 <= self.max_reject_fraction <= 1:
            raise ValueError(f"max_reject_fraction must be between 0 and 1, not {self.max_reject_fraction}")
        if self.listen < 0 or (self.in_flight is not None and self.in_flight < 1):
            raise ValueError("listen must be at least 0, and in_flight at least 1")

    def stage(self, **changes: Any) -> StageConfig:
        """The part that the Serve application is told."""
        values = {field.name: getattr(self, field.name) for field in fields(StageConfig)}
        return StageConfig(**values | changes)

    def token_settings(self) -> dict[str, Any]:
        """What the codes of a speaker's samples depend on, beside the samples and the codec."""
        return {name: getattr(self, name) for name in (*_TOKENS, "segment_seconds", "batch_seconds")}
