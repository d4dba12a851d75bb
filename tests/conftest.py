"""What every test may lean on: real speech where it is at hand, a small Ray, tracking in a database of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from infra.cluster import KEEP_WORKERS
from tests import ray_sessions

# Before anything imports ray: no token file in HOME, no listener outside this machine, nothing reported to anybody.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS="0",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
)
os.environ.setdefault("MPLBACKEND", "Agg")
# Threads that wait for each other beside other processes mostly wait: files run at once, one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(KEEP_WORKERS)
for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MLFLOW_RUN_ID"):
    os.environ.pop(name, None)

ROOT = Path(__file__).resolve().parents[1]

# A loaded machine is not a defect: hypothesis measures no time here.
hypothesis.settings.register_profile("lina", deadline=None, print_blob=True)
hypothesis.settings.load_profile("lina")


LONGEST = (
    *("test_tokenization", "test_pretraining", "test_chaos", "test_tokenize_job", "test_evaluate_job"),
    *("test_object_store", "test_running", "test_synthesize_submitted", "test_enrollment_stage", "test_service"),
    *("test_training_engine", "test_codec_training", "test_demo_corpus", "test_enroll_job", "test_synthesize_job"),
    *("test_enroll_submitted", "test_cluster", "test_serve_job", "test_pretrain_job", "test_experiments_job"),
    *("test_voice_tuning", "test_judging", "test_evaluation", "test_synthesis", "test_grid", "test_training_loop"),
    *("test_tracking", "test_continuous_batch", "test_codec", "test_speaker"),
)
"""Files that take the longest, the first ones minutes: they start clusters and kill them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that none of them is left to one worker at the end while the others are idle."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real speech that lies beside a checkout; it is not part of the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "librispeech-test-other" / "manifest.jsonl").is_file():
        pytest.skip(f"no real speech at {folder}")
    return folder


@pytest.fixture
def tracking_uri(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _migrated_database: Path) -> str:
    """A fresh MLflow database for this test alone; MLFLOW_TRACKING_URI names it, for child processes, too."""
    database = tmp_path / "tracking" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(_migrated_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    return f"sqlite:///{database}"


@pytest.fixture(scope="session")
def _migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: creating one takes seconds, copying it none."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry

    database = tmp_path_factory.mktemp("mlflow") / "empty.db"
    engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{database}")
    _initialize_tables(engine)
    engine.dispose()
    return database


@pytest.fixture(autouse=True)
def _no_tracking_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test that tracks without asking for `tracking_uri` writes into its own folder, never into the project's."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs on loopback for the tests of one module; a lost worker is noticed within two seconds."""
    import ray

    # Not under tmp_path: the sockets' paths must stay under 108 bytes.
    folder = tempfile.mkdtemp(prefix="lr-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=256 << 20,
        log_to_driver=False,
        _temp_dir=folder,
        _system_config={
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 3,
        },
    )
    try:
        yield
    finally:
        ray_sessions.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an S3 server on loopback, for the tests of one module; processes started later find it, too."""
    import logging
    import urllib.request

    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # All servers of a process share what they hold: forget what another module's left.
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("lina")
        yield "s3://lina"
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()
