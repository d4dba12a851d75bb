"""The service as its users meet it: HTTP against Ray Serve, OpenAI's client, a browser, and a killed engine."""

from __future__ import annotations

import http.client
import io
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
import requests
import soundfile

from model.sampling import Policy
from model.voice_file import load
from pipeline import codec_weights
from pipeline.service.config import ServiceConfig
from pipeline.service.encoding import MEDIA
from pipeline.speaking_voices import read_voice
from pipeline.speech_files import decode
from pipeline.speech_lines import Line
from pipeline.synthesis import Synthesizer, read_model
from tests.corpora import voiced

LONG = "The boat sailed past the quiet island. Was it green? Seven birds sang about rain, and old stone walls. " * 38


def error_of(answer: requests.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of a refusal in OpenAI's shape, which it must be."""
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    return error["message"]


def until(true: Callable[[], Any], seconds: float = 90) -> Any:
    """Waits; fails if that takes forever."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


def recording(seconds: float, seed: int = 0, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, voiced(np.random.default_rng(seed), seconds, rate), rate, format="FLAC")
    return file.getvalue()


def form(id: str, samples: list[bytes], texts: list[str] | None = None, **more: str) -> dict[str, Any]:
    """What `requests` sends as an enrollment."""
    texts = ["the small boat sailed past a quiet island"] * len(samples) if texts is None else texts
    consent = {"consent_who": "Ann Example", "consent_when": "2025-03-01", "consent_scope": "tests"}
    fields = [("id", id), *(consent | more).items(), *(("transcripts", text) for text in texts)]
    return {"data": fields, "files": [("samples", (f"{n}.flac", content)) for n, content in enumerate(samples)]}


def test_openais_client_works(service):
    client = openai.OpenAI(base_url=service.url + "/v1", api_key="token-a", max_retries=0)
    assert [model.id for model in client.models.list()] == ["lina"]
    whole = client.audio.speech.create(model="lina", voice="ann", input="The boat sailed past.").read()
    samples, rate, told = decode(whole)  # MP3, which is the client's default
    assert rate == 24_000 and len(samples) > 2400 and told.voice == "ann" and told.synthetic
    assert told.consent == "Ann Example, 2025-03-01: tests" and told.text == "The boat sailed past."
    with client.audio.speech.with_streaming_response.create(
        model="lina", voice="sam", input="Rain.", response_format="pcm", extra_body={"seed": 4}
    ) as answer:
        assert answer.headers["content-type"] == "audio/pcm;rate=24000;channels=1"
        assert len(answer.read()) % 2 == 0
    with pytest.raises(openai.NotFoundError) as refused:
        client.audio.speech.create(model="lina", voice="bert", input="Rain.")
    assert refused.value.code == "voice_not_found" and refused.value.param == "voice"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=service.url + "/v1", api_key="wrong", max_retries=0).models.list()


def test_what_is_said_is_what_the_synthesizer_says(service):
    drawn = Policy(ServiceConfig.temperature, ServiceConfig.top_k)
    files, codec = read_model(service.model), codec_weights.resolve(service.codec)
    engine = Synthesizer(files, codec, dtype="float64", policy=drawn, retries=1)
    voice = read_voice(str(service.folder / "voices/a/ann.safetensors"), engine.card, "ann")
    text = "The boat sailed past the quiet island. Was it green? Seven birds sang about rain."
    expected = engine.say(Line(text, voice, 7))
    answers = [service.say(text, seed=7, stream=False, **{"response_format": form}) for form in ("wav", "flac")]
    body = {"model": "lina", "input": text, "voice": {"id": "ann"}, "seed": 7, "stream": False}
    answers.append(service.ask("POST", "/v1/audio/speech", json=body | {"response_format": "wav"}))
    assert answers[2].headers["content-length"] == str(len(answers[2].content))
    assert json.loads(answers[2].headers["x-lina-report"])["attempts"] == expected.attempts
    for answer in answers[1:]:  # FLAC is never streamed
        samples, _, told = decode(answer.content)
        assert len(samples) == len(expected.samples)
        np.testing.assert_allclose(samples, expected.samples.clip(-1, 1), atol=1e-4)
        assert told.details["seed"] == 7 and told.details["report"]["pieces"] == len(expected.pieces)
    streamed, _, told = decode(answers[0].content)
    first = round(0.2 * 24_000)
    np.testing.assert_allclose(streamed[:first], expected.samples[:first].clip(-1, 1), atol=1e-4)
    assert told.details == {"seed": 7, "voice_file": voice.digest}


@pytest.mark.parametrize("form", [name for name in MEDIA if name != "flac"])
def test_speech_is_sent_while_it_is_said_and_who_goes_away_makes_room(service, form):
    answer = service.say(LONG, stream=True, response_format=form)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(MEDIA[form])
    assert "content-length" not in answer.headers
    parts = answer.iter_content(1024)
    assert next(parts) + next(parts)
    assert service.health()["requests"] == 1, "it is all said already"
    answer.close()
    until(lambda: service.health()["requests"] == 0)


def test_when_as_much_is_said_as_can_be_others_are_told_to_come_again(service):
    held = [service.say(LONG, stream=True) for _ in range(5)]
    assert [answer.status_code for answer in held] == [200] * 5
    refused = service.say("Rain.", token="token-b", voice="bert")
    assert "try again" in error_of(refused, 429, "engine_overloaded") and int(refused.headers["retry-after"]) >= 1
    for answer in held:
        answer.close()
    assert until(lambda: (again := service.say("Rain.", token="token-b", voice="bert")).ok and again).content


def test_tenants_speak_with_their_own_voices_and_with_shared_ones(service):
    def listed(token: str) -> dict[str, bool]:
        return {voice["id"]: voice["shared"] for voice in service.ask("GET", "/v1/voices", token).json()["data"]}

    shared = {"default": True, "sam": True, "LJ Speech": True}
    assert listed("token-a") == {"ann": False, **shared} and listed("token-b") == {"bert": False, **shared}
    for voice in ("sam", "LJ Speech", "default"):
        assert service.say("Rain.", voice=voice).ok
    for token in (None, "", "token-c", "Bearer token-a"):
        answer = service.ask("GET", "/v1/voices", token)
        error_of(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    error_of(service.say("Rain.", token="token-b", voice="ann"), 404, "voice_not_found", "voice")
    error_of(service.ask("GET", "/v1/voices/ann", "token-b"), 404, "voice_not_found", "voice")
    error_of(service.ask("DELETE", "/v1/voices/ann", "token-b"), 404, "voice_not_found", "voice")
    error_of(service.ask("DELETE", "/v1/voices/sam"), 403, "shared_voice", "id")
    assert service.ask("GET", "/v1/voices/LJ%20Speech").json()["consent"]["who"] == "Ann Example"
    page = service.ask("GET", "/v1/voices?limit=1&after=LJ Speech").json()
    assert [voice["id"] for voice in page["data"]] == ["ann"] and page["has_more"]
    assert (service.folder / "voices/a/ann.safetensors").exists()


HOSTILE = ("../b/bert", "../../etc/passwd", "a/../../b/bert", "/etc/passwd", "%2e%2e%2fb%2fbert", "..\\b\\bert")
HOSTILE += ("b/bert", "bert\0", "bert\n", "$(touch /tmp/x)", "file:///etc/passwd", "s3://lina/x", "a" * 5000, "")
HOSTILE += (".enrolling", "é")


@pytest.mark.parametrize("id", HOSTILE)
def test_no_name_of_a_voice_leads_anywhere(service, id):
    error_of(service.say("Rain.", voice=id), 404, "voice_not_found", "voice")
    path = "/v1/voices/" + "".join(f"%{byte:02X}" for byte in id.encode())
    if id:
        for method in ("GET", "DELETE"):
            error_of(service.ask(method, path), 404, "voice_not_found", "voice")
    refused = service.ask("POST", "/v1/voices", **form(id, [recording(3)]))
    error_of(refused, 400, "invalid_value", "id")
    assert sorted(file.name for file in service.folder.iterdir()) == ["codec", "model", "tokens.yaml", "voices"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "tts-1"}, 404, "model_not_found", "model"),
        ({"input": ""}, 400, "empty_text", "input"),
        ({"input": "🎉"}, 400, "not_speakable", "input"),
        ({"input": "x" * 5000}, 400, "string_above_max_length", "input"),
        ({"input": 3}, 400, "invalid_value", "input"),
        ({"input": None}, 400, "invalid_value", "input"),
        ({"response_format": "aac"}, 400, "unsupported_value", "response_format"),
        ({"speed": 1.5}, 400, "unsupported_value", "speed"),
        ({"instructions": "whisper"}, 400, "unsupported_value", "instructions"),
        ({"stream_format": "sse"}, 400, "unsupported_value", "stream_format"),
        ({"seed": 2**80}, 400, "invalid_value", "seed"),
        ({"voice": 3}, 400, "invalid_value", "voice"),
        ({"voice": {"id": 3}}, 400, "invalid_value", "voice"),
        ({"voice": {"name": "ann"}}, 400, "invalid_value", "voice"),
        ({"temperature": 3}, 400, "unknown_parameter", "temperature"),
    ],
)
def test_what_cannot_be_said_is_refused_with_its_reason(service, fields, status, code, param):
    assert len(error_of(service.say(**fields), status, code, param)) > 10


def test_every_other_mistake_has_the_same_shape(service):
    post = "/v1/audio/speech"
    assert "openapi.json" in error_of(service.ask("GET", "/v1/nothing"), 404, "not_found")
    error_of(service.ask("GET", post), 405, "method_not_allowed")
    error_of(service.ask("GET", "/v1/models/gpt"), 404, "model_not_found", "model")
    error_of(service.ask("POST", post, data=b"{", headers={"Content-Type": "application/json"}), 400, "invalid_value")
    error_of(service.ask("POST", post, json={"model": "lina"}), 400, "missing_parameter", "input")
    error_of(service.ask("POST", post, json={"input": "x" * 300_000}), 413, "too_large")
    error_of(service.ask("GET", "/v1/voices?limit=0"), 400, "invalid_value", "limit")
    answers = [service.say("Rain.", token="token-slow", voice="default") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    error_of(answers[2], 429, "rate_limit_exceeded")
    assert int(answers[2].headers["retry-after"]) > 1
    schema = service.ask("GET", "/openapi.json", None).json()
    assert {"/v1/audio/speech", "/v1/models", "/v1/voices", "/healthz"} <= set(schema["paths"])


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"samples": []}, "missing_parameter", "samples"),
        ({"samples": [b"no audio at all"]}, "invalid_audio", "samples.0"),
        ({"samples": [recording(3), recording(0.1)]}, "invalid_audio", "samples.1"),
        ({"samples": [recording(0.9)]}, "invalid_audio", "samples"),
        ({"samples": [recording(21)]}, "invalid_audio", "samples.0"),
        ({"samples": [recording(6)] * 2}, "invalid_audio", "samples"),
        ({"texts": []}, "invalid_value", "transcripts"),
        ({"texts": [" "]}, "invalid_value", "transcripts.0"),
        ({"consent_who": " "}, "no_consent", "consent"),
        ({"consent": "[1]"}, "no_consent", "consent"),
        ({"consent": "{"}, "invalid_value", "consent"),
        ({"consent_scope": "x" * 3000}, "string_above_max_length", "consent"),
        ({"seed": "one"}, "invalid_value", "seed"),
        ({"voice_file": "x"}, "unknown_parameter", "voice_file"),
        ({"samples": [recording(3)] * 6}, "bad_request", None),
    ],
)
def test_enrollments_that_cannot_be_are_refused_before_any_work(service, change, code, param):
    error_of(service.ask("POST", "/v1/voices", **form("new", **{"samples": [recording(3)]} | change)), 400, code, param)
    error_of(service.ask("GET", "/v1/voices/new"), 404, "voice_not_found", "voice")


def test_an_upload_is_cut_off_where_it_is_too_large(service):
    error_of(service.ask("POST", "/v1/voices", **form("big", [bytes(1_600_000)])), 413, "too_large")
    # Nobody says how much will come: it is counted as it comes.
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/voices")
    for name, value in (
        ("Authorization", "Bearer token-a"),
        ("Transfer-Encoding", "chunked"),
        ("Content-Type", "multipart/form-data; boundary=xx"),
    ):
        connection.putheader(name, value)
    connection.endheaders()
    head = b'--xx\r\nContent-Disposition: form-data; name="samples"; filename="a"\r\n\r\n'
    sent = 0
    try:
        for part in (head, *[bytes(1 << 16)] * 1600):
            connection.send(b"%x\r\n%s\r\n" % (len(part), part))
            sent += len(part)
    except OSError:
        assert sent < 20_000_000, "much more was taken than what fits, and what the sockets hold"
        return
    raise AssertionError("100 MB were taken")


def test_recordings_become_a_voice_that_speaks_until_it_is_deleted(service):
    samples = [recording(3, seed) for seed in range(2)]
    answer = service.ask("POST", "/v1/voices", **form("carol", samples, seed="5"))
    assert answer.status_code == 202 and answer.headers["location"] == "/v1/voices/carol"
    assert answer.json()["status"] == "reading"
    seen = set()

    def done() -> dict[str, Any]:
        voice = service.ask("GET", "/v1/voices/carol").json()
        seen.add(voice["status"])
        if voice["status"] in ("reading", "tuning"):
            told = voice["progress"]
            assert told is None or voice["status"] == "tuning"
            if told and told["state"] != "waiting":
                assert 0 <= told["steps"] <= told["of"] == 4 and told["place"] is None
            refused = service.ask("POST", "/v1/voices", **form("dave", samples))
            assert refused.status_code in (202, 429), refused.text
            if refused.status_code == 429:
                error_of(refused, 429, "too_many_enrollments")
        return voice if voice["status"] in ("ready", "failed") else None

    voice = until(done)
    assert voice["status"] == "ready", voice
    assert seen & {"reading", "tuning"} and voice["consent"]["who"] == "Ann Example"
    made = load(service.folder / "voices/a/carol.safetensors")
    assert made.speaker == "carol" and made.training["steps"] <= 4
    assert decode(service.say("Rain.", voice="carol").content)[2].voice == "carol"
    error_of(service.ask("POST", "/v1/voices", **form("carol", samples)), 409, "voice_exists", "id")
    error_of(service.say("Rain.", token="token-b", voice="carol"), 404, "voice_not_found", "voice")
    assert service.ask("DELETE", "/v1/voices/carol").json()["deleted"]
    error_of(service.say("Rain.", voice="carol"), 404, "voice_not_found", "voice")
    error_of(service.ask("DELETE", "/v1/voices/carol"), 404, "voice_not_found", "voice")
    service.ask("DELETE", "/v1/voices/dave")


def test_recordings_without_speech_fail_with_their_reasons_and_can_be_forgotten(service):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(48_000, np.float32), 16_000, format="WAV")
    until(lambda: service.ask("POST", "/v1/voices", **form("mute", [file.getvalue()])).status_code == 202)
    voice = until(lambda: (v := service.ask("GET", "/v1/voices/mute").json())["status"] == "failed" and v)
    assert voice["error"]["code"] == "too_little_speech" and voice["rejected_samples"][0]["reason"] == "silent"
    assert "/tmp" not in json.dumps(voice)
    listed = service.ask("GET", "/v1/voices").json()["data"]
    assert [v["status"] for v in listed if v["id"] == "mute"] == ["failed"]
    assert service.ask("DELETE", "/v1/voices/mute").ok
    error_of(service.ask("GET", "/v1/voices/mute"), 404, "voice_not_found", "voice")


def test_in_a_browser_a_text_is_heard_and_seen_and_a_voice_is_made(service, chromium, tmp_path):
    from playwright.sync_api import expect

    page = chromium.new_page()
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(service.url)
    page.fill("#token", "token-a")
    page.click("#token-form button")
    expect(page.locator("#voice")).to_contain_text("ann")
    page.select_option("#voice", "ann")
    empty = page.evaluate("() => document.getElementById('spectrogram').toDataURL()")
    page.click("#say")
    expect(page.locator("#player")).to_be_visible()
    expect(page.locator("#said")).to_contain_text("s said")
    assert page.evaluate("() => document.getElementById('spectrogram').toDataURL()") != empty
    with page.expect_download() as saved:
        page.click("#file")
    samples, rate, told = decode(saved.value.path().read_bytes())
    assert rate == 24_000 and len(samples) > 2400 and told.voice == "ann" and told.synthetic
    expect(page.locator("#stop")).to_be_disabled()  # it is over
    page.check("input[value=whole]")
    page.click("#say")
    expect(page.locator("#report")).to_contain_text("attempt")
    for number in range(2):
        (tmp_path / f"{number}.flac").write_bytes(recording(3, number))
    (tmp_path / "0.txt").write_text("the small boat sailed past a quiet island\n")
    page.set_input_files("#samples", [tmp_path / "0.flac", tmp_path / "1.flac", tmp_path / "0.txt"])
    expect(page.locator("#list input").first).to_have_value("the small boat sailed past a quiet island")
    page.locator("#list input").nth(1).fill("while seven birds sang about the rain")
    for name, value in (("name", "erin"), ("who", "Erin Example"), ("scope", "tests")):
        page.fill(f"#{name}", value)
    page.click("#enroll button.main")
    assert not page.evaluate("() => document.getElementById('enroll').checkValidity()"), "consent is not ticked"
    page.check("#consent")
    page.click("#enroll button.main")
    expect(page.locator("#enrolled")).to_contain_text("is there")
    assert page.input_value("#voice") == "erin"
    page.click("[aria-label='Delete voice erin']")
    expect(page.locator("#voices")).not_to_contain_text("erin")
    assert errors == []


def test_when_an_engine_is_killed_no_request_is_lost_without_an_error(service):
    """Who heard something is told; who did not is served by the next engine."""
    before, ended = service.health()["process"], queue.Queue()

    def ask(number: int) -> None:
        try:
            ended.put(service.say(LONG[:100], seed=number))
        except requests.RequestException as error:
            ended.put(error)

    listening = service.say(LONG, stream=True)
    parts = listening.iter_content(1024)
    assert next(parts)
    clients = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for client in clients:
        client.start()
    until(lambda: ended.qsize() or service.health()["requests"] > 1)
    os.kill(before, signal.SIGKILL)
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        for _ in parts:
            pass
    for client in clients:
        client.join()
    for answer in (ended.get_nowait() for _ in clients):
        if isinstance(answer, requests.RequestException):
            continue
        if answer.ok:  # then it is whole
            assert len(decode(answer.content)[0]) > 2400
        else:
            assert answer.status_code >= 429 and answer.json()["error"]["message"]
    assert ended.empty()
    assert until(lambda: service.health().get("process", before) != before)
    assert service.say("Rain.").ok
