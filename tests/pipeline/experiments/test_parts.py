"""The parts of experiments: subsets of speech, degraded recordings, verdicts, and the twins' costs and losses."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from infra.config import ConfigError, load
from pipeline.evaluation import Figure
from pipeline.experiments import cells as grid
from pipeline.experiments import claims, decoding, ist_ablation, report, twin_models, twins
from pipeline.experiments.adapting import prompt_sets
from pipeline.experiments.cells import Cell
from pipeline.experiments.config import ExperimentsConfig, condition_of
from pipeline.experiments.data_amount import ALL, least, single, subsets
from pipeline.experiments.degrading import degraded
from tests.pipeline.speaking_tokens import IDENTITY, SIZES, write_tokens

CONSENT = {"who": "Ann Example", "when": "2025-03-01", "scope": "tests"}
lengths = st.lists(st.floats(0.3, 20), min_size=1, max_size=30)
amounts = st.lists(st.floats(0.5, 100), min_size=1, max_size=6, unique=True)


@given(lengths, amounts, st.integers(0, 2**32))
def test_more_data_holds_all_of_less(seconds, wanted, seed):
    found = subsets(seconds, wanted, seed)
    assert found == subsets(seconds, wanted[::-1], seed)
    ordered = [found[amount] for amount in sorted(found, key=lambda amount: amount or math.inf)]
    assert all(set(less) < set(more) for less, more in pairwise(ordered))
    assert found[ALL] == tuple(range(len(seconds)))
    for amount, places in found.items():
        total = sum(seconds[place] for place in places)
        assert amount == ALL or 0.7 * amount <= total <= 1.3 * amount
    for amount, (place,) in single(seconds, wanted).items():
        assert abs(seconds[place] - amount) == min(abs(one - amount) for one in seconds)


def test_an_amount_that_takes_all_there_is_is_no_amount_of_its_own():
    assert list(subsets([16.2] * 4, (20.0, 80.0), 0)) == [20.0, ALL]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 9), st.integers(0, 99))
def test_prompts_differ_and_take_every_sample_before_any_again(count, size, most, seed):
    sets = prompt_sets(count, size, most, seed)
    assert 1 <= len(sets) <= most and all(len(set(places)) == len(places) == min(size, count) for places in sets)
    assert all(0 <= place < count for places in sets for place in places)
    used = [place for places in sets for place in places][:count]
    assert len(set(used)) == len(used)


def test_a_sample_is_heard_where_it_was_cut_from(tmp_path):
    """Of one recording: a channel, a stretch, and parts that a long one without text was cut into."""
    from pipeline import codec_weights
    from pipeline.experiments import people
    from pipeline.speakers import read_speakers
    from tests.corpora import voiced, write_codec

    random, rate = np.random.default_rng(0), 24_000
    both = np.stack([voiced(random, 3.0, rate), voiced(random, 3.0, rate)], 1)
    soundfile.write(tmp_path / "two.wav", both, rate, subtype="FLOAT")
    given = [{"audio": "two.wav", "text": "Rain again.", "channel": 1, "start": 0.5, "duration": 1.0}]
    given += [{"audio": "two.wav", "text": "Rain.", "channel": 0}]
    row = {"speaker": "ann", "samples": given, "consent": CONSENT}
    (tmp_path / "speakers.jsonl").write_text(json.dumps(row) + "\n")
    config = ExperimentsConfig(speakers=str(tmp_path / "speakers.jsonl"))
    (speaker,) = read_speakers(config.speakers)
    codec = codec_weights.resolve(write_codec(tmp_path / "codec"))
    kit = people._Kit(config, codec, 4, "cpu", {"ann": speaker})
    result, _ = people.encode(people._cell(kit, speaker, "clean"), kit)
    result = json.loads(json.dumps(grid.plain(result)))
    person = people.Person("ann", "clean", result["digest"], tuple(result["samples"]), tuple(result["sources"]))
    for place, wanted in enumerate((both[12_000:36_000, 1], both[:, 0])):
        wave, found = person.recorded(place)
        assert found == rate and np.array_equal(wave, wanted)


def test_noise_is_as_loud_as_asked_and_a_room_rings_on():
    time = np.arange(24_000) / 24_000
    speech = (0.3 * np.sin(2 * np.pi * 220 * time) * (time < 0.5)).astype(np.float32)
    for snr in (20.0, 0.0):
        noise = degraded(speech, 24_000, "noise", snr, 1).astype(np.float64) - speech
        assert 10 * np.log10(np.mean(speech.astype(np.float64) ** 2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.1)
    assert np.array_equal(degraded(speech, 24_000, "noise", 5, 1), degraded(speech, 24_000, "noise", 5, 1))
    assert not np.array_equal(degraded(speech, 24_000, "noise", 5, 1), degraded(speech, 24_000, "noise", 5, 2))
    tails = {}
    for rt60 in (0.2, 0.8):
        wet = degraded(speech, 24_000, "reverb", rt60, 1)
        assert len(wet) == len(speech) and np.mean(wet**2) == pytest.approx(np.mean(speech**2), rel=0.2)
        tails[rt60] = np.mean(wet[15_000:] ** 2)
    assert tails[0.8] > 100 * tails[0.2] > 0 == np.mean(speech[15_000:] ** 2)
    assert np.allclose(degraded(speech, 24_000, "level", -20, 1), speech / 10, atol=1e-6)
    assert np.abs(degraded(speech, 24_000, "level", 20, 1)).max() == 1.0
    assert degraded(speech, 24_000, "clean", 0, 1) is speech


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Figure(-0.5, -0.6, -0.4), claims.AGREES),
        (Figure(0.5, 0.4, 0.6), claims.CONTRADICTS),
        (Figure(0.2, -0.1, 0.5), claims.UNDECIDED),
        (Figure(0.002, 0.001, 0.003), claims.EQUAL),
        (None, "—"),
    ],
)
def test_a_verdict_is_that_of_the_interval(difference, verdict):
    claim = claims.compared("less", "1 against 2", "difference", difference, claims.FEWEST)
    assert claim.verdict == verdict
    contradicts = claims.verdicts([claim])[-2]
    assert contradicts == (
        "**Our result contradicts: " + ("less" if verdict == claims.CONTRADICTS else "none of these findings") + ".**"
    )


@pytest.mark.parametrize(
    ("device", "shift", "verdict"),
    [
        ("cuda", -0.3, claims.AGREES),
        ("cuda", 0.3, claims.CONTRADICTS),
        ("cuda", 0.0, claims.EQUAL),
        ("cpu", 0.3, "undecided: measured on cpu; the paper's figure is a GPU's"),
    ],
)
def test_times_are_compared_round_by_round_and_only_on_a_gpu(device, shift, verdict):
    def cost(mixer: str, rounds: list[float]) -> dict:
        return {"mixer": mixer, "batch": 16, "seconds": 8.0, "last": True, "elapsed": min(rounds), "rounds": rounds}

    slower = [10.0, 10.5, 9.5, 10.2, 10.1]
    faster = [(1 + shift) * one * wobble for one, wobble in zip(slower, (0.99, 1.01, 1.0, 1.0, 1.0), strict=True)]
    found = {"device": device, "costs": [cost("gla", faster), cost("attention", slower)]}
    many, one = twins._timing_claims(found)
    assert many.verdict == verdict and one.verdict == "—"
    assert f"5 rounds: {shift:+.3f} [" in many.ours and f"[{shift:+.3f}, {shift:+.3f}]" not in many.ours
    few = found | {"costs": [cost("gla", faster[:2]), cost("attention", slower[:2])]}
    told = twins._timing_claims(few)[0].verdict
    assert told == (verdict if device == "cpu" else "undecided: 2 are too few, 5 are needed")


def test_few_pairs_decide_nothing():
    claim = claims.compared("less", "1 against 2", "difference", Figure(0.5, 0.5, 0.5), pairs=1)
    assert claim.verdict == "undecided: 1 are too few, 5 are needed" and "+0.500" in claim.ours


def test_twins_that_cannot_be_are_refused(twin_config):
    with pytest.raises(grid.ExperimentError, match="attention_head 64 must be"):
        twin_models.pretraining(dataclasses.replace(twin_config, preset=write_wide(twin_config)), "attention", "")


def write_wide(config: ExperimentsConfig) -> str:
    """Sizes that softmax heads do not divide."""
    file = Path(config.preset).with_name("wide.json")
    file.write_text(json.dumps(SIZES))
    return str(file)


def test_a_twins_folder_is_that_of_its_recipe(twin_config):
    folders = {
        twin_models.pretraining(dataclasses.replace(twin_config, **change), mixer, "x").output
        for change in ({}, {"train_steps": 7}, {"data": "other"}, {"seed": 1})
        for mixer in twins.MIXERS
    }
    assert len(folders) == 8


def write_trained(config: ExperimentsConfig, /, **training: object) -> ExperimentsConfig:
    """`config` with `twin_of` a model that says it was trained on its data, by a recipe of its own."""
    from model.checkpoint import ModelCard, save
    from model.codec_config import CodecIdentity
    from model.lina import Lina
    from pipeline.phonemes import INVENTORY
    from pipeline.pretrain_config import PretrainConfig
    from pipeline.training_data import open_index

    own = {"steps": 40, "budget": 700, "dropout": 0.05, "beta2": 0.9, "valid_fraction": 0.2}
    recipe = PretrainConfig(model=config.preset, data=config.data, **own)
    told = {"name": "mine", "dataset": open_index(recipe).digest, "config": recipe.identity()} | training
    folder = Path(config.preset).with_name("trained")
    save(Lina(recipe.sizes()), ModelCard(recipe.sizes(), INVENTORY, CodecIdentity.from_dict(IDENTITY), told), folder)
    return dataclasses.replace(config, twin_of=str(folder))


def test_the_twin_of_a_model_has_its_recipe_and_its_data(twin_config):
    from pipeline.training_data import open_index

    config = write_trained(twin_config)
    settings = twin_models.pretraining(config, "attention", "x")
    card = twin_models.given(config)
    assert (settings.steps, settings.budget, settings.beta2, settings.sizes().dropout) == (40, 700, 0.9, 0.05)
    theirs, ours = (dict(identity) for identity in (card.training["config"], settings.identity()))
    assert ours.pop("sizes") == theirs.pop("sizes") | {"mixer": "attention"}
    assert ours == theirs | {"mixer": "attention"}
    weights = twin_models.train(config, "gla", "x").weights
    assert weights == Path(config.twin_of, "model.safetensors").read_bytes(), "it is taken as it is"
    twin_models.require_data_of(card, open_index(settings), config)
    _, rows = twin_models.held_out(config, "gla")
    assert set(rows) == set(open_index(settings).split(0.2)[1].rows.tolist()), "what this model was not trained on"


def test_a_model_that_no_twin_can_be_trained_of_is_refused(twin_config):
    from pipeline.training_data import open_index

    def refused(config: ExperimentsConfig, match: str) -> None:
        with pytest.raises(grid.ExperimentError, match=match):
            twin_models.pretraining(config, "attention", "x")

    refused(write_trained(twin_config, started_from="abc"), "started from another model's weights")
    refused(write_trained(twin_config, config={}), "holds no recipe of this version")
    refused(write_trained(twin_config, config={"mixer": "gla", "steps": 1, "sizes": {}, "new": 1}), "holds no recipe")
    refused(
        dataclasses.replace(write_trained(twin_config), preset="tiny"),
        "its sizes are not those of --preset tiny: width",
    )
    refused(dataclasses.replace(twin_config, twin_of=twin_config.data), "is no exported model")
    config = write_trained(twin_config, dataset="another")
    settings = twin_models.pretraining(config, "attention", "x")
    with pytest.raises(grid.ExperimentError, match="was trained on the dataset with digest another"):
        twin_models.require_data_of(twin_models.given(config), open_index(settings), config)
    with pytest.raises(ValueError, match="twin_of needs data"):
        dataclasses.replace(config, data=None)


def test_losses_that_are_not_finite_are_told_and_not_averaged():
    def outcome(method: dict, **losses: float | None) -> dict:
        rows = {
            name: {"loss": loss} | ({} if method["name"] == "nothing" else {"best": loss, "parameters": 9})
            for name, loss in losses.items()
        }
        for row in rows.values():
            row["curve"] = [[0, 5.0], [2, row["loss"]]]
        return {"settings": {"method": method}, "result": rows}

    full = {"name": "full", "lr": 1.0}
    outcomes = [outcome({"name": "nothing"}, ann=5.0, bob=6.0), outcome(full, ann=4.0, bob=None)]
    outcomes.append(outcome(full | {"lr": 9.0}, ann=None, bob=None))
    found = ist_ablation.summary(ExperimentsConfig(), outcomes)
    assert [(row["method"], row["speakers"]) for row in found["rows"]] == [("no voice", 2), ("all weights, lr 1", 1)]
    assert found["rows"][1]["gain"].value == -1.0 and found["rows"][1]["curve"] == [[0, 5.0], [2, 4.0]]
    text = "\n".join(ist_ablation.section(ExperimentsConfig(), found))
    assert "all weights, lr 1 for bob, all weights, lr 9 for ann, all weights, lr 9 for bob" in text
    assert set(ist_ablation.figures(found)) == {"losses", "ranks"}


def test_pairs_are_resampled_together():
    first, second = ({f"s{i}": i + shift for i in range(20)} for shift in (0.5, 0.0))
    assert claims.paired(first, second) == pytest.approx((0.5, 0.5, 0.5))
    assert claims.paired(first, {"other": 1.0}) is None
    alone = claims.mean(first.values())
    assert alone.low < alone.value < alone.high


def test_the_least_amount_is_that_from_which_on_tuning_always_wins():
    def gain(amount, high, data="many"):
        return {"data": data, "amount": amount, "gain": Figure(high - 1, high - 2, high)}

    rising = [gain(3.0, 0.1), gain(5.0, -0.1), gain(10.0, 0.2), gain(20.0, -0.3), gain(ALL, -0.4), gain(3.0, -1, "one")]
    assert least(rising) == 20.0
    assert least([gain(3.0, -0.1), gain(ALL, 0.1)]) is None
    assert least([gain(3.0, -0.1), gain(ALL, -0.1)]) == 3.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranks", "1,-1"),
        ("ranks", "1,1"),
        ("lrs", "0.1,0"),
        ("amounts", "3,nan"),
        ("batches", "0,1"),
        ("held_out", "1.0"),
        ("people", "0"),
        ("seeds", "0"),
        ("conditions", "noise"),
        ("conditions", "noise:loud"),
        ("conditions", "hum:3"),
        ("conditions", "reverb:0"),
        ("prompts", "1.5"),
        ("clock", "sun"),
    ],
)
def test_bad_grids_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        load(ExperimentsConfig, overrides={field: value})


def test_conditions_are_kinds_with_numbers():
    assert condition_of("clean") == ("clean", 0.0) and condition_of("noise:-5") == ("noise", -5.0)


@pytest.fixture
def twin_config(tmp_path) -> ExperimentsConfig:
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(SIZES | {"attention_head": 8}))
    return ExperimentsConfig(
        output=str(tmp_path / "out"),
        preset=str(sizes),
        batches=(1, 8),
        seconds=(0.2, 0.4),
        device="cpu",
        tracking="none",
        valid_fraction=0.3,
        valid_most=7,
        data=write_tokens(tmp_path / "tokens"),
    )


def test_one_twin_remembers_ever_more_and_the_other_no_more(twin_config, tmp_path):
    folder = str(tmp_path)
    cells = twins._timed(twin_config, 75.0)
    for cell in cells:
        grid.perform(folder, decoding.work, None, cell)
    outcomes = grid.read(folder, cells)
    found = {(one["settings"]["mixer"], one["settings"]["batch"]): one for one in outcomes}
    gla, attention = (found[(mixer, 8)]["result"]["state_bytes"] for mixer in twins.MIXERS)
    assert gla[0] == gla[1] == 8 * found[("gla", 1)]["result"]["state_bytes"][0]
    assert attention[1] > 1.7 * attention[0]
    for one in outcomes:
        early, late = one["machine"]["elapsed"]
        assert 0 < early < late
        assert len(one["machine"]["rounds"]) >= claims.FEWEST
        assert late == min(last for _, last in one["machine"]["rounds"])
    summary = twins.summary(twin_config, outcomes)
    text = "\n".join(twins.section(twin_config, summary))
    assert "No `--data` was given" in text and "softmax attention speaks faster at one row" in text
    assert text.count("undecided: measured on cpu") == 2
    assert set(twins.metrics(summary)) == {f"audio_rate.{m}.{b}" for m in twins.MIXERS for b in (1, 8)}
    written = report.write(
        str(tmp_path / "out"), "gla-vs-attention", {"summary": summary}, [text], twins.figures(summary)
    )
    assert [file.rpartition("/")[2] for file in written] == ["decoding.png", "section.md", "results.json", "report.md"]


def test_twins_are_compared_on_utterances_that_neither_was_trained_on(twin_config, tmp_path):
    import torch

    from model.checkpoint import ModelCard, pack
    from model.codec_config import CodecIdentity
    from model.lina import Lina
    from pipeline.phonemes import INVENTORY
    from pipeline.synthesis import ModelFiles

    files = {}
    for mixer in twins.MIXERS:
        sizes = twin_models.pretraining(twin_config, mixer, "").sizes()
        torch.manual_seed(0)
        packed = pack(Lina(sizes), ModelCard(sizes, INVENTORY, CodecIdentity.from_dict(IDENTITY), {}))
        files[mixer] = ModelFiles(mixer, packed["config.json"], packed["model.safetensors"])
    kit = twin_models.Kit(twin_config, str(tmp_path), files, None)
    index, rows = twin_models.held_out(twin_config, "gla")
    train, held = index.split(twin_config.valid_fraction)
    assert set(rows) <= set(held.rows.tolist()) and not set(rows) & set(train.rows.tolist()) and len(rows) == 7
    cells = [Cell(twin_models.LOSSES, {"mixer": mixer}) for mixer in twins.MIXERS]
    for cell in cells:
        grid.perform(str(tmp_path), twin_models.losses, kit, cell)
    outcomes = grid.read(str(tmp_path), cells)
    frames = index.columns["frames"][rows]
    assert outcomes[0]["result"]["tokens"] == outcomes[1]["result"]["tokens"] == (4 * frames + 10).tolist()
    losses = {one["settings"]["mixer"]: one["result"] for one in outcomes}
    difference = twins._difference(losses)
    both = [sum(losses[mixer]["sums"]) / sum(losses[mixer]["tokens"]) for mixer in twins.MIXERS]
    assert difference.value == pytest.approx(both[0] - both[1])
    pairs = twin_models._prompted(index, rows, 4)
    speakers = index.columns["speaker"]
    assert len(pairs) == 4 and all(a != b and speakers[a] == speakers[b] for a, b in pairs)
