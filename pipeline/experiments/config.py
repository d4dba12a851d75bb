"""What an experiment is told: a model, speakers or data, and the grid. The defaults take minutes on two cores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from infra import tracking
from infra.config import option
from pipeline.enroll_config import EnrollConfig
from pipeline.synthesize_config import DEMO_MODEL

NAMES = ("gla-vs-attention", "ist-ablation", "data-amount", "robustness")
CONDITIONS = ("clean", "noise", "reverb", "level")
"""What may be done to enrollment data; the last three with a number behind: `noise:10`."""
_MOST_PEOPLE = {"robustness": 20}
_PEOPLE = 4


@dataclass(frozen=True, kw_only=True)
class ExperimentsConfig:
    """The grids of all experiments; each reads what concerns it."""

    output: str = option("out/experiments", "folder of results, plots and the report; any fsspec URL")
    model: str = option(DEMO_MODEL, "folder of an exported model; any fsspec URL that every node reads")
    codec: str | None = option(
        None, "encodec_24khz, demo, demo-6k or a folder (default: the model's, if that has a name)"
    )
    codec_weights: str | None = option(None, "path or URL of EnCodec's own weights, for machines without internet")
    speakers: str | None = option(None, "unseen speakers, as jobs/enroll.py reads them: JSONL, or a folder")
    consent_file: str | None = option(None, "their consent records, or one for all: who, when, scope")
    transcribe: str | None = option(None, "recogniser for samples without text: a faster-whisper name or a folder")
    people: int | None = option(None, "speakers taken, the first ones (default: 4; robustness: 20)")
    held_out: float = option(0.25, "share of a speaker's samples that losses are measured on, and nothing is tuned on")
    held_out_most: int = option(8, "samples held out of a speaker at most")
    together: int = option(4, "speakers that one unit of work tunes at once: what a kill loses; GPUs want many")

    steps: int = option(30, "of tuning; the paper takes 100")
    batch: int = option(8, "samples of a speaker a step")
    eval_every: int = option(10, "steps between two looks at what is held out")
    ranks: tuple[int, ...] = option((1, 4, 0), "of tuned memories; 0 is whole matrices")
    lrs: tuple[float, ...] = option((0.03125, 0.125), "learning rates of memories")
    lora_ranks: tuple[int, ...] = option((4,), "of additions to weights")
    lora_lrs: tuple[float, ...] = option((0.003,), "learning rates of such additions")
    full_lrs: tuple[float, ...] = option((0.0003,), "learning rates where all weights are tuned")
    prompts: tuple[int, ...] = option((1, 3), "samples that a prompt is made of")
    prompt_sets: int = option(4, "different prompts of each kind, which losses are averaged over")
    amounts: tuple[float, ...] = option((3.0, 5.0, 10.0, 20.0, 40.0, 80.0), "seconds of data-amount, and then all")
    conditions: tuple[str, ...] = option(
        ("noise:20", "noise:10", "noise:0", "reverb:0.5", "level:-20"),
        "of robustness, beside clean: noise at an SNR in dB, reverb of an RT60 in s, level in dB",
    )
    seeds: int = option(3, "repetitions of robustness on clean data; twins of gla-vs-attention are trained with one")
    seed: int = option(0, "of everything random")

    listen: int = option(0, "speakers that are also heard and judged, which needs the eval extra")
    sentences: int = option(2, "that each voice says where it speaks")
    recogniser: str = option("whisper-base", "faster-whisper model that judges, by name or folder")

    data: str | None = option(None, "gla-vs-attention: token dataset of the twins (default: they stay untrained)")
    twin_of: str | None = option(
        None, "exported model that is one of the twins; the other is trained on --data by its recipe, not by these"
    )
    preset: str = option("tiny", "sizes of the twins: a preset of jobs/pretrain.py, or a JSON file")
    codebooks: int = option(4, "codebooks of the twins")
    train_steps: int = option(200, "of the twins")
    budget: int = option(2048, "model steps of audio in a batch of theirs")
    accumulate: int = option(1, "micro-batches of theirs a step")
    learning_rate: float = option(0.001, "of theirs")
    warmup: int = option(20, "steps to their full learning rate")
    precision: str = option("auto", "of their training; auto: bf16 on GPUs, fp32 on CPUs", ("auto", "fp32", "bf16"))
    valid_fraction: float = option(0.05, "share of the utterances that they are compared on")
    valid_most: int = option(64, "utterances that they are compared on at most")
    batches: tuple[int, ...] = option((1, 4, 16), "rows that speak at once, for time and memory")
    seconds: tuple[float, ...] = option((1.0, 2.0, 4.0, 8.0), "of speech at which time and memory are read")

    clock: str = option("wall", "of decoding; cpu counts a machine's other work less, not for GPUs", ("wall", "cpu"))

    device: str = option("auto", "where models run", ("auto", "cpu", "cuda"))
    threads: int = option(1, "CPU threads, and CPUs, of a unit of work")
    gpus: float = option(1.0, "GPUs of a unit of work on --device cuda")
    tracking: str = option("", tracking.OPTION)
    experiment: str = option("experiments", "MLflow experiment")

    def __post_init__(self) -> None:
        low = {"together": 1, "steps": 1, "batch": 1, "eval_every": 1, "prompt_sets": 1, "seeds": 1, "listen": 0}
        low |= {"sentences": 1, "train_steps": 1, "budget": 1, "accumulate": 1, "valid_most": 1, "threads": 1}
        low |= {"held_out_most": 1, "codebooks": 1, "warmup": 0, "seed": 0}
        for field, least in low.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, not {getattr(self, field)}")
        if self.people is not None and self.people < 1:
            raise ValueError(f"people must be at least 1, not {self.people}")
        for field in ("lrs", "lora_lrs", "full_lrs", "amounts", "seconds", "batches", "prompts", "lora_ranks"):
            self._require(field, lambda value: 0 < value < math.inf, "above 0")
        self._require("ranks", lambda value: value >= 0, "at least 0")
        for field in ("held_out", "valid_fraction"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(f"{field} must be above 0 and below 1, not {getattr(self, field)}")
        if not 0 < self.learning_rate < math.inf or not self.gpus > 0:
            raise ValueError("learning_rate and gpus must be above 0")
        if self.twin_of and not self.data:
            raise ValueError("twin_of needs data: the dataset that this model was trained on")
        for condition in self.conditions:
            condition_of(condition)

    def _require(self, field: str, holds, what: str) -> None:
        values = getattr(self, field)
        if len(set(values)) != len(values) or not all(holds(value) for value in values):
            raise ValueError(f"{field} must be different numbers {what}, not {', '.join(map(str, values))}")

    def people_of(self, name: str) -> int:
        """How many speakers an experiment takes."""
        return self.people or _MOST_PEOPLE.get(name, _PEOPLE)

    def enrolling(self) -> EnrollConfig:
        """How speakers are read and encoded: as `jobs/enroll.py` does it. Raises ValueError without --speakers."""
        given = ("speakers", "consent_file", "model", "codec", "codec_weights", "transcribe", "threads")
        return EnrollConfig(**{name: getattr(self, name) for name in given}, tracking="none")


def condition_of(text: str) -> tuple[str, float]:
    """(kind, number) of a condition; `clean` has number 0. Raises ValueError."""
    kind, colon, number = text.partition(":")
    try:
        value = float(number) if colon else 0.0
    except ValueError:
        value = math.nan
    if kind not in CONDITIONS or bool(colon) == (kind == "clean") or not math.isfinite(value):
        raise ValueError(f"conditions: {text!r} is not clean, noise:DB, reverb:SECONDS or level:DB")
    if kind == "reverb" and not 0 < value <= 10:
        raise ValueError(f"conditions: a room with an RT60 of {value:g} s is not above 0 and at most 10")
    return kind, value
