"""What can be set: every key with its value, default, meaning and choices, read from the dataclasses of settings."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

from pipeline.errors import SettingsError
from pipeline.settings import (
    AutoencoderSettings,
    ControlSettings,
    DatasetSettings,
    DensitySettings,
    DetectionSettings,
    EvaluationSettings,
    Params,
    SamplingSettings,
    changed_defaults,
    choices,
    describe,
    flatten,
    implementation,
    meanings_of,
    read_params,
)
from stages.run import one_line_errors

__all__ = ["CHOICES", "Key", "as_markdown", "keys_of", "settings", "settings_class"]

WIDTH = 80
# Table -> the key that names a file, the package of the files, and what is common to all rows.
CHOICES: Mapping[str, tuple[str, str, type]] = {
    "datasets": ("source", "pipeline.sources", DatasetSettings),
    "autoencoders": ("objective", "pipeline.autoencoders", AutoencoderSettings),
    "densities": ("family", "pipeline.densities", DensitySettings),
}
PLAIN: Mapping[str, type] = {
    "controls": ControlSettings,
    "sampling": SamplingSettings,
    "evaluations": EvaluationSettings,
    "detections": DetectionSettings,
}
ABSENT = "required"


@dataclass(frozen=True)
class Key:
    """A key of a row.

    Attributes:
        name: The key; those of nested settings are dotted.
        kind: What a value is, in words, choices included.
        default: The value if a row leaves the key out; `ABSENT` if none may.
        meaning: What it does.
        owner: Class that declares it.
    """

    name: str
    kind: str
    default: Any
    meaning: str
    owner: str

    @property
    def default_text(self) -> str:
        """The default as YAML, or `required`."""
        return ABSENT if self.default is ABSENT else as_yaml(self.default)


def as_yaml(value: Any) -> str:
    """A value on one line, as params.yaml has it.

    Example:
        >>> as_yaml((0.5, 0.999)), as_yaml(None), as_yaml("cosine"), as_yaml(True)
        ('[0.5, 0.999]', 'null', 'cosine', 'true')
    """
    return value if isinstance(value, str) and value else json.dumps(value)


def keys_of(cls: type, prefix: str = "") -> list[Key]:
    """The keys of a class of settings, in its order; nested settings give their own keys, dotted."""
    meanings, owners, hints = meanings_of(cls), _owners(cls), typing.get_type_hints(cls)
    keys: list[Key] = []
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if not field.init:
            continue
        default = ABSENT if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        name, kind = f"{prefix}{field.name}", hints[field.name]
        nested = next((option for option in typing.get_args(kind) if dataclasses.is_dataclass(option)), None)
        keys.append(Key(name, describe(kind), default, meanings.get(field.name, ""), owners[field.name]))
        if nested is not None:
            keys += keys_of(typing.cast(type, nested), f"{name}.")
    return keys


def _owners(cls: type) -> dict[str, str]:
    return {name: base.__name__ for base in reversed(cls.__mro__) for name in inspect.get_annotations(base)}


def settings_class(params: Params, table: str, name: str = "") -> type:
    """The class of a row's settings, or of the section `sampling`.

    Raises:
        SettingsError: When there is no such row, or it names an unknown file.
    """
    if table in PLAIN:
        return PLAIN[table]
    key, package, _ = CHOICES[table]
    return typing.cast(
        type, implementation(package, str(params.tables[table][name].get(key)), f"{table}.{name}.{key}").Settings
    )


@click.command("settings")
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print all settings of all tables as docs/settings.md.")
@click.option("--params", "params_file", default="params.yaml", show_default=True, help="Settings file.")
def settings(name: str | None, markdown: bool, params_file: str) -> None:
    """Explain settings: key, value, default, meaning and choices.

    NAME is a row of params.yaml (or TABLE.ROW), a source, an objective or a family (`lde`), or a table. Without it, lists
    what there is.
    """
    with one_line_errors("settings" + f" {name}" * bool(name)):
        if markdown:
            click.echo(as_markdown(), nl=False)
        elif name is None:
            click.echo(_overview(read_params(params_file)))
        else:
            click.echo("\n\n".join(_explained(name, read_params(params_file))))


def _overview(params: Params) -> str:
    lines = ["What `python -m stages settings NAME` explains"]
    for table in params.tables:
        lines += ["", table]
        if table in CHOICES:
            key, package, _ = CHOICES[table]
            lines += [_wrapped(", ".join(choices(package)), f"  {key}: ")]
        if table != "sampling" and params.rows(table):
            lines += [_wrapped(", ".join(params.rows(table)), "  rows: ")]
    return "\n".join(lines)


def _explained(name: str, params: Params) -> Iterator[str]:
    """One text for each row or choice of a name."""
    table, _, row = name.rpartition(".")
    rows = [t for t in params.tables if t != "sampling" and row in params.rows(t) and table in ("", t)]
    for of_table in rows:
        yield _of_row(params, of_table, row)
    if rows:
        return
    texts = []
    for of_table, (key, package, common) in CHOICES.items():
        if name == of_table:
            texts.append(_of_class(f"{name}: keys of all rows", common))
        elif row in choices(package) and table in ("", of_table, package.rpartition(".")[2]):
            texts.append(_of_class(f"{of_table} with {key}: {row}", implementation(package, row, key).Settings))
    if name in PLAIN:
        texts.append(_of_row(params, name, "") if name == "sampling" else _of_class(name, PLAIN[name]))
    yield from texts
    if not texts:
        known = [*params.tables, *(r for t in params.tables for r in params.rows(t) if t != "sampling")]
        known += [choice for _, package, _ in CHOICES.values() for choice in choices(package)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "`python -m stages settings` lists what there is"
        raise SettingsError(f"no row, table, source, objective or family has this name; {hint}")


def _of_row(params: Params, table: str, name: str) -> str:
    resolved = params.row(table, name)
    values, other = flatten(dataclasses.asdict(resolved)), changed_defaults(resolved)
    keys = [key for key in keys_of(type(resolved)) if key.name in values]
    title = f"{table}.{name}" if name else table
    blocks = [_wrapped(f"{title}: {len(other)} of {len(keys)} keys differ from their defaults, marked *")]
    for key in keys:
        default = f"   (default {as_yaml(other[key.name])})" if key.name in other else ""
        mark = "*" if key.name in other else " "
        blocks.append(f"{mark} {key.name}: {as_yaml(values[key.name])}{default}\n{_meaning(key)}")
    return "\n".join(blocks)


def _of_class(title: str, cls: type) -> str:
    return "\n".join([title, *(f"  {key.name}: {key.default_text}\n{_meaning(key)}" for key in keys_of(cls))])


def _meaning(key: Key) -> str:
    return _wrapped(f"{key.meaning} ({key.kind})" if key.meaning else key.kind, " " * 6)


def _wrapped(text: str, start: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False)


# docs/settings.md -----------------------------------------------------------------------------------------------------


def as_markdown() -> str:
    """All settings of all tables, as docs/settings.md."""
    parts = [
        "# Settings",
        "**Every key of params.yaml. This page is written from the code, by `python -m stages settings --markdown`.**",
        "`python -m stages settings ROW` explains a row with its values, `python -m stages set ROW key=value` changes them,\n"
        "and `python -m stages check` finds mistakes. Keys of nested settings are dotted: `incremental.mode` is `mode`\n"
        "in the table `incremental`.",
    ]
    for table in ("datasets", "autoencoders", "densities", "controls", "sampling", "evaluations", "detections"):
        parts.append(f"## {table}")
        if table in PLAIN:
            parts.append(_table(keys_of(PLAIN[table])))
            continue
        key, package, common = CHOICES[table]
        shared = {k.name: k for k in keys_of(common)}
        parts += [f"Keys of all rows. `{key}` names a file of `{package.replace('.', '/')}`.", _table(list(shared.values()))]
        for choice in choices(package):
            cls = implementation(package, choice, key).Settings
            keys = keys_of(cls)
            own = [k for k in keys if k.name not in shared or k.meaning != shared[k.name].meaning]
            changed = [k for k in keys if k not in own and k.default_text != shared[k.name].default_text]
            parts += [f"### {key}: {choice}", inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]]
            parts += [_table(own)] if own else []
            if changed:
                parts.append("Other defaults: " + ", ".join(f"`{k.name}: {k.default_text}`" for k in changed) + ".")
    return "\n\n".join(parts) + "\n"


def _table(keys: list[Key]) -> str:
    rows = [f"| `{k.name}` | {_cell(k.default_text)} | {_cell(k.kind)} | {_cell(k.meaning, True)} |" for k in keys]
    return "\n".join(["| key | default | value | meaning |", "|---|---|---|---|", *rows])


def _cell(text: str, prose: bool = False) -> str:
    escaped = text.replace("|", "\\|")
    return escaped if prose else escaped.replace("*", "\\*")
