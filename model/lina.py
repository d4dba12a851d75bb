"""Lina-Speech (Lemerle et al., arXiv 2410.23320): codec tokens from phonemes, with a memory of constant size.

phonemes → text encoder (transformer) ┐
codes → embedding → GLA encoder → cross-attention → GLA decoder → a head a codebook

    python -m model.lina --config tiny|60m|169m|311m|PATH

prints the sizes. Batches are padded on their right, with lengths; nothing a row gives depends on its padding.
Departures from the released code, all small: a norm before the heads, dropout on what a block adds (not on the residual
stream), and those of `model.cross_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.cross_attention import CrossAttention, TextMemory
from model.delay import BOS, PAD, delayed
from model.layers import TextBlock, at_least_float32, within
from model.lina_config import LinaConfig, ModelError
from model.mixers import GLAState, KVCache, causal_block


class Batch(NamedTuple):
    """Utterances with their texts."""

    phones: torch.Tensor
    """int [B, J], `<bos>` and `<eos>` included, padded on the right with 0."""
    phone_lengths: torch.Tensor
    """int [B], each at least 1."""
    codes: torch.Tensor
    """int [B, K, N], padded on the right with anything."""
    code_lengths: torch.Tensor
    """int [B]."""


class LinaState(NamedTuple):
    """What the model knows of the audio so far. Steps return a new one and leave theirs as it is."""

    encoder: tuple[GLAState | KVCache | None, ...]
    position: GLAState | None
    decoder: tuple[GLAState | KVCache | None, ...]


class Output(NamedTuple):
    """Of a training pass."""

    loss: torch.Tensor
    """Scalar: mean cross-entropy of all tokens, every codebook's end included."""
    codebook_losses: torch.Tensor
    """[K], detached."""
    row_losses: torch.Tensor
    """[B]: sums over a row's tokens, with gradient, for losses by speaker."""
    row_tokens: torch.Tensor
    """int [B]: tokens in those sums."""
    logits: torch.Tensor
    """[B, N + K, K, tokens]."""
    attention: torch.Tensor
    """[B, N + K, J], detached: where in the text each step was."""


class Lina(nn.Module):
    """The network; weights are initialised as the released code does it.

    `activation_checkpointing` (an attribute) computes each causal block again in backward instead of keeping it.
    """

    def __init__(self, config: LinaConfig) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        width = config.width
        self.phone_embedding = nn.Embedding(config.vocabulary, width)
        self.text_encoder = nn.ModuleList(
            TextBlock(width, config.text_heads, config.text_dropout) for _ in range(config.text_layers)
        )
        self.code_embeddings = nn.ModuleList(nn.Embedding(config.tokens, width) for _ in range(config.codebooks))
        self.encoder = nn.ModuleList(causal_block(config) for _ in range(config.encoder_layers))
        self.cross_attention = CrossAttention(config)
        self.decoder = nn.ModuleList(causal_block(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, config.codebooks * config.tokens, bias=False)

    def forward(self, batch: Batch, state: LinaState | None = None) -> Output:
        """Loss of a batch, every row starting from its row of `state` (`initial_state`)."""
        tokens = delayed(batch.codes, batch.code_lengths)
        text = self.read(batch.phones, batch.phone_lengths)
        logits, _, attention = self.advance(self.embed(tokens[:, :-1]), text, state)
        return Output(*losses(logits, tokens[:, 1:]), logits, attention.detach())

    def read(self, phones: torch.Tensor, lengths: torch.Tensor) -> TextMemory:
        """Encodes texts once for all steps: int [B, J] padded on the right, lengths [B] ≥ 1.

        A row without any phone attends to nothing and gives NaN.
        """
        filled = within(lengths, phones.shape[1])
        x = self.phone_embedding(phones)
        for block in self.text_encoder:
            x = block(x, filled)
        return self.cross_attention.read(x, lengths)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, width] of delayed tokens [B, T, K]: the sum over codebooks."""
        return sum(table(tokens[..., i]) for i, table in enumerate(self.code_embeddings))

    def advance(
        self,
        x: torch.Tensor,
        text: TextMemory,
        state: LinaState | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LinaState, torch.Tensor]:
        """Goes over embedded steps, one or many, from a state to the next.

        Args:
            x: [B, T, width], of `embed`.
            text: of `read`, B rows.
            state: of `initial_state` or of an earlier call; None is the start, with memories of zeros. Not changed.
            lengths: int [B], how many of the steps count towards the next state; None means all.

        Returns:
            (logits [B, T, K, tokens], the next state, attention over the text [B, T, J])
        """
        if state is None:
            state = LinaState((None,) * len(self.encoder), None, (None,) * len(self.decoder))
        x, encoder = self._through(self.encoder, x, state.encoder, lengths)
        read, position, attention = self.cross_attention(x, text, state.position, lengths)
        x, decoder = self._through(self.decoder, x + read, state.decoder, lengths)
        logits = self.heads(self.norm(x)).unflatten(-1, (self.config.codebooks, -1))
        return logits, LinaState(encoder, position, decoder), attention

    def step(self, tokens: torch.Tensor, text: TextMemory, state: LinaState | None = None):
        """`advance` by one step of tokens [B, K]: (logits [B, K, tokens], the next state, attention [B, J])."""
        logits, state, attention = self.advance(self.embed(tokens[:, None]), text, state)
        return logits[:, 0], state, attention[:, 0]

    def initial_state(
        self, memories: Sequence[torch.Tensor], position: torch.Tensor | None = None, batch: int | None = None
    ) -> LinaState:
        """The start of speech with memories that are set: a voice a row.

        Args:
            memories: for each encoder layer, then each decoder layer, [B, H, d_k, d_v]; one row is for all.
            position: the same for the position network, of its own sizes; None means zeros.
            batch: rows, where the memories have one.

        Raises:
            ModelError: a wrong number of layers, a wrong shape, a model of softmax attention, which has no memory.
        """
        if self.config.mixer != "gla":
            raise ModelError("a model of softmax attention has no memory to set; use one with mixer 'gla'")
        if len(memories) != self.config.layers:
            raise ModelError(f"expected memories of {self.config.layers} layers, found {len(memories)}")
        batch = len(memories[0]) if batch is None else batch
        shape = self.config.state_shape(batch)
        states = [_started(self.encoder[0], memory, shape, f"layer {i}") for i, memory in enumerate(memories)]
        if position is not None:
            block = self.cross_attention.position_network
            heads, (key, _, value) = self.config.heads, block.mixer.parts
            position = _started(block, position, (batch, heads, key // heads, value // heads), "the position network")
        split = self.config.encoder_layers
        return LinaState(tuple(states[:split]), position, tuple(states[split:]))

    def _through(self, blocks, x, states, lengths):
        after = []
        for block, state in zip(blocks, states, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, state = checkpoint(block, x, state, lengths, use_reentrant=False)
            else:
                x, state = block(x, state, lengths)
            after.append(state)
        return x, tuple(after)


def losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(loss, codebook_losses, row_losses, row_tokens) of `Output`.

    Args:
        logits: [B, T, K, tokens].
        targets: int [B, T, K]; padding and the starts that only fill the delay do not count.
    """
    counted = (targets != PAD) & (targets != BOS)
    wide = at_least_float32(logits).flatten(0, 2)
    each = F.cross_entropy(wide, targets.flatten(), reduction="none").view(targets.shape)
    each = torch.where(counted, each, 0)
    codebook_losses = each.detach().sum((0, 1)) / counted.sum((0, 1)).clamp(min=1)
    rows, tokens = each.sum((1, 2)), counted.sum((1, 2))
    return rows.sum() / tokens.sum().clamp(min=1), codebook_losses, rows, tokens


def _started(block, memory, shape, what) -> GLAState:
    """State of a block before its first step, with a memory [B or 1, H, d_k, d_v] of the given full shape."""
    if memory.ndim != 4 or memory.shape[1:] != shape[1:] or memory.shape[0] not in (1, shape[0]):
        raise ModelError(f"memory of {what} must be [B, H, d_k, d_v] = {list(shape)}, not {list(memory.shape)}")
    return GLAState(memory.expand(shape), None)


def main() -> None:
    import argparse
    import json
    from pathlib import Path

    from model.lina_config import PRESETS, PUBLISHED
    from model.mixers import parameters

    parser = argparse.ArgumentParser(prog="python -m model.lina", description="Print the sizes of a model.")
    parser.add_argument("--config", default="tiny", help=f"{', '.join(PRESETS)}, or a JSON file of sizes or of a model")
    chosen = parser.parse_args().config
    try:
        if chosen in PRESETS:
            config = PRESETS[chosen]
        else:
            content = json.loads(Path(chosen).read_text(encoding="utf-8"))
            config = LinaConfig.from_dict(content.get("sizes", content) if isinstance(content, dict) else content)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ModelError) as error:
        parser.exit(2, f"{chosen} is neither a preset ({', '.join(PRESETS)}) nor a readable config: {error}\n")
    with torch.device("meta"):
        model = Lina(config)
    for name, value in config.to_dict().items():
        print(f"{name:>18}  {value}")
    total = parameters(model)
    print(f"\n{'parameters':>18}  {total:,}")
    for name, part in model.named_children():
        print(f"{name:>18}  {parameters(part):>12,}  {parameters(part) / total:6.1%}")
    if chosen in PUBLISHED:
        print(f"{'published':>18}  {PUBLISHED[chosen]:>12,.0f}  {total / PUBLISHED[chosen] - 1:+.1%}")
    if config.mixer == "gla":
        _, heads, d_k, d_v = config.state_shape(1)
        rank_one = config.layers * (config.key_width + config.value_width)
        print(f"{'state':>18}  {config.layers} layers × [{heads}, {d_k}, {d_v}], {4 * rank_one:,} bytes at rank 1")


if __name__ == "__main__":
    main()
