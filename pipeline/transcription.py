"""Speech recognition for recordings without text, and for judging speech: Whisper through faster-whisper (extra `asr`).

A model is a folder in CTranslate2's format (a path or a URL), one of `pipeline.asr_models.BUNDLED`, or a name that
faster-whisper knows and downloads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pipeline.asr_models import BUNDLED, TranscriptionUnavailable, model_folder
from pipeline.audio import resample
from pipeline.utterances import Unusable

if TYPE_CHECKING:
    import numpy as np

_RATE = 16_000
_WINDOW_SECONDS = 30
_LEAST_LOG_PROBABILITY, _MOST_COMPRESSION = -1.0, 2.4
"""Where Whisper's own decoding takes a result for failed: unsure of its words, or repeating itself."""


class Transcript(NamedTuple):
    """What was heard, the mean log probability of its least sure window, its highest compression ratio (repeats)."""

    text: str
    log_probability: float
    compression: float


class Transcriber:
    """Whisper with greedy or beam search at temperature 0 on a fixed number of threads: same audio, same text.

    Args:
        model: folder, URL of a folder, name of a bundled model, or a faster-whisper name (downloaded by it).
        device: `cpu`, `cuda` or `auto`.
        compute_type: of CTranslate2: `int8` suits CPUs, `float16` GPUs.
        beam: hypotheses kept; 1 is greedy.

    Raises:
        TranscriptionUnavailable: the extra is not installed, or no such model.
    """

    def __init__(
        self,
        model: str,
        device: str = "cpu",
        compute_type: str = "int8",
        beam: int = 5,
        *,
        language: str = "en",
        threads: int = 1,
    ) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise TranscriptionUnavailable("transcribing needs the extra: pip install 'lina-ray[asr]'") from None
        try:
            folder = str(model_folder(model))
            self._model = WhisperModel(folder, device, compute_type=compute_type, cpu_threads=threads)
        except TranscriptionUnavailable:
            raise
        except Exception as error:
            bundled = ", ".join(BUNDLED)
            detail = f"{model!r} cannot be loaded ({error}); give a CTranslate2 Whisper folder or one of: {bundled}"
            raise TranscriptionUnavailable(detail) from error
        self._options = {
            "language": language,
            "beam_size": beam,
            "temperature": 0.0,
            "condition_on_previous_text": False,
        }

    def transcribe(self, samples: np.ndarray, rate: int) -> str:
        """Text of float32 [n] mono at `rate` Hz; '' where nothing is heard."""
        return self.listen(samples, rate).text

    def listen(self, samples: np.ndarray, rate: int) -> Transcript:
        """`transcribe` with how sure it is."""
        audio = resample(samples, rate, _RATE)
        fits_one_window = len(audio) <= _WINDOW_SECONDS * _RATE
        segments, _ = self._model.transcribe(audio, without_timestamps=fits_one_window, **self._options)
        heard = list(segments)
        text = " ".join(segment.text.strip() for segment in heard).strip()
        log_probability = min((segment.avg_logprob for segment in heard), default=0.0)
        return Transcript(text, log_probability, max((segment.compression_ratio for segment in heard), default=0.0))


def usable_text(transcript: Transcript) -> str:
    """The text, if it is one to train on.

    Raises:
        Unusable: `no-speech`, or `unsure-transcript` by the limits at which Whisper's own decoder retries.
    """
    if not transcript.text:
        raise Unusable("no-speech", "the recogniser heard nothing")
    text, log_probability, compression = transcript
    if log_probability < _LEAST_LOG_PROBABILITY or compression > _MOST_COMPRESSION:
        sureness = f"mean log probability {log_probability:.2f}, compression ratio {compression:.2f}"
        raise Unusable("unsure-transcript", f"{sureness}: {text[:80]!r}")
    return text
