"""Ray Train's callbacks, on a cluster and on a Ray of this process's own."""

from __future__ import annotations

import pytest
import ray.train

from pipeline.ray_trainer import Trainer


@pytest.mark.parametrize("address", ["", "127.0.0.1:6379"])
def test_only_a_cluster_has_a_cleaner_which_needs_its_dashboard(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    trainer = Trainer(print, scaling_config=ray.train.ScalingConfig(num_workers=1))
    names = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert ("PlacementGroupCleanerCallback" in names) == bool(address)
    assert {"AcceleratorSetupCallback", "BackendSetupCallback"} <= set(names)
