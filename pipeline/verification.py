"""Verifying a dataset: every byte re-hashed, every planned utterance accounted for, some samples decoded.

Each shard is checked by itself, by Ray tasks: the tar against its sidecar's sha256, its members, codes and index, and
its keys and the quarantine's against the plan. What is wrong is a `Fault` that names the shard and what to do.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from infra import storage
from pipeline import json_lines, shards
from pipeline.finalize import DATASET_FILE, read_summary, summarize
from pipeline.plan import Plan, PlanError, read_rows, shard_digest
from pipeline.tokenization import missing_shards

if TYPE_CHECKING:
    from model.codec import Codec

REMEDY = "delete its .json in shards/ and run the tokenize command again"


class Fault(NamedTuple):
    """Something that is not as it should be."""

    where: str
    what: str


class Checked(NamedTuple):
    """What was checked of one shard."""

    samples: int
    rejects: int
    bytes: int
    faults: list[Fault]


def load_plan(dataset: str) -> Plan:
    """The plan of a dataset. Raises PlanError where there is none, or a damaged one."""
    plan = Plan.load(dataset)
    if plan is None:
        raise PlanError(f"{dataset} is no dataset: it has no plan.json")
    return plan


def verify(plan: Plan, dataset: str, on_shard: Callable[[Checked], None]) -> list[Fault]:
    """Checks every shard, in parallel on Ray, and the totals."""
    missing = missing_shards(plan, dataset)
    faults = [Fault(shards.shard_name(shard), "not made yet; run the tokenize command again") for shard in missing]
    for checked in _in_parallel(plan, dataset, sorted(set(plan.shards) - set(missing))):
        faults += checked.faults
        on_shard(checked)
    if not faults:
        faults += _check_summary(plan, dataset)
    return faults


def check_shard(plan: Plan, dataset: str, shard: int) -> Checked:
    """Re-hashes one shard and holds it against its sidecar, its index, its quarantine and the plan."""
    name = shards.shard_name(shard)
    faults: list[Fault] = []

    def expect(holds: bool, what: str) -> None:
        if not holds:
            faults.append(Fault(name, f"{what}; {REMEDY}"))

    try:
        sidecar = json.loads(storage.read_bytes(shards.sidecar_url(dataset, shard)))
        data = storage.read_bytes(shards.tar_url(dataset, shard))
        rejects = [row["key"] for row in json_lines.read(shards.quarantine_url(dataset, shard))]
        rows = read_rows(dataset, plan.round_of(shard), shard)
        expect(hashlib.sha256(data).hexdigest() == sidecar["sha256"], "the tar's sha256 is not the sidecar's")
        expect(sidecar["codec"] == plan.codec, "made with another codec than the plan's")
        expect(sidecar["plan"] == shard_digest(rows), "made from other plan rows")
        samples = list(shards.read_samples(data))
        keys = Counter(sample.key for sample in samples) + Counter(rejects)
        expect(keys == Counter(rows["key"].to_pylist()), _difference(keys, Counter(rows["key"].to_pylist())))
        expect(len(samples) == sidecar["samples"], f"{len(samples)} samples, the sidecar has {sidecar['samples']}")
        for problem in _check_samples(samples, plan):
            expect(False, problem)
        for problem in _check_index(data, samples, storage.read_bytes(shards.index_url(dataset, shard))):
            expect(False, problem)
    except Exception as error:  # tar, NumPy, JSON and Parquet fail on damaged bytes in more ways than they document
        return Checked(0, 0, 0, [*faults, Fault(name, f"cannot be read ({type(error).__name__}: {error}); {REMEDY}")])
    return Checked(len(samples), len(rejects), len(data), faults)


def check_decoding(samples: list[shards.Sample], codec: Codec) -> list[Fault]:
    """Decodes samples; each has to give finite audio of its length, to a frame."""
    faults = []
    for sample in samples:
        wave = codec.decode([sample.codes])[0]
        expected = sample.meta["seconds"] * codec.identity.sample_rate
        if not np.isfinite(wave).all() or abs(len(wave) - expected) > codec.hop:
            seconds = len(wave) / codec.identity.sample_rate
            faults.append(
                Fault(sample.key, f"decodes to {seconds:.2f} s, recorded were {sample.meta['seconds']:.2f} s")
            )
    return faults


def _in_parallel(plan: Plan, dataset: str, todo: list[int]) -> Iterator[Checked]:
    import ray

    task = ray.remote(num_cpus=1)(check_shard)
    shared = ray.put(plan)
    waiting: list = []
    for shard in todo:
        if len(waiting) >= 4 * max(1, int(ray.cluster_resources().get("CPU", 1))):
            yield ray.get(waiting.pop(0))
        waiting.append(task.remote(shared, dataset, shard))
    while waiting:
        yield ray.get(waiting.pop(0))


def _check_samples(samples: list[shards.Sample], plan: Plan) -> Iterator[str]:
    codebooks = min(plan.config["codebooks"], plan.codec["codebooks"])
    hop = plan.codec["sample_rate"] / plan.codec["frame_rate"]
    for sample in samples:
        frames = -(-round(sample.meta["seconds"] * plan.codec["sample_rate"]) // hop)
        if sample.codes.shape != (codebooks, frames):
            yield f"{sample.key}: codes are {sample.codes.shape}, expected {(codebooks, int(frames))}"
        elif sample.codes.size and sample.codes.max() >= plan.codec["codebook_size"]:
            yield f"{sample.key}: code {sample.codes.max()} is outside a codebook of {plan.codec['codebook_size']}"


def _check_index(data: bytes, samples: list[shards.Sample], index: bytes) -> Iterator[str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(io.BytesIO(index)).to_pylist()
    if [row["key"] for row in rows] != [sample.key for sample in samples]:
        yield "the index names other samples than the tar"
        return
    for row, sample in zip(rows, samples, strict=True):
        (alone,) = shards.read_samples(data[row["offset"] : row["offset"] + row["size"]])
        if alone.key != sample.key or row["frames"] != sample.codes.shape[1]:
            yield f"the index is wrong about {sample.key}"


def _check_summary(plan: Plan, dataset: str) -> list[Fault]:
    if not storage.exists(storage.join(dataset, DATASET_FILE)):
        return [Fault(DATASET_FILE, "is missing; run the tokenize command again")]
    try:
        written = read_summary(dataset)
    except ValueError as error:
        return [Fault(DATASET_FILE, f"is damaged ({error}); delete it and run the tokenize command again")]
    if written == json.loads(json.dumps(summarize(plan, dataset, written.get("name", "")))):
        return []
    return [Fault(DATASET_FILE, "does not fit the sidecars; run the tokenize command again")]


def _difference(found: Counter, planned: Counter) -> str:
    lost, extra = list(planned - found), list(found - planned)
    return f"{len(lost)} planned samples are lost {lost[:3]}, {len(extra)} are not in the plan or twice {extra[:3]}"
