"""A training run as a process of its own, on a cluster of some nodes of this machine, so that it can be killed.

python -m tests.pretrain_run NODES --data … --output …
"""

from __future__ import annotations

import argparse
import sys

from tests.ray_sessions import cluster_of


def main() -> int:
    from infra import config
    from pipeline.pretrain_config import PretrainConfig
    from pipeline.pretraining import pretrain

    parser = argparse.ArgumentParser()
    config.add_arguments(parser, PretrainConfig)
    settings = config.from_arguments(PretrainConfig, parser.parse_args(sys.argv[2:]))
    with cluster_of(int(sys.argv[1])):
        pretrain(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
