"""The trained part of the twins: pretraining, the loss on what was held out, and what they say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import storage
from pipeline.codec_weights import ResolvedCodec
from pipeline.experiments.cells import Cell, ExperimentError
from pipeline.experiments.config import ExperimentsConfig
from pipeline.model_export import EXPORT
from pipeline.pretrain_config import PretrainConfig
from pipeline.synthesis import ModelFiles

if TYPE_CHECKING:
    from model.checkpoint import ModelCard
    from pipeline.shards import Sample
    from pipeline.token_index import TokenIndex

LOSSES, SPEECH = "twin-loss", "twin-speech"


@dataclass(frozen=True)
class Kit:
    """What cells of trained twins share."""

    config: ExperimentsConfig
    folder: str
    files: dict[str, ModelFiles]
    """By mixer."""
    codec: ResolvedCodec | None


def pretraining(config: ExperimentsConfig, mixer: str, folder: str) -> PretrainConfig:
    """How a twin is trained: everything but the mixer is the same. Its folder is named by all that it depends on.

    Raises:
        ExperimentError: sizes or a recipe that cannot be.
    """
    card = given(config)
    recipe = _recipe_of(card, config) if card else _recipe(config)
    try:
        settings = PretrainConfig(
            **{name: getattr(config, name) for name in ("data", "accumulate", "device")},
            **recipe,
            name=f"twin-{mixer}",
            model=config.preset,
            mixer=mixer,
            save_every=max(1, recipe["steps"] // 4),
            evaluate_every=recipe["steps"],
            speak=0,
            keep=1,
            threads=config.threads,
            tracking="none",
        )
    except ValueError as error:
        raise ExperimentError(f"the {mixer} twin: {error}") from None
    told = json.dumps([settings.identity(), config.data, config.accumulate], sort_keys=True)
    name = f"{mixer}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    return dataclasses.replace(settings, output=storage.join(folder, "runs", name))


def given(config: ExperimentsConfig) -> ModelCard | None:
    """The card of the model in `twin_of`; None where nothing is named. Raises ExperimentError."""
    from model.checkpoint import CONFIG_FILE, read_card

    if not config.twin_of:
        return None
    try:
        return read_card(storage.read_bytes(storage.join(config.twin_of, CONFIG_FILE)))
    except storage.UNREADABLE as error:  # ModelError is a ValueError
        raise ExperimentError(f"twin_of {config.twin_of} is no exported model ({error})") from None


def require_data_of(card: ModelCard, index: TokenIndex, config: ExperimentsConfig) -> None:
    """Raises ExperimentError where the model in `twin_of` has learned from another dataset."""
    if card.training.get("dataset") != index.digest:
        raise ExperimentError(
            f"the model in twin_of {config.twin_of} was trained on the dataset with digest "
            f"{card.training.get('dataset')}, that of --data {config.data} is {index.digest}: twins want the same"
        )


def _recipe(config: ExperimentsConfig) -> dict[str, Any]:
    same = ("codebooks", "budget", "learning_rate", "warmup", "precision", "valid_fraction", "seed")
    return {name: getattr(config, name) for name in same} | {"steps": config.train_steps}


def _recipe_of(card: ModelCard, config: ExperimentsConfig) -> dict[str, Any]:
    """What the model in `twin_of` was trained by, its mixer aside. Raises ExperimentError."""
    why = f"no twin can be trained as {config.twin_of} was: "
    if card.training.get("started_from"):
        raise ExperimentError(f"{why}it started from another model's weights")
    recipe = dict(card.training.get("config") or {})
    theirs, mixer = recipe.pop("sizes", None), recipe.pop("mixer", None)
    unknown = recipe.keys() - {field.name for field in dataclasses.fields(PretrainConfig)}
    if theirs is None or mixer is None or "steps" not in recipe or unknown:
        raise ExperimentError(f"{why}its config.json holds no recipe of this version of jobs/pretrain.py")
    try:
        ours = PretrainConfig(**recipe, model=config.preset, mixer=mixer).sizes().to_dict()
    except ValueError as error:
        raise ExperimentError(f"{why}{error}") from None
    if differing := [
        f"{name} {theirs.get(name)}, not {value}" for name, value in ours.items() if theirs.get(name) != value
    ]:
        raise ExperimentError(f"{why}its sizes are not those of --preset {config.preset}: {'; '.join(differing)}")
    return recipe


def train(config: ExperimentsConfig, mixer: str, folder: str) -> ModelFiles:
    """A twin, trained to its end; goes on where it was cut off. What `twin_of` names is taken as it is.

    Raises:
        DataError, CheckpointError, PretrainError: as `pipeline.pretraining.pretrain`.
        ExperimentError: it was stopped before its end.
    """
    from pipeline.pretraining import pretrain
    from pipeline.synthesis import read_model

    if (card := given(config)) and card.sizes.mixer == mixer:
        return read_model(config.twin_of)
    settings = pretraining(config, mixer, folder)
    pretrain(settings)
    exported = storage.join(settings.output, EXPORT)
    if not storage.exists(storage.join(exported, "config.json")):
        raise ExperimentError(f"training of {settings.output} was stopped; the same command goes on from there")
    return read_model(exported)


def curve(config: ExperimentsConfig, mixer: str, folder: str) -> list[list[float]]:
    """[[step, training loss], …], at most a hundred; empty where the run kept none."""
    url = storage.join(pretraining(config, mixer, folder).output, "losses.jsonl")
    if not storage.exists(url):
        return []
    by_step = {
        row["step"]: row["loss"] for row in map(json.loads, storage.read_text(url).splitlines()) if "loss" in row
    }
    steps = sorted(by_step)
    return [[step, by_step[step]] for step in steps[:: max(1, len(steps) // 100)]]


def held_out(config: ExperimentsConfig, mixer: str) -> tuple[TokenIndex, list[int]]:
    """(the dataset, rows that neither twin was trained on, spread evenly over them)."""
    from pipeline.training_data import open_index

    settings = pretraining(config, mixer, config.output)
    index = open_index(settings)
    _, held = index.split(settings.valid_fraction)
    if not len(held):
        raise ExperimentError(f"nothing of {config.data} is held out; raise valid_fraction ({settings.valid_fraction})")
    places = np.unique(np.linspace(0, len(held) - 1, min(config.valid_most, len(held))).round().astype(int))
    return index, held.rows[places].tolist()


def losses(cell: Cell, kit: Kit) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a twin: ({sums, tokens}, {}), lists over the held-out utterances, codebooks and ends included."""
    import torch

    from model.checkpoint import unpack
    from model.lina import Batch
    from pipeline.loader import collate

    torch.set_num_threads(kit.config.threads)
    files, sums, tokens = kit.files[cell.settings["mixer"]], [], []
    model, card = unpack(files.config, files.weights, kit.config.device)
    index, rows = held_out(kit.config, cell.settings["mixer"])
    with torch.no_grad():
        for sample in _read(index, rows).values():
            batch = collate([sample], card.sizes.codebooks)
            output = model(Batch(*(part.to(kit.config.device) for part in batch)))
            sums.append(float(output.row_losses.sum()))
            tokens.append(int(output.row_tokens.sum()))
    return {"sums": sums, "tokens": tokens}, {}


def speech(cell: Cell, kit: Kit) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a twin: ({speech: a row a sentence}, {}): held-out texts, after a prompt of the same speaker of about three
    seconds or from nothing, judged; similarity is that to the prompt's voice, as the codec gives it."""
    import torch

    from pipeline.experiments.speaking import judged, said, single_attempts
    from pipeline.listening import wav
    from pipeline.speaker_samples import to_samples
    from pipeline.speech_lines import derived

    torch.set_num_threads(kit.config.threads)
    settings, config = cell.settings, kit.config
    synthesizer = single_attempts(kit.files[settings["mixer"]], kit.codec, config.device)
    ids, rate = {p: n for n, p in enumerate(synthesizer.card.inventory)}, synthesizer.card.codec.sample_rate
    codebooks = synthesizer.card.sizes.codebooks
    index, rows = held_out(config, settings["mixer"])
    pairs = _prompted(index, rows, settings["sentences"])
    samples, found = _read(index, sorted({row for pair in pairs for row in pair})), []
    for place, (row, prompt_row) in enumerate(pairs):
        if not {row, prompt_row} <= samples.keys() or not samples[row].meta.get("text"):
            continue
        prompt, text = samples[prompt_row], samples[row].meta["text"]
        (before,) = to_samples([{"phones": prompt.phones, "codes": prompt.codes}], ids)
        before = before if settings["prompted"] else None
        wave, told = said(synthesizer, None, before, text, derived(config.seed, place))
        folder = storage.join(kit.folder, "speech", cell.name)
        reference = storage.join(folder, f"{place}-prompt.wav")
        storage.write_bytes(reference, wav(synthesizer.decode(prompt.codes[:codebooks]), rate))
        told |= judged(kit.folder, config.recogniser, wave, rate, text, storage.join(folder, f"{place}.wav"), reference)
        found.append(told)
    return {"speech": found}, {}


def _prompted(index: TokenIndex, rows: list[int], most: int) -> list[tuple[int, int]]:
    """(held-out row, another row of its speaker, of about three seconds), spread evenly."""
    speakers, frames = index.columns["speaker"], index.columns["frames"].astype(np.int64)
    pairs = []
    for row in rows:
        same = index.rows[(speakers[index.rows] == speakers[row]) & (index.rows != row)]
        if len(same):
            away = np.abs(frames[same] - 3 * index.codec["frame_rate"])
            pairs.append((row, int(same[away.argmin()])))
    places = np.unique(np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int)) if pairs else []
    return [pairs[place] for place in places]


def _read(index: TokenIndex, rows: list[int]) -> dict[int, Sample]:
    """Samples by row, in the order asked for; what cannot be read is left out."""
    from pipeline.sample_reader import SampleReader

    good, _ = SampleReader(index).read(np.array(rows, dtype=np.int64))
    return {row: good[row] for row in rows if row in good}
