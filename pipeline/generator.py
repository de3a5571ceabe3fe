"""A trained generator in Python: draws images, encodes and decodes them, completes rows, and says how likely examples are."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.completion import MEAN_DRAWS, complete_table, means_of
from pipeline.densities import Density, load_density
from pipeline.densities.common.context import LABELS
from pipeline.detection import Scorer, strange
from pipeline.errors import DataError, PipelineError
from pipeline.evaluation.detection import Calibration
from pipeline.sampling import Samples, draw
from pipeline.settings import read_params
from pipeline.storage.codes import CodeReader
from pipeline.storage.columns import Column, are_named, from_codes, load_columns, log_volume, to_codes, varying
from pipeline.storage.shards import from_unit, to_unit
from pipeline.system.streams import stream

__all__ = ["Generator", "Scores", "Strangeness", "save_calibration"]

COLUMNS = "columns.json"  # of an exported table
CALIBRATION = "calibration.safetensors"  # of an export: what validation examples score
RELATIVE = "relative_error"  # of its metadata: whether reconstruction errors are relative to the image
NO_ENCODER = "this folder holds no encoder: export the row again"
ROUNDING = 1e-3  # by which a pixel may be outside 0..1, as after a change of size
AT_ONCE = 250  # images in memory on the way through the networks
FILES = {"density": "density.safetensors", "decoder": "decoder.safetensors", "encoder": "encoder.safetensors"}


class Scores(NamedTuple):
    """What a generator makes of examples, each with shape (n,).

    Attributes:
        log_prob: Log-density of the codes, in nats: low for images of an unusual composition.
        reconstruction_error: Squared error of the decoded images, summed over pixels in 0..1, or relative to the image: high
            for images unlike all it was trained on. 0 where codes are the data.
    """

    log_prob: NDArray[np.float64]
    reconstruction_error: NDArray[np.float64]


class Strangeness(NamedTuple):
    """How strange examples are compared with validation examples, each with shape (n,).

    Attributes:
        strangeness: Log-likelihood and reconstruction error, joined, in nats: larger is stranger.
        p_value: Share of validation examples that are at least as strange; an outlier's is at most the share of false alarms.
    """

    strangeness: NDArray[np.float64]
    p_value: NDArray[np.float64]


class Generator:
    """A density of codes, with the networks between codes and images.

    Images are arrays with shape (n, C, H, W) in 0..1; bytes 0..255 are scaled, and (n, H, W) is taken as grey. If the codes are
    the data, such as the rows of a table, examples are codes: arrays with shape (n, D). A pandas DataFrame may hold the columns
    of a table in any order, and others, if the table's columns have names.

    Arguments:
        density: The density of the codes.
        decoder: From codes to images; None if codes are the data.
        encoder: From images to codes; None if codes are the data, or if it is only to draw.
        columns: Columns of the table that the codes are rows of; examples are then its rows, in its units.
        calibration: What validation examples score, which strangeness is compared with; None if it isn't known.
        relative_error: Whether reconstruction errors are relative to the image, as in the detections of the row.

    Example:
        >>> from pipeline.densities import LatentDensityEstimator
        >>> generator = Generator(LatentDensityEstimator(3))
        >>> samples = generator.sample(5, seed=0)
        >>> samples.shape, generator.log_prob(samples).shape
        ((5, 3), (5,))
    """

    def __init__(
        self,
        density: Density,
        decoder: Decoder | None = None,
        encoder: Encoder | None = None,
        columns: Sequence[Column] = (),
        calibration: Calibration | None = None,
        relative_error: bool = False,
    ) -> None:
        for network in (decoder, encoder):
            if network is not None and network.latent_dim != density.dim:
                raise DataError(f"the density is of {density.dim} numbers per code, the autoencoder of {network.latent_dim}")
        self.density, self.decoder, self.encoder, self.columns = density, decoder, encoder, tuple(columns)
        self.calibration, self.relative_error = calibration, relative_error

    @classmethod
    def load(cls, source: str | os.PathLike[str], device: str | torch.device = "cpu") -> Self:
        """Loads what `python -m stages export` wrote, or a row of the project in the working folder.

        Arguments:
            source: The exported folder, or the name of a row of `densities`.
            device: Where to compute.

        Raises:
            PipelineError: When there is neither such a folder nor such a row, or a file is missing or damaged.
        """
        folder = Path(source)
        columns: tuple[Column, ...] = ()
        calibration, relative_error = None, False
        if (folder / FILES["density"]).is_file():
            paths = {name: folder / file for name, file in FILES.items()}
            if (folder / COLUMNS).is_file():
                columns = load_columns(folder / COLUMNS)
            if (folder / CALIBRATION).is_file():
                calibration, relative_error = _load_calibration(folder / CALIBRATION)
        elif Path("params.yaml").is_file():
            row = str(source)
            params = read_params()
            if folder.exists() and row not in params.rows("densities"):
                raise PipelineError(
                    f"{source} is no exported folder: it holds no {FILES['density']}; `python -m stages export ROW` makes one"
                )
            codes, relative_error = params.density(row).codes, params.relative_error(row)
            paths = {
                "density": Path("data/densities") / row / FILES["density"],
                "decoder": Path("data/codes") / codes / FILES["decoder"],
                "encoder": Path("data/autoencoders") / codes / FILES["encoder"],
            }
            if not paths["density"].is_file():
                raise PipelineError(f"{paths['density']} is missing; run `dvc repro fit@{row}`")
            columns = CodeReader(Path("data/codes") / codes).index.columns
        else:
            raise PipelineError(
                f"{source} is neither an exported folder nor a row of a project in {Path.cwd()}; `python -m stages export ROW` "
                "makes such a folder"
            )
        return cls(
            load_density(paths["density"]).to(device),
            Decoder.load(paths["decoder"], device) if paths["decoder"].is_file() else None,
            Encoder.load(paths["encoder"], device) if paths["encoder"].is_file() else None,
            columns,
            calibration,
            relative_error,
        )

    def sample(
        self, n: int, seed: int | None = None, label: str | int | None = None, context: Mapping[str, str | float] | None = None
    ) -> NDArray[np.float32]:
        """Draws examples: images (n, C, H, W) in 0..1, rows of a table (n, columns), in float64 if need be, or codes (n, D).

        Arguments:
            n: Number of samples.
            seed: The same seed gives the same samples; None draws others each time.
            label: Label of all samples, by its name, of a density with `context: labels`. By default labels are drawn at the
                frequencies of the training codes, as are all contexts.
            context: Values of other columns of the density's context, by name.

        Raises:
            DataError: When n isn't a whole number, or there is a label or context and the density isn't conditioned.
            SettingsError: When no training code has the label, or a column of the context is missing or unknown.
        """
        return self.draw(n, seed, label, context).examples

    def draw(
        self, n: int, seed: int | None = None, label: str | int | None = None, context: Mapping[str, str | float] | None = None
    ) -> Samples:
        """Draws examples with their codes and contexts; arguments and errors are those of `sample`."""
        n = at_least(n, 0, "n")
        seed = secrets.randbits(62) if seed is None else seed
        words = {name: str(value) for name, value in (context or {}).items()} | ({} if label is None else {LABELS: str(label)})
        if words and self.density.context is None:
            raise DataError("this density isn't conditioned on labels or other columns: leave out label and context")
        chosen = self.density.context.parse(words) if words and self.density.context is not None else None
        drawn = draw(self.density, self.decoder, n, seed, context=chosen, columns=self.columns)
        # A given network's pixels may leave the range.
        return drawn if self.decoder is None else drawn._replace(examples=drawn.examples.clip(0, 1))

    @torch.no_grad()
    def encode(self, images: ArrayLike) -> NDArray[np.float32]:
        """Codes (n, D) of images.

        Raises:
            DataError: When the shape isn't that of the images it was trained on, pixels aren't in 0..1, or there is no encoder.
        """
        if self.decoder is None:
            return self._rows(images)
        if self.encoder is None:
            raise DataError(NO_ENCODER)
        value_range = self.decoder.value_range
        codes = [self.encoder(from_unit(part, value_range)).float().cpu() for part in self._images(images)]
        return torch.cat(codes).numpy()

    @torch.no_grad()
    def decode(self, codes: ArrayLike) -> NDArray[np.float32]:
        """Images (n, C, H, W) in 0..1, or rows of a table (n, columns), of codes (n, D)."""
        values = self._codes(codes)
        if self.decoder is None:
            return from_codes(self.columns, values)
        parts = torch.from_numpy(values).to(self.density.shift.device).split(AT_ONCE)
        return torch.cat([to_unit(self.decoder(part), self.decoder.value_range).clamp(0, 1).cpu() for part in parts]).numpy()

    @torch.no_grad()
    def log_prob(self, examples: ArrayLike) -> NDArray[np.float64]:
        """Log-density (n,) of the examples' codes, in nats. It isn't comparable between autoencoders.

        Raises:
            DataError: When the density has no likelihood.
        """
        if not self.density.has_log_prob:
            raise DataError(f"a density of the family {self.density.family} has no likelihood")
        codes = torch.from_numpy(self.encode(examples)).to(self.density.shift.device)
        values: NDArray[np.float64] = self.density.log_prob(codes).double().cpu().numpy()
        return values + log_volume(self.columns)

    def score(self, examples: ArrayLike) -> Scores:
        """How likely examples are, as `log_prob` says, and how well they are reconstructed, as `python -m stages score` lists.

        Raises:
            PipelineError: When the density has no likelihood.
        """
        scores = self._scores(examples, noisy=False)
        values = scores["log_likelihood"]
        return Scores(values, scores.get("reconstruction_error", np.zeros(len(values))))

    def strangeness(self, examples: ArrayLike) -> Strangeness:
        """How strange examples are, as `python -m stages score` says.

        Raises:
            DataError: When it isn't known what validation examples score: the folder was exported without.
            PipelineError: When the density has no likelihood.
        """
        if self.calibration is None:
            raise DataError("it isn't known how strange validation examples are: export the row again, and load that folder")
        joined = self.calibration.join(strange(self._scores(examples, noisy=True)))
        return Strangeness(joined, self.calibration.p_values(joined))

    def _scores(self, examples: ArrayLike, noisy: bool) -> dict[str, NDArray[np.float64]]:
        """The scores of examples by name, each with shape (n,); `noisy` as validation rows are, to compare with them."""
        if self.decoder is not None and self.encoder is None:
            raise DataError(NO_ENCODER)
        given = self._rows(examples, noisy=noisy) if self.decoder is None else torch.cat(self._images(examples)).cpu().numpy()
        value_range = (0.0, 1.0) if self.decoder is None else self.decoder.value_range
        volume = log_volume(self.columns)
        scorer = Scorer(
            self.density, self.encoder, self.decoder, value_range, log_volume=volume, relative_error=self.relative_error
        )
        parts = [scorer(given[start : start + AT_ONCE]) for start in range(0, max(len(given), 1), AT_ONCE)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def complete(self, rows: ArrayLike, draws: int, seed: int = 0) -> NDArray[np.float64]:
        """Rows with their missing values drawn, given the others.

        Arguments:
            rows: Rows of a table in its units, or codes, with shape (n, columns), NaN where a value is missing.
            draws: How many times each row is completed.
            seed: Seed of the draws.

        Returns:
            The completed rows, with shape (draws, n, columns).

        Raises:
            DataError: When examples are images, or rows have another shape or infinite values.
            PipelineError: When the family can't predict some dimensions from others.
        """
        return complete_table(self.density, self._incomplete(rows), self.columns, at_least(draws, 1, "draws"), seed)

    def complete_by_means(self, rows: ArrayLike, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows with the means of 100 draws in place of missing values, and the draws' standard deviations, NaN elsewhere.

        Arguments and errors are those of `complete`; both results have shape (n, columns).
        """
        values = self._incomplete(rows)
        return means_of(complete_table(self.density, values, self.columns, MEAN_DRAWS, seed), values, self.columns)

    def _incomplete(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Rows of a table with missing values."""
        if self.decoder is not None:
            raise DataError("only rows of a table can be completed, not images")
        values = self._table(rows)
        with np.errstate(over="ignore"):
            if np.isinf(values.astype(np.float32)).any():
                raise DataError("a value is infinite in float32")
        return values

    def _codes(self, codes: ArrayLike) -> NDArray[np.float32]:
        values = np.array(codes, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != self.density.dim:
            raise DataError(f"codes have shape {values.shape}, expected (n, {self.density.dim})")
        _check_finite(values, "code")
        return values

    def _table(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Rows of the table, with shape (n, columns); a DataFrame's columns by their names, if the table has names."""
        names = [column.name for column in self.columns]
        if are_named(names) and (given := getattr(rows, "columns", None)) is not None and are_named(list(map(str, given))):
            if missing := [name for name in names if name not in given]:
                raise DataError(f"rows have no column '{missing[0]}'; expected {', '.join(names)}")
            rows = rows[names]  # type: ignore[index, call-overload]
        values, expected = np.asarray(rows, dtype=np.float64), len(names) or self.density.dim
        if values.ndim != 2 or values.shape[1] != expected:
            raise DataError(f"rows have shape {values.shape}, expected (n, {expected})")
        return values

    def _rows(self, rows: ArrayLike, noisy: bool = False) -> NDArray[np.float32]:
        """Codes of the rows of a table; with noise on dequantised columns, as validation rows have it."""
        if not self.columns:
            return self._codes(rows)
        values, chosen = self._table(rows), varying(self.columns)
        _check_finite(values, "row")
        noise = stream("noise of new rows", 0).random((len(values), len(chosen))) if noisy else None
        return to_codes([self.columns[number] for number in chosen], values[:, chosen], noise)

    def _images(self, images: ArrayLike) -> tuple[torch.Tensor, ...]:
        """Images in 0..1, some at a time, where the networks are."""
        assert self.decoder is not None
        values, expected = np.asarray(images), tuple(self.decoder.image_shape)
        shape = values.shape
        values = values[:, None] if values.ndim == 3 and expected[0] == 1 else values  # (n, H, W) -> (n, 1, H, W)
        if values.ndim != 4 or values.shape[1:] != expected or not len(values):
            remedy = "; channels come first" if shape[1:] == (*expected[1:], expected[0]) else ""
            remedy = "; one image is a stack of one, images[None]" if shape == expected else remedy
            raise DataError(f"images have shape {shape}, expected (n, {', '.join(map(str, expected))}){remedy}")
        values = values.astype(np.float32) / np.float32(255) if values.dtype == np.uint8 else values.astype(np.float32)
        low, high = values.min(), values.max()
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN, too
            raise DataError(f"pixels are {low:.4g} to {high:.4g}, expected numbers in 0..1, or bytes (uint8) in 0..255")
        parts: tuple[torch.Tensor, ...] = torch.from_numpy(values).to(self.density.shift.device).split(AT_ONCE)
        return parts


def at_least(count: int, least: int, name: str) -> int:
    """A count of draws as a whole number.

    Example:
        >>> at_least(np.int64(3), 1, "draws")
        3
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
        raise DataError(f"{name} must be a whole number, at least {least}, not {count!r}")
    return int(count)


def _check_finite(values: NDArray[np.floating], name: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise DataError(f"{name} {row} (counted from 0) holds {values[row, column]} in column {column}; leave such {name}s out")


def save_calibration(scores: Mapping[str, NDArray[np.float64]], path: Path, relative_error: bool) -> None:
    """Writes what validation examples score, by score, each with shape (N,), and whether errors are relative to the image."""
    parts = {name: np.ascontiguousarray(values) for name, values in scores.items()}
    save_file(parts, path, {RELATIVE: str(relative_error).lower()})


def _load_calibration(path: Path) -> tuple[Calibration, bool]:
    """What validation examples score, and whether errors are relative to the image; files without a word on it: absolute."""
    try:
        with safe_open(path, "np") as file:
            scores = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
            relative_error = (file.metadata() or {}).get(RELATIVE) == "true"
        return Calibration(strange(scores)), relative_error
    except (OSError, SafetensorError, ValueError, PipelineError) as error:
        raise DataError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); export the row again") from None
