"""Continuous batching: rows that speak together, each from its own start to its own end.

A row joins whenever there is something for it to say and leaves with its last code, or when nobody listens any more;
the others do not notice: a row's memory is of constant size (Lina-Speech, section 3.3), and its randomness is its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Set

import torch
from torch.nn.utils.rnn import pad_sequence

from model.delay import undelayed
from model.lina import Lina, LinaState
from model.rows import joined, taken, trimmed
from model.sampling import Policy, Progress, Prompt, Speech, advance, begin


class ContinuousBatch:
    """
    Args:
        model: in evaluation mode.
        policy: how all rows are drawn; `max_frames` is for those that do not say otherwise.
    """

    def __init__(self, model: Lina, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self._waiting: list[tuple[_Row, torch.Tensor, int, LinaState | None, torch.Tensor | None]] = []
        self._rows: list[_Row] = []
        self._progress: Progress | None = None

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
        """A row that begins with the next step.

        Args:
            key: what its speech is given back under.
            phones: int [J], as a row of `model.lina.Batch`.
            seed: its randomness, whatever else is spoken.
            state: one row of `Lina.initial_state`; None is the model's own start. Not changed.
            prompt: int [K, N], what it goes on from; the prompt's transcript stands at the front of the text.
            max_frames: where it is cut, its prompt not counted.
        """
        row = _Row(key, self.policy.max_frames if max_frames is None else max_frames, len(phones))
        self._waiting.append((row, phones, seed, state, prompt))

    @torch.inference_mode()
    def step(self) -> list[tuple[Hashable, Speech]]:
        """Says one more step of every row; gives back those that ended with it, or were cut."""
        if self._waiting:
            self._begin()
        if self._progress is None:
            return []
        self._progress, attention = advance(self.model, self._progress, self.policy)
        for row, tokens, places in zip(self._rows, self._progress.tokens, attention, strict=True):
            row.tokens.append(tokens)
            row.attention.append(places)
        done = self._progress.done.tolist()
        extra = self.model.config.codebooks - 1
        going = [i for i, row in enumerate(self._rows) if not done[i] and len(row.tokens) < row.max_frames + extra]
        if len(going) == len(self._rows):
            return []
        left = sorted(set(range(len(self._rows))) - set(going))
        ended = [(self._rows[i].key, self._rows[i].speech(done[i])) for i in left]
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

    def _keep(self, places: list[int]) -> None:
        self._rows = [self._rows[place] for place in places]
        index = torch.tensor(places, dtype=torch.int64, device=self.model.norm.weight.device)
        self._progress = trimmed(taken(self._progress, index)) if places else None

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
        parts = [fresh] if self._progress is None else [self._progress, fresh]
        self._progress = joined(parts, [len(part.tokens) for part in parts])
        self._rows += rows

    def _prompt(self, prompts: tuple[torch.Tensor | None, ...], device: torch.device) -> Prompt | None:
        if all(prompt is None for prompt in prompts):
            return None
        empty = torch.zeros(self.model.config.codebooks, 0, dtype=torch.int64)
        codes = [empty if prompt is None else prompt for prompt in prompts]
        padded = pad_sequence([row.T for row in codes], batch_first=True).transpose(1, 2).to(device)
        return Prompt(padded, torch.tensor([row.shape[1] for row in codes], device=device))


class _Row:
    """What one row has said, kept by reference: a step costs it nothing but two list entries."""

    def __init__(self, key: Hashable, max_frames: int, phones: int) -> None:
        self.key, self.max_frames, self.phones = key, max_frames, phones
        self.tokens: list[torch.Tensor] = []
        self.attention: list[torch.Tensor] = []

    def codes(self) -> torch.Tensor:
        return undelayed(torch.stack(self.tokens))

    def speech(self, finished: bool) -> Speech:
        attention = torch.stack([places[: self.phones] for places in self.attention])
        return Speech(self.codes(), finished, attention)
