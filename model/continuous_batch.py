"""Continuous batching: rows that speak together, each from its own start to its own end.

A row joins whenever there is something for it to say and leaves with its last code, or when nobody listens any more;
the others do not notice: a row's memory is of constant size (Lina-Speech, section 3.3), and its randomness is its own.
On a GPU several steps are done at once and given out one by one (`model.batch_rows`).
"""

from __future__ import annotations

from collections.abc import Hashable, Set

import torch
from torch.nn.utils.rnn import pad_sequence

from model.batch_rows import FixedRows, MovingRows, rows_for
from model.delay import undelayed
from model.lina import Lina, LinaState
from model.rows import joined
from model.sampling import Policy, Prompt, Speech, begin


class ContinuousBatch:
    """
    Args:
        model: in evaluation mode.
        policy: how all rows are drawn; `max_frames` is for those that do not say otherwise.
        tensors: empty rows of this model and policy; None is what is fastest on its device.
    """

    def __init__(self, model: Lina, policy: Policy, tensors: MovingRows | FixedRows | None = None) -> None:
        self.model, self.policy = model, policy
        self._waiting: list[tuple[_Row, torch.Tensor, int, LinaState | None, torch.Tensor | None]] = []
        self._rows: list[_Row] = []
        self._tensors = tensors or rows_for(model, policy)
        self._ahead = 0
        """Steps that are done and not given out."""

    def __len__(self) -> int:
        """Rows that have not ended."""
        return len(self._rows) + len(self._waiting)

    def add(
        self,
        key: Hashable,
        phones: torch.Tensor,
        seed: int,
        state: LinaState | None = None,
        prompt: torch.Tensor | None = None,
        max_frames: int | None = None,
    ) -> None:
        """A row that begins with the next step, or once all steps that are done already were given out.

        Args:
            key: what its speech is given back under.
            phones: int [J], as a row of `model.lina.Batch`.
            seed: its randomness, whatever else is spoken.
            state: one row of `Lina.initial_state`; None is the model's own start. Not changed.
            prompt: int [K, N], what it goes on from; the prompt's transcript stands at the front of the text.
            max_frames: where it is cut, its prompt not counted.
        """
        most = (self.policy.max_frames if max_frames is None else max_frames) + self.model.config.codebooks - 1
        row = _Row(key, most, len(phones))
        self._waiting.append((row, phones, seed, state, prompt))

    @torch.inference_mode()
    def step(self) -> list[tuple[Hashable, Speech]]:
        """Says one more step of every row; gives back those that ended with it, or were cut."""
        if not self._ahead:
            if self._waiting:
                self._begin()
            if not self._rows:
                return []
            self._advance()
        self._ahead -= 1
        for row in self._rows:
            row.steps += 1
        going = [place for place, row in enumerate(self._rows) if row.steps != row.last]
        if len(going) == len(self._rows):
            return []
        ended = [(row.key, row.speech()) for row in self._rows if row.steps == row.last]
        self._keep(going)
        return ended

    @torch.inference_mode()
    def drop(self, keys: Set[Hashable]) -> None:
        """Takes rows out before their end; those that are not there, or have ended, are passed over."""
        self._waiting = [entry for entry in self._waiting if entry[0].key not in keys]
        kept = [place for place, row in enumerate(self._rows) if row.key not in keys]
        if len(kept) < len(self._rows):
            self._keep(kept)

    def said(self, key: Hashable) -> torch.Tensor:
        """int64 [K, N]: the codes of a row's frames that are complete by now.

        Raises:
            KeyError: no such row, or it has ended.
        """
        if any(row.key == key for row, *_ in self._waiting):
            return torch.zeros(self.model.config.codebooks, 0, dtype=torch.int64)
        return {row.key: row for row in self._rows}[key].codes()

    def _advance(self) -> None:
        said = self._tensors.advance()
        self._ahead = len(said.tokens)
        ends = said.done.T.tolist()
        for row, tokens, attention, done in zip(
            self._rows, said.tokens.unbind(1), said.attention.unbind(1), ends, strict=True
        ):
            row.add(tokens, attention, done)

    def _keep(self, places: list[int]) -> None:
        self._rows = [self._rows[place] for place in places]
        self._tensors.keep(places)
        if not places:
            self._ahead = 0

    def _begin(self) -> None:
        rows, phones, seeds, states, prompts = zip(*self._waiting, strict=True)
        self._waiting = []
        device = self.model.norm.weight.device
        lengths = torch.tensor([len(text) for text in phones], device=device)
        fresh = begin(
            self.model,
            pad_sequence(list(phones), batch_first=True).to(device),
            lengths,
            seeds,
            joined(states, [1] * len(rows)),
            self._prompt(prompts, device),
        )
        self._tensors.join(fresh)
        self._rows += rows

    def _prompt(self, prompts: tuple[torch.Tensor | None, ...], device: torch.device) -> Prompt | None:
        if all(prompt is None for prompt in prompts):
            return None
        empty = torch.zeros(self.model.config.codebooks, 0, dtype=torch.int64)
        codes = [empty if prompt is None else prompt for prompt in prompts]
        padded = pad_sequence([row.T for row in codes], batch_first=True).transpose(1, 2).to(device)
        return Prompt(padded, torch.tensor([row.shape[1] for row in codes], device=device))


class _Row:
    """What one row has said, kept by reference: a stride of steps costs it nothing but two list entries."""

    def __init__(self, key: Hashable, most: int, phones: int) -> None:
        self.key, self.most, self.phones = key, most, phones
        self.steps = 0
        """That were given out; there may be more in the lists."""
        self.last: int | None = None
        """The number of its steps, once it is known."""
        self.finished = False
        self.tokens: list[torch.Tensor] = []
        self.attention: list[torch.Tensor] = []

    def add(self, tokens: torch.Tensor, attention: torch.Tensor, done: list[bool]) -> None:
        """More steps, of which those after its last one do not count: [S, K], [S, J], [S] whether it was done."""
        self.tokens.append(tokens)
        self.attention.append(attention)
        for step, finished in enumerate(done, self.steps + 1):
            if finished or step >= self.most:
                self.last, self.finished = step, finished
                return

    def codes(self) -> torch.Tensor:
        return undelayed(torch.cat(self.tokens)[: self.steps])

    def speech(self) -> Speech:
        attention = torch.cat([places[:, : self.phones] for places in self.attention])[: self.steps]
        return Speech(self.codes(), self.finished, attention)
