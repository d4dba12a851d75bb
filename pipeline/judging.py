"""The stage that judges recordings: what a recogniser understands, whose voice it sounds like, how good it sounds."""

from __future__ import annotations

import functools
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from infra import storage
from pipeline import json_lines, measures
from pipeline.evaluation import voice_of
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    import numpy as np

    from pipeline.codec_weights import ResolvedCodec

FOLDER = ".scores"
"""Of the output, for the judgements of each chunk."""
LONGEST = 600.0
"""Seconds of a recording that is read."""


class Task(NamedTuple):
    """A system's recording of one item."""

    system: str
    id: str
    text: str
    recording: str
    """URL; empty where the system has none."""
    likeness: str
    """URL of the recording whose voice was asked for; may be empty."""
    through_codec: bool = False
    """Judge what the codec makes of the recording."""


class Chunk(NamedTuple):
    """Tasks that a judge takes at a time."""

    name: str
    """Number and digest of all that the judgements depend on."""
    tasks: tuple[Task, ...]


class Judge:
    """An actor that owns the models that judge; a call is a chunk, whose judgements go into a file of its own.

    Args:
        output: of the evaluation.
        recogniser: as `pipeline.transcription` names models.
        codec: (ResolvedCodec, codebooks), or a Ray reference to them, for tasks that ask for it.
    """

    def __init__(self, output: str, recogniser: str, codec: Any = None) -> None:
        import ray
        import torch

        from pipeline.transcription import Transcriber

        torch.set_num_threads(1)
        self.output = output
        self.recognise = Transcriber(recogniser, threads=1).transcribe
        found: tuple[ResolvedCodec, int | None] | None = ray.get(codec) if isinstance(codec, ray.ObjectRef) else codec
        self.codec, self.codebooks = (found[0].build("cpu"), found[1]) if found else (None, None)
        self.print_of = functools.lru_cache(maxsize=512)(self._print_of)

    def __call__(self, table):
        """`table` has a column chunk, of `Chunk` as JSON; gives the columns rows, the judgements, and lost: why there
        are none."""
        import pyarrow as pa

        rows, lost = [], []
        for chunk in table["chunk"].to_pylist():
            try:
                rows.append(json.dumps(self.judged(json.loads(chunk))))
                lost.append(None)
            except OSError as error:
                rows.append(None)
                lost.append(str(error))
        return pa.table({"rows": pa.array(rows, pa.large_string()), "lost": pa.array(lost, pa.large_string())})

    def judged(self, chunk: Any) -> list[dict[str, Any]]:
        """Judgements of a chunk, written; in its order. Raises OSError: the storage failed, and nothing is written."""
        name, rows = chunk[0], [self.judge(Task(*task)) for task in chunk[1]]
        json_lines.write(storage.join(self.output, FOLDER, f"{name}.jsonl"), rows)
        return rows

    def judge(self, task: Task) -> dict[str, Any]:
        """One judgement: words, errors, likeness, mos, dnsmos, seconds; or why there is no recording, and all words
        and characters as errors.

        Raises:
            OSError: the storage failed, which says nothing of the recording.
        """
        row: dict[str, Any] = {"system": task.system, "id": task.id, "text": task.text}
        try:
            samples, rate = self._recording(task)
        except Unusable as error:
            nothing = measures.count_errors(task.text, "")
            return row | nothing._asdict() | {"missing": str(error), "likeness": 0.0 if task.likeness else None}
        heard = self.recognise(samples, rate)
        row |= {"heard": heard, **measures.count_errors(task.text, heard)._asdict(), "seconds": len(samples) / rate}
        row |= {"mos": measures.predicted_mos(samples, rate), "dnsmos": measures.dnsmos(samples, rate)}
        row["likeness"] = self._likeness(task, samples, rate)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}

    def _recording(self, task: Task) -> tuple[np.ndarray, int]:
        """Raises Unusable, OSError."""
        if not task.recording:
            raise Unusable("no-recording", "the system has no file for this id")
        samples, rate = _read(task.recording)
        if not task.through_codec:
            return samples, rate
        from pipeline.audio import resample

        target = self.codec.config.sample_rate
        original = resample(samples, rate, target)
        (decoded,) = self.codec.decode(self.codec.encode([original], self.codebooks))
        return self.codec.beside(decoded, original), target

    def _likeness(self, task: Task, samples: np.ndarray, rate: int) -> float | None:
        """None where there is nothing to compare with, 0 where no voice is heard."""
        if not task.likeness or (task.likeness == task.recording and not task.through_codec):
            return None
        asked = self.print_of(task.likeness)
        if asked is None:
            return None
        found = voice_of(samples, rate)
        return 0.0 if found is None else measures.similarity(asked, found)

    def _print_of(self, url: str) -> np.ndarray | None:
        """Raises OSError."""
        try:
            return voice_of(*_read(url))
        except Unusable:
            return None


def _read(url: str) -> tuple[np.ndarray, int]:
    from pipeline.audio import read_segment

    samples, rate = storage.patiently(lambda: read_segment(url, max_seconds=LONGEST))
    if not len(samples):
        raise Unusable("empty", f"{url} holds no sample")
    return samples, rate
