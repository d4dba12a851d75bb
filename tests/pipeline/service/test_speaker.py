"""Many requests in one batch, without a server: what each is given, who makes room for whom, who is told what."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import queue
import struct
import threading

import numpy as np
import pytest
import torch

from infra.config import ConfigError, load
from model.batch_rows import FixedRows, MovingRows
from model.continuous_batch import ContinuousBatch
from model.sampling import Policy
from pipeline import codec_weights
from pipeline.enroll_config import EnrollConfig
from pipeline.service import tenants
from pipeline.service.config import ServeConfig, ServiceConfig
from pipeline.service.encoding import MEDIA, STREAMED, Encoder, whole
from pipeline.service.engine import Stopped
from pipeline.service.ingress import application
from pipeline.service.service import Service
from pipeline.service.speaker import Full, Said, Speaker
from pipeline.service.tenants import Rates, Tenant, read
from pipeline.speech_faults import Limits
from pipeline.speech_files import Provenance, decode
from pipeline.speech_lines import Line
from pipeline.streaming import stream
from pipeline.synthesis import Synthesizer, read_model
from tests.pipeline.speaking_model import write_speaker

TEXT = "The boat sailed past the quiet island. Was it green? Seven birds sang about rain, and old stone walls."


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, codec = write_speaker(tmp_path_factory.mktemp("speaker"))
    yield read_model(model), codec_weights.resolve(codec)
    torch.set_num_threads(threads)


def synthesizer(parts, **changes) -> Synthesizer:
    limits = Limits(seconds_a_token=0.02, seconds_more=0.3)
    return Synthesizer(*parts, dtype="float64", limits=limits, **{"rows": 3, "retries": 2} | changes)


class Listener:
    """Somebody who asked."""

    def __init__(self, speaker: Speaker, line: Line, stream: bool) -> None:
        self.heard: queue.Queue = queue.Queue()
        self.request = speaker.submit(speaker.synthesizer.takes("", line), stream, self.heard.put)

    def whole(self) -> tuple[np.ndarray, Said | Exception, int]:
        """(the wave, its end, how many parts came)."""
        waves = []
        while isinstance(item := self.heard.get(timeout=60), np.ndarray):
            waves.append(item)
        return np.concatenate(waves) if waves else np.zeros(0, np.float32), item, len(waves)


@pytest.mark.parametrize("kind", [MovingRows, FixedRows])
def test_whatever_the_company_each_hears_what_it_hears_alone(parts, kind, monkeypatch):
    """Also in strides of steps, as on a GPU."""
    lines = [Line(TEXT, None, seed) for seed in range(3)]
    alone = synthesizer(parts)
    monkeypatch.setattr("model.continuous_batch.rows_for", kind)
    streams = synthesizer(parts, retries=0)
    speaker, unrepeated = Speaker(synthesizer(parts), 20), Speaker(streams, 20)
    listeners = [Listener(speaker, line, False) for line in lines]
    streamed = [Listener(unrepeated, line, True) for line in lines]
    for line, listener in zip(lines, listeners, strict=True):
        expected = alone.say(line)
        wave, said, _ = listener.whole()
        np.testing.assert_array_equal(wave, expected.samples)
        assert [(p.seed, p.attempts) for p in said.pieces] == [(p.seed, p.attempts) for p in expected.pieces]
    for line, listener in zip(lines, streamed, strict=True):
        wave, said, chunks = listener.whole()
        np.testing.assert_allclose(wave, np.concatenate(list(stream(streams, line))), atol=1e-6)
        assert chunks > len(said.pieces) > 1
    assert len(speaker) == len(unrepeated) == 0
    speaker.stop()
    unrepeated.stop()


def test_a_stream_begins_before_it_is_all_said_and_repeats_only_what_nobody_heard(parts):
    speaker = Speaker(synthesizer(parts, retries=3), 4)
    listener = Listener(speaker, Line(TEXT * 5), True)
    first = listener.heard.get(timeout=60)
    assert isinstance(first, np.ndarray) and len(speaker) == 1
    _, said, _ = listener.whole()
    assert said.pieces[0].attempts == 1  # it was heard from its first frames on
    assert max(piece.attempts for piece in said.pieces) > 1
    speaker.stop()


def test_those_who_leave_make_room_and_nobody_else_is_taken_up(parts):
    speaker = Speaker(synthesizer(parts), 3)
    long = [Listener(speaker, Line(TEXT * 40), True) for _ in range(3)]
    with pytest.raises(Full, match="3 requests"):
        Listener(speaker, Line("Rain."), False)
    for listener in long:
        listener.heard.get(timeout=60)
        speaker.leave(listener.request)
        speaker.leave(listener.request)
    wave, said, _ = Listener(speaker, Line("Rain."), False).whole()
    assert isinstance(said, Said) and len(wave)
    # Each had hundreds of sentences left: they are not being said.
    before = speaker.steps
    Listener(speaker, Line("Rain."), False).whole()
    assert speaker.steps - before < 4 * 200 and len(speaker) == 0
    speaker.stop()


def test_a_long_text_does_not_keep_others_waiting(parts):
    speaker = Speaker(synthesizer(parts, rows=2, retries=0), 9, pieces_ahead=1)
    long = Listener(speaker, Line(TEXT * 30), False)
    short = [Listener(speaker, Line("Rain."), False) for _ in range(4)]
    for listener in short:
        assert isinstance(listener.whole()[1], Said)
    assert len(speaker) == 1  # the long one
    speaker.leave(long.request)
    speaker.stop()


def test_when_the_engine_fails_every_listener_is_told(parts):
    engine = synthesizer(parts)
    speaker, decoding = Speaker(engine, 4), threading.Event()

    def broken(codes):
        decoding.wait(60)
        raise RuntimeError("the device is gone")

    engine.decode = broken
    listeners = [Listener(speaker, Line(TEXT), kind) for kind in (True, False)]
    decoding.set()
    for listener in listeners:
        _, end, _ = listener.whole()
        assert isinstance(end, Stopped) and "the device is gone" in str(end)
    with pytest.raises(Stopped):
        Listener(speaker, Line(TEXT), True)
    assert "the device is gone" in str(speaker.failure)


def test_rows_that_leave_change_nothing_for_those_that_stay(parts):
    engine = synthesizer(parts)
    takes = [engine.takes(n, Line(TEXT, None, n))[0] for n in range(3)]

    def said(dropped: set[int]) -> dict[int, list]:
        batch, ended = ContinuousBatch(engine.model, Policy(max_frames=40)), {}
        for n, take in enumerate(takes):
            batch.add(n, take.phones, take.seed)
        for step in range(60):
            if step == 7:
                batch.drop(dropped)
                batch.drop({"nobody"})
            ended |= {key: speech.codes.tolist() for key, speech in batch.step()}
        assert len(batch) == 0
        return ended

    everybody = said(set())
    assert sorted(everybody) == [0, 1, 2]
    assert said({1}) == {n: everybody[n] for n in (0, 2)}
    assert said({0, 1, 2}) == {}


PROVENANCE = Provenance("f" * 64, "ann", "Zoë Example, 2025-03-01: tests", "Café “there”.", {"seed": 3})


@pytest.mark.parametrize("form", MEDIA)
def test_files_say_where_they_come_from_streamed_or_whole(form):
    wave = (0.3 * np.sin(np.arange(60_000) / 24_000 * 2 * np.pi * 300)).astype(np.float32)
    files = [whole(form, wave, 24_000, PROVENANCE)]
    if form in STREAMED:
        encoder = Encoder(form, 24_000, PROVENANCE)
        parts = [encoder.add(part) for part in np.array_split(wave, 25)]
        assert sum(map(bool, parts)) > 1, "nothing is sent before the end"
        files.append(b"".join([*parts, encoder.end()]))
        assert encoder.mended() == b"", "what was sent is kept"
    for content in files:
        if form == "pcm":
            found = np.frombuffer(content, "<i2") / 32767
        else:
            found, rate, provenance = decode(content)
            told = dataclasses.replace(PROVENANCE, text="Cafe there.") if form == "mp3" else PROVENANCE
            assert rate == 24_000 and provenance == told
        if form == "mp3":  # its encoder begins with silence, and a stream does not say how much
            assert 0 <= len(found) - len(wave) < 5000
        else:
            assert len(found) == len(wave)
        if form in ("wav", "flac", "pcm"):
            np.testing.assert_allclose(found, wave, atol=1e-4)


@pytest.mark.parametrize("field", ["text", "voice", "consent"])
def test_words_in_a_files_tags_are_not_taken_for_its_sound(field):
    provenance = Provenance("f" * 64, **{"voice": "ann", field: "more data, data and data"})
    encoder = Encoder("wav", 24_000, provenance)
    content = encoder.add(np.full(2400, 0.5, np.float32)) + encoder.end()
    assert struct.unpack_from("<I", content, len(content) - 4800 - 4) == (0xFFFFFFFF,)
    samples, rate, told = decode(content)
    assert len(samples) == 2400 and rate == 24_000 and getattr(told, field) == "more data, data and data"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def test_tokens_are_known_by_their_digests(tmp_path):
    file = tmp_path / "tokens.yaml"
    file.write_text(
        f"tenants:\n  acme:\n    tokens: [{digest('a')}, {digest('b')}]\n"
        f"  zeta:\n    tokens: [{digest('z')}]\n    requests_per_minute: 7\n"
    )
    known = read(ServiceConfig(tokens=str(file), requests_per_minute=60))
    assert [known.of(token) for token in ("a", "b", "z")] == [
        *([Tenant("acme", 60)] * 2),
        Tenant("zeta", 7),
    ]
    assert [known.of(token) for token in ("", "c", digest("a"), "\udc80")] == [None] * 4
    assert read(ServiceConfig()) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("tenants: {acme: {tokens: [secret]}}", "never the tokens themselves"),
        ("tenants: {shared: {tokens: []}}", "not 'shared'"),
        ("tenants: {'../up': {tokens: []}}", "letters, digits"),
        ("tenants: {acme: {tokens: []}}", "needs tokens"),
        (f"tenants: {{a: {{tokens: [{digest('x')}]}}, b: {{tokens: [{digest('x')}]}}}}", "a token that a has"),
        (f"tenants: {{a: {{tokens: [{digest('x')}], requests_per_minute: 0}}}}", "at least 1"),
        (f"tenants: {{a: {{tokens: [{digest('x')}], admin: true}}}}", "requests_per_minute"),
        ("- a", "expected `tenants:`"),
        ("{", "cannot be read"),
        ("!!python/object/apply:os.system [id]", "cannot be read"),
    ],
)
def test_wrong_tokens_files_are_refused(tmp_path, content, reason):
    file = tmp_path / "tokens.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=reason):
        read(ServiceConfig(tokens=str(file)))


def test_a_token_is_made_with_its_digest_and_the_help_says_what_for(tmp_path, capsys):
    tenants.main([])
    token, known = (line.split()[1] for line in capsys.readouterr().out.splitlines())
    file = tmp_path / "tokens.yaml"
    file.write_text(f"tenants: {{acme: {{tokens: [{known}]}}}}")
    assert read(ServiceConfig(tokens=str(file))).of(token).name == "acme"
    with pytest.raises(SystemExit) as ended:
        tenants.main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "tenants:\n  acme:\n    tokens: [" in told and "lina-" not in told


def test_voices_are_looked_for_where_they_are_made():
    from jobs import voices

    assert ServiceConfig.voices == EnrollConfig.output == voices.DEFAULT


def test_a_tenant_has_a_minutes_worth_of_requests_and_gets_them_back_steadily():
    now = 0.0
    rates, tenant, other = Rates(lambda: now), Tenant("a", 6), Tenant("b", 6)
    assert [rates.wait(tenant) for _ in range(6)] == [0.0] * 6
    assert rates.wait(tenant) == pytest.approx(10)
    assert rates.wait(other) == 0
    now = 4.0
    assert rates.wait(tenant) == pytest.approx(6)
    now = 10.0
    assert rates.wait(tenant) == 0 and rates.wait(tenant) == pytest.approx(10)
    now = 1e6
    assert sum(rates.wait(tenant) == 0 for _ in range(50)) == 6


def asked(client: str, headers: dict[str, str]) -> int:
    """Status of a request from an address to a service without tokens, before any engine."""
    app = application(Service(ServiceConfig(), None, None))
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b"", "headers": lines}
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(app(scope | {"client": (client, 1), "scheme": "http", "server": ("127.0.0.1", 80)}, receive, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {"Host": "127.0.0.1:8000"}, 200),
        ("::1", {"Host": "[::1]:8000"}, 200),
        ("::ffff:127.0.0.1", {"Host": "localhost"}, 200),
        ("127.0.0.1", {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 200),
        ("192.0.2.7", {"Host": "127.0.0.1:8000"}, 403),
        ("127.0.0.1", {"Host": "lina.example.org"}, 403),
        ("127.0.0.1", {}, 403),
        ("127.0.0.1", {"Host": "127.0.0.1:8000", "Origin": "https://example.org"}, 403),
        ("127.0.0.1", {"Host": "127.0.0.1:8000", "Origin": "null"}, 403),
        ("127.0.0.1", {"Host": "127.0.0.1:8000", "Content-Length": "99999999999999999999999"}, 413),
        ("127.0.0.1", {"Host": "127.0.0.1:8000", "Content-Length": "-1"}, 413),
    ],
)
def test_without_tokens_only_this_machine_is_served(client, headers, status):
    assert asked(client, headers) == status


def test_beyond_this_machine_tokens_are_needed():
    with pytest.raises(ConfigError, match="needs --tokens"):
        load(ServeConfig, overrides={"host": "0.0.0.0"})
    assert load(ServeConfig, overrides={"host": "0.0.0.0", "tokens": "tokens.yaml"}).host == "0.0.0.0"
