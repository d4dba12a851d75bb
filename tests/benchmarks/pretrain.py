"""How fast a model pretrains: tokens a second, MFU, memory by precision and batch, and where the rest of a step goes.

    python tests/benchmarks/pretrain.py                                # on a GPU: 169m in bf16, TF32 and fp32
    python tests/benchmarks/pretrain.py --device cpu --threads 1 --preset tiny --precisions bf16 fp32 \
        --batches 512 1024 --frames 120                                # that it works, on a CPU

A row is one step after another on one device, each of one micro-batch: `DeepSpeed` as the job takes them
(`pipeline.training_engine`), the `baseline` the same model, batches, dropout, clipping and AdamW in a loop of PyTorch's
own. Both start from the same weights, so their losses should be the same, too: Δ loss is the largest difference over
the first `--steps`. Each way has the device for itself; the fastest round counts.

Batches are counted as the job's `budget`: steps of audio, padding included. Tokens are what the job's log counts: codes
of all codebooks. MFU is `model.flops` over `infra.hardware`'s peak, which for a known GPU in float32 is that of TF32:
`fp32`, which is what the job's `--precision fp32` does, cannot come near it; `tf32` allows it in matrix products (the
kernels of gated linear attention use it either way). In bf16 both ways keep float32 copies of the weights; on a CPU
without instructions for it, bf16 shows no more than that it runs. Memory is the GPU's peak; on a CPU it is the whole
process's, what earlier rows left behind included. A batch that does not fit is told, and larger ones are not tried.
Without `--data` rows have `--frames` each, random codes, and a phoneme for seven frames; with it, the share of a step
that is spent waiting for the loader is told, too.

At last the fastest row of DeepSpeed is run again under torch.profiler, beside its baseline (`step_profile`).
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import copy
import gc
import time
from typing import NamedTuple

PRECISIONS = ("bf16", "tf32", "fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="169m", help="of model.lina_config, or a JSON file of sizes")
    parser.add_argument("--batches", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--checkpointing", choices=["no", "yes", "both"], default="both", help="of activations")
    parser.add_argument("--frames", type=int, default=1125, help="of each row: 15 s, Libriheavy's mean")
    parser.add_argument("--data", help="dataset of jobs/tokenize.py, whose batches and lengths count instead")
    parser.add_argument("--zero", choices=["0", "1", "2"], default="1", help="stage of ZeRO; 3 is for many devices")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--threads", type=int, default=4, help="the job's on GPUs")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--steps", type=int, default=4, help="of a round, each with a batch of its own")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cpu" and "tf32" in options.precisions:
        parser.error("tf32 is a GPU's: --precisions bf16 fp32")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("what a GPU does is no CPU time: --clock wall")
    os.environ["DS_ACCELERATOR"] = options.device
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand; --device cpu, with small sizes, shows that this works")
    from infra import allocator
    from pipeline.training_start import PretrainError

    # As the job has it: pipeline.training_loop
    allocator.keep_memory()
    torch.use_deterministic_algorithms(options.device == "cpu")
    torch.set_num_threads(options.threads)
    backend = "nccl" if options.device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        benchmark = Benchmark(options)
    except (ValueError, PretrainError, OSError) as error:
        parser.error(str(error))
    benchmark.run()
    torch.distributed.destroy_process_group()


class Setting(NamedTuple):
    precision: str
    checkpointing: bool
    batch: int
    """Steps of audio, padding included."""


class Figures(NamedTuple):
    seconds: float
    """Of a step."""
    megabytes: float
    """Peak."""
    losses: list[float]
    """Of the first steps."""


class Benchmark:
    """One model, and the two ways to take its steps.

    Raises:
        ValueError, PretrainError, OSError: sizes or a dataset that cannot be used.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from infra.hardware import peak_flops
        from model.lina import Lina
        from tests.benchmarks.training_steps import Plain, ThroughDeepSpeed

        self.options, self.device = options, torch.device(options.device)
        self.sizes = self.config(Setting("fp32", False, max(options.batches))).sizes()
        self.batches = {batch: self.batches_of(batch) for batch in sorted(options.batches)}
        torch.manual_seed(0)
        self.model = Lina(self.sizes)
        self.peaks = {}
        for precision in options.precisions:
            choose(precision)
            self.peaks[precision] = peak_flops(self.device, precision == "bf16")
        self.ways = {"baseline": Plain, "DeepSpeed": ThroughDeepSpeed}
        self.rates: dict[Setting, float] = {}
        """Tokens a second through DeepSpeed."""

    def run(self) -> None:
        options = self.options
        self.header()
        both = {"no": (False,), "yes": (True,), "both": (False, True)}[options.checkpointing]
        for precision in options.precisions:
            for checkpointing in both:
                full = set()
                for batch in self.batches:
                    self.rows(Setting(precision, checkpointing, batch), full)
        if not self.rates:
            sys.exit("no batch fits; try smaller --batches")
        fastest = max(self.rates, key=self.rates.get)
        self.profile(fastest)
        if options.data:
            self.wait(fastest)

    def header(self) -> None:
        import deepspeed
        import torch

        from model.gla import _kernels
        from model.mixers import parameters

        options, cuda = self.options, self.device.type == "cuda"
        kernels = "flash-linear-attention's kernels" if cuda and _kernels() else "our own chunks"
        rows = options.data or f"rows of {options.frames} frames and {phones_of(options.frames)} phonemes"
        peaks = ", ".join(f"{peak / 1e12:.3g} in {precision}" for precision, peak in self.peaks.items())
        print(
            f"{device_name(self.device)}; torch {torch.__version__}, DeepSpeed {deepspeed.__version__} with ZeRO "
            f"{options.zero}, {kernels}; peak TFLOP/s: {peaks}\n"
            f"{options.preset}: {parameters(self.model) / 1e6:.1f} M parameters, {self.sizes.codebooks} codebooks; "
            f"{rows}; fastest of {options.rounds} rounds of {options.steps} steps, {options.clock} time, "
            f"{options.threads} threads\n"
            f"\n{'precision':9} {'checkpointing':13} {'batch':>8} {'rows':>5} {'tokens':>8} {'':10}"
            f"{'ms/step':>9} {'tokens/s':>11} {'MFU':>6} {'peak GB':>8} {'× baseline':>10} {'Δ loss':>8}",
            flush=True,
        )

    def rows(self, setting: Setting, full: set[str]) -> None:
        """Prints both ways; a way that did not fit is in `full` from then on."""
        batches = self.batches[setting.batch]
        tokens, flops = (sum(each) / len(batches) for each in zip(*map(self.work, batches), strict=True))
        rows = sum(len(batch.code_lengths) for batch in batches) / len(batches)
        checkpointing = "yes" if setting.checkpointing else "no"
        title = f"{setting.precision:9} {checkpointing:13} {setting.batch:8,} {rows:5.0f} {tokens:8,.0f}"
        plain = None
        for name in self.ways:
            found = None if name in full else self.figures(name, setting)
            if found is None:
                print(
                    f"{title} {name:10} {'a smaller one did not' if name in full else 'does not'} fit in memory",
                    flush=True,
                )
                full.add(name)
                continue
            ratio = ""
            if name == "baseline":
                plain = found
            else:
                self.rates[setting] = tokens / found.seconds
                if plain:
                    apart = max(abs(a - b) for a, b in zip(plain.losses, found.losses, strict=True))
                    ratio = f"{plain.seconds / found.seconds:9.2f}× {apart:8.1e}"
            print(
                f"{title} {name:10}{1e3 * found.seconds:9.1f} {tokens / found.seconds:11,.0f} "
                f"{flops / found.seconds / self.peaks[setting.precision]:6.1%} {found.megabytes / 1e3:8.2f} {ratio}",
                flush=True,
            )

    def figures(self, name: str, setting: Setting) -> Figures | None:
        """None where the batch does not fit."""
        way = None
        try:
            way = self.built(name, setting)
            return self.measured(way, self.batches[setting.batch])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        finally:
            if way is not None:
                way.close()

    def measured(self, way, batches: list) -> Figures:
        from tests.benchmarks.enroll import Meter

        losses, seconds, megabytes = [float(way.step(n, batch)) for n, batch in enumerate(batches)], [], []
        for turn in range(1, self.options.rounds + 1):
            with Meter(self.options) as meter:
                for place, batch in enumerate(batches):
                    way.step(turn * len(batches) + place, batch)
            seconds.append(meter.seconds / len(batches))
            megabytes.append(meter.megabytes)
        return Figures(min(seconds), max(megabytes), losses)

    def profile(self, setting: Setting) -> None:
        from tests.benchmarks.step_profile import print_profiles, profiled

        batches, profiles = self.batches[setting.batch], {}
        for name in self.ways:
            way = self.built(name, setting)

            def steps(way=way) -> int:
                for number, batch in enumerate(batches):
                    way.step(number, batch)
                return len(batches)

            steps()
            profiles[name] = profiled(steps, self.device.type == "cuda")
            way.close()
            del way, steps
        checkpointing = "with" if setting.checkpointing else "without"
        print(
            f"\nthe fastest: {setting.precision}, {checkpointing} activation checkpointing, batch {setting.batch:,}\n"
        )
        print_profiles(profiles)

    def wait(self, setting: Setting) -> None:
        """How long the job would wait for its data in each step."""
        way = self.built("DeepSpeed", setting)
        with loader(self.config(setting), 1 + self.options.rounds * self.options.steps) as steps:
            for number, step in enumerate(steps):
                way.step(number, step.micro_batches[0].batch)
                if number == 0:  # nothing can be there before the first
                    steps.waited, start = 0.0, time.perf_counter()
            seconds = time.perf_counter() - start
        print(f"\ndata wait {steps.waited / seconds:.2%} of {number} steps, {1e3 * seconds / number:.1f} ms each")
        way.close()

    def built(self, name: str, setting: Setting):
        gc.collect()  # of what was built before, when nothing holds it any more: DeepSpeed makes cycles
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        choose(setting.precision)
        start = copy.deepcopy(self.model)
        return self.ways[name](self.config(setting), self.device, setting.precision == "bf16", start)

    def config(self, setting: Setting):
        from pipeline.pretrain_config import PretrainConfig

        return PretrainConfig(
            model=self.options.preset,
            budget=setting.batch,
            zero=self.options.zero,
            activation_checkpointing=setting.checkpointing,
            warmup=1,  # so that the losses tell whether both ways learn alike
            explode=1e9,  # a step that is skipped has no time
            **({"data": self.options.data} if self.options.data else {}),
        )

    def batches_of(self, batch: int) -> list:
        """As many as a round has, on the CPU. Raises ValueError where a row does not fit the batch."""
        if self.options.data:
            with loader(self.config(Setting("fp32", False, batch)), self.options.steps) as steps:
                return [step.micro_batches[0].batch for step in steps]
        return [drawn(self.sizes, batch, self.options.frames, n) for n in range(self.options.steps)]

    def work(self, batch) -> tuple[float, float]:
        """(tokens, FLOP) of a step, padding not counted."""
        from model.flops import training_flops
        from pipeline.training_engine import tokens_by_codebook

        steps, phones = (batch.code_lengths + self.sizes.codebooks).double(), batch.phone_lengths.double()
        sums = (float(x.sum()) for x in (steps, phones, steps * phones, steps**2))
        tokens = tokens_by_codebook(batch.code_lengths, self.sizes.codebooks).sum()
        return float(tokens), training_flops(self.sizes, *sums)


def drawn(sizes, steps: int, frames: int, seed: int):
    """A batch of random rows of one length, as many as `steps` of audio hold, counted as `pipeline.schedule` does."""
    import torch

    from model.lina import Batch

    rows, phones = steps // (frames + sizes.codebooks + 1), phones_of(frames)
    if not rows:
        raise ValueError(f"a batch of {steps} holds no row of {frames} frames; larger --batches, or fewer --frames")
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randint(1, sizes.vocabulary, (rows, phones), generator=draw),
        torch.full((rows,), phones),
        torch.randint(0, sizes.codebook_size, (rows, sizes.codebooks, frames), generator=draw),
        torch.full((rows,), frames),
    )


def phones_of(frames: int) -> int:
    """About as many as are spoken meanwhile, and the start and the end."""
    return frames // 7 + 2


def loader(config, stop_step: int):
    """The job's, with this configuration."""
    from pipeline.loader import Loader
    from pipeline.training_data import open_index, schedule_of

    schedule = schedule_of(config, open_index(config))
    return Loader(schedule, stop_step=stop_step, prefetch=config.prefetch, cache=config.cache_folder)


def choose(precision: str) -> None:
    """Whether float32 matrix products may be rounded to TF32."""
    import torch

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def out_of_memory(error: RuntimeError) -> bool:
    """PyTorch has a class for GPUs' alone; Triton's and the CPU's errors have their words."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
