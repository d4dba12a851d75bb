#!/usr/bin/env python
"""Verifies a dataset of token shards: re-hashes everything, accounts for every utterance, decodes a sample.

    python jobs/verify.py out/tokens
    python jobs/verify.py out/tokens --listen out/listen      # originals beside decoded, spectrograms, one HTML page
    python jobs/verify.py out/tokens --evaluate               # how much of the speech the codec keeps

Exit codes: 0 nothing wrong; 1 faults, each printed; 2 there is no dataset, or its codec cannot be had.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder of the dataset; any fsspec URL")
    parser.add_argument(
        "--samples", type=int, default=16, help="samples to decode, from all over the dataset (default: 16)"
    )
    parser.add_argument("--codec", help="folder of the codec, if it is not where it was when the dataset was made")
    parser.add_argument("--codec-weights", help="path or URL of EnCodec's own weights")
    parser.add_argument(
        "--listen", metavar="DIR", help="write originals beside decoded samples, and a page to hear them"
    )
    parser.add_argument("--evaluate", action="store_true", help="measure originals, decoded and Opus (extra `eval`)")
    arguments = parser.parse_args()

    from infra import cluster, storage
    from model.codec_config import CodecError
    from pipeline.measures import EvaluationError
    from pipeline.plan import PlanError

    dataset = storage.absolute(arguments.dataset)
    try:
        with cluster.connect():
            return verify(dataset, arguments)
    except (CodecError, PlanError, EvaluationError, cluster.ClusterError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2


def verify(dataset: str, arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pipeline import samples as stored
    from pipeline import verification

    samples = rejects = size = 0
    plan = verification.load_plan(dataset)
    with tqdm(total=len(plan.shards), desc="verifying", unit=" shards") as bar:

        def on_shard(checked: verification.Checked) -> None:
            nonlocal samples, rejects, size
            samples, rejects, size = samples + checked.samples, rejects + checked.rejects, size + checked.bytes
            bar.update()

        faults = verification.verify(plan, dataset, on_shard)
    print(f"hashed    {size / 1e6:,.1f} MB: {samples:,} samples, {rejects:,} in the quarantine")
    if not faults and samples and arguments.samples:
        codec = stored.codec_of(plan, arguments.codec, arguments.codec_weights)
        spread = list(stored.sample_spread(plan, dataset, arguments.samples))
        faults += verification.check_decoding(spread, codec)
        print(f"decoded   {len(spread)} samples, {sum(s.meta['seconds'] for s in spread):.1f} s")
        table = evaluate(plan, spread, codec) if arguments.evaluate else ""
        if arguments.listen:
            print(f"listen    {listen(plan, spread, codec, arguments.listen, table)}")
    for fault in faults:
        print(f"fault     {fault.where}: {fault.what}")
    print("verify: nothing is wrong" if not faults else f"verify: {len(faults)} faults")
    return 1 if faults else 0


def evaluate(plan: Any, samples: list, codec: Any) -> str:
    """Prints and returns the table of original, decoded and Opus."""
    from pipeline import evaluation
    from pipeline.samples import original
    from pipeline.utterances import Unusable

    rate = codec.identity.sample_rate
    clips, lacking = [], []
    for sample in samples:
        try:
            clips.append(evaluation.Clip(sample.meta["id"], original(plan, sample), rate, sample.meta["text"] or ""))
        except (Unusable, OSError) as error:
            lacking.append(error)
    if lacking:
        print(f"left out  {len(lacking)} of {len(samples)} samples without their recordings: {lacking[0]}")
    if not clips:
        return ""
    table = evaluation.table(evaluation.evaluate_codec(clips, codec))
    print(table)
    return table


def listen(plan: Any, samples: list, codec: Any, folder: str, notes: str) -> str:
    """Writes the page; returns where it is."""
    from pipeline.listening import Listened, Recording, write_page
    from pipeline.samples import beside_decoded

    rate = codec.identity.sample_rate
    name = f"{codec.identity.name}, {plan.codec['frame_rate']:g} frames a second"
    rows = [
        Listened(
            sample.meta["id"],
            sample.meta["text"] or "",
            [Recording("original", recording, rate), Recording("decoded", decoded, rate, name)],
            sample.meta["speaker"],
        )
        for sample, recording, decoded in beside_decoded(plan, samples, codec)
    ]
    return write_page(rows, folder, "Recordings beside what their codes decode to", notes)


if __name__ == "__main__":
    sys.exit(main())
