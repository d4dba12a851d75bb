"""One of two workers that train under stages of ZeRO; what the first one saw goes to FOLDER/losses.json.

python -m tests.pipeline.two_workers RANK FOLDER SIZES RUNS

Each stage goes on from the checkpoint that one worker left in FOLDER/one-STAGE, then anew from the beginning, whose
checkpoint goes to RUNS/two-STAGE.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pipeline import training_checkpoints as checkpoints
from tests.pipeline.test_training_engine import batch, engine, facts, recipe, rows_of

STAGES = ("0", "2", "3")
"""Stage 1 is that of the whole runs on Ray in test_pretraining.py."""
SAVED, STEPS = 3, 6
SHARES = ((0, 1), (1, 4))
"""Rows of each worker, unequal, so that a mean of the workers' means would be another loss."""


def main() -> None:
    rank, folder, sizes, runs = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    seen = {}
    for zero in STAGES:
        config = recipe(sizes, zero=zero, text_dropout=0.0)
        found = checkpoints.newest(str(folder / f"one-{zero}"))
        if zero != "0":
            found, _ = checkpoints.prepare(str(folder / f"one-{zero}"), 2, int(zero))
        grown = engine(config, load_universal=zero != "0")
        checkpoints.load(grown, found)
        shared = engine(config)
        seen[zero] = {"grown": _losses(grown, rank, SAVED, STEPS), "shared": _losses(shared, rank, 0, SAVED)}
        checkpoints.save(shared, f"{runs}/two-{zero}", SAVED, facts(config), keep=1)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(seen))


def _losses(training, rank: int, first: int, last: int) -> list[float]:
    return [training.step(n, [rows_of(batch(n), *SHARES[rank])]).loss for n in range(first, last)]


if __name__ == "__main__":
    main()
