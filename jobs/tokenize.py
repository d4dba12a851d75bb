#!/usr/bin/env python
"""Tokenizes a speech corpus: any manifest becomes verified shards of codec tokens with phonemised text.

    ray job submit -- python jobs/tokenize.py --input corpus/manifest.jsonl --output out/tokens
    python jobs/tokenize.py --config infra/configs/tokenize/librispeech.yaml --dry-run

The same command again does only what is missing. Without input or configuration it takes the embedded demo corpus.
Exit codes: 0 done; 1 failed; 2 the command or its configuration is wrong; 3 done, but too much was rejected.
"""

import os
import sys

# This file has the name of a module of the standard library, and Python puts its folder first on sys.path: everything
# that imports `tokenize` would get this file, in Ray's workers, too. The project's folder takes that place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from infra import config as configs
from pipeline.tokenize_config import TokenizeConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEMO = os.path.join(ROOT, "infra", "configs", "tokenize", "demo.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, TokenizeConfig)
    parser.add_argument("--dry-run", action="store_true", help="print the plan; do no work")
    parser.add_argument("--retry-quarantined", action="store_true", help="also try again what is in the quarantine")
    arguments = parser.parse_args()
    if not (arguments.config or arguments.input or arguments.corpus):
        arguments.config = DEMO
    try:
        config = configs.from_arguments(TokenizeConfig, arguments)
    except configs.ConfigError as error:
        parser.error(str(error))

    from infra import cluster, storage, tracking
    from model.codec_config import CodecError
    from pipeline.asr_models import TranscriptionUnavailable
    from pipeline.manifests import ManifestError
    from pipeline.plan import PlanError
    from pipeline.tokenization import TokenizeError

    try:
        with cluster.connect():
            if arguments.config == DEMO and not storage.exists(config.input):
                make_demo_corpus(os.path.dirname(config.input))
            return tokenize(config, arguments.dry_run, arguments.retry_quarantined)
    except TokenizeError as error:
        print(f"tokenize: {error}", file=sys.stderr)
        return 1
    except (
        *(CodecError, ManifestError, PlanError, TranscriptionUnavailable),
        *(cluster.ClusterError, tracking.TrackingError),
    ) as error:
        print(f"tokenize: {error}", file=sys.stderr)
        return 2


def tokenize(config: TokenizeConfig, dry_run: bool, retry: bool) -> int:
    """Plans, runs and finishes; returns the exit code."""
    from pipeline import codec_weights, finalize, tokenization

    given, config = config, tokenization.resolve(config)
    codec = codec_weights.resolve(config.codec, config.codec_weights)
    manifest = tokenization.open_input(config)
    device = describe_device(given.device, config.device)
    print(f"tokenize: {manifest.describe()} → {config.output}, codec {codec.identity.name} on {device}", flush=True)
    with planning() as planned:
        plan = tokenization.make_plan(config, codec, manifest, dry_run, planned)
    if dry_run:
        print(describe_plan(plan, codec.identity.to_dict()))
        return 0
    if retry:
        if tokenization.missing_shards(plan, config.output):  # what they will reject is to be tried again as well
            work(plan, config, codec, manifest.url)
        with planning() as planned:
            plan = tokenization.add_retry_round(plan, config, planned) or plan

    if not tokenization.missing_shards(plan, config.output) and finalize.is_finished(plan, config.output):
        summary = finalize.read_summary(config.output)
        print("tokenize: nothing is missing")
    else:
        summary = work(plan, config, codec, manifest.url)
    print(describe_summary(summary, config.output))
    if (fraction := finalize.reject_fraction(summary)) > config.max_reject_fraction:
        print(
            f"tokenize: {fraction:.1%} of the utterances were rejected, more than max_reject_fraction "
            f"({config.max_reject_fraction:.1%}); reasons in {config.output}/quarantine",
            file=sys.stderr,
        )
        return 3
    return 0


@contextmanager
def planning() -> Iterator[Callable[[int, float], None]]:
    """A bar, as what planning reports to: rows and seconds so far."""
    from pipeline.progress import planning_bar

    with planning_bar() as bar:

        def planned(rows: int, seconds: float) -> None:
            bar.set_postfix_str(f"{seconds / 3600:,.1f} h", refresh=False)
            bar.update(rows - bar.n)

        yield planned


def work(plan: Any, config: TokenizeConfig, codec: Any, source: str) -> dict[str, Any]:
    """Makes what is missing of what the manifest `source` names and finishes the dataset, under one MLflow run.

    Returns:
        the summary.
    """
    from infra import storage, tracking
    from pipeline import finalize, tokenization
    from pipeline.progress import audio_bar
    from pipeline.tokenize_config import identity

    missing = tokenization.missing_shards(plan, config.output)
    planned = sum(round_.seconds for round_ in plan.rounds)
    todo = planned * len(missing) / max(len(plan.shards), 1)
    there = sorted(set(plan.shards) - set(missing))
    hours = sum(sidecar["seconds"] for sidecar in tokenization.read_sidecars(config.output, there)) / 3600
    done: Counter = Counter()
    start = time.monotonic()
    name = os.path.basename(config.output)
    with tracking.track(
        config.experiment,
        name,
        config=identity(config) | {"input": source, "output": config.output},
        tags={"plan": plan.digest, "codec": plan.codec["name"], "codec_digest": plan.codec["digest"]},
        run_id=tracking.known_run(config.output),
        tracking=config.tracking,
    ) as run:
        tracking.remember_run(config.output, run)
        run.log_input(os.path.basename(source), plan.manifest["sha256"], source)
        with audio_bar(planned / 3600, (planned - todo) / 3600) as bar:

            def on_progress(row: dict[str, Any]) -> None:
                done.update(
                    {field: row[field] for field in ("rows", "seconds", "rejects", "decode_took", "encode_took")}
                )
                done["shards"] += row["sidecar"] is not None
                rate = done["seconds"] / max(time.monotonic() - start, 1e-9)
                bar.set_postfix_str(f"{rate:,.0f} × real time, {done['rejects']} rejects", refresh=False)
                bar.update(row["seconds"] / 3600)
                if row["sidecar"]:
                    so_far = {"hours": hours + done["seconds"] / 3600, "times_real_time": rate}
                    run.log_metrics(so_far, step=len(there) + done["shards"])

            tokenization.run(plan, config, codec, on_progress)
        wall = time.monotonic() - start
        summary = finalize.finish(plan, config.output, codec)
        run.log_metrics(totals(summary, done, wall))
        run.log_input(name, summary["digest"], config.output, context="output")
        for file in finalize.report_files(config.output):
            run.log_artifact(storage.join(config.output, file), os.path.dirname(file) or None)
        print(f"tracked   {run.where}")
    return summary


def totals(summary: dict[str, Any], done: Counter, wall: float) -> dict[str, float]:
    """The numbers of the whole dataset, and of the `wall` seconds in which `done` was done."""
    from pipeline import finalize

    return {
        "total_hours": summary["hours"],
        "total_samples": summary["samples"],
        "total_bytes": summary["bytes"],
        "reject_fraction": finalize.reject_fraction(summary),
        "hours_an_hour": done["seconds"] / max(wall, 1e-9),
        "wall_seconds": wall,
        "decode_cpu_seconds": done["decode_took"],
        "encode_seconds": done["encode_took"],
        **{f"rejects/{reason}": count for reason, count in summary["rejects"].items()},
    }


def make_demo_corpus(folder: str) -> None:
    from tqdm import tqdm

    from pipeline.demo_corpus import DemoConfig, make

    print(f"tokenize: there is no demo corpus in {folder} yet; making it (other sizes: jobs/make_demo_corpus.py)")
    with tqdm(desc="demo corpus", unit=" blocks", mininterval=1.0) as bar:

        def on_progress(done: int, total: int, seconds: float) -> None:
            bar.total = total
            bar.set_postfix_str(f"{seconds / 60:.1f} minutes of speech", refresh=False)
            bar.update(done - bar.n)

        make(DemoConfig(output=folder, engine="hibari"), on_progress)


def describe_device(asked: str, found: str) -> str:
    """Where the codec runs; why, where nobody asked for it and it is the slow place."""
    if (asked, found) == ("auto", "cpu"):
        return "cpu (auto: no GPU is up; --device cuda waits for one)"
    return found


def describe_plan(plan: Any, codec: dict[str, Any]) -> str:
    utterances, seconds, size = (
        sum(getattr(r, name) for r in plan.rounds) for name in ("utterances", "seconds", "bytes")
    )
    batches = sum(sum(round_.batches) for round_ in plan.rounds)
    lines = [
        f"plan      {utterances:,} utterances in {len(plan.shards):,} shards, {batches:,} codec batches",
        f"audio     {seconds / 3600:,.2f} h",
        f"tokens    {seconds * codec['frame_rate']:,.0f} frames, {size / 1e6:,.1f} MB of tars",
        f"rejects   {sum(plan.rejects.values()):,} before any audio is read",
    ]
    return "\n".join(lines + [f"          {count:,} {reason}" for reason, count in plan.rejects.items()])


def describe_summary(summary: dict[str, Any], output: str) -> str:
    lines = [
        f"done      {output}",
        f"samples   {summary['samples']:,} of {summary['utterances']:,} utterances, {summary['hours']:,.2f} h, "
        f"{len(summary['shardlist']):,} shards, {summary['bytes'] / 1e6:,.1f} MB",
        f"digest    {summary['digest']}",
        f"rejects   {sum(summary['rejects'].values()):,}",
    ]
    return "\n".join(lines + [f"          {count:,} {reason}" for reason, count in summary["rejects"].items()])


if __name__ == "__main__":
    sys.exit(main())
