"""Cuts as lhotse writes them, one JSON object a line: Libriheavy's by a short way, all others by lhotse itself.

Libriheavy has 12.4 million cuts of about 3 kB: their few fields are taken from the parsed JSON directly, which is ten
times as fast as building lhotse's objects. Whatever is not exactly of that form goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from infra import storage
from pipeline.manifests import fields, tables
from pipeline.manifests.lines import lines
from pipeline.utterances import Reject, Unusable, Utterance

if TYPE_CHECKING:
    import lhotse

LIBRILIGHT_PREFIX = "download/librilight/"
"""What the audio paths in Libriheavy's published cuts begin with."""

_CONTEXT = ("texts", "pre_texts")
_CODES = {
    "english": "en",
    "german": "de",
    "dutch": "nl",
    "french": "fr",
    "spanish": "es",
    "italian": "it",
    "portuguese": "pt",
    "polish": "pl",
}


def read_cuts(url: str, folder: str, audio_root: str | None = None) -> Iterator[Utterance | Reject]:
    """One utterance for each supervision of each cut, for the whole cut if it has none, or a reject.

    The text is the first of a supervision's `custom.texts` (Libriheavy: cased and punctuated), else its `text`.

    Args:
        url: `.jsonl` or `.jsonl.gz`.
        folder: what relative audio paths belong to.
        audio_root: replaces Libriheavy's prefix of audio paths, and `folder`.
    """
    import orjson

    name, loads, resolve = fields.name_of(url), orjson.loads, audio_paths(folder, audio_root)
    for number, line in enumerate(lines(url), 1):
        try:
            cut = loads(line)
            yield _libriheavy(cut, resolve, f"{name}:{number}")
        except (LookupError, TypeError, ValueError):
            if line and not line.isspace():
                yield from _any_cut(line, resolve, f"{name}:{number}")


def audio_paths(folder: str, audio_root: str | None) -> Callable[[str], str]:
    """A function from the path in a manifest to the absolute one; cuts of one recording follow one another."""
    root = f"{storage.absolute(audio_root)}/" if audio_root else None
    last = resolved = ""

    def resolve(path: str) -> str:
        nonlocal last, resolved
        if path != last:
            within = path.removeprefix(LIBRILIGHT_PREFIX) if root else path
            last, resolved = path, fields.located(root or folder, within)
        return resolved

    return resolve


def _libriheavy(cut: Any, resolve: Callable[[str], str], where: str) -> Utterance:
    """The utterance of a cut that has Libriheavy's form exactly; any kind of lookup or value error if it has not."""
    (supervision,) = cut["supervisions"]
    (source,) = cut["recording"]["sources"]
    custom = supervision["custom"]
    id, start, duration, channel = cut["id"], cut["start"], cut["duration"], cut["channel"]
    text, speaker, path = custom["texts"][0], supervision["speaker"], source["source"]
    language = supervision["language"]
    if not (
        type(id) is type(text) is type(speaker) is type(path) is str
        and type(start) in (float, int)
        and type(duration) in (float, int)
        and 0 <= start <= fields.LONGEST_SECONDS
        and 0 < duration <= fields.LONGEST_SECONDS
        and (language is None or type(language) is str)
        and cut["type"] == "MonoCut"
        and source["type"] == "file"
        and source["channels"] == [0] == [channel]
        and type(channel) is int
        and path
        and "\0" not in path
        and "transforms" not in cut["recording"]
    ):
        raise ValueError("not of this form")
    extra = cut.get("custom") or {}
    extra = {**extra, **{name: value for name, value in custom.items() if name not in _CONTEXT}}
    if any(type(value) in (dict, list) for value in extra.values()):
        raise ValueError("not of this form")
    language = language_code(language) or "en"
    return Utterance(id, resolve(path), text, speaker, float(start), float(duration), language, channel, extra, where)


def _any_cut(line: bytes, resolve: Callable[[str], str], where: str) -> Iterator[Utterance | Reject]:
    label = ""
    try:
        data = tables.json_object(line)
        label = data.get("id", "")
        cut = _deserialized(data)
        supervisions = cut.supervisions or [None]
        for supervision in supervisions:
            yield _supervised(cut, supervision, len(supervisions) > 1, resolve, where)
    except Unusable as error:
        yield fields.reject(error, where, label)


def _deserialized(data: dict[str, Any]) -> lhotse.MonoCut | lhotse.MultiCut:
    import lhotse

    if data.get("type") in ("MixedCut", "PaddingCut") or "tracks" in data:
        raise Unusable(
            "mixed-cut", "a mix of recordings or padding is no stretch of one file; export it as audio first"
        )
    cut = deserialized(data)
    if not isinstance(cut, lhotse.MonoCut | lhotse.MultiCut):
        raise Unusable("bad-cut", f"expected a cut, found a {type(cut).__name__}")
    if cut.recording is None:
        raise Unusable("missing-audio", "the cut has no recording: it was made from features alone")
    return cut


def deserialized(data: dict[str, Any]) -> Any:
    """lhotse's object for one line of a manifest of any kind.

    Raises:
        Unusable: `bad-cut`.
    """
    from lhotse.serialization import deserialize_item

    try:
        return deserialize_item(data)
    except Exception as error:  # lhotse checks nothing: a wrong value fails wherever it is first used
        raise Unusable(
            "bad-cut", f"lhotse cannot read it: {type(error).__name__}: {fields.shown(str(error))}"
        ) from None


def _supervised(
    cut: lhotse.MonoCut | lhotse.MultiCut,
    supervision: lhotse.SupervisionSegment | None,
    several: bool,
    resolve: Callable[[str], str],
    where: str,
) -> Utterance | Reject:
    """The stretch of the recording that a supervision of a cut describes."""
    label = supervision.id if several and supervision is not None else cut.id
    extra = cut.custom if isinstance(cut.custom, dict) else {}
    try:
        begin = fields.seconds(cut.start, "start of the cut") or 0.0
        if supervision is None:
            channel = one_channel(cut.channel)
            row = {"id": label, "start": begin, "duration": cut.duration, "channel": channel}
        else:
            # In a cut, a supervision's start counts from the cut's, and is negative where it began before it.
            row = supervision_row(supervision, begin, cut.channel)
            row["id"] = label
            extra = {**extra, **other_columns(supervision)}
        row["audio"], row["channel"] = source_of(cut.recording, row["channel"])
        return fields.utterance({**row, "audio": resolve(row["audio"])}, "", where, extra)
    except Unusable as error:
        return fields.reject(error, where, label)


def supervision_row(supervision: lhotse.SupervisionSegment, begin: float, cut_channel: Any) -> dict[str, Any]:
    """Columns of a supervision whose start counts from `begin` seconds into its recording."""
    start, duration = supervision.start, supervision.duration
    for name, value in (("start", start), ("duration", duration)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Unusable("bad-field", f"{name} of the supervision must be a number, not {fields.shown(value)}")
    late = max(0.0, -(begin + start))  # it begins before its recording does: only the rest is there
    custom = supervision.custom if isinstance(supervision.custom, dict) else {}
    texts = custom.get("texts")
    channel = one_channel(cut_channel)
    return {
        "id": supervision.id,
        "text": texts[0] if isinstance(texts, list) and texts else supervision.text,
        "speaker": supervision.speaker,
        "start": round(begin + start + late, 8),
        "duration": round(duration - late, 8),
        "language": language_code(supervision.language),
        "channel": one_channel(supervision.channel) if channel is None else channel,
    }


def other_columns(supervision: lhotse.SupervisionSegment) -> dict[str, Any]:
    """What a supervision tells beyond text, speaker and times."""
    custom = supervision.custom if isinstance(supervision.custom, dict) else {}
    gender = {} if supervision.gender is None else {"gender": supervision.gender}
    return {**gender, **{name: value for name, value in custom.items() if name not in _CONTEXT}}


def language_code(language: Any) -> Any:
    """The ISO 639 code of a language that lhotse's recipes name in English; any other value as it is."""
    return _CODES.get(language.lower(), language) if isinstance(language, str) else language


def one_channel(channel: Any) -> Any:
    """A channel, or None (their mean) where there are several."""
    if isinstance(channel, list | tuple):
        return channel[0] if len(channel) == 1 else None
    return channel


def source_of(recording: lhotse.Recording, channel: int | None) -> tuple[str, int | None]:
    """The path of the file that holds a channel of a recording, and the channel's number in that file.

    Raises:
        Unusable: `unsupported-source`, `transformed-audio` or `bad-field`.
    """
    changes = [type(t).__name__ if not isinstance(t, dict) else t.get("name") for t in recording.transforms or ()]
    if any(name != "Resample" for name in changes):
        detail = f"the recording is to be changed by {', '.join(map(str, changes))}; save it as audio first"
        raise Unusable("transformed-audio", detail)
    sources = recording.sources
    if channel is not None:
        sources = [source for source in sources if isinstance(source.channels, list) and channel in source.channels]
        if not sources:
            raise Unusable("bad-field", f"the recording has no channel {fields.shown(channel)}")
    if len(sources) != 1:
        detail = f"the recording lies in {len(sources)} files, one for each channel; name the channel to use"
        raise Unusable("unsupported-source", detail)
    source = sources[0]
    if source.type not in ("file", "url") or not isinstance(source.source, str):
        detail = f"audio of the type {fields.shown(source.type)} is not a file; save it with lhotse as audio first"
        raise Unusable("unsupported-source", detail)
    return source.source, channel if channel is None else source.channels.index(channel)


def looks_like(rows: list[dict[str, Any]]) -> str | None:
    """The lhotse kind of the first rows: `cuts`, `libriheavy`, `recordings` or `supervisions`; None if it is none."""
    for row in islice(rows, 1):
        if "sources" in row and "sampling_rate" in row:
            return "recordings"
        if "recording_id" in row and "audio" not in row:
            return "supervisions"
        if str(row.get("type")).endswith("Cut") or "tracks" in row:
            return "libriheavy" if any(map(_has_texts, rows)) else "cuts"
    return None


def _has_texts(cut: dict[str, Any]) -> bool:
    try:
        return isinstance(cut["supervisions"][0]["custom"]["texts"][0], str)
    except (LookupError, TypeError):
        return False
