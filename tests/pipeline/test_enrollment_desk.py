"""The desk in front of what tunes: a real batch behind it, without Ray."""

import asyncio
import gc
import tracemalloc

import numpy as np
import pytest

from model.checkpoint import load
from model.initial_state import Recipe
from model.tuned import Tuned
from pipeline.enrollment_desk import Desk
from pipeline.tuning_batch import Progress, Request, TuningBatch
from pipeline.utterances import Unusable
from tests.pipeline.speaking_model import write_speaker
from tests.pipeline.speech_samples import samples_of

SAMPLES = 100_000
"""Bytes of a request's samples."""


class Gone(Exception):
    """A replica that died."""


class Replica:
    """A batch as the desk sees it: events until the end; `lose` makes the next events fail as if it had died.

    Where a step fails, all that is in the batch is gone, and another one takes its place.
    """

    def __init__(self, model, steps: int = 2, slots: int = 2) -> None:
        self.model, self.steps, self.slots = model, steps, slots
        self.lose = 0
        self.begun: list[str] = []
        self.faults: list[BaseException] = []
        self.poison: set[str] = set()
        """Requests with which a step fails."""
        self.begin()

    def begin(self) -> None:
        recipe = Recipe(steps=self.steps, batch=1, held_out=0.0)
        settings = {"slots": self.slots, "waiting": 10_000, "threads": 1, "on_fault": self.die}
        self.batch = TuningBatch(self.model, recipe, **settings)
        tuners, step = self.batch._tuners, self.batch._tuners.step

        def steps():
            if self.poison & set(tuners.active):
                raise MemoryError("CUDA out of memory")
            return step()

        tuners.step = steps

    def die(self, fault: BaseException) -> None:
        self.faults.append(fault)
        self.begin()

    async def tune(self, request):
        loop, events, id, batch = asyncio.get_running_loop(), asyncio.Queue(), request["id"], self.batch
        asked = Request(request["speaker"], samples_of(int(request["speaker"]), 1, 5))
        try:
            batch.submit(id, asked, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        except RuntimeError as error:
            raise Gone("it is dying") from error
        try:
            while isinstance(event := await events.get(), Progress):
                if id not in self.begun:
                    self.begun.append(id)
                if self.lose:
                    self.lose -= 1
                    raise Gone("killed")
                yield vars(event)
        finally:
            batch.cancel(id)
        if batch.fault:
            raise Gone(str(event))
        assert isinstance(event, Tuned)
        yield {"voice": event.factors["v"].numpy().tobytes(), "row": {"steps": event.steps}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_speaker(tmp_path_factory.mktemp("model"))[0])[0]


async def idle(batch: TuningBatch) -> None:
    while batch.active() or batch.waiting():
        await asyncio.sleep(0.01)


def desk_of(replica: Replica, **changes) -> Desk:
    settings = {"queue": 2000, "timeout": 100.0, "attempts": 3, "lost": (Gone,)} | changes
    return Desk(replica.tune, **settings)


def request(number: int, **changes) -> dict:
    return {"id": f"r{number}", "speaker": str(number)} | changes


def test_a_thousand_requests_at_once_keep_their_order(model):
    replica = Replica(model, steps=1, slots=16)

    async def all_of_them(desk):
        given = (request(number, samples=np.zeros(SAMPLES, np.uint8)) for number in range(1002))
        tasks = [asyncio.create_task(desk.enroll(asked)) for asked in given]
        await asyncio.sleep(0)
        places = [desk.progress(f"r{number}")["place"] for number in (0, 1, 999)]
        return places, await asyncio.gather(*tasks), desk.counts(), desk.progress("r7"), desk.progress("nobody")

    desk = desk_of(replica, queue=1000)
    tracemalloc.start()
    try:
        places, results, counts, seventh, nobody = asyncio.run(all_of_them(desk))
        gc.collect()
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Each request's samples are held once while it waits, and not at all when it is done.
    assert most < 1002 * (SAMPLES + 20_000) and kept < 1002 * 10_000
    assert places == [1, 2, 1000]
    assert [result["error"]["reason"] for result in results[1000:]] == ["busy", "busy"]
    assert all("voice" in result for result in results[:1000])
    assert replica.begun == [f"r{number}" for number in range(1000)]
    assert counts == {"waiting": 0, "tuning": 0} and seventh["state"] == "done" and nobody is None
    replica.batch.close()


def test_a_request_outlives_who_tuned_it(model):
    replica = Replica(model)

    async def run(lost: int):
        replica.lose = lost
        desk = desk_of(replica)
        result = await desk.enroll(request(5))
        await idle(replica.batch)
        return result, desk.progress("r5")

    quiet, _ = asyncio.run(run(0))
    again, told = asyncio.run(run(2))
    assert again == quiet and told["attempts"] == 3
    given_up, told = asyncio.run(run(3))
    assert given_up["error"]["reason"] == "lost" and "3 times" in given_up["error"]["detail"]
    assert told["state"] == "failed" and told["error"]["reason"] == "lost"
    replica.batch.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_kills_what_tunes_it_is_given_up_and_nobody_else(model, monkeypatch):
    """Two of them, the second one taken in while those whom the first one took with it are tuned again."""
    monkeypatch.setattr("pipeline.enrollment_desk._FIRST_PAUSE", 0.02)
    replica = Replica(model, slots=4)
    replica.poison = {"r1", "r10"}

    async def all_of_them():
        desk = desk_of(replica, attempts=4)
        tasks = [asyncio.create_task(desk.enroll(request(number))) for number in range(8)]
        while len(replica.faults) < 2:
            await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(desk.enroll(request(number))) for number in range(8, 16)]
        return await asyncio.gather(*tasks), [desk.progress(f"r{number}") for number in range(16)]

    results, told = asyncio.run(all_of_them())
    assert [number for number, result in enumerate(results) if "voice" not in result] == [1, 10]
    for number in (1, 10):
        error = results[number]["error"]
        assert error["reason"] == "lost" and "4 times" in error["detail"] and "nobody beside" in error["detail"]
        assert "CUDA out of memory" in error["detail"] and told[number]["attempts"] == 4
    assert len(replica.faults) <= 8 and all(isinstance(fault, MemoryError) for fault in replica.faults)
    replica.batch.close()


def test_time_is_limited_and_requests_can_be_dropped(model):
    replica = Replica(model, steps=1_000_000, slots=1)

    async def run():
        desk = desk_of(replica)
        slow = asyncio.create_task(desk.enroll(request(1)))
        while (desk.progress("r1") or {}).get("state") != "tuning":
            await asyncio.sleep(0.01)
        late = await desk.enroll(request(2, timeout_s=0.05))
        twice = await desk.enroll(request(1))
        waiting = asyncio.create_task(desk.enroll(request(3)))
        deserted = asyncio.create_task(desk.enroll(request(4)))
        await asyncio.sleep(0.01)
        assert desk.progress("r3")["place"] == 1 and desk.progress("r4")["place"] == 2
        deserted.cancel()  # its caller goes away
        assert desk.cancel("r3") and not desk.cancel("r2")
        dropped = await waiting
        assert desk.cancel("r1")
        ended = await slow
        with pytest.raises(asyncio.CancelledError):
            await deserted
        await idle(replica.batch)  # nothing goes on for nobody
        states = [desk.progress(f"r{number}")["state"] for number in (1, 2, 3, 4)]
        return (late, twice, dropped, ended), states, desk.counts()

    results, states, counts = asyncio.run(run())
    reasons = [result["error"]["reason"] for result in results]
    assert reasons == ["timeout", "duplicate-request", "cancelled", "cancelled"]
    assert "waiting" in results[0]["error"]["detail"] and "at step" in results[3]["error"]["detail"]
    assert states == ["failed"] * 4 and counts == {"waiting": 0, "tuning": 0}
    replica.batch.close()


def test_what_the_batch_refuses_ends_the_request(model):
    async def refuse(request):
        raise Unusable("bad-samples", "no")
        yield

    async def run():
        desk = Desk(refuse, 1, 10.0, 1, (Gone,))
        with pytest.raises(Unusable):
            await desk.enroll(request(1))
        return desk.progress("r1"), desk.counts()

    told, counts = asyncio.run(run())
    assert told["state"] == "failed" and counts == {"waiting": 0, "tuning": 0}
