"""One line a step: to people, to `losses.jsonl`, to MLflow."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import storage
from infra.hardware import memory_bytes
from model.flops import training_flops
from pipeline.pretrain_config import PretrainConfig

if TYPE_CHECKING:
    import torch

    from infra.tracking import Run
    from pipeline.token_index import TokenIndex
    from pipeline.training_engine import StepResult

LOSSES = "losses.jsonl"


class StepLog:
    """
    Args:
        peak: FLOP a second of all workers together.
        run: of MLflow.
        folder: the run's; on remote storage no `losses.jsonl` is kept, since it grows by a line at a time.
        skipped: steps of this run that were skipped before it was resumed.
    """

    def __init__(
        self, config: PretrainConfig, peak: float, device: torch.device, run: Run, folder: str, skipped: int
    ) -> None:
        self.config, self.peak, self.device, self.run = config, peak, device, run
        self.sizes = config.sizes()
        self.since = time.monotonic()
        self.latest: dict[str, Any] = {}
        self.skipped = skipped
        self.file = None
        if storage.is_local(folder):
            os.makedirs(folder, exist_ok=True)
            self.file = open(os.path.join(folder, LOSSES), "a", encoding="utf-8")  # noqa: SIM115 - as long as the run

    def line(self, step: int, result: StepResult, index: TokenIndex, rows: np.ndarray, waited: float) -> dict[str, Any]:
        """
        Args:
            step: counted from 1.
            rows: of the global batch.
            waited: seconds that the first worker waited for its data.
        """
        now = time.monotonic()
        seconds, self.since = max(now - self.since, 1e-9), now
        steps = index.columns["frames"][rows].astype(np.float64) + self.config.codebooks
        phones = index.columns["phones"][rows] + 2.0
        flops = training_flops(self.sizes, steps.sum(), phones.sum(), (steps * phones).sum(), (steps**2).sum())
        self.skipped += result.skipped
        self.latest = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": self.config.learning_rate_at(step - 1),
            "tokens_per_second": result.tokens / seconds,
            "mfu": flops / seconds / self.peak,
            "memory_gb": memory_bytes(self.device) / 1e9,
            "data_wait": waited / seconds,
            **{f"loss.codebook.{level}": loss for level, loss in enumerate(result.codebook_losses, 1)},
            "skipped_steps": self.skipped,
            "bad_samples": result.bad,
        }
        self._print(step, result, len(rows))
        if self.file:
            noted = {"step": step, **{k: v for k, v in self.latest.items() if math.isfinite(v)}}
            self.file.write(json.dumps(noted) + "\n")
            self.file.flush()
        self.run.log_metrics({k: v for k, v in self.latest.items() if math.isfinite(v)}, step)
        return self.latest

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log_metrics(metrics, step)
        self.latest |= metrics
        tell(f"step {step:6d} " + " ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def go_on(self) -> None:
        """Begins the next step's time: what a checkpoint or a validation took is not the step's."""
        self.since = time.monotonic()

    def _print(self, step: int, result: StepResult, rows: int) -> None:
        row = self.latest
        by_codebook = " ".join(f"{loss:.3f}" for loss in result.codebook_losses)
        tell(
            f"step {step:6d} loss {row['loss']:.4f} [{by_codebook}] grad_norm {row['grad_norm']:.3f} "
            f"lr {row['learning_rate']:.2e} {row['tokens_per_second']:,.0f} tokens/s mfu {row['mfu']:.1%} "
            f"mem {row['memory_gb']:.2f} GB wait {row['data_wait']:.1%} rows {rows}"
            + (" SKIPPED: gradient not finite or far too large" if result.skipped else "")
            + (f" bad samples {row['bad_samples']}" if row["bad_samples"] else "")
        )


def tell(line: str) -> None:
    """A line to the worker's output; Ray Train's `print` would show it twice."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
