"""A page to listen on: recordings of the same utterance beside each other, each with its player and its spectrogram.

`write_page` fills a folder (a local path or any fsspec URL) with index.html, WAV files and PNG spectrograms that the
page names relatively: it works from a disk, a web server or a bucket, and asks for nothing from anywhere else.
"""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from infra import storage
from pipeline.measures import log_mel

_DARKEST, _BRIGHTEST = -4.0, 2.0
"""log10 of mel magnitudes that the ends of the colour scale stand for, the same in every picture of a page."""
_PIXELS_A_SECOND = 94


@dataclass(frozen=True)
class Recording:
    """One way in which an utterance sounds."""

    label: str
    """`original`, `decoded`, the name of a system."""
    samples: np.ndarray
    """float32 [time], within ±1."""
    rate: int
    note: str = ""
    """What is known of it: figures, codes a second."""


@dataclass(frozen=True)
class Listened:
    """One utterance in several recordings."""

    id: str
    text: str
    recordings: Sequence[Recording]
    speaker: str = ""
    facts: dict[str, str] = field(default_factory=dict)


def write_page(rows: Sequence[Listened], folder: str, title: str = "Listen", notes: str = "") -> str:
    """Writes the page and what it shows; index.html goes last, so a page that is there is whole.

    Args:
        notes: Text above the utterances, a paragraph a line; lines of a Markdown table, which `evaluation.table`
            makes, are shown as one.

    Returns:
        Where the page is.

    Raises:
        ValueError: nothing to listen to, or a recording that is empty or not finite.
    """
    if not rows:
        raise ValueError("there is nothing to listen to: no utterances were given")
    sections = [_section(number, row, folder) for number, row in enumerate(rows)]
    seconds = sum(len(r.samples) / r.rate for row in rows for r in row.recordings[:1])
    page = _PAGE.format(
        title=html.escape(title),
        summary=f"{len(rows)} utterances, {seconds:.0f} s",
        notes=_notes(notes),
        sections="\n".join(sections),
        style=_STYLE,
        script=_SCRIPT,
    )
    index = storage.join(folder, "index.html")
    storage.write_text(index, page)
    return index


def wav(samples: np.ndarray, rate: int) -> bytes:
    """float32 [time] as a 16-bit WAV file; what is beyond ±1 is clipped."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1.0, 1.0), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def spectrogram(samples: np.ndarray, rate: int) -> bytes:
    """A PNG of float32 [time]'s log-mel spectrogram: one pixel a frame and band, low frequencies at the bottom."""
    from matplotlib import colormaps
    from PIL import Image

    loudness = (log_mel(samples, rate) - _DARKEST) / (_BRIGHTEST - _DARKEST)
    colours = colormaps["magma"](np.clip(loudness[::-1], 0.0, 1.0), bytes=True)[..., :3]
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    return file.getvalue()


def _notes(text: str) -> str:
    parts = []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if not is_table:
            parts += [f"<p>{html.escape(line)}</p>" for line in lines if line.strip()]
            continue
        rows = [[html.escape(cell.strip()) for cell in line.strip("| ").split("|")] for line in lines]
        head, body = rows[0], [row for row in rows[1:] if set("".join(row)) - set("-: ")]
        cells = [f"<tr><th>{'<th>'.join(head)}"] + [f"<tr><td>{'<td>'.join(row)}" for row in body]
        parts.append(f"<table>{''.join(cells)}</table>")
    return "\n".join(parts)


def _section(number: int, row: Listened, folder: str) -> str:
    facts = {"speaker": row.speaker, **row.facts} if row.speaker else row.facts
    described = " · ".join(f"{html.escape(name)} {html.escape(value)}" for name, value in facts.items())
    players = "\n".join(_player(number, place, r, folder, row.id) for place, r in enumerate(row.recordings))
    return (
        f'<section><h2>{html.escape(row.id)}</h2><p class="facts">{described}</p>\n'
        f"<blockquote>{html.escape(row.text)}</blockquote>\n"
        f'<div class="recordings">\n{players}\n</div></section>'
    )


def _player(number: int, place: int, recording: Recording, folder: str, where: str) -> str:
    samples = np.asarray(recording.samples, dtype=np.float32)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise ValueError(f"recording {recording.label!r} of {where!r} is empty, not mono, or holds NaN or infinity")
    name = f"{number:04d}-{place}"
    storage.write_bytes(storage.join(folder, f"{name}.wav"), wav(samples, recording.rate))
    storage.write_bytes(storage.join(folder, f"{name}.png"), spectrogram(samples, recording.rate))
    seconds = len(samples) / recording.rate
    label, note = html.escape(recording.label), html.escape(recording.note)
    return (
        f'<figure style="--seconds:{seconds:.3f}"><figcaption><b>{label}</b> {seconds:.2f} s '
        f'<span class="note">{note}</span></figcaption>\n'
        f'<div class="picture"><img src="{name}.png" alt="mel spectrogram, {label}"><i></i></div>\n'
        f'<audio controls preload="metadata" src="{name}.wav"></audio></figure>'
    )


_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #3a3a3a); --soft: light-dark(#666, #aaa); }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1500px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { text-align: left; white-space: nowrap; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line) }
section { border-top: 1px solid var(--line); padding: 1.1rem 0 }
.facts, .note, .summary { color: var(--soft); margin: 0; font-size: 13px }
blockquote { margin: .5rem 0 .8rem; font-size: 1.05rem }
.recordings { display: flex; flex-wrap: wrap; gap: 1.2rem }
figure { margin: 0; flex: 0 1 min(100%, max(20rem, calc(var(--seconds) * PIXELSpx))); min-width: 0 }
figcaption { margin-bottom: .25rem }
.picture { position: relative; cursor: pointer; line-height: 0 }
.picture img { width: 100%; height: 160px; border-radius: 4px; image-rendering: auto }
.picture i { position: absolute; inset: 0 auto 0 0; width: 2px; background: #fff; opacity: 0 }
audio { width: 100%; height: 34px; margin-top: .35rem }
""".replace("PIXELS", str(_PIXELS_A_SECOND))
_SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const audio = figure.querySelector("audio"), picture = figure.querySelector(".picture");
  const line = picture.querySelector("i"), seconds = parseFloat(figure.style.getPropertyValue("--seconds"));
  const follow = () => {
    line.style.left = 100 * audio.currentTime / seconds + "%";
    line.style.opacity = audio.currentTime > 0 && !audio.ended ? 1 : 0;
    if (!audio.paused) requestAnimationFrame(follow);
  };
  audio.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
    follow();
  });
  audio.addEventListener("seeked", follow);
  audio.addEventListener("ended", follow);
  picture.addEventListener("click", event => {
    const box = picture.getBoundingClientRect(), start = seconds * (event.clientX - box.left) / box.width;
    const go = () => { audio.currentTime = start; audio.play(); };
    if (audio.readyState > 0) go(); else { audio.addEventListener("loadedmetadata", go, { once: true }); audio.load(); }
  });
}
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title>
<style>{style}</style></head>
<body><h1>{title}</h1><p class="summary">{summary}. A click on a spectrogram plays from there.</p>
{notes}
{sections}
<script>{script}</script></body></html>
"""
