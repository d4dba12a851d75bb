"""DeepSpeed's checkpoints are pickles, which can name code to run: they are read as data alone.

python -m pipeline.pickles …        # deepspeed.checkpoint.ds_to_universal, with its options, that reads so, too
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def as_data() -> Iterator[None]:
    """Within it, `torch.load` takes tensors, plain values and the four classes that DeepSpeed's own files hold.

    DeepSpeed asks for `weights_only=False` wherever it loads, so that is overruled for the whole process.

    Raises:
        pickle.UnpicklingError: from `torch.load`, for a file that is damaged or names anything else; nothing has run.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    load = torch.load

    def strict(f: Any, *given: Any, **options: Any) -> Any:
        try:
            return load(f, *given, **options | {"weights_only": True})
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            wrong = f"names {named[1]}, which is no data and is not loaded" if named else f"is damaged: {error}"
            raise pickle.UnpicklingError(f"{f} {wrong}") from None

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        torch.load = strict
        try:
            yield
        finally:
            torch.load = load


if __name__ == "__main__":
    from deepspeed.checkpoint import ds_to_universal

    with as_data():
        ds_to_universal.main(ds_to_universal.parse_arguments())
