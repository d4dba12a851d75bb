"""Where a codec's weights come from: a name on the command line becomes a config and checked bytes.

Weights are never guessed. `encodec_24khz` means EnCodec's published file or one with the same digest, `demo` and
`demo-6k` the codecs in this repository, anything else a folder; where nothing can be had, the error says what can be
done.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import storage
from model.codec import CONFIG_FILE, WEIGHTS_FILE, Codec, read_config, weights_from_training
from model.codec_config import ENCODEC_24KHZ, CodecConfig, CodecError, CodecIdentity

ENCODEC_URL = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"
ENCODEC_SHA256 = "d7cc33bc"
"""How the sha256 of EnCodec's published file starts: the file's name says it."""


@dataclass(frozen=True)
class Embedded:
    """A codec in this repository."""

    folder: Path
    digest: str
    """sha256 of its weights; changes with every retraining."""
    codes: str
    """Digest of its identity; stays where the decoder alone was trained."""


_WEIGHTS = Path(__file__).parent.parent / "model" / "weights"
EMBEDDED = {
    "demo": Embedded(
        _WEIGHTS / "codec-demo",
        "54ecd342a62f80d6cb5b81574f247fd2e0dd38aa61a25828a23f2719335ec641",
        "9f1a95f954e57049a9d83eedcd00c6e83aa87203bebf3e72c7b48d754224670b",
    ),
    "demo-6k": Embedded(
        _WEIGHTS / "codec-demo-6k",
        "5df2d6b50d60cdb3afa6b62f8baebedbacf2cd61a40c1a6c7bd92f554fd32b01",
        "be6d21f2e55cd78674817b14438af0056c0779748b4228f1f730e16ed2cd6938",
    ),
}
"""By name: one whose first codebook alone carries words, for small language models, and one of EnCodec's shape."""
NAMES = ("encodec_24khz", *EMBEDDED)
"""Codecs that are known by name; every other one is a folder."""


@dataclass(frozen=True)
class ResolvedCodec:
    """All that a worker needs to build the codec; small enough to go through Ray's object store once."""

    config: CodecConfig
    weights: bytes
    """A safetensors file."""
    identity: CodecIdentity
    digest: str
    """sha256 of all weights, the decoder's, too."""

    def build(self, device: str = "cpu", dtype: str = "float32", threads: int | None = None) -> Codec:
        return Codec(self.config, self.weights, device, dtype, self.digest, threads)


def resolve(name: str = "encodec_24khz", weights: str | None = None) -> ResolvedCodec:
    """Finds, fetches and checks the codec that `--codec NAME` and `--codec-weights PATH|URL` ask for.

    Args:
        name: one of `NAMES`, or the path or URL of a folder with `config.json` and `model.safetensors`.
        weights: for `encodec_24khz`: where EnCodec's own file lies, instead of downloading it.

    Raises:
        CodecError: nothing there, wrong digest, damaged or hostile file, another architecture.
    """
    if name == "encodec_24khz":
        return _resolved(ENCODEC_24KHZ, _encodec_weights(_encodec_file(weights)))
    if weights is not None:
        raise CodecError(
            f"--codec-weights goes with --codec encodec_24khz; codec {name!r} has its weights in its folder"
        )
    if embedded := EMBEDDED.get(name):
        return _from_folder(str(embedded.folder), embedded.digest)
    if "/" not in name and not storage.exists(name):
        raise CodecError(f"unknown codec {name!r}: known are {', '.join(NAMES)}, or a folder with {CONFIG_FILE}")
    return _from_folder(name, None)


def published(weights: str | None) -> ResolvedCodec | None:
    """EnCodec's 24 kHz codec where its weights are at hand, in `weights` or in the cache; nothing is fetched.

    Raises:
        CodecError: as `resolve`, of a file that is there.
    """
    if weights is None and not _cached().exists():
        return None
    return resolve("encodec_24khz", weights)


def _resolved(config: CodecConfig, weights: bytes, digest: str | None = None) -> ResolvedCodec:
    codec = Codec(config, weights, digest=digest)
    return ResolvedCodec(config, weights, codec.identity, codec.digest)


def _from_folder(folder: str, digest: str | None) -> ResolvedCodec:
    content = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        url = storage.join(folder, name)
        try:
            content.append(storage.read_bytes(url))
        except (OSError, ValueError, ImportError) as error:
            raise CodecError(
                f"{folder} is no codec: {name} cannot be read ({error}); a codec is a folder with "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}"
            ) from None
    return _resolved(read_config(content[0]), content[1], digest)


def _encodec_file(weights: str | None) -> bytes:
    """EnCodec's published file: from `weights`, the cache, or downloaded once and cached; its sha256 is checked."""
    if weights is not None:
        try:
            content = storage.read_bytes(weights)
        except (OSError, ValueError, ImportError) as error:
            raise CodecError(f"--codec-weights {weights}: cannot be read ({error})") from None
        return _checked(content, f"--codec-weights {weights}")
    cached = _cached()
    if cached.exists():
        return _checked(cached.read_bytes(), f"{cached} (delete it to download it again)")
    try:
        content = storage.read_bytes(ENCODEC_URL)
    except Exception as error:  # aiohttp, SSL, DNS, HTTP status: every one means that it cannot be had
        raise CodecError(
            f"EnCodec's weights are not at hand: {ENCODEC_URL} cannot be fetched ({type(error).__name__}: {error}). "
            "Either give the file with --codec-weights PATH|URL, or use a codec in this repository: --codec demo-6k, "
            "which has the same frames and codebooks, or --codec demo"
        ) from None
    content = _checked(content, ENCODEC_URL)
    storage.write_bytes(str(cached), content)
    return content


def _cached() -> Path:
    return storage.cache_folder() / posixpath.basename(ENCODEC_URL)


def _checked(content: bytes, where: str) -> bytes:
    actual = hashlib.sha256(content).hexdigest()
    if not actual.startswith(ENCODEC_SHA256):
        raise CodecError(
            f"{where}: sha256 is {actual[:16]}…, EnCodec's 24 kHz weights start with {ENCODEC_SHA256}: "
            "the file is damaged or another one"
        )
    return content


def _encodec_weights(content: bytes) -> bytes:
    import torch

    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its reader met
        raise CodecError(f"EnCodec's weights are no state dict of PyTorch: {error}") from None
    return weights_from_training(ENCODEC_24KHZ, state)
