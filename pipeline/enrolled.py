"""What enrolling a speaker gives: the voice's file, and a row for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.voice_file import Voice, VoiceError, pack
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    from model.initial_state import Recipe
    from model.tuned import Tuned


_MOST_POINTS = 50
"""Of a loss curve in a voice's file, whose record must stay small; the report's has all."""


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON, as it stands in a voice's training record."""
    return vars(recipe) | {"betas": list(recipe.betas)}


def voice_bytes(
    tuned: Tuned, recipe: Recipe, model: str, consent: dict[str, str], source: str | None, data_seconds: float
) -> bytes:
    """The file of a tuned voice: without clocks, so that equal tuning gives equal bytes.

    Args:
        model: fingerprint of the model.
        source: digest of what the samples were made from, by which a voice is known to be up to date.
        data_seconds: of speech.

    Raises:
        Unusable: `diverged`: no step made it better; `bad-record`: a consent or record that does not fit a file.
    """
    if tuned.reason == "diverged" and not tuned.best_step:
        raise Unusable("diverged", f"the loss was not finite after {tuned.steps} steps; try a smaller --lr")
    training = {name: value for name, value in tuned.record().items() if name != "seconds"}
    training["curve"] = training["curve"][:: -(-len(training["curve"]) // _MOST_POINTS) or 1]
    training |= {"recipe": recipe_record(recipe), "data_seconds": round(data_seconds, 3)}
    training |= {"source": source} if source else {}
    try:
        return pack(
            Voice(tuned.speaker, tuned.factors, recipe.rank, float(recipe.scale), model, training, dict(consent))
        )
    except VoiceError as error:
        raise Unusable("bad-record", str(error)) from None


def report_row(tuned: Tuned, data_seconds: float, size: int) -> dict[str, Any]:
    """What the report says of a voice; losses are None where nothing was held out."""
    return {
        "speaker": tuned.speaker,
        "samples": tuned.samples + tuned.held_out,
        "held_out": tuned.held_out,
        "seconds": round(data_seconds, 3),
        "steps": tuned.steps,
        "best_step": tuned.best_step,
        "ended": tuned.reason,
        "tuning_seconds": round(tuned.seconds, 3),
        "base_loss": tuned.base_loss,
        "continuation_loss": tuned.continuation_loss,
        "tuned_loss": tuned.tuned_loss,
        "curve": [list(point) for point in tuned.curve],
        "bytes": size,
    }
