"""A continuous batch that rows can leave before their end."""

from __future__ import annotations

from collections.abc import Hashable, Set

import torch

from model.continuous_batch import ContinuousBatch
from model.rows import taken, trimmed


class LeavingBatch(ContinuousBatch):
    """As its parent; a row whose listener is gone makes room at once."""

    def drop(self, keys: Set[Hashable]) -> None:
        """Takes rows out; those that are not there, or have ended, are passed over. The others do not notice."""
        self._waiting = [entry for entry in self._waiting if entry[0].key not in keys]
        kept = [place for place, row in enumerate(self._rows) if row.key not in keys]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in kept]
        with torch.inference_mode():
            index = torch.tensor(kept, dtype=torch.int64, device=self.model.norm.weight.device)
            self._progress = trimmed(taken(self._progress, index)) if kept else None
