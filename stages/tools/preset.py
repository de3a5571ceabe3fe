"""The paper's experiments, stored as rows in `presets/`, and the commands that add them to params.yaml."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import fnmatch
import functools
import importlib
import io
import operator
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError, SettingsError
from pipeline.settings import NamedFile, Params, implementation
from pipeline.settings.params import ROW_NAME, TABLES
from pipeline.system.files import write_text
from stages.run import one_line_errors

__all__ = ["Preset", "Row", "add_rows", "load_preset", "preset", "preset_datasets", "preset_names"]

FOLDER = Path("presets")
ROW_TABLES = tuple(table for table in TABLES if table != "sampling")
INDENT = "  "


# Preset files -------------------------------------------------------------------------------------------------------


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
        values: dict[str, Any] = _plain(self.values)
        return values

    def text(self) -> str:
        """The row as YAML, with its comments, from column 0."""
        return "".join(f"{line}\n" for line in self.comment) + _dump({self.name: self.values})


@dataclass(frozen=True)
class Preset:
    """A file of `presets/`.

    Attributes:
        name: Name of the file, without its ending.
        description: One line on what it is.
        rows: Its rows, in the order of the file.
        quick: Dotted keys and the values that make it small; `*` matches any row that has the key's table.
    """

    name: str
    description: str
    rows: tuple[Row, ...]
    quick: Mapping[str, Any]

    def chosen(self, quick: bool = False, seeds: int | None = None) -> list[Row]:
        """The rows to add: small ones if `quick`, and one row per trial if `seeds` is given."""
        rows = _quick(self) if quick else list(self.rows)
        return rows if seeds is None else list(_trials(rows, seeds))


def preset_names() -> list[str]:
    """Names of the presets, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Reads `presets/NAME.yaml`.

    Raises:
        SettingsError: When there is no preset of that name, or its format isn't that of `presets/README.md`.
    """
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise SettingsError(f"no preset '{name}' in {FOLDER}/; {hint}known: {', '.join(names) or 'none'}")
    path = FOLDER / f"{name}.yaml"
    text = _read(path).replace("\r\n", "\n")
    document = _parse(text, str(path))
    if not isinstance(document, dict) or set(document) - {"description", "tables", "quick"}:
        raise SettingsError(f"{path}: expected the keys description, tables and quick; see {FOLDER}/README.md")
    description, tables, quick = document.get("description"), document.get("tables"), document.get("quick") or {}
    if not isinstance(description, str):
        raise SettingsError(f"{path}: description: missing; write one line on what the preset is")
    if not isinstance(tables, Mapping) or not isinstance(quick, Mapping):
        raise SettingsError(f"{path}: tables, quick: expected tables")
    for table in tables:
        if table not in ROW_TABLES:
            raise SettingsError(f"{path}: tables.{table}: unknown table; known: {', '.join(ROW_TABLES)}")
    rows = tuple(_rows(text, document, str(path)))
    return Preset(name=name, description=" ".join(description.split()), rows=rows, quick=quick)


def preset_datasets(name: str) -> Params:
    """Only the data sets of a preset, which is about fifty times as fast as reading the preset with its comments.

    Raises:
        SettingsError: As `load_preset`.
    """
    yaml: Any = importlib.import_module("yaml")  # comes with MLflow
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        document = yaml.load(_read(FOLDER / f"{name}.yaml"), loader)
        return Params({"datasets": dict(document["tables"].get("datasets", {}))})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        return Params({"datasets": {row.name: row.plain() for row in load_preset(name).rows if row.table == "datasets"}})


def _rows(text: str, document: Any, where: str) -> Iterator[Row]:
    """Each row with its part of the text, including the comments that belong to it."""
    lines = text.splitlines()
    starts = [(document["tables"].lc.key(table)[0], "", "") for table in document["tables"]]
    starts += [(document.lc.key(key)[0], "", "") for key in document]
    for table, rows in document["tables"].items():
        if not isinstance(rows, dict) or rows.fa.flow_style():  # type: ignore[attr-defined]
            raise SettingsError(f"{where}: tables.{table}: expected rows, one below the other")
        for name, values in rows.items():
            if not isinstance(name, str) or not ROW_NAME.fullmatch(name):
                raise SettingsError(f"{where}: tables.{table}.{name}: a row's name is made of a-z, 0-9 and dashes")
            if not isinstance(values, Mapping):
                raise SettingsError(f"{where}: tables.{table}.{name}: expected a table of settings, got {values!r}")
            starts.append((rows.lc.key(name)[0], table, name))  # type: ignore[attr-defined]
    starts.sort()
    for (start, table, name), stop in zip(starts, [s for s, _, _ in starts[1:]] + [len(lines)], strict=True):
        if not name:
            continue
        above = start
        while lines[above - 1].lstrip().startswith("#"):
            above -= 1
        while not lines[stop - 1].strip() or lines[stop - 1].lstrip().startswith("#"):
            stop -= 1
        body = _parse(textwrap.dedent("\n".join(lines[start:stop])) + "\n", where)
        yield Row(table, name, body[name], tuple(line.strip() for line in lines[above:start]))


def _quick(chosen: Preset) -> list[Row]:
    """The rows with the values of the section `quick`."""
    rows = [dataclasses.replace(row, values=copy.deepcopy(row.values)) for row in chosen.rows]
    for dotted, value in chosen.quick.items():
        where = f"{FOLDER}/{chosen.name}.yaml: quick.{dotted}"
        table, _, rest = str(dotted).partition(".")
        pattern, _, key = rest.partition(".")
        matching = [row for row in rows if row.table == table and fnmatch.fnmatchcase(row.name, pattern)]
        if not matching or not key:
            raise SettingsError(f"{where}: matches no row; expected TABLE.ROW.KEY")
        for row in matching:
            *path, last = key.split(".")
            target = row.values
            for part in path:
                target = target.get(part) if isinstance(target, Mapping) else None
            if not isinstance(target, Mapping):
                raise SettingsError(f"{where}: {row.dotted} has no table '{'.'.join(path)}'")
            target[last] = value  # type: ignore[index]
    return rows


def _trials(rows: Iterable[Row], seeds: int) -> Iterator[Row]:
    """One row `-s0`, `-s1`, .. per trial for each row with a training seed; trials share the other rows."""
    rows = list(rows)
    seeded = {(row.table, row.name) for row in rows if _has_seed(row)}
    for row in rows:
        if (row.table, row.name) not in seeded:
            yield row
            continue
        for trial in range(seeds):
            values = copy.deepcopy(row.values)
            values["seed"] = trial
            if ("autoencoders", values.get("codes")) in seeded:
                values["codes"] = f"{values['codes']}-s{trial}"
            yield Row(row.table, f"{row.name}-s{trial}", values, row.comment if trial == 0 else ())


def _has_seed(row: Row) -> bool:
    kinds = {"autoencoders": ("pipeline.autoencoders", "objective"), "densities": ("pipeline.densities", "family")}
    if row.table not in kinds:
        return False
    package, key = kinds[row.table]
    settings = implementation(package, str(row.values.get(key)), f"{row.dotted}.{key}").Settings
    return any(field.name == "seed" for field in dataclasses.fields(settings))


# params.yaml --------------------------------------------------------------------------------------------------------


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
    tables = _plain(_parse(text, where) or {})
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
    if _plain(_parse(text, where) or {}) != expected:
        raise SettingsError(f"{where} has a form to which rows can't be added; write its tables as block mappings")
    if added or changed:
        problems = list(Params(expected).problems())
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise SettingsError(f"nothing was added, because {where} would not pass `check`: {problems[0]}{more}")
    return text, added + changed, present


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
            if dotted.startswith(f"{row.dotted}.") and not file.digest:
                *path, last = dotted.removeprefix(f"{row.dotted}.").split(".")
                functools.reduce(operator.getitem, path, row.values)[last] = file.pinned()
    return rows


def _replaced(text: str, row: Row, where: str) -> str:
    """The text with new settings for an existing row; the text above and below it is preserved."""
    document = _parse(text, where)
    table = document[row.table]
    if table.fa.flow_style():
        raise SettingsError(f"{where}: {row.table}: a row can't be replaced in a table in braces; write it as a block mapping")
    lines = text.splitlines()
    start, column = table.lc.key(row.name)
    starts = [table.lc.key(name)[0] for name in table] + [document.lc.key(key)[0] for key in document]
    stop = min((line for line in starts if line > start), default=len(lines))
    # Blank lines and comments at the end belong to what follows.
    while stop > start + 1 and (not lines[stop - 1].strip() or lines[stop - 1].lstrip().startswith("#")):
        stop -= 1
    body = textwrap.indent(_dump({row.name: row.values}), " " * column).splitlines()
    return "\n".join([*lines[:start], *body, *lines[stop:]]) + "\n"


def _insert(text: str, table: str, rows: list[Row], where: str) -> str:
    """The text with rows at the end of a table."""
    document = _parse(text, where)
    rows_before = (document or {}).get(table)
    if rows_before and rows_before.fa.flow_style():
        rows_before.fa.set_block_style()
        text = _dump(document)
        document = _parse(text, where)
    lines = text.splitlines()
    if document is None or table not in document:
        start = [*([""] if lines and lines[-1].strip() else []), f"{table}:"]
        return "\n".join([*lines, *start, *_indented(rows, INDENT)]) + "\n"
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
    return "\n".join([*lines[:end], *_indented(rows, indent), *lines[end:]]) + "\n"


def _with_line_ends_of(before: str, after: str) -> str:
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


def _indented(rows: Iterable[Row], indent: str) -> list[str]:
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


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:  # line ends as they are
            return file.read()
    except FileNotFoundError:
        raise SettingsError(f"{path.name} is missing; run the command from the project's folder") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} isn't valid YAML: {error}") from None


def _parse(text: str, where: str) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        return _yaml().load(text)
    except (YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{where} isn't valid YAML: {' '.join(str(error).split())[:500]}") from None


def _dump(value: object) -> str:
    stream = io.StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue()


def _plain(value: Any) -> Any:
    """Plain Python values, without ruamel.yaml's data for the round trip."""
    if isinstance(value, Mapping):
        return {str(k) if isinstance(k, str) else k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


# Commands -----------------------------------------------------------------------------------------------------------


def _complete(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    return [name for name in preset_names() if name.startswith(start)]


_name = click.argument("name", shell_complete=_complete)
_seeds = click.option("--seeds", type=click.IntRange(1, 100), help="Trials: rows -s0, -s1, .. with training seeds 0, 1, ..")
_quick_option = click.option("--quick", is_flag=True, help="A smoke test: few epochs and small counts, for two cores.")


@click.group("preset")
def preset() -> None:
    """Add an experiment of the paper to params.yaml.

    A preset is a file in `presets/` with rows for the tables of params.yaml.
    """


@preset.command("list")
def list_() -> None:
    """List the presets."""
    with one_line_errors("preset list"):
        presets = [load_preset(name) for name in preset_names()]
        if not presets:
            raise PipelineError(f"no presets in {FOLDER}/; run the command from the project's folder")
        width = max(len(p.name) for p in presets)
        for p in presets:
            click.echo(f"{p.name:{width}}  {p.description}")


@preset.command("show")
@_name
@_seeds
@_quick_option
def show(name: str, seeds: int | None, quick: bool) -> None:
    """Print the rows of the preset NAME, as they would be added."""
    with one_line_errors(f"preset show {name}"):
        chosen = load_preset(name)
        rows = chosen.chosen(quick, seeds)
        click.echo(f"# {chosen.description}")
        for table in dict.fromkeys(row.table for row in rows):
            click.echo(f"{table}:")
            click.echo("\n".join(_indented((row for row in rows if row.table == table), INDENT)))


@preset.command("add")
@_name
@_seeds
@_quick_option
@click.option("--replace", is_flag=True, help="Overwrite existing rows whose settings differ.")
@click.option("--params", "params_file", default="params.yaml", show_default=True, help="Settings file.")
def add(name: str, seeds: int | None, quick: bool, replace: bool, params_file: str) -> None:
    """Add the rows of the preset NAME to params.yaml.

    Existing text is preserved. Identical rows are skipped. If an existing row differs, nothing is added unless --replace is
    given.
    """
    with one_line_errors(f"preset add {name}"):
        chosen = load_preset(name)
        path = Path(params_file).resolve()
        before = _read(path)
        after, added, present = add_rows(before.replace("\r\n", "\n"), chosen.chosen(quick, seeds), params_file, replace)
        if added:
            write_text(path, _with_line_ends_of(before, after))
        for rows, word in ((added, "added or replaced" if replace else "added"), (present, "there already")):
            if rows:
                click.echo(f"{params_file}: {len(rows)} row{'s' * (len(rows) > 1)} {word}")
            for table in dict.fromkeys(row.table for row in rows):
                click.echo(f"  {table}: {', '.join(row.name for row in rows if row.table == table)}")
        for root in dict.fromkeys(str(r.values.get("root")) for r in chosen.rows if r.table == "datasets"):
            if not Path(root).exists():
                click.echo(f"warning: {root} is missing; data/raw/README.md says what to put there", err=True)
