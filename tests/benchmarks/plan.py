"""Planning and resuming at Libriheavy's size: seconds and memory for a manifest of 12.4 million cuts.

    python tests/benchmarks/plan.py --cuts 12400000 --shards 30000

Writes a synthetic manifest of Libriheavy's form (`libriheavy.py`), plans it as `jobs/tokenize.py` does, then lays out
the sidecars of a run that was cut off and measures how long finding the missing shards takes. The yardstick printed
beside the planning rate is reading the manifest alone: inflating it and splitting it into lines.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import gzip
import resource
import tempfile
import time
from pathlib import Path

LIMIT_SECONDS, LIMIT_GIGABYTES = 600, 4


def main() -> None:
    from tests.benchmarks import libriheavy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=30_000)
    parser.add_argument("--manifest", type=Path, help="use this manifest and keep it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = options.manifest or Path(folder, "libriheavy_cuts.jsonl.gz")
        if not manifest.exists():
            libriheavy.write(manifest, options.cuts)
        baseline, baseline_cpu = timed(lambda: read_only(manifest))[1:]
        (rows, shards, hours), seconds, cpu = timed(lambda: plan(manifest, f"{folder}/tokens"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"manifest  {rows:,} cuts, {hours:,.0f} h, {manifest.stat().st_size / 1e9:.2f} GB compressed")
        print(f"read only {baseline:7.1f} s   {baseline_cpu:.1f} CPU-s: Python's gzip, and lines")
        print(f"plan      {seconds:7.1f} s   {cpu:.1f} CPU-s, {rows / seconds:,.0f} cuts/s, {shards:,} shards")
        print(
            f"ratio     {cpu / baseline_cpu:7.2f}     CPU of plan over read only; limit {LIMIT_SECONDS} s of wall time"
        )
        print(f"memory    {peak:7.2f} GB  at most, limit {LIMIT_GIGABYTES} GB")
        found, seconds = resume(f"{folder}/interrupted", options.shards)
        print(f"resume    {seconds:7.2f} s   {found:,} of {options.shards:,} shards found missing")


def timed(work):
    """(result, wall seconds, CPU seconds of this process)"""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def read_only(manifest: Path) -> None:
    with gzip.open(manifest, "rb") as file:
        for _ in file:
            pass


def plan(manifest: Path, output: str) -> tuple[int, int, float]:
    """(cuts, shards, hours)"""
    from pipeline.lengths import with_lengths
    from pipeline.manifests import open_manifest
    from pipeline.planning import Sizes, make_round
    from pipeline.tokenize_config import TokenizeConfig

    config = TokenizeConfig(input=str(manifest), output=output)
    items = with_lengths(iter(open_manifest(str(manifest), audio_root="/corpora/librilight")), config, lambda urls: ())
    sizes = Sizes(75 * 8 * 2, "/corpora/librilight")
    round_, rejects = make_round(items, config, sizes, "plan.parquet", output=output)
    rows = round_.utterances + sum(rejects.values())
    return rows, len(round_.batches), round_.seconds / 3600


def resume(output: str, shards: int) -> tuple[int, float]:
    """(missing shards found, seconds) in a dataset of which every hundredth shard is missing."""
    from pipeline.plan import Plan, Round
    from pipeline.tokenization import missing_shards

    folder = Path(output, "shards")
    folder.mkdir(parents=True)
    for shard in range(shards):
        for ending in (".tar", ".index.parquet") + ((".json",) if shard % 100 else ()):
            (folder / f"{shard:06d}{ending}").touch()
    round_ = Round("plan.parquet", "0", 0, (1,) * shards, shards, 1.0, 1)
    Plan({}, {}, "demo", {}, "/corpora", {}).with_round(round_).save(output)
    start = time.perf_counter()
    found = missing_shards(Plan.load(output), output)
    return len(found), time.perf_counter() - start


if __name__ == "__main__":
    main()
