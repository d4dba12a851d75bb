"""The service as a user starts it in a terminal, and ends it with Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import psutil
import pytest

from pipeline.service.config import ServeConfig
from tests.pipeline.speaking_model import write_speaker


@pytest.mark.parametrize(
    "end",
    [
        lambda pid: os.killpg(pid, signal.SIGINT),  # what a terminal does on Ctrl-C
        lambda pid: os.kill(pid, signal.SIGTERM),
    ],
    ids=["SIGINT", "SIGTERM"],
)
def test_it_serves_until_it_is_interrupted_and_leaves_nothing(project, tmp_path, end):
    model, codec = write_speaker(tmp_path, ends=1.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", model, "--codec", codec, "--voices", "voices", "--port", str(port), "--no-enrollment"]
    command = [sys.executable, str(project / "jobs" / "serve.py"), *words]
    started = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watchdog = threading.Timer(240, started.kill)
    watchdog.start()
    try:
        told = []
        for line in started.stdout:
            told.append(line)
            if line.startswith("voices"):
                break
        assert "tokens    none: whoever asks on this machine is served, nobody else" in "".join(told)
        body = json.dumps({"model": "lina", "input": "Rain.", "response_format": "wav"}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/audio/speech", body, headers)
        assert urllib.request.urlopen(request).read()[:4] == b"RIFF"
        members = [process for process in psutil.Process(started.pid).children(recursive=True)]
        assert any("ServeReplica" in " ".join(process.cmdline()) for process in members)
        end(started.pid)
        rest = started.stdout.read()
        assert started.wait() == 0 and "stopping" in rest, rest[-2000:]
        _, alive = psutil.wait_procs(members, timeout=30)
        assert not alive
    finally:
        watchdog.cancel()
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_stopped_while_it_starts(monkeypatch, capsys, number):
    from pipeline.service import running

    @contextlib.contextmanager
    def connected():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as ray.init does
        yield

    @contextlib.contextmanager
    def waiting(_):
        signal.raise_signal(number)
        pytest.fail("it goes on starting")
        yield

    monkeypatch.setattr(running, "_check", lambda _: None)
    monkeypatch.setattr(running.cluster, "connect", connected)
    monkeypatch.setattr(running, "_serving", waiting)
    handlers = {known: signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train may have left its own in this process
    try:
        assert running.run(ServeConfig()) == 0
    finally:
        for known, handler in handlers.items():
            signal.signal(known, handler)
    assert "stopped before it had started" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--host", "0.0.0.0"], "needs --tokens FILE"),
        (["--port", "0"], "port must be from 1 to 65535"),
        (["--tenant", "../up"], "tenant must be letters"),
        (["--model", "nowhere"], "nowhere is no model"),
        (["--tokens", "nowhere.yaml"], "tokens file nowhere.yaml cannot be read"),
    ],
)
def test_wrong_commands_are_refused_before_anything_is_started(monkeypatch, capsys, tmp_path, words, reason):
    from jobs import serve

    if "--model" not in words:
        words = ["--model", write_speaker(tmp_path)[0], *words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve", *words])
    try:
        code = serve.main()
    except SystemExit as error:
        code = error.code
    assert code == 2 and reason in capsys.readouterr().err
