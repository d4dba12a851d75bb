"""What an evaluation is told."""

from __future__ import annotations

from dataclasses import dataclass

from infra import tracking
from infra.config import option
from pipeline.utterances import Unusable


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """A set that systems say, and how they are judged."""

    set: str = option(
        "",
        "JSONL with id, text and, if any, voice (a name in --voices), prompt and prompt_text (a recording whose voice "
        "is asked for and compared with, and its words), reference (the text said by a person); paths relative to the "
        "file; or seed-tts-eval's .lst; any fsspec URL",
    )
    systems: tuple[str, ...] = option((), "`name=folder` of recordings named by the items' ids")
    model: str | None = option(None, "folder of an exported model, which says the set first, as a system of its own")
    voices: str | None = option(None, "folder of the voices that items name, for --model")
    prompts: str = option(
        "continue",
        "what --model does with prompts of items without a voice: goes on from them, which needs their words, or says "
        "the text in its own voice",
        ("continue", "ignore"),
    )
    codec: str | None = option(
        None, "encodec_24khz, demo, demo-6k or a folder: references through it are a system, too"
    )
    codec_weights: str | None = option(None, "path or URL of EnCodec's own weights")
    codebooks: int | None = option(None, "of --codec that are kept (default: all)")
    output: str = option("out/evaluation", "folder of report, scores and speech; any fsspec URL")
    recogniser: str = option("whisper-base", "faster-whisper model, by name or folder")
    seed: int = option(0, "of what --model says")
    actors: int | None = option(None, "judges at most (default: one a CPU of the cluster)")
    chunk: int = option(16, "recordings that a judge takes at a time; what is lost with it")
    max_missing: float = option(0.0, "exit code 3 if a larger share of a system's recordings is missing")
    meta: str | None = option(None, "also write the set as seed-tts-eval's meta.lst, here")
    name: str = option("evaluation", "of the run")
    experiment: str = option("evaluate", "MLflow experiment")
    tracking: str = option("", tracking.OPTION)

    def __post_init__(self) -> None:
        if not self.set:
            raise ValueError("name what is to be said with --set")
        self.folders()
        if not 0 <= self.max_missing <= 1 or self.chunk < 1:
            raise ValueError("max_missing must be from 0 to 1 and chunk at least 1")

    def folders(self) -> dict[str, str]:
        """System -> folder, of those that were named. Raises ValueError."""
        from pipeline.keys import key_of

        found: dict[str, str] = {}
        for text in self.systems:
            name, equals, folder = text.partition("=")
            try:
                key_of(name)
            except Unusable as error:
                raise ValueError(f"systems: {error.detail}") from None
            if not equals or not folder or name in found or name in RESERVED:
                raise ValueError(f"systems: {text!r} is no `name=folder` with a name of its own (taken: {RESERVED})")
            found[name] = folder
        return found


REFERENCE, RECONSTRUCTION, MODEL = "reference", "codec", "model"
RESERVED = (REFERENCE, RECONSTRUCTION, MODEL)
"""Systems that are not folders of recordings."""
