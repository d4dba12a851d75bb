"""What runs where nobody tests it: cluster files against Ray's own schema and options, pins against each other."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement


def loaded(project: Path, file: str) -> dict[str, Any]:
    return yaml.safe_load((project / file).read_text())


@pytest.fixture(scope="module")
def pins(project: Path) -> dict[str, dict[str, Requirement]]:
    """Requirements by name, of the core ('') and of each extra."""
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    groups = {"": described["dependencies"], **described["optional-dependencies"]}
    return {group: {Requirement(r).name.lower(): Requirement(r) for r in rows} for group, rows in groups.items()}


def locked(file: Path) -> dict[str, str]:
    rows = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): number for name, number in (row.split("==") for row in rows)}


@pytest.fixture(scope="module")
def launcher(project: Path) -> dict[str, Any]:
    return loaded(project, "ray_cluster.yaml")


def test_the_cluster_file_is_valid_by_rays_own_schema(launcher: dict[str, Any]) -> None:
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(launcher, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "max_worker": 3}, schema)


def test_the_cluster_has_a_head_without_tasks_and_workers_of_both_kinds(launcher: dict[str, Any]) -> None:
    types = dict(launcher["available_node_types"])
    assert types.pop(launcher["head_node_type"])["resources"] == {"CPU": 0}
    assert {"GPU" in node["resources"] for node in types.values()} == {True, False}
    for node in types.values():
        assert node["min_workers"] < node["max_workers"] <= launcher["max_workers"]
        assert all(isinstance(amount, int) for amount in node["resources"].values())


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_starts_in_the_projects_folder_with_options_that_it_has(launcher: dict[str, Any], kind: str) -> None:
    from ray.scripts.scripts import start

    command = launcher[f"{kind}_start_ray_commands"][-1]
    folder = command.split("&&")[0].removeprefix("cd ").strip().replace("~", "/home/ubuntu")
    assert launcher["file_mounts"][folder] == "."
    assert any(f"cd {command.split()[1]} && make install" in setup for setup in launcher["setup_commands"])
    words = shlex.split(command.split("ray start ")[1].replace("$RAY_HEAD_IP", "10.0.0.1"))
    options = start.make_context("start", words).params
    assert options["head"] == (kind == "head") and options["dashboard_host"] in ("127.0.0.1", "localhost")


@pytest.mark.parametrize("file", ["raycluster.yaml", "rayjob-tokenize.yaml"])
def test_kubernetes_runs_the_pinned_ray(project: Path, file: str, pins: dict[str, dict[str, Requirement]]) -> None:
    described = loaded(project, f"infra/k8s/{file}")
    spec = described["spec"].get("rayClusterSpec", described["spec"])
    assert described["apiVersion"] == "ray.io/v1" and described["kind"] in ("RayCluster", "RayJob")
    assert pins[""]["ray"].specifier == f"=={spec['rayVersion']}"
    folder = re.search(r"^WORKDIR (.*)$", (project / "infra/docker/Dockerfile").read_text(), re.MULTILINE)[1]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["workingDir"] == folder
    with_gpu = [g for g in spec["workerGroupSpecs"] if "nvidia.com/gpu" in str(g["template"])]
    assert len(with_gpu) == 1 and with_gpu[0]["groupName"] == "gpu"


def test_the_kubernetes_job_gives_options_that_the_job_has(project: Path) -> None:
    words = shlex.split(loaded(project, "infra/k8s/rayjob-tokenize.yaml")["spec"]["entrypoint"])
    shown = subprocess.run([sys.executable, *words[1:2], "--help"], cwd=project, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    flags = {word for word in words if word.startswith("--")}
    assert flags and flags <= set(re.findall(r"--[a-z-]+", shown.stdout))


def test_the_image_copies_and_runs_what_is_there(project: Path) -> None:
    lines = (project / "infra/docker/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1] if word[:2] != "--"]
    assert "requirements.lock" in copied and all((project / name).exists() for name in copied)
    targets = re.findall(r"^([a-z-]+):", (project / "Makefile").read_text(), re.MULTILINE)
    assert any(line.startswith("RUN make install ") for line in lines) and "install" in targets


def test_every_ray_gives_stopped_jobs_the_same_time(project: Path, launcher: dict[str, Any]) -> None:
    from infra.cluster import STOP_PATIENTLY

    ((name, seconds),) = STOP_PATIENTLY.items()
    starts = [launcher[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    for text in (*starts, (project / "infra/docker/Dockerfile").read_text()):
        assert re.findall(rf"\b{name}=(\d+)\b", text) == [seconds]


def test_extras_that_are_installed_exist(project: Path, pins: dict[str, dict[str, Requirement]]) -> None:
    files = [project / name for name in ("Makefile", "README.md", "ray_cluster.yaml", "infra/docker/Dockerfile")]
    named = [re.findall(r"EXTRAS ?\??=\s?([a-z,]+)", file.read_text()) for file in files]
    assert all(named) and {extra for found in named for group in found for extra in group.split(",")} <= set(pins)
    for file, found in list(zip(files, named, strict=True))[2:]:
        assert "gpu" in found[0].split(","), f"{file} is for machines with GPUs"


def test_the_lock_holds_every_pin_and_nothing_local(project: Path, pins: dict[str, dict[str, Requirement]]) -> None:
    lock = locked(project / "requirements.lock")
    for group in ("", "asr", "eval", "demo", "serve", "dev"):
        for name, requirement in pins[group].items():
            assert requirement.specifier == f"=={lock[name]}", f"{name} of {group or 'the core'}"
    assert not re.search(r"://|@|\+|--", (project / "requirements.lock").read_text().split("\n", 2)[2])


def test_this_environment_is_the_pinned_one(project: Path, pins: dict[str, dict[str, Requirement]]) -> None:
    alone = {**locked(project / "infra/nodeps-core.txt"), **locked(project / "infra/nodeps-eval.txt")}
    wanted = {
        **{n: str(r.specifier)[2:] for g in ("", "asr", "eval", "demo", "dev") for n, r in pins[g].items()},
        **alone,
    }
    found = {name: version(name).split("+")[0] for name in wanted}
    assert found == wanted


def test_the_readme_names_jobs_options_and_files_that_are_there(project: Path) -> None:
    text = (project / "README.md").read_text()
    for link in re.findall(r"\]\(([^):]+)\)", text):
        assert (project / link).exists(), link
    used: dict[str, set[str]] = {}
    for job, rest in re.findall(r"(?:python|submit) (jobs/\w+\.py)([^\n#]*)", text):
        used.setdefault(job, set()).update(re.findall(r"--[a-z-]+", rest))
    assert used["jobs/tokenize.py"] >= {"--dry-run", "--retry-quarantined"}
    known: dict[str, set[str]] = {}
    for job in used:
        shown = subprocess.run([sys.executable, job, "--help"], cwd=project, capture_output=True, text=True)
        known[job] = set(re.findall(r"--[a-z-]+", shown.stdout))
        assert used[job] <= known[job], job
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= set().union(*known.values())
    targets = set(re.findall(r"^([a-z-]+):", (project / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", text)) <= targets
