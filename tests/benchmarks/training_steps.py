"""Two ways to take the same training step, for `tests/benchmarks/pretrain.py`: the job's, and PyTorch's own.

Both start from the model that they are given, and draw the same dropout.
"""

from __future__ import annotations

import logging

import torch
from torch.profiler import record_function

from model.lina import Batch, Lina
from pipeline.pretrain_config import PretrainConfig
from tests.benchmarks.step_profile import OPTIMISER


class ThroughDeepSpeed:
    """The job's own step."""

    def __init__(self, config: PretrainConfig, device: torch.device, bf16: bool, start: Lina) -> None:
        from pipeline.training_engine import Engine

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # that AdamW is not its own
        self.engine = Engine(config, device, bf16, start=start)
        self.engine.deepspeed.step = record_function(OPTIMISER)(self.engine.deepspeed.step)

    def step(self, number: int, batch: Batch) -> float:
        result = self.engine.step(number, [batch])
        assert not result.skipped, f"step {number} was skipped: gradient norm {result.grad_norm}"
        return result.loss

    def close(self) -> None:
        """DeepSpeed's weights hold themselves until they are told not to."""
        self.engine.deepspeed.destroy()


class Plain:
    """PyTorch and nothing else; it waits for the device only where somebody looks at a loss."""

    def __init__(self, config: PretrainConfig, device: torch.device, bf16: bool, start: Lina) -> None:
        from pipeline.training_engine import TokenLoss, parameter_groups

        start.activation_checkpointing = config.activation_checkpointing
        self.config, self.device = config, device
        self.loss = TokenLoss(start.to(device, torch.bfloat16 if bf16 else torch.float32))
        groups = parameter_groups(start, config.weight_decay)
        self.weights, self.copies = list(start.parameters()), []
        if bf16:
            by_weight = {weight: weight.detach().float().requires_grad_() for weight in self.weights}
            self.copies = list(by_weight.values())
            for copied in self.copies:
                copied.grad = torch.empty_like(copied)
            groups = [group | {"params": [by_weight[weight] for weight in group["params"]]} for group in groups]
        self.optimiser = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=device.type == "cuda"
        )

    def step(self, number: int, batch: Batch) -> torch.Tensor:
        torch.manual_seed((self.config.seed << 32) + number)  # the same dropout as the engine's
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate_at(number)
        total, _, tokens = self.loss(*(x.to(self.device, non_blocking=True) for x in batch))
        loss = total / tokens.sum()
        loss.backward()
        with record_function(OPTIMISER), torch.no_grad():
            if self.copies:
                torch._foreach_copy_([copied.grad for copied in self.copies], [weight.grad for weight in self.weights])
            torch.nn.utils.clip_grad_norm_(self.copies or self.weights, self.config.clip)
            self.optimiser.step()
            if self.copies:
                torch._foreach_copy_(self.weights, self.copies)
            for weight in self.weights:
                weight.grad = None
        return loss.detach()

    def close(self) -> None:
        pass
