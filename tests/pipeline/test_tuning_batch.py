"""A continuous batch of speakers: order, memory, cancelling, and results that depend on nobody else."""

import queue
import threading
import time

import pytest
import torch

from model.checkpoint import load
from model.initial_state import Recipe
from model.tuned import Tuned
from model.voice_samples import Sample
from pipeline.tuning_batch import Progress, Request, TuningBatch, sample_bytes
from pipeline.utterances import Unusable
from tests.pipeline.speaking_model import write_speaker
from tests.pipeline.speech_samples import samples_of

QUICK = Recipe(steps=3, batch=2, eval_every=2, lr=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_speaker(tmp_path_factory.mktemp("model"))[0])[0]


class Ends:
    """Collects how requests end."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.results: dict[str, Tuned | Exception] = {}
        self.begun: list[str] = []
        self._ended: queue.Queue = queue.Queue()

    def of(self, id: str):
        def on_event(event) -> None:
            if not isinstance(event, Progress):
                self.results[id] = event
                self.order.append(id)
                self._ended.put(id)
            elif id not in self.begun:
                self.begun.append(id)

        return on_event

    def wait(self, count: int) -> None:
        for _ in range(count):
            self._ended.get(timeout=120)


def until(true) -> None:
    while not true():
        time.sleep(0.005)


def tuned(model, speakers, recipe=QUICK, **options) -> dict[str, Tuned]:
    batch, ends = TuningBatch(model, recipe, threads=1, **options), Ends()
    for speaker in speakers:
        batch.submit(f"r{speaker}", Request(f"s{speaker}", samples_of(speaker)), ends.of(f"r{speaker}"))
    ends.wait(len(speakers))
    batch.close()
    return {result.speaker: result for result in ends.results.values()}


def test_a_voice_is_the_same_to_the_last_bit_in_any_company(model):
    alone = tuned(model, range(8), slots=1, apart=True)
    crowd = tuned(model, [5, 1, 7, 0, 3, 2, 6, 4], slots=5, apart=True)
    joint = tuned(model, range(8), slots=5)
    assert alone.keys() == crowd.keys() == joint.keys()
    for name, voice in alone.items():
        assert all(torch.equal(voice.factors[n], crowd[name].factors[n]) for n in voice.factors)
        assert voice.record() | {"seconds": 0} == crowd[name].record() | {"seconds": 0}
        furthest = max((voice.factors[n] - joint[name].factors[n]).abs().max().item() for n in voice.factors)
        assert furthest < 1e-4  # rounding alone, through Adam


def test_requests_are_served_in_order_and_none_is_lost(model):
    recipe = Recipe(steps=1, batch=1, held_out=0.0)
    batch, ends = TuningBatch(model, recipe, slots=3, waiting=200, threads=1), Ends()
    little = [Sample(torch.arange(5, 8), torch.zeros(4, 3, dtype=torch.int64))]
    gate = threading.Event()
    batch.submit("first", Request("first", little), lambda event: gate.wait(60))  # holds the batch's thread
    until(lambda: batch.active() == ("first",))
    for number in range(200):
        batch.submit(f"r{number}", Request(f"s{number}", little), ends.of(f"r{number}"))
    with pytest.raises(Unusable, match="busy"):
        batch.submit("more", Request("more", little), ends.of("more"))
    with pytest.raises(Unusable, match="duplicate-request"):
        batch.submit("r17", Request("s17", little), ends.of("r17"))
    assert batch.waiting()[:2] == ("r0", "r1") and len(batch.waiting()) == 200
    gate.set()
    ends.wait(200)
    assert ends.begun == [f"r{number}" for number in range(200)]
    assert sorted(ends.order) == sorted(ends.begun)
    assert all(isinstance(result, Tuned) for result in ends.results.values())
    batch.close()


def test_memory_bounds_the_slots_and_nobody_overtakes(model):
    large, small = samples_of(0, 4, 400), samples_of(1, 1, 10)
    size = sum(sample_bytes(sample, model.config, 4) for sample in large)
    recipe = Recipe(steps=8, batch=1, patience=0)
    batch, ends = TuningBatch(model, recipe, slots=4, memory_bytes=int(1.5 * size), apart=True, threads=1), Ends()
    together = []
    for id, samples in (("a", large), ("b", large), ("c", small)):

        def on_event(event, id=id) -> None:
            together.append(batch.active())
            ends.of(id)(event)

        batch.submit(id, Request(id, samples), on_event)
    ends.wait(3)
    batch.close()
    assert ends.begun == ["a", "b", "c"]  # c would have fitted beside a
    assert ("a",) in together and not any({"a", "b"} <= set(active) for active in together)
    # More than all of the memory is still tuned, alone.
    assert tuned(model, [0], memory_bytes=1000)["s0"].steps == 3


def test_an_hour_and_a_third_of_a_second_are_each_handled(model):
    recipe = Recipe(steps=2, batch=2, eval_every=1, held_out_most=2)
    batch, ends = TuningBatch(model, recipe, slots=4, memory_bytes=8 << 20, apart=True, threads=1), Ends()
    hour = [samples_of(n, 1, 300)[0] for n in range(3600 * 75 // 306)]
    batch.submit("hour", Request("hour", hour), ends.of("hour"))
    batch.submit("short", Request("short", samples_of(3, 1, 23)), ends.of("short"))
    wrong = [Sample(torch.arange(5, 9), torch.full((4, 20), 99))]
    batch.submit("wrong", Request("wrong", wrong), ends.of("wrong"))
    ends.wait(3)
    batch.close()
    assert ends.results["hour"].samples + ends.results["hour"].held_out == len(hour)
    short = ends.results["short"]
    assert (short.samples, short.held_out, short.steps, short.base_loss) == (1, 0, 2, None)
    refused = ends.results["wrong"]
    assert isinstance(refused, Unusable) and refused.reason == "bad-samples" and "from 0 to 31" in refused.detail


def test_cancelled_requests_leave_and_others_end_as_before(model):
    recipe = Recipe(steps=6, batch=2, eval_every=2, patience=0)
    expected = tuned(model, [1, 2], recipe, slots=3, apart=True)
    batch, ends, begun = TuningBatch(model, recipe, slots=3, apart=True, threads=1), Ends(), threading.Event()
    endless = TuningBatch(model, Recipe(steps=100_000, patience=0, held_out=0.0), slots=1, apart=True, threads=1)
    endless.submit("on", Request("on", samples_of(4)), lambda event: begun.set())
    endless.submit("wait", Request("wait", samples_of(5)), ends.of("wait"))
    assert begun.wait(60)
    endless.cancel("wait")
    endless.cancel("nobody")
    assert endless.waiting() == () and endless.active() == ("on",)
    endless.cancel("on")
    endless.submit("next", Request("next", samples_of(6)), ends.of("next"))
    until(lambda: endless.active() == ("next",))
    endless.close()
    for speaker in (0, 1, 2):
        batch.submit(f"r{speaker}", Request(f"s{speaker}", samples_of(speaker)), ends.of(f"r{speaker}"))
    until(lambda: "r0" in ends.begun)
    batch.cancel("r0")
    ends.wait(2)
    batch.close()
    assert "wait" not in ends.results
    for speaker in (1, 2):
        voice = expected[f"s{speaker}"]
        assert all(torch.equal(voice.factors[n], ends.results[f"r{speaker}"].factors[n]) for n in voice.factors)
