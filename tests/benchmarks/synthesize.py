"""How fast a model speaks, by batch, beside the released code's way of doing it, in one run.

    python tests/benchmarks/synthesize.py --threads 1                          # the `tiny` preset, random weights
    python tests/benchmarks/synthesize.py --model out/pretrain/export --codec demo
    python tests/benchmarks/synthesize.py --device cuda --preset 169m      # to batch 512, also without CUDA graphs

All rows say `--frames` frames each (their ends are never drawn), so the work is the same; decoding is part of it, and
stands alone beside it. The released loop is one Python step a frame over one utterance, top-k for the first codebook,
tokens grown by concatenation, codes decoded at the end; as released it keeps the recurrent state from step to step.
`recomputed` is the same loop over all steps so far, as a model without such a state needs it. Ours is
`model.continuous_batch`. The fastest of the rounds counts; with `--clock cpu` CPU seconds are compared, which a busy
machine distorts less. Time to first audio is that of `pipeline.streaming` on a warm synthesizer. With `--device cuda`
the first round captures the graphs, and rates stand beside the paper's best.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import dataclasses
import functools
import time

PAPER = 27.6
"""Audio seconds a second that the paper's model says on an RTX 4090, 16 utterances at once (figure 3)."""
TEXT = "Seven birds sang about the rain, and the old stone walls of the quiet green island heard them again."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an exported model; default: --preset with random weights")
    parser.add_argument("--preset", default="tiny", help="tiny, 60m, 169m or 311m")
    parser.add_argument("--codec", default="demo")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--largest", type=int, help="batch; default: 64, on a GPU 512")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    import torch

    from pipeline import codec_weights

    torch.set_num_threads(options.threads)
    codec = codec_weights.resolve(options.codec)
    synthesizer = speaker(options, codec)
    phones = synthesizer.takes("text", line())[0].phones
    seconds = options.frames / codec.identity.frame_rate
    size = sum(p.numel() for p in synthesizer.model.parameters())
    print(f"{size:,} parameters on {options.device}, {options.threads} threads; {len(phones)} phonemes, {seconds:g} s")
    ways = {
        "released loop, batch 1": (1, lambda: released(synthesizer, phones, options.frames, True)),
        "recomputed, batch 1": (1, lambda: released(synthesizer, phones, options.frames, False)),
        "codec's decoder, batch 1": (1, lambda: decoded(synthesizer, options.frames)),
    }
    on_gpu, batch = options.device == "cuda", 1
    while batch <= (options.largest or (512 if on_gpu else 64)):
        for kind in ("", " without graphs") if on_gpu else ("",):
            way = functools.partial(ours, synthesizer, phones, options.frames, batch, graphs=not kind)
            ways[f"ours, batch {batch}{kind}"] = (batch, way)
        batch *= 2
    width, rates = max(26, *(len(name) + 1 for name in ways)), {}
    print(f"{'':<{width}}{options.clock + ' s':>9} {'ms a step':>10} {'audio s/s':>10}")
    for name, (rows, way) in ways.items():
        walls = [timed(way, options.clock) for _ in range(1 if name.startswith("recomputed") else options.rounds)]
        rates[name] = rows * seconds / min(walls)
        ms = 1e3 * min(walls) / options.frames
        print(f"{name:<{width}}{min(walls):9.2f} {ms:10.2f} {rates[name]:10.2f}", flush=True)
    ours_, others = ([name for name in rates if name.startswith("ours") == mine] for mine in (True, False))
    for name in ours_:
        ratios = [f"{rates[name] / rates[base]:.2f} × {base}" for base in others if not base.startswith("codec")]
        if on_gpu:
            ratios.append(f"{rates[name] / PAPER:.2f} × the paper's {PAPER} audio s/s")
        print(f"{name} is {', '.join(ratios)}")
    first = sorted(time_to_first_audio(synthesizer) for _ in range(5))
    print(f"time to first audio, 0.3 s chunk: {1e3 * first[2]:.0f} ms (median of 5), fastest {1e3 * first[0]:.0f} ms")


def line():
    from pipeline.speech_lines import Line

    return Line(TEXT)


def speaker(options, codec):
    """The model to measure, which never ends by itself."""
    import torch

    from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, ModelCard, pack
    from model.lina import Lina
    from model.lina_config import PRESETS
    from model.sampling import Policy
    from pipeline.phonemes import INVENTORY
    from pipeline.speech_faults import Limits
    from pipeline.synthesis import ModelFiles, Synthesizer, read_model

    if options.model:
        files = read_model(options.model)
    else:
        sizes = dataclasses.replace(PRESETS[options.preset], vocabulary=len(INVENTORY))
        torch.manual_seed(0)
        card = ModelCard(sizes, INVENTORY, codec.identity, {"note": "random weights, for timing"})
        packed = pack(Lina(sizes), card)
        files = ModelFiles("random weights", packed[CONFIG_FILE], packed[WEIGHTS_FILE])
    policy = Policy(min_frames=options.frames, max_frames=options.frames)
    return Synthesizer(files, codec, options.device, policy=policy, limits=Limits(seconds_a_token=10.0))


def ours(synthesizer, phones, frames: int, rows: int, graphs: bool) -> None:
    """With the tensors that a batch has on this device, or a step at a time."""
    from model.batch_rows import MovingRows
    from model.continuous_batch import ContinuousBatch

    model, policy = synthesizer.model, synthesizer.policy
    batch = ContinuousBatch(model, policy, None if graphs else MovingRows(model, policy))
    for row in range(rows):
        batch.add(row, phones, row)
    while len(batch):
        for _, speech in batch.step():
            assert speech.codes.shape[1] == frames
            synthesizer.decode(speech.codes.cpu().numpy())


def released(synthesizer, phones, frames: int, keep_state: bool) -> None:
    """The loop of the released code, written plainly: top-k for the first codebook, the likeliest for the others."""
    import torch

    from model.delay import BOS, OFFSET, undelayed

    model = synthesizer.model
    device = model.norm.weight.device
    with torch.inference_mode():
        text = model.read(phones[None].to(device), torch.tensor([len(phones)], device=device))
        codebooks = model.config.codebooks
        tokens = torch.full((1, 1, codebooks), BOS, device=device)
        state = None
        for step in range(frames + codebooks - 1):
            seen = tokens[:, -1:] if keep_state else tokens
            logits, after, _ = model.advance(model.embed(seen), text, state)
            state = after if keep_state else None
            chosen = []
            for codebook in range(codebooks):
                scores = logits[:, -1, codebook].clone()
                scores[:, :OFFSET] = -torch.inf
                if codebook == 0:
                    kept = torch.topk(scores, 100).values[:, -1:]
                    scores[scores < kept] = -torch.inf
                    chosen.append(torch.multinomial(torch.softmax(scores, -1), 1))
                else:
                    chosen.append(scores.argmax(-1, keepdim=True))
                if step < codebook:
                    chosen[-1].fill_(BOS)
            tokens = torch.cat([tokens, torch.stack(chosen, -1)], 1)
        codes = undelayed(tokens[0, 1:])
        assert codes.shape[1] == frames
        synthesizer.decode(codes.cpu().numpy())


def decoded(synthesizer, frames: int) -> None:
    import numpy as np

    sizes = synthesizer.card.sizes
    codes = np.random.default_rng(0).integers(0, sizes.codebook_size, (sizes.codebooks, frames))
    synthesizer.decode(codes)


def time_to_first_audio(synthesizer) -> float:
    from pipeline.streaming import stream

    start = time.perf_counter()
    chunks = stream(synthesizer, line(), first=0.3)
    chunk = next(chunks)
    took = time.perf_counter() - start
    assert len(chunk)
    return took


def timed(way, clock: str) -> float:
    """Each way ends with a waveform on the CPU, so a GPU's work is in it."""
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    way()
    return now() - start


if __name__ == "__main__":
    main()
