"""What a synthesize job can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from infra import tracking
from infra.config import option

DEMO_MODEL = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "model", "weights", "lina-demo")
FORMATS = ("wav", "flac", "opus")


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """From text to speech: one text, or a script of many lines."""

    text: str | None = option(None, "what to say")
    voice: str | None = option(None, "voice file that says --text; any fsspec URL")
    out: str = option("speech.wav", "file that --text becomes: .wav, .flac or .opus; any fsspec URL")

    script: str | None = option(None, "JSONL with a line each: id, text and, if any, voice; any fsspec URL")
    voices: str | None = option(None, "folder of voice files: a line's voice `ann` is ann.safetensors there")
    output: str = option("out/speech", "folder that --script fills; any fsspec URL")
    format: str = option("wav", "of the files that --script becomes", FORMATS)

    model: str = option(DEMO_MODEL, "folder of an exported model; any fsspec URL")
    codec: str | None = option(
        None, "encodec_24khz, demo, demo-6k or a folder (default: the model's, if that has a name)"
    )
    codec_weights: str | None = option(None, "path or URL of EnCodec's own weights, for machines without internet")
    seed: int = option(0, "randomness; the same seed says the same")
    temperature: tuple[float, ...] = option(
        (0.6, 0.0), "by codebook, the last one for all further: 0 is the likeliest; the release draws at 1"
    )
    top_k: tuple[int, ...] = option((100,), "by codebook: how many of the likeliest codes are drawn from; 0 for all")
    retries: int = option(2, "further attempts at a sentence that failed")
    rows: int = option(16, "sentences spoken at once by one worker")
    device: str = option("auto", "where model and codec run", ("auto", "cpu", "cuda"))
    dtype: str = option("float32", "of the model", ("float32", "float64", "bfloat16"))

    actors: int | None = option(None, "workers at most (default: what the cluster's GPUs or CPUs allow)")
    threads: int = option(1, "CPU threads, and CPUs, of a worker")
    chunk: int = option(128, "lines that a worker takes at a time; what is lost with it")
    max_reject_fraction: float = option(0.05, "exit code 3 if a larger share was rejected or failed every attempt")
    tracking: str = option("", tracking.OPTION)
    experiment: str = option("synthesize", "MLflow experiment")

    def __post_init__(self) -> None:
        if (self.text is None) == (self.script is None):
            raise ValueError("give either --text or --script")
        if self.voice and self.script:
            raise ValueError("voice goes with --text; with --script, lines name their voices in --voices")
        for field in ("rows", "threads", "chunk"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.retries < 0 or not 0 <= self.max_reject_fraction <= 1:
            raise ValueError("retries must be at least 0 and max_reject_fraction from 0 to 1")

    def settings(self) -> dict[str, Any]:
        """What a folder of speech is bound to, beside its model, its codec and its lines."""
        names = ("format", "seed", "temperature", "top_k", "retries", "dtype")
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in names}
