"""What `jobs/train_codec.py` is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra import storage, tracking
from infra.config import option
from model.codec_config import CodecConfig
from pipeline.corpus_options import CorpusOptions

if TYPE_CHECKING:
    from model.codec_training.trainer import Recipe


@dataclass(frozen=True)
class TrainCodecConfig(CorpusOptions):
    """From a corpus to a codec of EnCodec's architecture."""

    data: str = option("data/demo/manifest.jsonl", "manifest or folder, as tokenize takes it; over 60 s is left out")
    output: str = option("out/codec", "local folder for the speech, the checkpoint and the exported codec")
    name: str = option("codec", "name of the codec")
    filters: int = option(32, "channels at the full sample rate; they double at every stride")
    ratios: tuple[int, ...] = option((8, 5, 4, 2), "strides, outermost last; their product is the hop")
    dimension: int = option(128, "width of the quantised vector")
    residual_layers: int = option(1, "residual blocks before each stride")
    kernel_size: int = option(7, "taps of the first convolution of encoder and decoder")
    last_kernel_size: int = option(7, "taps of their last one")
    lstm_layers: int = option(2, "LSTM layers in encoder and decoder each")
    codebooks: int = option(8, "codes a frame")
    codebook_size: int = option(1024, "entries of a codebook")
    search: int = option(1, "sums of codes that encoding keeps from codebook to codebook; 1 is EnCodec's greedy search")
    level: float = option(0.0, "root mean square that utterances are brought to before they are encoded; 0 leaves them")
    steps: int = option(10_000, "steps of the whole run; a longer run goes on from a shorter one's checkpoint")
    batch: int = option(16, "segments a step, over all workers")
    segment: float = option(1.0, "seconds of a segment")
    learning_rate: float = option(5e-5, "AdamW's, after the warm-up; without the transform start, 1e-3")
    transform_start: bool = option(True, "start as a transform codec, where the sizes allow it")
    bias_rate: float = option(0.02, "share of the learning rate for biases; without the transform start, 1")
    warmup: int = option(200, "steps to the full learning rate")
    cooldown: float = option(0.3, "share of the steps, at the end, in which the learning rate falls")
    quantise_from: int = option(500, "step at which the codebooks start; 0: from latents of the untrained networks")
    start_latents: int = option(32_768, "frames of speech from which the codebooks start")
    start_quiet: float = option(0.0, "weight of quiet frames in them: energy to the power of minus this; 1: all alike")
    full_depth: float = option(0.5, "share of the utterances that surely use all codebooks; others use one to all")
    first_alone: float = option(0.0, "share of the utterances that surely use the first codebook alone")
    start_from: str = option("", "codec whose sizes and weights training starts from: a name or a folder")
    codec_weights: str | None = option(None, "path or URL of EnCodec's own weights, for machines without internet")
    decoder_only: bool = option(
        False, "train the decoder of start_from alone: its codes, and so datasets and models, stay"
    )
    keep_lanes: bool = option(False, "with decoder_only, of a transform codec: train what is beside its lanes")
    half_precision: bool = option(False, "keep the codec's weights in float16: half the bytes")
    commitment: float = option(0.1, "pull of the latents towards their codes, as a share of the reconstruction's")
    mel_weight: float = option(1.0, "share of the mel loss in the gradient")
    time_weight: float = option(0.5, "share of the waveform's loss")
    adversarial_from: int = option(0, "step from which the discriminator judges; 0 trains without one")
    discriminator_filters: int = option(8, "channels of its layers")
    discriminator_windows: tuple[int, ...] = option((2048, 1024, 512), "samples of its spectrograms' windows")
    augment: bool = option(True, "vary level, speed, bandwidth, noise and room")
    seed: int = option(0, "of weights and batches")
    workers: int = option(1, "Ray Train workers; 1 trains in the job's own process")
    device: str = option("auto", "where the workers compute", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "threads of each worker on a CPU; 0 leaves it to PyTorch")
    log_every: int = option(50, "steps between lines of the log")
    save_every: int = option(500, "steps between checkpoints")
    evaluate_every: int = option(1000, "steps between validations with audio and spectrograms")
    tracking: str = option("", tracking.OPTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.codec()
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, not {self.steps}")
        for field in ("batch", "warmup", "workers", "start_latents", "log_every", "save_every", "evaluate_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not self.start_from and 0 < self.quantise_from >= self.steps:
            raise ValueError(
                f"quantise_from {self.quantise_from} must be below steps {self.steps}: otherwise the codebooks never "
                "start, and no codec comes out"
            )
        if self.batch % self.workers:
            raise ValueError(f"batch {self.batch} cannot be divided over {self.workers} workers")
        if self.samples < 2 * self.codec().hop:
            raise ValueError(f"segment {self.segment} s is shorter than two frames")
        if not (self.full_depth >= 0 and self.first_alone >= 0 and self.full_depth + self.first_alone <= 1):
            raise ValueError(
                f"full_depth {self.full_depth} and first_alone {self.first_alone} must be shares of one whole"
            )
        if self.decoder_only and not self.start_from:
            raise ValueError("decoder_only needs a codec to start_from")
        if self.keep_lanes and not self.decoder_only:
            raise ValueError("keep_lanes needs decoder_only: an encoder's lanes are not kept")
        if self.codec_weights and self.start_from != "encodec_24khz":
            raise ValueError(
                f"codec_weights needs start_from encodec_24khz, whose weights they are, not {self.start_from!r}"
            )
        if not storage.is_local(self.output):
            raise ValueError(f"output {self.output} must be a local folder or one that all workers have mounted")

    @property
    def samples(self) -> int:
        """Samples of a segment: a whole number of frames."""
        codec = self.codec()
        return int(self.segment * codec.sample_rate) // codec.hop * codec.hop

    def codec(self) -> CodecConfig:
        return CodecConfig(
            self.name,
            filters=self.filters,
            ratios=tuple(self.ratios),
            dimension=self.dimension,
            residual_layers=self.residual_layers,
            lstm_layers=self.lstm_layers,
            kernel_size=self.kernel_size,
            last_kernel_size=self.last_kernel_size,
            codebooks=self.codebooks,
            codebook_size=self.codebook_size,
            search=self.search,
            level=self.level,
        )

    def recipe(self) -> Recipe:
        from model.codec_training.trainer import Recipe

        return Recipe(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe) if hasattr(self, f.name)})
