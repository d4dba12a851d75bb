"""Enrolling as a user types it: many speakers while workers are killed, again for what is missing, and its report."""

import asyncio
import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import soundfile

from infra import storage
from infra.tracking import known_run
from jobs.enroll import enroll
from model.checkpoint import read_card
from model.voice_file import unpack
from pipeline import enrollment
from pipeline.enroll_config import EnrollConfig
from pipeline.plan import PlanError
from pipeline.speakers import Speaker
from pipeline.utterances import Reject
from tests.pipeline.speaking_model import write_speaker
from tests.pipeline.speech_samples import CONSENT, request_of, write_speakers

SPEAKERS = 50
QUICK = {"steps": 3, "eval_every": 2, "batch": 2, "device": "cpu", "tracking": "none", "max_replicas": 1, "slots": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("enroll")
    write_speaker(folder)
    write_speakers(folder, SPEAKERS, samples=2)
    return folder


def config(folder: Path, output: Path, **changes) -> EnrollConfig:
    values = {"speakers": str(folder / "speakers.jsonl"), "model": str(folder / "model"), "output": str(output)}
    return EnrollConfig(**values | {"codec": str(folder / "codec")} | QUICK | changes)


def voices(output: Path) -> dict[str, str]:
    files = (output / "shared").glob("*.safetensors")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def service(local_ray, corpus):
    """The stage as a service that jobs find."""
    from ray import serve

    from pipeline.enrollment_stage import NAME, build

    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    yield serve.run(build(config(corpus, corpus / "any").stage(owner="")), name=NAME, route_prefix=None)
    serve.shutdown()


@pytest.fixture(scope="module")
def undisturbed(service, corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("quiet") / "voices"
    assert enroll(config(corpus, output)) == 0
    return output


class Shaky:
    """A folder of voices on a storage that fails, so many times for a speaker and what is asked of its files."""

    def __init__(self) -> None:
        self.faults: Counter[tuple[str, str]] = Counter()
        self.notes: dict[str, dict] = {}

    def _ask(self, speaker: Speaker, what: str) -> None:
        if self.faults[speaker.name, what]:
            self.faults[speaker.name, what] -= 1
            raise OSError("slow down")

    def known(self, speaker: Speaker) -> dict | None:
        self._ask(speaker, "known")
        note = self.notes.get(speaker.name)
        return note if note and note["recordings"] == self.recordings(speaker) else None

    def recordings(self, speaker: Speaker) -> str:
        self._ask(speaker, "recordings")
        return f"recordings of {speaker.name}"

    def source(self, speaker: Speaker) -> str:
        return ""

    def write(self, speaker: Speaker, voice: bytes, row: dict, rejects: list[Reject], recordings: str) -> dict:
        self._ask(speaker, "write")
        self.notes[speaker.name] = {"row": row, "recordings": recordings}
        return self.notes[speaker.name]


class Pass(enrollment._Run):
    """A pass over some speakers without workers and without a stage."""

    def __init__(self, folder: Shaky, names: str, unread: str = "") -> None:
        self.told: dict[str, str] = {}
        people = [Speaker(name, name, (), CONSENT, "") for name in names.split()]
        batch = SimpleNamespace(folder=folder, speakers=lambda: iter(people), config=None, codec=None)
        super().__init__(batch, None, None, self._tell)
        self.unread = unread

    def _tell(self, result: dict | Reject, known: bool) -> None:
        rejected = isinstance(result, Reject)
        self.told[result.id if rejected else result["row"]["speaker"]] = (
            result.reason if rejected else "known" if known else "made"
        )

    async def _encoded(self, speaker: Speaker) -> tuple[list, list[Reject]]:
        unread = [Reject(speaker.name, "decode", "storage-error", "slow down")] if speaker.name == self.unread else []
        return [SimpleNamespace(to_request=dict)], unread

    async def _asked(self, request: dict) -> dict:
        return {"voice": b"", "row": {"speaker": request["speaker"]}}

    def results(self) -> dict[str, str]:
        asyncio.run(self.all(10))
        return self.told


def test_a_storage_that_fails_costs_one_speaker_and_only_this_time(monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    folder, names = Shaky(), "ann ben cyd dan eve"
    folder.faults.update({("ann", "known"): 3, ("ben", "recordings"): 3, ("cyd", "write"): 3, ("dan", "write"): 2})
    first = Pass(folder, names).results()
    assert first == dict.fromkeys(["ann", "ben", "cyd"], "storage-error") | {"dan": "made", "eve": "made"}
    assert Pass(folder, names).results() == {name: "known" if name in ("dan", "eve") else "made" for name in first}


def test_a_voice_that_lacks_what_the_storage_did_not_give_is_made_again():
    folder = Shaky()
    assert Pass(folder, "ann ben", unread="ann").results() == {"ann": "made", "ben": "made"}
    assert Pass(folder, "ann ben").results() == {"ann": "made", "ben": "known"}
    assert Pass(folder, "ann ben").results() == {"ann": "known", "ben": "known"}


@pytest.mark.parametrize("gone", ["NodeDiedError", "OutOfMemoryError", "ActorUnavailableError"])
def test_whoever_reads_samples_is_replaced_whatever_killed_it(monkeypatch, gone):
    from ray import exceptions

    killed = getattr(exceptions, gone)("killed", *([None] if gone == "ActorUnavailableError" else []))
    answers, made = iter([killed, ("samples", "rejects")]), []

    class Encoder:
        def __init__(self) -> None:
            self.encode = self

        async def remote(self, samples: list) -> tuple[str, str]:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(enrollment, "_tokenizers", lambda config: 1)
    monkeypatch.setattr(enrollment, "_encoder", lambda batch, shipped: made.append(Encoder()) or made[-1])
    one = Pass(Shaky(), "")
    speaker = Speaker("ann", "ann", (), CONSENT, "")
    assert asyncio.run(enrollment._Run._encoded(one, speaker)) == ("samples", "rejects")
    assert one.encoders == made[1:] and len(made) == 2 and one._free.qsize() == 1


def kill_as_voices_come(output: Path, victims: dict[str, int], killed: list[str]) -> None:
    """Kills a process of each kind, by what its title has, once there are so many voices."""
    for title, count in victims.items():
        while len(voices(output)) < count:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            try:
                if title in (process.cmdline() or [""])[0]:
                    process.kill()
                    killed.append(title)
            except psutil.Error:
                continue


def test_kills_change_no_byte_of_any_voice(undisturbed, corpus, tmp_path):
    """A tuner, the worker that reads samples, and the desk with all that it knows."""
    output, killed = tmp_path / "voices", []
    victims = {"VoiceTuner": 4, "SampleEncoder": 12, "EnrollmentStage": 22}
    killer = threading.Thread(target=kill_as_voices_come, args=(output, victims, killed))
    killer.start()
    assert enroll(config(corpus, output)) == 0
    killer.join()
    assert killed == list(victims)
    assert voices(output) == voices(undisturbed) and len(voices(output)) == SPEAKERS
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["enrolled"], summary["known"], summary["rejected"]) == (SPEAKERS, 0, 0)


def test_the_same_command_does_what_is_missing(undisturbed, corpus, tmp_path, capsys):
    output = tmp_path / "voices"
    subprocess.run(["cp", "-r", str(undisturbed), str(output)], check=True)
    times = {file: file.stat().st_mtime_ns for file in (output / "shared").iterdir()}
    assert enroll(config(corpus, output)) == 0
    assert "nothing was missing" in capsys.readouterr().out
    # One voice is gone, one is damaged, of one the samples are others, one has consented to something else, of one a
    # recording was written anew.
    rows = [json.loads(line) for line in (corpus / "speakers.jsonl").read_text().splitlines()]
    rows[2]["samples"].pop()
    rows[3]["consent"]["scope"] = "audiobooks"
    for row in rows:
        for sample in row["samples"]:
            sample["audio"] = str(corpus / sample["audio"])
    gone, damaged, fewer, other, again = (output / "shared" / f"spk-00{n}.safetensors" for n in range(5))
    recording = corpus / "004-0.wav"
    written = recording.stat().st_mtime_ns
    os.utime(recording, ns=(written + 10**9, written + 10**9))
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:100])
    changed = corpus / "changed.jsonl"
    originals = (corpus / "speakers.jsonl").read_text().splitlines()
    lines = [json.dumps(rows[n]) if n in (2, 3) else originals[n] for n in range(SPEAKERS)]
    changed.write_text("\n".join(lines) + "\n")
    assert enroll(config(corpus, output, speakers=str(changed))) == 0
    os.utime(recording, ns=(written, written))
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["enrolled"], summary["known"]) == (5, SPEAKERS - 5)
    assert {f for f in times if f.stat().st_mtime_ns != times[f]} == {gone, damaged, fewer, other, again}
    before, after = voices(undisturbed), voices(output)
    assert {name for name in before if before[name] != after[name]} == {fewer.name, other.name}
    assert unpack(other.read_bytes()).consent["scope"] == "audiobooks"
    with pytest.raises(PlanError, match=r"recipe\.steps: 3 → 5"):
        enroll(config(corpus, output, steps=5))
    write_speaker(tmp_path / "newer", seed=1)
    with pytest.raises(PlanError, match="model: "):
        enroll(config(corpus, output, model=str(tmp_path / "newer/model"), codec=str(tmp_path / "newer/codec")))


def test_a_service_that_tunes_otherwise_is_not_used(service, corpus, tmp_path):
    with pytest.raises(PlanError, match=r"tunes otherwise(.|\n)*recipe\.steps: 3 → 5"):
        enroll(config(corpus, tmp_path / "voices", steps=5))
    assert not (tmp_path / "voices/.enrollment").exists()  # the folder is still for anything


def test_the_stage_answers_whoever_asks(service):
    """As the speech service asks it: by a handle, with an id of its own."""
    asked = request_of(1, id="mine")
    for sample in asked["samples"]:
        sample["text"] = "Birds sang." if sample.pop("phones") else ""
    first = service.enroll.remote(asked).result()
    again = service.enroll.remote(request_of(1, samples=asked["samples"])).result()
    assert first["voice"] == again["voice"] and unpack(first["voice"]).speaker == "s1"
    assert first["row"]["steps"] == 3 and first["row"]["bytes"] == len(first["voice"])
    told = service.progress.remote("mine").result()
    assert (told["state"], told["speaker"], told["steps"], told["of"]) == ("done", "s1", 3, 3)
    assert service.progress.remote("nobody's").result() is None and not service.cancel.remote("nobody's").result()
    bad = request_of(2)
    bad["samples"][0]["codes"] = bad["samples"][0]["codes"] + 90
    lacking = {"samples": [{"codes": bad["samples"][1]["codes"], "phones": "XX"}]}
    for request, reason in (
        (bad, "bad-samples"),
        (request_of(2, **lacking), "bad-samples"),
        (request_of(2, samples=[{"codes": [[1]]}]), "no-text"),
        (request_of(2, samples=[]), "no-samples"),
        (request_of(2, consent=None), "no-consent"),
        (request_of(2) | {"speaker": ""}, "no-speaker"),
        (request_of(2, timeout_s=1e-6), "timeout"),
    ):
        assert service.enroll.remote(request).result()["error"]["reason"] == reason
    hours = [sample for _ in range(300) for sample in request_of(3)["samples"]]
    slow = [service.enroll.remote(request_of(number, samples=hours)) for number in range(10, 22)]
    while (service.progress.remote("r21").result() or {}).get("place") is None:
        time.sleep(0.02)
    assert service.cancel.remote("r21").result() and slow[-1].result()["error"]["reason"] == "cancelled"
    for number in range(10, 21):
        service.cancel.remote(f"r{number}").result()
    assert {next(iter(answer.result())) for answer in slow} <= {"error", "voice"}


def test_each_speaker_is_handled_for_itself(service, corpus, tmp_path, tracking_uri, capsys):
    rows = [json.loads(line) for line in (corpus / "speakers.jsonl").read_text().splitlines()[:6]]
    wave, rate = soundfile.read(corpus / "000-0.wav")
    for row in rows:
        for sample in row["samples"]:
            sample["audio"] = str(corpus / sample["audio"])
    spoilt = wave.copy()
    spoilt[100] = float("nan")
    soundfile.write(tmp_path / "nan.wav", spoilt, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", wave[: int(0.3 * rate)], rate)
    soundfile.write(tmp_path / "silent.wav", 0 * wave, rate)
    rows[0]["samples"].append({"audio": "nan.wav", "text": "rain"})
    rows[1]["samples"] = [{"audio": "short.wav", "text": "rain"}]
    rows[2]["samples"] = [{"audio": "silent.wav", "text": "rain"}, {"audio": "none.wav", "text": "rain"}]
    rows[3]["samples"] = [{"audio": rows[3]["samples"][0]["audio"]}]
    del rows[4]["consent"]
    rows[5]["speaker"] = "Zoë <b>/ 5"
    (tmp_path / "speakers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    output = tmp_path / "voices"
    asked = config(
        tmp_path, output, model=str(corpus / "model"), codec=str(corpus / "codec"), tracking="", child_runs=True
    )
    assert enroll(asked) == 3
    assert "57.1% of the speakers were rejected" in capsys.readouterr().err
    assert sorted(voices(output)) == [
        "Zo%C3%AB%20%3Cb%3E%2F%205.safetensors",
        "spk-000.safetensors",
        "spk-001.safetensors",
    ]
    quarantine = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    reasons = {(row["speaker"], row["reason"]) for row in quarantine}
    assert reasons == {
        ("", "not-json"),
        ("spk-000", "not-finite"),
        ("spk-002", "no-usable-samples"),
        ("spk-003", "no-usable-samples"),
        ("spk-004", "no-consent"),
    }
    details = {row["speaker"]: row["detail"] for row in quarantine}
    assert "1 silent, 1 missing-file" in details["spk-002"] and "1 no-text" in details["spk-003"]
    voice = unpack((output / "shared/spk-000.safetensors").read_bytes())
    assert voice.consent == CONSENT | {"who": "Speaker 0"} and voice.training["samples"] == 1
    assert voice.model == read_card((corpus / "model/config.json").read_bytes()).fingerprint
    single = unpack((output / "shared/spk-001.safetensors").read_bytes())
    assert single.training["data_seconds"] == pytest.approx(0.3, abs=0.02) and single.training["held_out"] == 0
    table = {row["speaker"]: row for row in csv.DictReader((output / "voices.csv").open())}
    assert table["spk-000"]["rejected_samples"] == "1" and float(table["spk-000"]["tuned_loss"]) > 0
    page = (output / "report.html").read_text()
    assert "Zoë &lt;b&gt;/ 5" in page and "<b>/ 5" not in page and 'src="http' not in page
    import mlflow

    client = mlflow.MlflowClient(tracking_uri)
    run = client.get_run(known_run(str(output)))
    assert run.data.metrics["enrolled"] == 3 and run.data.tags["model"] == voice.model
    assert run.inputs.dataset_inputs and run.info.status == "FINISHED"
    below = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert {child.info.run_name for child in below} == {"spk-000", "spk-001", "Zoë <b>/ 5"}
    assert {child.data.metrics["steps"] for child in below} == {3}
    assert "report.html" in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_voices_are_heard_and_judged_in_the_report(undisturbed, corpus, tmp_path):
    """Voices of random weights say nothing that anybody understands, and the table says so."""
    pytest.importorskip("faster_whisper")
    output = tmp_path / "voices"
    subprocess.run(["cp", "-r", str(undisturbed), str(output)], check=True)
    assert enroll(config(corpus, output, listen=2, sentence="Rain fell.")) == 0
    table = {row["speaker"]: row for row in csv.DictReader((output / "voices.csv").open())}
    heard = {name: row for name, row in table.items() if row["wer"]}
    assert sorted(heard) == ["spk-000", f"spk-{SPEAKERS - 1:03d}"]
    assert all(float(row["wer"]) > 0.4 and -1 <= float(row["similarity"] or 0) < 0.9 for row in heard.values())
    page = (output / "report.html").read_text()
    assert page.count("<audio") == 2 and page.count("data:audio/ogg;base64,") == 2


def test_a_report_without_anything_to_hear_says_why(undisturbed, corpus, tmp_path, monkeypatch, capsys):
    output = tmp_path / "voices"
    subprocess.run(["cp", "-r", str(undisturbed), str(output)], check=True)

    def failing(*args) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pipeline.enrollment_listening.speak", failing)
    assert enroll(config(corpus, output, listen=1)) == 0
    assert "nothing to hear" in capsys.readouterr().err
    (note,) = json.loads((output / "summary.json").read_text())["notes"]
    assert "no space left" in note and "no space left" in (output / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "speakers is missing"),
        (["--speakers", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--speakers", "speakers.jsonl", "--tenant", "../x"], "tenant must be"),
        (["--speakers", "speakers.jsonl", "--lr", "0"], "lr must be above 0"),
        (["--speakers", "speakers.jsonl", "--model", "nowhere"], "nowhere is no model"),
        (["--speakers", "speakers.jsonl", "--codec", "demo"], "belongs to another codec"),
        (["--speakers", "speakers.jsonl", "--consent-file", "no.json"], "no.json: cannot be opened"),
        (["--speakers", "speakers.jsonl", "--max-replicas", "0"], "max_replicas"),
        (["--speakers", "speakers.jsonl", "--transcribe", "whisper-none"], "'whisper-none' cannot be loaded"),
    ],
)
def test_wrong_commands_are_refused(local_ray, monkeypatch, capsys, corpus, tmp_path, words, reason):
    from jobs import enroll as job

    monkeypatch.chdir(corpus)
    fixed = ["--codec", "codec", "--output", str(tmp_path / "voices"), "--tracking", "none"]
    model = [] if "--model" in words else ["--model", "model"]
    monkeypatch.setattr(sys, "argv", ["enroll", *fixed, *model, *words])
    try:
        code = job.main()
    except SystemExit as error:
        code = error.code
    assert code == 2 and reason in capsys.readouterr().err
    assert not (tmp_path / "voices").exists()


def test_help_does_not_wait_for_heavy_libraries(project):
    for name in ("enroll", "voices"):
        code = f"import sys; sys.argv = ['x', '--help']\ntry:\n import jobs.{name} as s; s.main()\n"
        code += "except SystemExit: print(sorted({'torch', 'ray', 'numpy', 'pyarrow', 'nltk'} & set(sys.modules)))"
        shown = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=60)
        assert shown.stdout.strip().endswith("[]"), shown.stdout[-300:] + shown.stderr


def test_voices_are_managed(undisturbed, corpus, monkeypatch, capsys, tmp_path):
    from jobs import voices as job

    folder = tmp_path / "voices"
    subprocess.run(["cp", "-r", str(undisturbed), str(folder)], check=True)
    monkeypatch.chdir(tmp_path)

    def typed(*words):
        monkeypatch.setattr(sys, "argv", ["voices", *words, "--voices", str(folder)])
        code = job.main()
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    listed = typed("list")
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) == SPEAKERS + 1
    assert "shared/spk-007" in listed.stdout and "Speaker 7, 2025-03-01" in listed.stdout
    shown = json.loads(typed("show", "spk-007").stdout)
    assert shown["training"]["recipe"]["steps"] == 3 and shown["consent"]["who"] == "Speaker 7"
    exported = typed("export", "shared/spk-007", "--out", "x.safetensors", "--model", str(corpus / "model"))
    original = folder / "shared/spk-007.safetensors"
    assert exported.returncode == 0 and (tmp_path / "x.safetensors").read_bytes() == original.read_bytes()
    write_speaker(tmp_path / "other", seed=1)
    wrong = typed("export", "spk-007", "--out", "y.safetensors", "--model", str(tmp_path / "other/model"))
    assert wrong.returncode == 1 and "belongs to model" in wrong.stderr and not (tmp_path / "y.safetensors").exists()
    assert typed("delete", "spk-007").returncode == 2 and original.exists()
    assert typed("delete", "spk-007", "--yes").returncode == 0 and not original.exists()
    assert not (folder / ".enrollment/shared/spk-007.json").exists()
    for name in ("spk-007", "../../etc/passwd", ""):
        missing = typed("show", name)
        assert missing.returncode == 2 and missing.stderr.startswith("voices: ")
    content = bytearray((folder / "shared/spk-008.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "shared/spk-008.safetensors").write_bytes(content)
    assert "damaged" in typed("show", "spk-008").stderr
    (folder / "shared/spk-009.safetensors").write_bytes(b"\xff" * 50)
    listed = typed("list", "--json")
    assert listed.returncode == 1 and len(listed.stdout.splitlines()) == SPEAKERS - 2 and "spk-009" in listed.stderr


def test_the_services_file_is_valid_by_serves_own_schema(project):
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from infra import config as configs
    from pipeline.enroll_config import StageConfig
    from pipeline.enrollment_stage import NAME

    described = yaml.safe_load((project / "infra/configs/serve.yaml").read_text())
    schema = ServeDeploySchema.parse_obj(described)
    (enrollment,) = (application for application in schema.applications if application.name == NAME)
    assert enrollment.import_path == "pipeline.enrollment_stage:app" and enrollment.route_prefix is None
    assert configs.load(StageConfig, overrides=enrollment.args).recipe().steps == 100
    with pytest.raises(configs.ConfigError, match="did you mean 'steps'"):
        configs.load(StageConfig, overrides=enrollment.args | {"stepz": 1})
