#!/usr/bin/env python
"""Trains a Lina model on token shards with DeepSpeed, through Ray Train, and exports it.

    ray job submit jobs/pretrain.py                          # `tiny` on the demo corpus's tokens
    ray job submit jobs/pretrain.py -- --config infra/configs/pretrain/169m.yaml --data s3://bucket/tokens \
        --output s3://bucket/lina-169m --workers 64

The same command again goes on where the last one was cut off; `ray job stop` writes a checkpoint first. Exit codes:
0 done, or stopped with a checkpoint; 1 training failed; 2 the command is wrong or the run was refused.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse

from infra import config as configs
from pipeline.pretrain_config import PretrainConfig

DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "infra/configs/pretrain/demo.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, PretrainConfig)
    arguments = sys.argv[1:] or ["--config", DEMO]
    try:
        config = configs.from_arguments(PretrainConfig, parser.parse_args(arguments))
    except configs.ConfigError as error:
        parser.error(str(error))

    from infra import cluster
    from infra.cluster import ClusterError
    from infra.tracking import TrackingError
    from pipeline.pretraining import TrainingFailed, pretrain
    from pipeline.token_index import DataError
    from pipeline.training_checkpoints import CheckpointError
    from pipeline.training_data import PretrainError

    try:
        with cluster.connect():
            from ray.train import TrainingFailedError

            try:
                metrics = pretrain(config)
            except (TrainingFailed, TrainingFailedError) as error:
                print(f"pretrain: training failed: {error}", file=sys.stderr)
                return 1
    except (DataError, CheckpointError, PretrainError, ClusterError, TrackingError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    if metrics:
        shown = {name: metrics[name] for name in ("loss", "valid.loss", "tokens_per_second") if name in metrics}
        print("pretrain: " + ", ".join(f"{name} {value:,.4g}" for name, value in shown.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
