"""Changing settings from the command line: params.yaml is edited in place, comments kept, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError, SettingsError
from pipeline.settings import Params
from pipeline.settings.params import ROW_NAME
from pipeline.system.files import write_text
from stages.reporting.states import DONE, states
from stages.run import one_line_errors
from stages.tools.rows import edit_row, parse, plain, read_text, with_line_ends_of
from stages.tools.settings import as_yaml, settings_class

__all__ = ["set"]


def _complete(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    from pipeline.settings import read_params

    try:
        params = read_params()
    except PipelineError:
        return []
    names = dict.fromkeys(row for table in params.tables if table != "sampling" for row in params.rows(table))
    return [name for name in (*names, "sampling") if name.startswith(start)]


@click.command("set")
@click.argument("row", shell_complete=_complete)
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE ..")
@click.option("--as", "new_name", default="", metavar="NEW", help="Leave ROW as it is, and add a row NEW with the changes.")
@click.option("--params", "params_file", default="params.yaml", show_default=True, help="Settings file.")
def set(row: str, changes: tuple[str, ...], new_name: str, params_file: str) -> None:
    """Change settings of a row of params.yaml, and say what `dvc repro` will run again.

    ROW is a row's name, TABLE.ROW where several tables have such a row and key, or `sampling`. A VALUE is YAML: 3, true,
    [1, 2], null. Keys of nested settings are dotted: incremental.mode=nested_dropout. Comments stay; nothing is written if
    `check` would reject the result.
    """
    with one_line_errors(f"set {row}"):
        path = Path(params_file).resolve()
        original = read_text(path)
        text = original.replace("\r\n", "\n")
        before = Params(plain(parse(text, params_file) or {}))
        values = _values(changes)
        place = _place(before, row, values)
        if new_name and (place == "sampling" or not ROW_NAME.fullmatch(new_name)):
            raise SettingsError("--as: a row's name is made of a-z, 0-9 and dashes, and sampling has no rows")
        edited = edit_row(text, place, values, new_name, params_file)
        after = Params(plain(parse(edited, params_file)))
        write_text(path, with_line_ends_of(original, edited))
        table = place.partition(".")[0]
        target = f"{table}.{new_name}" if new_name else place
        for key, value in values.items():
            old = _look_up(before.tables, f"{place}.{key}")
            shown = f"{as_yaml(old)} -> " if old is not None else "default -> "
            click.echo(f"{target}.{key}: {shown}{as_yaml(value)}")
        click.echo(_reruns(before, after))


def _values(changes: tuple[str, ...]) -> dict[str, Any]:
    """Values by key."""
    values: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not all(key.split(".")):
            raise SettingsError(f"'{change}': expected KEY=VALUE, as in epochs=20")
        values[key] = plain(parse(f"value: {text}" if text else "value: ''", f"the value of {key}")["value"])
    return values


def _place(params: Params, row: str, values: Mapping[str, Any]) -> str:
    """Table and name of the row that has all the keys."""
    table, _, name = row.rpartition(".")
    if row == "sampling":
        return row
    tables = [t for t in params.tables if t != "sampling" and name in params.rows(t) and table in ("", t)]
    if not tables:
        known = list(dict.fromkeys(r for t in params.tables if t != "sampling" for r in params.rows(t)))
        raise SettingsError(f"params.yaml has no such row; rows: {', '.join(known) or 'none'}")
    fitting = []
    for candidate in tables:
        fields = {field.name for field in dataclasses.fields(settings_class(params, candidate, name))}
        if all(key.partition(".")[0] in fields for key in values):
            fitting.append(candidate)
    if len(fitting) > 1:
        rows = " or ".join(f"{candidate}.{name}" for candidate in fitting)
        raise SettingsError(f"{', '.join(values)}: several rows have this name and such a key; write {rows}")
    return f"{(fitting or tables)[0]}.{name}"  # a key that none has is rejected with the nearest one


def _look_up(tables: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tables
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _reruns(before: Params, after: Params) -> str:
    """What the change makes out of date, by dvc.lock."""
    old, new = states(before), states(after)
    stages: dict[str, list[str]] = {}
    for (stage, row), state in new.items():
        if state not in (DONE, old.get((stage, row))):
            stages.setdefault(row, []).append(stage)
    report = stages.pop("", [])
    waiting = sum(state != DONE for state in new.values()) - sum(map(len, stages.values())) - len(report)
    texts = [f"{_joined(of_row)} of {row}" for row, of_row in stages.items()] + report
    if not texts:
        return f"`dvc repro` runs {waiting} stages, as before" if waiting else "no stage depends on it"
    return f"`dvc repro` runs {'; '.join(texts)}" + (f" (and {waiting} stages that were out of date before)" if waiting else "")


def _joined(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if words[1:] else words[0]
