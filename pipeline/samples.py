"""Samples read back from a finished dataset: with their recordings, and through the codec that made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from infra import storage
from pipeline import shards
from pipeline.plan import Plan, differences
from pipeline.tokenize_config import signal_limits
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    from model.codec import Codec


def codec_of(plan: Plan, source: str | None = None, weights: str | None = None, fetch: bool = True) -> Codec:
    """The codec that a dataset was made with, from where it was then or from `source`.

    Args:
        fetch: whether EnCodec's weights may be downloaded where they are not at hand.

    Raises:
        CodecError: it cannot be had, or is another one.
    """
    from model.codec_config import CodecError
    from pipeline.codec_weights import published, resolve

    source = source or plan.codec_source
    if fetch or source != "encodec_24khz":
        codec = resolve(source, weights)
    elif (codec := published(weights)) is None:
        raise CodecError(f"EnCodec's weights are not at hand: {storage.cache_folder()} on this machine has none")
    changed = differences(plan.codec, codec.identity.to_dict(), "codec ")
    if changed:
        raise CodecError("the dataset was made with another codec; name that one with --codec: " + ", ".join(changed))
    return codec.build()


def sample_spread(plan: Plan, dataset: str, count: int) -> Iterator[shards.Sample]:
    """Up to `count` samples from shards spread evenly over the dataset."""
    order = np.unique(np.linspace(0, len(plan.shards) - 1, min(count, len(plan.shards))).round().astype(int)).tolist()
    for turn, shard in enumerate(order):
        share = count * (turn + 1) // len(order) - count * turn // len(order)
        samples = list(shards.read_samples(storage.read_bytes(shards.tar_url(dataset, shard))))
        places = np.unique(np.linspace(0, len(samples) - 1, min(share, len(samples))).round().astype(int))
        yield from (samples[place] for place in places.tolist())


def original(plan: Plan, sample: shards.Sample) -> np.ndarray:
    """The recording that a sample was made from, float32 [n] at the codec's rate.

    Raises:
        Unusable: it has gone, or is not what it was.
        OSError: the storage failed.
    """
    from pipeline.audio import clean_audio

    source = sample.meta["source"]
    url = storage.relative_to(plan.audio_base, source["audio"])
    return clean_audio(
        url,
        source["start"],
        source["duration"],
        target_rate=plan.codec["sample_rate"],
        max_seconds=plan.config["max_seconds"],
        channel=source.get("channel"),
        limits=signal_limits(plan.config),
    )


def recorded(
    plan: Plan, samples: list[shards.Sample], lacking: list[Exception] | None = None
) -> Iterator[tuple[shards.Sample, np.ndarray]]:
    """(sample, recording); samples whose recording has gone are left out, and why is added to `lacking`."""
    for sample in samples:
        try:
            recording = original(plan, sample)
        except (Unusable, OSError) as error:
            if lacking is not None:
                lacking.append(error)
        else:
            yield sample, recording


def beside_decoded(
    pairs: Iterable[tuple[shards.Sample, np.ndarray]], codec: Codec
) -> Iterator[tuple[shards.Sample, np.ndarray, np.ndarray]]:
    """(sample, recording, decoded), both float32 of one length, of `recorded`."""
    for sample, recording in pairs:
        decoded = codec.beside(codec.decode([sample.codes])[0], recording)
        yield sample, recording[: len(decoded)], decoded
