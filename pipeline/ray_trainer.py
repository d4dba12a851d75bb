"""Ray Train's trainer, quiet on a Ray that this process started for itself."""

from __future__ import annotations

import os

from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):
    """Where `infra.cluster.connect` started Ray for this process alone, nothing outlives it, and no dashboard answers.

    Ray Train's cleaner of placement groups, which asks the dashboard every second whether the controller lives, would
    only print that nobody answers; it is left out there.
    """

    def _create_default_callbacks(self) -> list:
        callbacks = super()._create_default_callbacks()
        if os.environ.get("RAY_ADDRESS"):
            return callbacks
        return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]
