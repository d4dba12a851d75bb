"""How fast the codec encodes, beside the encodec package's own loop, on the same real speech in one run.

    python tests/benchmarks/codec_encoding.py                     # 2 minutes of speech, encodec_24khz's sizes
    python tests/benchmarks/codec_encoding.py --device cuda       # fp32, TF32 and bf16 by batch size

Rows: (a) encodec as its README shows it, an utterance at a time at 6 kbit/s; (b) ours, one worker. Weights are
EnCodec's where they are at hand (`--codec-weights`), else random ones of the same sizes, whose codes have nearer ties.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SPEECH = ROOT.parent / "shared" / "data" / "librispeech-train-clean" / "manifest.jsonl"
CODEBOOKS = 8
"""6 kbit/s."""
GFLOP_A_SECOND = 3.1
"""Multiplications and additions of EnCodec's encoder for a second of audio."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default=str(SPEECH), help="real speech: JSONL with an `audio` column")
    parser.add_argument("--seconds", type=float, default=120.0, help="how much of it")
    parser.add_argument("--batch", type=int, default=8, help="utterances a batch of (b)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each row, in turns; the fastest counts")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--codec-weights", help="EnCodec's published weights file; random weights without it")
    arguments = parser.parse_args()
    waves = read_speech(arguments.manifest, arguments.seconds)
    codec = build_codec(arguments.codec_weights, arguments.device)
    describe(codec, waves)
    if arguments.device == "cuda":
        compare_on_gpu(codec, waves)
    else:
        compare_on_cpu(codec, waves, arguments.batch, arguments.repeat)


def read_speech(manifest: str, seconds: float) -> list[np.ndarray]:
    """float32 waveforms at 24 kHz, in the manifest's order, until `seconds` are reached."""
    import soundfile
    import soxr

    waves, total = [], 0.0
    for line in Path(manifest).read_text(encoding="utf-8").splitlines():
        wave, rate = soundfile.read(Path(manifest).parent / json.loads(line)["audio"], dtype="float32")
        waves.append(soxr.resample(wave, rate, 24_000).astype(np.float32))
        total += len(waves[-1]) / 24_000
        if total >= seconds:
            return waves
    return waves


def build_codec(weights: str | None, device: str):
    from model.codec import Codec
    from model.codec_config import ENCODEC_24KHZ
    from pipeline.codec_weights import resolve

    return resolve("encodec_24khz", weights).build(device) if weights else Codec.random(ENCODEC_24KHZ, device=device)


def encodec_loop(codec, device: str = "cpu") -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """(a): the encodec package with the codec's weights, as its README uses it."""
    import torch

    from model.codec import read_tensors
    from model.encodec_package import package

    model = package().EncodecModel.encodec_model_24khz(pretrained=False)
    tensors = read_tensors(codec.config, codec.weights)
    for name, module in model.named_modules():
        if hasattr(module, "weight_v"):
            weight = tensors.pop(f"{name}.weight")
            module.weight_v.data.copy_(weight)
            module.weight_g.data.copy_(weight.flatten(1).norm(dim=1).view_as(module.weight_g))
        if hasattr(module, "inited"):
            module.inited.fill_(1)
    model.load_state_dict(tensors, strict=False)
    model.set_target_bandwidth(6.0)
    model.to(device)

    def encode(waves: list[np.ndarray]) -> list[np.ndarray]:
        codes = []
        for wave in waves:
            with torch.no_grad():
                frames = model.encode(torch.from_numpy(wave).to(device)[None, None])
            codes.append(torch.cat([encoded[0] for encoded in frames], dim=-1)[0].cpu().numpy())
        return codes

    return encode


def our_worker(codec, batch: int) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """(b): batches of utterances of similar length."""

    def encode(waves: list[np.ndarray]) -> list[np.ndarray]:
        order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
        codes: dict[int, np.ndarray] = {}
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            codes |= zip(rows, codec.encode([waves[i] for i in rows], CODEBOOKS), strict=True)
        return [codes[i] for i in range(len(waves))]

    return encode


def compare_on_cpu(codec, waves: list[np.ndarray], batch: int, repeat: int) -> dict[str, Result]:
    """Prints (a) and (b); returns what was measured."""
    import torch

    print(f"torch threads {torch.get_num_threads()}, best of {repeat}")
    rows = {"(a) encodec's loop": encodec_loop(codec), f"(b) ours, batch {batch}": our_worker(codec, batch)}
    results = measure(rows, waves, repeat)
    print_table(results, waves, sgemm_peak())
    return results


def compare_on_gpu(codec, waves: list[np.ndarray]) -> None:
    import torch

    results = measure({"(a) encodec's loop, fp32": encodec_loop(codec, "cuda")}, waves, 2)
    for precision in ("fp32", "tf32", "bf16"):
        for batch in (1, 8, 32, 128):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                results |= measure({f"(b) ours, {precision}, batch {batch}": our_worker(codec, batch)}, waves, 2)
    print_table(results, waves, None)


Result = tuple[float, float, list[np.ndarray]]
"""Wall seconds, CPU seconds, codes."""


def measure(rows: dict[str, Callable], waves: list[np.ndarray], repeat: int) -> dict[str, Result]:
    """The fastest of `repeat` runs of each row, taken in turns so that a busy machine slows all of them alike."""
    best: dict[str, Result] = {}
    for encode in rows.values():
        encode(waves[:2])
    for _ in range(repeat):
        for name, encode in rows.items():
            wall, cpu = time.perf_counter(), time.process_time()
            codes = encode(waves)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            previous = best.get(name, (float("inf"), float("inf"), codes))
            best[name] = (min(wall, previous[0]), min(cpu, previous[1]), codes)
    return best


def print_table(results: dict[str, Result], waves: list[np.ndarray], peak: float | None) -> None:
    seconds = sum(map(len, waves)) / 24_000
    first = next(iter(results.values()))
    print(
        f"{'':<28}{'audio-s/s':>10}{'ratio':>7}{'per CPU-s':>11}{'ratio':>7}{'GFLOP/s':>9}{'of peak':>9}  equal codes %"
    )
    for name, (wall, cpu, codes) in results.items():
        rate = GFLOP_A_SECOND * seconds / cpu
        share = f"{rate / peak:>9.0%}" if peak else f"{'':>9}"
        equal = " ".join(f"{100 * agreement(codes, first[2], k):.2f}" for k in range(CODEBOOKS))
        print(
            f"{name:<28}{seconds / wall:>10.1f}{first[0] / wall:>7.2f}{seconds / cpu:>11.1f}{first[1] / cpu:>7.2f}"
            f"{rate:>9.0f}{share}  {equal}"
        )


def agreement(codes: list[np.ndarray], reference: list[np.ndarray], level: int) -> float:
    return float(np.mean(np.concatenate([a[level] == b[level] for a, b in zip(codes, reference, strict=True)])))


def sgemm_peak() -> float:
    """GFLOP/s of one core on a large product in float32, with the faster of PyTorch's two libraries."""
    import torch

    size, best = 2048, 0.0
    a = torch.randn(size, size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    packed = torch.ops.mkldnn._reorder_linear_weight(a)
    products = (lambda: a @ a, lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
    with torch.inference_mode():
        for product in products:
            for _ in range(5):
                start = time.process_time()
                product()
                best = max(best, 2 * size**3 / (time.process_time() - start) / 1e9)
    torch.set_num_threads(threads)
    print(f"peak of a core: {best:.0f} GFLOP/s (float32 product of {size}x{size})")
    return best


def describe(codec, waves: list[np.ndarray]) -> None:
    import platform

    import torch

    device = torch.cuda.get_device_name() if codec.device.type == "cuda" else platform.processor() or platform.machine()
    seconds = sum(map(len, waves)) / 24_000
    print(f"{codec.identity.name}: {len(waves)} utterances, {seconds:.0f} s; torch {torch.__version__} on {device}")


if __name__ == "__main__":
    main()
