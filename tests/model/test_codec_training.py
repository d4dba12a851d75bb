"""Codec training: it learns, resumes bit for bit, keeps its codebooks alive and its gradients balanced."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from torch import nn

from model.codec import Codec
from model.codec_config import CodecConfig, CodecError
from model.codec_training import discriminator
from model.codec_training.losses import Balancer, MelDistance
from model.codec_training.quantiser import ResidualQuantiser, kmeans, perplexity
from model.codec_training.trainer import CodecTrainer, Recipe

TINY = CodecConfig("tiny", filters=4, ratios=(5, 4, 4), dimension=8, lstm_layers=1, codebooks=3, codebook_size=16)
RECIPE = Recipe(
    steps=100,
    learning_rate=2e-3,
    bias_rate=1.0,
    warmup=5,
    quantise_from=4,
    transform_start=False,
    discriminator_filters=2,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def speech(step: int, rows: int = 2, samples: int = 80 * 60) -> torch.Tensor:
    """Harmonics with a pitch of their own for each row, and a little noise."""
    rng = np.random.default_rng(step)
    time = np.arange(samples) / 24_000
    pitch = rng.uniform(90, 250, (rows, 1))
    wave = sum(np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 12))
    return torch.from_numpy((0.1 * wave + 0.005 * rng.standard_normal((rows, samples))).astype(np.float32))


def run(trainer: CodecTrainer, steps: int) -> list[dict[str, float]]:
    return [trainer.step(speech(trainer.step_number)) for _ in range(steps)]


def saved(trainer: CodecTrainer) -> dict:
    """The trainer's state, written and read again."""
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, ratios=(8, 5, 4, 2))])
def test_networks_can_start_as_a_transform_codec(config: CodecConfig) -> None:
    """Speech passes before anything was learnt, loud or quiet, but for what lies above the lowest coefficients."""
    from model.codec import build_networks
    from model.codec_initial import transform_codec, variance_preserving

    config = dataclasses.replace(config, filters=20, dimension=config.hop // 2, lstm_layers=0)
    for norm in ("weight_norm", "none"):
        torch.manual_seed(0)
        encoder, decoder = build_networks(config, norm)
        variance_preserving(encoder, decoder)
        assert transform_codec(encoder, decoder, config)
        for level in (0.2, 0.001):
            wave = level * speech(3, rows=1).unsqueeze(1)
            with torch.no_grad():
                error = decoder(encoder(wave)) - wave
            assert float(error.pow(2).sum() / wave.pow(2).sum()) < 0.1
    narrow = dataclasses.replace(config, filters=1)
    assert not transform_codec(*build_networks(narrow, "none"), narrow)


@pytest.mark.parametrize("adversarial_from", [0, 3])
def test_resuming_equals_never_having_stopped(adversarial_from: int) -> None:
    recipe = dataclasses.replace(RECIPE, adversarial_from=adversarial_from)
    whole = CodecTrainer(TINY, recipe)
    expected = run(whole, 9)
    first, second = CodecTrainer(TINY, recipe), CodecTrainer(TINY, recipe)
    run(first, 6)
    second.load_state_dict(saved(first))
    assert run(second, 3) == expected[6:]
    assert second.weights() == whole.weights()


def test_a_few_steps_lower_the_loss_and_the_codec_runs() -> None:
    trainer = CodecTrainer(TINY, RECIPE)
    losses = [row["mel"] for row in run(trainer, 60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    codec = Codec(TINY, trainer.weights())
    wave = speech(999, rows=1)[0].numpy()
    codes = codec.encode([wave])[0]
    assert codes.shape == (3, 60)
    # what is exported computes what was trained
    trainer.networks.eval(), trainer.quantiser.eval()
    with torch.no_grad():
        latent = trainer.networks["encoder"](torch.from_numpy(wave)[None, None])
        quantised = trainer.quantiser(latent, torch.tensor([3]))
        audio = trainer.networks["decoder"](quantised.latent)[0, 0].numpy()
    np.testing.assert_array_equal(quantised.codes[0].numpy(), codes)
    np.testing.assert_allclose(codec.decode([codes])[0], audio, atol=1e-5)


@pytest.mark.parametrize(
    ("full_depth", "first_alone", "shares"),
    [
        (0.5, 0.0, [0.125, 0.125, 0.125, 0.625]),
        (0.4, 0.2, [0.3, 0.1, 0.1, 0.5]),
        (0.0, 0.0, [0.25, 0.25, 0.25, 0.25]),
        (1.0, 0.0, [0, 0, 0, 1]),
        (0.0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_depths_are_drawn_in_the_recipes_shares(full_depth: float, first_alone: float, shares: list[float]) -> None:
    """All codebooks, the first alone, and of the rest as many for every depth, from one to all of them."""
    recipe = dataclasses.replace(RECIPE, full_depth=full_depth, first_alone=first_alone)
    depths = CodecTrainer(dataclasses.replace(TINY, codebooks=4), recipe)._draw_depths(40_000)
    drawn = torch.bincount(depths, minlength=5) / len(depths)
    assert drawn.tolist() == pytest.approx([0, *shares], abs=0.012 * (max(shares) < 1))  # five standard deviations


@pytest.mark.parametrize(("full_depth", "first_alone", "depth"), [(0.0, 1.0, 1), (1.0, 0.0, 3)])
def test_the_decoder_learns_from_as_many_codebooks_as_were_drawn(
    full_depth: float, first_alone: float, depth: int
) -> None:
    before = CodecTrainer(TINY, RECIPE)
    run(before, 5)
    recipe = dataclasses.replace(RECIPE, decoder_only=True, full_depth=full_depth, first_alone=first_alone)
    after = CodecTrainer(TINY, recipe)
    after.start_from(before.weights())
    heard = []
    after.networks["decoder"].register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0].detach()))
    run(after, 1)
    with torch.no_grad():
        latent = after.networks["encoder"](speech(0).unsqueeze(1))
        expected = [after.quantiser(latent, torch.tensor([d, d])).latent for d in (1, 2, 3)]
    assert [torch.equal(heard[0], latent) for latent in expected] == [d == depth for d in (1, 2, 3)]


def test_no_weights_before_the_codebooks() -> None:
    with pytest.raises(CodecError, match="step 4"):
        CodecTrainer(TINY, RECIPE).weights()


@pytest.mark.parametrize("adversarial_from", [0, 1])
def test_a_decoder_learns_while_codes_stay(adversarial_from: int) -> None:
    """Encoder and codebooks keep every bit, so identities are equal; the decoder gets nearer to the speech."""
    before = CodecTrainer(TINY, RECIPE)
    run(before, 6)
    recipe = dataclasses.replace(
        RECIPE, decoder_only=True, first_alone=0.5, learning_rate=5e-3, adversarial_from=adversarial_from
    )
    after = CodecTrainer(TINY, recipe)
    after.start_from(before.weights())
    start = Codec(TINY, after.weights())
    wave = speech(999, rows=1)[0].numpy()
    codes = start.encode([wave])
    np.testing.assert_allclose(start.decode(codes)[0], Codec(TINY, before.weights()).decode(codes)[0], atol=1e-5)
    losses = [row["mel"] for row in run(after, 40)]
    end = Codec(TINY, after.weights())
    np.testing.assert_array_equal(end.encode([wave])[0], codes[0])
    assert end.identity == start.identity and end.digest != start.digest
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_a_decoder_alone_resumes_and_takes_no_other_checkpoint() -> None:
    recipe = dataclasses.replace(RECIPE, decoder_only=True)
    start = CodecTrainer(TINY, RECIPE)
    run(start, 5)
    whole, resumed = CodecTrainer(TINY, recipe), CodecTrainer(TINY, recipe)
    whole.start_from(start.weights())
    run(whole, 3)
    resumed.load_state_dict(saved(whole))
    assert run(resumed, 2) == run(whole, 2) and resumed.weights() == whole.weights()
    with pytest.raises(CodecError, match="decoder_only"):
        CodecTrainer(TINY, recipe).load_state_dict(saved(start))


def test_training_starts_from_weights_of_its_own_sizes_alone() -> None:
    start = CodecTrainer(TINY, RECIPE)
    run(start, 5)
    again = CodecTrainer(TINY, RECIPE)
    again.start_from(start.weights())
    wave = speech(999, rows=1)[0].numpy()
    expected, actual = (Codec(TINY, trainer.weights()) for trainer in (start, again))
    codes = expected.encode([wave])
    np.testing.assert_array_equal(actual.encode([wave])[0], codes[0])
    np.testing.assert_allclose(actual.decode(codes)[0], expected.decode(codes)[0], atol=1e-5)
    with pytest.raises(CodecError, match="other sizes"):
        CodecTrainer(dataclasses.replace(TINY, dimension=4), RECIPE).start_from(start.weights())


def test_another_architecture_is_refused() -> None:
    state = CodecTrainer(TINY, RECIPE).state_dict()
    with pytest.raises(CodecError, match="architecture"):
        CodecTrainer(dataclasses.replace(TINY, filters=8), RECIPE).load_state_dict(state)


def test_steps_that_are_not_finite_change_no_weights() -> None:
    trainer = CodecTrainer(TINY, RECIPE)
    before = {name: value.clone() for name, value in trainer.networks.state_dict().items()}
    with pytest.raises(FloatingPointError):
        trainer.step(speech(0) * float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in trainer.networks.state_dict().items())


@pytest.mark.parametrize("adversarial_from", [0, 1])
def test_a_bad_batch_costs_one_step(adversarial_from: int) -> None:
    """Codebooks and discriminator, too, are as before, so that clean steps go on."""
    trainer = CodecTrainer(TINY, dataclasses.replace(RECIPE, adversarial_from=adversarial_from))
    run(trainer, 6)
    parts = nn.ModuleList([trainer.networks, trainer.quantiser, trainer.judge])
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    audio = speech(0)
    audio[0, 100] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.step(audio)
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())
    assert np.isfinite(run(trainer, 1)[0]["mel"])


def test_a_discriminator_without_a_finite_gradient_moves_nothing() -> None:
    """The generator waits for it."""
    trainer = CodecTrainer(TINY, dataclasses.replace(RECIPE, adversarial_from=1))
    run(trainer, 6)
    parts = nn.ModuleList([trainer.networks, trainer.judge])
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    steps = [int(state["step"]) for state in trainer.optimiser.state.values()]
    spoilt = next(trainer.judge.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="norm nan"):
        run(trainer, 1)
    spoilt.remove()
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())
    assert steps == [int(state["step"]) for state in trainer.optimiser.state.values()]
    assert np.isfinite(run(trainer, 1)[0]["discriminator"])


def test_a_resumed_run_follows_its_new_recipe() -> None:
    first = CodecTrainer(TINY, dataclasses.replace(RECIPE, quantise_from=50, discriminator_windows=(256, 128)))
    run(first, 5)
    recipe = dataclasses.replace(RECIPE, quantise_from=3, bias_rate=0.5, discriminator_windows=(256,))
    second = CodecTrainer(TINY, recipe)
    second.load_state_dict(saved(first))
    run(second, 1)
    assert second.quantiser.started and second.weights()
    assert [group["share"] for group in second.optimiser.param_groups] == [1.0, 0.5]


def _two_workers(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trainer = CodecTrainer(TINY, dataclasses.replace(RECIPE, adversarial_from=2))
    given_up = []
    for step in range(9):
        audio = speech(2 * step + rank)
        if (step, rank) == (6, 1):
            audio = audio * float("inf")
        spoilt = float("nan") if (step, rank) == (7, 1) else 1.0
        hook = next(trainer.judge.parameters()).register_hook(lambda gradient, factor=spoilt: gradient * factor)
        try:
            trainer.step(audio)
        except FloatingPointError:
            given_up.append(step)
            trainer.step_number += 1
        hook.remove()
    state = {"networks": trainer.networks.state_dict(), "judge": trainer.judge.state_dict(), "given_up": given_up}
    torch.save(state | {"quantiser": trainer.quantiser.embed}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_workers_hold_the_same_codec(tmp_path) -> None:
    """Each has its own speech; codebooks start, and a step is given up, together."""
    torch.multiprocessing.spawn(_two_workers, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["quantiser"], second["quantiser"]) and first["quantiser"].std() > 0
    assert first["given_up"] == second["given_up"] == [6, 7]
    for part in ("networks", "judge"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())


def test_dead_codes_restart() -> None:
    """Codes far from all data are given vectors of the batch, and are used from then on."""
    quantiser = ResidualQuantiser(TINY, decay=0.5)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(4, 8, 50, generator=generator)
    quantiser.embed[0] = torch.arange(16.0).unsqueeze(1) * 100 + 50
    quantiser.sums[0], quantiser.counts[0] = quantiser.embed[0] / 16, 1 / 16
    quantiser.started.fill_(True)
    depths = torch.full((4,), 3)
    quantiser.train()
    before = perplexity(quantiser(latent, depths, generator).codes[:, 0], 16)
    for _ in range(30):
        codes = quantiser(latent, depths, generator).codes
    assert before < 2 and perplexity(codes[:, 0], 16) > 10


def quantiser_at(centres: torch.Tensor, decay: float) -> ResidualQuantiser:
    """In training, at `centres` [codebooks, size, dimension]; no code is ever dead, so none is restarted."""
    quantiser = ResidualQuantiser(dataclasses.replace(TINY, codebooks=len(centres)), decay, dead_below=0.0)
    for level, codebook in enumerate(centres):
        quantiser.begin(level, codebook)
    return quantiser.train()


def test_codes_move_to_the_mean_of_their_vectors_at_the_pace_of_the_decay() -> None:
    """A code in the middle of nothing stays where it is."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(1, 16, 8, generator=generator)
    means = centres[0, :15] + 0.5 * torch.randn(15, 8, generator=generator)
    noise = 0.1 * torch.randn(15, 20, 8, generator=generator)
    vectors = means.unsqueeze(1) + noise - noise.mean(dim=1, keepdim=True)
    latent, depths = vectors.view(1, 300, 8).transpose(1, 2), torch.tensor([1])
    quantiser = quantiser_at(centres, 0.9)
    for step in range(1, 61):
        codes = quantiser(latent, depths, generator).codes
        assert torch.equal(codes.flatten(), torch.arange(15).repeat_interleave(20))
        left = 0.9**step / (0.9**step + (1 - 0.9**step) * 16 / 15)  # what is left of an even share for each of 16
        torch.testing.assert_close(quantiser.embed[0, :15], means + left * (centres[0, :15] - means))
        torch.testing.assert_close(quantiser.embed[0, 15], centres[0, 15])


def test_codes_of_every_level_end_at_the_mean_of_what_is_assigned_to_them() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(4, 8, 200, generator=generator)
    quantiser = quantiser_at(torch.randn(3, 16, 8, generator=generator), 0.8)
    depths = torch.full((4,), 3)

    def away() -> list[float]:
        """Of each level: the distance of its codes in use from the mean of their vectors, at the most."""
        codes = quantiser.eval()(latent, depths).codes
        residual, farthest = latent.transpose(1, 2).reshape(-1, 8), []
        for level, embed in enumerate(quantiser.embed):
            chosen = codes[:, level].flatten()
            means = {code: residual[chosen == code].mean(dim=0) for code in chosen.unique().tolist()}
            assert len(means) > 4
            farthest.append(max(float((embed[code] - mean).norm()) for code, mean in means.items()))
            residual = residual - embed[chosen]
        quantiser.train()
        return farthest

    assert min(away()) > 0.5
    for _ in range(300):
        quantiser(latent, depths, generator)
    assert max(away()) < 0.01


def test_dropped_levels_give_nothing_and_prefixes_agree() -> None:
    quantiser = ResidualQuantiser(TINY).eval()
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 8, 40, generator=generator)
    quantiser.remember(latent)
    quantiser.start(generator)
    shallow, deep = (quantiser(latent, torch.tensor([depth, 3])) for depth in (1, 3))
    assert torch.equal(shallow.codes, deep.codes) and torch.equal(shallow.latent[1], deep.latent[1])
    first_code = quantiser.embed[0][shallow.codes[0, 0]]
    assert torch.equal(shallow.latent[0].t(), first_code)
    errors = [(quantiser(latent, torch.tensor([d, d])).latent - latent).pow(2).mean() for d in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_half_precision_halves_the_file_and_keeps_speech_and_silence() -> None:
    """Of the transform start, whose lanes' offsets must cancel: rounded apart, they would leave a hum in silence."""
    config = dataclasses.replace(TINY, filters=8, dimension=32, lstm_layers=0)
    recipe = dataclasses.replace(RECIPE, transform_start=True, quantise_from=0)
    codecs = {}
    for half in (False, True):
        trainer = CodecTrainer(config, dataclasses.replace(recipe, half_precision=half))
        trainer.prime([speech(0)])
        codecs[half] = Codec(config, trainer.weights())
    assert len(codecs[True].weights) < 0.6 * len(codecs[False].weights)
    full, halved = codecs[False].encoder, codecs[True].encoder
    for level in (0.0, 0.001, 0.2):
        wave = level * speech(3, rows=1).unsqueeze(1)
        with torch.no_grad():
            torch.testing.assert_close(halved(wave), full(wave), rtol=0, atol=0.002 * level + 1e-5)


def test_codebooks_that_have_started_keep_no_latents() -> None:
    """Those of an hour would be a hundred megabytes of every checkpoint."""
    quantiser = ResidualQuantiser(TINY, recent=5000)
    quantiser.remember(torch.randn(2, 8, 40))
    assert len(quantiser.recent) == 5000
    quantiser.start(torch.Generator().manual_seed(0))
    assert len(quantiser.state_dict()["recent"]) == 0


def test_codebooks_cannot_start_from_nothing() -> None:
    with pytest.raises(ValueError, match="remembered"):
        ResidualQuantiser(TINY).start(torch.Generator())


def test_kmeans_finds_clusters() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(8, 4, generator=generator) * 10
    vectors = truth.repeat(50, 1) + 0.01 * torch.randn(400, 4, generator=generator)
    centres = kmeans(vectors, 24, 10, generator)
    assert torch.cdist(truth, centres).min(dim=1).values.max() < 0.1


def test_codebooks_can_start_with_an_ear_for_quiet_frames() -> None:
    """Nine in ten latents are as varied as the others, and a hundred times softer."""
    generator = torch.Generator().manual_seed(0)
    quiet, loud = 0.01 * torch.randn(1, 8, 900, generator=generator), torch.randn(1, 8, 100, generator=generator)
    away = {}
    for weight in (0.0, 1.0):
        quantiser = ResidualQuantiser(TINY).eval()
        quantiser.remember(torch.cat([quiet, loud], dim=2))
        quantiser.start(torch.Generator().manual_seed(1), quiet=weight)
        off = [(quantiser(x, torch.tensor([3])).latent - x).pow(2).mean() / x.pow(2).mean() for x in (quiet, loud)]
        away[weight] = [float(share) for share in off]
    assert away[1.0][0] < 0.5 * away[0.0][0]
    assert away[0.0][1] < away[1.0][1]


def test_balancer_makes_weights_shares_whatever_the_scales() -> None:
    output = torch.randn(3, 1, 50).requires_grad_()
    balancer = Balancer({"loud": 3.0, "quiet": 1.0, "off": 0.0})
    losses = {"loud": 1e6 * output[..., :25].sum(), "quiet": 1e-6 * output[..., 25:].sum(), "off": output.sum()}
    gradient = balancer.gradient(losses, output).detach()
    loud, quiet = gradient[..., :25].flatten(1).norm(dim=1).mean(), gradient[..., 25:].flatten(1).norm(dim=1).mean()
    assert float(loud / quiet) == pytest.approx(3.0, rel=1e-5)


def test_mel_distance_hears_level_and_pitch() -> None:
    mel = MelDistance(24_000)
    wave = speech(1)
    assert float(mel(wave, wave)) == 0
    assert 0 < float(mel(0.9 * wave, wave)) < float(mel(0.3 * wave, wave)) < float(mel(torch.zeros_like(wave), wave))
    silence = torch.zeros(1, 4800, requires_grad=True)
    mel(silence, wave[:1]).backward()
    assert torch.isfinite(silence.grad).all()


def test_discriminator_learns_to_tell_noise_from_speech() -> None:
    torch.manual_seed(0)
    judge = discriminator.build_discriminator(4, (512, 256))
    optimiser = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        real, fake = speech(step).unsqueeze(1), 0.1 * torch.randn(2, 1, 4800)
        loss = discriminator.discriminator_loss(judge(real), judge(fake))
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert float(discriminator.feature_loss(judge(real), judge(real))) == 0
