"""Voices in a folder, on a disk and in a bucket: what is up to date, what is whose, what a file may not do."""

import dataclasses

import pytest
import torch

from infra import storage
from model.checkpoint import load
from model.initial_state import Recipe, drawn
from model.tuned import Tuned
from model.voice_file import VoiceError, pack, unpack
from pipeline.enrolled import recipe_record, voice_bytes
from pipeline.enrollment_files import VoiceFolder
from pipeline.plan import PlanError
from pipeline.speakers import Speaker
from pipeline.utterances import Reject, Unusable, Utterance
from pipeline.voice_files import NoSuchVoice, found, named
from tests.pipeline.speaking_model import write_speaker
from tests.pipeline.speech_samples import CONSENT

RECIPE = Recipe(steps=5)


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return load(write_speaker(tmp_path_factory.mktemp("model"))[0])[1]


@pytest.fixture(params=["disk", "bucket"])
def folder(request, card, tmp_path):
    root = (
        str(tmp_path / "voices") if request.param == "disk" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    )
    recipe = {f"recipe.{name}": value for name, value in recipe_record(RECIPE).items()}
    return VoiceFolder(root, "shared", {"model": card.fingerprint, "codec": "c", **recipe, "max_seconds": 60.0})


def speaker(name: str = "Zoë/2", told: str = "[]", audio: tuple[str, ...] = (), **changes) -> Speaker:
    from pipeline.speakers import file_key

    samples = tuple(Utterance(url, url, "rain", name) for url in audio)
    return Speaker(name, file_key(name), samples, CONSENT | changes, "speakers.jsonl:1", told)


def voice(folder: VoiceFolder, card, who: Speaker, recipe: Recipe = RECIPE, points: int = 2, **changes) -> bytes:
    curve = tuple((step, 4.0) for step in range(points))
    settings = {"reason": "steps", "steps": 5, "best_step": 5, "samples": 2, "held_out": 1, "seconds": 1.5, "seed": 7}
    losses = {"base_loss": 4.0, "continuation_loss": 3.5, "tuned_loss": 3.25, "curve": curve, "train_losses": ()}
    tuned = Tuned(speaker=who.name, factors=drawn(card.sizes, recipe, 7), **settings | losses | changes)
    return voice_bytes(tuned, recipe, card.fingerprint, who.consent, folder.source(who), 12.5)


def test_a_voice_is_done_when_it_is_there_and_of_these_samples(folder, card):
    who, row = speaker(), {"speaker": "Zoë/2", "steps": 5}
    assert folder.known(who) is None
    reject = Reject("Zoë/2", "decode", "silent", "quiet", "here")
    note = folder.write(who, voice(folder, card, who), row, [reject])
    assert note == {"row": row, "rejects": [reject._asdict()]} == folder.known(who)
    assert folder.known(speaker(told="[1]")) is None and folder.known(speaker(scope="other")) is None
    other = dataclasses.replace(folder, settings=folder.settings | {"max_seconds": 30.0})
    assert other.known(who) is None
    storage.remove(storage.join(folder.output, ".enrollment"))
    row = folder.known(who)["row"]
    assert (row["speaker"], row["seconds"], row["samples"], row["tuned_loss"]) == ("Zoë/2", 12.5, 3, 3.25)
    storage.write_bytes(folder.voice_url(who.key), b"half a voi")
    assert folder.known(who) is None


def test_a_voice_is_of_the_recordings_as_they_were(folder, card):
    url = storage.join(folder.output, "recorded/1.wav")
    storage.write_bytes(url, b"a recording")
    who = speaker(audio=(url,))
    folder.write(who, voice(folder, card, who), {}, [], folder.recordings(who))
    assert folder.known(who) is not None
    storage.write_bytes(url, b"another recording")
    assert folder.known(who) is None
    before = storage.read_bytes(folder.voice_url(who.key))
    folder.write(who, voice(folder, card, who, tuned_loss=3.0), {}, [], folder.recordings(who))
    assert folder.known(who) is not None
    storage.write_bytes(folder.voice_url(who.key), before)  # killed after the note, before the voice
    assert folder.known(who) is None
    # Of a voice whose note says nothing of them, the samples as they were given decide.
    note = storage.join(folder.output, ".enrollment/shared", f"{who.key}.json")
    storage.write_text(note, '{"row": {}, "rejects": []}')
    assert folder.known(who) == {"row": {}, "rejects": []}


def test_voices_of_another_recipe_are_not_replaced(folder, card):
    who = speaker("ann")
    folder.write(who, voice(folder, card, who, Recipe(steps=6)), {}, [])
    with pytest.raises(Unusable, match=r"other-voice.*recipe\.steps: 6 → 5"):
        folder.known(who)
    foreign = dataclasses.replace(unpack(voice(folder, card, who)), training={"recipe": "a text"})
    storage.write_bytes(folder.voice_url(who.key), pack(foreign))
    with pytest.raises(Unusable, match=r"other-voice.*recipe\.batch: None → 8"):
        folder.known(who)
    folder.check()
    folder.bind()
    folder.check()
    with pytest.raises(PlanError, match="codec: 'c' → 'd'"):
        dataclasses.replace(folder, settings=folder.settings | {"codec": "d"}).check()


def test_voices_are_found_by_name(folder, card):
    with pytest.raises(NoSuchVoice, match="no folder of voices"):
        list(found(folder.output))
    for tenant, name in (("shared", "Zoë/2"), ("shared", "ann"), ("home", "ann")):
        who = speaker(name)
        dataclasses.replace(folder, tenant=tenant).write(who, voice(folder, card, who), {}, [])
    assert [file.name for file in found(folder.output)] == ["home/ann", "shared/Zoë/2", "shared/ann"]
    assert [file.name for file in found(folder.output, "home")] == ["home/ann"]
    assert named(folder.output, "ann").tenant == "shared" and named(folder.output, "home/ann").tenant == "home"
    assert named(folder.output, "Zoë/2").record()["speaker"] == "Zoë/2"
    for name in ("bob", "away/ann", "../shared/ann", "", "a\0b"):
        with pytest.raises(NoSuchVoice):
            named(folder.output, name)
    gone = named(folder.output, "home/ann")
    gone.delete()
    with pytest.raises(NoSuchVoice):
        gone.delete()
    assert [file.name for file in found(folder.output)] == ["shared/Zoë/2", "shared/ann"]


def test_names_of_files_that_no_voice_has_are_passed_over(folder, card):
    who = speaker("ann")
    folder.write(who, voice(folder, card, who), {}, [])
    for name in ("%FF", "%41nn", "%", ".hidden", "a.b"):
        storage.write_bytes(storage.join(folder.output, "shared", f"{name}.safetensors"), b"of something else")
    assert [file.name for file in found(folder.output)] == ["shared/ann"]


def test_a_voices_file_has_no_clock_and_stays_small(folder, card):
    who = speaker("ann")
    quick, slow = (voice(folder, card, who, seconds=seconds) for seconds in (0.5, 900.0))
    assert quick == slow
    assert len(unpack(voice(folder, card, who, points=5001)).training["curve"]) <= 50
    with pytest.raises(Unusable, match="diverged"):
        voice(folder, card, who, reason="diverged", best_step=0)
    with pytest.raises(Unusable, match="bad-record"):
        voice(folder, card, speaker("ann", scope="x" * 7000))
    spoilt = {name: values * torch.nan for name, values in drawn(card.sizes, RECIPE, 7).items()}
    tuned = Tuned("ann", spoilt, "steps", 5, 5, 2, 0, None, None, None, (), (), 1.0, 7)
    with pytest.raises(Unusable, match="not finite"):
        voice_bytes(tuned, RECIPE, card.fingerprint, CONSENT, None, 1.0)
    with pytest.raises(VoiceError, match="belongs to model"):
        unpack(quick, card.sizes, "0" * 64)
