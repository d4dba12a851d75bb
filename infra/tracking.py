"""MLflow without surprises: a run is opened or refused before any work, and never costs a job its work afterwards.

    with track("tokenize", "librispeech", config, {"plan": digest}, run_id=previous) as run:
        run.log_metrics({"hours": 1.5}, step=3)
        run.log_artifact("out/tokens/README.md")

Where the runs go: MLFLOW_TRACKING_URI, or `sqlite:///mlflow.db` in the caller's folder with artefacts beside it (look
at them with `mlflow ui`). `tracking="none"` tracks nothing. Only one process of a job should track.

A server that is away in the middle of a job is reported once. Metrics wait for it, up to a limit; texts and files
of that time are lost, and the end of the run says how much was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from infra import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
_PARAM_LENGTH, _TAG_LENGTH, _NAME_LENGTH, _DIGEST_LENGTH = 6000, 8000, 250, 36
_BATCH = 1000
_NOTE = "mlflow-run.json"
OPTION = "MLflow's tracking URI, or none (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)"
"""What jobs say of their option of this name."""


class TrackingError(RuntimeError):
    """Runs cannot be tracked where they should be: says where, why, and what can be done."""


@contextmanager
def track(
    experiment: str,
    name: str,
    config: Any = None,
    tags: Mapping[str, str] | None = None,
    run_id: str | None = None,
    tracking: str | None = None,
    parent: str | None = None,
    system_metrics: bool = False,
) -> Iterator[Run]:
    """A run from here to the end of the block: then finished, failed (an exception) or killed (Ctrl-C).

    Args:
        config: A dataclass or a mapping; becomes the run's parameters, nested names joined with dots.
        run_id: Continues this run. If it is not there (any more), a new run says so in its tag `continues`.
        tracking: Tracking URI, or "none"; default: MLFLOW_TRACKING_URI, or a database in the current folder.
        parent: The run that this one is a part of.
        system_metrics: Log CPU, memory, disk, network and GPU of this machine every ten seconds.

    Raises:
        TrackingError: the tracking server cannot be used; nothing was begun.
    """
    if tracking == "none":
        yield Run()
        return
    run = _open(experiment, name, tags or {}, run_id, tracking or default_uri(), parent)
    run.log_params(_flat(config))
    monitor = _monitor(run, resumed=run.run_id == run_id) if system_metrics else None
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if monitor:
            monitor.finish()
        run.close(status)


def remember_run(folder: str, run: Run) -> None:
    """Notes beside what a job makes which run made it, so that a resumed job continues that run."""
    if run.run_id:
        storage.write_text(storage.join(folder, _NOTE), json.dumps({"run_id": run.run_id}) + "\n")


def known_run(folder: str) -> str | None:
    """The id that `remember_run` noted in a folder."""
    note = storage.join(folder, _NOTE)
    return json.loads(storage.read_bytes(note))["run_id"] if storage.exists(note) else None


def default_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def resolved(uri: str) -> str:
    """What `--tracking` names, or the default, as a URI that means the same in every folder."""
    uri = uri or default_uri()
    file = uri.removeprefix("sqlite:///")
    return uri if file == uri or file.startswith(":") else f"sqlite:///{os.path.abspath(file)}"


class Run:
    """A run of MLflow, or, made without arguments, one that keeps nothing."""

    def __init__(self, client: Any = None, run_id: str = "", uri: str = "none", experiment_id: str = "") -> None:
        self.run_id = run_id
        self.uri = uri
        self.experiment_id = experiment_id
        self._client = client
        self._pending: list[Any] = []
        self._pending_limit = 100_000
        self._sent_at = 0.0
        self._pause = 0.0
        self._lost: dict[str, int] = {}
        self._warned = False

    @property
    def where(self) -> str:
        """How to look at this run, in one line for people."""
        if not self._client:
            return "not tracked"
        page = f"#/experiments/{self.experiment_id}/runs/{self.run_id}"
        if self.uri.startswith("http"):
            return f"{_redacted(self.uri).rstrip('/')}/{page}"
        return f"mlflow ui --backend-store-uri {_redacted(self.uri)}, then http://127.0.0.1:5000/{page}"

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step. Sent about once a second, and at the end; while the server is away they wait."""
        if not self._client:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(_name(key), float(value), now, int(step)) for key, value in metrics.items()]
        if (surplus := len(self._pending) - self._pending_limit) > 0:
            del self._pending[:surplus]
            self._lose("metrics", surplus)
        if time.monotonic() - self._sent_at >= max(1.0, self._pause):
            self._send_metrics()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters; one that differs from what a resumed run has becomes the tag `changed.<name>`."""
        if not self._client or not params:
            return
        from mlflow.entities import Param, RunTag

        def send() -> None:
            there = self._client.get_run(self.run_id).data.params
            shown = {_name(key): _short(str(value), _PARAM_LENGTH) for key, value in params.items()}
            new = [Param(key, value) for key, value in shown.items() if key not in there]
            changed = [
                RunTag(f"changed.{key}"[:_NAME_LENGTH], value)
                for key, value in shown.items()
                if there.get(key, value) != value
            ]
            for start in range(0, max(len(new), len(changed)), 100):
                batch = slice(start, start + 100)
                self._client.log_batch(self.run_id, params=new[batch], tags=changed[batch])

        self._attempt("parameters", send)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        for key, value in tags.items():
            text = _short(str(value), _TAG_LENGTH)
            self._attempt("tags", lambda key=key, text=text: self._client.set_tag(self.run_id, _name(key), text))

    def log_text(self, text: str, file: str) -> None:
        """A text as the artefact `file` (`notes/plan.txt`)."""
        self._attempt("files", lambda: self._client.log_text(self.run_id, text, file))

    def log_figure(self, figure: Figure, file: str) -> None:
        """A matplotlib figure as an image; the file's ending says which kind."""
        self._attempt("files", lambda: self._client.log_figure(self.run_id, figure, file))

    def log_artifact(self, url: str, folder: str | None = None) -> None:
        """A file, or what is in a folder, of any fsspec URL, under `folder` of the run's artefacts."""

        def log(path: str) -> None:
            put = self._client.log_artifacts if os.path.isdir(path) else self._client.log_artifact
            put(self.run_id, path, folder)

        def send() -> None:
            if storage.is_local(url):
                log(storage.absolute(url))
                return
            with tempfile.TemporaryDirectory() as there:
                copy = os.path.join(there, url.rstrip("/").rsplit("/", 1)[1])
                storage.download(url, copy)
                log(copy)

        self._attempt("files", send)

    def log_input(self, name: str, digest: str, source: str, context: str = "input") -> None:
        """Data that the run was made from. MLflow takes 36 characters of a digest; the profile keeps all of it."""
        if not self._client:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = "local" if storage.is_local(source) else source.split("://", 1)[0]
        profile = json.dumps({"digest": digest})
        data = Dataset(name[:500], digest[:_DIGEST_LENGTH], kind, json.dumps({"uri": source}), profile=profile)
        given = [DatasetInput(data, [InputTag("mlflow.data.context", context)])]
        self._attempt("inputs", lambda: self._client.log_inputs(self.run_id, datasets=given))

    def register_model(self, name: str, artifact: str, tags: Mapping[str, str]) -> None:
        """A new version, in the registry, of the model `name`: what lies under `artifact` of this run's artefacts."""

        def send() -> None:
            from mlflow.exceptions import MlflowException

            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{artifact}"
            self._client.create_model_version(name, source, run_id=self.run_id, tags=dict(tags))

        self._attempt("models", send)

    def close(self, status: str) -> None:
        """Sends what waits and ends the run as `status` (FINISHED, FAILED, KILLED)."""
        if not self._client:
            return
        self._send_metrics()
        if self._pending:
            self._lose("metrics", len(self._pending))
        self._attempt("end", lambda: self._client.set_terminated(self.run_id, status))
        if self._lost:
            lost = ", ".join(f"{count} {what}" for what, count in self._lost.items())
            _log.warning("not everything reached MLflow run %s at %s: lost %s", self.run_id, _redacted(self.uri), lost)

    def _send_metrics(self) -> None:
        while self._pending:
            batch = self._pending[:_BATCH]
            sent = self._attempt(None, lambda batch=batch: self._client.log_batch(self.run_id, metrics=batch))
            self._sent_at = time.monotonic()
            self._pause = 0.0 if sent else min(300.0, max(10.0, 2 * self._pause))
            if not sent:
                return
            del self._pending[: len(batch)]

    def _lose(self, what: str, count: int) -> None:
        self._lost[what] = self._lost.get(what, 0) + count

    def _attempt(self, what: str | None, call: Callable[[], Any]) -> bool:
        """Whether `call` succeeded. The first failure is told, all are counted under `what`, none is raised."""
        if not self._client:
            return True
        try:
            call()
            return True
        except Exception as error:
            if what:
                self._lose(what, 1)
            if not self._warned:
                self._warned = True
                at = _redacted(self.uri)
                _log.warning("MLflow at %s does not take what run %s logs; the job goes on: %s", at, self.run_id, error)
            return False


def _open(experiment: str, name: str, tags: Mapping[str, str], run_id: str | None, uri: str, parent: str | None) -> Run:
    # A server that is away must fail in seconds, not in MLflow's four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow
    from mlflow.entities import RunStatus

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment_id = _experiment(client, experiment, uri)
        if run_id and (known := _known(client, run_id)):
            client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
            run = Run(client, run_id, uri, known.info.experiment_id)
            run.set_tags(tags)
            return run
        if run_id:
            _log.warning("MLflow at %s has no run %s to continue: this is a new one", _redacted(uri), run_id)
        all_tags = {**_origin(), **tags, **({"continues": run_id} if run_id else {})}
        all_tags |= {"mlflow.parentRunId": parent} if parent else {}
        short = {_name(key): _short(str(value), _TAG_LENGTH) for key, value in all_tags.items()}
        info = client.create_run(experiment_id, run_name=name, tags=short).info
        return Run(client, info.run_id, uri, experiment_id)
    except Exception as error:
        raise TrackingError(
            f"MLflow at {_redacted(uri)} cannot be used: {error}. Start it, point MLFLOW_TRACKING_URI elsewhere, or "
            "turn tracking off with --tracking none"
        ) from error


def _experiment(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    beside = None
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        beside = (folder / "mlruns" / quote(name, safe=" ")).as_uri()
    try:
        return client.create_experiment(name, artifact_location=beside)
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # Somebody else has made it in between.
            return found.experiment_id
        raise


def _known(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _origin() -> dict[str, str]:
    """Who ran what, from which commit."""
    from mlflow.tracking.context.registry import resolve_tags

    return {**resolve_tags(), "mlflow.source.name": sys.argv[0]}


def _monitor(run: Run, resumed: bool) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run.run_id, resume_logging=resumed, tracking_uri=run.uri)
    monitor.start()
    return monitor


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        inner: Iterable[tuple[Any, Any]] = value.items()
        return {
            name: text
            for key, item in inner
            for name, text in _flat(item, f"{prefix}.{key}" if prefix else f"{key}").items()
        }
    if not prefix:
        return {}
    return {prefix: json.dumps(value, default=str) if isinstance(value, list | tuple) else str(value)}


def _name(key: str) -> str:
    """A name that MLflow accepts; two that differ only in what it refuses stay two."""
    clean = re.sub(r"[^\w\-. :/]|\.\.|^\.+$|//+|^/|/$|(?<=/)\.|\.(?=/)", "_", key) or "_"
    if clean == key and len(key) <= _NAME_LENGTH:
        return key
    return f"{clean[: _NAME_LENGTH - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _short(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    note = f"… ({len(text)} characters)"
    return text[: limit - len(note)] + note


def _redacted(uri: str) -> str:
    return re.sub(r"(?<=://)[^/@]+@", "…@", uri)
