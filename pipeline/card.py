"""The card of a dataset: a README.md that says what is in it, what is not and why, and how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infra import storage
from pipeline.census import Census, Histogram, take
from pipeline.plots import Pair, draw_plots

CARD_FILE = "README.md"
_NAMED_SPEAKERS = 50
_CAPTIONS = {
    "plots/durations.png": "How long the utterances are",
    "plots/phone_rates.png": "Phonemes a second",
    "plots/speakers.png": "How much each speaker says",
    "plots/codebooks.png": "Use of the codebooks, in a sample spread over the dataset",
    "plots/spectrograms.png": "Mel spectrograms of recordings and of what their codes decode to",
}


def write_card(dataset: str, summary: dict[str, Any], pairs: Sequence[Pair] = ()) -> list[str]:
    """Writes `README.md` and `plots/*.png`; returns the names of all files, relative to the dataset.

    Args:
        dataset: Path or fsspec URL of a dataset whose shards are all there.
        summary: What its `dataset.json` holds: name, digest, plan, codec (name, digest, sample_rate, frame_rate,
            codebooks, codebook_size), codebooks, config, versions, device, utterances, samples, seconds, hours,
            frames, bytes, rejects (`stage/reason` to count) and shardlist (url, nsamples).
        pairs: Utterances to show before and after the codec.
    """
    census = take(dataset, summary)
    plots = draw_plots(dataset, census, pairs)
    storage.write_text(storage.join(dataset, CARD_FILE), card(summary, census, plots))
    return [CARD_FILE, *plots]


def card(summary: dict[str, Any], census: Census, plots: Sequence[str]) -> str:
    """The text of the card, in Markdown."""
    pictures = "\n\n".join(f"![{_CAPTIONS[plot]}]({plot})" for plot in plots)
    parts = [
        f"# {_plain(summary['name'])}",
        _opening(summary, census),
        _totals(summary, census),
        pictures,
        "## Speakers\n\n" + _speakers(census),
        "## What is not in it\n\n" + _rejects(summary),
        "## Reading it\n\n" + _reading(summary),
        "## How it was made\n\n" + _making(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(summary: dict[str, Any], census: Census) -> str:
    codec = summary["codec"]
    speakers = _counted(len(census.speakers), "speaker") + (" and more" if census.unnamed_speakers[0] else "")
    return (
        f"{_duration(summary['seconds'])} of speech by {speakers} in {_counted(summary['samples'], 'utterance')}, as "
        f"codes of **{_plain(codec['name'])}** ({summary['codebooks']} codebooks of {codec['codebook_size']} entries, "
        f"{codec['frame_rate']:g} frames a second) with phonemised text, in "
        f"{_counted(len(summary['shardlist']), 'WebDataset shard')}."
    )


def _totals(summary: dict[str, Any], census: Census) -> str:
    seconds, rates = census.seconds, census.phone_rates
    rejected = sum(summary["rejects"].values())
    rows = [
        ("utterances", f"{summary['samples']:,} of {summary['utterances']:,} in the manifest"),
        ("in quarantine", f"{rejected:,} ({100 * rejected / max(summary['utterances'], 1):.2f} %)"),
        ("without text", f"{census.without_text:,}"),
        ("audio", f"{summary['hours']:,.2f} h"),
        ("an utterance", f"{_spread_of(seconds)} seconds"),
        ("phonemes a second", _spread_of(rates)),
        ("frames", f"{summary['frames']:,}"),
        ("size", _size(summary["bytes"])),
    ]
    return _table(("", ""), rows)


def _spread_of(histogram: Histogram) -> str:
    if not histogram.total:
        return "–"
    low, middle, high = (histogram.quantile(share) for share in (0.05, 0.5, 0.95))
    return f"median {middle:.1f}, 5 to 95 %: {low:.1f} to {high:.1f}, at most {histogram.highest:.1f}"


def _speakers(census: Census) -> str:
    ranked = sorted(census.speakers.items(), key=lambda item: (-item[1][1], item[0]))
    rows = [
        (_plain(name) or "(unnamed)", f"{count:,}", f"{seconds / 3600:,.3f}", f"{seconds / max(count, 1):.1f}")
        for name, (count, seconds) in ranked[:_NAMED_SPEAKERS]
    ]
    rest = [entry for _, entry in ranked[_NAMED_SPEAKERS:]] + [census.unnamed_speakers]
    count, seconds = sum(entry[0] for entry in rest), sum(entry[1] for entry in rest)
    if count:
        others = f"*{len(ranked) - _NAMED_SPEAKERS:,} others*" if not census.unnamed_speakers[0] else "*all others*"
        rows.append((others, f"{count:,}", f"{seconds / 3600:,.3f}", f"{seconds / count:.1f}"))
    return _table(("speaker", "utterances", "hours", "seconds an utterance"), rows, "lrrr")


def _rejects(summary: dict[str, Any]) -> str:
    if not summary["rejects"]:
        return "Nothing: every utterance of the manifest is in a shard."
    ranked = sorted(summary["rejects"].items(), key=lambda item: (-item[1], item[0]))
    share = 100 / max(summary["utterances"], 1)
    rows = [(*key.split("/", 1), f"{count:,}", f"{count * share:.2f} %") for key, count in ranked]
    return (
        _table(("stage", "reason", "utterances", "share"), rows, "llrr")
        + "\n\nEach is named in `quarantine/*.jsonl`, with what exactly was wrong and where it came from."
    )


def _reading(summary: dict[str, Any]) -> str:
    return (
        "A sample is `{key}.codes.npy` (uint16 "
        f"[{summary['codebooks']}, frames]), `{{key}}.phones.txt` (ARPAbet with stress, space-separated) and "
        "`{key}.json` (id, text, speaker, …). From the folder of this file:\n\n"
        "```python\n"
        "import json, webdataset\n"
        'shards = [shard["url"] for shard in json.load(open("dataset.json"))["shardlist"]]\n'
        "for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():\n"
        '    codes, phones, about = sample["codes.npy"], sample["phones.txt"], sample["json"]\n'
        '    print(sample["__key__"], codes.shape, about["speaker"], *phones.split()[:8])\n'
        "```"
    )


def _making(summary: dict[str, Any]) -> str:
    codec = summary["codec"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(summary["versions"].items()))
    rows = [
        ("codec", f"{_plain(codec['name'])}, {codec['sample_rate']} Hz"),
        ("codec (encoder and codebooks), digest", f"`{codec['digest']}`"),
        ("codec runs on", _plain(str(summary["device"]))),
        ("dataset digest", f"`{summary['digest']}`"),
        ("plan digest", f"`{summary['plan']}`"),
        ("versions", _plain(versions)),
    ]
    config = [(name, f"`{value}`") for name, value in sorted(summary["config"].items())]
    details = "<details><summary>configuration</summary>\n\n" + _table(("", ""), config) + "\n\n</details>"
    return _table(("", ""), rows) + "\n\n" + details


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], alignment: str = "") -> str:
    lines = ["---:" if side == "r" else "---" for side in alignment.ljust(len(head), "l")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, lines, *rows))


def _plain(text: str) -> str:
    """The text as it is, whatever Markdown or HTML would make of it."""
    for special in "\\`*_{}[]<>#|":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.1f} minutes"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"
