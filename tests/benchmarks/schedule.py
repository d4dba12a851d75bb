"""The schedule at Libriheavy's size, and the loader at the demo's: seconds, memory, padding, waiting.

    python tests/benchmarks/schedule.py --rows 12400000 --shards 30000 --files 3000
    python tests/benchmarks/schedule.py --manifest data/demo/manifest.jsonl          # padding on its durations

Index and start are measured on lengths like Libriheavy's, first as arrays alone, then as Parquet files on local disk.
The yardsticks: reading those files whole, and a step's computation at the size of `tiny`.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

LIMIT_SECONDS, LIMIT_GIGABYTES = 60, 2
FRAME_RATE, CODEBOOKS = 75, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_400_000)
    parser.add_argument("--shards", type=int, default=30_000)
    parser.add_argument("--files", type=int, default=1_000, help="shards whose index is written and read as Parquet")
    parser.add_argument("--budget", type=int, default=100_000, help="of the large schedule, the paper's batch")
    parser.add_argument("--manifest", type=Path, help="JSONL with durations; measures padding, and nothing else")
    options = parser.parse_args()
    if options.manifest:
        padding_of(options.manifest)
        return
    large(options.rows, options.shards, options.budget)
    with tempfile.TemporaryDirectory() as folder:
        files(folder, options.files, max(1, options.rows // options.shards))
    with tempfile.TemporaryDirectory() as folder:
        waiting(folder)


def large(rows: int, shards: int, budget: int) -> None:
    from pipeline.schedule import Schedule

    index = synthetic(rows, shards)
    print(f"index     {rows:,} rows of {shards:,} shards, {index.frames / FRAME_RATE / 3600:,.0f} h")
    train, seconds = timed(lambda: index.only(max_frames=3000).split(0.005)[0])
    print(f"select    {seconds:8.2f} s   {len(train):,} rows to train on")
    schedule, seconds = timed(lambda: Schedule(train, seed=1, budget=budget))
    total = seconds
    print(f"histogram {seconds:8.2f} s")
    _, seconds = timed(lambda: schedule.batch(0))
    total += seconds
    print(f"step 0    {seconds:8.2f} s   ready after {total:.2f} s, limit {LIMIT_SECONDS} s")
    far = 4 * schedule.steps_per_epoch() + 1000
    _, seconds = timed(lambda: Schedule(train, seed=1, budget=budget).batch(far))
    print(f"resume    {seconds:8.2f} s   at step {far:,}, in the fifth epoch, histogram included")
    some = range(far, far + 2000)
    _, seconds = timed(lambda: [schedule.batch(step) for step in some])
    print(f"batch     {1000 * seconds / len(some):8.3f} ms, of {schedule.steps_per_epoch():,} steps an epoch")
    print(f"padding   {schedule.padding(some):8.2%}, {schedule.padding(some, world=8):.2%} on 8 workers")
    waits = ", ".join(f"{unevenness(schedule, some[:150], world):.2%} on {world}" for world in (8, 16, 32))
    print(f"uneven    {waits} workers: how much longer steps take than with even parts")
    steps = sum(int(schedule.steps_of(schedule.batch(step)).sum()) for step in some) / len(some)
    print(f"filled    {steps / budget:8.2%}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"memory    {peak:8.2f} GB at most, limit {LIMIT_GIGABYTES} GB")


def unevenness(schedule, steps: range, world: int) -> float:
    """How much longer steps take than if all workers computed equally much, padding included."""
    most = each = 0.0
    for step in steps:
        parts = [schedule.part(step, rank, world) for rank in range(world)]
        work = [len(rows) * int(schedule.steps_of(rows).max()) if len(rows) else 0 for rows in parts]
        most, each = most + max(work), each + sum(work) / world
    return most / each - 1


def synthetic(rows: int, shards: int):
    """An index of lengths like Libriheavy's: 2 to 30 s, about 15 s in the middle."""
    from pipeline.token_index import COLUMNS, ShardFile, TokenIndex

    random = np.random.default_rng(0)
    columns = {name: np.zeros(rows, kind) for name, kind in COLUMNS.items()}
    for start in range(0, rows, 1_000_000):
        part = slice(start, min(rows, start + 1_000_000))
        count = part.stop - part.start
        columns["frames"][part] = lengths(random, count)
        columns["speaker"][part] = random.integers(0, 6700, count)
        columns["key_sum"][part] = random.integers(0, 2**32, count, dtype=np.uint32)
    sizes = np.diff(np.arange(shards + 1) * rows // shards)
    return TokenIndex(
        digest="0" * 64,
        codec={},
        codebooks=8,
        shards=tuple(ShardFile(f"shards/{n:06d}.tar", 1, "0" * 64, size) for n, size in enumerate(sizes.tolist())),
        speakers=tuple(map(str, range(6700))),
        columns=columns,
        rows=np.arange(rows, dtype=np.int32),
    )


def lengths(random: np.random.Generator, count: int) -> np.ndarray:
    seconds = random.normal(15, 6, count)
    return (np.where((seconds < 2) | (seconds > 30), random.uniform(2, 30, count), seconds) * FRAME_RATE).astype(int)


def files(folder: str, count: int, rows: int) -> None:
    """Opening an index of `count` Parquet files, cold and from its cache, beside only reading their bytes."""
    from pipeline import shards
    from pipeline.token_index import TokenIndex

    random = np.random.default_rng(1)
    Path(folder, "shards").mkdir()
    for shard in range(count):
        frames = lengths(random, rows).tolist()
        keys = [f"medium/{shard}/some_book_librivox_64kb_mp3/chapter_{shard:02d}_{n}" for n in range(rows)]
        samples = [
            shards.Sample(
                key, np.broadcast_to(np.uint16(0), (8, n)), "AH0 " * (n // 6), {"speaker": key[:9], "seconds": n}
            )
            for key, n in zip(keys, frames, strict=True)
        ]
        spans = [(1536 * n, 1536) for n in range(rows)]
        Path(shards.index_url(folder, shard)).write_bytes(shards._index_bytes(samples, spans))
    listed = [{"url": f"shards/{n:06d}.tar", "nsamples": rows, "filesize": 1, "sha256": "0" * 64} for n in range(count)]
    summary = {"digest": "0" * 64, "codec": {}, "codebooks": 8, "shardlist": listed}
    Path(folder, "dataset.json").write_text(json.dumps(summary))
    _, plain = timed(lambda: [path.read_bytes() for path in Path(folder, "shards").iterdir()])
    _, cold = timed(lambda: TokenIndex.open(folder, cache=f"{folder}/cache"))
    _, warm = timed(lambda: TokenIndex.open(folder, cache=f"{folder}/cache"))
    print(f"files     {cold:8.2f} s   for {count:,} files, {1000 * cold / count:.2f} ms each ({plain:.2f} s to read)")
    print(f"          {30_000 * cold / count:8.1f} s   for 30,000 at this rate, once; {warm:.3f} s from the cache")


def waiting(folder: str) -> None:
    """The loader beside the computation of `tiny`, at the default budget."""
    import torch

    from model.lina import Lina
    from model.lina_config import PRESETS
    from pipeline.loader import Loader
    from pipeline.schedule import Schedule
    from pipeline.token_index import TokenIndex

    write_speech(folder)
    schedule = Schedule(TokenIndex.open(folder), seed=1)
    model = Lina(PRESETS["tiny"])
    with Loader(schedule, stop_step=13) as loader:
        steps = iter(loader)
        next(steps)  # nothing can be there before the first
        loader.waited, start = 0.0, time.perf_counter()
        for step in steps:
            model(step.micro_batches[0].batch).loss.backward()
        seconds = time.perf_counter() - start
    _, alone = timed(lambda: [loader.load(step) for step in range(13, 25)])
    print(
        f"wait      {loader.waited / seconds:8.3%} of a {seconds / 12:.2f} s step on {torch.get_num_threads()} threads"
    )
    print(f"load      {1000 * alone / 12:8.1f} ms for a step's {schedule.budget} model steps, when nothing hides it")


def write_speech(folder: str) -> None:
    """A dataset of 640 samples of random codes, with lengths of read sentences."""
    from pipeline import shards

    random = np.random.default_rng(2)
    listed = []
    for shard in range(10):
        samples = []
        for n in range(64):
            frames = int(np.clip(random.lognormal(1.1, 0.33), 0.9, 9) * FRAME_RATE)
            codes = random.integers(0, 1024, (8, frames)).astype(np.uint16)
            meta = {"speaker": f"s{n}", "seconds": frames / FRAME_RATE, "id": f"{shard}-{n}"}
            samples.append(shards.Sample(f"{shard}-{n:02d}", codes, " ".join(["AH0"] * (frames // 7)), meta))
        sidecar = shards.write_shard(folder, shard, samples, [], {})
        entry = {"url": f"shards/{shard:06d}.tar", "nsamples": 64, "filesize": sidecar["bytes"]}
        listed.append(entry | {"sha256": sidecar["sha256"]})
    codec = {"codebook_size": 1024}
    summary = {"digest": "1" * 64, "codec": codec, "codebooks": 8, "shardlist": listed}
    Path(folder, "dataset.json").write_text(json.dumps(summary))


def padding_of(manifest: Path) -> None:
    """Padding over an epoch of a corpus's durations, by budget and micro-batches."""
    from dataclasses import replace

    from pipeline.schedule import BUDGET, Schedule

    with manifest.open() as file:
        seconds = np.array([json.loads(line)["duration"] for line in file])
    index = synthetic(len(seconds), -(-len(seconds) // 64))
    index = replace(index, columns=index.columns | {"frames": np.ceil(seconds * FRAME_RATE).astype(np.int32)})
    print(f"{len(seconds):,} utterances, {seconds.sum() / 3600:.2f} h")
    for budget in (BUDGET // 2, BUDGET, 2 * BUDGET, 4 * BUDGET):
        for parts in (1, 4):
            schedule = Schedule(index, budget=budget, accumulate=parts)
            steps = schedule.steps_per_epoch()
            share = np.mean([schedule.padding(range(e * steps, (e + 1) * steps)) for e in range(4)])
            print(f"budget {budget:6}   {parts} micro-batches   {steps:5} steps an epoch   padding {share:.2%}")


def timed(work):
    """(result, wall seconds)"""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


if __name__ == "__main__":
    main()
