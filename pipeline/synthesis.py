"""Text to speech: many lines at once, cut at sentences, examined, said again where that went wrong, and joined.

    synthesizer = Synthesizer(read_model("models/lina"), codec_weights.resolve("demo"))
    spoken = synthesizer.say(Line("Good morning."))            # spoken.samples, spoken.rate, spoken.pieces

All pieces of all lines share one continuous batch. What a line says is a function of its text, voice and seed: the
same alone and beside any others (up to rounding: exactly with `dtype="float64"`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from infra import storage
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, ModelCard, unpack
from model.continuation import joined
from model.continuous_batch import ContinuousBatch
from model.lina import Lina, LinaState
from model.lina_config import ModelError
from model.sampling import Policy, Speech
from model.voice_samples import Sample
from pipeline import phonemes, sentences
from pipeline.codec_weights import ResolvedCodec
from pipeline.speech_faults import Findings, Limits, examine
from pipeline.speech_joining import join
from pipeline.speech_lines import Line, Piece, Prompt, Spoken, Voice, derived
from pipeline.text import PUNCTUATION
from pipeline.utterances import Unusable

MOST_CHARACTERS = 100_000
"""Of a line: two hours of speech, which are held in memory."""


class ModelFiles(NamedTuple):
    """A model as bytes, which Ray ships to a node once."""

    where: str
    config: bytes
    weights: bytes


def read_model(folder: str) -> ModelFiles:
    """The files of a model's folder, local or an fsspec URL. Raises ModelError where there are none."""
    content = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            content.append(storage.read_bytes(storage.join(folder, name)))
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"{folder} is no model: {name} cannot be read ({error}); a model is a folder with {CONFIG_FILE} and "
                f"{WEIGHTS_FILE}, which jobs/export.py makes: name it with --model"
            ) from None
    return ModelFiles(folder, *content)


class Synthesizer:
    """
    Args:
        files: the model.
        codec: must be the one whose codes the model was trained on.
        device, dtype: where and how the model runs; the codec runs in float32.
        policy: how tokens are drawn; its `max_frames` is an upper limit for any piece.
        limits: when a piece counts as failed.
        rows: pieces spoken at once.
        retries: further attempts at a piece that failed.

    Raises:
        ModelError: a damaged model, or one without the phonemes of this project.
        CodecError: another codec than the model's.
    """

    def __init__(
        self,
        files: ModelFiles,
        codec: ResolvedCodec,
        device: str = "cpu",
        dtype: str = "float32",
        policy: Policy | None = None,
        limits: Limits | None = None,
        rows: int = 16,
        retries: int = 2,
    ) -> None:
        self.model, self.card = _opened(files, device, dtype)
        codec.identity.require(self.card.codec, f"model {files.where}")
        self.codec = codec.build(device)
        self.policy, self.limits = policy or Policy(), limits or Limits()
        self.rows, self.retries = rows, retries
        self._ids = _phone_ids(self.card, files.where)
        self._batch = ContinuousBatch(self.model, self.policy)
        self._queue: deque[Take] = deque()
        self._spoken: dict[Hashable, Take] = {}
        self._lines: dict[Hashable, _Progress] = {}

    def __len__(self) -> int:
        """Lines that are not done."""
        return len(self._lines)

    @property
    def pieces_left(self) -> int:
        """Pieces of lines that are not done."""
        return sum(said is None for line in self._lines.values() for said in line.said)

    @property
    def room(self) -> int:
        """How many more pieces could be spoken now."""
        return max(0, self.rows - len(self._batch) - len(self._queue))

    def submit(self, key: Hashable, line: Line) -> None:
        """Takes a line up.

        Args:
            key: what `step` gives it back under.

        Raises:
            Unusable: a text that cannot be said.
            ModelError: a voice of another model.
            ValueError: the key is in use.
        """
        if key in self._lines:
            raise ValueError(f"line {key!r} is being spoken")
        takes = self.takes(key, line)
        self._lines[key] = _Progress([take.pause for take in takes], [None] * len(takes))
        self._queue.extend(takes)

    def step(self) -> list[tuple[Hashable, Spoken]]:
        """Says one frame more of everything; gives back the lines that are done with it."""
        start = time.perf_counter()
        while self._queue and len(self._batch) < self.rows:
            take = self._queue.popleft()
            self._spoken[take.key] = take
            most = self.most_frames(take)
            self._batch.add(take.key, take.phones, take.seed, take.state, take.prompt, most)
        ended, done = self._batch.step(), []
        share = (time.perf_counter() - start) / max(1, len(self._spoken))
        for line, _ in self._spoken:
            self._lines[line].took += share
        for key, speech in ended:
            start, take, (line, number) = time.perf_counter(), self._spoken.pop(key), key
            progress, again = self._lines[line], self._judged(take, speech)
            if again:
                self._queue.appendleft(again)
            else:
                progress.said[number] = self._piece(take)
            progress.took += time.perf_counter() - start
            if all(said is not None for said in progress.said):
                done.append((line, self._joined(self._lines.pop(line))))
        return done

    def speak(
        self, lines: Iterable[tuple[Hashable, Line]]
    ) -> Iterator[tuple[Hashable, Spoken | Unusable | ModelError]]:
        """Says lines, of which as many are taken from the iterable as there is room for; gives each as it is done.

        Lines that cannot be said are given back as the exception that says why. Nothing else may be submitted
        meanwhile, and the iterator is to be used up.
        """
        waiting, more = iter(lines), True
        while more or len(self):
            while more and self.room:
                key, line = next(waiting, (None, None))
                if line is None:
                    more = False
                    continue
                try:
                    self.submit(key, line)
                except (Unusable, ModelError) as error:
                    yield key, error
            yield from self.step()

    def say(self, line: Line) -> Spoken:
        """One line. Raises as `submit`."""
        ((_, spoken),) = self.speak([(0, line)])
        if not isinstance(spoken, Spoken):
            raise spoken
        return spoken

    def takes(self, key: Hashable, line: Line) -> list[Take]:
        """The first attempts at a line's pieces. Raises as `submit`."""
        if len(line.text) > MOST_CHARACTERS:
            raise Unusable("text-too-long", f"{len(line.text)} characters, at most {MOST_CHARACTERS}; split the text")
        parts = sentences.pieces(line.text)
        if not parts:
            phonemes.phonemise(line.text)  # says what is wrong with it
            raise Unusable("not-speakable", "no letter and no digit in the text")
        state, takes = None if line.voice is None else self._state(line.voice), []
        for number, part in enumerate(parts):
            tokens = [phonemes.BOS, *phonemes.phonemise(part.text), phonemes.EOS]
            sounds = np.array([token not in PUNCTUATION and token not in phonemes.SPECIALS for token in tokens])
            phones, codes = torch.tensor([self._ids[token] for token in tokens]), None
            if line.prompt is not None:
                phones, sounds, codes = self._after(line.prompt, phones, sounds)
            seed = derived(line.seed, number)
            takes.append(Take((key, number), *part, phones, sounds, state, seed, [], len(tokens), codes))
        return takes

    def most_frames(self, take: Take) -> int:
        """Where a piece is cut."""
        return min(self.policy.max_frames, self.limits.most_frames(take.tokens, self.card.codec.frame_rate))

    def _after(
        self, prompt: Prompt, phones: torch.Tensor, sounds: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """(phones, sounds, codes): a piece's text behind that of a prompt, of which nothing is to be said, and the
        prompt's codes."""
        codes = prompt.sample.codes[: self.card.sizes.codebooks]
        text = joined([prompt.sample, Sample(phones, codes[:, :0])], self._ids[phonemes.SPACE]).phones
        return text, np.concatenate([np.zeros(len(text) - len(sounds) + 1, bool), sounds[1:]]), codes

    def _state(self, voice: Voice) -> LinaState:
        kind = self.model.norm.weight
        memories = [memory.to(kind.device, self._memory_type()) for memory in voice.memories]
        position = None if voice.position is None else voice.position.to(kind.device, self._memory_type())
        try:
            return self.model.initial_state(memories, position, batch=1)
        except ModelError as error:
            raise ModelError(f"voice {voice.name!r} does not fit this model: {error}") from None

    def _memory_type(self) -> torch.dtype:
        return torch.float64 if self.model.norm.weight.dtype == torch.float64 else torch.float32

    def _judged(self, take: Take, speech: Speech) -> Take | None:
        """Notes the attempt; returns the next one if it failed and there may be more."""
        codes = speech.codes.cpu().numpy()
        attention = speech.attention.float().cpu().numpy()
        found = examine(codes, speech.finished, attention, take.sounds, self.card.codec.frame_rate, self.limits)
        take.attempts.append((take.seed, codes, found))
        if not found.faults or len(take.attempts) > self.retries:
            return None
        return take._replace(seed=derived(take.attempts[0][0], "again", len(take.attempts)))

    def _piece(self, take: Take) -> tuple[Piece, np.ndarray]:
        seed, codes, found = best_attempt(take)
        piece = Piece(take.text, codes.shape[1], seed, len(take.attempts), found)
        return piece, self.decode(codes)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """float32 [time] of codes, int [K, N]; alone, so that it does not depend on what else is spoken."""
        return self.codec.decode([codes])[0] if codes.shape[1] else np.zeros(0, np.float32)

    def _joined(self, progress: _Progress) -> Spoken:
        pieces, waves = zip(*progress.said, strict=True)
        rate = self.card.codec.sample_rate
        return Spoken(join(waves, progress.pauses, rate), rate, pieces, progress.took)


class Take(NamedTuple):
    """One attempt at one piece."""

    key: tuple[Hashable, int]
    """Of its line, and its number there."""
    text: str
    pause: float
    phones: torch.Tensor
    """int [J], a prompt's text before the piece's own."""
    sounds: np.ndarray
    """bool [J]: which phones are sounds that are to be said."""
    state: LinaState | None
    seed: int
    attempts: list[tuple[int, np.ndarray, Findings]]
    """(seed, codes, findings) of the attempts so far."""
    tokens: int
    """Of the piece's own text."""
    prompt: torch.Tensor | None
    """int [K, N]: codes that are gone on from."""


def best_attempt(take: Take) -> tuple[int, np.ndarray, Findings]:
    """The one with the fewest faults, of those the one that covers most."""
    return min(take.attempts, key=lambda attempt: (len(attempt[2].faults), -attempt[2].coverage))


@dataclass
class _Progress:
    """A line of which some pieces are said."""

    pauses: list[float]
    said: list[tuple[Piece, np.ndarray] | None] = field(default_factory=list)
    took: float = 0.0


def _opened(files: ModelFiles, device: str, dtype: str) -> tuple[Lina, ModelCard]:
    try:
        return unpack(files.config, files.weights, device, dtype)
    except ModelError as error:
        raise ModelError(f"{files.where}: {error}") from None


def _phone_ids(card: ModelCard, where: str) -> dict[str, int]:
    """The model's own numbers of our phonemes."""
    ids = {phone: number for number, phone in enumerate(card.inventory)}
    if missing := [phone for phone in phonemes.INVENTORY if phone not in ids]:
        raise ModelError(
            f"{where}: the model lacks {len(missing)} of our phonemes, first {missing[0]!r}: it was trained on another "
            "inventory, and texts cannot be written in it"
        )
    return ids
