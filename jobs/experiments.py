#!/usr/bin/env python
"""The paper's experiments, and those that it lacks, with this project's models; one report of all that were done.

    python jobs/experiments.py ist-ablation --speakers speakers.jsonl             # the embedded model
    python jobs/experiments.py data-amount --speakers speakers.jsonl --amounts 3,10,30,100
    ray job submit -- python jobs/experiments.py robustness --speakers speakers.jsonl --people 40 --listen 10
    ray job submit -- python jobs/experiments.py gla-vs-attention --data data/demo/tokens \\
        --config infra/configs/experiments/large.yaml

Writes <output>/NAME/results.json and plots, and <output>/report.md. The same command again does only what is missing.
Exit codes: 0 done; 1 failed; 2 the command is wrong.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from typing import Any

from infra import config as configs
from pipeline.experiments.config import NAMES, ExperimentsConfig
from pipeline.synthesize_config import DEMO_MODEL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    configs.add_arguments(parser, ExperimentsConfig)
    arguments = parser.parse_args()
    try:
        config = configs.from_arguments(ExperimentsConfig, arguments)
    except configs.ConfigError as error:
        parser.error(str(error))
    wants_model = arguments.name != "gla-vs-attention"
    if wants_model and config.model == DEMO_MODEL and not os.path.isdir(DEMO_MODEL):
        print(
            "experiments: this installation has no embedded model; name an exported one with --model FOLDER "
            "(jobs/pretrain.py trains one, jobs/export.py makes its folder)",
            file=sys.stderr,
        )
        return 2
    if wants_model and not config.speakers:
        print(
            f"experiments: {arguments.name} needs speakers that the model never heard: name them with --speakers",
            file=sys.stderr,
        )
        return 2

    from infra import cluster, tracking
    from model.codec_config import CodecError
    from model.lina_config import ModelError
    from pipeline.asr_models import TranscriptionUnavailable
    from pipeline.experiments.cells import ExperimentError
    from pipeline.manifests.errors import ManifestError
    from pipeline.measures import EvaluationError
    from pipeline.token_index import DataError
    from pipeline.training_checkpoints import CheckpointError
    from pipeline.training_data import PretrainError
    from pipeline.utterances import Unusable

    try:
        with cluster.connect():
            return perform(arguments.name, config)
    except (
        *(CodecError, DataError, EvaluationError, ExperimentError, ManifestError, ModelError),
        *(CheckpointError, PretrainError, TranscriptionUnavailable, cluster.ClusterError, tracking.TrackingError),
        Unusable,
    ) as error:
        print(f"experiments: {told(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"experiments: the storage failed, and the same command goes on: {told(error)}", file=sys.stderr)
        return 1


def told(error: BaseException) -> BaseException:
    """What a worker raised, without the worker's stack."""
    return getattr(error, "cause", None) or error


def perform(name: str, config: ExperimentsConfig) -> int:
    """One experiment, tracked; returns the exit code."""
    from infra import storage, tracking
    from pipeline.experiments import running

    folder = storage.join(storage.absolute(config.output), name)
    with tracking.track(
        config.experiment,
        name,
        config,
        run_id=tracking.known_run(folder),
        tracking=config.tracking,
    ) as run:
        tracking.remember_run(folder, run)
        with _Bars() as bars:
            done = running.perform(name, config, bars.tell)
        run.log_metrics(done.metrics)
        for file in done.files:
            run.log_artifact(file)
        where = run.where
    print("\n".join(done.lines))
    print(f"report    {done.files[-1]}\ntracked   {where}")
    return 0


class _Bars:
    """A progress bar for each kind of work."""

    def __init__(self) -> None:
        self.open: dict[str, Any] = {}

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self.open.values():
            bar.close()

    def tell(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        from pipeline.progress import pace

        if what not in self.open:
            self.open[what] = tqdm(desc=what, total=total, initial=done, unit=" cells", **pace())
        bar = self.open[what]
        bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(main())
