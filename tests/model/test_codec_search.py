"""Searching codes: the best sums of a small quantiser, the greedy ones where asked, the same on every road."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.codec import Codec
from model.codec_config import CodecConfig, CodecError
from model.codec_search import nearest_codes
from model.codec_training.quantiser import ResidualQuantiser

SMALL = CodecConfig("small", filters=4, ratios=(4, 4), dimension=8, lstm_layers=0, codebooks=4, codebook_size=32)


def drawn(seed: int, frames: int, depth: int, size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [1, frames, width] and codebooks [depth, size, width], whose codes shrink from level to level."""
    generator = torch.Generator().manual_seed(seed)
    shrinking = 0.6 ** torch.arange(depth, dtype=torch.float64).view(-1, 1, 1)
    codebooks = torch.randn(depth, size, width, generator=generator, dtype=torch.float64) * shrinking
    return torch.randn(1, frames, width, generator=generator, dtype=torch.float64), codebooks


def errors(latent: torch.Tensor, codebooks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[frames]: squared distances of latents to the sums of their codes."""
    total = sum(codebook[level] for codebook, level in zip(codebooks, codes[0], strict=True))
    return (latent[0] - total).pow(2).sum(1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 4), size=st.sampled_from([2, 4]), frames=st.integers(1, 130))
def test_a_search_that_keeps_everything_finds_the_best_sum(seed: int, depth: int, size: int, frames: int) -> None:
    latent, codebooks = drawn(seed, frames, depth, size, 3)
    found = errors(latent, codebooks, nearest_codes(latent, codebooks, size**depth))
    every = torch.tensor(list(itertools.product(range(size), repeat=depth))).t()
    sums = sum(codebook[row] for codebook, row in zip(codebooks, every, strict=True))
    torch.testing.assert_close(found, torch.cdist(latent[0], sums).min(dim=1).values.pow(2))


def test_a_search_of_one_takes_the_nearest_of_each_codebook_in_turn() -> None:
    latent, codebooks = drawn(0, 100, 4, 16, 5)
    residual = latent[0]
    for level, row in enumerate(nearest_codes(latent, codebooks)[0]):
        assert torch.equal(row, torch.cdist(residual, codebooks[level]).argmin(dim=1))
        residual = residual - codebooks[level][row]


def test_the_more_candidates_the_smaller_the_error() -> None:
    latent, codebooks = drawn(1, 500, 6, 16, 8)
    means = [float(errors(latent, codebooks, nearest_codes(latent, codebooks, n)).mean()) for n in (1, 2, 8, 32)]
    assert means == sorted(means, reverse=True)
    assert means[2] < 0.9 * means[0]


def test_all_roads_search_alike() -> None:
    """The CPU's own encoder, EnCodec's modules in float64, several utterances at once, and training's quantiser."""
    codec = Codec.random(dataclasses.replace(SMALL, search=4), seed=3)
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (16 * 400, 16 * 90 + 3)]
    exact = Codec(codec.config, codec.weights, dtype="float64")
    quantiser = ResidualQuantiser(codec.config).double().eval()
    for wave, together, precise in zip(waves, codec.encode(waves), exact.encode(waves), strict=True):
        np.testing.assert_array_equal(exact.encode([wave])[0], precise)
        assert (together == precise).mean() > 0.98
        padded = torch.from_numpy(np.pad(wave, (0, -len(wave) % codec.hop))).double()[None, None]
        latent = exact.encoder(padded)
        for level in range(4):
            quantiser.begin(level, exact.codebooks[level])
        quantiser.embed = exact.codebooks
        np.testing.assert_array_equal(quantiser(latent, torch.tensor([4])).codes[0].numpy(), precise)
    greedy = Codec(SMALL, codec.weights, dtype="float64").encode(waves)
    assert any((a != b).any() for a, b in zip(greedy, exact.encode(waves), strict=True))


def test_a_codec_that_searches_is_another_one() -> None:
    """Its codes are others; a codec from before there was a choice keeps its digest, whatever a config leaves out."""
    codec = Codec.random(SMALL)
    searching = Codec(dataclasses.replace(codec.config, search=4), codec.weights)
    assert searching.identity.digest != codec.identity.digest
    assert not {"search", "level"} & codec.config.to_dict().keys()
    assert CodecConfig.from_dict(searching.config.to_dict()) == searching.config
    with pytest.raises(CodecError, match="search must be a whole number from 1 to 64, not 0"):
        dataclasses.replace(SMALL, search=0)


def test_levelled_codes_do_not_hear_how_loud_it_was() -> None:
    codec = Codec.random(dataclasses.replace(SMALL, level=0.1), seed=1, dtype="float64")
    rng = np.random.default_rng(0)
    wave = 0.03 * rng.standard_normal(16 * 300).astype(np.float32)
    (codes,) = codec.encode([wave])
    np.testing.assert_array_equal(codec.encode([16 * wave])[0], codes)
    plain = Codec(dataclasses.replace(codec.config, level=0.0), codec.weights, dtype="float64")
    assert (plain.encode([wave])[0] != codes).mean() > 0.2
    assert (
        plain.encode([wave * np.float32(0.1 / np.sqrt(np.mean(wave**2, dtype=np.float64)))])[0] == codes
    ).mean() > 0.99
    (decoded,) = codec.decode([codes])
    beside = codec.beside(decoded, wave[:-5])
    assert len(beside) == len(wave) - 5
    assert np.sqrt(np.mean(beside**2)) == pytest.approx(np.sqrt(np.mean(wave[:-5] ** 2)), rel=1e-3)
    assert np.isfinite(codec.encode([np.zeros(4800, np.float32)])[0]).all()
    with pytest.raises(CodecError, match="level must be a number from 0 to"):
        dataclasses.replace(SMALL, level=-1.0)
