"""Gated linear attention, forward and backward, beside the naive loop, fused softmax attention and its own products.

    python tests/benchmarks/gla.py --threads 2
    python tests/benchmarks/gla.py --device cuda --dtype bfloat16 --batch 16

All are timed in turns, round after round, on the same number of tokens; the fastest of the rounds counts. With
`--clock cpu` CPU seconds are compared, which a busy machine distorts less (then with `--threads 1`). The layers
compared have one width: `--heads` GLA heads with keys of half the width (the published models' sizes), softmax heads
of 64. `ours` is `model.gla`: on a CPU our chunks, on a GPU flash-linear-attention's kernels, where they are installed.

`products` are the twelve matrix products that chunks of 64 are made of (`model.gla_chunked`: four forward, eight
backward), of these shapes, on tensors that are there, into tensors that are there: no decay, no state carried, nothing
else. So products / ours is how near ours is to a chunked form whose other work costs nothing, and naive ms / products
ms the most that naive / ours could become with PyTorch's products. Kernels that keep intermediate results on the chip
are not bound by that.

The second table is the largest difference of outputs and gradients from the definition in float64, as a share of the
largest value; for as long as the naive loop is run. On a GPU float32 products may be rounded to TF32, as those in the
kernels are; gates and states are float32 whatever `--dtype` is.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import time

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dstate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--naive-up-to", type=int, default=1024, help="the loop keeps a state a step: memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of queries, keys, values")
    options = parser.parse_args()
    import torch

    from model import gla as kernels

    cuda = options.device == "cuda"
    if cuda and (options.clock == "cpu" or not torch.cuda.is_available()):
        parser.error("--device cuda wants a GPU, and --clock wall")
    if options.dtype == "bfloat16" and not cuda:
        parser.error("on a CPU gated linear attention computes in float32 whatever it is given")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    sizes = f"width {options.width}, {options.heads} GLA heads, batch {options.batch}"
    ours_is = "flash-linear-attention's kernels" if cuda and kernels._kernels() else "model.gla_chunked"
    where = torch.cuda.get_device_name() if cuda else f"CPU, {options.threads} threads"
    print(f"{sizes}, {options.dtype}, {where}, {options.clock} time; ours: {ours_is}")
    print(
        f"{'T':>5} {'naive ms':>10} {'softmax ms':>11} {'ours ms':>9} {'products ms':>12} {'naive/ours':>11} "
        f"{'softmax/ours':>13} {'products/ours':>14}"
    )
    length, apart = 128, {}
    while length <= options.longest:
        ways = competitors(length, options)
        if "naive" in ways:
            apart[length] = differences(length, options)
        seconds = dict.fromkeys(ways, float("inf"))
        for turn in range(options.rounds):
            for name, step in ways.items():
                if name != "naive" or turn < 2:
                    seconds[name] = min(seconds[name], timed(step, options.clock, cuda))
        naive, softmax, ours, products = (seconds.get(name) for name in ("naive", "softmax", "ours", "products"))
        first = f"{1e3 * naive:10.1f}" if naive else f"{'–':>10}"
        ratio = f"{naive / ours:10.1f}×" if naive else f"{'–':>11}"
        print(
            f"{length:5} {first} {1e3 * softmax:11.2f} {1e3 * ours:9.2f} {1e3 * products:12.2f} {ratio} "
            f"{softmax / ours:12.2f}× {products / ours:14.0%}",
            flush=True,
        )
        length *= 2
    print(f"\n{'T':>5} " + " ".join(f"{name:>8}" for name in NAMES))
    for length, largest in apart.items():
        print(f"{length:5} " + " ".join(f"{difference:8.1e}" for difference in largest))


def arguments(length: int, options: argparse.Namespace) -> list:
    """Random q, k, v, g and state, with the sizes and gates of a model that begins to learn."""
    import torch

    torch.manual_seed(0)
    heads, batch, dtype = options.heads, options.batch, getattr(torch, options.dtype)
    d_k, d_v = options.width // heads // 2, options.width // heads

    def normal(*shape):
        return torch.randn(*shape, device=options.device)

    q, k, v = (normal(batch, length, heads, d).to(dtype) for d in (d_k, d_k, d_v))
    g = torch.nn.functional.logsigmoid(normal(batch, length, heads, d_k)) / 16
    return [x.requires_grad_() for x in (q, k, v, g, normal(batch, heads, d_k, d_v))]


def competitors(length: int, options: argparse.Namespace) -> dict:
    """Forward and backward of each, with gradients of everything, as functions without arguments."""
    import torch

    from model.gla import gla, recurrent_gla

    values = arguments(length, options)
    scale, dtype = values[0].shape[-1] ** -0.5, values[0].dtype
    shape = options.batch, length, options.width // 64, 64
    q64, k64, v64 = (torch.randn(shape, device=options.device, dtype=dtype).requires_grad_() for _ in range(3))
    weight = torch.randn(options.batch, length, options.width, device=options.device, dtype=dtype)

    def linear(operation):
        o, _ = operation(*values, scale)
        torch.autograd.grad(o.flatten(2), values, weight.to(o.dtype))

    def softmax():
        heads_first = (x.transpose(1, 2) for x in (q64, k64, v64))
        o = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        torch.autograd.grad(o.transpose(1, 2).flatten(2), (q64, k64, v64), weight)

    def naive():
        # Its states are float32, and it wants one dtype
        linear(lambda q, k, v, *rest: recurrent_gla(q.float(), k.float(), v.float(), *rest))

    ways = {"softmax": softmax, "ours": lambda: linear(gla), "products": products(length, options)}
    return ({"naive": naive} if length <= options.naive_up_to else {}) | ways


def products(length: int, options: argparse.Namespace):
    """The matrix products of the chunked form, forward and backward, as a function without arguments."""
    import torch

    from model.gla_chunked import CHUNK

    chunk = min(CHUNK, length)
    chunks = options.batch * options.heads * -(-length // chunk)
    d_v = options.width // options.heads
    d_k = d_v // 2

    def filled(*shape):
        return torch.randn(chunks, *shape, device=options.device, dtype=getattr(torch, options.dtype))

    q, k, v, do = filled(chunk, d_k), filled(chunk, d_k), filled(chunk, d_v), filled(chunk, d_v)
    pairs, dpairs = filled(chunk, chunk), filled(chunk, chunk)
    state, dstate = filled(d_k, d_v), filled(d_k, d_v)
    forward = [
        (q, k.mT),  # pairs
        (k.mT, v),  # into the state
        (pairs, v),
        (q, state),
    ]
    backward = [
        (q.mT, do),  # into the state's gradient
        (do, v.mT),  # of the pairs
        (dpairs, k),
        (dpairs.mT, q),
        (do, state.mT),
        (v, dstate.mT),
        (pairs.mT, do),
        (k, dstate),
    ]
    work = [(a, b, a @ b) for a, b in forward + backward]

    def all_of_them():
        for a, b, out in work:
            torch.matmul(a, b, out=out)

    return all_of_them


def differences(length: int, options: argparse.Namespace) -> list[float]:
    """Of each of NAMES, ours from the definition in float64 of the same numbers."""
    import torch

    from model.gla import gla, recurrent_gla

    values = arguments(length, options)
    scale, weights = values[0].shape[-1] ** -0.5, None
    found = []
    for operation, leaves in (
        (gla, values),
        (recurrent_gla, [x.detach().double().requires_grad_() for x in values]),
    ):
        results = operation(*leaves, scale)
        weights = weights or [torch.randn_like(x) for x in results]
        gradients = torch.autograd.grad(results, leaves, [w.to(x.dtype) for w, x in zip(weights, results, strict=True)])
        found.append([x.detach().double() for x in (*results, *gradients)])
    return [float((one - other).abs().max() / other.abs().max()) for one, other in zip(*found, strict=True)]


def timed(step, clock: str, cuda: bool) -> float:
    """Seconds; of a GPU until it has done everything."""
    import torch

    now = time.perf_counter if clock == "wall" else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = now()
    step()
    if cuda:
        torch.cuda.synchronize()
    return now() - start


if __name__ == "__main__":
    main()
