"""One step of codec training, and the state that makes the next step exactly what it would have been.

A step draws nothing but from its own generator, so a trainer whose state was saved and loaded goes on bit for bit (on
the same kind of machine with the same number of threads). With several workers each steps on its own part of the batch;
gradients and codebook statistics are averaged, so all of them hold the same weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.codec import build_networks, codebook_name, read_tensors, weights_from_training
from model.codec_config import CodecConfig, CodecError
from model.codec_initial import transform_codec, variance_preserving
from model.codec_training import discriminator as adversary
from model.codec_training.lanes import Lanes
from model.codec_training.losses import Balancer, MelDistance
from model.codec_training.quantiser import (
    Quantised,
    ResidualQuantiser,
    average_over_workers,
    on_all_workers,
    perplexity,
)


@dataclass(frozen=True)
class Recipe:
    """How a codec is trained; the architecture is a `CodecConfig`."""

    steps: int = 10_000
    learning_rate: float = 1e-3
    transform_start: bool = True
    """Start as a transform codec (`model.codec_initial`), where the sizes allow it. Learning rates above 1e-4 undo it
    at once; without it, 1e-3 learns fastest."""
    bias_rate: float = 0.02
    """Share of the learning rate for biases: those of the transform start hold offsets that must cancel."""
    warmup: int = 200
    """Steps to the full learning rate."""
    cooldown: float = 0.3
    """Share of the steps, at the end, in which the learning rate falls to a fiftieth."""
    clip: float = 5.0
    """Largest norm of the generator's gradient."""
    start_latents: int = 32_768
    """Latents, the newest, from which k-means makes the codebooks: with 12 a code of another voice's waveform is badly
    met, with 350 well."""
    start_quiet: float = 0.0
    """How much more quiet latents weigh in that k-means: their energy to the power of minus this."""
    quantise_from: int = 300
    """The step at which the codebooks start; until then encoder and decoder learn without them."""
    full_depth: float = 0.5
    """Share of utterances that use all codebooks for sure; the others use a random number, from one to all."""
    first_alone: float = 0.0
    """Share of utterances that use the first alone for sure, as a language model of one codebook will."""
    half_precision: bool = False
    """Keep weights and codebooks of the codec in float16: half the bytes."""
    decoder_only: bool = False
    """Leave encoder and codebooks as they are: what was tokenized, and models of it, stay valid."""
    keep_lanes: bool = False
    """With `decoder_only`, of a transform codec: train what is beside its lanes (`model.codec_training.lanes`)."""
    commitment: float = 0.1
    """Size of the commitment's gradient at the latent, as a share of the reconstruction's. A fixed factor instead lets
    the encoder shrink its latents to please the commitment, and learning stalls."""
    mel_weight: float = 1.0
    time_weight: float = 0.1
    adversarial_from: int = 0
    """The step from which the discriminator judges; 0 trains without one."""
    adversarial_weight: float = 0.5
    feature_weight: float = 0.5
    discriminator_filters: int = 8
    discriminator_windows: tuple[int, ...] = (2048, 1024, 512)
    discriminator_rate: float = 1e-3
    seed: int = 0


class CodecTrainer:
    """
    Args:
        config: architecture.
        recipe: how to train it.
        device: where; the same recipe runs on CPU and GPU.
    """

    def __init__(self, config: CodecConfig, recipe: Recipe, device: str = "cpu") -> None:
        self.config, self.recipe, self.device = config, recipe, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            # An encoder that stays keeps its weights to the last bit, which a weight norm would not
            norm = "none" if recipe.keep_lanes else "weight_norm"
            encoder, decoder = build_networks(config, norm, "none" if recipe.decoder_only else None)
            variance_preserving(encoder, decoder)
            if recipe.transform_start and not recipe.decoder_only:
                transform_codec(encoder, decoder, config)
            judge = adversary.build_discriminator(recipe.discriminator_filters, recipe.discriminator_windows)
        encoder.requires_grad_(not recipe.decoder_only)
        self.networks = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(self.device)
        self.lanes = Lanes(decoder, config) if recipe.keep_lanes else None
        self.quantiser = ResidualQuantiser(config, recent=recipe.start_latents).to(self.device)
        self.judge = judge.to(self.device)
        self.mel = MelDistance(config.sample_rate).to(self.device)
        self.balancer = Balancer(
            {
                "mel": recipe.mel_weight,
                "time": recipe.time_weight,
                "adversarial": recipe.adversarial_weight,
                "features": recipe.feature_weight,
            }
        )
        named = [(name, p) for name, p in self.networks.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if "bias" not in name], "share": 1.0},
            {"params": [p for name, p in named if "bias" in name], "share": recipe.bias_rate},
        ]
        self.optimiser = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=(0.8, 0.99), weight_decay=0.0, fused=True
        )
        self.judge_optimiser = torch.optim.AdamW(
            self.judge.parameters(), lr=recipe.discriminator_rate, betas=(0.5, 0.9), weight_decay=0.0, fused=True
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step_number = 0
        self.started_from: str | None = ""
        """sha256 of the weights that training began with; empty: random ones; None: the checkpoint does not tell."""

    def step(self, audio: torch.Tensor) -> dict[str, float]:
        """Trains on audio float32 [batch, samples], a whole number of hops long; returns what to log.

        Raises:
            FloatingPointError: audio, a loss or a gradient that is not finite, on any worker; at most the codebooks
                and the balancer's averages have moved.
        """
        audio = audio.to(self.device).unsqueeze(1)
        self.networks.train(), self.quantiser.train(not self.recipe.decoder_only)
        if self.step_number >= self.recipe.quantise_from and not self.quantiser.started:
            self.quantiser.start(self.generator, quiet=self.recipe.start_quiet)
        with torch.set_grad_enabled(not self.recipe.decoder_only):
            latent = self.networks["encoder"](audio)
            if not on_all_workers(bool(latent.isfinite().all()), self.device):
                raise FloatingPointError(f"audio or latents are not finite at step {self.step_number}")
            quantised = self._quantise(latent)
        bottleneck = quantised.latent.detach().requires_grad_()
        decoded = self.networks["decoder"](bottleneck)
        losses = {"mel": self.mel(decoded[:, 0], audio[:, 0]), "time": (decoded - audio).abs().mean()}
        logged = {}
        if self.adversarial:
            real, fake = self.judge(audio), self.judge(decoded)
            losses |= {"adversarial": adversary.adversarial_loss(fake), "features": adversary.feature_loss(real, fake)}
        output_gradient = self.balancer.gradient(losses, decoded)
        rate = self._set_rates()
        self.optimiser.zero_grad(set_to_none=True)
        decoded.backward(output_gradient)
        if not self.recipe.decoder_only:
            latent.backward(self._with_commitment(bottleneck.grad, latent, quantised.commitment))
        if self.lanes:
            self.lanes.project_gradients()
        norm = self._clip(self.networks, self.recipe.clip)
        if self.adversarial:  # its gradient, too, is known to be finite before anything steps
            logged["discriminator"] = self._teach_judge(real, fake)
            self.judge_optimiser.step()
        with self.lanes.kept() if self.lanes else nullcontext():
            self.optimiser.step()
        self.step_number += 1
        logged |= {name: float(loss.detach()) for name, loss in losses.items()}
        logged |= {"grad_norm": norm, "lr": rate}
        if self.quantiser.started:
            logged["perplexity"] = perplexity(quantised.codes[:, 0], self.config.codebook_size)
            logged["distortion"] = float(quantised.commitment.detach() / latent.detach().pow(2).mean())
        return logged

    @torch.no_grad()
    def prime(self, batches: Iterable[torch.Tensor]) -> None:
        """Starts the codebooks before the first step, from audio [batch, samples] through the networks as they are."""
        self.networks.eval()
        for audio in batches:
            self.quantiser.remember(self.networks["encoder"](audio.to(self.device).unsqueeze(1)))
        self.quantiser.start(self.generator, quiet=self.recipe.start_quiet)

    def start_from(self, weights: bytes) -> None:
        """Begins with the networks and codebooks of a codec of the same sizes instead of random ones.

        Raises:
            CodecError: damaged weights, of another architecture, or without the lanes that the recipe keeps.
        """
        tensors = read_tensors(self.config, weights)
        try:
            for level in range(self.config.codebooks):
                self.quantiser.begin(level, tensors.pop(codebook_name(level)))
            self.networks.load_state_dict(_with_norms(tensors, self.networks.state_dict()))
        except (KeyError, RuntimeError) as error:
            raise CodecError(f"codec {self.config.name!r} cannot start from weights of other sizes: {error}") from None
        if self.lanes:
            self.lanes.require()
        self.quantiser.started.fill_(True)
        self.started_from = hashlib.sha256(weights).hexdigest()

    @property
    def adversarial(self) -> bool:
        return 0 < self.recipe.adversarial_from <= self.step_number

    def weights(self) -> bytes:
        """The safetensors file of the codec as it is now. Raises CodecError before the codebooks have started."""
        if not self.quantiser.started:
            raise CodecError(f"the codebooks start at step {self.recipe.quantise_from}; this is {self.step_number}")
        state: dict[str, torch.Tensor] = dict(self.networks.state_dict())
        state |= {codebook_name(level): embed for level, embed in enumerate(self.quantiser.embed)}
        return weights_from_training(self.config, state, self.recipe.half_precision)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text only: `torch.load(…, weights_only=True)` reads it back."""
        return {
            "step": self.step_number,
            "started_from": self.started_from,
            "config": self.config.to_dict(),
            "recipe": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.recipe).items()},
            "networks": self.networks.state_dict(),
            "quantiser": self.quantiser.state_dict(),
            "judge": self.judge.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "judge_optimiser": self.judge_optimiser.state_dict(),
            "balancer": self.balancer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. The recipe may differ (longer, with a discriminator), the sizes may not."""
        saved = CodecConfig.from_dict(state["config"])
        if saved != self.config:
            raise CodecError(f"the checkpoint trains another architecture ({saved}) than the config ({self.config})")
        for part in ("decoder_only", "keep_lanes"):
            if state["recipe"].get(part, False) != getattr(self.recipe, part):
                raise CodecError(f"the checkpoint and the recipe differ in {part}; choose another output folder")
        self.networks.load_state_dict(state["networks"])
        self.quantiser.recent = torch.zeros_like(state["quantiser"]["recent"], device=self.device)
        self.quantiser.load_state_dict(state["quantiser"])
        shares = [group["share"] for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(state["optimiser"])
        for group, share in zip(self.optimiser.param_groups, shares, strict=True):
            group["share"] = share
        self.balancer.load_state_dict(state["balancer"])
        self.generator.set_state(state["generator"])
        self.step_number = int(state["step"])
        self.started_from = state.get("started_from")
        judge, ours = state["judge"], self.judge.state_dict()
        if judge.keys() == ours.keys() and all(judge[name].shape == ours[name].shape for name in ours):
            self.judge.load_state_dict(state["judge"])
            self.judge_optimiser.load_state_dict(state["judge_optimiser"])

    def learning_rate(self, step: int) -> float:
        """Share of the full rate at a step: a ramp, a plateau, then a straight fall to a fiftieth."""
        fall = max(1, round(self.recipe.steps * self.recipe.cooldown))
        left = (self.recipe.steps - step) / fall
        return min(1.0, (step + 1) / max(1, self.recipe.warmup), max(0.02, left))

    def _quantise(self, latent: torch.Tensor) -> Quantised:
        """Quantised, or as it is and remembered while the codebooks have not started."""
        if self.quantiser.started:
            return self.quantiser(latent, self._draw_depths(len(latent)), self.generator)
        self.quantiser.remember(latent)
        return Quantised(latent, torch.empty(0, dtype=torch.int64), latent.new_zeros(()))

    def _with_commitment(self, gradient: torch.Tensor, latent: torch.Tensor, commitment: torch.Tensor) -> torch.Tensor:
        """The reconstruction's gradient, passed straight through the quantiser, and the commitment's in proportion."""
        if not self.quantiser.started:
            return gradient
        towards_codes = torch.autograd.grad(commitment, latent, retain_graph=True)[0]
        share = self.recipe.commitment * gradient.norm() / towards_codes.norm().clamp(min=1e-12)
        return gradient + share * towards_codes

    def _draw_depths(self, rows: int) -> torch.Tensor:
        levels = self.config.codebooks
        shallow = torch.randint(1, levels + 1, (rows,), generator=self.generator)
        drawn = torch.rand(rows, generator=self.generator)
        shallow[drawn < self.recipe.full_depth] = levels
        shallow[drawn >= 1 - self.recipe.first_alone] = 1
        return shallow.to(self.device)

    def _teach_judge(self, real: adversary.Judgement, fake: adversary.Judgement) -> float:
        """The discriminator's gradient, from the judgements that the generator is led by: nothing is judged twice."""
        loss = adversary.discriminator_loss(real, fake)
        self.judge_optimiser.zero_grad(set_to_none=True)
        loss.backward(inputs=list(self.judge.parameters()))
        self._clip(self.judge, 10.0)
        return float(loss.detach())

    def _set_rates(self) -> float:
        share = self.learning_rate(self.step_number)
        for group in self.optimiser.param_groups:
            group["lr"] = share * group["share"] * self.recipe.learning_rate
        self.judge_optimiser.param_groups[0]["lr"] = share * self.recipe.discriminator_rate
        return share * self.recipe.learning_rate

    def _clip(self, module: nn.Module, clip: float) -> float:
        """Averages the gradients over the workers and clips them; returns their norm, the same on all workers.

        Raises:
            FloatingPointError: it is not finite.
        """
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        average_over_workers(*gradients)
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), clip))
        if norm != norm or norm == float("inf"):
            raise FloatingPointError(f"gradient norm {norm} at step {self.step_number}")
        return norm


def _with_norms(tensors: dict[str, torch.Tensor], current: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain weights as directions and lengths where `current` has these: what `weights_from_training` multiplied in.

    Rows of zeros keep their current direction, so that they can be learnt.
    """
    split = dict(tensors)
    for name, direction in current.items():
        if name.endswith("weight_v"):
            weight = split.pop(name.removesuffix("_v"))
            lengths = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
            split |= {
                name: torch.where(lengths > 0, weight, direction.to(weight)),
                name.removesuffix("v") + "g": lengths,
            }
    return split
