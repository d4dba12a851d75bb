"""Rows that join and leave while others speak: each says what it says alone, whoever else is there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch_rows import FixedRows, MovingRows
from model.continuous_batch import ContinuousBatch
from model.rows import joined, taken, trimmed
from model.sampling import Prompt, speak
from tests.model.test_sampling import FREE, leaves, network, texts, voices


def alone(model, phones, seed, state, prompt, max_frames):
    given = None if prompt is None else Prompt(prompt[None], torch.tensor([prompt.shape[1]]))
    policy = dataclasses.replace(FREE, max_frames=max_frames)
    return speak(model, phones[None], torch.tensor([len(phones)]), policy, [seed], state, given)[0]


@pytest.mark.parametrize(("mixer", "stride"), [("gla", None), ("attention", None), ("gla", 8), ("gla", 3)])
@settings(max_examples=6)
@given(data=st.data())
def test_a_row_says_the_same_alone_and_among_rows_that_come_and_go(mixer, stride, data) -> None:
    model, count = network(mixer).eval(), 7
    phones, lengths = texts(count, seed=3)
    voiced = voices(model, count) if mixer == "gla" else None
    tensors = MovingRows(model, FREE) if stride is None else FixedRows(model, FREE, stride)
    batch, rows, spoken, step = ContinuousBatch(model, FREE, tensors), {}, {}, 0
    arrivals = [data.draw(st.integers(0, 30), label="arrives at step") for _ in range(count)]
    for number in range(count):
        state = taken(voiced, torch.tensor([number])) if data.draw(st.booleans(), label="has a voice") else None
        prompt = torch.randint(0, 8, (3, data.draw(st.integers(0, 5), label="prompt"))) if number % 3 == 1 else None
        rows[number] = (phones[number, : lengths[number]], number, state, prompt, data.draw(st.sampled_from([9, 40])))
    while len(spoken) < count:
        for number in [n for n in range(count) if arrivals[n] == step]:
            text, seed, state, prompt, longest = rows[number]
            batch.add(number, text, seed, state, prompt, longest)
        for key, speech in batch.step():
            assert key not in spoken
            spoken[key] = speech
        step += 1
        assert step < 200
    assert len(batch) == 0
    for number, row in rows.items():
        wanted = alone(model, *row)
        assert torch.equal(wanted.codes, spoken[number].codes)
        assert wanted.finished == spoken[number].finished
        torch.testing.assert_close(wanted.attention, spoken[number].attention, rtol=0, atol=1e-9)


def test_what_was_said_so_far_grows_to_what_is_said() -> None:
    model = network().eval()
    phones, lengths = texts(2)
    batch = ContinuousBatch(model, FREE)
    for row in range(2):
        batch.add(row, phones[row, : lengths[row]], 4 + row)
    assert batch.said(1).shape == (3, 0)
    frames, spoken = [], {}
    while len(batch):
        spoken |= dict(batch.step())
        if 1 not in spoken:
            frames.append(batch.said(1))
    assert [f.shape[1] for f in frames[2:]] == list(range(1, len(frames) - 1))
    assert all(torch.equal(f, spoken[1].codes[:, : f.shape[1]]) for f in frames)
    with pytest.raises(KeyError):
        batch.said(1)


@settings(max_examples=30)
@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=4))
def test_batches_that_are_joined_can_be_taken_apart(sizes: list[tuple[int, int]]) -> None:
    parts = [
        (torch.randn(rows, 2, places) if number % 2 == 0 else None, (torch.arange(rows) + 10 * number,))
        for number, (rows, places) in enumerate(sizes)
    ]
    counts = [rows for rows, _ in sizes]
    whole, (names,) = joined(parts, counts)
    begin = 0
    for (part, (own,)), (rows, places) in zip(parts, sizes, strict=True):
        mine = taken(whole, torch.arange(begin, begin + rows))
        assert torch.equal(names[begin : begin + rows], own)
        assert mine[:, :, places:].abs().sum() == 0 or part is None
        assert torch.equal(mine[:, :, :places], part) if part is not None else not mine.any()
        begin += rows


def test_places_that_no_row_fills_are_let_go() -> None:
    """Else a batch that never ends would remember every text and, with softmax attention, every step."""
    model = network("attention").eval()
    phones, lengths = texts(5)
    batch = ContinuousBatch(model, dataclasses.replace(FREE, min_frames=6, max_frames=6))
    widest = 0
    for turn in range(12):
        batch.add(turn, phones[turn % 5, : lengths[turn % 5]], turn)
        for _ in range(4):
            batch.step()
        widest = max(widest, batch._tensors.progress.state.encoder[0].keys.shape[2])
    assert widest <= 16
    assert leaves(trimmed(batch._tensors.progress))[0].shape == leaves(batch._tensors.progress)[0].shape
