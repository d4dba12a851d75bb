"""From a training checkpoint of any stage of ZeRO to the portable model: `model.safetensors` and `config.json`."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING

from infra import storage
from model.checkpoint import ModelCard, pack, read_card
from model.codec_config import CodecIdentity
from model.lina_config import LinaConfig
from pipeline import pickles
from pipeline.training_checkpoints import Checkpoint, CheckpointError, local_copy, newest, opened

if TYPE_CHECKING:
    import torch

EXPORT = "export"
_PREFIX = "model."
"""Of the model's weights within the module that DeepSpeed trains."""


def find(url: str) -> Checkpoint:
    """The checkpoint at `url`: a checkpoint's own folder, or a run's, of which it is the newest.

    Raises:
        CheckpointError: there is none.
    """
    url = storage.absolute(url)
    own = storage.exists(storage.join(url, "trainer.json"))
    found = opened(url) if own else newest(url)
    if found is None:
        raise CheckpointError(f"{url} is neither a finished checkpoint nor a run that has one")
    return found


def export(checkpoint: Checkpoint, output: str, dtype: str = "float32") -> ModelCard:
    """Writes the model to a folder or URL, the config last; on a CPU. Returns its card.

    Raises:
        CheckpointError: the checkpoint's files cannot be read.
        ModelError: weights that are not finite.
    """
    from model.lina import Lina

    facts = checkpoint.facts["model"]
    sizes = LinaConfig.from_dict(facts["sizes"])
    model = Lina(sizes)
    model.load_state_dict(read_weights(checkpoint))
    training = facts["training"] | {"step": checkpoint.step}
    card = ModelCard(sizes, tuple(facts["inventory"]), CodecIdentity.from_dict(facts["codec"]), training)
    files = pack(model, card, dtype)
    for name, content in files.items():
        storage.write_bytes(storage.join(output, name), content)
    return read_card(files["config.json"])


def read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's weights in float32, put together from the parts of all workers. Raises CheckpointError."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    with local_copy(checkpoint.url) as folder, pickles.as_data():
        try:
            if checkpoint.facts["stage"] == 0:
                state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
                weights = state["module"]
            else:
                from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

                weights = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
        except (OSError, KeyError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{checkpoint.url} cannot be read: {error}") from None
    return {name.removeprefix(_PREFIX): value.float() for name, value in weights.items()}
