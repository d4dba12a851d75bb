"""Gated linear attention on this machine's CPU: forward and backward beside the naive loop and fused softmax attention.

    python tests/benchmarks/gla.py --threads 2

All three are timed in turns, round after round, on the same number of tokens; the fastest of the rounds counts. With
`--clock cpu` CPU seconds are compared, which a busy machine distorts less (then with `--threads 1`). The layers
compared have one width: `--heads` GLA heads with keys of half the width (the published models' sizes), softmax heads
of 64.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import time


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
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    sizes = f"width {options.width}, {options.heads} GLA heads, batch {options.batch}"
    print(f"{sizes}, float32, {options.threads} threads, {options.clock} time")
    print(f"{'T':>5} {'naive ms':>10} {'softmax ms':>11} {'ours ms':>9} {'naive/ours':>11} {'softmax/ours':>13}")
    length = 128
    while length <= options.longest:
        ways = competitors(length, options)
        seconds = dict.fromkeys(ways, float("inf"))
        for turn in range(options.rounds):
            for name, step in ways.items():
                if name != "naive" or turn < 2:
                    seconds[name] = min(seconds[name], timed(step, options.clock))
        naive, softmax, ours = (seconds.get(name) for name in ("naive", "softmax", "ours"))
        first = f"{1e3 * naive:10.1f}" if naive else f"{'–':>10}"
        ratio = f"{naive / ours:10.1f}×" if naive else f"{'–':>11}"
        print(f"{length:5} {first} {1e3 * softmax:11.2f} {1e3 * ours:9.2f} {ratio} {softmax / ours:12.2f}×", flush=True)
        length *= 2


def competitors(length: int, options: argparse.Namespace) -> dict:
    """Forward and backward of each, with gradients of everything, as functions without arguments."""
    import torch

    from model.gla import gla, recurrent_gla

    torch.manual_seed(0)
    heads, width, batch = options.heads, options.width, options.batch
    d_k, d_v = width // heads // 2, width // heads

    def leaf(*shape):
        return torch.randn(*shape).requires_grad_()

    q, k, v = (leaf(batch, length, heads, d) for d in (d_k, d_k, d_v))
    gate, state = leaf(batch, length, heads, d_k), leaf(batch, heads, d_k, d_v)
    g = (torch.nn.functional.logsigmoid(gate) / 16).detach().requires_grad_()
    q64, k64, v64 = (leaf(batch, length, width // 64, 64) for _ in range(3))
    weight = torch.randn(batch, length, width)

    def linear(operation):
        o, _ = operation(q, k, v, g, state, d_k**-0.5)
        torch.autograd.grad(o.flatten(2), (q, k, v, g, state), weight)

    def softmax():
        heads_first = (x.transpose(1, 2) for x in (q64, k64, v64))
        o = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        torch.autograd.grad(o.transpose(1, 2).flatten(2), (q64, k64, v64), weight)

    ways = {"softmax": softmax, "ours": lambda: linear(gla)}
    return ({"naive": lambda: linear(recurrent_gla)} if length <= options.naive_up_to else {}) | ways


def timed(step, clock: str) -> float:
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    step()
    return now() - start


if __name__ == "__main__":
    main()
