"""params.yaml -> typed, frozen dataclasses that check themselves.

A table of params.yaml holds rows; a row becomes one dataclass. The common keys of each table are declared here, the keys
of one data source, objective or density family stand in the module that implements it, as a class `Settings` that extends the
common one. Unknown keys, wrong types and impossible values are refused with the row and the key named.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pipeline.errors import PipelineError, SettingsError

__all__ = [
    "AutoencoderSettings",
    "ControlSettings",
    "DatasetSettings",
    "DensitySettings",
    "EvaluationSettings",
    "InterpolationSettings",
    "Params",
    "ParzenSettings",
    "QualitySettings",
    "SamplingSettings",
    "TrainingSettings",
    "build",
    "check_that",
    "flatten",
    "read_params",
]

T = TypeVar("T")

ROW_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
LONGEST_NAME = 100  # rows name files and folders
FORBIDDEN_KEYS = ("size", "nfiles")  # DVC's run cache drops these keys (treeverse/dvc issue 10296)
TABLES = ("datasets", "controls", "autoencoders", "densities", "sampling", "evaluations")


# Building a dataclass from a mapping --------------------------------------------------------------------------------


def check_that(condition: bool, key: str, message: str) -> None:
    """Refuses a value from a dataclass's `__post_init__`.

    Raises:
        SettingsError: When the condition doesn't hold; `build` puts the row's name before the key.
    """
    if not condition:
        raise SettingsError(f"{key}: {message}")


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


def _shown(value: object) -> str:
    """A value as it stands in messages: never long, whatever a file holds."""
    return reprlib.repr(value)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as a value of the annotation `kind`, or a SettingsError that names `where`."""
    origin = typing.get_origin(kind)
    refused = SettingsError(f"{where}: expected {_describe(kind)}, got {_shown(value)}")
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
    """A dataclass from a mapping, with every key known and every value of its declared type.

    Arguments:
        cls: The dataclass.
        values: The mapping, as read from YAML.
        where: What to call it in messages, for example `densities.digits-iae-lde`.

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
            raise SettingsError(f"{where}.{name}: missing; it has to be {_describe(hints[name])}")
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


# The common keys of each table --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Common keys of a row of `datasets`; a module of `pipeline/sources` extends them.

    Attributes:
        source: Name of the module in `pipeline/sources` that reads the raw files.
        root: Where the raw files lie; for a packaged set, its source module.
        split_seed: Seed of the split and of whatever the source draws at random.
        shard_examples: Examples in a shard at most.
        label: What a label is called in figures; no key of the row.
        drawn_as: What figures draw a vector as: `points` of its first two numbers, those of the `grid` density, or image
            `patches`; no key of the row.
    """

    source: str
    root: str
    split_seed: int = 0
    label: ClassVar[str] = "label"
    drawn_as: ClassVar[str] = "points"
    shard_examples: int = 4096

    def __post_init__(self) -> None:
        check_that(self.shard_examples >= 1, "shard_examples", "has to be at least 1")
        check_that(self.split_seed >= 0, "split_seed", "has to be 0 or more")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an example: (C, H, W) for an image, (D,) for a vector; (0,) where only the file can tell."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a network is trained: what autoencoders and densities have in common.

    Attributes:
        epochs: Passes over the training examples.
        batch_size: Examples in a step, over all ranks together.
        learning_rate: The highest learning rate.
        betas: Adam's decay rates; (0.5, 0.999) in the paper's supplement, section A.
        weight_decay: Decoupled weight decay, in units of the learning rate; 0 is plain Adam.
        schedule: `constant`; `steps`: halved at each of `milestones`; `cosine`: a linear warm-up over `warm_up` of all
            steps, then a cosine to zero.
        milestones: Epochs at which the schedule `steps` halves the learning rate.
        warm_up: Share of all steps over which `cosine` rises.
        gradient_clip: Largest norm of the gradient; 0 switches clipping off.
        ema_decay: Decay of the exponential moving average of the weights that is kept in the end; 0 keeps the last weights.
        precision: `float32`, or `bfloat16` for mixed precision, which is slow where the processor has no such instructions.
        checkpoint_minutes: Minutes between two checkpoints; one is also written whenever an epoch ends after it.
        sync_batch_norm: Whether batch norm takes its statistics over all processes; alone it changes nothing.
        shuffle_examples: Examples held in memory for shuffling, in a window of whole shards that is drawn from at random.
        seed: Seed of initial weights, order of examples and noise.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, ...] = (0.5, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant", "steps", "cosine"] = "constant"
    milestones: tuple[int, ...] = ()
    warm_up: float = 0.1
    gradient_clip: float = 0.0
    ema_decay: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_minutes: float = 1.0
    sync_batch_norm: bool = False
    shuffle_examples: int = 16_384
    seed: int = 0

    def __post_init__(self) -> None:
        check_that(self.epochs >= 1, "epochs", "has to be at least 1")
        check_that(self.batch_size >= 1, "batch_size", "has to be at least 1")
        check_that(self.learning_rate > 0, "learning_rate", "has to be positive")
        check_that(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "have to be two numbers in [0, 1)")
        check_that(self.weight_decay >= 0, "weight_decay", "has to be 0 or more")
        check_that(0 <= self.warm_up < 1, "warm_up", "has to lie in [0, 1)")
        check_that(self.gradient_clip >= 0, "gradient_clip", "has to be 0 or more")
        check_that(0 <= self.ema_decay < 1, "ema_decay", "has to lie in [0, 1)")
        check_that(self.checkpoint_minutes > 0, "checkpoint_minutes", "has to be positive")
        check_that(self.shuffle_examples >= 1, "shuffle_examples", "has to be at least 1")
        check_that(self.seed >= 0, "seed", "has to be 0 or more")


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """Common keys of a row of `autoencoders`; a module of `pipeline/autoencoders` extends them.

    Attributes:
        dataset: Row of `datasets` that it is trained on.
        objective: Name of the module in `pipeline/autoencoders`: `ae`, `identity`, ..
    """

    dataset: str
    objective: str


@dataclass(frozen=True, kw_only=True)
class DensitySettings(TrainingSettings):
    """Common keys of a row of `densities`; a module of `pipeline/densities` extends them.

    Attributes:
        codes: Row of `autoencoders` whose codes it is fitted on.
        dataset: Data set of those codes (named again, since DVC can't look it up; checked for agreement).
        family: Density family: `lde`, `gmm`, `maf`, ..
        standardise: `dimension` shifts and scales each code dimension to mean 0 and variance 1 over the training codes,
            `scalar` uses one mean and one scale for all, `none` nothing; `cholesky` takes from each dimension its linear
            prediction from those before it, L^-1 (z - mean) with the covariance L L^T, which suits strongly correlated codes
            such as pixels. The log-determinant is added back in every likelihood.
        optimizer: `adamw`, or `muon` for steps of orthogonalised momentum, of decay 0.95, on the weights between hidden layers
            of an `lde`, and AdamW's on the others; deep networks learn as much in a fraction of the steps.
        muon_rate: Muon's learning rate, as a multiple of AdamW's; the weights that it moves decay as many times as fast.
        max_minutes: Minutes of fitting after which it ends, best epoch kept; 0 for no limit. With a limit the result depends
            on the speed of the machine. `gmm` reads the clock between two numbers of Gaussians.
        validate_steps: Steps between two validations within an epoch, besides those at its end; 0 for none.
        shuffle_examples: Codes held in memory for shuffling, in a window of whole files that is drawn from at random.
    """

    codes: str
    dataset: str
    family: str
    learning_rate: float = 2e-4
    standardise: Literal["dimension", "scalar", "cholesky", "none"] = "dimension"
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_rate: float = 3.0
    max_minutes: float = 0.0
    validate_steps: int = 0
    shuffle_examples: int = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.optimizer in ("adamw", "muon"), "optimizer", f"has to be one of adamw, muon, not {self.optimizer!r}")
        check_that(self.optimizer == "adamw" or self.family == "lde", "optimizer", "can be muon for the family lde only")
        check_that(self.muon_rate > 0, "muon_rate", "has to be positive")
        check_that(self.validate_steps >= 0, "validate_steps", "has to be 0 or more")
        check_that(self.max_minutes >= 0, "max_minutes", "has to be 0 or more")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """The section `sampling`.

    Attributes:
        count: Samples drawn from each density.
        seed: Seed of the draws.
        shard_examples: Samples in a shard at most.
        rounding: `none`, or `8-bit` to round decoded pixels to 256 levels as the paper's authors do.
    """

    count: int = 10_000
    seed: int = 0
    shard_examples: int = 2_000
    rounding: Literal["none", "8-bit"] = "none"

    def __post_init__(self) -> None:
        check_that(self.count >= 1, "count", "has to be at least 1")
        check_that(self.seed >= 0, "seed", "has to be 0 or more")
        check_that(self.shard_examples >= 1, "shard_examples", "has to be at least 1")


@dataclass(frozen=True, kw_only=True)
class ParzenSettings:
    """Protocol of the Parzen-window score.

    Attributes:
        protocol: Name of the protocol, shown beside each score.
        bandwidth_start: First bandwidth of the grid, in units of the pixel range 0..1.
        bandwidth_stop: Last bandwidth of the grid.
        bandwidth_count: Number of bandwidths.
        spacing: `linear` or `log`.
        validation_count: Validation examples used for the search, the first of the split; 0 takes all.
    """

    protocol: str = "gmmn"
    bandwidth_start: float = 0.10
    bandwidth_stop: float = 0.29
    bandwidth_count: int = 20
    spacing: Literal["linear", "log"] = "linear"
    validation_count: int = 0

    def __post_init__(self) -> None:
        check_that(1 <= self.bandwidth_count <= 1000, "bandwidth_count", "has to lie in 1..1000")
        check_that(self.bandwidth_start > 0, "bandwidth_start", "has to be positive")
        check_that(self.bandwidth_start <= self.bandwidth_stop, "bandwidth_stop", "has to be at least bandwidth_start")
        check_that(self.validation_count >= 0, "validation_count", "has to be 0 or more")

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """The grid, in ascending order."""
        if self.bandwidth_count == 1:
            return (self.bandwidth_start,)
        steps = [i / (self.bandwidth_count - 1) for i in range(self.bandwidth_count)]
        if self.spacing == "log":
            ratio = self.bandwidth_stop / self.bandwidth_start
            return tuple(round(self.bandwidth_start * ratio**s, 12) for s in steps)
        return tuple(round(self.bandwidth_start + s * (self.bandwidth_stop - self.bandwidth_start), 12) for s in steps)


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """How samples of images are compared with test images in the features of a network.

    Attributes:
        network: `classifier`: a small one, trained on the labelled training images; `vgg19`: up to relu3_1; `inception`: that
            of published scores. Scores of two networks don't compare.
        weights: Where the weights come from: a file, or `imagenet` for torchvision's official VGG19, downloaded once; null for
            the classifier.
        samples: Samples compared, at most, the first drawn.
        neighbours: k of precision and recall.
        classifier_examples: Training images that the classifier is trained on, at most, the first of the split.
        classifier_epochs: Passes over them.
        seed: Seed of the classifier and of the subsets of KID.
    """

    network: Literal["classifier", "vgg19", "inception"]
    weights: str | None = None
    samples: int = 10_000
    neighbours: int = 3
    classifier_examples: int = 10_000
    classifier_epochs: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_that(
            (self.network == "classifier") == (self.weights is None),
            "weights",
            "the classifier is trained here: leave it out"
            if self.network == "classifier"
            else f"missing; {self.network} needs a file with its weights" + (", or 'imagenet'" * (self.network == "vgg19")),
        )
        check_that(self.samples >= 20, "samples", "has to be at least 20")
        check_that(1 <= self.neighbours <= 100, "neighbours", "has to lie in 1..100")
        check_that(self.classifier_examples >= 1, "classifier_examples", "has to be at least 1")
        check_that(self.classifier_epochs >= 1, "classifier_epochs", "has to be at least 1")
        check_that(self.seed >= 0, "seed", "has to be 0 or more")


@dataclass(frozen=True, kw_only=True)
class InterpolationSettings:
    """How interpolated test codes are scored (Figure 10) and shown (Figure 7).

    Attributes:
        pairs: Pairs of test codes of the same label, and as many of different labels.
        seed: Seed of the draw of pairs.
    """

    pairs: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_that(2 <= self.pairs <= 1_000_000, "pairs", "has to lie in 2..1000000")
        check_that(self.seed >= 0, "seed", "has to be 0 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """A row of `evaluations`, named like its data set.

    Attributes:
        parzen: Protocol of the Parzen score; null for none.
        quality: Comparison of samples with test images in a feature space; null for none.
        interpolation: Scores and images of interpolated test codes; null for none.
    """

    parzen: ParzenSettings | None = None
    quality: QualitySettings | None = None
    interpolation: InterpolationSettings | None = None


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """A row of `controls`: what a data set's own images score where samples and reconstructions of a model do.

    Attributes:
        dataset: Row of `datasets`, of images.
        seed: Seed of the choice of training images and of k-means.
        kmeans_centroids: Number of centroids; 0 takes as many as there are samples of the models. A data set with no more
            training images than that needs fewer, since each image would be its own centroid; their score then has an n of its
            own.
        kmeans_batch_size: Images in a step of mini-batch k-means.
        kmeans_epochs: Passes over the training images.
        pca_components: Numbers of a code up to which principal components are reconstructed from, beside the autoencoders'
            open dimensions; 0 for none.
    """

    dataset: str
    seed: int = 0
    kmeans_centroids: int = 0
    kmeans_batch_size: int = 4096
    kmeans_epochs: int = 10
    pca_components: int = 0

    def __post_init__(self) -> None:
        check_that(self.seed >= 0, "seed", "has to be 0 or more")
        check_that(self.kmeans_centroids >= 0, "kmeans_centroids", "has to be 0 or more")
        check_that(self.kmeans_batch_size >= 1, "kmeans_batch_size", "has to be at least 1")
        check_that(self.kmeans_epochs >= 1, "kmeans_epochs", "has to be at least 1")
        check_that(0 <= self.pca_components <= 4096, "pca_components", "has to lie in 0..4096")


# params.yaml as a whole ---------------------------------------------------------------------------------------------


def _modules(package: str) -> list[str]:
    """Names of the public modules of a package, without importing any."""
    spec = importlib.util.find_spec(package)
    folder = Path(typing.cast(str, typing.cast(Any, spec).origin)).parent
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def implementation(package: str, name: str, where: str) -> types.ModuleType:
    """The module of `package` that implements `name` and holds its `Settings`.

    A package may name modules that implement several things in a table `ALIASES`.

    Raises:
        SettingsError: Naming `where`, when there is no such module.
    """
    aliases: Mapping[str, str] = getattr(importlib.import_module(package), "ALIASES", {})
    module = aliases.get(name, name.replace("-", "_"))
    found: types.ModuleType | None = None
    if module in _modules(package):
        found = importlib.import_module(f"{package}.{module}")
    if found is None or not hasattr(found, "Settings"):
        choices = sorted(
            {*aliases, *(m.replace("_", "-") for m in _modules(package) if _declares_settings(package, m))}
            - {m.replace("_", "-") for m in aliases.values()}
        )
        close = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise SettingsError(f"{where}: unknown '{name}'; {hint}known: {', '.join(choices)}")
    return found


def _declares_settings(package: str, module: str) -> bool:
    spec = importlib.util.find_spec(f"{package}.{module}")
    return spec is not None and "\nclass Settings" in Path(typing.cast(str, spec.origin)).read_text(encoding="utf-8")


class Params:
    """The tables of params.yaml, each row typed and checked when it is asked for.

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
                hint = f"; write '{name}: {{}}' where there are none" if table is None else ""
                raise SettingsError(f"{name}: expected a table, got {'nothing' if table is None else _shown(table)}{hint}")
            for key in _all_keys(table):
                if key in FORBIDDEN_KEYS:
                    raise SettingsError(f"{name}: a key is named '{key}', which DVC's run cache ignores; rename it")
            if name == "sampling":
                continue
            for row, values in table.items():
                if not isinstance(row, str) or not ROW_NAME.fullmatch(row) or len(row) > LONGEST_NAME:
                    raise SettingsError(f"{name}.{row}: a row's name is made of a-z, 0-9 and dashes, at most {LONGEST_NAME}")
                if not isinstance(values, Mapping):
                    raise SettingsError(f"{name}.{row}: expected a table of settings, got {_shown(values)}")
        self.absent = [name for name in TABLES if name not in tables]
        self.tables: dict[str, dict[str, Any]] = {name: dict(tables.get(name, {})) for name in TABLES}

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

    def dataset(self, name: str, asked_by: str = "") -> DatasetSettings:
        """A row of `datasets`, as its source's `Settings`."""
        values = self._row("datasets", name, asked_by)
        return typing.cast(DatasetSettings, self._implemented("pipeline.sources", "datasets", name, "source", values))

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
        drawn, held = getattr(settings, "prior", None), getattr(autoencoder, "prior", None)
        if None not in (drawn, held) and drawn != held:
            raise SettingsError(
                f"densities.{name}.prior: '{drawn}', but the codes of autoencoders.{settings.codes} are held to '{held}'"
            )
        return typing.cast(DensitySettings, settings)

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

    def evaluation(self, dataset: str, asked_by: str = "") -> EvaluationSettings:
        """The row of `evaluations` for a data set."""
        return build(EvaluationSettings, self._row("evaluations", dataset, asked_by), f"evaluations.{dataset}")

    def problems(self) -> Iterator[str]:
        """One line for each thing that is wrong, over all rows."""
        checks: list[Callable[[], object]] = [self.sampling]
        checks += [partial(self.dataset, n) for n in self.rows("datasets")]
        checks += [partial(self._check_evaluation, n) for n in self.rows("evaluations")]
        checks += [partial(self.autoencoder, n) for n in self.rows("autoencoders")]
        checks += [partial(self._check_density, n) for n in self.rows("densities")]
        checks += [partial(self._check_control, n) for n in self.rows("controls")]
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
        self.evaluation(settings.dataset, f"densities.{name}.dataset")

    def _check_control(self, name: str) -> None:
        settings = self.control(name)
        evaluation = self.evaluation(settings.dataset, f"controls.{name}.dataset")
        if evaluation.parzen is None and evaluation.quality is None and settings.pca_components == 0:
            raise SettingsError(f"controls.{name}.dataset: evaluations.{settings.dataset}.parzen is missing")


def _all_keys(table: Mapping[str, Any]) -> Iterator[str]:
    """Keys at any depth, each mapping and list visited once, even where YAML's aliases repeat it or put it into itself."""
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
