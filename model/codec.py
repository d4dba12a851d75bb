"""The codec: waveforms to residual-vector-quantised codes and back, with EnCodec's network classes.

A codec is two things that travel together: a `CodecConfig` and the bytes of a safetensors file. `Codec(config,
weights)` rebuilds it from them anywhere, so a cluster ships the bytes once. The file holds what inference needs under
EnCodec's own names: convolution weights with the weight norm multiplied in, LSTMs and codebooks.

Law of padding: everything is causal and every utterance is padded with zeros to a whole number of frames first, so
what stands to its right in a batch cannot reach its frames, and an utterance has the same codes alone and in any batch
(exactly in float64; in float32 up to near ties of the nearest-neighbour search), and codes the same waveform. The one
exception would be an utterance so short that a convolution's reflection at its left edge reads past its right edge:
those are encoded and decoded alone, as EnCodec itself does it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.codec_config import CodecConfig, CodecError, CodecIdentity
from model.codec_search import nearest_codes

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class Codec:
    """Encodes and decodes batches of utterances on one device.

    Args:
        config: the architecture.
        weights: bytes of a safetensors file with the architecture's tensors.
        device: where to run.
        dtype: arithmetic, `float32` or `float64`.
        digest: expected sha256 of `weights`; None accepts any.
        threads: utterances encoded at once on a CPU; None means PyTorch's number of threads.

    Raises:
        CodecError: damaged file, other digest, tensors that do not fit the architecture.
    """

    def __init__(
        self,
        config: CodecConfig,
        weights: bytes,
        device: str = "cpu",
        dtype: str = "float32",
        digest: str | None = None,
        threads: int | None = None,
    ) -> None:
        import torch

        actual = hashlib.sha256(weights).hexdigest()
        if digest is not None and actual != digest:
            raise CodecError(
                f"weights of codec {config.name!r} have sha256 {actual[:16]}…, expected {digest[:16]}…: "
                "the file is damaged or belongs to another codec; fetch it again"
            )
        self.config, self.weights, self.device = config, weights, torch.device(device)
        self.digest = actual
        """sha256 of all weights: equal ones also decode alike."""
        self.dtype = getattr(torch, dtype)
        tensors = read_tensors(config, weights)
        self.encoder, self.decoder, self.codebooks = _networks(config, tensors, self.device, self.dtype)
        self.identity = CodecIdentity(
            name=config.name,
            digest=codes_digest(config, tensors),
            sample_rate=config.sample_rate,
            frame_rate=config.frame_rate,
            codebooks=config.codebooks,
            codebook_size=config.codebook_size,
        )
        self.fast = self._fast_encoder(threads)

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return self.config.hop

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: str = "float32", digest: str | None = None) -> Codec:
        """A codec from a local folder with `config.json` and `model.safetensors`."""
        folder = Path(folder)
        try:
            config, weights = (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
        except OSError as error:
            raise CodecError(
                f"{folder} is no codec: {error.filename} cannot be read ({error.strerror}); "
                f"a codec is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            ) from None
        return cls(read_config(config), weights, device, dtype, digest)

    @classmethod
    def random(cls, config: CodecConfig, seed: int = 0, device: str = "cpu", dtype: str = "float32") -> Codec:
        """A codec that has learnt nothing, for tests and timing: its name says `random-for-tests`."""
        from model.codec_random import random_weights

        named = CodecConfig.from_dict(config.to_dict() | {"name": f"random-for-tests-{config.name}"[:64]})
        return cls(named, random_weights(named, seed), device, dtype)

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`; loading them gives a codec with the same identity."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS_FILE).write_bytes(self.weights)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")

    def encode(self, waves: list[np.ndarray], codebooks: int | None = None) -> list[np.ndarray]:
        """Codes of utterances, computed as one batch.

        Args:
            waves: float32 [samples] each, at the codec's sample rate, not empty; as loud as they are, or as the codec
                levels them.
            codebooks: how many to compute; None means all.

        Returns:
            uint16 [codebooks, frames] each, with frames = ceil(samples / hop).

        Raises:
            CodecError: no waveforms, or another number of codebooks than the codec can give.
        """
        import torch

        depth = self._depth(codebooks)
        frames = [self._checked_frames(wave) for wave in waves]
        padded = [
            torch.from_numpy(np.pad(levelled(wave, self.config.level), (0, count * self.hop - len(wave))))
            for wave, count in zip(waves, frames, strict=True)
        ]
        long = [i for i, count in enumerate(frames) if count >= self.config.shortest]
        results: dict[int, torch.Tensor] = {}
        with torch.inference_mode(), full_precision():
            for i in sorted(set(range(len(waves))) - set(long)):
                results[i] = self._encode_batch([padded[i]], depth)[0]
            encode = self.fast.codes if self.fast else self._encode_batch
            results |= zip(long, encode([padded[i] for i in long], depth), strict=True)
            return [results[i].cpu().numpy().astype(np.uint16) for i in range(len(waves))]

    def decode(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        """Waveforms of codes, computed as one batch.

        Args:
            codes: integers [codebooks, frames] each; every item with the same number of codebooks, at most the codec's.

        Returns:
            float32 [frames · hop] each.

        Raises:
            CodecError: no codes of this codec, or not all with as many codebooks.
        """
        import torch

        if not codes:
            return []
        depth = self._depth(codes[0].shape[0])
        frames = [self._checked_codes(item, depth) for item in codes]
        long = [i for i, count in enumerate(frames) if count >= self.config.shortest]
        short = [[i] for i, count in enumerate(frames) if count < self.config.shortest]
        results: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for batch in (long, *short) if long else short:
                results |= zip(batch, self._decode_batch([codes[i] for i in batch]), strict=True)
        return [results[i] for i in range(len(codes))]

    def beside(self, decoded: np.ndarray, original: np.ndarray) -> np.ndarray:
        """`decoded`, float32 [samples], to compare with the original: as long, and as loud where the codec levels
        utterances."""
        decoded = decoded[: len(original)]
        return levelled(decoded, _loudness(original[: len(decoded)])) if self.config.level else decoded

    def _decode_batch(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        """Waveforms [frames · hop] of codes [depth, frames], padded to the longest."""
        import torch

        depth, length = codes[0].shape[0], max(item.shape[1] for item in codes)
        padded = np.zeros((len(codes), depth, length), dtype=np.int64)
        for row, item in enumerate(codes):
            padded[row, :, : item.shape[1]] = item
        indices = torch.from_numpy(padded).to(self.device)
        latent = sum(self.codebooks[k][indices[:, k]] for k in range(depth))
        audio = self.decoder(latent.transpose(1, 2))[:, 0].float().cpu().numpy()
        return [audio[row, : item.shape[1] * self.hop].copy() for row, item in enumerate(codes)]

    def _encode_batch(self, waves: list[torch.Tensor], depth: int) -> list[torch.Tensor]:
        """int64 [depth, frames] of each wave [frames · hop], by EnCodec's modules, padded to the longest."""
        import torch

        if not waves:
            return []
        batch = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        latent = self.encoder(batch.to(self.device, self.dtype).unsqueeze(1)).transpose(1, 2)
        codes = nearest_codes(latent, self.codebooks[:depth], self.config.search)
        return [row[:, : len(wave) // self.hop] for row, wave in zip(codes, waves, strict=True)]

    def _fast_encoder(self, threads: int | None):
        """The CPU's own way to encode in float32; None where EnCodec's modules do it."""
        import torch

        from model import codec_cpu

        if self.device.type != "cpu" or self.dtype != torch.float32 or not codec_cpu.available():
            return None
        return codec_cpu.FastEncoder(self.encoder, self.codebooks, self.config, threads)

    def _depth(self, codebooks: int | None) -> int:
        depth = self.config.codebooks if codebooks is None else codebooks
        if not 1 <= depth <= self.config.codebooks:
            raise CodecError(f"codec {self.config.name!r} has 1 to {self.config.codebooks} codebooks, not {depth}")
        return depth

    def _checked_frames(self, wave: np.ndarray) -> int:
        if wave.ndim != 1 or len(wave) == 0 or wave.dtype != np.float32:
            raise CodecError(f"expected a waveform float32 [samples], found {wave.dtype} {list(wave.shape)}")
        return self.config.frames(len(wave))

    def _checked_codes(self, item: np.ndarray, depth: int) -> int:
        if item.ndim != 2 or item.shape[0] != depth or item.shape[1] == 0 or item.dtype.kind not in "iu":
            raise CodecError(f"expected codes, integers [{depth}, frames], found {item.dtype} {list(item.shape)}")
        if item.min() < 0 or item.max() >= self.config.codebook_size:
            raise CodecError(
                f"codes range from {item.min()} to {item.max()}, the codec has {self.config.codebook_size}"
            )
        return item.shape[1]


def levelled(wave: np.ndarray, level: float) -> np.ndarray:
    """`wave`, float32 [samples], at a root mean square of `level`; raised by 40 dB at most, and as it is for 0."""
    return wave * np.float32(level / max(_loudness(wave), level / 100)) if level else wave


def _loudness(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


def full_precision():
    """Convolutions and LSTMs of GPUs in float32, whatever PyTorch's default is. In TF32, four in ten codes of the
    eighth codebook are others than on a CPU, but equal identities promise equal codes."""
    import torch

    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )


def read_config(content: bytes | str) -> CodecConfig:
    """Parses and checks a `config.json`. Raises CodecError."""
    try:
        values = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CodecError(f"codec {CONFIG_FILE} is not JSON: {error}") from None
    return CodecConfig.from_dict(values)


def weights_from_training(config: CodecConfig, state: dict[str, torch.Tensor], half: bool = False) -> bytes:
    """The safetensors file of a training state: weight norm multiplied in, what only training needs left out.

    `state` has EnCodec's names, with `weight_g`/`weight_v` pairs or plain `weight`s. With `half`, weights and codebooks
    are kept in float16, which makes the file half as long, and biases in float32.
    """
    import torch
    from safetensors.torch import save

    tensors = {}
    for name, value in state.items():
        if name.endswith("weight_g"):
            direction = state[name.removesuffix("g") + "v"].float()
            tensors[name.removesuffix("_g")] = torch._weight_norm(direction, value.float(), 0).contiguous()
        elif not name.endswith(("weight_v", "inited", "cluster_size", "embed_avg")):
            tensors[name] = value.float().contiguous()
    if half:
        tensors = {name: value.half() if value.dim() > 1 else value for name, value in tensors.items()}
    return save({name: value.detach().cpu().clone() for name, value in tensors.items()})


def build_networks(
    config: CodecConfig, norm: str, encoder_norm: str | None = None
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """EnCodec's encoder and decoder, newly initialised; `norm` is `weight_norm` to train, `none` to run, and
    `encoder_norm` the encoder's where that differs."""
    from model.codec_layers import with_cheap_padding
    from model.encodec_package import seanet

    sizes = dict(
        channels=1,
        dimension=config.dimension,
        n_filters=config.filters,
        n_residual_layers=config.residual_layers,
        ratios=list(config.ratios),
        kernel_size=config.kernel_size,
        last_kernel_size=config.last_kernel_size,
        residual_kernel_size=config.residual_kernel_size,
        dilation_base=config.dilation_base,
        causal=True,
        true_skip=False,
        compress=config.compress,
        lstm=config.lstm_layers,
    )
    encoder = seanet().SEANetEncoder(**sizes, norm=encoder_norm or norm)
    decoder = seanet().SEANetDecoder(**sizes, norm=norm)
    return with_cheap_padding(encoder), with_cheap_padding(decoder)


def codebook_name(level: int) -> str:
    return f"quantizer.vq.layers.{level}._codebook.embed"


def read_tensors(config: CodecConfig, weights: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a weights file by EnCodec's names. Raises CodecError if it is damaged or holds anything else."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(weights)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CodecError(f"weights of codec {config.name!r} are no complete safetensors file: {error}") from None
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.float16):
            raise CodecError(f"weights of codec {config.name!r}: {name} is {value.dtype}, expected float32 or float16")
        if not torch.isfinite(value).all():
            raise CodecError(f"weights of codec {config.name!r}: {name} has values that are not finite")
    return tensors


def codes_digest(config: CodecConfig, tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of the sizes and of the tensors by name, without the decoder's: those of equal codes."""
    sizes = {name: value for name, value in config.to_dict().items() if name != "name"}
    state = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name in sorted(name for name in tensors if not name.startswith("decoder.")):
        state.update(name.encode())
        state.update(tensors[name].float().contiguous().numpy().tobytes())
    return state.hexdigest()


def _networks(config, tensors, device, dtype):
    """(encoder, decoder, codebooks [codebooks, size, dimension]) ready to run."""
    import torch

    encoder, decoder = build_networks(config, norm="none")
    expected = {f"encoder.{name}": value.shape for name, value in encoder.state_dict().items()}
    expected |= {f"decoder.{name}": value.shape for name, value in decoder.state_dict().items()}
    shape = torch.Size((config.codebook_size, config.dimension))
    expected |= {codebook_name(level): shape for level in range(config.codebooks)}
    _require_shapes(config, expected, {name: value.shape for name, value in tensors.items()})
    for prefix, module in (("encoder.", encoder), ("decoder.", decoder)):
        module.load_state_dict({n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)})
        module.to(device, dtype).eval().requires_grad_(False)
    codebooks = torch.stack([tensors[codebook_name(level)].float() for level in range(config.codebooks)])
    return encoder, decoder, codebooks.to(device, dtype)


def _require_shapes(config: CodecConfig, expected: dict, actual: dict) -> None:
    missing, foreign = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    wrong = [
        f"{n} is {list(actual[n])}, not {list(expected[n])}"
        for n in expected
        if actual.get(n, expected[n]) != expected[n]
    ]
    problems = [f"missing {n}" for n in missing] + [f"unknown {n}" for n in foreign] + wrong
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CodecError(
            f"weights do not fit the architecture of codec {config.name!r}: {'; '.join(problems[:3])}{more}; "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} must come from the same codec"
        )
