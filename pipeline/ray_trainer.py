"""Ray Train's trainer, quiet on a Ray that this process started for itself."""

from __future__ import annotations

from ray.train.torch import TorchTrainer

from infra import cluster


class Trainer(TorchTrainer):
    """Leaves Ray Train's cleaner of placement groups out where Ray is this process's own (`infra.cluster.is_own`).

    Every second the cleaner asks a dashboard whether the controller lives; there it could only print that none answers.
    """

    def _create_default_callbacks(self) -> list:
        callbacks = super()._create_default_callbacks()
        if not cluster.is_own():
            return callbacks
        return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]
