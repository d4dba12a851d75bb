"""Configurations: frozen dataclasses, filled from YAML and the command line, refused before any work when wrong.

The documentation of a field is its `metadata["help"]` (use `option`); `add_arguments` turns every field into a
`--field-name` of argparse, so that a job's command line and its YAML file cannot drift apart. A dataclass checks its
own values in `__post_init__` by raising ValueError with the field's name.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that cannot be used: says which field, what is wrong with it and what would be right."""


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with a default, its documentation and, if the values are few, those values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def load(kind: type[Config], file: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Defaults of `kind`, then the YAML file, then `overrides`; the last one wins.

    Raises:
        ConfigError: unreadable file, unknown field, wrong type, value outside its choices or refused by the dataclass.
    """
    values: dict[str, Any] = {}
    for source, given in ((str(file), _read_yaml(file) if file else {}), ("command line", overrides or {})):
        for name, value in given.items():
            values[name] = _checked(kind, name, value, source)
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from None


def add_arguments(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds `--config FILE` and one option for each field; read them back with `from_arguments`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with any options below; the command line wins")
    types_ = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        shown = "" if field.default in (None, "", dataclasses.MISSING) else f" (default: {_as_typed(field.default)})"
        help_ = (field.metadata.get("help", "") + shown).replace("%", "%%")
        if types_[field.name] is bool:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"metavar": "|".join(field.metadata.get("choices") or (_type_name(types_[field.name]),))}
        parser.add_argument(flag, dest=field.name, default=None, help=help_, **how)


def _as_typed(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def from_arguments(kind: type[Config], arguments: argparse.Namespace) -> Config:
    names = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    return load(kind, arguments.config, given)


def _read_yaml(file: str | Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected 'field: value' lines, found {type(content).__name__}")
    return content


def _checked(kind: type, name: str, value: Any, source: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if name not in fields:
        import difflib

        close = difflib.get_close_matches(str(name), fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(fields))}"
        raise ConfigError(f"{source}: unknown field {name!r}; {hint}")
    expected = typing.get_type_hints(kind)[name]
    converted = _convert(value, expected)
    if converted is _REFUSED:
        raise ConfigError(f"{source}: {name} must be {_type_name(expected)}, not {value!r}")
    choices = fields[name].metadata.get("choices")
    if choices and converted is not None and converted not in choices:
        raise ConfigError(f"{source}: {name} must be one of {', '.join(choices)}, not {value!r}")
    return converted


_REFUSED = object()


def _convert(value: Any, expected: Any) -> Any:
    """`value` as `expected`, reading text as the command line gives it; `_REFUSED` where that cannot be."""
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        kinds = typing.get_args(expected)
        if type(None) in kinds and value in (None, "none", "null"):
            return None
        results = (_convert(value, kind) for kind in kinds if kind is not type(None))
        return next((result for result in results if result is not _REFUSED), _REFUSED)
    if typing.get_origin(expected) is tuple:
        element = typing.get_args(expected)[0]
        parts = (value.split(",") if value else []) if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return _REFUSED
        converted = tuple(_convert(part, element) for part in parts)
        return _REFUSED if any(part is _REFUSED for part in converted) else converted
    if expected is bool:
        return {"true": True, "false": False}.get(str(value).lower(), _REFUSED)
    if expected is str:
        return value if isinstance(value, str) else _REFUSED
    if expected in (int, float):
        if isinstance(value, bool):
            return _REFUSED
        try:
            number = expected(value)
        except (TypeError, ValueError, OverflowError):
            return _REFUSED
        return _REFUSED if expected is int and isinstance(value, float) and number != value else number
    return value if isinstance(expected, type) and isinstance(value, expected) else _REFUSED


def _type_name(expected: Any) -> str:
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        return " or ".join(_type_name(kind) for kind in typing.get_args(expected) if kind is not type(None))
    if typing.get_origin(expected) is tuple:
        return f"comma-separated {_type_name(typing.get_args(expected)[0])}s"
    return getattr(expected, "__name__", str(expected))
