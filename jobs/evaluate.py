#!/usr/bin/env python
"""Judges systems on the same set of texts: word errors, likeness of the voice, predicted opinion, with intervals.

    python jobs/evaluate.py --set set.jsonl --model out/pretrain/export --voices voices/shared --codec demo
    ray job submit -- python jobs/evaluate.py --set meta.lst --systems ours=wavs/,theirs=other/ --output out/evaluation

--model says items in their voices, or else goes on from their prompts.
Recordings are named by the items' ids; one that is missing counts as all its words wrong. References of the set and,
with --codec, what the codec makes of them stand beside the systems. The same command again judges what is new.
Exit codes: 0 done; 1 failed; 2 the command is wrong; 3 done, but a system lacks more recordings than --max-missing.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
from typing import Any

from infra import config as configs
from pipeline.evaluate_config import EvaluateConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, EvaluateConfig)
    try:
        config = configs.from_arguments(EvaluateConfig, parser.parse_args())
    except configs.ConfigError as error:
        parser.error(str(error))

    from infra import cluster, tracking
    from model.codec_config import CodecError
    from model.lina_config import ModelError
    from pipeline.asr_models import TranscriptionUnavailable
    from pipeline.measures import EvaluationError
    from pipeline.plan import PlanError
    from pipeline.scripts import ScriptError
    from pipeline.speech_stage import SynthesisError
    from pipeline.system_evaluation import read_set

    try:
        items, rejects = read_set(config)
        with cluster.connect():
            return evaluate(config, items, rejects)
    except SynthesisError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    except (
        *(CodecError, EvaluationError, ModelError, PlanError, ScriptError),
        *(TranscriptionUnavailable, cluster.ClusterError, tracking.TrackingError),
    ) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


def evaluate(config: EvaluateConfig, items: list, rejects: list) -> int:
    """Says, judges, reports; returns the exit code."""
    from infra import storage, tracking
    from pipeline import evaluation_plots, plots, system_evaluation
    from pipeline.evaluation import table

    config = dataclasses.replace(config, output=storage.absolute(config.output))
    if config.model:
        print(f"evaluate: {config.model} says {len(items):,} items", flush=True)
        system_evaluation.say(config, items)
    evaluation = system_evaluation.plan(config, items, rejects)
    with tracking.track(
        config.experiment,
        config.name,
        config,
        run_id=tracking.known_run(config.output),
        tracking=config.tracking,
    ) as run:
        tracking.remember_run(config.output, run)
        judge(evaluation)
        rows, scores = system_evaluation.finish(evaluation)
        for row in rows:
            run.log_metrics(row.metrics())
        run.log_figure(evaluation_plots.systems(rows), "report.png")
        for name in ("report.md", "scores.jsonl"):
            run.log_artifact(storage.join(config.output, name))
        where = run.where
    storage.write_bytes(storage.join(config.output, "report.png"), plots.png(evaluation_plots.systems(rows)))
    print(table(rows))
    for reject in rejects:
        print(f"refused   {reject.where}: {reject.reason}: {reject.detail}")
    print(f"report    {storage.join(config.output, 'report.md')}\ntracked   {where}")
    if (share := system_evaluation.missing_fraction(scores)) > config.max_missing:
        print(f"evaluate: {share:.1%} of a system's recordings are missing, more than max_missing", file=sys.stderr)
        return 3
    return 0


def judge(evaluation: Any) -> None:
    """Judges what is not judged, with a bar."""
    from tqdm import tqdm

    from pipeline import system_evaluation

    todo = sum(len(chunk.tasks) for chunk in evaluation.missing())
    with tqdm(desc="judging", unit=" recordings", total=evaluation.tasks, initial=evaluation.tasks - todo) as bar:
        system_evaluation.run(evaluation, lambda rows: bar.update(len(rows)) and None)


if __name__ == "__main__":
    sys.exit(main())
