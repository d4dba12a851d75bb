"""The enrollment stage as the service knows it: where it is, and whether its voices can be spoken with here.

Both applications name their model themselves. A stage with another one would tune on codes that mean nothing to it, or
make voices that no engine here takes, so it is asked before anything is sent to it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from infra import storage

logger = logging.getLogger("ray.serve")
_PATIENCE = 5.0
"""Seconds that the stage has to answer a question."""
_LOOKS, _PAUSE = 30, 10.0
"""How often it is looked for at the start, for it may come up later, and the seconds between."""


class NoStage(RuntimeError):
    """The stage does not run, or does not answer."""

    code = "no_enrollment"


class OtherModel(NoStage):
    """The stage makes voices of another model."""

    code = "model_mismatch"


class EnrollmentLink:
    """
    Args:
        model: folder of the model that speaks here.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._handle: Any = None
        self._own: dict[str, str] = {}
        self._agreed = False
        """The stage has our model and codec."""

    async def handle(self) -> Any:
        """The stage's handle. Raises NoStage."""
        if self._handle is None:
            self._handle = await asyncio.to_thread(_found)
        return self._handle

    async def answer(self, question: str, *about: Any) -> Any:
        """What the stage answers at once. Raises NoStage, TimeoutError, and what Ray and Serve have."""
        return await asyncio.wait_for(getattr(await self.handle(), question).remote(*about), _PATIENCE)

    async def agree(self) -> None:
        """Asks the stage what it tunes; not again once that is right.

        Raises:
            NoStage: it does not run, or does not answer.
            OtherModel: it tunes another model, or on another codec's codes.
        """
        if self._agreed:
            return
        own = await asyncio.to_thread(self._known)
        try:
            about = await self.answer("about")
        except NoStage:
            raise
        except Exception as error:  # whatever keeps it from answering
            raise NoStage(f"the enrollment stage does not answer ({type(error).__name__}); try again") from error
        if other := [name for name in own if about[name] != own[name]]:
            what = ", ".join(f"{name} {about[name][:12]} instead of {own[name][:12]}" for name in other)
            text = f"the enrollment stage has {what}: give both applications the same `model` and deploy them again"
            logger.error("voices cannot be made here: %s", text)
            raise OtherModel(text)
        self._agreed = True

    async def look(self) -> None:
        """Agrees with the stage as soon as it is there: that it is a wrong one is in the log from the start."""
        for _ in range(_LOOKS):
            try:
                return await self.agree()
            except OtherModel:
                return  # and in the log
            except NoStage:
                await asyncio.sleep(_PAUSE)

    def refused(self, voice: bytes) -> str | None:
        """Why a voice that was made cannot be kept, if so: the stage was deployed anew, with another model."""
        from model.voice_file import read_record

        own, made = self._known()["model"], read_record(voice)["model"]
        if made == own:
            return None
        self._agreed = False
        return f"it was made for model {made[:12]}, and {own[:12]} speaks here: the operator must deploy both with one"

    def _known(self) -> dict[str, str]:
        """Fingerprints of the model that speaks here and of its codec, by their names in the stage's `about`."""
        from model.checkpoint import CONFIG_FILE, read_card

        if not self._own:
            card = read_card(storage.read_bytes(storage.join(self.model, CONFIG_FILE)))
            self._own = {"model": card.fingerprint, "codec": card.codec.digest}
        return self._own


def _found() -> Any:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from pipeline.enrollment_stage import NAME

    try:
        return serve.get_app_handle(NAME)
    except RayServeException:
        raise NoStage(f"the application `{NAME}` does not run") from None
