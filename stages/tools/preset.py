"""The paper's experiments, stored as rows in `presets/`, and the commands that add them to params.yaml."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import fnmatch
import importlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError, SettingsError
from pipeline.settings import Params, implementation
from pipeline.settings.params import ROW_NAME, TABLES
from pipeline.system.files import write_text
from stages.run import one_line_errors
from stages.tools.rows import INDENT, Row, add_rows, indented, parse, read_text, with_line_ends_of

__all__ = ["Preset", "load_preset", "preset", "preset_datasets", "preset_names"]

FOLDER = Path("presets")
ROW_TABLES = tuple(table for table in TABLES if table != "sampling")


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
    text = read_text(path).replace("\r\n", "\n")
    document = parse(text, str(path))
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
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # either makes plain values only, and runs nothing
    try:
        document = yaml.load(read_text(FOLDER / f"{name}.yaml"), loader)
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
        body = parse(textwrap.dedent("\n".join(lines[start:stop])) + "\n", where)
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
    named = {"codes": "autoencoders", "density": "densities"}  # key of a row -> table of the row that it names
    for row in rows:
        followed = [key for key, table in named.items() if (table, row.values.get(key)) in seeded]
        if (row.table, row.name) not in seeded and not followed:
            yield row
            continue
        for trial in range(seeds):
            values = copy.deepcopy(row.values)
            if (row.table, row.name) in seeded:
                values["seed"] = trial
            for key in followed:
                values[key] = f"{values[key]}-s{trial}"
            yield Row(row.table, f"{row.name}-s{trial}", values, row.comment if trial == 0 else ())


def _has_seed(row: Row) -> bool:
    kinds = {"autoencoders": ("pipeline.autoencoders", "objective"), "densities": ("pipeline.densities", "family")}
    if row.table not in kinds:
        return False
    package, key = kinds[row.table]
    settings = implementation(package, str(row.values.get(key)), f"{row.dotted}.{key}").Settings
    return any(field.name == "seed" for field in dataclasses.fields(settings))


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
            click.echo("\n".join(indented((row for row in rows if row.table == table), INDENT)))


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
        before = read_text(path)
        after, added, present = add_rows(before.replace("\r\n", "\n"), chosen.chosen(quick, seeds), params_file, replace)
        if added:
            write_text(path, with_line_ends_of(before, after))
        for rows, word in ((added, "added or replaced" if replace else "added"), (present, "there already")):
            if rows:
                click.echo(f"{params_file}: {len(rows)} row{'s' * (len(rows) > 1)} {word}")
            for table in dict.fromkeys(row.table for row in rows):
                click.echo(f"  {table}: {', '.join(row.name for row in rows if row.table == table)}")
        needed = [r.values.get("root") for r in chosen.rows if r.table == "datasets"]
        needed += [r.values.get(key) for r in chosen.rows if r.table == "autoencoders" for key in ("encoder", "decoder")]
        for root in dict.fromkeys(str(path) for path in needed if path is not None):
            if not Path(root).exists():
                click.echo(f"warning: {root} is missing; data/raw/README.md says what to put there", err=True)
