"""Utterances whose length the manifest does not tell: probed, and where too long for one piece, cut at pauses.

A file that cannot be used stays in the plan as it is: decoding rejects it with its reason, and `--retry-quarantined`
can try it again, which a plan could not. Storage that fails again and again is another matter: then planning fails, for
a plan must not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

from infra import storage
from pipeline.tokenize_config import TokenizeConfig
from pipeline.utterances import Reject, Unusable, Utterance

NEEDS_SEGMENTATION = "needs_segmentation"
"""Mark that a manifest reader leaves in `extra` of a whole recording without known pauses."""
_PROBES, _AHEAD = 16, 512

Spans = list[tuple[float, float]]


def with_lengths(
    items: Iterable[Utterance | Reject],
    config: TokenizeConfig,
    find_speech: Callable[[list[str]], Iterable[Spans | None]],
) -> Iterator[Utterance | Reject]:
    """The same items in the same order, with durations where they can be had, and long recordings as segments.

    Args:
        find_speech: speech spans in seconds of each of several recordings, None for an unusable one.

    Raises:
        OSError: the storage failed again and again.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(_PROBES) as pool:
        while chunk := list(islice(iterator, _AHEAD)):
            probed = list(pool.map(_probed, chunk)) if any(_unknown(item) for item in chunk) else chunk
            yield from _segmented(probed, config, find_speech)


def _unknown(item: Utterance | Reject) -> bool:
    return type(item) is Utterance and item.duration is None


def _probed(item: Utterance | Reject) -> Utterance | Reject:
    from pipeline.audio import probe

    if not _unknown(item):
        return item
    try:
        seconds = storage.patiently(partial(probe, item.audio)).seconds - item.start
    except Unusable:
        return item
    return item._replace(duration=round(seconds, 6)) if seconds > 0 else item


def _segmented(items: list, config: TokenizeConfig, find_speech: Callable) -> Iterator[Utterance | Reject]:
    long = [item for item in items if type(item) is Utterance and _to_be_cut(item, config)]
    found = iter(find_speech([item.audio for item in long]) if long else ())
    for item in items:
        spans = next(found) if type(item) is Utterance and _to_be_cut(item, config) else None
        if spans is None:
            yield item
        else:
            yield from _segments(item, spans, config)


def _to_be_cut(utterance: Utterance, config: TokenizeConfig) -> bool:
    if utterance.duration is None or utterance.text is not None:
        return False
    return utterance.duration > config.max_seconds or bool(utterance.extra.get(NEEDS_SEGMENTATION))


def _segments(utterance: Utterance, spans: Spans, config: TokenizeConfig) -> Iterator[Utterance | Reject]:
    from pipeline.segmentation import cut, quietest_place

    start, end = utterance.start, utterance.start + utterance.duration
    inside = [(max(a, start), min(b, end)) for a, b in spans if b > start and a < end]
    extra = {name: value for name, value in utterance.extra.items() if name != NEEDS_SEGMENTATION}
    quietest = quietest_place(utterance.audio)

    def place(earliest: float, latest: float) -> float:
        return storage.patiently(partial(quietest, earliest, latest))

    try:
        segments = cut(inside, config.segment_seconds, config.max_seconds, config.max_silence, place)
    except Unusable:
        yield utterance
        return
    if not segments:
        detail = f"no speech was found in {utterance.duration:.1f} s of {utterance.audio}"
        yield Reject(utterance.id, "segment", "no-speech", detail, utterance.where)
    for segment in segments:
        id = f"{utterance.id}-{round(segment.start * 1000):08d}" if utterance.id else ""
        yield utterance._replace(id=id, start=segment.start, duration=segment.duration, extra=extra)
