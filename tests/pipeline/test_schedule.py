"""The schedule's laws: every sample once an epoch, the same batches for everybody, from anywhere, within the budget."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.config import load
from pipeline import training_data
from pipeline.pretrain_config import PretrainConfig
from pipeline.schedule import Schedule, _cut, _least_batches
from pipeline.token_index import DataError, _mix, scramble
from tests.pipeline.token_data import index_of

lengths = st.lists(st.lists(st.integers(1, 400), max_size=30), min_size=1, max_size=9).filter(any)
seeds = st.integers(0, 2**63)


def schedule_of(frames, seed=0, **settings):
    return Schedule(index_of(frames), seed, **({"budget": 1200, "window": 3} | settings))


@settings(max_examples=60)
@given(lengths, seeds, st.integers(405, 3000), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_has_every_sample_once_within_the_budget(frames, seed, budget, window, epoch):
    schedule = schedule_of(frames, seed, budget=budget, window=window)
    first = schedule.first_step(epoch)
    batches = [schedule.batch(first + step) for step in range(schedule.steps_per_epoch(epoch))]
    assert sorted(np.concatenate(batches).tolist()) == list(range(sum(map(len, frames))))
    for batch in batches:
        assert len(batch) >= 1 and len(batch) * int(schedule.steps_of(batch).max()) <= budget
        assert list(schedule.steps_of(batch)) == sorted(schedule.steps_of(batch))


@settings(max_examples=40)
@given(lengths, seeds, st.integers(1, 6), st.integers(1, 4))
def test_workers_and_micro_batches_share_the_same_global_batch(frames, seed, world, accumulate):
    alone = schedule_of(frames, seed)
    shared = schedule_of(frames, seed, accumulate=accumulate)
    for step in range(min(alone.steps_per_epoch(), 5)):
        parts = [shared.part(step, rank, world, micro) for micro in range(accumulate) for rank in range(world)]
        assert np.concatenate(parts).tolist() == alone.batch(step).tolist()
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=30)
@given(lengths, seeds, st.integers(0, 60))
def test_a_step_is_the_same_whether_one_comes_from_the_start_or_resumes_there(frames, seed, step):
    going = schedule_of(frames, seed)
    seen = [going.batch(k).tolist() for k in range(step + 1)]
    resumed = schedule_of(frames, seed)
    assert resumed.batch(step).tolist() == seen[-1]
    assert resumed.batch(step // 2).tolist() == seen[step // 2], "backwards, too"


def test_threads_that_ask_at_once_get_what_one_gets():
    frames = [[30, 50, 70]] * 3
    alone = schedule_of(frames, budget=200)
    expected = [alone.batch(step).tolist() for step in range(400)]
    for _ in range(5):
        shared = schedule_of(frames, budget=200)
        with ThreadPoolExecutor(8) as pool:
            assert [rows.tolist() for rows in pool.map(shared.batch, range(400))] == expected


@given(st.lists(st.integers(1, 500), min_size=1, max_size=200), st.integers(500, 4000), seeds)
def test_rows_are_cut_into_as_few_batches_as_the_budget_allows(steps, budget, seed):
    steps = np.sort(steps)
    longest, histogram = np.unique(steps, return_counts=True)
    (least,) = _least_batches(histogram[None], longest, budget).tolist()
    greedy, start = 0, 0
    while start < len(steps):
        costs = steps[start:] * np.arange(1, len(steps) - start + 1)
        start, greedy = start + int(np.searchsorted(costs, budget, side="right")), greedy + 1
    assert least == greedy
    cuts = _cut(budget // steps, scramble(np.arange(least), seed))
    sizes = np.diff(cuts)
    assert cuts[0] == 0 and cuts[-1] == len(steps) and sizes.min() >= 1
    assert all(size * steps[stop - 1] <= budget for size, stop in zip(sizes, cuts[1:], strict=True))


def speech(count, seed=0):
    """Lengths like those of read sentences: 1 to 9 s, 3 s in the middle, at 75 frames a second."""
    seconds = np.clip(np.random.default_rng(seed).lognormal(1.1, 0.33, count), 0.9, 9)
    return np.ceil(seconds * 75).astype(int).tolist()


def in_shards(frames, each=64):
    return [frames[start : start + each] for start in range(0, len(frames), each)]


def test_little_is_padding():
    schedule = Schedule(index_of(in_shards(speech(750))))
    assert schedule.padding(range(schedule.steps_per_epoch())) < 0.03
    larger = Schedule(index_of(in_shards(speech(20_000), 400)), budget=20_000)
    assert larger.padding(range(larger.steps_per_epoch())) < 0.02
    steps = int(larger.steps_of(larger.index.rows).sum())
    assert steps / larger.steps_per_epoch() > 0.95 * larger.budget, "and batches are full"


@pytest.mark.parametrize("seed", range(3))
def test_little_of_the_demo_is_padding(project, seed):
    """Five minutes of short utterances, at 50 frames a second, as `make demo` trains on them."""
    config = load(PretrainConfig, project / "infra/configs/pretrain/demo.yaml")
    seconds = np.random.default_rng(seed).uniform(1.5, 5, 92)
    schedule = training_data.schedule_of(config, index_of(in_shards(np.ceil(seconds * 50).astype(int).tolist())))
    assert schedule.padding(range(schedule.steps_per_epoch())) <= 0.03


def test_no_batch_is_tiny():
    schedule = Schedule(index_of(in_shards(speech(2000))), window=4)
    for step in range(schedule.steps_per_epoch()):
        batch = schedule.batch(step)
        assert len(batch) >= 0.2 * (schedule.budget // schedule.steps_of(batch).max())


def test_epochs_and_seeds_order_and_group_differently():
    def groups(seed, epoch):
        schedule = Schedule(index_of(in_shards(speech(2000))), seed, window=8)
        first = schedule.first_step(epoch)
        return [tuple(schedule.batch(first + k)) for k in range(schedule.steps_per_epoch(epoch))]

    one, two, other = groups(0, 0), groups(0, 1), groups(1, 0)
    assert len(set(one) & set(two)) < 0.05 * len(one) and len(set(one) & set(other)) < 0.05 * len(one)
    lengths = [len(batch) for batch in one]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True), "short and long ones are mixed"
    assert groups(0, 0) == one


def test_reading_stays_within_a_window_of_shards():
    schedule = Schedule(index_of([speech(40, n) for n in range(60)]), window=10)
    shards = [set(schedule.index.shard_of(schedule.batch(k)).tolist()) for k in range(schedule.steps_per_epoch())]
    windows, together = [], set()
    for seen in shards:
        if len(together | seen) > 10:
            windows.append(together)
            together = set()
        together |= seen
    windows.append(together)
    assert len(windows) == 6 and all(len(window) == 10 for window in windows)
    assert set().union(*windows) == set(range(60))


def test_the_order_never_changes():
    """A run that was begun with an earlier version goes on with the same batches."""
    schedule = Schedule(index_of(in_shards([1 + row * 37 % 400 for row in range(300)])), seed=123, window=2)
    first_rows = {step: schedule.batch(step)[:4].tolist() for step in (0, 1, 2, 20, 1000)}
    assert first_rows == {
        0: [191, 137, 148, 159],
        1: [178, 189, 135, 146],
        2: [173, 184, 130, 141],
        20: [126, 83, 94, 105],
        1000: [251, 197, 208, 219],
    }
    published = 0xE220A8397B1DCDAF  # the first number of SplitMix64 from seed 0
    assert _mix(np.zeros(1, dtype=np.uint64)).tolist() == [published]


def test_a_selection_is_scheduled_by_the_rows_of_the_whole():
    index = index_of([[50, 60, 70], [80, 90], [100, 110, 120]], speakers=2)
    chosen = index.only(min_frames=60, max_frames=110, speakers=["s1"])
    assert chosen.rows.tolist() == [1, 3, 5]
    schedule = Schedule(chosen, budget=500)
    assert sorted(np.concatenate([schedule.batch(k) for k in range(schedule.steps_per_epoch())]).tolist()) == [1, 3, 5]
    with pytest.raises(DataError, match="speaker 's9'"):
        index.only(speakers=["s1", "s9"])


@settings(max_examples=30)
@given(seeds, st.sampled_from([0.01, 0.1, 0.5]))
def test_what_is_held_out_is_held_out_whatever_else_is_chosen(seed, fraction):
    index = index_of([list(range(1, 400))] * 5, speakers=400)
    train, valid = index.split(fraction, seed)
    assert sorted([*train.rows, *valid.rows]) == list(range(len(index)))
    assert abs(len(valid) / len(index) - fraction) < 5 * (fraction / len(index)) ** 0.5
    short = index.only(max_frames=100).split(fraction, seed)[1]
    assert set(short.rows) == {row for row in valid.rows if index.columns["frames"][row] <= 100}
    train, valid = index.split(0.3, seed, by="speaker")
    speaker = index.columns["speaker"]
    assert not set(speaker[train.rows]) & set(speaker[valid.rows]) and len(valid)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"budget": 404},
            "budget 404 does not hold the longest sample, 405 steps; set budget to at least 405, or lower max_s",
        ),
        ({"window": 0}, "window must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"codebooks": 0}, "codebooks must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        schedule_of([[400, 10]], **settings)


def test_an_empty_selection_is_refused():
    with pytest.raises(DataError, match="no sample is left"):
        Schedule(index_of([[5, 6]]).only(min_frames=7))


def test_a_budget_too_small_for_the_workers_is_refused():
    schedule = schedule_of([[400, 10, 20]], accumulate=2, budget=1215)
    schedule.require_world(1)
    with pytest.raises(
        DataError, match=r"holds 3 of the longest samples \(405 steps\), but 2 workers .* at least 1620"
    ):
        schedule.require_world(2)
