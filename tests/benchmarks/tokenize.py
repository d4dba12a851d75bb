"""How fast a corpus is tokenized, beside the encodec package's own loop, on the same real speech in one run.

    python tests/benchmarks/tokenize.py                   # some minutes of speech, encodec_24khz's sizes
    python tests/benchmarks/tokenize.py --device cuda     # the encoder alone: fp32, TF32 and bf16 by batch size

Rows: (a) encodec as its README shows it, an utterance at a time at 6 kbit/s; (b) our encoder, one worker, nothing else;
(c) the whole job on Ray: reading, resampling, phonemes, encoding, shards. The rate of (c) is that of its last three
quarters, when every process has loaded what it needs; the rate from the first codec batch on stands beside it. Weights
are EnCodec's where they are at hand (`--codec-weights`), else random ones of its sizes, whose codes have nearer ties.
"""

import os
import sys

# This file, too, has the name of a module of the standard library: see jobs/tokenize.py.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks import codec_encoding as encoding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default=str(encoding.SPEECH), help="real speech: JSONL with an `audio` column")
    parser.add_argument("--seconds", type=float, default=240.0, help="how much of it for (a) and (b)")
    parser.add_argument("--job-seconds", type=float, default=2400.0, help="how much for (c), taken again and again")
    parser.add_argument("--batch", type=int, default=8, help="utterances a batch of (b)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of (a) and (b), in turns; the fastest counts")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--codec-weights", help="EnCodec's published weights file; random weights without it")
    arguments = parser.parse_args()
    if not Path(arguments.manifest).is_file():
        parser.error(f"there is no {arguments.manifest}: name real speech with --manifest")
    waves = encoding.read_speech(arguments.manifest, arguments.seconds)
    codec = encoding.build_codec(arguments.codec_weights, arguments.device)
    encoding.describe(codec, waves)
    if arguments.device == "cuda":
        encoding.compare_on_gpu(codec, waves)
        return
    results = encoding.compare_on_cpu(codec, waves, arguments.batch, arguments.repeat)
    bare = max(sum(map(len, waves)) / 24_000 / wall for name, (wall, _, _) in results.items() if "ours" in name)
    with tempfile.TemporaryDirectory() as folder:
        codec.save(f"{folder}/codec")
        arrivals = whole_job(arguments.manifest, arguments.job_seconds, folder)
    for name, first in (("(c) the whole job on Ray", len(arrivals) // 4), ("(c) from its first batch on", 0)):
        times, lengths = arrivals[first:].T
        rate = lengths[1:].sum() / (times[-1] - times[0])
        print(
            f"{name:<28}{rate:>10.1f}   {rate / bare:.0%} of (b); {lengths.sum():.0f} s of audio after {times[0]:.1f} s"
        )


def whole_job(manifest: str, seconds: float, folder: str) -> np.ndarray:
    """float [batches, 2]: when each codec batch was done, in seconds from the start, and its seconds of audio."""
    from infra import cluster
    from pipeline import codec_weights, tokenization
    from pipeline.tokenize_config import TokenizeConfig

    part = Path(folder, "manifest.jsonl")
    part.write_text("".join(_first(manifest, seconds)), encoding="utf-8")
    with cluster.connect():
        config = tokenization.resolve(
            TokenizeConfig(input=str(part), output=f"{folder}/tokens", codec=f"{folder}/codec", device="cpu")
        )
        codec = codec_weights.resolve(config.codec)
        plan = tokenization.make_plan(config, codec, tokenization.open_input(config))
        start = time.perf_counter()
        arrivals: list[tuple[float, float]] = []

        def on_progress(row: dict) -> None:
            if row["rows"]:
                arrivals.append((time.perf_counter() - start, row["seconds"]))

        tokenization.run(plan, config, codec, on_progress)
    return np.array(arrivals)


def _first(manifest: str, seconds: float):
    """Lines of a manifest up to some seconds, with absolute paths; over and over with new ids where it is shorter."""
    total = 0.0
    for number, line in enumerate(itertools.cycle(Path(manifest).read_text(encoding="utf-8").splitlines())):
        row = json.loads(line) | {"id": f"{number:06d}"}
        row["audio"] = str(Path(manifest).parent.absolute() / row["audio"])
        total += row["duration"]
        yield json.dumps(row) + "\n"
        if total >= seconds:
            return


if __name__ == "__main__":
    main()
