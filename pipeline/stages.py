"""The stages of the Ray Data graph. Each takes and gives Arrow tables with a row for each utterance.

    Decode      plan rows of a codec batch: read, check, resample, and phonemise unless a recogniser comes first
    Transcribe  gives text to rows without (its own actors), then phonemises
    Encode      one codec batch at a time (actors that own the codec)
    Collect     one actor that holds rows back until their shard is complete
    Write       a shard's files, and one row about it

A row that cannot be used carries its reject from then on and is passed through, so that every stage counts it.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infra import storage
from pipeline.plan import Round, read_rows, shard_digest
from pipeline.shards import Sample, write_shard
from pipeline.tokenize_config import TokenizeConfig, signal_limits
from pipeline.utterances import Unusable


@dataclass(frozen=True)
class Job:
    """What every stage knows; small, sent to each worker once."""

    config: TokenizeConfig
    dataset: str
    audio_base: str
    rounds: tuple[Round, ...]
    codec: dict[str, Any]
    """The codec's identity."""
    facts: dict[str, Any]
    """What sidecars record of the software and the device."""

    def rows_of(self, shard: int) -> pa.Table:
        return read_rows(self.dataset, next(r for r in self.rounds if shard in r.shards), shard)


_REJECT = [("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
DECODED = pa.schema(
    [("shard", pa.int32()), ("row", pa.int32()), ("text", pa.string()), ("phones", pa.string())]
    + [("audio", pa.large_binary()), ("samples", pa.int64()), ("digest", pa.string()), *_REJECT]
    + [("decode_took", pa.float64())]
)
"""What `Decode` and `Transcribe` give: audio as the bytes of float32, and why a row cannot be used."""
PROGRESS = pa.schema(
    [("shard", pa.int32()), ("rows", pa.int64()), ("seconds", pa.float64()), ("rejects", pa.int64())]
    + [("decode_took", pa.float64()), ("encode_took", pa.float64())]
    + [("complete", pa.large_binary()), ("sidecar", pa.string())]
)
"""What `Collect` and `Write` report: rows and audio seconds that went through, and the CPU seconds they took."""


class Decode:
    """Plan rows of the batches asked for → float32 audio at the codec's rate, text and phonemes."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, batches: pa.Table) -> pa.Table:
        """`batches` has columns shard and batch."""
        rows = []
        for shard, batch in zip(*(batches[name].to_pylist() for name in ("shard", "batch")), strict=True):
            plan = self.job.rows_of(shard)
            for row in np.flatnonzero(plan["batch"].to_numpy() == batch):
                start = time.perf_counter()
                decoded = self.decoded(plan.slice(row, 1).to_pylist()[0])
                took = time.perf_counter() - start
                rows.append({"shard": shard, "row": int(row), **decoded, "decode_took": took})
        return pa.Table.from_pylist(rows, DECODED)

    def decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is known of a row of a plan after this stage: fields of `DECODED`, a reject's among them."""
        from pipeline.audio import clean_audio

        config = self.job.config
        rate = self.job.codec["sample_rate"]
        read = partial(
            clean_audio,
            storage.relative_to(self.job.audio_base, row["audio"]),
            row["start"],
            row["duration"],
            target_rate=rate,
            max_seconds=config.max_seconds,
            channel=row["channel"],
            limits=signal_limits(vars(config)),
        )
        try:
            wave = storage.patiently(read)
        except Unusable as error:
            return _reject("decode", error)
        except OSError as error:  # rejected, and can be retried from the quarantine
            return _reject("decode", Unusable("storage-error", f"the storage failed three times: {error}"))
        found = {
            "text": row["text"],
            "audio": wave.tobytes(),
            "samples": len(wave),
            "digest": _digest(wave, row["text"]),
        }
        if row["text"] is None and config.transcribe:
            return found
        return found | _phonemised(row["text"], len(wave) / rate, config)


class Transcribe:
    """Text for rows that have none, by a recogniser that is loaded once an actor."""

    def __init__(self, job: Job) -> None:
        from pipeline.transcription import Transcriber

        self.job = job
        self.recogniser = Transcriber(job.config.transcribe)

    def __call__(self, table: pa.Table) -> pa.Table:
        from pipeline.transcription import usable_text

        rate = self.job.codec["sample_rate"]
        rows = table.to_pylist()
        for row in rows:
            if row["text"] is None and row["reason"] is None:
                wave = np.frombuffer(row["audio"], dtype=np.float32)
                try:
                    row["text"] = usable_text(self.recogniser.listen(wave, rate))
                except Unusable as error:
                    row |= _reject("transcribe", error)
                else:
                    row |= _phonemised(row["text"], len(wave) / rate, self.job.config)
        return pa.Table.from_pylist(rows, DECODED)


class Encode:
    """One codec batch at a time, as the plan formed it."""

    def __init__(self, job: Job, codec: Any) -> None:
        """`codec` is a ResolvedCodec or a Ray reference to one: weights reach a node once, through the object store."""
        import ray
        import torch

        torch.set_num_threads(job.config.codec_threads)
        codec = ray.get(codec) if isinstance(codec, ray.ObjectRef) else codec
        self.codec = codec.build(job.config.device)
        self.codebooks = min(job.config.codebooks, codec.identity.codebooks)

    def __call__(self, table: pa.Table) -> pa.Table:
        usable = table["reason"].is_null().to_pylist()
        waves = [
            np.frombuffer(w.as_buffer(), dtype=np.float32) for w, u in zip(table["audio"], usable, strict=True) if u
        ]
        start = time.perf_counter()
        codes = iter(self.codec.encode(waves, self.codebooks) if waves else ())
        took = time.perf_counter() - start
        column = [next(codes).tobytes() if u else None for u in usable]
        return (
            table.drop_columns("audio")
            .append_column("codes", pa.array(column, pa.large_binary()))
            .append_column("encode_took", pa.array([took / max(len(usable), 1)] * len(usable), pa.float64()))
        )


class Collect:
    """Holds encoded rows back until their shard is complete, then passes the shard on as one row.

    There is one such actor. Should it die, the shards that it held stay without sidecar and are made again.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.expected: dict[int, int] = {}
        self.held: dict[int, dict[int, pa.Table]] = {}
        self.passed: set[int] = set()

    def __call__(self, table: pa.Table) -> pa.Table:
        rate = self.job.codec["sample_rate"]
        out = []
        for shard in sorted(set(table["shard"].to_pylist()) - self.passed):
            rows = table.filter(pa.array(np.asarray(table["shard"]) == shard))
            held = self.held.setdefault(shard, {})
            new = [i for i, row in enumerate(rows["row"].to_pylist()) if row not in held]
            held |= {rows["row"][i].as_py(): rows.slice(i, 1) for i in new}
            if shard not in self.expected:
                self.expected[shard] = len(self.job.rows_of(shard))
            complete = len(held) == self.expected[shard]
            rejected = sum(rows["reason"][i].is_valid for i in new)
            seconds = sum(rows["samples"][i].as_py() or 0 for i in new) / rate
            took = [sum(rows[name][i].as_py() for i in new) for name in ("decode_took", "encode_took")]
            payload = _to_ipc(pa.concat_tables(held.values()).sort_by("row")) if complete else None
            if complete:
                del self.held[shard]
                self.passed.add(shard)
            out.append((shard, len(new), seconds, rejected, *took, payload, None))
        return pa.Table.from_pylist([dict(zip(PROGRESS.names, row, strict=True)) for row in out], PROGRESS)


class Write:
    """Writes complete shards; passes progress through, with the sidecar in place of the shard."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, table: pa.Table) -> pa.Table:
        sidecars = [
            json.dumps(self._write(row["shard"], row["complete"])) if row["complete"] else None
            for row in table.select(["shard", "complete"]).to_pylist()
        ]
        none = pa.nulls(len(table), pa.large_binary())
        return pa.table([*table.columns[:-2], none, pa.array(sidecars, pa.string())], PROGRESS)

    def _write(self, shard: int, rows: bytes) -> dict[str, Any]:
        plan = self.job.rows_of(shard)
        samples, rejects, seen = [], [], {}
        for planned, row in zip(plan.to_pylist(), pa.ipc.open_stream(rows).read_all().to_pylist(), strict=True):
            if row["reason"] is None and row["digest"] in seen:
                row |= _reject(
                    "write", Unusable("duplicate-audio", f"audio and text equal those of {seen[row['digest']]}")
                )
            if row["reason"] is None:
                seen[row["digest"]] = planned["key"]
                samples.append(self._sample(planned, row))
            else:
                rejects.append(_quarantined(planned, row))
        facts = {"plan": shard_digest(plan), "codec": self.job.codec, **self.job.facts}
        return write_shard(self.job.dataset, shard, samples, rejects, facts)

    def _sample(self, planned: dict[str, Any], row: dict[str, Any]) -> Sample:
        codebooks = min(self.job.config.codebooks, self.job.codec["codebooks"])
        channel = {} if planned["channel"] is None else {"channel": planned["channel"]}
        meta = {
            "id": planned["id"],
            "text": row["text"],
            "speaker": planned["speaker"],
            "language": planned["language"],
            "seconds": round(row["samples"] / self.job.codec["sample_rate"], 6),
            "source": {name: planned[name] for name in ("audio", "start", "duration")} | channel,
            "extra": json.loads(planned["extra"] or "{}"),
        }
        codes = np.frombuffer(row["codes"], dtype=np.uint16).reshape(codebooks, -1)
        return Sample(planned["key"], codes, row["phones"] or "", meta)


def _phonemised(text: str | None, seconds: float, config: TokenizeConfig) -> dict[str, Any]:
    """The phones of a text, or the reject, held against the length of the audio."""
    from pipeline import phonemes

    if text is None:
        return {"phones": ""}
    try:
        phones = phonemes.phonemise(text)
        _check_rate("chars", len(text), seconds, config.min_chars_per_second, config.max_chars_per_second)
        _check_rate("phones", len(phones), seconds, 0.0, config.max_phones_per_second)
    except Unusable as error:
        return _reject("phonemise", error)
    return {"phones": phonemes.to_text(phones)}


def _check_rate(what: str, count: int, seconds: float, least: float, most: float) -> None:
    if not least <= count / seconds <= most:
        detail = f"{count} {what} in {seconds:.2f} s are {count / seconds:.1f} a second, outside {least:g} to {most:g}"
        raise Unusable(f"{what}-per-second", f"{detail}: the text is not that of the audio")


def _digest(wave: np.ndarray, text: str | None) -> str:
    """Equal for copies, whatever file they come from; every 16th sample tells as much and costs less."""
    return hashlib.blake2b(wave[::16].tobytes() + (text or "").encode(), digest_size=16).hexdigest()


def _reject(stage: str, error: Unusable) -> dict[str, str]:
    return {"stage": stage, "reason": error.reason, "detail": error.detail}


def _quarantined(planned: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    names = ("key", "id", "where", "audio", "start", "duration")
    return {name: planned[name] for name in names} | {name: row[name] for name in ("stage", "reason", "detail")}


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
