"""The report's page: whole and safe whatever the batch was."""

import html
import re

import pytest

from pipeline.enrollment_page import page
from pipeline.utterances import Reject

SUMMARY = {
    **{"speakers": 2, "enrolled": 1, "known": 0, "rejected": 1, "hours": 0.5, "voices_an_hour": 1234.5, "means": {}},
    **{"tenant": "shared", "model": {"folder": "models/lina"}, "settings": {"recipe.steps": 100}},
}
ROW = {"speaker": "ann", "samples": 3, "seconds": 31.25, "steps": 40, "ended": "converged", "tuning_seconds": 1.5}
LOSSES = {"base_loss": 4.2, "continuation_loss": 4.0, "tuned_loss": 3.75, "curve": [[0, 4.1], [10, 3.9], [20, 3.75]]}
HOSTILE = "<script>alert(1)</script>"


def made(rows=(), rejects=(), sample_rejects=(), said=None, **changes) -> str:
    return page(SUMMARY | changes, list(rows), list(rejects), list(sample_rejects), said or {})


def test_a_voice_has_its_row_its_curve_and_its_sound():
    means = {"tuned_loss": 3.75, "base_loss": 4.2, "similarity": 0.81, "wer": 0.25}
    row = ROW | LOSSES | {"similarity": 0.81, "wer": 0.25}
    shown = made([row], said={"ann": b"OggS"}, means=means)
    for text in (
        "ann",
        "31.2",
        "converged",
        "3.750",
        "<polyline",
        "data:audio/ogg;base64,T2dnUw==",
        "25.0 %",
        "-0.450",
    ):
        assert text in shown
    assert shown.count("data:image/png") == 3


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [ROW],
        [ROW | {name: None for name in LOSSES}],
        [ROW | LOSSES | {"continuation_loss": None, "curve": [[0, 4.1]]}],
        [ROW | LOSSES | {"speaker": f"s{number}", "tuned_loss": 3 + number / 100} for number in range(150)],
        [{"speaker": "found", "ended": None, "seconds": None}],
    ],
    ids=["none", "nothing held out", "no losses", "no curve", "many", "little known"],
)
def test_any_batch_has_a_page(rows):
    shown = made(rows)
    assert shown.rstrip().endswith("</html>") and ("data:image/png" in shown) == bool(rows)
    assert all(row["speaker"] in shown for row in rows)


def test_what_is_missing_is_told():
    assert f"<p class=bad>{html.escape(HOSTILE)}</p>" in made([ROW], notes=[HOSTILE])


def test_names_cannot_become_markup_and_nothing_is_fetched():
    reject = Reject(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    settings = {"settings": {HOSTILE: HOSTILE}, "model": {"folder": HOSTILE}}
    shown = made([ROW | LOSSES | {"speaker": HOSTILE, "ended": HOSTILE}], [reject], [reject._asdict()], **settings)
    assert HOSTILE not in shown and shown.count("&lt;script&gt;") >= 8
    fetched = re.findall(r"""(?:src|href)=["']?([^"'> ]*)""", shown)
    assert len(fetched) == 4 and all(url.startswith("data:") for url in fetched)
