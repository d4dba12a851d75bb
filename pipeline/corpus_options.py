"""How a job is told what corpus it reads, beside its path: the same options wherever a corpus comes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.config import option

if TYPE_CHECKING:
    from pipeline.manifests import Manifest


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """The part of a job's configuration that says what its input is. Raises ValueError naming the field at fault."""

    kind: str = option(
        "auto",
        "what the manifest or folder is",
        ("auto", "jsonl", "csv", "tsv", "parquet", "lhotse", "libriheavy", "librilight"),
    )
    corpus: str | None = option(
        None,
        "run lhotse's recipe for this corpus over --root",
        ("librispeech", "libritts", "ljspeech", "vctk", "mls", "librilight"),
    )
    root: str | None = option(None, "folder of the corpus that --corpus names")
    audio_root: str | None = option(None, "folder that replaces the prefix of the audio paths in Libriheavy's cuts")

    def __post_init__(self) -> None:
        if self.corpus and not self.root:
            raise ValueError("root is missing: --corpus needs --root, the folder of that corpus")

    def open_corpus(self, input: str, **cutting: float) -> Manifest:
        """The corpus in `root`, if `corpus` names one, else `input`; `cutting` as in `open_manifest`.

        Raises:
            ManifestError: nothing is there, or nothing of a known kind.
        """
        from pipeline.manifests import open_manifest

        source = self.root if self.corpus else input
        return open_manifest(source, kind=self.kind, corpus=self.corpus, audio_root=self.audio_root, **cutting)
