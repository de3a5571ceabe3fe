"""params.yaml: its tables, each row typed and checked when it is first asked for."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, SettingsError
from pipeline.settings.build import NamedFile, build, named_files, shorten
from pipeline.settings.rows import (
    AutoencoderSettings,
    ControlSettings,
    DatasetSettings,
    DensitySettings,
    DetectionSettings,
    EvaluationSettings,
    SamplingSettings,
)
from pipeline.system.files import check_regular

__all__ = ["Params", "choices", "implementation", "read_params"]

T = typing.TypeVar("T")

ROW_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
LONGEST_NAME = 100  # rows name files and folders
FORBIDDEN_KEYS = ("size", "nfiles")  # DVC's run cache drops these keys (treeverse/dvc issue 10296)
CARRYING = ("categories", "numbers", "attributes")  # keys of data sets that name columns to condition on
TABLES = ("datasets", "controls", "autoencoders", "densities", "sampling", "evaluations", "detections")


def choices(package: str) -> list[str]:
    """The choices that a package offers: the names of its files; none is imported."""
    spec = importlib.util.find_spec(package)
    folder = Path(typing.cast(str, typing.cast(Any, spec).origin)).parent
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def implementation(package: str, name: str, where: str) -> types.ModuleType:
    """The file of `package` that has the name of a choice, with its `Settings`.

    Raises:
        SettingsError: Naming `where`, when there is no such file, or it has no `Settings`.
    """
    known = choices(package)
    if name not in known:
        if name.replace("-", "_") in known:
            raise SettingsError(f"{where}: '{name}' is written '{name.replace('-', '_')}', like its file")
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise SettingsError(f"{where}: unknown '{name}'; {hint}known: {', '.join(known)}")
    module = importlib.import_module(f"{package}.{name}")
    if not hasattr(module, "Settings"):
        raise SettingsError(f"{where}: {package.replace('.', '/')}/{name}.py has no class Settings")
    return module


def _resolved_once(resolve: Callable[..., T]) -> Callable[..., T]:
    """Caches a method of `Params` by row. Errors are raised again each time, with the name of the asking row."""

    @functools.wraps(resolve)
    def resolved(self: Params, name: str, *arguments: str) -> T:
        key = (resolve.__name__, name)
        if key not in self._rows:
            self._rows[key] = resolve(self, name, *arguments)
        return typing.cast(T, self._rows[key])

    return resolved


class Params:
    """The tables of params.yaml, each row typed and checked when it is first asked for.

    Arguments:
        tables: The mapping read from params.yaml.

    Raises:
        SettingsError: For an unknown table, a table of the wrong type, a bad row name or a forbidden key.
    """

    def __init__(self, tables: Mapping[str, Any]) -> None:
        if not isinstance(tables, Mapping):
            raise SettingsError("params.yaml: expected tables such as datasets and densities")
        for name, table in tables.items():
            if name not in TABLES:
                close = difflib.get_close_matches(str(name), TABLES, n=1)
                hint = f"did you mean '{close[0]}'?" if close else "known tables: " + ", ".join(TABLES)
                raise SettingsError(f"{name}: unknown table; {hint}")
            if not isinstance(table, Mapping):
                hint = f"; write '{name}: {{}}' if it has no rows" if table is None else ""
                raise SettingsError(f"{name}: expected a table, got {'nothing' if table is None else shorten(table)}{hint}")
            for key in _all_keys(table):
                if key in FORBIDDEN_KEYS:
                    raise SettingsError(f"{name}: a key is named '{key}', which DVC's run cache ignores; rename it")
            if name == "sampling":
                continue
            for row, values in table.items():
                if not isinstance(row, str) or not ROW_NAME.fullmatch(row) or len(row) > LONGEST_NAME:
                    raise SettingsError(f"{name}.{row}: a row's name is made of a-z, 0-9 and dashes, at most {LONGEST_NAME}")
                if not isinstance(values, Mapping):
                    raise SettingsError(f"{name}.{row}: expected a table of settings, got {shorten(values)}")
        self.absent = [name for name in TABLES if name not in tables]
        self.tables: dict[str, dict[str, Any]] = {name: dict(tables.get(name, {})) for name in TABLES}
        self._rows: dict[tuple[str, str], object] = {}

    def rows(self, table: str) -> list[str]:
        """Names of the rows of a table, in order."""
        return list(self.tables[table])

    def _row(self, table: str, name: str, asked_by: str = "") -> Mapping[str, Any]:
        rows = self.tables[table]
        if name not in rows:
            prefix = f"{asked_by}: " if asked_by else ""
            raise SettingsError(f"{prefix}'{name}' is no row of {table}; rows: {', '.join(rows) or 'none'}")
        return typing.cast(Mapping[str, Any], rows[name])

    def _implemented(self, package: str, table: str, name: str, key: str, values: Mapping[str, Any]) -> Any:
        where = f"{table}.{name}"
        kind = values.get(key)
        if not isinstance(kind, str):
            raise SettingsError(f"{where}.{key}: missing or not a string")
        return build(implementation(package, kind, f"{where}.{key}").Settings, values, where)

    @_resolved_once
    def dataset(self, name: str, asked_by: str = "") -> DatasetSettings:
        """A row of `datasets`, as its source's `Settings`."""
        values = self._row("datasets", name, asked_by)
        return typing.cast(DatasetSettings, self._implemented("pipeline.sources", "datasets", name, "source", values))

    @_resolved_once
    def autoencoder(self, name: str, asked_by: str = "") -> AutoencoderSettings:
        """A row of `autoencoders`, as its objective's `Settings`, checked against its data set."""
        values = self._row("autoencoders", name, asked_by)
        settings = self._implemented("pipeline.autoencoders", "autoencoders", name, "objective", values)
        dataset = self.dataset(settings.dataset, f"autoencoders.{name}.dataset")
        try:
            settings.check_shape(dataset.shape)
        except SettingsError as error:
            raise SettingsError(f"autoencoders.{name}.{error}") from None
        return typing.cast(AutoencoderSettings, settings)

    @_resolved_once
    def density(self, name: str) -> DensitySettings:
        """A row of `densities`, as its family's `Settings`, checked against the codes that it names."""
        values = self._row("densities", name)
        settings = self._implemented("pipeline.densities", "densities", name, "family", values)
        autoencoder = self.autoencoder(settings.codes, f"densities.{name}.codes")
        if autoencoder.dataset != settings.dataset:
            raise SettingsError(
                f"densities.{name}.dataset: '{settings.dataset}', but autoencoders.{settings.codes}.dataset "
                f"is '{autoencoder.dataset}'"
            )
        dataset = self.dataset(settings.dataset)
        carried = ["labels", *(name for key in CARRYING for name in getattr(dataset, key, ()))]
        for column in settings.context_names:
            if column not in carried:
                raise SettingsError(
                    f"densities.{name}.context: '{column}' isn't carried by datasets.{settings.dataset}, which carries "
                    f"{', '.join(carried)}; name it there"
                )
        drawn, held = getattr(settings, "prior", None), getattr(autoencoder, "prior", None)
        if None not in (drawn, held) and drawn != held:
            raise SettingsError(
                f"densities.{name}.prior: '{drawn}', but the codes of autoencoders.{settings.codes} are held to '{held}'"
            )
        return typing.cast(DensitySettings, settings)

    @_resolved_once
    def control(self, name: str) -> ControlSettings:
        """A row of `controls`."""
        settings = build(ControlSettings, self._row("controls", name), f"controls.{name}")
        shape = self.dataset(settings.dataset, f"controls.{name}.dataset").shape
        if len(shape) != 3:
            raise SettingsError(f"controls.{name}.dataset: '{settings.dataset}' holds vectors; controls are for images")
        return settings

    def sampling(self) -> SamplingSettings:
        """The section `sampling`."""
        return build(SamplingSettings, self.tables["sampling"], "sampling")

    @_resolved_once
    def evaluation(self, dataset: str, asked_by: str = "") -> EvaluationSettings:
        """The row of `evaluations` for a data set."""
        return build(EvaluationSettings, self._row("evaluations", dataset, asked_by), f"evaluations.{dataset}")

    @_resolved_once
    def detection(self, name: str) -> DetectionSettings:
        """A row of `detections`, checked against the density and the data sets that it names."""
        where = f"detections.{name}"
        settings = build(DetectionSettings, self._row("detections", name), where)
        if name in self.tables["densities"]:
            raise SettingsError(f"{where}: a row of densities has this name; give it another")
        if settings.density not in self.tables["densities"]:
            raise SettingsError(f"{where}.density: '{settings.density}' is no row of densities")
        density = self.density(settings.density)
        for key in ("family", "codes", "dataset"):
            given, its_own = getattr(settings, key), getattr(density, key)
            if given != its_own:
                raise SettingsError(f"{where}.{key}: '{given}', but densities.{settings.density}.{key} is '{its_own}'")
        own = self.dataset(settings.dataset)
        other = self.dataset(settings.outliers, f"{where}.outliers")
        alike = len(own.shape) == len(other.shape) or (len(own.shape) == 3 and other.drawn_as == "patches")
        lengths = {own.shape, other.shape} - {(0,)} if len(own.shape) == 1 else set()  # (0,): only the file determines it
        if not alike or len(lengths) > 1:
            raise SettingsError(
                f"{where}.outliers: examples of '{settings.outliers}' have shape {other.shape}, and those of "
                f"'{settings.dataset}' {own.shape}: they can't be compared"
            )
        for same in self._detections_of(settings.density):
            error = self.tables["detections"][same].get("error", "absolute")
            if error != settings.error:
                raise SettingsError(
                    f"{where}.error: '{settings.error}', but detections.{same}.error is '{error}', of the same density: its "
                    "scores have one definition"
                )
        return settings

    def _detections_of(self, density: str) -> list[str]:
        """Names of the rows of `detections` that name a row of `densities`."""
        return [name for name, values in self.tables["detections"].items() if values.get("density") == density]

    def relative_error(self, density: str) -> bool:
        """Whether scores of a row of `densities` take reconstruction errors relative to the image, as its detections do."""
        return any(self.detection(name).error == "relative" for name in self._detections_of(density))

    def row(self, table: str, name: str) -> Any:
        """The settings of a row of any table, checked; `sampling`, which has no rows, takes any name."""
        if table == "sampling":
            return self.sampling()
        readers: dict[str, Callable[[str], Any]] = {
            "datasets": self.dataset,
            "controls": self.control,
            "autoencoders": self.autoencoder,
            "densities": self.density,
            "evaluations": self.evaluation,
            "detections": self.detection,
        }
        return readers[table](name)

    def named_files(self) -> dict[str, NamedFile]:
        """The files that all rows name, by table, row and key with dots; without rows that are refused."""
        files: dict[str, NamedFile] = {}
        for table in TABLES:
            for name in self.rows(table) if table != "sampling" else ():
                with contextlib.suppress(PipelineError):
                    files |= {f"{table}.{name}.{key}": file for key, file in named_files(self.row(table, name)).items()}
        return files

    def problems(self) -> Iterator[str]:
        """One line per problem, over all rows."""
        checks: list[Callable[[], object]] = [self.sampling]
        checks += [partial(self.dataset, n) for n in self.rows("datasets")]
        checks += [partial(self._check_evaluation, n) for n in self.rows("evaluations")]
        checks += [partial(self.autoencoder, n) for n in self.rows("autoencoders")]
        checks += [partial(self._check_density, n) for n in self.rows("densities")]
        checks += [partial(self._check_control, n) for n in self.rows("controls")]
        checks += [partial(self.detection, n) for n in self.rows("detections")]
        seen: set[str] = set()
        for check in checks:
            try:
                check()
            except PipelineError as error:
                if str(error) not in seen:
                    seen.add(str(error))
                    yield str(error)

    def _check_evaluation(self, name: str) -> None:
        self.evaluation(name)
        self.dataset(name, f"evaluations.{name}")

    def _check_density(self, name: str) -> None:
        settings = self.density(name)
        evaluation = self.evaluation(settings.dataset, f"densities.{name}.dataset")
        decoded = getattr(self.autoencoder(settings.codes), "decoder", "") is not None
        if not decoded and (evaluation.parzen is not None or evaluation.quality is not None):
            raise SettingsError(
                f"densities.{name}.codes: '{settings.codes}' has no decoder, so its samples can't be compared with images; "
                f"take parzen and quality out of evaluations.{settings.dataset}"
            )

    def _check_control(self, name: str) -> None:
        settings = self.control(name)
        evaluation = self.evaluation(settings.dataset, f"controls.{name}.dataset")
        if evaluation.parzen is None and evaluation.quality is None and settings.pca_components == 0:
            raise SettingsError(f"controls.{name}.dataset: evaluations.{settings.dataset}.parzen is missing")


def _all_keys(table: Mapping[str, Any]) -> Iterator[str]:
    """Keys at any depth. Each mapping and list is visited once, even if YAML's aliases repeat it or put it into itself."""
    waiting: list[Any] = [table]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                yield from map(str, value)
            waiting += value.values() if isinstance(value, Mapping) else value


def read_params(path: str | Path = "params.yaml") -> Params:
    """Reads params.yaml.

    Raises:
        SettingsError: When the file is missing, isn't YAML, or a table is wrong.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        check_regular(path)
        with open(path, encoding="utf-8") as file:
            tables = YAML(typ="safe", pure=True).load(file)
    except FileNotFoundError:
        raise SettingsError(f"{path} is missing; run the command from the project's folder") from None
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror}") from None
    except RecursionError:
        raise SettingsError(f"{path} isn't valid YAML: it is nested too deeply") from None
    except (YAMLError, UnicodeDecodeError, ValueError, TypeError, AttributeError) as error:
        problem = " ".join(str(error).split())[:500]
        raise SettingsError(f"{path} isn't valid YAML: {problem}") from None
    return Params(tables if tables is not None else {})
