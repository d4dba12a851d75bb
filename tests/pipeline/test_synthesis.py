"""From text to speech: pieces, joins, failures and retries, files that say where they come from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from model.codec_config import CodecError
from model.lina_config import ModelError
from model.sampling import Policy
from model.voice_file import VoiceError
from pipeline import codec_weights, phonemes
from pipeline.scripts import Chunk, ScriptLine
from pipeline.sentences import pieces
from pipeline.speaking_prompts import read_prompt
from pipeline.speaking_voices import read_voice, stored_voice
from pipeline.speech_faults import Limits, examine
from pipeline.speech_files import FORMATS, LONGEST_COMMENT, Provenance, SpeechFileError, decode, encode, ending
from pipeline.speech_joining import faded, join
from pipeline.speech_lines import Line, Voice, derived
from pipeline.speech_stage import FOLDER, Speak, Work
from pipeline.streaming import stream
from pipeline.synthesis import ModelFiles, Synthesizer, read_model
from pipeline.synthesize_config import SynthesizeConfig
from pipeline.utterances import Unusable
from tests.corpora import voiced
from tests.pipeline.speaking_model import write_speaker, write_voice

ANYTHING = Limits(phones_a_second=1e6, repeated_seconds=1e6, still_tokens=0, attended=0, seconds_a_token=0.05)
"""Nothing that ends by itself is a failure."""
LONG = "The boat sailed past. Was it green? Seven birds sang about rain, and old stone walls; nobody heard them!"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return write_speaker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def parts(folders):
    return read_model(folders[0]), codec_weights.resolve(folders[1])


def synthesizer(parts, limits: Limits = ANYTHING, **changes) -> Synthesizer:
    return Synthesizer(*parts, dtype="float64", policy=Policy(temperature=(1.0,), top_k=(0,)), limits=limits, **changes)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "Mr. Smith paid $3.50 for it. Dr. J. R. Brown never paid.",
            ["Mr. Smith paid $3.50 for it.", "Dr. J. R. Brown never paid."],
        ),
        ('She asked: "Is this the right way home?" He did not know the answer, e.g. the street.', 2),
        ("Read No. 5 and vol. 7 of it today. He said no. Then all of them went home again.", 2),
        ("One sentence\nover two lines stays one. And this is the next of them.", 2),
        ("It was an old house, and nobody had lived there for years … Then came the rain again.", 2),
        ("lower case only, as in transcripts. no capital tells where a sentence starts", 1),
        ("Yes. No. Maybe so, who can tell before the end of the day?", 1),
        ("🎉 !!! …", []),
        ("", []),
    ],
)
def test_texts_are_cut_at_sentences(text: str, wanted) -> None:
    found = [piece.text for piece in pieces(text)]
    assert found == wanted if isinstance(wanted, list) else len(found) == wanted


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab Zé,.;:!?-—\"'(5\n"), max_size=600), st.integers(10, 200))
def test_cutting_loses_no_word_and_keeps_to_the_limit(text: str, most: int) -> None:
    found = pieces(text, most=most)
    said = "".join(c for piece in found for c in piece.text if c.isalnum())
    assert said == "".join(c for c in text if c.isalnum())
    assert all(len(piece.text) <= most for piece in found)
    assert all(piece.pause > 0 for piece in found[:-1])
    assert not found or found[-1].pause == 0


def test_long_sentences_are_cut_where_they_pause() -> None:
    clause = "it was the season of light that came before the season of darkness and rain"
    found = pieces(f"{clause}, {clause}; {clause}, {clause}.")
    assert [piece.text[-1] for piece in found] == [";", "."]
    longer = pieces(f"First one.\n\n{clause}. " + f"{clause}, " * 5)
    assert longer[0].pause > pieces("A sentence of some words. And another sentence after it.")[0].pause
    assert all(piece.text.endswith((",", ".")) for piece in longer)


def test_pieces_are_joined_without_clicks_and_with_their_pauses() -> None:
    rate = 24_000
    time = np.arange(rate) / rate
    tone = (0.4 * np.cos(2 * np.pi * 200 * time)).astype(np.float32)
    padded = np.concatenate([np.zeros(6000, np.float32), faded(tone, rate), np.zeros(9000, np.float32)])
    whole = join([padded, tone, np.zeros(0, np.float32), tone], [0.4, 0.2, 0.3, 9.0], rate)
    slope = 2 * np.pi * 200 * 0.4 / rate
    assert np.abs(np.diff(whole, prepend=0, append=0)).max() < 1.1 * slope
    silent = np.abs(whole) < 1e-4
    edges = np.flatnonzero(np.diff(np.concatenate([[0], silent.astype(int), [0]])))
    lengths = [(b - a) / rate for a, b in edges.reshape(-1, 2) if b - a > 500]
    assert lengths == pytest.approx([0.25, 0.4, 0.5], abs=0.03)
    assert join([], [], rate).shape == (0,)


def attention(places: np.ndarray, count: int) -> np.ndarray:
    return (np.abs(places[:, None] - np.arange(count)) < 0.5).astype(np.float32)


def test_faults_are_told_apart() -> None:
    random = np.random.default_rng(0)
    sounds = np.ones(40, bool)
    sounds[[0, 12, 39]] = False
    codes = random.integers(0, 1024, (4, 300))
    steady = attention(np.linspace(0, 39, 303).round(), 40)

    def faults(codes=codes, finished=True, where=steady) -> tuple[str, ...]:
        return examine(codes, finished, where, sounds, 75.0, Limits()).faults

    assert faults() == ()
    assert faults(finished=False) == ("no-end",)
    assert faults(codes=codes[:, :60]) == ("too-short",)
    looped = codes.copy()
    looped[:, 100:250] = np.tile(codes[:, 100:130], 5)
    assert faults(looped) == ("repetition",)
    short_loop = codes.copy()
    short_loop[:, 100:190] = np.tile(codes[:, 100:130], 3)
    assert faults(short_loop) == ()
    stuck = np.concatenate([np.linspace(0, 20, 80), np.full(190, 20.2), np.linspace(20, 39, 33)]).round()
    assert faults(where=attention(stuck, 40)) == ("standing-still",)
    drifting = np.concatenate([np.linspace(0, 20, 80), np.linspace(20, 17, 170), np.linspace(20, 39, 53)]).round()
    assert faults(where=attention(drifting, 40)) == ("standing-still",)
    pausing = np.concatenate([np.linspace(0, 20, 150), np.full(80, 20.2), np.linspace(20, 39, 73)]).round()
    assert faults(where=attention(pausing, 40)) == ()
    drawn_out = attention(np.array([0, 1, 2, 3]).repeat(70), 4), np.array([False, True, True, False])
    assert examine(codes[:, :280], True, *drawn_out, 75.0, Limits()).faults == ()
    beyond = np.linspace(0, 0.7, 120)
    one_sound = np.stack([0 * beyond, 1 - beyond, beyond], 1), np.array([False, True, False])
    assert examine(codes[:, :120], True, *one_sound, 75.0, Limits()).faults == ("standing-still",)
    jump = np.concatenate([np.linspace(0, 15, 150), np.linspace(21, 39, 153)]).round()
    assert faults(where=attention(jump, 40)) == ("skipped-text",)
    assert examine(codes, True, attention(jump, 40), sounds, 75.0, Limits()).coverage == pytest.approx(32 / 37)
    stopped = np.linspace(0, 30, 303).round()
    assert faults(where=attention(stopped, 40)) == ("skipped-text",)
    assert set(faults(np.zeros((4, 0), int), False, np.zeros((0, 40)))) >= {"no-end", "too-short", "skipped-text"}


def test_lines_say_the_same_alone_and_among_others(parts) -> None:
    lines = {
        n: Line(text, None, seed) for n, (text, seed) in enumerate([(LONG, 1), ("Rain.", 2), (LONG, 3), (LONG, 1)])
    }
    together = dict(synthesizer(parts, rows=3).speak(lines.items()))
    for key, line in lines.items():
        alone = synthesizer(parts, rows=1).say(line)
        assert np.array_equal(alone.samples, together[key].samples)
        assert alone.pieces == together[key].pieces
    assert len(together[0].pieces) == 2
    assert np.array_equal(together[0].samples, together[3].samples)
    assert not np.array_equal(together[0].samples, together[2].samples)
    assert together[0].rate == 24_000
    assert together[0].seconds > sum(piece.frames for piece in together[0].pieces) / 75 - 1


def test_voices_are_heard_and_must_fit(parts) -> None:
    speaker = synthesizer(parts)
    import torch

    torch.manual_seed(1)
    shape = speaker.card.sizes.state_shape(1)
    voice = Voice("ann", [torch.randn(shape) for _ in range(speaker.card.sizes.layers)])
    plain, voiced = speaker.say(Line(LONG)), speaker.say(Line(LONG, voice))
    assert not np.array_equal(plain.samples, voiced.samples)
    mixed = dict(speaker.speak([(0, Line(LONG, voice)), (1, Line(LONG)), (2, Line(LONG, voice, 5))]))
    assert np.array_equal(mixed[0].samples, voiced.samples)
    assert np.array_equal(mixed[1].samples, plain.samples)
    with pytest.raises(
        ModelError, match=r"voice 'ann' does not fit this model: expected memories of 2 layers, found 1"
    ):
        speaker.submit("x", Line(LONG, dataclasses.replace(voice, memories=voice.memories[:1])))
    assert len(speaker) == 0


def test_lines_go_on_from_prompts(parts, tmp_path) -> None:
    """Held to continuation one by one; beside lines without a prompt, and streamed."""
    import soundfile
    import torch

    from model.continuation import continued_speech

    wave = voiced(np.random.default_rng(3), 0.7, 16_000)
    soundfile.write(tmp_path / "ann.wav", wave, 16_000, subtype="FLOAT")
    speaker = synthesizer(parts, rows=3)
    prompt = read_prompt(str(tmp_path / "ann.wav"), "Green island.", speaker)
    assert prompt.sample.codes.shape[0] == 4 and abs(prompt.sample.codes.shape[1] - 0.7 * 75) < 2
    line, plain = Line("Seven birds sang about rain today.", None, 4, prompt), Line("Rain.", None, 2)
    said = dict(speaker.speak([(0, line), (1, plain), (2, line)]))
    (take,) = speaker.takes("x", dataclasses.replace(line, prompt=None))
    policy = dataclasses.replace(speaker.policy, max_frames=speaker.most_frames(take))
    space = speaker.card.inventory.index(phonemes.SPACE)
    with torch.inference_mode():
        wanted, before = continued_speech(speaker.model, prompt.sample, take.phones, space, policy, take.seed)
    wave = join([speaker.decode(wanted.codes.numpy())], [0.0], 24_000)
    assert wanted.codes.shape[1] > 1 and np.array_equal(said[0].samples, wave)
    own = wanted.attention[:, before:].float().numpy()
    assert said[0].pieces[0].findings == examine(
        wanted.codes.numpy(), wanted.finished, own, take.sounds[1:], 75.0, ANYTHING
    )
    assert np.array_equal(said[2].samples, wave) and np.array_equal(said[1].samples, speaker.say(plain).samples)
    assert not np.array_equal(speaker.say(dataclasses.replace(line, prompt=None)).samples, wave)
    np.testing.assert_allclose(np.concatenate(list(stream(speaker, line))), wave, atol=1e-5)
    for file, text, reason in (
        ("ann.wav", " ", "no-prompt-text"),
        ("none.wav", "Rain.", "missing-file"),
        ("ann.wav", "🎉", "not-speakable"),
    ):
        with pytest.raises(Unusable, match=reason):
            read_prompt(str(tmp_path / file), text, speaker)


def test_the_time_of_lines_said_together_is_shared_out(parts) -> None:
    import time

    speaker = synthesizer(parts, rows=3)
    speaker.say(Line(LONG))  # what is loaded once is nobody's
    start = time.perf_counter()
    said = dict(speaker.speak((n, Line(LONG, seed=n)) for n in range(6)))
    spent = time.perf_counter() - start
    assert all(spoken.took > 0 for spoken in said.values())
    assert 0.5 * spent < sum(spoken.took for spoken in said.values()) < spent


def test_failures_are_tried_again_a_few_times_and_reported(parts) -> None:
    picky = dataclasses.replace(ANYTHING, seconds_a_token=0.0, seconds_more=0.4)
    tried = synthesizer(parts, picky, retries=3, rows=4)
    spoken = dict(tried.speak((n, Line("The boat sailed past.", seed=n)) for n in range(12)))
    attempts = {n: s.pieces[0].attempts for n, s in spoken.items()}
    assert min(attempts.values()) == 1 and max(attempts.values()) > 2
    for n, said in spoken.items():
        (piece,) = said.pieces
        assert said.faults in ((), ("no-end",))
        assert attempts[n] == 4 if said.faults else piece.frames < 30
        assert (piece.seed == derived(n, 0)) == (attempts[n] == 1 or bool(said.faults))
    again = next(n for n in range(12) if attempts[n] > 1)
    alone = synthesizer(parts, picky, retries=3).say(Line("The boat sailed past.", seed=again))
    assert np.array_equal(alone.samples, spoken[again].samples)
    assert synthesizer(parts, picky, retries=0).say(Line("The boat sailed past.", seed=again)).faults == ("no-end",)
    untrained = synthesizer(parts, Limits(), retries=1).say(Line(LONG))
    assert "skipped-text" in untrained.faults
    assert untrained.attempts == 4


def test_text_that_cannot_be_said_is_given_back_with_its_reason(parts) -> None:
    lines = {"good": Line("Rain."), "emoji": Line("🎉🎉"), "empty": Line(" "), "russian": Line("Привет, мир.")}
    spoken = dict(synthesizer(parts).speak(lines.items()))
    assert spoken["good"].seconds > 0
    reasons = {key: spoken[key].reason for key in ("emoji", "empty", "russian")}
    assert reasons == {"emoji": "not-speakable", "empty": "empty-text", "russian": "not-speakable"}
    with pytest.raises(Unusable, match="at most 100000; split the text"):
        synthesizer(parts).say(Line("a" * 100_001))


def test_streamed_speech_is_what_is_said(parts) -> None:
    speaker = synthesizer(parts)
    chunks = list(stream(speaker, Line("Seven birds sang about rain today.", seed=4), first=0.1))
    said = speaker.say(Line("Seven birds sang about rain today.", seed=4))
    whole = np.concatenate(chunks)
    assert said.seconds > 0.5
    assert 0.05 < len(chunks[0]) / 24_000 < 0.1
    assert len(chunks) > 3
    np.testing.assert_allclose(whole, said.samples, atol=1e-5)
    longer = np.concatenate(list(stream(speaker, Line(LONG, seed=4))))
    assert abs(len(longer) / 24_000 - speaker.say(Line(LONG, seed=4)).seconds) < 1.0


def test_another_codec_and_another_inventory_are_refused(parts, folders, tmp_path) -> None:
    _, other = write_speaker(tmp_path, seed=1)
    with pytest.raises(CodecError, match="belongs to another codec"):
        Synthesizer(parts[0], codec_weights.resolve(other))
    config = parts[0].config.replace(b'"ZH"', b'"XX"')
    with pytest.raises(ModelError, match="fingerprint"):
        Synthesizer(ModelFiles("here", config, parts[0].weights), parts[1])
    from model.checkpoint import pack, unpack

    model, card = unpack(*parts[0][1:])
    renamed = tuple("XX" if phone == "ZH" else phone for phone in phonemes.INVENTORY)
    files = pack(model, dataclasses.replace(card, inventory=renamed))
    foreign = ModelFiles("here", files["config.json"], files["model.safetensors"])
    with pytest.raises(ModelError, match="here: the model lacks 1 of our phonemes, first 'ZH'"):
        Synthesizer(foreign, parts[1])
    with pytest.raises(ModelError, match=r"nowhere is no model: config.json cannot be read .* --model"):
        read_model("nowhere")


class Shaky:
    """Functions of the storage that fail for URLs with some ending, so many times."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ending, self.times = "", 0
        patch.setattr(storage, "_PAUSES", (0.0, 0.0))
        for name in ("exists", "read_bytes", "write_bytes"):
            patch.setattr(storage, name, self._shaken(getattr(storage, name)))

    def _shaken(self, real):
        def ask(url, *more):
            if self.times and url.endswith(self.ending):
                self.times -= 1
                raise OSError("slow down")
            return real(url, *more)

        return ask


def test_storage_that_fails_is_never_held_against_a_line(parts, folders, tmp_path, monkeypatch) -> None:
    import pyarrow as pa

    model = read_model(folders[0])
    write_voice(tmp_path / "ann.safetensors", folders[0])
    output = str(tmp_path / "said")
    config = SynthesizeConfig(
        script="s.jsonl", voices=str(tmp_path), output=output, device="cpu", temperature=(1.0,), retries=0, rows=1
    )
    speak, shaky = Speak(Work.of(config, {"model": "any"}), (model, parts[1])), Shaky(monkeypatch)
    voices = ("", "ann", "", "nobody")
    lines = [ScriptLine(f"l{n}", f"l{n}", voice, "Rain.") for n, voice in enumerate(voices)]
    table = pa.table({"chunk": [json.dumps(Chunk("0-abc", tuple(lines)))]})

    def said(ending: str, times: int) -> list[str]:
        shaky.ending, shaky.times = ending, times
        return speak(table)["rows"].to_pylist()

    # The last time of three is for good: the chunk is missing, and what it has left does not trouble the next.
    for broken in ("ann.safetensors", "l2.wav", "0-abc.jsonl"):
        assert said(broken, 3) == [] and not shaky.times and not len(speak.synthesizer), broken
        assert not storage.names(storage.join(output, FOLDER))
    speak.voice.cache_clear()
    (rows,) = map(json.loads, said("ann.safetensors", 2))
    assert [row.get("reason") for row in rows] == [None, None, None, "unknown-voice"]
    assert storage.names(storage.join(output, FOLDER)) == ["0-abc.jsonl"]


def test_a_voice_that_is_gone_is_told_and_not_waited_for(parts, tmp_path, monkeypatch) -> None:
    card = synthesizer(parts).card
    for url in (str(tmp_path / "gone"), "nowhere://a", "oss://a"):
        with pytest.raises(VoiceError, match="cannot be read"):
            stored_voice(url, card)
    Shaky(monkeypatch).times = 2
    with pytest.raises(OSError, match="slow down"):
        stored_voice("any", card)
    with pytest.raises(VoiceError, match=r"cannot be read \(slow down\)"):
        read_voice("any", card)


@pytest.mark.parametrize("form", list(FORMATS))
def test_files_carry_their_provenance(form: str) -> None:
    samples = voiced(np.random.default_rng(0), 1.0, 24_000)
    told = Provenance("ab" * 32, "tenant/zoë", "consent/17 – „ja“", LONG, {"seed": -5, "faults": ["no-end"]})
    content = encode(samples, 24_000, told, form)
    heard, rate, found = decode(content)
    assert rate == 24_000 and found.synthetic
    assert found == dataclasses.replace(told, text=found.text) and LONG.startswith(found.text[:-1])
    assert len(heard) == len(samples) and np.corrcoef(heard, samples)[0, 1] > 0.98
    if form != "opus":
        assert encode(samples, 24_000, told, form) == content
        assert np.abs(heard - samples).max() < 1e-4


@settings(max_examples=60)
@given(text=st.text(max_size=300), voice=st.text(max_size=60), consent=st.text(max_size=60))
def test_any_text_is_provenance(text: str, voice: str, consent: str) -> None:
    told = Provenance("ab" * 32, voice, consent, text)
    _, _, found = decode(encode(np.zeros(100, np.float32), 24_000, told))
    assert (found.voice, found.consent, found.model) == (voice, consent, told.model)


def test_what_is_no_speech_file_is_refused(tmp_path) -> None:
    wave, told = np.zeros(100, np.float32), Provenance("ab" * 32)
    for samples, rate, form, provenance, reason in (
        (wave, 24_000, "mp3", told, "speech is written as wav, flac, opus"),
        (wave[:0], 24_000, "wav", told, r"float32 \[0\]"),
        (wave + np.nan, 24_000, "wav", told, "finite numbers"),
        (wave, 22_050, "opus", told, "Opus has .* not 22050"),
        (wave, 24_000, "wav", Provenance("ab", consent="x" * LONGEST_COMMENT), "shorten the consent"),
    ):
        with pytest.raises(SpeechFileError, match=reason):
            encode(samples, rate, provenance, form)
    with pytest.raises(SpeechFileError, match="no audio file"):
        decode(b"RIFF")
    assert ending("out/x.FLAC") == "flac"
    with pytest.raises(SpeechFileError, match=r"x.mp3: speech is written as .wav, .flac, .opus"):
        ending("x.mp3")
    import soundfile

    soundfile.write(tmp_path / "plain.wav", wave, 24_000)
    assert decode((tmp_path / "plain.wav").read_bytes())[2] is None
    assert json.loads(json.dumps(dataclasses.asdict(told)))["synthetic"] is True
