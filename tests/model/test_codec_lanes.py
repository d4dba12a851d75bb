"""Training beside a transform codec's lanes: speech goes on through them whatever is learnt."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from torch import nn

from model.codec import Codec
from model.codec_config import CodecConfig, CodecError
from model.codec_training.trainer import CodecTrainer, Recipe
from tests.model.test_codec_training import speech

CONFIG = CodecConfig(
    "lanes", filters=10, ratios=(5, 4, 4), dimension=40, kernel_size=3, last_kernel_size=3, lstm_layers=0, codebooks=3,
    codebook_size=64,
)  # fmt: skip
START = Recipe(quantise_from=0, half_precision=True)
LEARNING = Recipe(
    steps=60, learning_rate=3e-3, bias_rate=1.0, warmup=1, decoder_only=True, keep_lanes=True, half_precision=True
)


@pytest.fixture(scope="module")
def start() -> bytes:
    trainer = CodecTrainer(CONFIG, START)
    trainer.prime(speech(n) for n in range(40))
    return trainer.weights()


def begun(start: bytes, recipe: Recipe = LEARNING) -> CodecTrainer:
    trainer = CodecTrainer(CONFIG, recipe)
    trainer.start_from(start)
    return trainer


def error(weights: bytes) -> float:
    """Mean absolute difference to speech that was not trained on."""
    codec = Codec(CONFIG, weights)
    waves = list(speech(1001).numpy())
    return sum(float(abs(d - w).mean()) for d, w in zip(codec.decode(codec.encode(waves)), waves, strict=True))


def test_speech_passes_while_the_rest_learns_and_codes_stay(start: bytes) -> None:
    kept = begun(start)
    losses = [kept.step(speech(n))["mel"] for n in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert error(kept.weights()) < 1.05 * error(start)
    before, after = Codec(CONFIG, start), Codec(CONFIG, kept.weights())
    assert after.identity == before.identity and after.digest != before.digest


def test_without_it_the_offset_is_what_learns(start: bytes) -> None:
    """The control: as fast, but with everything free, speech is lost within a few steps."""
    free = begun(start, dataclasses.replace(LEARNING, keep_lanes=False))
    for n in range(10):
        free.step(speech(n))
    assert error(free.weights()) > 1.5 * error(start)


def test_what_may_change_hears_no_offset_and_moves_no_lane(start: bytes) -> None:
    trainer, held = begun(start), [80, 16, 4, 1]
    widths = [80, 40, 20, 10]
    checked = 0
    for module in trainer.networks["decoder"].modules():
        if getattr(module, "weight", None) not in trainer.lanes.projections:
            continue
        change = trainer.lanes.projections[module.weight](torch.randn(module.weight.shape))
        stage = widths.index(module.in_channels)
        offset = torch.zeros(1, module.in_channels, 20)
        offset[:, : held[stage]] = 4.0
        if isinstance(module, nn.ConvTranspose1d):
            answer = nn.functional.conv_transpose1d(offset, change, stride=module.stride)[..., 20:-20]
            heard = answer[:, held[stage + 1] :] if stage == 0 else answer  # no offset before the first stride
            moved = change[: held[stage], : held[stage + 1]]
            assert stage == 0 or float(heard.abs().max()) < 1e-4
        else:
            assert float(nn.functional.conv1d(offset, change).abs().max()) < 1e-4
            shortcut = module.kernel_size == (1,)
            moved = change[: held[stage], : held[stage]] if shortcut or module.out_channels == 1 else change[:0]
        assert not moved.any()
        assert change.any() or module.in_channels == 1
        checked += 1
    assert checked == 3 + 2 * 3 + 1


def test_projections_are_projections(start: bytes) -> None:
    lanes = begun(start).lanes
    for parameter, project in lanes.projections.items():
        change = torch.randn(parameter.shape, dtype=torch.float64)
        once = project(change)
        torch.testing.assert_close(project(once), once)
        assert (once != change).any()


def test_a_decoder_without_lanes_is_refused(start: bytes) -> None:
    learnt = CodecTrainer(CONFIG, dataclasses.replace(START, transform_start=False))
    learnt.prime([speech(0)])
    with pytest.raises(CodecError, match="began as a transform codec"):
        begun(learnt.weights())
    with pytest.raises(CodecError, match="no room"):
        CodecTrainer(dataclasses.replace(CONFIG, dimension=48), LEARNING)


def test_resumes_bit_for_bit(start: bytes) -> None:
    straight = begun(start)
    for n in range(6):
        straight.step(speech(n))
    first = begun(start)
    for n in range(3):
        first.step(speech(n))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = CodecTrainer(CONFIG, LEARNING)
    second.load_state_dict(torch.load(file, weights_only=True))
    for n in range(3, 6):
        second.step(speech(n))
    assert second.weights() == straight.weights()
