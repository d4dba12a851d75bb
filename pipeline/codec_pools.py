"""The speech that a codec is trained and validated on: read from a corpus once, and kept with what the corpus was."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import storage
from model.codec_config import CodecError
from pipeline.speech_pool import SpeechPool

if TYPE_CHECKING:
    from pipeline.manifests import Manifest
    from pipeline.train_codec_config import TrainCodecConfig

_HELD_OUT = ("heldout", "test")
"""Values of a manifest's `split` column that are never trained on."""
_VALID_EVERY, _VALID_MOST = 50, 16
"""Every so many usable utterances one is kept to validate on, so many at most."""


def make_pools(config: TrainCodecConfig) -> None:
    """Reads, checks and resamples the corpus once into `output`/pool and /valid; prints what was left out and why.

    Raises:
        CodecError: no usable speech, or `output` holds that of another corpus.
        ManifestError: the corpus cannot be read.
    """
    output = Path(storage.absolute(config.output))
    note = output / "data.json"
    made = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    manifest = config.open_corpus(config.data)
    fingerprint = manifest.fingerprint(made and made.get("manifest"))
    if made:
        _require_same(made.get("manifest", {}), fingerprint, note)
        return
    rejects: Counter[str] = Counter()
    rate = config.codec().sample_rate
    train = SpeechPool.write(output / "pool", _waves(manifest, rate, rejects, valid=False), rate)
    valid = SpeechPool.write(output / "valid", _waves(manifest, rate, Counter(), valid=True), rate)
    facts = {
        "manifest": fingerprint,
        "seconds": train.seconds,
        "utterances": len(train.ends),
        "digest": train.digest,
        "valid_utterances": len(valid.ends),
        "rejects": dict(rejects),
    }
    storage.write_text(str(note), json.dumps(facts, indent=2) + "\n")
    print(
        f"train_codec: {train.seconds / 3600:.2f} h of speech in {len(train.ends)} utterances, rejects {dict(rejects)}"
    )


def _require_same(made: dict[str, Any], now: dict[str, Any], note: Path) -> None:
    """A corpus may have moved, but not changed. Raises CodecError with what differs."""
    if all(made.get(name) == now[name] for name in ("kind", "sha256")):
        return
    from pipeline.plan import differences

    shown = ("url", "kind", "size", "sha256")
    changed = differences({name: made.get(name) for name in shown}, {name: now[name] for name in shown})
    raise CodecError(
        f"{note.parent} holds the speech of another corpus, or of this one before it changed ({'; '.join(changed)}); "
        f"choose another --output, or delete {note} to read the corpus again"
    )


def _waves(manifest: Manifest, rate: int, rejects: Counter[str], valid: bool) -> Iterator[np.ndarray]:
    """Usable utterances of the corpus, to train on or to validate on. Raises CodecError: there are none."""
    taken = 0
    for number, wave in enumerate(_usable(manifest, rate, rejects)):
        if wave is not None and (number % _VALID_EVERY == 0) == valid:
            yield wave
            taken += 1
        if valid and taken == _VALID_MOST:
            return
    if not taken:
        purpose = "validate" if valid else "train"
        raise CodecError(
            f"{manifest.url} has no usable speech to {purpose} on, for which two utterances are the least; rejects "
            f"{dict(rejects)}"
        )


def _usable(manifest: Manifest, rate: int, rejects: Counter[str]) -> Iterator[np.ndarray | None]:
    """Utterances, but for those that are held out, as float32 [samples]; counts the others in `rejects` by reason.

    None stands for one that the storage does not give: it may give it in another pass, and numbers must not change.
    """
    from pipeline.audio import clean_audio
    from pipeline.utterances import Reject, Unusable

    for row in manifest:
        if isinstance(row, Reject):
            rejects[row.reason] += 1
            continue
        if row.extra.get("split") in _HELD_OUT:
            continue
        read = partial(clean_audio, row.audio, row.start, row.duration, target_rate=rate, channel=row.channel)
        try:
            wave = storage.patiently(read)
        except Unusable as unusable:
            rejects[unusable.reason] += 1
            continue
        except OSError:
            rejects["storage-error"] += 1
            wave = None
        yield wave
