"""Voices an hour: the released tuning recipe, plainly written, beside the tuner at 1, 4, 16 and 64 speakers.

    python tests/benchmarks/enroll.py --model MODEL --data TOKENS --speakers 1 4 16 64

(a) goes through one speaker after another, in micro-batches of 2 with 4 accumulated, keeps nothing, and lets gradients
of the weights be made, as the released code does. Two steps lead from there: weights frozen; the 8 samples at once. All
take the same batches from the same start, the paper's recipe, no dropout; losses are means over a batch's tokens.
Ours runs for as many steps, first with nothing kept from step to step, and, evaluating every few, until each speaker
has the held-out loss that (a) ends with. (a) is run for `--reference` speakers; the loss of the others is that of our
run of equal steps, which gives the same states: the table shows by how much they differ. `--speakers 64 16 --equal 64`
takes the losses of all from one such run. `× (a)` is what (a) would take
for a row's speakers at its rate of model steps, by what they take.

`--clock cpu` counts CPU seconds, which a busy machine distorts less (with `--threads 1`). Without `--allocator plain`
freed memory is kept for reuse instead of being returned to the system, for all rows alike.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import copy
import time

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; without one, random weights of the size `tiny`")
    parser.add_argument("--data", default="data/demo/tokens", help="dataset of jobs/tokenize.py with the model's codec")
    parser.add_argument("--speakers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--equal", type=int, nargs="*", help="of these, those with a row of equal steps; default: all")
    parser.add_argument("--reference", type=int, default=1, help="speakers that (a) and the steps from it are run for")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=0, help="of a speaker at most; 0 for all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--group-steps", type=int)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--allocator", choices=["keeping", "plain"], default="keeping")
    options = parser.parse_args()
    if options.allocator == "keeping" and not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    import torch

    torch.set_num_threads(options.threads)
    Benchmark(options).run()


class Benchmark:
    """One model, some speakers, and the ways to tune them."""

    def __init__(self, options: argparse.Namespace) -> None:
        from model.initial_state import Recipe, number
        from model.voice_samples import split

        self.options = options
        self.recipe = Recipe(steps=options.steps, patience=0)
        self.model, self.name = load_model(options)
        # The tuner makes the linear layers of its own copy faster.
        self.frozen = copy.deepcopy(self.model)
        found = read_speakers(options.data, max(options.speakers), options.samples, self.model.config.codebooks)
        self.speakers = {}
        for name, samples in found.items():
            seed = number(self.recipe.seed, name)
            parts = ([samples[i] for i in places] for places in split(len(samples), self.recipe, seed))
            self.speakers[name] = (seed, *parts)

    def run(self) -> None:
        options = self.options
        frames = [sum(s.codes.shape[1] for s in tuned + held) for _, tuned, held in self.speakers.values()]
        print(
            f"{self.name}\n{options.device}, {options.threads} threads, {options.clock} time, allocator "
            f"{options.allocator}\n{len(self.speakers)} speakers of {min(frames)} to {max(frames)} frames, "
            f"{options.steps} steps of {self.recipe.batch}\n"
        )
        print(f"{'':38} {'s/voice':>8} {'voices/h':>9} {'× (a)':>6} {'peak MB':>8} {'Δ states':>9}  parts", flush=True)
        reference = list(self.speakers)[: options.reference]
        ways = {
            "(a) released": {"frozen": False, "micro": 2},
            "    weights frozen": {"frozen": True, "micro": 2},
            "    and a batch at once": {"frozen": True, "micro": self.recipe.batch},
        }
        plain, self.baseline = {}, 0.0
        for title, way in ways.items():
            with Meter(options) as meter:
                states = {name: plainly(self.model, *self.speakers[name][:2], self.recipe, **way) for name in reference}
            plain = plain or states
            self.baseline = self.baseline or meter.seconds / self.steps(reference)
            self.row(title, meter, len(reference), difference(states, plain))
        targets = {name: held_out_loss(self.model, states, self.speakers[name][2]) for name, states in plain.items()}
        few = min(options.speakers)
        with Meter(options) as meter:
            tuner, voices = self.tuned(few, evaluate=False, cache_bytes=0)
        same = {voice.speaker: voice.factors for voice in voices}
        self.row(f"(b) {few} together, nothing kept", meter, few, difference(same, plain), tuner)
        for count in options.speakers:
            known = targets.keys() >= set(list(self.speakers)[:count])
            if not known or options.equal is None or count in options.equal:
                with Meter(options) as meter:
                    tuner, voices = self.tuned(count, evaluate=False)
                same = {voice.speaker: voice.factors for voice in voices}
                self.row(f"(b) {count} together, equal steps", meter, count, difference(same, plain), tuner)
                for name, factors in same.items():
                    targets.setdefault(name, held_out_loss(self.model, factors, self.speakers[name][2]))
            with Meter(options) as meter:
                tuner, voices = self.tuned(count, evaluate=True, targets=targets)
            steps = sum(voice.steps for voice in voices) / count
            reached = sum(voice.reason == "reached" for voice in voices)
            title = f"(b) {count} together, to the loss of (a)"
            self.row(title, meter, count, None, tuner, f"; {steps:.0f} steps, {reached} of {count} reached it")

    def tuned(self, count: int, evaluate: bool, targets: dict[str, float] | None = None, cache_bytes: int = 8 << 30):
        """(the tuner, its voices): the first speakers, all at once."""
        from model.voice_tuning import Tuner

        tuner, voices = Tuner(self.frozen, self.recipe, count, cache_bytes, self.options.group_steps), []
        for name in list(self.speakers)[:count]:
            seed, samples, held = self.speakers[name]
            target = None if targets is None else targets[name] + 1e-5
            tuner.join(name, samples, held if evaluate else [], seed, target=target)
        while tuner.active:
            voices += tuner.step()
        return tuner, voices

    def steps(self, names: list[str]) -> int:
        """Model steps that the recipe asks for: of these speakers' batches, what is in one twice counted twice."""
        from model.state_pass import steps_of
        from model.voice_samples import batch_at

        return sum(
            times * steps_of(samples[i])
            for seed, samples, _ in map(self.speakers.get, names)
            for step in range(self.recipe.steps)
            for i, times in batch_at(len(samples), self.recipe.batch, seed, step).items()
        )

    def row(self, title, meter, voices: int, apart: float | None, tuner=None, more: str = "") -> None:
        each = meter.seconds / voices
        released = self.baseline * self.steps(list(self.speakers)[:voices]) / voices
        differ = "" if apart is None else f"{apart:.1e}"
        parts = ""
        if tuner is not None:
            total = sum(tuner.work.seconds.values())
            shares = (f"{part} {seconds / total:.0%}" for part, seconds in tuner.work.seconds.items())
            padding = 1 - tuner.work.steps / tuner.work.padded_steps
            parts = f"{', '.join(shares)}; padding {padding:.1%}"
        print(
            f"{title:38} {each:8.2f} {3600 / each:9.1f} {released / each:6.2f} {meter.megabytes:8.0f} {differ:>9}  "
            f"{parts}{more}",
            flush=True,
        )


def plainly(model, seed: int, samples, recipe, frozen: bool, micro: int) -> dict:
    """The factors of one speaker after the recipe's steps: the whole model over each micro-batch, and nothing kept."""
    import torch

    from model.initial_state import drawn, memories
    from model.lina import Batch
    from model.state_pass import padded, tokens_of
    from model.voice_samples import batch_at

    model.eval().requires_grad_(not frozen)
    device = model.norm.weight.device
    factors = {name: values.to(device).requires_grad_() for name, values in drawn(model.config, recipe, seed).items()}
    optimiser = torch.optim.AdamW(factors.values(), recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay)
    for step in range(recipe.steps):
        times = batch_at(len(samples), recipe.batch, seed, step)
        chosen = [samples[i] for i, count in times.items() for _ in range(count)]
        tokens = sum(map(tokens_of, chosen))
        optimiser.zero_grad()
        for start in range(0, len(chosen), micro):
            few = chosen[start : start + micro]
            dense = memories(factors, recipe.scale)
            repeated = [memory.expand(len(few), -1, -1, -1) for memory in dense.layers.unsqueeze(1)]
            output = model(Batch(*padded(few, device)), model.initial_state(repeated))
            (output.row_losses.sum() / tokens).backward()
        optimiser.step()
    model.zero_grad()
    return {name: values.detach() for name, values in factors.items()}


def held_out_loss(model, factors: dict, held) -> float:
    """Mean over the tokens of held-out samples."""
    import torch

    from model.initial_state import Memories, Recipe, memories
    from model.state_pass import prepared, row_losses, tokens_of

    model.requires_grad_(False)
    with torch.no_grad():
        dense = memories(factors, Recipe().scale).layers
        rows = Memories(dense.expand(len(held), *dense.shape), None)
        return float(row_losses(model, prepared(model, held), rows).sum()) / sum(map(tokens_of, held))


def difference(states: dict, plain: dict) -> float:
    """The largest between factors of speakers that both have."""
    return max(float((states[s][n] - plain[s][n]).abs().max()) for s in states.keys() & plain.keys() for n in plain[s])


class Meter:
    """Seconds, and the peak of memory, of what is done within it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.gpu, self.clock = options.device != "cpu", options.clock

    def __enter__(self) -> "Meter":
        import torch

        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        self.start = self.now()
        return self

    def __exit__(self, *_) -> None:
        import torch

        self.seconds = self.now() - self.start
        if self.gpu:
            self.megabytes = torch.cuda.max_memory_allocated() / 1e6
            return
        with open("/proc/self/status") as file:
            self.megabytes = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e3

    def now(self) -> float:
        import torch

        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if self.clock == "wall" else time.process_time()


def load_model(options: argparse.Namespace):
    """(the model, what it is)"""
    import torch

    from model.lina import Lina
    from model.lina_config import PRESETS

    dtype = getattr(torch, options.dtype)
    if options.model:
        from model.checkpoint import load

        model, card = load(options.model, options.device, options.dtype)
        return model, f"model {options.model} ({card.fingerprint[:12]}…)"
    torch.manual_seed(0)
    return Lina(PRESETS["tiny"]).to(
        options.device, dtype
    ).eval(), "RANDOM WEIGHTS of the size `tiny`: rates alone mean something"


def read_speakers(data: str, count: int, most: int, codebooks: int) -> dict:
    """The samples of the speakers with the most, by name."""
    import numpy as np

    from model.voice_samples import Sample
    from pipeline.loader import collate
    from pipeline.sample_reader import SampleReader
    from pipeline.token_index import TokenIndex

    index = TokenIndex.open(data).only(min_phones=1)
    owners = index.columns["speaker"][index.rows]
    sizes = np.bincount(owners, minlength=len(index.speakers))
    chosen = np.argsort(-sizes, kind="stable")[:count]
    if len(chosen) < count or sizes[chosen[-1]] < 2:
        sys.exit(f"{data} has fewer than {count} speakers of at least two samples; choose fewer --speakers")
    reader, speakers = SampleReader(index), {}
    for speaker in chosen:
        good, _ = reader.read(index.rows[owners == speaker][: most or None])
        batch = collate([sample for _, sample in sorted(good.items())], codebooks)
        speakers[index.speakers[speaker]] = [
            Sample(phones[:places], codes[:, :frames]) for phones, places, codes, frames in zip(*batch, strict=True)
        ]
    return speakers


if __name__ == "__main__":
    main()
