"""Speaking: a step a frame, every row for itself.

A row ends with the first codebook's end token; the delay pattern then fixes the other codebooks' remaining steps, and
what it fixes is never drawn. Randomness is a function of (row's seed, step, codebook, token), so a row says the same
thing alone and in any batch (up to rounding), on any device, and there is no generator state to keep. All progress is
in one value, `Progress`, which a step replaces and does not change: rows can be taken out of it and put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.cross_attention import TextMemory
from model.delay import BOS, EOS, OFFSET, begun, undelayed
from model.lina import Lina, LinaState
from model.lina_config import ModelError
from model.rows import taken


@dataclass(frozen=True)
class Policy:
    """How tokens are chosen; of each tuple the last entry serves all further codebooks (defaults: as released)."""

    temperature: tuple[float, ...] = (1.0, 0.0)
    """By codebook; 0 takes the most likely token."""
    top_k: tuple[int, ...] = (100,)
    """By codebook: how many of the most likely tokens are drawn from; 0 for all."""
    min_frames: int = 1
    """No end before."""
    max_frames: int = 4096
    """Rows that have not ended by then are cut, prompts not counted."""

    def __post_init__(self) -> None:
        if not self.temperature or any(not 0 <= t < 100 for t in self.temperature):
            raise ModelError(f"sampling: temperature must be numbers from 0 to below 100, not {self.temperature!r}")
        if not self.top_k or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in self.top_k):
            raise ModelError(f"sampling: top_k must be whole numbers of at least 0, not {self.top_k!r}")
        if not 0 <= self.min_frames <= self.max_frames or self.max_frames < 1:
            raise ModelError(
                f"sampling: 0 ≤ min_frames ≤ max_frames ≥ 1 is not so for {self.min_frames} and {self.max_frames}"
            )

    def of(self, codebook: int) -> tuple[float, int]:
        """(temperature, top_k) of a codebook."""
        return tuple(entries[min(codebook, len(entries) - 1)] for entries in (self.temperature, self.top_k))


class Prompt(NamedTuple):
    """Speech that each row goes on from; its transcript stands at the front of the row's text."""

    codes: torch.Tensor
    """int [B, K, N], padded on the right."""
    lengths: torch.Tensor
    """int [B], 0 for a row without a prompt."""


class Progress(NamedTuple):
    """Rows that are being spoken; every entry has a row for each."""

    text: TextMemory
    state: LinaState | None
    tokens: torch.Tensor
    """int64 [B, K]: the newest tokens, which the model has not seen yet."""
    step: torch.Tensor
    """int64 [B]: their step; 0 is the start."""
    ends: torch.Tensor
    """int64 [B]: frames of the row, prompt included, or -1 as long as it goes on."""
    seeds: torch.Tensor
    """int64 [B]."""
    prompt: Prompt

    @property
    def done(self) -> torch.Tensor:
        """bool [B]: whose last code of the last codebook is there."""
        return (self.ends >= 0) & (self.step >= self.ends + self.tokens.shape[1] - 1)


class Speech(NamedTuple):
    """What one row said."""

    codes: torch.Tensor
    """int64 [K, N], its prompt not included."""
    finished: bool
    """Whether it ended by itself; otherwise it was cut at the policy's `max_frames`."""
    attention: torch.Tensor
    """[steps, J]: where in the text each step was."""


def begin(
    model: Lina,
    phones: torch.Tensor,
    phone_lengths: torch.Tensor,
    seeds: Sequence[int],
    state: LinaState | None = None,
    prompt: Prompt | None = None,
) -> Progress:
    """Reads texts and prompts; the rows of `state`, which stays as it is, are where the rows start from.

    Raises:
        ModelError: numbers of rows or codebooks that do not fit together.
    """
    rows, device = len(phones), phones.device
    if len(seeds) != rows or len(phone_lengths) != rows:
        raise ModelError(f"{rows} texts need as many lengths and seeds, not {len(phone_lengths)} and {len(seeds)}")
    if prompt is None:
        nothing = torch.zeros(rows, model.config.codebooks, 0, dtype=torch.int64, device=device)
        prompt = Prompt(nothing, torch.zeros(rows, dtype=torch.int64, device=device))
    if prompt.codes.shape[:2] != (rows, model.config.codebooks) or len(prompt.lengths) != rows:
        raise ModelError(f"prompts must be [{rows}, {model.config.codebooks}, N], not {list(prompt.codes.shape)}")
    prompt = Prompt(prompt.codes.long(), prompt.lengths.long())
    text = model.read(phones, phone_lengths)
    tokens, lengths = begun(prompt.codes, prompt.lengths)
    if prompt.codes.shape[2]:
        _, state, _ = model.advance(model.embed(tokens[:, :-1]), text, state, lengths - 1)
    newest = tokens[torch.arange(rows, device=device), lengths - 1]
    # int64 wraps around: any whole number is a seed.
    wrapped = [(int(seed) + 2**63) % 2**64 - 2**63 for seed in seeds]
    seed_tensor = torch.tensor(wrapped, dtype=torch.int64, device=device)
    return Progress(text, state, newest, lengths - 1, torch.full_like(lengths, -1), seed_tensor, prompt)


def advance(model: Lina, progress: Progress, policy: Policy) -> tuple[Progress, torch.Tensor]:
    """(the next progress, attention over the text [B, J]); one step of each row."""
    logits, state, attention = model.step(progress.tokens, progress.text, progress.state)
    step, ends, prompt = progress.step + 1, progress.ends, progress.prompt
    tokens = []
    for codebook in range(model.config.codebooks):
        frame = step - 1 - codebook
        allowed = _allowed(logits[:, codebook], codebook, frame - prompt.lengths >= policy.min_frames)
        drawn = _drawn(allowed, *policy.of(codebook), progress.seeds, step * model.config.codebooks + codebook)
        if codebook == 0:
            ends = torch.where((drawn == EOS) & (ends < 0) & (frame >= prompt.lengths), frame, ends)
        drawn = torch.where((ends >= 0) & (frame >= ends), EOS, drawn)
        if prompt.codes.shape[2]:
            given = prompt.codes[:, codebook].gather(1, frame.clamp(0, prompt.codes.shape[2] - 1)[:, None])[:, 0]
            drawn = torch.where(frame < prompt.lengths, given + OFFSET, drawn)
        tokens.append(torch.where(frame < 0, BOS, drawn))
    return progress._replace(state=state, tokens=torch.stack(tokens, 1), step=step, ends=ends), attention


@torch.inference_mode()
def speak(
    model: Lina,
    phones: torch.Tensor,
    phone_lengths: torch.Tensor,
    policy: Policy,
    seeds: Sequence[int],
    state: LinaState | None = None,
    prompt: Prompt | None = None,
) -> list[Speech]:
    """Says each text to its end.

    Args:
        phones, phone_lengths: int [B, J] and [B], as in `model.lina.Batch`.
        seeds: a row's randomness, whatever else is in the batch.
        state: where each row starts from: `Lina.initial_state` of voices. Not changed.
        prompt: what each row goes on from.

    Raises:
        ModelError: numbers of rows or codebooks that do not fit together.
    """
    training = model.training
    model.eval()
    try:
        return _speak(model, begin(model, phones, phone_lengths, seeds, state, prompt), policy)
    finally:
        model.train(training)


def _speak(model: Lina, progress: Progress, policy: Policy) -> list[Speech]:
    rows, extra = len(progress.tokens), model.config.codebooks - 1
    widths = progress.text.filled.sum(1).tolist()
    present = torch.arange(rows, device=progress.tokens.device)
    tokens, attentions = [], []
    steps, finished = torch.zeros_like(progress.step), torch.zeros_like(progress.done)
    while len(present):
        progress, attention = advance(model, progress, policy)
        tokens.append(progress.tokens.new_zeros(rows, extra + 1).index_copy(0, present, progress.tokens))
        attentions.append(attention.new_zeros(rows, attention.shape[1]).index_copy(0, present, attention))
        steps[present] += 1
        finished[present] = progress.done
        going = torch.nonzero(~progress.done & (steps[present] < policy.max_frames + extra)).flatten()
        if len(going) < len(present):
            present, progress = present[going], taken(progress, going)
    tokens, attentions = torch.stack(tokens, 1), torch.stack(attentions, 1)
    return [
        Speech(undelayed(tokens[row, :count]), ended, attentions[row, :count, : widths[row]])
        for row, (count, ended) in enumerate(zip(steps.tolist(), finished.tolist(), strict=True))
    ]


def _allowed(logits: torch.Tensor, codebook: int, may_end: torch.Tensor) -> torch.Tensor:
    """Logits [B, tokens] in which only codes are possible and, in the first codebook of rows that may end, the end."""
    token = torch.arange(logits.shape[1], device=logits.device)
    possible = (token >= OFFSET).expand(logits.shape)
    if codebook == 0:
        possible = possible | ((token == EOS) & may_end[:, None])
    return logits.masked_fill(~possible, -torch.inf)


def _drawn(logits, temperature: float, top_k: int, seeds: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """int64 [B]: tokens drawn from logits [B, tokens] by adding Gumbel noise, which belongs to (seed, place, token)."""
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    uniform = _uniform(seeds, place, logits.shape[1])
    return (logits.double() / temperature - (-uniform.log()).log()).argmax(-1)


def _uniform(seeds: torch.Tensor, place: torch.Tensor, count: int) -> torch.Tensor:
    """float64 [B, count] in (0, 1): a counter-based generator, a hash of (seed, place, 0 … count - 1)."""
    key = _mixed(_mixed(_mixed(seeds & _WORD) ^ (seeds >> 32 & _WORD)) ^ (place & _WORD))
    words = _mixed(key[:, None] ^ _mixed(torch.arange(count, device=seeds.device) + 1))
    return (words.double() + 0.5) / 2**32


_WORD = 0xFFFFFFFF


def _mixed(word: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words, in int64, under which one changed bit changes half of the bits (C. Wellons)."""
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return word ^ (word >> 16)
