"""What a training run is told: data, sizes, recipe, machines. The recipe's defaults are the paper's (section 4.1)."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import storage, tracking
from infra.config import option
from model.lina_config import PRESETS, LinaConfig, ModelError
from pipeline.schedule import WINDOW

DEEPSPEED = Path(__file__).parents[1] / "infra" / "deepspeed"


@dataclass(frozen=True)
class PretrainConfig:
    """From token shards to a model."""

    data: str = option("data/demo/tokens", "dataset that jobs/tokenize.py made")
    output: str = option("out/pretrain", "folder that all nodes share, or an fsspec URL: checkpoints, export")
    name: str = option("", "name of the run and of the model in MLflow's registry; empty: the last part of output")
    model: str = option("tiny", f"{', '.join(PRESETS)}, or a JSON file of sizes (fields of LinaConfig)")
    start_from: str = option("", "folder of an exported model whose weights training starts from; empty: random ones")
    codebooks: int = option(4, "codebooks that are modelled, the first ones of the dataset's")
    mixer: str = option("gla", "gla, or softmax attention of the same size", choices=("gla", "attention"))
    dropout: float = option(0.0, "of what each causal block adds")
    text_dropout: float = option(0.1, "of the text encoder")
    steps: int = option(500_000, "optimiser steps of the whole run, which the learning rate's fall is fitted to")
    budget: int = option(100_000, "model steps of audio (frames and delay, padding included) in a global batch")
    accumulate: int = option(1, "micro-batches that each worker adds up for a step")
    learning_rate: float = option(2e-4, "AdamW's, after the warm-up; falls as a cosine")
    final_rate: float = option(0.0, "share of the learning rate at the last step")
    warmup: int = option(1000, "steps to the full learning rate")
    weight_decay: float = option(0.1, "of matrices; biases and norms have none")
    beta1: float = option(0.9, "AdamW's")
    beta2: float = option(0.95, "AdamW's")
    clip: float = option(1.0, "largest norm of the gradient")
    explode: float = option(20.0, "skip a step whose gradient norm is this many times the usual one")
    max_skipped: int = option(20, "skipped steps in a row after which the run stops")
    max_bad_samples: int = option(100, "unreadable samples of a worker after which the run stops, lost shards aside")
    max_bad_shards: int = option(10, "shards that lost more than 10 samples of a worker after which the run stops")
    min_seconds: float = option(0.3, "shorter utterances are left out")
    max_seconds: float = option(60.0, "longer utterances are left out")
    valid_fraction: float = option(0.01, "share of the utterances, by a hash of their keys, to validate on")
    seed: int = option(0, "of weights, batches and dropout")
    precision: str = option("auto", "auto: bf16 on GPUs, fp32 on CPUs", choices=("auto", "fp32", "bf16"))
    zero: str = option("1", "stage of ZeRO (infra/deepspeed/zero*.json), or a DeepSpeed JSON file of your own")
    activation_checkpointing: bool = option(False, "compute blocks again in backward instead of keeping them")
    workers: int = option(1, "Ray Train workers: one a GPU, or processes on CPUs")
    device: str = option("auto", "where the workers compute", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPUs of each worker; 0: all of the cluster, evenly; on GPUs 4")
    cache: str = option("", "local folder for shards of a remote dataset; empty: a folder in the user's cache")
    cache_gib: int = option(50, "GiB that the shards in it may have; two windows of shards should fit")
    window: int = option(WINDOW, "shards whose samples are mixed at a time: more mix better, fewer need less cache")
    prefetch: int = option(4, "steps that are read ahead")
    save_every: int = option(1000, "steps between checkpoints")
    keep: int = option(3, "checkpoints that are kept")
    evaluate_every: int = option(1000, "steps between validations")
    valid_batches: int = option(8, "batches of a validation, at most")
    speak: int = option(3, "validation sentences to say at each validation, where the codec's weights are at hand")
    max_failures: int = option(3, "times that lost workers are started again; -1: always")
    experiment: str = option("pretrain", "MLflow experiment")
    tracking: str = option("", tracking.OPTION)

    def __post_init__(self) -> None:
        try:
            self.sizes()
        except ModelError as error:
            raise ValueError(str(error)) from None
        counts = ("steps", "budget", "accumulate", "workers", "save_every", "keep", "evaluate_every", "prefetch")
        for field in (*counts, "max_skipped", "valid_batches", "window", "cache_gib"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("speak", "max_bad_samples", "max_bad_shards"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, not {getattr(self, field)}")
        for field in ("learning_rate", "clip", "explode"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be above 0, not {getattr(self, field)}")
        for field in ("final_rate", "valid_fraction"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 0 and below 1, not {getattr(self, field)}")
        if not 0 < self.min_seconds < self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds} must be below max_seconds {self.max_seconds}")
        self.deepspeed()

    def sizes(self) -> LinaConfig:
        """Of the model; a preset's are those of the paper but for what is set here. Raises ModelError."""
        if self.model in PRESETS:
            base = PRESETS[self.model].to_dict()
        else:
            try:
                base = json.loads(storage.read_text(self.model))
            except storage.UNREADABLE as error:
                raise ModelError(
                    f"model {self.model} is neither a preset ({', '.join(PRESETS)}) nor a readable JSON file: {error}"
                ) from None
        ours = ("codebooks", "mixer", "dropout", "text_dropout")
        return LinaConfig.from_dict(base | {name: getattr(self, name) for name in ours})

    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's own options for this stage of ZeRO. Raises ValueError."""
        file = DEEPSPEED / f"zero{self.zero}.json" if self.zero.isdigit() else Path(self.zero)
        try:
            options = json.loads(file.read_text(encoding="utf-8"))
            stage = options["zero_optimization"]["stage"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"zero {self.zero!r} is neither 0, 1, 2, 3 nor a DeepSpeed JSON file with zero_optimization: {error}"
            ) from None
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"zero: {file} asks for stage {stage!r}; there are 0 to 3")
        return options

    @property
    def cache_folder(self) -> str:
        """Where a remote dataset's shards and its index are kept on this machine."""
        return self.cache or str(storage.cache_folder() / "tokens")

    @property
    def cache_bytes(self) -> int:
        return self.cache_gib << 30

    @property
    def zero_stage(self) -> int:
        return self.deepspeed()["zero_optimization"]["stage"]

    def learning_rate_at(self, step: int) -> float:
        """A line up over the warm-up, then a cosine down to `final_rate` of it; a function of the step alone."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * done)) / 2)

    def identity(self) -> dict[str, Any]:
        """What the numbers of a run depend on, machines aside: a checkpoint is only continued with the same."""
        free = (
            *("output", "name", "workers", "device", "threads", "cache", "prefetch", "save_every", "keep", "zero"),
            *("evaluate_every", "valid_batches", "speak", "max_failures", "experiment", "tracking", "max_skipped"),
            *("cache_gib", "max_bad_samples", "activation_checkpointing", "accumulate", "data", "model"),
            *("start_from", "max_bad_shards"),
        )
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return values | {"sizes": self.sizes().to_dict()}
