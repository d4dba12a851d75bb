"""A plan on disk: `plan.parquet` has a row for each utterance and a row group for each shard, `plan.json` the rest.

A plan has rounds. The first is made from the manifest; every `--retry-quarantined` adds one with what was in the
quarantine, in shards of its own behind those that exist, so that finished shards never change.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from infra import storage

if TYPE_CHECKING:
    import pyarrow as pa

PLAN_FILE = "plan.json"


class PlanError(ValueError):
    """A plan that is missing, damaged, or not the one that this command would make."""


@dataclass(frozen=True)
class Round:
    """A set of shards that was planned at once."""

    file: str
    """Name of its Parquet file in the dataset's folder."""
    digest: str
    """sha256 over the digests of its shards."""
    first_shard: int
    batches: tuple[int, ...]
    """How many codec batches each shard has."""
    utterances: int
    seconds: float
    """Planned seconds of audio; lengths that only decoding tells are guesses."""
    bytes: int
    """Expected size of its tars."""
    retried: dict[str, int] = field(default_factory=dict)
    """Of a round that tries rejects again: how many there were, by `stage/reason`."""

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + len(self.batches))


@dataclass(frozen=True)
class Plan:
    """What a dataset is bound to, and its rounds."""

    config: dict[str, Any]
    """The fields of the configuration that decide what the shards hold."""
    codec: dict[str, Any]
    """The codec's identity."""
    codec_source: str
    """What the command line named as codec: a name or a folder."""
    manifest: dict[str, Any]
    """Fingerprint of the input."""
    audio_base: str
    """Folder that relative audio paths of the plan start from."""
    rejects: dict[str, int]
    """What the manifest named and could not be planned, by `stage/reason`."""
    rounds: tuple[Round, ...] = field(default_factory=tuple)

    @property
    def shards(self) -> range:
        return range(sum(len(round_.batches) for round_ in self.rounds))

    @property
    def digest(self) -> str:
        return _sha256(self.config, self.codec, [round_.digest for round_ in self.rounds])

    def round_of(self, shard: int) -> Round:
        return next(round_ for round_ in self.rounds if shard in round_.shards)

    def with_round(self, round_: Round) -> Plan:
        return replace(self, rounds=(*self.rounds, round_))

    def save(self, dataset: str) -> None:
        storage.write_text(storage.join(dataset, PLAN_FILE), json.dumps(asdict(self) | {"digest": self.digest}) + "\n")

    @staticmethod
    def load(dataset: str) -> Plan | None:
        """The plan of a dataset, None where nothing has been planned yet.

        Raises:
            PlanError: a plan.json that is not one.
        """
        url = storage.join(dataset, PLAN_FILE)
        if not storage.exists(url):
            return None
        try:
            values = json.loads(storage.read_text(url))
            digest = values.pop("digest")
            rounds = tuple(Round(**(r | {"batches": tuple(r["batches"])})) for r in values.pop("rounds"))
            plan = Plan(**values, rounds=rounds)
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{url} is damaged ({error}); restore it, or choose another --output") from None
        if plan.digest != digest:
            raise PlanError(
                f"{url} was changed by hand: its digest does not fit; restore it, or choose another --output"
            )
        return plan


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What changed between two configurations or fingerprints, as `field: old → new`."""
    return [
        f"{prefix}{name}: {old.get(name)!r} → {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def read_rows(dataset: str, round_: Round, shard: int) -> pa.Table:
    """The plan's rows of one shard: shard, batch, key, id, audio, start, duration, text, speaker, language, …"""
    return _row_groups(storage.join(dataset, round_.file)).read_row_group(shard - round_.first_shard)


def note_taken_up(dataset: str, file: str, keys: Iterable[str]) -> None:
    """Notes which rejects a retry round took up. Its own rows do not tell: some were cut into segments, or refused."""
    storage.write_text(_taken_up_url(dataset, file), "".join(f"{key}\n" for key in sorted(keys)))


def taken_up(dataset: str, round_: Round) -> set[str]:
    """Keys of the rejects that a retry round took up."""
    url = _taken_up_url(dataset, round_.file)
    if storage.exists(url):
        return set(storage.read_text(url).splitlines())
    return {key for shard in round_.shards for key in read_rows(dataset, round_, shard)["key"].to_pylist()}


def shard_digest(rows: pa.Table) -> str:
    """sha256 of a shard's plan rows; independent of how Parquet or Arrow lay them out."""
    import pyarrow as pa

    digest = hashlib.sha256()
    for name in rows.column_names:
        column = rows.column(name)
        if pa.types.is_string(column.type):
            digest.update("\x1f".join(column.fill_null("\x00").to_pylist()).encode("utf-8"))
        else:
            digest.update(column.fill_null(-1).to_numpy().astype("<f8").tobytes())
        digest.update(b"\x1e")
    return digest.hexdigest()


def round_digest(shard_digests: list[str]) -> str:
    return _sha256(shard_digests)


def _taken_up_url(dataset: str, file: str) -> str:
    return storage.join(dataset, file.replace(".parquet", ".keys"))


@functools.lru_cache(maxsize=4)
def _row_groups(url: str):
    """An open Parquet file; its footer is read once a process."""
    import pyarrow.parquet as pq

    fs, path = storage.filesystem(url)
    return pq.ParquetFile(fs.open(path, "rb"))


def _sha256(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()
