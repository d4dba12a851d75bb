"""How the service holds up: requests a second, latency and time to first byte by clients, and a killed engine.

    python tests/benchmarks/serve.py                                     # the `tiny` preset, random weights
    python tests/benchmarks/serve.py --model out/pretrain/export --codec demo --clients 1,8,64

Starts jobs/serve.py on a free port of loopback, and asks it there and nowhere else. Every client asks, listens to the
end, and asks again, until all requests of a level are done; every request is a stream. Bounded: `--requests` a client
and `--seconds` a level, whichever comes first. Random weights end their sentences by chance, after about a second;
speech is counted in seconds of audio, so the figures hold for other lengths. At last an engine is killed while half of
the `--killed` clients listen: what becomes of each request is counted; one that ended without an error and without
speech would be `lost`.

Client and service share the machine: with many clients on few cores part of the time is the client's own.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import asyncio
import dataclasses
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

TEXTS = [
    "Seven birds sang about the rain.",
    "The old stone walls of the quiet island heard them again.",
    "Was it green? Nobody who sailed past could say.",
    "It was the season of light, that came before the season of rain.",
]
RATE = 24_000
LARGEST_HEADER = 600
"""Bytes of these WAV files before their sound; a single frame of it has 640."""


@dataclasses.dataclass
class Answer:
    """One request, as its client saw it."""

    what: str
    """whole, refused, told (broken off with an error), lost."""
    first: float = 0.0
    """Seconds to the first byte of speech."""
    took: float = 0.0
    audio: float = 0.0
    """Seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an exported model; default: --preset with random weights")
    parser.add_argument("--preset", default="tiny", help="tiny, 60m, 169m or 311m")
    parser.add_argument("--codec", default="demo")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--clients", default="1,2,4,8,16,32,64")
    parser.add_argument("--requests", type=int, default=3, help="of each client at most")
    parser.add_argument("--seconds", type=float, default=40.0, help="after which a level begins no more requests")
    parser.add_argument("--killed", type=int, default=8, help="clients while an engine is killed; 0 for none")
    options = parser.parse_args()
    levels = [int(count) for count in options.clients.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or written(options, folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        service = started(options, model, port, max(levels))
        try:
            asyncio.run(measured(f"http://127.0.0.1:{port}", levels, options))
        finally:
            service.send_signal(signal.SIGINT)
            service.wait(60)


def started(options, model: str, port: int, most: int) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    words = ["--model", model, "--codec", options.codec, "--port", port, "--no-enrollment", "--device", options.device]
    words += ["--threads", options.threads, "--rows", options.rows, "--waiting", most, "--timeout-s", 600]
    words += ["--requests-per-minute", 1_000_000, "--voices", tempfile.gettempdir()]
    command = [sys.executable, str(root / "jobs" / "serve.py"), *map(str, words)]
    with tempfile.TemporaryFile("w+") as log:
        service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        for line in service.stdout:
            if line.startswith("voices"):
                return service
        log.seek(0)
        raise SystemExit(f"the service did not start (code {service.wait()}):\n{log.read()[-2000:]}")


async def measured(url: str, levels: list[int], options) -> None:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=900)) as session:
        for _ in range(2):
            await ask(session, 0)  # everything is loaded
        print(f"{'clients':>7} {'requests':>8} {'a second':>8} {'audio s/s':>9}", end=" ")
        print(f"{'first byte p50':>14} {'p90':>6} {'p99':>6} {'all p50':>8} {'p90':>6} {'p99':>6}  (seconds)")
        for clients in levels:
            answers, wall = await level(session, clients, options)
            whole = [answer for answer in answers if answer.what == "whole"]
            firsts, tooks = ([getattr(a, name) for a in whole] for name in ("first", "took"))
            rest = Counter(answer.what for answer in answers if answer.what != "whole")
            print(
                f"{clients:7} {len(answers):8} {len(whole) / wall:8.2f} {sum(a.audio for a in whole) / wall:9.2f}",
                f"{at(firsts, 50):14.2f} {at(firsts, 90):6.2f} {at(firsts, 99):6.2f}",
                f"{at(tooks, 50):8.2f} {at(tooks, 90):6.2f} {at(tooks, 99):6.2f}",
                f" {dict(rest)}" if rest else "",
                flush=True,
            )
        if options.killed:
            await killed(session, options.killed)


async def level(session, clients: int, options) -> tuple[list[Answer], float]:
    """(answers, seconds) of so many clients."""
    answers: list[Answer] = []
    start = time.perf_counter()

    async def client(number: int) -> None:
        for turn in range(options.requests):
            if time.perf_counter() - start > options.seconds:
                return
            answers.append(await ask(session, 1000 * turn + number))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return answers, time.perf_counter() - start


async def killed(session, clients: int) -> None:
    """Kills the engine's process when half of the clients listen and half wait; they ask again until one is whole."""
    before = (await (await session.get("/healthz")).json())["process"]
    answers: list[Answer] = []
    listening: set[int] = set()

    async def client(number: int) -> None:
        for turn in range(10):
            long = 8 * len(TEXTS) if number % 2 else 0
            answers.append(await ask(session, 1000 * turn + number, long, lambda: listening.add(number)))
            if turn and answers[-1].what == "whole":
                return
            await asyncio.sleep(1)

    tasks = [asyncio.create_task(client(2 * number + 1)) for number in range(clients // 2)]
    while sum(number % 2 for number in listening) < clients // 2:
        await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(client(clients + 2 * number)) for number in range(clients - clients // 2)]
    await asyncio.sleep(0.05)
    os.kill(before, signal.SIGKILL)
    start = time.perf_counter()
    await asyncio.gather(*tasks, *waiting)
    took = time.perf_counter() - start
    after = (await (await session.get("/healthz")).json())["process"]
    counted = Counter(answer.what for answer in answers)
    print(f"engine {before} killed under {clients} clients: {dict(counted)}, {counted['lost']} lost;", end=" ")
    print(f"engine {after} had served every client again after {took:.1f} s")


async def ask(session, number: int, sentences: int = 0, on_first=lambda: None) -> Answer:
    """A text of TEXTS, or one of so many sentences."""
    import aiohttp

    text = " ".join(TEXTS[n % len(TEXTS)] for n in range(sentences)) or TEXTS[number % len(TEXTS)]
    fields = {"model": "lina", "input": text, "response_format": "wav", "seed": number}
    start, first, size = time.perf_counter(), None, 0
    try:
        async with session.post("/v1/audio/speech", json=fields) as answer:
            if answer.status != 200:
                return Answer("refused" if (await answer.json())["error"]["message"] else "lost")
            async for part in answer.content.iter_any():
                if first is None:
                    first = time.perf_counter() - start
                    on_first()
                size += len(part)
    except aiohttp.ClientError:
        return Answer("told")
    # aiohttp raises where a body ends before its end, so this one is complete
    what = "whole" if size > LARGEST_HEADER else "lost"
    return Answer(what, first or 0.0, time.perf_counter() - start, size / 2 / RATE)


def at(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))] if ordered else float("nan")


def written(options, folder: str) -> str:
    """A model of the preset's sizes with random weights, which ends by chance."""
    import torch

    from model.checkpoint import ModelCard, save
    from model.lina import Lina
    from model.lina_config import PRESETS
    from pipeline import codec_weights
    from pipeline.phonemes import INVENTORY

    sizes = dataclasses.replace(PRESETS[options.preset], vocabulary=len(INVENTORY))
    torch.manual_seed(0)
    model = Lina(sizes)
    with torch.no_grad():
        # The last norm's first channel is always 1: the end's weight on it is its bias.
        model.norm.weight[0], model.norm.bias[0] = 0, 1
        model.heads.weight[:, 0] = 0
        model.heads.weight[2, 0] = 1.6
    card = ModelCard(sizes, INVENTORY, codec_weights.resolve(options.codec).identity, {"note": "random, for timing"})
    save(model, card, Path(folder, "model"))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, random", flush=True)
    return str(Path(folder, "model"))


if __name__ == "__main__":
    main()
