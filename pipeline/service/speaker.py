"""Many requests in one batch: a thread steps the model, another turns codes into sound.

Every request has at most a few sentences in the batch. A place that becomes free goes to whoever has the least lead:
the seconds that were said for it, less those since it asked. So nobody waits for the end of another's long text, and
speech stays ahead of its listeners for as long as the machine is fast enough for all.

What was heard cannot be said again, but what was not can: a sentence that failed before anybody heard any of it is said
again, with another seed.

A stream gives out what is there of its current sentence in growing stretches (`pipeline.streaming` says why); a request
that is not a stream is joined as `Synthesizer` joins it, and is the same speech.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from model.continuous_batch import ContinuousBatch
from model.sampling import Speech
from pipeline.service.engine import Stopped
from pipeline.speech_faults import examine
from pipeline.speech_joining import FADE, faded, join, trailing_silence
from pipeline.speech_lines import Piece, derived
from pipeline.streaming import GROWTH
from pipeline.synthesis import Synthesizer, Take, best_attempt


class Full(RuntimeError):
    """As many requests are held as may be."""


class Said(NamedTuple):
    """The end of a request: how its sentences went."""

    pieces: tuple[Piece, ...]


Heard = np.ndarray | Said | Exception
"""What a request is given: speech, float32 [time] each; then its end, or what went wrong."""


@dataclass(eq=False)
class Spoken:
    """A request, as the stepping thread knows it."""

    takes: list[Take]
    stream: bool
    sound: Sound
    arrived: float
    """Seconds of the monotonic clock."""
    begun: int = 0
    """Pieces that were begun."""
    said: int = 0
    """Steps of pieces that left the batch."""
    inside: dict[int, tuple[Take, int]] = field(default_factory=dict)
    """Pieces in the batch, and the step before their first."""
    again: list[Take] = field(default_factory=list)
    """Pieces to be said again."""
    ended: dict[int, np.ndarray] = field(default_factory=dict)
    """Codes, [K, N], of pieces that nobody heard yet, of a stream."""
    pieces: dict[int, Piece] = field(default_factory=dict)
    current: int = 0
    """Of a stream: the piece that is being heard."""
    due: int = 0
    """Frames of it that are given out next."""
    heard: bool = False
    """Whether any of it was."""

    @property
    def waits(self) -> bool:
        return bool(self.again) or self.begun < len(self.takes)


class Speaker:
    """
    Args:
        synthesizer: its model, codec, policy, limits, rows and retries are used; nobody else may step it.
        most_requests: held at a time.
        pieces_ahead: pieces of one request in the batch, at most.
        first: seconds in the first chunk of each piece of a stream.
    """

    def __init__(self, synthesizer: Synthesizer, most_requests: int, pieces_ahead: int = 2, first: float = 0.3) -> None:
        self.synthesizer, self.most_requests, self.pieces_ahead = synthesizer, most_requests, pieces_ahead
        self.failure: Exception | None = None
        self.steps = 0
        self._first = max(1, round(first * synthesizer.card.codec.frame_rate))
        self._batch = ContinuousBatch(synthesizer.model, synthesizer.policy)
        self._changed = threading.Condition()
        self._held: dict[Spoken, None] = {}
        self._new: list[Spoken] = []
        self._left: list[Spoken] = []
        self._stopping = False
        self._names = itertools.count()
        self._sounds: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._step_all, self._sound_all)]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """Requests that are held."""
        return len(self._held)

    def submit(self, takes: list[Take], stream: bool, deliver: Callable[[Heard], None]) -> Spoken:
        """Takes up a request.

        Args:
            takes: from `Synthesizer.takes`, with any key.
            stream: give speech out while it is being said, not only at the end.
            deliver: called from another thread with each part; a `Said` or an exception is the last one.

        Raises:
            Full: nothing was taken up.
            Stopped: the engine is no more.
        """
        request = Spoken(takes, stream, self._sound(takes, stream, deliver), time.monotonic())
        with self._changed:
            if self.failure or self._stopping:
                raise Stopped("the engine has stopped")
            if len(self._held) >= self.most_requests:
                raise Full(f"{len(self._held)} requests are being spoken or wait for it")
            self._held[request] = None
            self._new.append(request)
            self._changed.notify()
        return request

    def leave(self, request: Spoken) -> None:
        """Nobody listens any more. Does nothing for a request that has ended."""
        request.sound.deaf = True
        with self._changed:
            if self._held.pop(request, 0) is None:
                self._left.append(request)
                self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        for thread in self._threads:
            thread.join()

    def _sound(self, takes: list[Take], stream: bool, deliver: Callable[[Heard], None]) -> Sound:
        return Sound(self.synthesizer, [take.pause for take in takes], stream, deliver)

    def _step_all(self) -> None:
        active: dict[Spoken, None] = {}
        try:
            while self._news(active):
                self._admit(active)
                self.steps += 1
                for (_, request, number), speech in self._batch.step():
                    self._ended(request, number, speech)
                for request in list(active):
                    self._give_out(request)
                    if len(request.pieces) == len(request.takes):
                        del active[request]
                        self._sounds.put(lambda request=request: self._finish(request))
        except Exception as error:  # whatever it is, every listener is told and the replica is replaced
            self._fail(error)
        else:
            self._fail(Stopped("the engine was stopped"))
        self._sounds.put(None)

    def _news(self, active: dict[Spoken, None]) -> bool:
        """Waits until there is something to say; False when it is time to stop."""
        with self._changed:
            while not (self._new or self._left or active or self._stopping):
                self._changed.wait()
            new, left = self._new, self._left
            self._new, self._left = [], []
        active.update(dict.fromkeys(new))
        if left:
            for request in left:
                active.pop(request, None)
            self._batch.drop({take.key for request in left for take, _ in request.inside.values()})
        return not self._stopping

    def _admit(self, active: dict[Spoken, None]) -> None:
        while len(self._batch) < self.synthesizer.rows:
            waiting = [r for r in active if r.waits and len(r.inside) < self.pieces_ahead]
            if not waiting:
                return
            request = min(waiting, key=self._lead)
            if request.again:
                take = request.again.pop(0)
            else:
                take = request.takes[request.begun]
                request.begun += 1
            number = take.key[-1]
            take = take._replace(key=(next(self._names), request, number))
            request.inside[number] = (take, self.steps)
            most = self.synthesizer.most_frames(take)
            self._batch.add(take.key, take.phones, take.seed, take.state, max_frames=most)

    def _lead(self, request: Spoken) -> float:
        """Seconds of speech that a request has had more than seconds have passed."""
        steps = request.said + sum(self.steps - before for _, before in request.inside.values())
        return steps / self.synthesizer.card.codec.frame_rate - (time.monotonic() - request.arrived)

    def _ended(self, request: Spoken, number: int, speech: Speech) -> None:
        """Takes a piece's codes, or has it said again."""
        take, before = request.inside.pop(number)
        request.said += self.steps - before
        card, limits = self.synthesizer.card, self.synthesizer.limits
        codes, attention = speech.codes.cpu().numpy(), speech.attention.float().cpu().numpy()
        found = examine(codes, speech.finished, attention, take.sounds, card.codec.frame_rate, limits)
        take.attempts.append((take.seed, codes, found))
        unheard = not (request.stream and request.current == number and request.heard)
        if found.faults and unheard and len(take.attempts) <= self.synthesizer.retries:
            seed = derived(take.attempts[0][0], "again", len(take.attempts))
            request.again.append(take._replace(seed=seed))
            return
        seed, codes, found = best_attempt(take) if unheard else take.attempts[-1]
        request.pieces[number] = Piece(take.text, codes.shape[1], seed, len(take.attempts), found)
        if request.stream:
            request.ended[number] = codes
        else:
            self._sounds.put(lambda: request.sound.keep(number, codes))

    def _give_out(self, request: Spoken) -> None:
        """Hands on what is there of a stream's current piece, and all that ended behind it."""
        if not request.stream:
            return
        while (codes := request.ended.pop(request.current, None)) is not None:
            self._sounds.put(lambda number=request.current, codes=codes: request.sound.more(number, codes, True))
            request.current, request.due, request.heard = request.current + 1, self._first, False
        if request.current not in request.inside:
            return
        take, before = request.inside[request.current]
        request.due = request.due or self._first
        frames = self.steps - before + 1 - self.synthesizer.card.sizes.codebooks
        if frames >= request.due and not request.sound.behind:
            codes = self._batch.said(take.key).cpu().numpy()
            request.sound.behind = request.heard = True
            request.due = max(frames + 1, round(frames * GROWTH))
            self._sounds.put(lambda number=request.current: request.sound.more(number, codes, False))

    def _finish(self, request: Spoken) -> None:
        """In the sound thread, after all of a request's speech."""
        request.sound.finish(tuple(request.pieces[number] for number in range(len(request.takes))))
        with self._changed:
            self._held.pop(request, None)

    def _sound_all(self) -> None:
        while (work := self._sounds.get()) is not None:
            if self.failure:
                continue
            try:
                work()
            except Exception as error:  # as above
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self.failure = self.failure or error
            held, self._held = list(self._held), {}
            self._stopping = True
            self._changed.notify()
        for request in held:
            request.sound.deliver(Stopped(f"the engine stopped: {error}"))


class Sound:
    """A request, as the sound thread knows it: its waves, and what of them was given out."""

    def __init__(
        self, synthesizer: Synthesizer, pauses: list[float], stream: bool, deliver: Callable[[Heard], None]
    ) -> None:
        self.synthesizer, self.pauses, self.stream, self.deliver = synthesizer, pauses, stream, deliver
        self.deaf = False
        """Nobody listens."""
        self.behind = False
        """A stretch waits to be decoded: no use in asking for a longer one yet."""
        self._rate = synthesizer.card.codec.sample_rate
        self._given = 0
        self._waves: dict[int, np.ndarray] = {}

    def more(self, number: int, codes: np.ndarray, ended: bool) -> None:
        """Gives out what is new in a piece's codes, [K, N]; the last milliseconds only at its end."""
        self.behind = False
        if self.deaf:
            return
        wave = faded(self.synthesizer.decode(codes), self._rate, end=ended)
        until = len(wave) if ended else max(self._given, len(wave) - round(FADE * self._rate))
        if until > self._given:
            self.deliver(wave[self._given : until])
        self._given = until
        if ended:
            self._given = 0
            silence = round((self.pauses[number] - trailing_silence(wave, self._rate)) * self._rate)
            if silence > 0:
                self.deliver(np.zeros(silence, np.float32))

    def keep(self, number: int, codes: np.ndarray) -> None:
        if not self.deaf:
            self._waves[number] = self.synthesizer.decode(codes)

    def finish(self, pieces: tuple[Piece, ...]) -> None:
        if self.deaf:
            return
        if not self.stream:
            self.deliver(join([self._waves[number] for number in range(len(pieces))], self.pauses, self._rate))
        self.deliver(Said(pieces))
