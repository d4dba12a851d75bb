"""Ray Train's callbacks, on a cluster and on a Ray of this process's own."""

from __future__ import annotations

import pytest
import ray.train

from pipeline.ray_trainer import Trainer


@pytest.mark.parametrize(
    ("address", "mark", "cleaned"),
    [("", "/tmp/own", False), ("127.0.0.1:6379", "/tmp/own", True), ("127.0.0.1:6379", "", True), ("", "", True)],
)
def test_all_but_a_ray_of_ones_own_have_a_cleaner(address: str, mark: str, cleaned: bool, monkeypatch) -> None:
    for name, value in (("RAY_ADDRESS", address), ("LINA_RAY_CLUSTER", mark)):
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    trainer = Trainer(print, scaling_config=ray.train.ScalingConfig(num_workers=1))
    names = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert ("PlacementGroupCleanerCallback" in names) == cleaned
    assert {"AcceleratorSetupCallback", "BackendSetupCallback"} <= set(names)
