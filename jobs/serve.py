#!/usr/bin/env python
"""Speech over HTTP, in the foreground: OpenAI's interface for speech, enrollment of voices, and a page to try both.

    python jobs/serve.py --port 8000 --model models/lina --voices voices/
    curl -s http://127.0.0.1:8000/v1/audio/speech -H 'Content-Type: application/json' \\
        -d '{"model": "lina", "input": "Good morning.", "response_format": "wav"}' > morning.wav

Starts Ray on this machine unless RAY_ADDRESS names a cluster; Ctrl-C ends what it started, and nothing else.
Without --tokens anybody on this machine, and nobody else, is served. Each tenant in that file speaks with the voices in
VOICES/TENANT/ and VOICES/shared/; `python -m pipeline.service.tenants` makes a token.
Exit codes: 0 stopped; 1 failed; 2 the command is wrong.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse

from infra import config as configs
from pipeline.service.config import ServeConfig
from pipeline.synthesize_config import DEMO_MODEL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, ServeConfig)
    try:
        config = configs.from_arguments(ServeConfig, parser.parse_args())
    except configs.ConfigError as error:
        parser.error(str(error))
    if config.model == DEMO_MODEL and not os.path.isdir(DEMO_MODEL):
        print(
            "serve: this installation has no embedded model; name an exported one with --model FOLDER "
            "(jobs/pretrain.py trains one, jobs/export.py makes its folder)",
            file=sys.stderr,
        )
        return 2

    from infra import cluster
    from model.codec_config import CodecError
    from model.lina_config import ModelError
    from pipeline.service.running import ServiceError, run

    try:
        return run(config)
    except ServiceError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except (CodecError, ModelError, cluster.ClusterError, configs.ConfigError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
