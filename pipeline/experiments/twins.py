"""Gated linear attention against softmax attention, at equal size, on equal data (the paper's figure 3 and table 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import storage
from pipeline.evaluation import Figure, interval
from pipeline.experiments import cells as grid
from pipeline.experiments import decoding, twin_models, voices
from pipeline.experiments.cells import Cell, Outcome
from pipeline.experiments.claims import Claim, compared, mean, paired, shown, table, verdicts
from pipeline.experiments.config import ExperimentsConfig
from pipeline.plots import INK, MARK, in_style, row_of_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

MIXERS = ("gla", "attention")
_NAMES = {"gla": "gated linear attention", "attention": "softmax attention"}
PAPER_SECONDS = {1: (22.5, 20.1), 2: (22.9, 20.0), 4: (22.9, 22.6), 8: (23.1, 38.7), 16: (23.2, 81.4)}
"""Figure 3, RTX 4090: seconds for 40 s of audio by batch, (gated linear, softmax) attention."""
PAPER_TABLE = {"gla": ("2.8", "6.9", ".93", "49.6"), "attention": ("3.2", "7.8", ".93", "50.4")}
"""Table 2, LibriTTS test-clean: CER, WER in %, similarity (WavLM's), test perplexity."""
_FRAMES = 75.0
"""A second, where no dataset says how many: EnCodec's."""
TRAINED = "twin"
_STARTS = {True: "after a prompt", False: "from nothing"}


def run(config: ExperimentsConfig, folder: str, on_done: Callable[[str, int, int], None]) -> list[Outcome]:
    """All cells of the experiment: decoding on untrained weights; with --data, twins trained, compared and heard.

    Raises:
        ModelError, DataError, CheckpointError, PretrainError, ExperimentError.
    """
    gpus = config.gpus if config.device == "cuda" else 0
    rate, identity = _FRAMES, {}
    if config.data:
        from pipeline.training_data import open_index

        index = open_index(twin_models.pretraining(config, MIXERS[0], folder))
        if card := twin_models.given(config):
            twin_models.require_data_of(card, index, config)
        rate, identity = index.codec["frame_rate"], {"dataset": index.digest}
    timed = _timed(config, rate)
    found = grid.run(folder, timed, decoding.work, None, lambda *n: on_done("decoding", *n), config.threads, gpus)
    return found + (_trained(config, folder, identity, on_done, gpus) if config.data else [])


def summary(config: ExperimentsConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Sizes, cost by batch and length, the cost of a long row by batch, losses, and the paper's claims."""
    costs, losses, curves, heard, sizes = [], {}, {}, [], {}
    for outcome in outcomes:
        settings, result, machine = (outcome[name] for name in ("settings", "result", "machine"))
        mixer, kind = settings["mixer"], outcome["kind"]
        if kind == decoding.KIND:
            sizes[mixer] = result["parameters"]
            for place, frames in enumerate(settings["frames"]):
                row = {"mixer": mixer, "batch": settings["batch"], "seconds": frames / settings["frame_rate"]}
                row |= {"elapsed": machine["elapsed"][place], "state_bytes": result["state_bytes"][place]}
                row["rounds"] = [elapsed[place] for elapsed in machine["rounds"]]
                costs.append(row | {"peak_bytes": machine["peak_bytes"], "last": frames == settings["frames"][-1]})
        elif kind == TRAINED:
            curves[mixer] = result["curve"]
        elif kind == twin_models.LOSSES:
            losses[mixer] = result
        elif kind == twin_models.SPEECH:
            heard += voices.heard([(f"{_NAMES[mixer]}, {_STARTS[settings['prompted']]}", {"all": result})])
    timed = next(one["settings"] for one in outcomes if one["kind"] == decoding.KIND)
    how = f"{timed['device']} ({timed['threads']} threads, {timed['clock']} seconds)"
    found = {"sizes": sizes, "costs": costs, "curves": curves, "heard": heard, "device": timed["device"], "how": how}
    found["losses"] = {
        mixer: interval(np.array(result["sums"]), np.array(result["tokens"])) for mixer, result in losses.items()
    }
    found |= {
        "difference": _difference(losses),
        "utterances": min((len(r["sums"]) for r in losses.values()), default=0),
    }
    return found | {"claims": _claims(found, outcomes)}


def section(config: ExperimentsConfig, found: dict[str, Any]) -> list[str]:
    by_place: dict[tuple[int, float], dict[str, dict[str, Any]]] = {}
    for row in found["costs"]:
        by_place.setdefault((row["batch"], row["seconds"]), {})[row["mixer"]] = row
    rows = []
    for (batch, seconds), there in by_place.items():
        cost = [there[mixer] for mixer in MIXERS]
        rates = [f"{batch * seconds / row['elapsed']:.2f}" for row in cost]
        states = [f"{row['state_bytes'] / 1e6:.3f}" for row in cost]
        peaks = [
            f"{row['peak_bytes'] / 1e6:.1f}" if row["last"] and row["peak_bytes"] is not None else "" for row in cost
        ]
        rows.append((batch, f"{seconds:.3g}", *rates, *states, *peaks))
    head = ["rows", "seconds each"]
    head += [f"{what}, {mixer}" for what in ("audio-s/s", "state MB", "peak MB") for mixer in MIXERS]
    sizes = " and ".join(f"{found['sizes'][mixer]:,} parameters ({_NAMES[mixer]})" for mixer in MIXERS)
    lines = [
        f"Twins of {sizes}, untrained for these figures, on {found['how']}; the codec's part is not in them. Rates "
        "are the fastest round's. The state is what must be kept of all rows; the peak is what the process took beyond "
        "what it had before.",
        "",
        *table(head, rows),
        "",
        "The paper, 40 s of audio on an RTX 4090, audio-s/s: "
        + "; ".join(f"{n} rows {40 * n / a:.1f} and {40 * n / b:.1f}" for n, (a, b) in PAPER_SECONDS.items())
        + ".",
        "",
    ]
    if found["losses"]:
        lines += _compared(config, found)
    else:
        lines += ["No `--data` was given: nothing was trained, so there is no loss and nothing to hear.", ""]
    return [*lines, *verdicts(found["claims"]), *(voices.heard_section(found["heard"]) if found["losses"] else [])]


def figures(found: dict[str, Any]) -> dict[str, Picture]:
    pictures = {"decoding": _decoding(found["costs"])}
    return pictures | ({"training": _training(found["curves"])} if any(found["curves"].values()) else {})


def metrics(found: dict[str, Any]) -> dict[str, float]:
    last = [row for row in found["costs"] if row["last"]]
    named = {f"audio_rate.{r['mixer']}.{r['batch']}": r["batch"] * r["seconds"] / r["elapsed"] for r in last}
    return named | {f"valid_loss.{mixer}": loss.value for mixer, loss in found["losses"].items()}


def _timed(config: ExperimentsConfig, rate: float) -> list[Cell]:
    """Cells of decoding; memory of one does not stand in the way of another's, for each forgets its peak."""
    frames = sorted({max(9, round(seconds * rate)) for seconds in config.seconds})
    same = {"frames": frames, "frame_rate": rate, "device": config.device, "threads": config.threads}
    same |= {"clock": config.clock, "rounds": decoding.ROUNDS}
    base = dataclasses.asdict(twin_models.pretraining(config, MIXERS[0], "").sizes())
    return [
        Cell(decoding.KIND, {"mixer": mixer, "sizes": base | {"mixer": mixer}, "batch": batch, **same})
        for batch in config.batches
        for mixer in MIXERS
    ]


def _trained(config: ExperimentsConfig, folder: str, identity: dict[str, Any], on_done, gpus: float) -> list[Outcome]:
    from model.checkpoint import read_card
    from pipeline.bulk_synthesis import codec_of

    files, trained, found = {}, [], []
    card = twin_models.given(config)
    for number, mixer in enumerate(MIXERS):
        on_done("training", number, len(MIXERS))
        files[mixer] = twin_models.train(config, mixer, folder)
        if not card or card.sizes.mixer != mixer:
            recipe = twin_models.pretraining(config, mixer, folder).identity()
            trained.append(Cell(TRAINED, {"mixer": mixer, "recipe": recipe, **identity}))
    on_done("training", len(MIXERS), len(MIXERS))
    for cell in grid.missing(folder, trained):
        grid.perform(folder, _curve, config, cell)
    found += grid.read(folder, trained)
    codec = codec_of(config, files[MIXERS[0]]) if config.listen else None
    kit = twin_models.Kit(config, folder, files, codec)
    same = {
        mixer: {"mixer": mixer, "model": read_card(files[mixer].config).fingerprint, **identity} for mixer in MIXERS
    }
    fraction = twin_models.pretraining(config, MIXERS[0], folder).valid_fraction
    most = {"valid_fraction": fraction, "valid_most": config.valid_most}
    cells = [Cell(twin_models.LOSSES, same[mixer] | most) for mixer in MIXERS]
    found += grid.run(folder, cells, twin_models.losses, kit, lambda *n: on_done("losses", *n), config.threads, gpus)
    if config.listen:
        asked = {"sentences": config.listen, "recogniser": config.recogniser, "seed": config.seed}
        cells = [
            Cell(twin_models.SPEECH, same[mixer] | most | asked | {"prompted": prompted})
            for prompted in _STARTS
            for mixer in MIXERS
        ]
        found += grid.run(
            folder, cells, twin_models.speech, kit, lambda *n: on_done("speech", *n), config.threads, gpus
        )
    return found


def _curve(cell: Cell, config: ExperimentsConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = storage.join(config.output, "gla-vs-attention")
    return {"curve": twin_models.curve(config, cell.settings["mixer"], folder)}, {}


def _difference(losses: dict[str, dict[str, Any]]) -> Figure | None:
    """Gated linear minus softmax attention, nats a token, utterances resampled in pairs."""
    if set(losses) != set(MIXERS):
        return None
    (first, second), tokens = ([np.array(losses[mixer]["sums"]) for mixer in MIXERS]), np.array(losses["gla"]["tokens"])
    return interval(first - second, tokens)


def _claims(found: dict[str, Any], outcomes: Sequence[Outcome]) -> list[Claim]:
    """Table 2 and figure 3 as differences that the paper has below zero."""
    claims = [
        compared(
            "gated linear attention predicts better than softmax attention of the same size",
            "test perplexity 49.6 against 50.4: -0.016 nats (table 2)",
            "loss of gated linear minus softmax attention",
            found["difference"],
            found["utterances"],
            least=0.0,
        )
    ]
    for prompted, how in _STARTS.items():
        errors = {
            one["settings"]["mixer"]: {
                place: row["word_errors"] / max(1, row["words"]) for place, row in enumerate(one["result"]["speech"])
            }
            for one in outcomes
            if one["kind"] == twin_models.SPEECH and one["settings"]["prompted"] == prompted
        }
        claims.append(
            compared(
                f"and is understood better, {how}",
                "WER 6.9 % against 7.8 % (table 2, after a prompt)",
                "WER of gated linear minus softmax attention, mean over sentences",
                paired(errors["gla"], errors["attention"]) if len(errors) == 2 else None,
                min(map(len, errors.values()), default=0),
                "",
                least=0.0,
            )
        )
    return [*claims, *_timing_claims(found)]


def _timing_claims(found: dict[str, Any]) -> list[Claim]:
    """Figure 3, where softmax attention is ahead at one row, gated linear attention from eight rows on; it is of a GPU,
    and other devices decide nothing about it."""
    last = {(row["mixer"], row["batch"]): row for row in found["costs"] if row["last"]}
    largest = max(batch for _, batch in last)
    claims = []
    for said, faster, slower, batch in (
        ("gated linear attention speaks faster at many rows", *MIXERS, largest if largest >= 8 else None),
        ("softmax attention speaks faster at one row", *MIXERS[::-1], 1 if ("gla", 1) in last else None),
    ):
        rows = 1 if batch == 1 else 16 if (batch or 16) >= 16 else 8
        paper = dict(zip(MIXERS, PAPER_SECONDS[rows], strict=True))
        numbers = f"{paper[faster]} s against {paper[slower]} s for 40 s of audio, batch {rows} (figure 3)"
        more, what, rounds = None, "", 0
        if batch:
            both = [last[(mixer, batch)]["rounds"] for mixer in (faster, slower)]
            rounds = min(map(len, both))
            more = mean(one / other - 1 for one, other in zip(*both, strict=True))
            seconds = last[(faster, batch)]["seconds"]
            what = f"share of its time that it takes more, {seconds:.3g} s of audio, batch {batch}, {rounds} rounds"
        claim = compared(said, numbers, what, more, rounds, unit="", least=0.05)
        if more is not None and found["device"] != "cuda":
            claim = claim._replace(verdict=f"undecided: measured on {found['device']}; the paper's figure is a GPU's")
        claims.append(claim)
    return claims


def _compared(config: ExperimentsConfig, found: dict[str, Any]) -> list[str]:
    rows = []
    recipe = twin_models.pretraining(config, MIXERS[0], "")
    taken = ""
    if card := twin_models.given(config):
        taken = f" The {_NAMES[card.sizes.mixer]} twin is {card.training.get('name')}, as it was exported."
    for mixer in MIXERS:
        loss, paper = found["losses"][mixer], PAPER_TABLE[mixer]
        rows.append((_NAMES[mixer], shown(loss), f"{np.exp(loss.value):.1f}", *paper))
    head = ("mixer", "held-out loss, nats a token", "perplexity")
    return [
        *table((*head, "paper: CER %", "paper: WER %", "paper: similarity", "paper: perplexity"), rows),
        "",
        f"Both trained {recipe.steps:,} steps of {recipe.budget:,} on the same batches, one seed; the paper's "
        f"perplexity is of another codec with one codebook of 4096.{taken}",
        "",
    ]


@in_style
def _decoding(costs: Sequence[dict[str, Any]]) -> Picture:
    """Seconds of computing and bytes of state by seconds of speech, a line for each number of rows."""
    figure, (left, right) = row_of_axes(2)
    styles = dict(zip(sorted({row["batch"] for row in costs}), cycle(("-", "--", ":", "-.")), strict=False))
    for mixer, colour in zip(MIXERS, (INK, MARK), strict=True):
        for batch, style in styles.items():
            rows = [row for row in costs if (row["mixer"], row["batch"]) == (mixer, batch)]
            seconds, label = [row["seconds"] for row in rows], f"{mixer}, {batch} rows"
            left.plot(seconds, [row["elapsed"] for row in rows], color=colour, ls=style, marker="o", ms=3, label=label)
            right.plot(seconds, [row["state_bytes"] / 1e6 for row in rows], color=colour, ls=style, marker="o", ms=3)
    longest = max(row["seconds"] for row in costs)
    left.plot([0, longest], [0, longest], color="#9aa5ad", lw=1, label="real time")
    left.set(title="Time to speak", xlabel="seconds of speech a row", ylabel="seconds")
    left.legend(frameon=False, fontsize=7)
    right.set(title="What must be remembered", xlabel="seconds of speech a row", ylabel="MB of all rows", yscale="log")
    return figure


@in_style
def _training(curves: dict[str, list[list[float]]]) -> Picture:
    figure, (axes,) = row_of_axes(1)
    for mixer, colour in zip(MIXERS, (INK, MARK), strict=True):
        if curves.get(mixer):
            axes.plot(*zip(*curves[mixer], strict=True), color=colour, lw=1.4, label=_NAMES[mixer])
    axes.set(title="Training loss of the twins", xlabel="step", ylabel="nats a token")
    axes.legend(frameon=False, fontsize=8)
    return figure
