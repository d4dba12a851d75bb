"""Finding the enrollment stage on this cluster, or starting it for the time of a job and taking it away again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import serve_instance
from pipeline.enroll_config import StageConfig
from pipeline.enrollment_stage import NAME, build
from pipeline.plan import PlanError, differences

_ANSWER_SECONDS = 300.0


class EnrollmentError(RuntimeError):
    """The stage cannot be used, or was lost for good."""


@contextmanager
def stage(config: StageConfig, expected: dict[str, Any]) -> Iterator[Any]:
    """A handle of the stage: of the one that runs, else of one of our own until the end of the block.

    Args:
        config: how to start it; its `owner` names the job, which takes over what it left behind when it was killed.
        expected: what `about` must say of model, codec, dtype and recipe.

    Raises:
        PlanError: a stage runs that tunes otherwise.
        EnrollmentError: it cannot be started, or does not answer.
    """
    try:
        import ray.serve  # noqa: F401
    except ImportError:
        raise EnrollmentError("enrolling needs Ray Serve: pip install 'lina-ray[serve]'") from None

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what matters is told by the job itself
    there = serve_instance.runs()
    handle, about = _running() if there else (None, {})
    own = handle is None or (bool(config.owner) and about["owner"] == config.owner)
    if handle is not None and (changed := differences(about_tuning(about), expected)):
        if not own:
            raise PlanError(
                "an enrollment service runs on this cluster that tunes otherwise; match it, or delete it "
                f"(serve.delete({NAME!r})):\n  " + "\n  ".join(changed)
            )
        handle = None
    try:
        yield handle or _started(config, there)
    finally:
        if own and serve_instance.runs():
            serve_instance.end([NAME], started=not there)


def about_tuning(about: dict[str, Any]) -> dict[str, Any]:
    """What of `about` decides what voices are: flat, for `differences`."""
    return {name: about[name] for name in ("model", "codec", "dtype")} | {
        f"recipe.{name}": value for name, value in about["recipe"].items()
    }


def _running() -> tuple[Any, dict[str, Any]]:
    """(handle, what it says of itself) of the stage, (None, {}) where none runs."""
    from ray import serve

    found = serve.status().applications.get(NAME)
    if found is None or found.status in ("DEPLOY_FAILED", "DELETING", "NOT_STARTED"):
        return None, {}
    handle = serve.get_app_handle(NAME)
    try:
        return handle, handle.about.remote().result(timeout_s=_ANSWER_SECONDS)
    except Exception as error:  # Serve and Ray have many for a stage that is going away
        raise EnrollmentError(f"the enrollment stage that runs on this cluster does not answer: {error}") from error


def _started(config: StageConfig, serve_runs: bool) -> Any:
    from ray import serve

    if not serve_runs:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
    try:
        return serve.run(build(config), name=NAME, route_prefix=None)
    except RuntimeError as error:
        raise EnrollmentError(f"the enrollment stage does not start: {error}") from error
