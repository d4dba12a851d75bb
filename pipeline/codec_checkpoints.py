"""What a codec's training keeps in its output folder: the checkpoint that it goes on from, and the codec so far.

<output>/checkpoint.pt    everything the next step depends on; tensors, numbers and text only
<output>/export/          config.json and model.safetensors: what `--codec PATH` takes
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from infra import storage
from model.codec import CONFIG_FILE, WEIGHTS_FILE
from model.codec_config import CodecError

if TYPE_CHECKING:
    from model.codec_training.trainer import CodecTrainer

CHECKPOINT, EXPORT = "checkpoint.pt", "export"


def save_checkpoint(trainer: CodecTrainer, output: str) -> None:
    import torch

    content = io.BytesIO()
    torch.save(trainer.state_dict(), content)
    storage.write_bytes(storage.join(output, CHECKPOINT), content.getvalue())


def load_checkpoint(trainer: CodecTrainer, output: str) -> None:
    """Raises CodecError where the checkpoint is damaged or trains another architecture."""
    trainer.load_state_dict(read_checkpoint(output))


def read_checkpoint(output: str) -> dict[str, Any]:
    import pickle

    import torch

    url = storage.join(output, CHECKPOINT)
    try:
        return torch.load(io.BytesIO(storage.read_bytes(url)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CodecError(f"{url} is no checkpoint of train_codec: {error}; delete it to start anew") from None


def export(trainer: CodecTrainer, output: str) -> None:
    """Writes `output`/export, the weights first. Raises CodecError before the codebooks have started."""
    folder = storage.join(output, EXPORT)
    storage.write_bytes(storage.join(folder, WEIGHTS_FILE), trainer.weights())
    storage.write_text(storage.join(folder, CONFIG_FILE), json.dumps(trainer.config.to_dict(), indent=2) + "\n")
