"""Where to start Initial-State Tuning: steps that each start takes to the held-out loss of the paper's recipe.

    python tests/benchmarks/warm_start.py --model MODEL --data TOKENS --speakers 12

The recipe starts from factors drawn at random and takes 100 steps: the lowest held-out loss on its way, which is what
early stopping keeps, is what the others are timed against. They start from
  mean  the mean voice of all the other speakers, as the recipe tuned them (nobody is in its own start),
  read  the memories that the model itself has after reading the speaker's samples, their mean, factorised.
Voices that never get there count with all their steps.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import statistics

STARTS = ("drawn", "mean", "read")


def main() -> None:
    from tests.benchmarks.enroll import load_model, read_speakers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; without one, random weights of the size `tiny`")
    parser.add_argument("--data", default="data/demo/tokens", help="dataset of jobs/tokenize.py with the model's codec")
    parser.add_argument("--speakers", type=int, default=12)
    parser.add_argument("--samples", type=int, default=0, help="of a speaker at most; 0 for all")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=2, help="steps between two looks at the held-out loss")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    from model.initial_state import Recipe

    torch.set_num_threads(options.threads)
    model, name = load_model(options)
    speakers = read_speakers(options.data, options.speakers, options.samples, model.config.codebooks)
    recipe = Recipe(steps=options.steps, eval_every=options.every, patience=0)
    print(f"{name}\n{len(speakers)} speakers, {options.steps} steps, a look every {options.every}\n", flush=True)
    compare(model, speakers, recipe)


def compare(model, speakers: dict, recipe) -> None:
    """Prints the table."""
    from model.initial_state import factorised, mean_start
    from model.state_pass import read_start

    drawn = tuned(model, speakers, recipe, {})
    starts = {
        "drawn": {},
        "mean": {
            name: mean_start([(other.factors, recipe.scale) for key, other in drawn.items() if key != name], recipe)
            for name in speakers
        },
        "read": {
            name: factorised(read_start(model, tuning_part(name, samples, recipe)), recipe)
            for name, samples in speakers.items()
        },
    }
    targets = {name: min(loss for _, loss in voice.curve) for name, voice in drawn.items()}
    base = statistics.mean(voice.base_loss for voice in drawn.values())
    continued = statistics.mean(voice.continuation_loss for voice in drawn.values())
    print(f"held-out loss without a voice {base:.4f}, after the longest sample as a prompt {continued:.4f}\n")
    titles = f"{'start':8} {'at step 0':>10} {'best':>8} {'at the end':>11}"
    print(f"{titles} {'steps to the goal, median':>26} {'mean':>6} {'reached':>8}")
    for start in STARTS:
        voices = drawn if start == "drawn" else tuned(model, speakers, recipe, starts[start])
        needed = [steps_to(voice.curve, targets[name]) for name, voice in voices.items()]
        counted = [recipe.steps if steps is None else steps for steps in needed]
        curves = [voice.curve for voice in voices.values()]
        print(
            f"{start:8} {mean_at(curves, 0):10.4f} {statistics.mean(min(loss for _, loss in c) for c in curves):8.4f} "
            f"{mean_at(curves, -1):11.4f} {statistics.median(counted):26.0f} {statistics.mean(counted):6.1f} "
            f"{sum(steps is not None for steps in needed):4} / {len(needed)}",
            flush=True,
        )


def tuned(model, speakers: dict, recipe, starts: dict) -> dict:
    """Voices by speaker, all tuned together, from their starts; who has none draws its own."""
    from model.voice_tuning import Tuner
    from pipeline.phonemes import INVENTORY, SPACE

    tuner, voices = Tuner(model, recipe, len(speakers), space=INVENTORY.index(SPACE)), {}
    for name, samples in speakers.items():
        tuner.join(name, samples, start=starts.get(name))
    while tuner.active:
        voices |= {voice.speaker: voice for voice in tuner.step()}
    return voices


def tuning_part(name: str, samples: list, recipe) -> list:
    """A speaker's samples without those that its losses are measured on."""
    from model.initial_state import number
    from model.voice_samples import split

    places, _ = split(len(samples), recipe, number(recipe.seed, name))
    return [samples[i] for i in places]


def steps_to(curve, target: float) -> int | None:
    """The first step whose held-out loss is at most the target."""
    return next((step for step, loss in curve if loss <= target), None)


def mean_at(curves, place: int) -> float:
    return statistics.mean(curve[place][1] for curve in curves)


if __name__ == "__main__":
    main()
