"""Progress of long work: a bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def planning_bar() -> tqdm:
    """Utterances that a manifest has given so far; their number is not known before its end."""
    return tqdm(desc="planning", unit=" utterances", unit_scale=True, **pace())


def audio_bar(hours: float, done: float = 0.0) -> tqdm:
    """Hours of audio: done, of how many, how many an hour (that is, times real time) and the time left."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h of audio [{elapsed}<{remaining}{postfix}]"
    return tqdm(desc="tokenizing", total=max(hours, 1e-9), initial=done, bar_format=form, **pace())


def pace() -> dict[str, Any]:
    """How often a bar is drawn, as tqdm takes it."""
    if sys.stderr.isatty():
        return {"mininterval": 0.2}
    return {"mininterval": 10.0, "maxinterval": 10.0, "ncols": 100}
