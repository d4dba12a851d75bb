"""Where a model in training stands: the loss on utterances that it never trains on, and how it says some of them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.lina import Lina
from model.sampling import Policy, Speech, speak
from pipeline.loader import Loader, MicroBatch
from pipeline.phonemes import INVENTORY
from pipeline.pretrain_config import PretrainConfig
from pipeline.schedule import Schedule
from pipeline.training_log import tell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from infra.tracking import Run
    from model.codec import Codec
    from pipeline.token_index import TokenIndex
    from pipeline.training_engine import Engine


def validate(config: PretrainConfig, engine: Engine, index: TokenIndex, run: Run, step: int) -> dict[str, float]:
    """Validation losses, the same on all workers, which must all call it; the first one also lets the model speak.

    Returns:
        `valid.loss` and one by codebook, and `valid.bad_samples` where some could not be read; empty where nothing was
        held out.
    """
    _, held = index.split(config.valid_fraction)
    if not len(held):
        return {}
    longest = int(held.columns["frames"][held.rows].max()) + config.codebooks + 1
    schedule = Schedule(held, 0, max(config.budget, longest * engine.world), config.codebooks, window=config.window)
    count = min(config.valid_batches, schedule.steps_per_epoch())
    cache = {"cache": config.cache_folder, "cache_bytes": config.cache_bytes}
    with Loader(schedule, rank=engine.rank, world=engine.world, **cache) as loader:
        loaded = [loader.load(number) for number in range(count)]
    parts, bad = [batches[0] for batches, _ in loaded], [sample for _, left_out in loaded for sample in left_out]
    if bad:
        some = f"such as sample {bad[0].row} of {bad[0].shard}: {bad[0].reason}"
        tell(f"step {step:6d} validation without {len(bad)} samples that cannot be read, {some}")
    loss, by_codebook = engine.loss([part.batch if part.rows.size else None for part in parts])
    metrics = {"valid.loss": loss} | {f"valid.loss.codebook.{k}": value for k, value in enumerate(by_codebook, 1)}
    if of_all := int(engine.added_up(torch.tensor([len(bad)]))):
        metrics["valid.bad_samples"] = of_all
    weights = engine.weights() if config.speak else None
    if weights is not None:
        model = Lina(config.sizes())
        model.load_state_dict(weights)
        _say_some(config, model.to(engine.device), parts[0], index.codec["sample_rate"], run, step)
    return metrics


def _say_some(config: PretrainConfig, model: Lina, held: MicroBatch, rate: int, run: Run, step: int) -> None:
    """Says held-out sentences; audio, spectrograms and alignments become artefacts of the run."""
    batch, count = held.batch, min(config.speak, len(held.rows))
    if not count:
        tell(f"step {step:6d} said nothing: none of the first held-out sentences can be read")
        return
    device = next(model.parameters()).device
    policy = Policy(max_frames=2 * int(batch.code_lengths[:count].max()))
    with torch.no_grad():
        texts = (batch.phones[:count].to(device), batch.phone_lengths[:count].to(device))
        spoken = speak(model, *texts, policy, seeds=range(count))
    waves = _decoded(config, [speech.codes.cpu().numpy() for speech in spoken])
    for number, speech in enumerate(spoken):
        wave = None if waves is None else waves[number]
        name = f"spoken/step-{step:08d}/{number}"
        phones = batch.phones[number, 1 : batch.phone_lengths[number] - 1].tolist()
        title = " ".join(INVENTORY[phone] for phone in phones).replace(" <space>", "  ")
        run.log_figure(_picture(f"{held.keys[number]}: {title}", speech, wave, rate), f"{name}.png")
        if wave is not None:
            _log_wav(run, wave, rate, name)
    ended = sum(speech.finished for speech in spoken)
    tell(f"step {step:6d} said {count} sentences, {ended} ended by themselves")


def _decoded(config: PretrainConfig, codes: list[np.ndarray]) -> list[np.ndarray] | None:
    """Waveforms, or None where the dataset's codec cannot be had here; codes that the model has not are left out."""
    if (codec := _codec(config.data)) is None:
        return None
    return [codec.decode([c.astype(np.uint16)])[0] if c.shape[1] else np.zeros(1, np.float32) for c in codes]


@cache
def _codec(dataset: str) -> Codec | None:
    """The codec of a dataset; None, and a line that says why, where it is not at hand. Looked for once a process, and
    never on the internet: while the first worker waits, all others do."""
    from model.codec_config import CodecError
    from pipeline.plan import Plan, PlanError
    from pipeline.samples import codec_of

    try:
        if (plan := Plan.load(dataset)) is None:
            raise CodecError(f"{dataset} has no plan that says where its codec lies")
        return codec_of(plan, fetch=False)
    except (CodecError, PlanError, OSError) as error:
        tell(f"nothing to hear: {error}")
        return None


def _picture(title: str, speech: Speech, wave: np.ndarray | None, rate: int) -> Figure:
    """The spectrogram of what was said above where in the text it was."""
    from matplotlib.figure import Figure

    from pipeline.measures import log_mel

    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    if wave is not None and len(wave) > rate // 10:
        upper.imshow(log_mel(wave, rate), aspect="auto", origin="lower", cmap="magma")
    upper.set_title(title[:130], fontsize=8, loc="left")
    lower.imshow(speech.attention.T.float().cpu().numpy(), aspect="auto", origin="lower", interpolation="nearest")
    lower.set_xlabel("step"), lower.set_ylabel("phoneme")
    return figure


def _log_wav(run: Run, wave: np.ndarray, rate: int, name: str) -> None:
    import tempfile
    from pathlib import Path

    from pipeline.listening import wav

    folder, _, base = name.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, f"{base}.wav")
        file.write_bytes(wav(wave, rate))
        run.log_artifact(str(file), folder)
