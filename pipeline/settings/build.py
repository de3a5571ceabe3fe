"""A mapping, as read from YAML -> a frozen dataclass that checks its values."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import SettingsError
from pipeline.system.files import sha256_file

__all__ = [
    "Checked",
    "NamedFile",
    "build",
    "changed_defaults",
    "check_that",
    "checked_path",
    "describe",
    "file_setting",
    "flatten",
    "meanings_of",
    "named_files",
    "shorten",
]

T = TypeVar("T")

MAX_COUNT = 10**9
PIN, PIN_DIGITS = "@sha256:", 12  # 48 bits tell apart all files that a person puts in one place


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
    """A field of settings that names a file, as `PATH@sha256:HEX`, or something else by a word such as `imagenet`.

    The digest puts the file's content into params.yaml, where DVC sees it change. Read the file by `checked_path`.

    Arguments:
        default: The value if a row omits the key.
    """
    return dataclasses.field(default=default, metadata={"file": True})


@dataclasses.dataclass(frozen=True)
class NamedFile:
    """A file that a setting names.

    Attributes:
        path: Where it is.
        digest: The first hex digits of its SHA-256 digest, at least 12; empty where the setting gives none.
    """

    path: Path
    digest: str

    @classmethod
    def of(cls, value: str) -> NamedFile:
        """The file of a setting's value, `PATH@sha256:HEX` or a path alone."""
        path, _, digest = value.partition(PIN)
        return cls(Path(path), digest)

    def pinned(self) -> str:
        """The value to write: the path with the digest of what the file holds now."""
        return f"{self.path}{PIN}{sha256_file(self.path)[:PIN_DIGITS]}"

    def check(self, key: str) -> None:
        """Compares the file with its digest.

        Arguments:
            key: The setting, as messages name it.

        Raises:
            SettingsError: When the file is missing; when the digest is missing or another, with the value to write.
        """
        if not self.path.is_file():
            raise SettingsError(f"{key}: {self.path} is missing; put the file there, or correct the path")
        if not self.digest:
            raise SettingsError(f"{key}: write {self.pinned()} (the file's content), so that a replaced file reruns its rows")
        if len(self.digest) < PIN_DIGITS or not sha256_file(self.path).startswith(self.digest):
            digest = shorten(self.digest)
            raise SettingsError(f"{key}: {self.path} isn't the file with the digest {digest}; write {self.pinned()}")


def checked_path(value: str, key: str) -> str:
    """The path of a file that a setting names, whose content is the one named; a word, such as `imagenet`, as it is.

    Arguments:
        value: The setting's value.
        key: The setting, as messages name it.

    Raises:
        SettingsError: When the file's digest is missing or another. A missing file is left to the reader's own message.
    """
    file = NamedFile.of(value)
    if os.path.isfile(file.path):
        file.check(key)
    return str(file.path)


def named_files(settings: Any) -> dict[str, NamedFile]:
    """The files that a row names, by key, there or missing; keys of nested settings are dotted.

    Values that are words, such as `imagenet`, are left out: their meaning is fixed.

    Arguments:
        settings: A dataclass of settings, with fields made by `file_setting`.
    """
    files: dict[str, NamedFile] = {}
    for spec in dataclasses.fields(settings):
        value = getattr(settings, spec.name)
        if dataclasses.is_dataclass(value):
            files |= {f"{spec.name}.{key}": file for key, file in named_files(value).items()}
        elif spec.metadata.get("file") and value and (not value.isidentifier() or os.path.isfile(value)):
            files[spec.name] = NamedFile.of(value)
    return files


def describe(kind: Any) -> str:
    """A type in words, as messages name it."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join("null" if a is types.NoneType else describe(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of " + {int: "integers", float: "numbers", str: "strings"}.get(typing.get_args(kind)[0], "values")
    if dataclasses.is_dataclass(kind):
        return "a table"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return words.get(kind, str(kind))


def meanings_of(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each attribute; a class's own words count more.

    Example:
        >>> meanings_of(NamedFile)["digest"]
        'The first hex digits of its SHA-256 digest, at least 12; empty where the setting gives none.'
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        if attributes := re.search(r"^Attributes:\n((?:[ ].*\n?|\n)*)", text, re.MULTILINE):
            entries = re.findall(r"^    (\w+): (.*\n?(?:        .*\n?)*)", attributes[1], re.MULTILINE)
            found |= {name: " ".join(meaning.split()) for name, meaning in entries}
    return found


def shorten(value: object) -> str:
    """A value as messages show it, shortened."""
    return reprlib.repr(value)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as a value of the annotation `kind`, or a SettingsError that names `where`."""
    origin = typing.get_origin(kind)
    refused = SettingsError(f"{where}: expected {describe(kind)}, got {shorten(value)}")
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
            raise SettingsError(f"{where}.{name}: missing; it must be {describe(hints[name])}")
    try:
        return cls(**arguments)
    except SettingsError as error:
        raise SettingsError(f"{where}.{error}") from None


def changed_defaults(settings: Any) -> dict[str, Any]:
    """Defaults of the keys whose values differ from them; keys of nested settings are dotted.

    Arguments:
        settings: A dataclass of settings. Keys without a default are left out.
    """
    found: dict[str, Any] = {}
    for spec in dataclasses.fields(settings):
        value = getattr(settings, spec.name)
        default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        if dataclasses.is_dataclass(value):
            found |= {f"{spec.name}.{key}": other for key, other in changed_defaults(value).items()}
        elif default is not dataclasses.MISSING and value != default:
            found[spec.name] = default
    return found


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
