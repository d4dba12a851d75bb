"""A speaker's recordings become what a voice is tuned on: codes and phonemes, by the stages of `jobs/tokenize.py`.

The codes are a function of the recordings in their order, the settings and the codec. What cannot be used is left out,
with its reason; only a speaker of whom nothing is left is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import storage
from pipeline.stages import DECODED, Decode, Encode, Job, Transcribe
from pipeline.tokenize_config import TokenizeConfig
from pipeline.utterances import Reject, Unusable, Utterance

if TYPE_CHECKING:
    from model.voice_samples import Sample
    from pipeline.enroll_config import EnrollConfig


@dataclass(frozen=True)
class Encoded:
    """One utterance of a speaker, encoded."""

    codes: np.ndarray
    """uint16 [K, frames]."""
    phones: str
    """As a `.phones.txt` member holds them."""
    text: str
    seconds: float
    source: Utterance
    """What of which recording it is: of one that was cut, a part."""

    @property
    def where(self) -> str:
        return _place(self.source)

    def to_request(self) -> dict[str, Any]:
        """As the enrollment stage takes it."""
        return {"codes": self.codes, "phones": self.phones}


def settings_of(config: EnrollConfig, codebooks: int, device: str) -> TokenizeConfig:
    """How a job's speakers are read and encoded."""
    return TokenizeConfig(**config.token_settings(), codebooks=codebooks, device=device, codec_threads=config.threads)


class SampleEncoder:
    """Reads, transcribes where text is missing, and encodes; for one process, or as a Ray actor.

    Args:
        config: of its fields, those that say how utterances are read, checked and encoded.
        codec: a ResolvedCodec, or a Ray reference to one.
        identity: the codec's, as plain values.

    Raises:
        TranscriptionUnavailable: `config.transcribe` names a recogniser that cannot be had.
    """

    def __init__(self, config: TokenizeConfig, codec: Any, identity: dict[str, Any]) -> None:
        job = Job(config, dataset="", audio_base="", rounds=(), codec=identity, facts={})
        self.config, self.rate = config, identity["sample_rate"]
        self._decode = Decode(job)
        self._transcribe = Transcribe(job) if config.transcribe else None
        self._encode = Encode(job, codec)

    def encode(self, samples: Sequence[Utterance]) -> tuple[list[Encoded], list[Reject]]:
        """What can be used of a speaker's samples, in order, and what cannot. Never fails because of one."""
        rejects: list[Reject] = []
        encoded: list[Encoded] = []
        seen: dict[str, str] = {}
        for rows in self._batches(self._pieces(samples, rejects)):
            encoded += self._encoded(rows, seen, rejects)
        return encoded, rejects

    def _pieces(self, samples: Sequence[Utterance], rejects: list[Reject]) -> Iterator[Utterance]:
        for sample in samples:
            try:
                yield from self._cut(sample)
            except (Unusable, OSError) as error:
                rejects.append(_reject(sample, "segment", error))

    def _cut(self, sample: Utterance) -> list[Utterance]:
        """The utterance, or, where it is long and nobody has transcribed it, its parts between pauses."""
        if sample.text is not None or sample.start or sample.duration or not self.config.transcribe:
            return [sample]
        from pipeline.audio import probe
        from pipeline.segmentation import cut, quietest_place, vad_spans

        config, url = self.config, sample.audio
        if storage.patiently(partial(probe, url)).seconds <= config.max_seconds:
            return [sample]
        spans, quietest = storage.patiently(partial(vad_spans, url)), quietest_place(url)

        def place(earliest: float, latest: float) -> float:
            return storage.patiently(partial(quietest, earliest, latest))

        segments = cut(spans, config.segment_seconds, config.max_seconds, config.max_silence, place)
        if not segments:
            raise Unusable("no-speech", f"{url}: nothing that sounds like speech")
        return [sample._replace(start=segment.start, duration=segment.duration) for segment in segments]

    def _batches(self, samples: Iterator[Utterance]) -> Iterator[list[tuple[Utterance, dict[str, Any]]]]:
        """Decoded rows, as many as the codec encodes at once: within `batch_seconds` of padded audio."""
        rows: list[tuple[Utterance, dict[str, Any]]] = []
        longest = 0
        for sample in samples:
            row = self._decode.decoded({name: getattr(sample, name) for name in _READ})
            size = row.get("samples") or 0
            longest = max(longest, size)
            if rows and (len(rows) + 1) * longest > self.config.batch_seconds * self.rate:
                yield rows
                rows, longest = [], size
            rows.append((sample, row | {"row": len(rows)}))
        if rows:
            yield rows

    def _encoded(
        self, rows: list[tuple[Utterance, dict[str, Any]]], seen: dict[str, str], rejects: list[Reject]
    ) -> Iterator[Encoded]:
        import pyarrow as pa

        table = pa.Table.from_pylist([row for _, row in rows], DECODED)
        if self._transcribe:
            table = self._transcribe(table)
        usable = []
        for (sample, _), row in zip(rows, table.drop_columns("audio").to_pylist(), strict=True):
            try:
                _check(row, seen)
            except Unusable as error:
                rejects.append(_reject(sample, row["stage"] or "decode", error))
            else:
                seen[row["digest"]] = _place(sample)
                usable.append(row["row"])
        if not usable:
            return
        table = self._encode(table.take(usable))
        for row in table.drop_columns(["digest"]).to_pylist():
            codes = np.frombuffer(row["codes"], dtype=np.uint16).reshape(self._encode.codebooks, -1)
            yield Encoded(codes, row["phones"], row["text"], row["samples"] / self.rate, rows[row["row"]][0])


def to_samples(requested: Sequence[dict[str, Any]], ids: dict[str, int]) -> list[Sample]:
    """Samples as the tuner takes them.

    Args:
        requested: `codes`, uint16 [K, frames], and `phones`, a line, of each.
        ids: the model's numbers of phonemes, `<bos>` and `<eos>` among them.

    Raises:
        Unusable: `bad-samples`: a field that is missing or of the wrong type, a phoneme that the model lacks.
    """
    import torch

    from model.voice_samples import Sample
    from pipeline.phonemes import BOS, EOS

    made = []
    for place, sample in enumerate(requested):
        try:
            phones = [ids[phone] for phone in (BOS, *sample["phones"].split(), EOS)]
            codes = np.asarray(sample["codes"])
        except (KeyError, TypeError, AttributeError) as error:
            raise Unusable("bad-samples", f"sample {place} needs codes and phones of the model: {error!r}") from None
        if codes.dtype.kind not in "ui" or codes.ndim != 2:
            raise Unusable(
                "bad-samples", f"sample {place}: codes must be integers [K, frames], not {codes.dtype} {codes.shape}"
            )
        made.append(Sample(torch.tensor(phones), torch.from_numpy(codes.astype(np.int64))))
    return made


_READ = ("audio", "start", "duration", "channel", "text")


def _check(row: dict[str, Any], seen: dict[str, str]) -> None:
    """Raises Unusable."""
    if row["reason"] is not None:
        raise Unusable(row["reason"], row["detail"])
    if not row["phones"]:
        raise Unusable("no-text", "nobody has transcribed it: give its text, or a recogniser by --transcribe")
    if row["digest"] in seen:
        raise Unusable("duplicate-audio", f"audio and text equal those of {seen[row['digest']]}")


def _place(sample: Utterance) -> str:
    return sample.where or sample.audio


def _reject(sample: Utterance, stage: str, error: Exception) -> Reject:
    reason, detail = getattr(error, "reason", "storage-error"), getattr(error, "detail", str(error))
    return Reject(sample.speaker, stage, reason, detail, _place(sample))
