"""One optimiser step through DeepSpeed, the same numbers whatever the stage of ZeRO and the number of workers.

Losses are sums over tokens divided by the tokens of the whole global batch, so how rows are spread over workers and
micro-batches does not matter. The optimiser refuses gradients that are not finite or far out of the usual.
"""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

# DeepSpeed looks for accelerators when it is imported, and compiles a shared-memory transport unless it is told not to.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")

import deepspeed
import torch
from torch import nn

from model.lina import Batch, Lina
from pipeline.pretrain_config import PretrainConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
os.environ.setdefault("LOCAL_RANK", "0")

_USUAL_AFTER, _USUAL_DECAY = 50, 0.98
"""Steps before a gradient can be called unusual, and the memory of what is usual."""


class StepResult(NamedTuple):
    loss: float
    """Mean cross-entropy over all tokens of the global batch."""
    codebook_losses: list[float]
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """Whether the weights stayed as they were."""
    tokens: int
    stop: bool
    """Whether any worker asked to stop after this step."""
    bad: int
    """Unreadable samples so far, of all workers; one that several of them came upon counts for each."""


class TokenLoss(nn.Module):
    """The model as DeepSpeed drives it: tensors in, sums over tokens out."""

    def __init__(self, model: Lina) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, phones: torch.Tensor, phone_lengths: torch.Tensor, codes: torch.Tensor, code_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of cross-entropies, [K] sums by codebook without gradient, int [K] tokens)."""
        output = self.model(Batch(phones, phone_lengths, codes, code_lengths))
        tokens = tokens_by_codebook(code_lengths, codes.shape[1])
        return output.row_losses.sum(), output.codebook_losses * tokens, tokens


def tokens_by_codebook(lengths: torch.Tensor, codebooks: int) -> torch.Tensor:
    """int64 [K]: predicted tokens of rows with these many frames [B]; codebook i has its codes and K - i ends."""
    late = torch.arange(codebooks, device=lengths.device)
    return lengths.sum() + len(lengths) * (codebooks - late)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves everything as it is when the norm of the whole gradient is not to be trusted.

    Every part of it that ZeRO steps separately sees the same norm, so all workers decide alike.
    """

    def __init__(self, groups: list[dict[str, Any]], explode: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.explode = explode
        self.norm_of_all: Any = lambda: math.nan
        self.usual = [0.0, 0]
        """Moving mean of log norms, and how many steps it has seen."""
        self.norm, self.refused = math.nan, True

    def expect(self) -> None:
        """Before DeepSpeed's step, which does not come here at all where it finds the gradient not finite itself."""
        self.norm, self.refused = math.nan, True

    def step(self, closure=None):
        self.norm = self.norm_of_all()
        self.refused = self.unusual(self.norm)
        return None if self.refused else super().step(closure)

    def unusual(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return True
        mean, steps = self.usual
        return steps >= _USUAL_AFTER and math.log(max(norm, 1e-30)) > mean + math.log(self.explode)

    def remember(self) -> None:
        """Counts an accepted step's norm towards what is usual."""
        mean, steps = self.usual
        share = max(1 - _USUAL_DECAY, 1 / (steps + 1))
        self.usual = [mean + share * (math.log(max(self.norm, 1e-30)) - mean), steps + 1]

    @contextmanager
    def keeping_its_own(self) -> Iterator[None]:
        """For DeepSpeed to load a checkpoint in: gives each group its options back, and each state a step of its own.

        From a universal checkpoint, ZeRO 3 sets the first group's options for all groups, and one tensor as the step of
        all states, which AdamW would count up once for each of them; on the CPU, where the fused AdamW wants it beside
        the weights.
        """
        options = [{name: group[name] for name in group if name != "params"} for group in self.param_groups]
        yield
        for group, own in zip(self.param_groups, options, strict=True):
            group.update(own)
        for parameter, state in self.state.items():
            if "step" in state:
                device = parameter.device if self.defaults["fused"] else "cpu"
                state["step"] = torch.as_tensor(state["step"]).to(device, torch.float32, copy=True)


class Engine:
    """
    Args:
        config: recipe, stage of ZeRO.
        device: of this worker.
        bf16: precision of weights and activations; the optimiser keeps float32 copies.
        load_universal: whether a universal checkpoint is going to be loaded.
        start: the model to train, of the config's sizes; None draws its weights.

    torch.distributed must have been initialised.
    """

    def __init__(
        self,
        config: PretrainConfig,
        device: torch.device,
        bf16: bool,
        load_universal: bool = False,
        start: Lina | None = None,
    ) -> None:
        self.config, self.device, self.bf16 = config, device, bf16
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = Lina(config.sizes()) if start is None else start
        model.activation_checkpointing = config.activation_checkpointing
        self.optimiser = GuardedAdamW(
            parameter_groups(model, config.weight_decay),
            config.explode,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=device.type == "cuda",
        )
        self.stage = config.zero_stage
        # Without ZeRO in float32, DeepSpeed clips before the optimiser could see the norm
        self.clips = self.stage == 0 and not bf16
        options = {
            **_fitting(config.deepspeed(), sum(p.numel() for p in model.parameters())),
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": config.accumulate,
            "gradient_clipping": 0.0 if self.clips else config.clip,
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "checkpoint": {"load_universal": load_universal},
        }
        loss = TokenLoss(model.to(device))
        self.deepspeed, *_ = deepspeed.initialize(
            model=loss, optimizer=self.optimiser, config=options, dist_init_required=False
        )
        self.optimiser.norm_of_all = self._norm

    def step(self, number: int, micro_batches: Sequence[Batch | None], stop: bool = False, bad: int = 0) -> StepResult:
        """One step of the optimiser on this worker's micro-batches; those of all workers make the global batch.

        Args:
            number: of the step; learning rate and dropout are functions of it.
            micro_batches: `accumulate` of them; None where this worker has no rows.
            stop: asks all workers to stop; all of them hear it in the result.
            bad: unreadable samples that this worker has come upon so far.
        """
        codebooks = self.config.codebooks
        filled = [tokens_by_codebook(batch.code_lengths, codebooks) for batch in micro_batches if batch is not None]
        tokens = sum(filled, torch.zeros(codebooks))
        shared = self.added_up(torch.cat([tokens.double(), torch.tensor([stop, bad], dtype=torch.float64)]))
        counts, stop, bad = shared[:-2], bool(shared[-2] > 0), int(shared[-1])
        if not counts.sum():  # nothing in the whole batch could be read
            return StepResult(math.nan, [math.nan] * codebooks, math.nan, True, 0, stop, bad)
        scale = self.world * self.config.accumulate / float(counts.sum())
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(number)
        self.deepspeed.train()
        # Dropout is a function of the step, so that a resumed run drops the same
        torch.manual_seed((self.config.seed << 32) + number * self.world + self.rank)
        sums = torch.zeros(codebooks, dtype=torch.float64)
        self.optimiser.expect()
        for batch in micro_batches:
            total, by_codebook, _ = self._forward(batch)
            sums += by_codebook.double().cpu()
            self.deepspeed.backward(total * scale)
            self.deepspeed.step()
        losses = self.added_up(sums) / counts.clamp(min=1)
        if not self.optimiser.refused:
            self.optimiser.remember()
        mean = float((losses * counts).sum() / counts.sum())
        norm, skipped = self.optimiser.norm, self.optimiser.refused
        return StepResult(mean, losses.tolist(), norm, skipped, int(counts.sum()), stop, bad)

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch | None]) -> tuple[float, list[float]]:
        """(mean loss, by codebook) over the batches of all workers, which must each have as many."""
        self.deepspeed.eval()
        sums = torch.zeros(2, self.config.codebooks, dtype=torch.float64)
        for batch in batches:
            _, by_codebook, tokens = self._forward(batch)
            sums += torch.stack([by_codebook, tokens]).double().cpu()
        sums = self.added_up(sums)
        mean = sums[0].sum() / sums[1].sum().clamp(min=1)
        return float(mean), (sums[0] / sums[1].clamp(min=1)).tolist()

    def weights(self) -> dict[str, torch.Tensor] | None:
        """The model's weights in float32 on the CPU, on the first worker; None on others. All workers must ask."""
        model = self.deepspeed.module.model
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=self.stage == 3):
            if self.rank:
                return None
            return {name: value.detach().float().cpu().clone() for name, value in model.state_dict().items()}

    def added_up(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the workers, in float64 on the CPU."""
        if self.world == 1:
            return values
        on_device = values.to(self.device)
        torch.distributed.all_reduce(on_device)
        return on_device.cpu()

    def _forward(self, batch: Batch | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if batch is None:
            return tuple(value * 0 for value in self._forward(_filler(self.config.codebooks)))
        return self.deepspeed(*(x.to(self.device, non_blocking=True) for x in batch))

    def _norm(self) -> float:
        """Of the gradient of all workers before clipping; where nobody else does it, clips."""
        if self.clips:
            return float(nn.utils.clip_grad_norm_(self.deepspeed.module.parameters(), self.config.clip))
        norm = self.deepspeed.optimizer._global_grad_norm
        return float("nan") if norm is None else float(norm)


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay, biases and norms do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _fitting(options: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Options of DeepSpeed whose buckets are no larger than the model: it sets aside and clears all of them."""
    zero = options["zero_optimization"]
    buckets = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    smaller = {name: min(zero[name], parameters) for name in buckets if isinstance(zero.get(name), int)}
    return options | {"zero_optimization": zero | smaller}


def _filler(codebooks: int) -> Batch:
    """A row that takes part in collectives where a worker has none of its own."""
    one = torch.ones(1, dtype=torch.int64)
    return Batch(one[None], one, torch.zeros(1, codebooks, 1, dtype=torch.int64), one)
