"""Finishing a dataset: what its sidecars add up to, as `dataset.json`, a card and plots.

`dataset.json` is a wids shard list (`__kind__`, `shardlist` with url and nsamples) with totals, the codec's identity
and a digest over the shards' digests. All of it is a function of the shards, so finishing twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from typing import TYPE_CHECKING, Any

from infra import storage
from pipeline import samples, shards
from pipeline.plan import Plan
from pipeline.tokenization import read_sidecars

if TYPE_CHECKING:
    from pipeline.codec_weights import ResolvedCodec

DATASET_FILE = "dataset.json"
PICTURED = 3
"""Samples whose spectrograms are drawn."""


def summarize(plan: Plan, dataset: str, title: str) -> dict[str, Any]:
    """What `dataset.json` holds. Needs every sidecar of the plan."""
    totals: Counter = Counter()
    rejects = Counter(plan.rejects)
    shardlist, digest = [], hashlib.sha256()
    made_by: dict[str, set[str]] = {}
    for sidecar in read_sidecars(dataset, plan.shards):
        rejects.update(sidecar["rejects"])
        totals.update({field: sidecar[field] for field in ("samples", "seconds", "frames", "bytes")})
        digest.update(bytes.fromhex(sidecar["sha256"]))
        for name, version in sidecar["versions"].items():
            made_by.setdefault(name, set()).add(version)
        if sidecar["samples"]:
            url = f"shards/{shards.shard_name(sidecar['shard'])}.tar"
            entry = {"url": url, "nsamples": sidecar["samples"], "filesize": sidecar["bytes"]}
            shardlist.append(entry | {"sha256": sidecar["sha256"]})
    for round_ in plan.rounds:
        rejects.subtract(round_.retried)
    rejects = {reason: count for reason, count in sorted(rejects.items()) if count}
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": title,
        "digest": digest.hexdigest(),
        "plan": plan.digest,
        "codec": plan.codec,
        "codebooks": min(plan.config["codebooks"], plan.codec["codebooks"]),
        "config": plan.config,
        "manifest": {field: plan.manifest[field] for field in ("kind", "sha256", "size") if field in plan.manifest},
        "versions": {name: " and ".join(sorted(versions)) for name, versions in made_by.items()},
        "device": plan.config["device"],
        "utterances": totals["samples"] + sum(rejects.values()),
        "samples": totals["samples"],
        "seconds": round(totals["seconds"], 3),
        "hours": round(totals["seconds"] / 3600, 4),
        "frames": totals["frames"],
        "bytes": totals["bytes"],
        "rejects": rejects,
        "shardlist": shardlist,
    }


def reject_fraction(summary: dict[str, Any]) -> float:
    """Rejects among all that the manifest names."""
    return sum(summary["rejects"].values()) / max(summary["utterances"], 1)


def write_summary(summary: dict[str, Any], dataset: str) -> None:
    storage.write_text(storage.join(dataset, DATASET_FILE), json.dumps(summary, indent=1, sort_keys=True) + "\n")


def read_summary(dataset: str) -> dict[str, Any]:
    return json.loads(storage.read_bytes(storage.join(dataset, DATASET_FILE)))


def is_finished(plan: Plan, dataset: str) -> bool:
    """Whether `dataset.json` is there and that of this plan."""
    if not storage.exists(storage.join(dataset, DATASET_FILE)):
        return False
    return read_summary(dataset).get("plan") == plan.digest


def finish(plan: Plan, dataset: str, codec: ResolvedCodec) -> dict[str, Any]:
    """Writes the card, the plots and, last, `dataset.json` of a dataset with all its shards; returns the summary."""
    from pipeline.card import write_card
    from pipeline.plots import Pair

    summary = summarize(plan, dataset, posixpath.basename(dataset.rstrip("/")))
    spread = list(samples.sample_spread(plan, dataset, PICTURED))
    shown = samples.beside_decoded(samples.recorded(plan, spread), codec.build()) if spread else ()
    rate = plan.codec["sample_rate"]
    write_card(dataset, summary, [Pair(s.meta["id"], recording, decoded, rate) for s, recording, decoded in shown])
    write_summary(summary, dataset)
    return summary


def report_files(dataset: str) -> list[str]:
    """What people look at, relative to the dataset: summary, card and plots."""
    plots = [f"plots/{name}" for name in storage.names(storage.join(dataset, "plots"))]
    return [DATASET_FILE, *(["README.md"] if storage.exists(storage.join(dataset, "README.md")) else []), *plots]
