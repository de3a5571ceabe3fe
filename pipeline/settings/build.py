"""A mapping, as read from YAML -> a frozen dataclass that checks its values."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import SettingsError

__all__ = ["Checked", "build", "check_that", "file_setting", "flatten", "named_files", "shorten"]

T = TypeVar("T")

MAX_COUNT = 10**9


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base of all settings: with several bases, each class checks its own values in `__post_init__`."""

    def __post_init__(self) -> None:
        """Checks the values; a subclass calls this first."""
        for key, value in vars(self).items():
            # Products of two such numbers still fit into 64 bits; an allocation reports what is too large for the memory.
            if type(value) is int and "seed" not in key:
                check_that(abs(value) <= MAX_COUNT, key, f"must be at most {MAX_COUNT}")


def check_that(condition: bool, key: str, message: str) -> None:
    """Rejects a value, from a dataclass's `__post_init__`.

    Raises:
        SettingsError: When the condition doesn't hold; `build` puts the row's name before the key.
    """
    if not condition:
        raise SettingsError(f"{key}: {message}")


def file_setting(default: str | None = None) -> Any:
    """A field of settings whose value is the path of a file, whose content affects results.

    Arguments:
        default: The value if a row omits the key.
    """
    return dataclasses.field(default=default, metadata={"file": True})


def named_files(settings: Any) -> dict[str, Path]:
    """The files that a row names, by key; keys of nested settings are dotted.

    Values that aren't files, such as `imagenet`, are left out: their meaning is fixed.

    Arguments:
        settings: A dataclass of settings, with fields made by `file_setting`.
    """
    files: dict[str, Path] = {}
    for spec in dataclasses.fields(settings):
        value = getattr(settings, spec.name)
        if dataclasses.is_dataclass(value):
            files |= {f"{spec.name}.{key}": path for key, path in named_files(value).items()}
        elif spec.metadata.get("file") and value and Path(value).is_file():
            files[spec.name] = Path(value)
    return files


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join("null" if a is types.NoneType else _describe(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {_describe(typing.get_args(kind)[0])}"
    if dataclasses.is_dataclass(kind):
        return "a table"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return words.get(kind, str(kind))


def shorten(value: object) -> str:
    """A value as messages show it, shortened."""
    return reprlib.repr(value)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as a value of the annotation `kind`, or a SettingsError that names `where`."""
    origin = typing.get_origin(kind)
    refused = SettingsError(f"{where}: expected {_describe(kind)}, got {shorten(value)}")
    if origin is Literal:
        if type(value) is str and value in typing.get_args(kind):
            return value
        raise refused
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in typing.get_args(kind):
            return None
        for option in typing.get_args(kind):
            if option is types.NoneType:
                continue
            if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
                return _coerce(option, value, where)
            try:
                return _coerce(option, value, where)
            except SettingsError:
                continue
        raise refused
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise refused
        return tuple(_coerce(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise refused
        return build(typing.cast(type, kind), value, where)
    if kind is bool and type(value) is bool:
        return value
    if kind is int and type(value) is int and abs(value) < 2**63:
        return value
    if kind is str and type(value) is str:
        return value
    if kind is float:
        # PyYAML reads 1e-4 as a string and DVC as a number: take both.
        if type(value) is str:
            try:
                value = float(value)
            except ValueError:
                raise refused from None
        if type(value) is int and abs(value) < 2**63:
            return float(value)
        if type(value) is float and math.isfinite(value):
            return value
    raise refused


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from a mapping; every key must be known and every value of its declared type.

    Arguments:
        cls: The dataclass.
        values: The mapping, as read from YAML.
        where: Its name in messages, for example `densities.digits-iae-lde`.

    Raises:
        SettingsError: Naming `where` and the key.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "known keys: " + ", ".join(sorted(known))
            raise SettingsError(f"{where}.{key}: unknown key; {hint}")
        arguments[key] = _coerce(hints[key], value, f"{where}.{key}")
    for name, spec in known.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise SettingsError(f"{where}.{name}: missing; it must be {_describe(hints[name])}")
    try:
        return cls(**arguments)
    except SettingsError as error:
        raise SettingsError(f"{where}.{error}") from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys.

    Example:
        >>> flatten({"a": {"b": 1}, "c": [2, 3]})
        {'a.b': 1, 'c': [2, 3]}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
