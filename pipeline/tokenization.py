"""Tokenizing a corpus: plan, run what is missing of it on Ray Data, finish the dataset.

The same command again does only what is missing, because a shard is done when its sidecar exists and everything else is
a function of the plan. Work goes to Ray Data in waves of some thousand codec batches, in the plan's order; so the
driver's memory does not grow with the corpus, few shards are open at a time, and a shard that was lost with a node is
simply part of the next wave.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any

from infra import devices, storage
from pipeline import codec_weights, json_lines, lengths, planning, shards
from pipeline.manifests import Manifest
from pipeline.plan import Plan, PlanError, differences, note_taken_up, read_rows, taken_up
from pipeline.stages import Collect, Decode, Encode, Job, Transcribe, Write
from pipeline.tokenize_config import TokenizeConfig, identity
from pipeline.utterances import Reject, Unusable, Utterance

if TYPE_CHECKING:
    from ray.data import Dataset

    from pipeline.codec_weights import ResolvedCodec

ATTEMPTS = 3
"""Waves in which a shard may fail to appear before the job gives up."""
NEVER_RETRIED = ("write/duplicate-audio",)
_RECORDED_VERSIONS = ("encodec", "g2p-en", "numpy", "soundfile", "soxr", "torch")


class TokenizeError(RuntimeError):
    """A dataset that cannot be made: says why, and what to do."""


def open_input(config: TokenizeConfig) -> Manifest:
    cutting = {name: getattr(config, name) for name in ("segment_seconds", "max_seconds", "max_silence")}
    return config.open_corpus(config.input, **cutting)


def resolve(config: TokenizeConfig) -> TokenizeConfig:
    """The configuration with everything settled that depends on this machine: absolute paths, the device."""
    if config.transcribe:
        from pipeline.transcription import Transcriber

        Transcriber(config.transcribe)  # a missing model is told now, not by the first actor
    return dataclasses.replace(config, output=storage.absolute(config.output), device=devices.of_cluster(config.device))


def make_plan(
    config: TokenizeConfig,
    codec: ResolvedCodec,
    manifest: Manifest,
    dry_run: bool = False,
    progress: Callable[[int, float], None] = lambda rows, seconds: None,
) -> Plan:
    """The dataset's plan: the one on disk if it is that of this command, else a new one.

    Args:
        dry_run: write nothing.

    Raises:
        PlanError: the output has been planned for another configuration, codec or manifest; says what differs.
    """
    existing = Plan.load(config.output)
    fingerprint = manifest.fingerprint(existing.manifest if existing else None)
    base = manifest.folder  # where relative audio paths start: a corpus may move between two runs
    if existing:
        _require_same(existing, config, codec, fingerprint)
        return dataclasses.replace(existing, audio_base=base)
    items = lengths.with_lengths(iter(manifest), config, find_speech)
    source = config.codec if config.codec in codec_weights.NAMES else storage.absolute(config.codec)
    plan = Plan(identity(config), codec.identity.to_dict(), source, fingerprint, base, {})
    output = None if dry_run else config.output
    round_, rejects = planning.make_round(items, config, _sizes(plan), "plan.parquet", 0, output, progress)
    plan = dataclasses.replace(plan, rejects=rejects).with_round(round_)
    if not dry_run:
        plan.save(config.output)
    return plan


def add_retry_round(plan: Plan, config: TokenizeConfig, progress: Callable) -> Plan | None:
    """The plan with one more round, of everything in the quarantine that may work now; None if there is nothing."""
    retried: dict[str, str] = {}
    items = lengths.with_lengths(_quarantined(plan, config.output, retried), config, find_speech)
    first = next(items, None)
    if first is None:
        return None
    file = f"plan.retry-{len(plan.rounds):03d}.parquet"
    round_, rejects = planning.make_round(
        _chain(first, items), config, _sizes(plan), file, len(plan.shards), config.output, progress
    )
    plan = dataclasses.replace(plan, rejects=dict(Counter(plan.rejects) + Counter(rejects)))
    note_taken_up(config.output, file, retried)
    plan = plan.with_round(dataclasses.replace(round_, retried=dict(sorted(Counter(retried.values()).items()))))
    plan.save(config.output)
    return plan


def missing_shards(plan: Plan, dataset: str) -> list[int]:
    """Shards without a sidecar; one listing, however many there are."""
    names = storage.names(storage.join(dataset, "shards"))
    done = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    return [shard for shard in plan.shards if shards.shard_name(shard) not in done]


def run(
    plan: Plan, config: TokenizeConfig, codec: ResolvedCodec, on_progress: Callable[[dict[str, Any]], None]
) -> None:
    """Makes every missing shard.

    Args:
        on_progress: called with rows of `stages.PROGRESS` as they arrive.

    Raises:
        TokenizeError: a shard did not appear in `ATTEMPTS` waves.
    """
    import ray

    job = Job(config, config.output, plan.audio_base, plan.rounds, plan.codec, _facts(config))
    weights = ray.put(codec)
    _remove_leftovers(config.output)
    attempts: Counter = Counter()
    while missing := missing_shards(plan, config.output):
        wave = list(_wave(plan, missing, config.wave_batches))
        attempts.update({shard for shard, _ in wave})
        lost = [shard for shard, tries in attempts.items() if tries > ATTEMPTS]
        if lost:
            raise TokenizeError(
                f"shards {lost[:5]} were lost {ATTEMPTS} times over: nodes die faster than a shard takes; "
                "set a smaller shard_megabytes, or look into the workers' logs"
            )
        for table in graph(job, weights, wave).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            for row in table.to_pylist():
                on_progress(row)
    _remove_leftovers(config.output)  # of writers that were killed meanwhile


def read_sidecars(dataset: str, which: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Shards' sidecars in the order asked for; read by threads, since object stores are slow one at a time."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(32) as pool:
        todo = iter(which)
        while chunk := list(islice(todo, 1024)):
            yield from pool.map(lambda shard: json.loads(storage.read_bytes(shards.sidecar_url(dataset, shard))), chunk)


def find_speech(recordings: list[str]) -> Iterable[list[tuple[float, float]] | None]:
    """Speech spans of recordings, found by the cluster's CPUs, in order; None for a recording that cannot be used."""
    import ray

    task = ray.remote(num_cpus=1)(_speech_of)
    waiting = [task.remote(recording) for recording in recordings]
    while waiting:
        yield ray.get(waiting.pop(0))


def _speech_of(recording: str) -> list[tuple[float, float]] | None:
    from pipeline.segmentation import vad_spans

    try:
        return storage.patiently(partial(vad_spans, recording))
    except Unusable:
        return None


def _require_same(plan: Plan, config: TokenizeConfig, codec: ResolvedCodec, fingerprint: dict[str, Any]) -> None:
    changed = differences(plan.config, json.loads(json.dumps(identity(config))))
    changed += differences(plan.codec, codec.identity.to_dict(), "codec ")
    if plan.manifest.get("sha256") != fingerprint.get("sha256"):
        changed += differences(plan.manifest, fingerprint, "manifest ")
    if changed:
        raise PlanError(
            f"{config.output} holds a dataset that was planned otherwise; choose another --output, or undo:\n  "
            + "\n  ".join(changed)
        )


def _sizes(plan: Plan) -> planning.Sizes:
    codebooks = min(plan.config["codebooks"], plan.codec["codebooks"])
    return planning.Sizes(plan.codec["frame_rate"] * codebooks * 2, plan.audio_base)


def _quarantined(plan: Plan, dataset: str, retried: dict[str, str]) -> Iterator[Utterance]:
    """Rejects of finished shards as utterances; those that a later round has already taken up are left to it.

    Args:
        retried: receives the key of each, and its `stage/reason`.
    """
    taken: set[str] = set()
    for round_ in reversed(plan.rounds):
        for shard in round_.shards:
            noted = json_lines.read(shards.quarantine_url(dataset, shard))
            rejects = {row["key"]: f"{row['stage']}/{row['reason']}" for row in noted}
            wanted = {key for key, why in rejects.items() if key not in taken and why not in NEVER_RETRIED}
            for row in read_rows(dataset, round_, shard).to_pylist() if wanted else ():
                if row["key"] in wanted:
                    retried[row["key"]] = rejects[row["key"]]
                    row["audio"] = storage.relative_to(plan.audio_base, row["audio"])
                    row["extra"] = json.loads(row["extra"] or "{}")
                    yield Utterance(**{name: row[name] for name in Utterance._fields})
        if round_ is not plan.rounds[0]:
            taken |= taken_up(dataset, round_)


def _chain(first: Utterance | Reject, rest: Iterator[Utterance | Reject]) -> Iterator[Utterance | Reject]:
    yield first
    yield from rest


def _remove_leftovers(dataset: str) -> None:
    for folder in ("shards", "quarantine", ""):
        storage.remove_leftovers(storage.join(dataset, folder))


def _wave(plan: Plan, missing: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """(shard, batch) of whole missing shards, at least one shard and about `limit` batches."""
    count = 0
    for shard in missing:
        round_ = plan.round_of(shard)
        batches = round_.batches[shard - round_.first_shard]
        if count and count + batches > limit:
            return
        count += batches
        yield from ((shard, batch) for batch in range(batches))


def graph(job: Job, weights: Any, wave: list[tuple[int, int]]) -> Dataset:
    """The Ray Data graph over a wave of (shard, batch): rows of `stages.PROGRESS`, in the wave's order.

    Every block is one codec batch, from the plan to `Collect`; nothing on the way joins or splits them.
    """
    import pyarrow as pa
    import ray.data

    config = job.config
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own bar says how far it is
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    context.execution_options.preserve_order = True
    blocks = [pa.table({"shard": pa.array([s], pa.int32()), "batch": pa.array([b], pa.int32())}) for s, b in wave]
    decode = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": config.decode_cpus}
    dataset = ray.data.from_arrow(blocks).map_batches(Decode(job).__call__, **decode)
    if config.transcribe:
        dataset = dataset.map_batches(
            Transcribe,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.transcribe_actors),
            **decode | {"num_cpus": config.codec_cpus},
        )
    # Not map_batches, which refuses GPUs without a batch size in rows; a size would wait for blocks to join.
    dataset = dataset.map_batches_internal(
        Encode,
        fn_constructor_args=(job, weights),
        batch_size=None,
        batch_format="pyarrow",
        **_codec_resources(config, len(wave)),
    )
    dataset = dataset.map_batches(
        Collect,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=1),
        **decode | {"num_cpus": 0.01},
    )
    return dataset.map_batches(Write(job).__call__, **decode)


def _codec_resources(config: TokenizeConfig, batches: int) -> dict[str, Any]:
    import ray

    if config.device == "cuda":
        kind, kept, each = "GPU", 0.0, config.codec_gpus
        demand = {"num_gpus": config.codec_gpus, "num_cpus": config.decode_cpus}
    else:
        # Two decoding tasks' worth of CPU stays free, or nothing would ever reach the codec. The same holds on what a
        # lost node leaves: a CPU has room for a codec actor, a decoding task and Collect.
        kind, kept, each = "CPU", 2 * config.decode_cpus, config.codec_cpus
        demand = {"num_cpus": config.codec_cpus}
    now, later = ((amount - kept) / each for amount in _amounts(kind))
    most = max(1, int(min(config.codec_actors or later, batches)))
    start = max(1, min(most, int(now)))
    return {"compute": ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=start), **demand}


def _amounts(kind: str) -> tuple[float, float]:
    """How many CPUs or GPUs are up, and how many there may be once the cluster has grown: without limit where none is
    up and no autoscaler says."""
    import ray
    from ray._private.state import state  # Ray Data asks here, too: there is no public way

    now = ray.cluster_resources().get(kind, 0)
    limits = state.get_max_resources_from_cluster_config() or {}
    return now, max(now, limits.get(kind, 0)) or math.inf


def _facts(config: TokenizeConfig) -> dict[str, Any]:
    """What else a shard's bytes depend on."""
    versions = {name: version(name) for name in _RECORDED_VERSIONS}
    return {"versions": {"python": platform.python_version(), **versions}, "device": config.device}
