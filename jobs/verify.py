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
from collections.abc import Sequence
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder of the dataset; any fsspec URL")
    parser.add_argument(
        "--samples", type=int, default=16, help="samples to decode, from all over the dataset (default: 16)"
    )
    parser.add_argument("--codec", help="folder of the codec, if it is not where it was when the dataset was made")
    parser.add_argument("--codec-weights", help="path or URL of EnCodec's own weights, which --evaluate also measures")
    parser.add_argument(
        "--listen", metavar="DIR", help="write originals beside decoded samples, and a page to hear them"
    )
    parser.add_argument("--evaluate", action="store_true", help="measure originals, decoded and Opus (extra `eval`)")
    parser.add_argument(
        "--prefixes",
        type=int,
        nargs="*",
        default=[1, 2, 4],
        help="numbers of first codebooks that --evaluate also measures alone (default: 1 2 4)",
    )
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

    from pipeline import codec_weights, verification
    from pipeline import samples as stored

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
        published = (arguments.codec or plan.codec_source) == "encodec_24khz"
        codec = stored.codec_of(plan, arguments.codec, arguments.codec_weights if published else None)
        spread = list(stored.sample_spread(plan, dataset, arguments.samples))
        faults += verification.check_decoding(spread, codec)
        print(f"decoded   {len(spread)} samples, {sum(s.meta['seconds'] for s in spread):.1f} s")
        pairs = here(plan, spread) if arguments.evaluate or arguments.listen else []
        table = ""
        if arguments.evaluate and pairs:
            beside = None if published else codec_weights.published(arguments.codec_weights)
            table = evaluate(plan, pairs, codec, arguments.prefixes, beside.build() if beside else None)
            print(table)
        if arguments.listen and pairs:
            print(f"listen    {listen(plan, pairs, codec, arguments.listen, table)}")
    for fault in faults:
        print(f"fault     {fault.where}: {fault.what}")
    print("verify: nothing is wrong" if not faults else f"verify: {len(faults)} faults")
    return 1 if faults else 0


def here(plan: Any, samples: list) -> list:
    """(sample, recording) of those whose recordings are there; prints how many are not."""
    from pipeline.samples import recorded

    lacking: list[Exception] = []
    pairs = list(recorded(plan, samples, lacking))
    if lacking:
        print(f"left out  {len(lacking)} of {len(samples)} samples without their recordings: {lacking[0]}")
    return pairs


def evaluate(plan: Any, pairs: list, codec: Any, prefixes: Sequence[int] = (), encodec: Any = None) -> str:
    """The table of original, decoded, with fewer codebooks, too, EnCodec and Opus."""
    from pipeline import evaluation

    rate = codec.identity.sample_rate
    clips = [evaluation.Clip(s.meta["id"], recording, rate, s.meta["text"] or "") for s, recording in pairs]
    stored = min(plan.config["codebooks"], plan.codec["codebooks"])
    return evaluation.table(
        evaluation.evaluate_codec(clips, codec, codebooks=stored, prefixes=prefixes, encodec=encodec)
    )


def listen(plan: Any, pairs: list, codec: Any, folder: str, notes: str) -> str:
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
        for sample, recording, decoded in beside_decoded(pairs, codec)
    ]
    return write_page(rows, folder, "Recordings beside what their codes decode to", notes)


if __name__ == "__main__":
    sys.exit(main())
