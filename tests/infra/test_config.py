"""Configurations: the last one wins, and nothing wrong gets through."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import ConfigError, add_arguments, from_arguments, load, option


@dataclass(frozen=True)
class Settings:
    name: str = option("demo", "What to call it.")
    size: int = option(3, "How many; 100 % of them.")
    rate: float = option(0.5, "A second.")
    fast: bool = option(True, "Or slow.")
    device: str = option("auto", "Where.", choices=("auto", "cpu", "cuda"))
    limit: float | None = option(None, "At most.")
    bands: tuple[int, ...] = option((1, 2), "Which.")

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}")


def parsed(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser, Settings)
    return from_arguments(Settings, parser.parse_args(words))


def yaml(tmp_path: Path, text: str) -> str:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    return str(file)


def test_defaults_then_the_file_then_the_command_line(tmp_path: Path) -> None:
    file = yaml(tmp_path, "size: 7\nrate: 2\nfast: false\nbands: [4, 5]\nlimit: 1.5\n")
    assert parsed() == Settings()
    assert parsed("--config", file) == Settings(size=7, rate=2.0, fast=False, bands=(4, 5), limit=1.5)
    together = parsed("--config", file, "--size", "9", "--fast", "--limit", "none", "--bands", "8")
    assert together == Settings(size=9, rate=2.0, fast=True, bands=(8,), limit=None)
    assert parsed("--no-fast").fast is False
    assert load(Settings, yaml(tmp_path, "")) == Settings(), "an empty file changes nothing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise: 7", "unknown field 'sise'; did you mean 'size'?"),
        ("zzzzzz: 7", "known fields: bands, device"),
        ("size: many", "size must be int, not 'many'"),
        ("size: 1.5", "size must be int, not 1.5"),
        ("size: .inf", "size must be int, not inf"),
        ("size: true", "size must be int, not True"),
        ("name: 5", "name must be str, not 5"),
        ("rate: []", r"rate must be float, not \[\]"),
        ("fast: perhaps", "fast must be bool, not 'perhaps'"),
        ("bands: [1, x]", r"bands must be comma-separated ints, not \[1, 'x'\]"),
        ("limit: high", "limit must be float, not 'high'"),
        ("device: tpu", "device must be one of auto, cpu, cuda, not 'tpu'"),
        ("size: 0", "size must be at least 1, not 0"),
        ("- 1\n- 2", "expected 'field: value' lines, found list"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Settings, yaml(tmp_path, text))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load(Settings, tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(Settings, tmp_path / "binary.yaml")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        load(Settings, yaml(tmp_path, f"name: !!python/object/apply:os.system ['touch {tmp_path}/made']"))
    assert not (tmp_path / "made").exists()


def test_help_shows_every_field_its_kind_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--size int How many; 100 % of them. (default: 3)" in shown
    assert "--device auto|cpu|cuda" in shown and "--fast, --no-fast" in shown and "(default: 1,2)" in shown


@given(
    st.builds(
        Settings,
        name=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1).filter(lambda t: t[0] != "-"),
        size=st.integers(1, 10**9),
        rate=st.floats(allow_nan=False),
        fast=st.booleans(),
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        limit=st.none() | st.floats(0, 1e9),
        bands=st.lists(st.integers(0, 99), max_size=4).map(tuple),
    )
)
def test_the_command_line_can_say_whatever_a_file_can(settings: Settings) -> None:
    words = []
    for name, value in asdict(settings).items():
        if name == "fast":
            words.append("--fast" if value else "--no-fast")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).replace("None", "none")
            words.append(f"--{name}={shown}" if name != "name" else f"--name={value}")
    assert parsed(*words) == settings
    assert load(Settings, overrides=asdict(settings)) == settings
