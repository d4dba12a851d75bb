"""What the service can be told."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from infra.config import option
from pipeline.synthesize_config import DEMO_MODEL

LARGEST_UPLOAD = "LINA_RAY_LARGEST_UPLOAD"
"""Names, in the environment of a Ray node, the bytes that Serve's proxy takes of a request (default: 64 MiB)."""
PROXY_CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.service.gate:proxy_middlewares"}
"""For the environment of a Ray node, so that its proxy keeps to that."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHARED = "shared"
"""The folder of voices that every tenant may speak with."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Of voices and tenants: nothing in it means anything to a file system or a shell."""


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """One model behind HTTP, with the voices of its tenants."""

    model: str = option(DEMO_MODEL, "folder of an exported model; any fsspec URL")
    name: str = option("lina", "what requests call the model")
    codec: str | None = option(
        None, "encodec_24khz, demo, demo-6k or a folder (default: the model's, if that has a name)"
    )
    codec_weights: str | None = option(None, "path or URL of EnCodec's own weights, for machines without internet")
    voices: str = option("out/voices", "folder of TENANT/VOICE.safetensors and shared/VOICE.safetensors; any URL")
    tokens: str | None = option(None, "YAML file of tenants and the sha256 of their tokens; without it, loopback only")
    tenant: str = option("local", "whose voices they are where there are no tokens")

    temperature: tuple[float, ...] = option(
        (0.6, 0.0), "by codebook, the last one for all further: 0 is the likeliest; the release draws at 1"
    )
    top_k: tuple[int, ...] = option((100,), "by codebook: how many of the likeliest codes are drawn from; 0 for all")
    retries: int = option(2, "further attempts at a sentence that failed and that nobody heard yet")
    rows: int = option(16, "sentences spoken at once by one engine")
    pieces_ahead: int = option(2, "sentences of one request that are spoken at once, at most")
    waiting: int = option(48, "requests that an engine holds beyond those being spoken; more are answered 429")
    first_seconds: float = option(0.3, "seconds of speech in the first chunk of a stream")
    device: str = option("auto", "where model and codec run", ("auto", "cpu", "cuda"))
    dtype: str = option("float32", "of the model", ("float32", "float64", "bfloat16"))
    threads: int = option(1, "CPU threads, and CPUs, of an engine")
    gpu_share: float = option(0.25, "of a GPU that an engine reserves where it runs on one; the rest is for enrollment")
    engines: int = option(1, "replicas of the engine, each with the model and a batch of its own")

    timeout_s: float = option(120.0, "seconds from a request to the end of its speech")
    longest_text: int = option(4096, "characters of one request")
    requests_per_minute: int = option(120, "of a tenant, a minute at a time, where its entry does not say otherwise")
    upload_mb: float = option(50.0, "of all samples of a voice together")
    most_samples: int = option(64, "recordings in one enrollment")
    shortest_sample_s: float = option(0.5, "of one recording")
    longest_sample_s: float = option(60.0, "of one recording")
    least_seconds: float = option(3.0, "of all recordings of a voice together")
    most_seconds: float = option(1200.0, "of all recordings of a voice together")
    most_enrolling: int = option(4, "enrollments of one tenant at a time")
    enroll_timeout_s: float = option(1800.0, "seconds from the samples to the voice")

    def __post_init__(self) -> None:
        for field in (
            *("rows", "pieces_ahead", "threads", "engines", "longest_text", "requests_per_minute", "most_samples"),
            "most_enrolling",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in (
            "timeout_s",
            "upload_mb",
            "longest_sample_s",
            "most_seconds",
            "first_seconds",
            "enroll_timeout_s",
        ):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, not {getattr(self, field)}")
        if self.waiting < 0 or self.retries < 0:
            raise ValueError("waiting and retries must be at least 0")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"gpu_share must be above 0 and at most 1, not {self.gpu_share}")
        if not NAME.fullmatch(self.tenant) or self.tenant == SHARED:
            raise ValueError(f"tenant must be letters, digits, _ and -, and not {SHARED!r}: it names a folder")

    @property
    def most_requests(self) -> int:
        """Requests that an engine holds at a time."""
        return self.rows + self.waiting

    @property
    def upload_bytes(self) -> int:
        return round(self.upload_mb * 1e6)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServiceConfig):
    """The service on a machine of its own."""

    host: str = option("127.0.0.1", "address to listen on; others than loopback need --tokens")
    port: int = option(8000, "port to listen on")
    enrollment: bool = option(True, "make voices of recordings, too")
    enroll_slots: int = option(4, "voices that are made at once")
    enroll_steps: int = option(100, "steps of a voice at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.port < 65536:
            raise ValueError(f"port must be from 1 to 65535, not {self.port}")
        if self.tokens is None and self.host not in LOOPBACK:
            raise ValueError(
                f"host {self.host!r} is beyond this machine, which needs --tokens FILE (who may ask); without it only "
                f"{', '.join(LOOPBACK)} can be"
            )

    def service(self) -> ServiceConfig:
        """The part that the application is told."""
        return ServiceConfig(**{field.name: getattr(self, field.name) for field in fields(ServiceConfig)})
