"""Speaking in tensors that stay where they are. Without a GPU the steps that would be captured are done themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import step_graph
from model.batch_rows import FixedRows, MovingRows, rows_for
from model.continuous_batch import ContinuousBatch
from model.rows import leaves, put, taken
from model.sampling import Policy, Speech, begin, speak
from model.step_graph import KEPT, Shape, StepGraph, borrowed, give_back
from tests.model.test_continuous_batch import alone
from tests.model.test_sampling import FREE, network, texts, voices


def rows(model, count: int) -> list[tuple]:
    """(phones, seed, state, prompt, max_frames) of so many rows; some have voices, some have prompts."""
    phones, lengths = texts(count, seed=3)
    voiced = voices(model, count)
    codes = torch.randint(0, 8, (count, 3, 5), generator=torch.Generator().manual_seed(1))
    return [
        (
            phones[row, : lengths[row]],
            row,
            taken(voiced, torch.tensor([row])) if row % 2 else None,
            codes[row, :, :row] if row % 3 == 1 and row < 6 else None,
            [9, 30][row % 2],
        )
        for row in range(count)
    ]


def assert_same(one: Speech, other: Speech, tolerance: float = 1e-9) -> None:
    assert torch.equal(one.codes, other.codes)
    assert one.finished == other.finished
    torch.testing.assert_close(one.attention, other.attention, rtol=0, atol=tolerance)


def exactly(shape, *wanted: int) -> Shape:
    return shape(*wanted)


@settings(max_examples=10)
@given(
    arrivals=st.lists(st.integers(0, 25), min_size=1, max_size=10),
    leaves_at=st.lists(st.integers(0, 60), min_size=10, max_size=10),
    stride=st.sampled_from([1, 3, 8]),
)
def test_rows_that_move_from_graph_to_graph_say_what_they_say_alone(arrivals, leaves_at, stride) -> None:
    """Every fourth is dropped, if it has not ended by then; without rounding every newcomer changes the shape."""
    model = network().eval()
    wanted = rows(model, len(arrivals))
    expected = [alone(model, *row) for row in wanted]
    batch, ended = ContinuousBatch(model, FREE, FixedRows(model, FREE, stride)), {}
    present: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shape, "around", classmethod(exactly))
        for step in range(120):
            for number in [n for n, arrival in enumerate(arrivals) if arrival == step]:
                batch.add(number, *wanted[number])
                present.add(number)
            gone = {n for n in present if n % 4 == 3 and leaves_at[n] == step}
            batch.drop(gone)
            present -= gone
            spoken = dict(batch.step())
            ended |= spoken
            present -= set(spoken)
            assert len(batch) == len(present)
            for number in present:
                said = batch.said(number)
                assert torch.equal(said, expected[number].codes[:, : said.shape[1]])
    assert not present
    for number, speech in ended.items():
        assert_same(speech, expected[number])
    assert all(number in ended for number in range(len(arrivals)) if number % 4 != 3)


def test_steps_are_given_out_one_by_one_and_newcomers_wait_for_the_last() -> None:
    model = network().eval()
    policy = Policy(min_frames=20, max_frames=20)
    batch = ContinuousBatch(model, policy, FixedRows(model, policy, 8))
    phones, lengths = texts(2)
    batch.add("first", phones[0, : lengths[0]], 0)
    counts = []
    for step in range(20):
        if step == 3:
            batch.add("second", phones[1, : lengths[1]], 1)
        assert batch.step() == []
        counts.append((batch.said("first").shape[1], batch.said("second").shape[1] if step >= 3 else 0))
    assert [first for first, _ in counts] == [0, 0, *range(1, 19)]
    assert [second for _, second in counts] == [0] * 10 + [*range(1, 11)]
    batch.drop({"first"})
    assert len(batch) == 1
    with pytest.raises(KeyError):
        batch.said("first")
    batch.drop({"second"})
    batch.add("third", phones[0, : lengths[0]], 0)
    for _ in range(3):  # there is nobody left to wait for
        batch.step()
    assert batch.said("third").shape == (3, 1)


def test_spare_rows_and_what_was_left_in_them_do_not_reach_the_others() -> None:
    model = network().eval()
    fixed = FixedRows(model, FREE)
    wanted = rows(model, 3)
    for _ in range(2):
        batch, ended = ContinuousBatch(model, FREE, fixed), {}
        for number, row in enumerate(wanted):
            batch.add(number, *row)
        while len(batch):
            ended |= dict(batch.step())
        for number, row in enumerate(wanted):
            assert_same(ended[number], alone(model, *row))
        (graph,) = [graph for _, graph in step_graph._made[model]]
        with torch.inference_mode():
            for leaf in leaves(graph.progress):
                leaf.fill_(torch.nan if leaf.is_floating_point() else 1)
        assert graph.user() is None


def test_spare_rows_stay_finite() -> None:
    model = network().eval()
    with torch.inference_mode():
        graph = StepGraph(model, FREE, Shape(2, 16, 0), 8)
        for _ in range(20):
            said = graph.run(model)
    assert all(torch.isfinite(leaf).all() for leaf in leaves(graph.progress) if leaf.is_floating_point())
    torch.testing.assert_close(said.attention.sum(2), torch.ones(8, 2, dtype=torch.float64))


class Watch(TorchDispatchMode):
    """Refuses operations on tensors of more than one device, or of another one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        seen = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        assert seen == {"meta"}, f"{operation} of {seen}"
        return result


def test_a_stride_looks_at_no_value_and_takes_nothing_from_the_cpu(monkeypatch) -> None:
    """Nothing else can be captured. A tensor on `meta` has no values, so looking at one is an error there, too."""

    def refused(*_, **__):
        raise AssertionError("a tensor made of Python's numbers is a copy from the CPU")

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta
    policy = Policy(temperature=(1.0, 0.7, 0.0), top_k=(5,))
    model = network().eval().to("meta")
    with torch.no_grad():  # inference mode would hide what operations are made of
        graph = StepGraph(model, policy, Shape(8, 128, 256), 2)
        for maker in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, maker, refused)
        with Watch():
            graph._say(model)
        for looked in (lambda x: x.item(), lambda x: bool(x), lambda x: torch.ones(1, device="meta")[x > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                looked(graph.progress.ends[:1])


def test_a_graph_is_made_once_for_a_shape_and_is_nobody_elses() -> None:
    class User:
        pass

    model, one, other = network().eval(), User(), User()
    shape = Shape(2, 8, 0)
    first = borrowed(one, model, FREE, shape, 2)
    second = borrowed(other, model, FREE, shape, 2)
    assert first is not second
    give_back(first)
    assert borrowed(one, model, FREE, Shape(4, 8, 0), 2).shape.rows == 4
    assert borrowed(one, model, FREE, shape, 2) is first
    assert borrowed(one, model, dataclasses.replace(FREE, min_frames=3), shape, 2) is not first
    del other  # without a word
    assert borrowed(one, model, FREE, shape, 2) is second
    for number in range(3 * KEPT):
        give_back(borrowed(one, model, FREE, Shape(1 + number, 8, 0), 2))
    assert len(step_graph._made[model]) <= KEPT
    give_back(first)
    model.float().double()  # its weights lie elsewhere now
    assert borrowed(one, model, FREE, shape, 2) is not first
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("wanted", "shape"),
    [((1, 1, 0), (8, 128, 0)), ((9, 128, 1), (16, 128, 256)), ((512, 129, 300), (512, 256, 512))],
)
def test_shapes_are_few(wanted, shape) -> None:
    assert Shape.around(*wanted) == shape


def test_a_batch_moves_when_it_must_and_when_most_rows_are_spare() -> None:
    here = Shape(64, 128, 0)
    assert here.suits(here) and here.suits(Shape(32, 128, 0))
    assert not here.suits(Shape(16, 128, 0))
    assert not any(here.suits(Shape(*other)) for other in [(128, 128, 0), (64, 256, 0), (64, 128, 256)])


def test_when_most_rows_have_left_newcomers_bring_those_that_stay_into_a_smaller_graph() -> None:
    model = network().eval()
    policy = Policy(min_frames=20, max_frames=20)
    fixed = FixedRows(model, policy, 4)
    batch, ended = ContinuousBatch(model, policy, fixed), {}
    phones, lengths = texts(40)
    for number in range(40):
        batch.add(number, phones[number, : lengths[number]].repeat(20 if number == 3 else 1), number)
    batch.step()
    assert fixed._graph.shape == Shape(64, 128, 0)
    batch.add("long", phones[0].repeat(30), 0)
    for _ in range(4):
        batch.step()
    assert fixed._graph.shape == Shape(64, 256, 0)
    batch.drop({*range(1, 40), "long"})
    assert fixed._graph.shape == Shape(64, 256, 0)  # to move is worth nothing for its own sake
    batch.add("new", phones[1, : lengths[1]], 1)
    for _ in range(4):
        batch.step()
    assert fixed._graph.shape == Shape(8, 128, 0)
    while len(batch):
        ended |= dict(batch.step())
    for key, number in ((0, 0), ("new", 1)):
        text = phones[number : number + 1, : lengths[number]]
        assert_same(ended[key], speak(model, text, lengths[number : number + 1], policy, [number])[0])


def test_rows_are_written_where_they_are_to_lie() -> None:
    whole = (torch.full((4, 3, 2), 7.0), (torch.full((4,), 7), None))
    put(whole, (torch.ones(2, 2, 5), (torch.tensor([1, 2]), None)), torch.tensor([3, 1]))
    assert whole[1][0].tolist() == [7, 2, 7, 1]
    assert torch.equal(whole[0][[0, 2]], torch.full((2, 3, 2), 7.0))
    assert torch.equal(whole[0][[1, 3]], torch.tensor([[1.0, 1], [1, 1], [0, 0]]).expand(2, 3, 2))
    put(whole, (None, (None, None)), torch.tensor([3]))
    assert not whole[0][3].any() and whole[1][0].tolist() == [7, 2, 7, 0]


@pytest.mark.parametrize("mixer", ["gla", "attention"])
def test_without_a_gpu_a_step_is_a_step(mixer: str) -> None:
    assert isinstance(rows_for(network(mixer), FREE), MovingRows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("error:steps cannot be captured")
def test_a_captured_graph_says_what_its_steps_say(dtype: torch.dtype, monkeypatch) -> None:
    """In float64 also what each row says alone; else rounding differs with the number of rows."""
    model = network().eval()
    wanted = rows(model, 20)
    expected = [alone(model, *row) for row in wanted]
    model.to("cuda", dtype)
    assert isinstance(rows_for(model, FREE), FixedRows)

    def everything() -> dict[int, Speech]:
        batch, ended, waiting = ContinuousBatch(model, FREE), {}, list(enumerate(wanted))
        while waiting or len(batch):
            for number, (phones, seed, state, prompt, most) in waiting[:3]:
                if state is not None:
                    kind = torch.float64 if dtype == torch.float64 else torch.float32
                    state = model.initial_state([own.memory.to("cuda", kind) for own in state.encoder + state.decoder])
                batch.add(number, phones, seed, state, prompt, most)
            del waiting[:3]
            ended |= dict(batch.step())
        return ended

    captured = everything()
    assert all(graph.graph is not None for _, graph in step_graph._made[model])
    again = everything()
    step_graph._made.clear()
    monkeypatch.setattr(step_graph, "_captured", lambda *_: None)
    stepped = everything()
    for number, speech in enumerate(expected):
        assert_same(captured[number], stepped[number], 1e-9 if dtype == torch.float64 else 1e-2)
        assert_same(captured[number], again[number], 1e-9 if dtype == torch.float64 else 1e-2)
        if dtype == torch.float64:
            assert_same(captured[number], speech)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_stride_on_a_gpu_waits_for_nothing() -> None:
    model = network().eval().cuda().float()
    with torch.inference_mode():
        graph = StepGraph(model, FREE, Shape(8, 128, 256), 2)
        phones, lengths = texts(2)
        put(graph.progress, begin(model, phones.cuda(), lengths.cuda(), [0, 1]), torch.tensor([2, 5], device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph._say(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")
