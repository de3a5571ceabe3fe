"""Rows of params.yaml as text: read, added and replaced, with comments and all other text preserved."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import io
import operator
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, SettingsError
from pipeline.settings import NamedFile, Params

__all__ = ["INDENT", "Row", "add_rows", "dump", "edit_row", "indented", "parse", "plain", "read_text", "with_line_ends_of"]

INDENT = "  "


@dataclass(frozen=True)
class Row:
    """A row of a preset.

    Attributes:
        table: Its table.
        name: Its name.
        values: Its settings, as ruamel.yaml's round-trip loader gives them, comments included.
        comment: The comment lines above it.
    """

    table: str
    name: str
    values: Any
    comment: tuple[str, ...] = ()

    @property
    def dotted(self) -> str:
        """Table and name, as in error messages."""
        return f"{self.table}.{self.name}"

    def plain(self) -> dict[str, Any]:
        """Its settings as plain values."""
        values: dict[str, Any] = plain(self.values)
        return values

    def text(self) -> str:
        """The row as YAML, with its comments, from column 0."""
        return "".join(f"{line}\n" for line in self.comment) + dump({self.name: self.values})


def add_rows(
    text: str, rows: Iterable[Row], where: str = "params.yaml", replace: bool = False
) -> tuple[str, list[Row], list[Row]]:
    """Adds rows to the text of params.yaml, each at the end of its table. Existing text is preserved byte for byte.

    Arguments:
        text: The text of params.yaml.
        rows: The rows to add.
        where: Name of the file in messages.
        replace: Whether to overwrite existing rows whose settings differ, in their place.

    Returns:
        The new text, the rows that were added or replaced, and the rows that existed already.

    Raises:
        SettingsError: When an existing row has other settings and `replace` isn't set, or the result would not pass
            `check`.
    """
    tables = plain(parse(text, where) or {})
    if not isinstance(tables, dict):
        raise SettingsError(f"{where}: expected tables such as datasets and densities")
    rows = _pinned(rows, tables)
    added: list[Row] = []
    present: list[Row] = []
    conflicts: list[str] = []
    changed: list[Row] = []
    for row in rows:
        table = tables.get(row.table) or {}
        if not isinstance(table, dict):
            raise SettingsError(f"{where}: {row.table}: expected a table, got {table!r}")
        if row.name not in table:
            added.append(row)
        elif table[row.name] == row.plain():
            present.append(row)
        elif replace:
            changed.append(row)
        else:
            conflicts.append(f"{row.dotted} ({_difference(table[row.name], row.plain())})")
    if conflicts:
        raise SettingsError(
            f"{where} has these rows with other settings; rename them, delete them, or pass --replace: "
            f"{_truncated_list(conflicts)}"
        )
    expected = tables
    for row in changed:
        text = _replaced(text, row, where)
        expected[row.table][row.name] = row.plain()
    for table in dict.fromkeys(row.table for row in added):
        of_table = [row for row in added if row.table == table]
        text = _insert(text, table, of_table, where)
        expected[table] = (expected.get(table) or {}) | {row.name: row.plain() for row in of_table}
    if plain(parse(text, where) or {}) != expected:
        raise SettingsError(f"{where} has a form to which rows can't be added; write its tables as block mappings")
    if added or changed:
        problems = list(Params(expected).problems())
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise SettingsError(f"nothing was added, because {where} would not pass `check`: {problems[0]}{more}")
    return text, added + changed, present


def edit_row(text: str, row: str, changes: Mapping[str, Any], new_name: str = "", where: str = "params.yaml") -> str:
    """The text with other values for some keys of a row, or with a new row that is a copy with them; the rest stays as it is.

    Arguments:
        text: The text of params.yaml.
        row: Table and name, as in `densities.grid-lde`, or `sampling`.
        changes: Values by key; keys of nested settings are dotted.
        new_name: Name of the new row; empty to edit the row itself.
        where: Name of the file in messages.

    Raises:
        SettingsError: When there is such a row already, or the result has a problem that `check` names and the text hadn't.
    """
    tables = plain(parse(text, where) or {})
    before = set(Params(tables).problems())
    table, _, name = row.rpartition(".")
    values = _values_of(text, table, name, where)
    for key, value in changes.items():
        *path, last = key.split(".")
        target = values
        for part in path:
            if not isinstance(target.get(part), Mapping):
                target[part] = {}
            target = target[part]
        target[last] = _in_one_line(value)
    if new_name and new_name in tables[table]:
        raise SettingsError(f"{table}.{new_name}: there is such a row already; choose another name, or edit that row")
    (edited,) = _pinned([Row(table, new_name or name, values)], tables)
    after = _insert(text, table, [edited], where) if new_name else _replaced(text, edited, where)
    (tables[table] if table else tables)[edited.name] = edited.plain()
    if plain(parse(after, where)) != tables:
        raise SettingsError(f"{where} has a form in which rows can't be edited; write its tables as block mappings")
    for problem in Params(tables).problems():
        if problem not in before:
            raise SettingsError(f"nothing was changed: {problem}")
    return after


def _in_one_line(value: Any) -> Any:
    """A list as it is written in one line; anything else as it is."""
    from ruamel.yaml.comments import CommentedSeq

    if not isinstance(value, list):
        return value
    line = CommentedSeq(value)
    line.fa.set_flow_style()
    return line


def _values_of(text: str, table: str, name: str, where: str) -> Any:
    """The settings of a row with the comments in it, but without those that belong to the next one."""
    start, stop, _ = _place(text, table, name, where)
    lines = text.splitlines()[start:stop]
    try:
        return parse(textwrap.dedent("\n".join(lines)) + "\n", where)[name]
    except SettingsError:  # an alias of another row
        document = parse(text, where)
        return plain((document[table] if table else document)[name])


def _pinned(rows: Iterable[Row], tables: Mapping[str, Any]) -> list[Row]:
    """The rows with the digest of each file that they name, where the file is there."""
    rows = [dataclasses.replace(row, values=copy.deepcopy(row.values)) for row in rows]
    merged = {table: dict(of_table) if isinstance(of_table, Mapping) else {} for table, of_table in tables.items()}
    for row in rows:
        merged.setdefault(row.table, {})[row.name] = row.plain()
    files: dict[str, NamedFile] = {}
    with contextlib.suppress(PipelineError):  # said below, by the same checks
        files = Params(merged).named_files()
    for row in rows:
        for dotted, file in files.items():
            if dotted.startswith(f"{row.dotted}.") and not file.digest and file.path.is_file():
                *path, last = dotted.removeprefix(f"{row.dotted}.").split(".")
                functools.reduce(operator.getitem, path, row.values)[last] = file.pinned()
    return rows


def _replaced(text: str, row: Row, where: str) -> str:
    """The text with new settings for an existing row; the text above and below it is preserved."""
    start, stop, column = _place(text, row.table, row.name, where)
    lines = text.splitlines()
    body = textwrap.indent(dump({row.name: row.values}), " " * column).splitlines()
    return "\n".join([*lines[:start], *body, *lines[stop:]]) + "\n"


def _place(text: str, table: str, name: str, where: str) -> tuple[int, int, int]:
    """First line of a row, the line after its last one, and its column. Without a table, `name` is a section.

    Blank lines and comments at its end belong to what follows.
    """
    document = parse(text, where)
    rows = document[table] if table else document
    if rows.fa.flow_style():
        raise SettingsError(f"{where}: {table}: a row can't be replaced in a table in braces; write it as a block mapping")
    lines = text.splitlines()
    start, column = rows.lc.key(name)
    starts = [rows.lc.key(other)[0] for other in rows] + [document.lc.key(key)[0] for key in document]
    stop = min((line for line in starts if line > start), default=len(lines))
    while stop > start + 1 and (not lines[stop - 1].strip() or lines[stop - 1].lstrip().startswith("#")):
        stop -= 1
    return start, stop, column


def _insert(text: str, table: str, rows: list[Row], where: str) -> str:
    """The text with rows at the end of a table."""
    document = parse(text, where)
    rows_before = (document or {}).get(table)
    if rows_before and rows_before.fa.flow_style():
        rows_before.fa.set_block_style()
        text = dump(document)
        document = parse(text, where)
    lines = text.splitlines()
    if document is None or table not in document:
        start = [*([""] if lines and lines[-1].strip() else []), f"{table}:"]
        return "\n".join([*lines, *start, *indented(rows, INDENT)]) + "\n"
    keys = [document.lc.key(key)[0] for key in document]
    head = document.lc.key(table)[0]
    end = min((line for line in keys if line > head), default=len(lines))
    # Blank lines, and unindented comments, belong to what follows.
    while end > head + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    if document[table]:
        indent = " " * document[table].lc.key(next(iter(document[table])))[1]
    else:
        indent = INDENT
        lines[head] = re.sub(r"\{\s*\}\s*", "", lines[head], count=1).rstrip()
    return "\n".join([*lines[:end], *indented(rows, indent), *lines[end:]]) + "\n"


def with_line_ends_of(before: str, after: str) -> str:
    """The new text with the line ends of the old one. New lines get the most frequent line end."""
    returns = before.count("\r\n")
    end = "\r" if 2 * returns > before.count("\n") else ""
    if not returns:
        return after
    old, new = (before if before.endswith("\n") else f"{before}{end}\n").split("\n"), after.split("\n")
    lines: list[str] = []
    for kind, start, stop, first, last in difflib.SequenceMatcher(
        None, [x.removesuffix("\r") for x in old], new, False
    ).get_opcodes():
        lines += old[start:stop] if kind == "equal" else [line + end for line in new[first:last]]
    return "\n".join(lines)


def indented(rows: Iterable[Row], indent: str) -> list[str]:
    """The lines of rows as YAML, indented."""
    return [line for row in rows for line in textwrap.indent(row.text(), indent).splitlines()]


def _truncated_list(items: list[str], most: int = 3) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def _difference(before: object, preset: object) -> str:
    """The first few keys that differ."""
    if not isinstance(before, dict) or not isinstance(preset, dict):
        return f"{before!r} there, {preset!r} in the preset"
    keys = [key for key in preset | before if before.get(key, "not set") != preset.get(key, "not set")]
    items = [f"{key}: {before.get(key, 'not set')} there, {preset.get(key, 'not set')} in the preset" for key in keys[:2]]
    return ", ".join(items) + (", .." if len(keys) > 2 else "")


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    return yaml


def read_text(path: Path) -> str:
    """A text with its line ends as they are.

    Raises:
        SettingsError: When the file is missing or isn't UTF-8.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:  # line ends as they are
            return file.read()
    except FileNotFoundError:
        raise SettingsError(f"{path.name} is missing; run the command from the project's folder") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} isn't valid YAML: {error}") from None


def parse(text: str, where: str) -> Any:
    """YAML by ruamel.yaml's round-trip loader, comments included.

    Raises:
        SettingsError: Naming `where`, when it isn't YAML.
    """
    from ruamel.yaml.error import YAMLError

    try:
        return _yaml().load(text)
    except (YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{where} isn't valid YAML: {' '.join(str(error).split())[:500]}") from None


def dump(value: object) -> str:
    """Values as YAML, with their comments."""
    stream = io.StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue()


def plain(value: Any) -> Any:
    """Plain Python values, without ruamel.yaml's data for the round trip."""
    if isinstance(value, Mapping):
        return {str(k) if isinstance(k, str) else k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
