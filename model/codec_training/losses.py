"""What a codec is trained on: mel distances at several resolutions, and a balancer that makes weights mean shares."""

from __future__ import annotations

import math

import torch
from torch import nn

from model.codec_training.quantiser import on_all_workers


class MelDistance(nn.Module):
    """Mean absolute difference of log-mel spectrograms over several window lengths (EnCodec section 3.4).

    Args:
        sample_rate: Hz.
        windows: samples; each scale has a hop of a quarter window and about a twelfth of a window mel bands.
        floor: magnitude under which nothing is heard.
    """

    def __init__(
        self, sample_rate: int, windows: tuple[int, ...] = (128, 256, 512, 1024, 2048), floor: float = 1e-4
    ) -> None:
        super().__init__()
        self.windows, self.floor = windows, floor
        for size in windows:
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)
            bank = mel_bank(sample_rate, size, max(8, min(128, size // 12)))
            self.register_buffer(f"bank_{size}", bank, persistent=False)

    def forward(self, decoded: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """Both [batch, samples]; returns a scalar."""
        total = decoded.new_zeros(())
        for size in self.windows:
            total = total + (self.log_mel(decoded, size) - self.log_mel(original, size)).abs().mean()
        return total / len(self.windows)

    def log_mel(self, audio: torch.Tensor, size: int) -> torch.Tensor:
        """[batch, bands, frames] of [batch, samples]."""
        window = getattr(self, f"window_{size}")
        spectrum = torch.stft(audio, size, size // 4, window=window, normalized=True, return_complex=True)
        # sqrt(re² + im² + ε) has a gradient at silence, |·| has none
        magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-10)
        return torch.log(getattr(self, f"bank_{size}") @ magnitude + self.floor)


class Balancer:
    """Turns loss weights into shares of the gradient at the decoder's output (EnCodec section 3.4).

    Each loss's gradient is divided by the moving average of its norm, so that a loss with weight w gives w / Σw of the
    update whatever its scale.
    """

    def __init__(self, weights: dict[str, float], decay: float = 0.99) -> None:
        self.weights, self.decay = weights, decay
        self.norms: dict[str, float] = {}
        self.steps: dict[str, int] = {}

    def gradient(self, losses: dict[str, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """The gradient to send backward through `output` [batch, …]; losses without a positive weight are left out.

        Raises:
            FloatingPointError: a gradient that is not finite, on any worker; the averages are as before.
        """
        total = sum(self.weights[name] for name in losses)
        weighed = {name: loss for name, loss in losses.items() if self.weights[name] > 0}
        gradients = {name: torch.autograd.grad(loss, output, retain_graph=True)[0] for name, loss in weighed.items()}
        norms = {name: float(gradient.flatten(1).norm(dim=1).mean()) for name, gradient in gradients.items()}
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if not on_all_workers(not bad, output.device):
            raise FloatingPointError(f"the gradient of a loss is not finite: {', '.join(bad) or 'on another worker'}")
        combined = torch.zeros_like(output)
        for name, gradient in gradients.items():
            combined += gradient * (self.weights[name] / total / max(self._average(name, norms[name]), 1e-12))
        return combined

    def _average(self, name: str, norm: float) -> float:
        """Moving average of the norms so far, unbiased from the first step on."""
        self.norms[name] = self.norms.get(name, 0.0) * self.decay + norm * (1 - self.decay)
        self.steps[name] = self.steps.get(name, 0) + 1
        return self.norms[name] / (1 - self.decay ** self.steps[name])

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"norms": dict(self.norms), "steps": dict(self.steps)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self.norms = {name: float(value) for name, value in state["norms"].items()}
        self.steps = {name: int(value) for name, value in state["steps"].items()}


def mel_bank(sample_rate: int, window: int, bands: int) -> torch.Tensor:
    """Triangular mel filters [bands, window // 2 + 1] of unit area, so wide and narrow bands weigh alike."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    bank = torch.minimum(rising, falling).clamp(min=0)
    return (bank / bank.sum(dim=1, keepdim=True).clamp(min=1e-3)).float()
