#!/usr/bin/env python
"""Trains a codec of EnCodec's architecture on any corpus of speech and exports it for `tokenize --codec PATH`.

    python jobs/train_codec.py --config infra/configs/codec/demo.yaml --data data/demo/manifest.jsonl
    ray job submit -- python jobs/train_codec.py --data corpus/manifest.jsonl --output /mnt/codec --workers 8

The same command again goes on where the last one was cut off; SIGTERM, which `ray job stop` sends, writes a checkpoint
first. Exit codes: 0 done, or stopped with a checkpoint; 1 failed; 2 the command is wrong.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse

from infra import config as configs
from pipeline.codec_checkpoints import EXPORT
from pipeline.codec_training import TrainingFailed, train
from pipeline.train_codec_config import TrainCodecConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, TrainCodecConfig)
    try:
        config = configs.from_arguments(TrainCodecConfig, parser.parse_args())
    except configs.ConfigError as error:
        parser.error(str(error))

    from infra import cluster, tracking
    from model.codec_config import CodecError
    from pipeline.manifests import ManifestError

    try:
        if config.workers == 1:
            reached = train(config)
        else:
            with cluster.connect():
                from ray.train import TrainingFailedError

                try:
                    reached = train(config)
                except TrainingFailedError as error:
                    print(f"train_codec: training failed: {error}", file=sys.stderr)
                    return 1
    except TrainingFailed as error:
        print(f"train_codec: training failed: {error}", file=sys.stderr)
        return 1
    except (CodecError, ManifestError, cluster.ClusterError, tracking.TrackingError) as error:
        print(f"train_codec: {error}", file=sys.stderr)
        return 2
    if reached["step"] < config.steps:
        print(f"train_codec: stopped after step {reached['step']:.0f} of {config.steps}; the same command goes on")
        return 0
    print(f"train_codec: the codec is in {os.path.join(config.output, EXPORT)}; use it with --codec")
    return 0


if __name__ == "__main__":
    sys.exit(main())
