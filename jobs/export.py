#!/usr/bin/env python
"""Makes the portable model (`model.safetensors`, `config.json`) from a training checkpoint, on a CPU.

    python jobs/export.py out/pretrain            # the newest checkpoint of a run → out/pretrain/export
    python jobs/export.py s3://bucket/run/checkpoints/step-00010000 --output models/ten-thousand --dtype bfloat16

Exit codes: 0 done; 1 failed; 2 the command is wrong.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse


def main() -> int:
    from model.checkpoint import DTYPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder or one checkpoint's, local or an fsspec URL")
    parser.add_argument("--output", help="folder or URL; default: export/ in the run's folder")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights (default: float32)")
    options = parser.parse_args()

    from infra import storage
    from model.lina_config import ModelError
    from pipeline import model_export, training_checkpoints

    try:
        checkpoint = model_export.find(options.checkpoint)
        run = checkpoint.url.rsplit("/", 2)[0]
        output = storage.absolute(options.output or storage.join(run, model_export.EXPORT))
        card = model_export.export(checkpoint, output, options.dtype)
    except (training_checkpoints.CheckpointError, ModelError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(f"model       {output}, of step {checkpoint.step:,}, {options.dtype}")
    print(f"fingerprint {card.fingerprint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
