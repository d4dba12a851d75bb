"""How much arithmetic a training step takes, for model FLOP/s utilisation (PaLM, Chowdhery et al. 2022, appendix B).

Counted is what the mathematics asks for: multiplications and additions of matrix products forward, and twice that
backward. What a kernel or activation checkpointing computes again does not count.
"""

from __future__ import annotations

from model.lina_config import LinaConfig
from model.mixers import position_widths


def training_flops(config: LinaConfig, steps: float, phones: float, scores: float, squares: float) -> float:
    """FLOP of forward and backward.

    Args:
        steps: model steps of all rows together.
        phones: phonemes of all rows together.
        scores: sum over rows of steps · phones, the size of the cross-attention's maps.
        squares: sum over rows of steps², twice what causal softmax attention looks at.
    """
    forward = steps * _step(config) + phones * _phone(config) + scores * _score(config)
    if config.mixer == "attention":
        forward += squares * config.layers * 2 * config.attention_width  # q k^T, and its sum over values
    return 3 * forward


def _step(config: LinaConfig) -> float:
    """Forward, of one step of audio without what depends on lengths."""
    width, position = config.width, config.position_width
    block = _mixer(width, config.key_width, config.value_width, config.heads, config.gate_rank) + _swiglu(width)
    if config.mixer == "attention":  # as many parameters as the GLA block, and no state
        block -= _state(config.key_width, config.value_width, config.heads)
    positions = _mixer(position, *position_widths(config), config.heads, config.gate_rank) + _swiglu(position)
    return config.layers * block + positions + 2 * width * width + 2 * width * config.codebooks * config.tokens


def _phone(config: LinaConfig) -> float:
    """Forward, of one phoneme; attention among some hundred phonemes is left out."""
    width = config.width
    return config.text_layers * (2 * width * 3 * width + _swiglu(width)) + 2 * 2 * width * width


def _score(config: LinaConfig) -> float:
    """Of each pair of step and phoneme: two maps, two sums over the text."""
    return 4 * config.width + 4 * config.position_width


def _mixer(width: int, keys: int, values: int, heads: int, rank: int) -> float:
    projections = width * (2 * keys + 2 * values) + values * width + rank * (width + keys)
    return 2 * projections + _state(keys, values, heads)


def _state(keys: int, values: int, heads: int) -> float:
    return 2 * 2 * keys * values / heads  # k v^T into it, q out of it


def _swiglu(width: int) -> float:
    return 2 * 3 * width * (4 * width // 3)
