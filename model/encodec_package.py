"""EnCodec's own network classes, importable where torchaudio's compiled extension is not.

`encodec` imports torchaudio for resampling and for its training spectrograms, which are plain PyTorch. The wheel of
torchaudio on the package index is built against CUDA, and beside a CPU build of torch its extension cannot be loaded.
Only then, a module that says "no extension" takes the extension's place, and the rest is the real torchaudio.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from typing import Any


@functools.cache
def seanet() -> Any:
    """The module with `SEANetEncoder` and `SEANetDecoder`."""
    return _submodule("encodec.modules.seanet")


@functools.cache
def discriminators() -> Any:
    """The module with `MultiScaleSTFTDiscriminator`."""
    return _submodule("encodec.msstftd")


@functools.cache
def package() -> Any:
    """The package itself, with `EncodecModel`."""
    return _submodule("encodec")


def _submodule(name: str) -> Any:
    warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
    try:
        importlib.import_module("torchaudio")
    except OSError:
        for loaded in [m for m in sys.modules if m == "torchaudio" or m.startswith("torchaudio.")]:
            del sys.modules[loaded]
        sys.modules["torchaudio._extension"] = _no_extension()
    return importlib.import_module(name)


def _no_extension() -> types.ModuleType:
    def unavailable(function):
        @functools.wraps(function)
        def refuse(*_args, **_kwargs):
            raise RuntimeError(
                f"{function.__name__} needs torchaudio's compiled extension, which cannot be loaded here"
            )

        return refuse

    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension._IS_ALIGN_AVAILABLE = False
    extension.fail_if_no_align = unavailable
    return extension
