"""Pictures of the report, drawn from the arrays that stages wrote: one set per row, and plots of all rows of a data set."""

from __future__ import annotations

import base64
import functools
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.settings import Params
from pipeline.system.files import write_text
from stages import workspace
from stages.arrays import SavedArrays, check_output, load_arrays
from stages.reporting.scoreboard import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = [
    "COMBINED",
    "FIGURES",
    "Picture",
    "autoencoders_of",
    "combined_pictures",
    "densities_of",
    "draw_combined",
    "draw_row",
    "pictures",
]

REPORTS = Path("reports")
COMBINED, FIGURES = REPORTS / "combined", REPORTS / "figures"
# Table for `dvc plots` -> the stage whose curves it holds, and their column.
TABLES = {
    "training-loss": ("train", "loss"),
    "opened-dimensions": ("train", "open_dimensions"),
    "validation": ("fit", "valid_log_likelihood"),
}
Values = dict[str, list[tuple[float, float]]]  # by row: (step, value)
SIDE_BY_SIDE, LARGE_PIXELS, LARGE_SIDE_BY_SIDE = 36, 128, 9  # samples of a row next to those of others; fewer of large images
RECONSTRUCTED = 6  # test images in the figure of all autoencoders
CAPTIONS = Path(__file__).parent / "templates" / "captions.yaml"


@dataclass(frozen=True)
class Picture:
    """A picture on disk, with its title and caption.

    Attributes:
        path: The PNG file.
        title: What it is.
        caption: What to look for.
    """

    path: Path
    title: str
    caption: str

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height; (0, 0) for a file that isn't PNG."""
        with open(self.path, "rb") as file:
            header = file.read(24)
        if header[:8] != b"\x89PNG\r\n\x1a\n" or len(header) < 24:
            return 0, 0
        width, height = struct.unpack(">II", header[16:24])
        return width, height

    @property
    def wide(self) -> bool:
        """Whether it needs the width of the page."""
        width, height = self.pixels
        return height > 0 and width / height > 2.4

    @property
    def data(self) -> str:
        """The file as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()

    @property
    def link(self) -> str:
        """Its path from the report's folder."""
        return Path(os.path.relpath(self.path, REPORTS)).as_posix()


@functools.cache
def _captions() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    from ruamel.yaml import YAML

    loaded: Mapping[str, Mapping[str, Mapping[str, str]]] = YAML(typ="safe", pure=True).load(CAPTIONS)
    return loaded


def _picture(path: Path, stage: str, name: str, drawn_as: str | None = None) -> Picture:
    known = _captions().get(stage, {})
    entry = known.get(f"{name}/{drawn_as}") or known.get(name) or {"title": name.replace("-", " ").capitalize(), "caption": ""}
    return Picture(path, entry["title"], entry["caption"])


def pictures(stage: str, row: str, drawn_as: str | None = None, skip: Sequence[str] = ()) -> list[Picture]:
    """The pictures of a stage's row that `report` has drawn, sorted by name.

    Arguments:
        stage: Name of the stage.
        row: Name of the row.
        drawn_as: What vectors are drawn as, for captions that depend on it.
        skip: Names of files to leave out.
    """
    paths = sorted(workspace.figure_folder(stage, row).glob("*.png"))
    return [_picture(path, stage, path.stem, drawn_as) for path in paths if path.stem not in skip]


# One row --------------------------------------------------------------------------------------------------------------


def draw_row(params: Params, stage: str, row: str, folder: Path) -> list[Path]:
    """Draws the pictures of a stage's row from the arrays that the stage wrote.

    Arguments:
        params: All tables.
        stage: Name of the stage.
        row: Name of the row.
        folder: Where they are written, as `NAME.png`.

    Returns:
        The files.
    """
    from pipeline.figures import save_figure

    paths = []
    for name, draw in DRAWN.get(stage, {}).items():
        if (figure := draw(params, row)) is not None:
            paths.append(folder / f"{name}.png")
            save_figure(figure, paths[-1])
    return paths


def _images(stage: str, name: str, key: str) -> Callable[[Params, str], Figure | None]:
    """A drawing of the images of an array, ten in a row."""

    def draw(_params: Params, row: str) -> Figure | None:
        from pipeline.figures import image_grid

        arrays = load_arrays(stage, row, name)
        return None if arrays is None else image_grid(arrays.values[key] / 255, columns=10)

    return draw


def _training_vectors(params: Params, row: str) -> Figure | None:
    from pipeline.figures import density_panels, image_grid
    from pipeline.sources.common.patches import restore

    arrays = load_arrays("train", row, "training-vectors")
    if arrays is None:
        return None
    vectors = arrays.values["vectors"]
    if params.dataset(params.autoencoder(row).dataset).drawn_as == "patches":
        return image_grid(0.5 + restore(vectors), columns=10)
    return density_panels(vectors, {})


def _row_reconstructions(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import image_rows

    arrays = load_arrays("train", row, "reconstructions")
    if arrays is None:
        return None
    return image_rows({"input": arrays.values["inputs"] / 255, "reconstruction": arrays.values["reconstructions"] / 255})


def _row_open_dimensions(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import open_dimensions

    arrays = load_arrays("train", row, "open-dimensions")
    return None if arrays is None else open_dimensions({row: (arrays.values["ks"], arrays.values["mse"])})


def _row_codes(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import codes_and_reconstructions

    arrays = load_arrays("train", row, "reconstructions")
    if arrays is None or "codes" not in arrays.values:
        return None
    values = arrays.values
    images = values["inputs"] / 255, values["reconstructions"] / 255
    return codes_and_reconstructions({row: (values["codes"], values.get("labels"), *images)})


def _row_samples(params: Params, row: str) -> Figure | None:
    from pipeline.figures import density_panels, image_grid
    from pipeline.sources.common.patches import restore

    arrays = load_arrays("sample", row, "samples")
    if arrays is None:
        return None
    dataset, samples = params.dataset(params.density(row).dataset), arrays.values["samples"]
    if samples.dtype == "uint8":
        return image_grid(samples / 255, columns=10)
    if dataset.drawn_as == "patches":
        return image_grid(0.5 + restore(samples), columns=10)
    return density_panels(arrays.values["target"], {row: samples})


def _samples_by_class(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import image_rows

    arrays = load_arrays("sample", row, "samples-by-class")
    return None if arrays is None else image_rows(dict(zip(arrays.names, arrays.values["samples"] / 255, strict=True)))


def _truncated(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import image_rows

    arrays = load_arrays("sample", row, "truncated")
    if arrays is None:
        return None
    ks, images = arrays.values["ks"].tolist(), arrays.values["images"] / 255
    return image_rows({f"first {k}" if k < ks[-1] else f"all {k}": i for k, i in zip(ks, images, strict=True)})


def _parzen_bandwidth(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import parzen_curves

    arrays = load_arrays("evaluate", row, "parzen-bandwidth")
    if arrays is None:
        return None
    return parzen_curves(arrays.values["bandwidths"], {row: arrays.values["valid_log_likelihood"]}, *arrays.names)


def _nearest_training_images(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import image_rows

    arrays = load_arrays("evaluate", row, "nearest-training-images")
    if arrays is None:
        return None
    names = [f"{distance:.3f}" for distance in arrays.values["distances"].tolist()]
    samples, neighbours = arrays.values["samples"] / 255, arrays.values["neighbours"] / 255
    return image_rows({"sample": samples, "nearest": neighbours}, column_names=names)


def _row_interpolations(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import interpolation_panels

    arrays = load_arrays("evaluate", row, "interpolation")
    if arrays is None or "images" not in arrays.values:
        return None
    ends, images = arrays.values["originals"] / 255, arrays.values["images"] / 255
    panels = [("", first, last, {name: i}) for name, (first, last), i in zip(arrays.names, ends, images, strict=True)]
    return interpolation_panels(panels, arrays.values["weights"].tolist())


def _row_interpolation_curves(params: Params, row: str) -> Figure | None:
    label = params.dataset(params.density(row).dataset).label
    return _interpolation_curves([row], {row: row}, label, fewest=1)


def _samples_beside_target(params: Params, row: str) -> Figure | None:
    return _grid_samples(params, [row], {row: row}, fewest=1)


def _log_density(params: Params, row: str) -> Figure | None:
    return _grid_log_density(params, [row], {row: row}, fewest=1)


def _patches_beside_real(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import patches_beside_real
    from pipeline.sources.common.patches import restore

    arrays = load_arrays("evaluate", row, "patches")
    return None if arrays is None else patches_beside_real(restore(arrays.values["real"]), restore(arrays.values["samples"]))


# Name of a score -> title of its panel.
SCORES = {
    "strangeness": "joined: strangeness (nats)",
    "log_likelihood": "log-likelihood of the code (nats)",
    "reconstruction_error": "squared error of the image",
}


def _detection_scores(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import histogram_panels

    arrays = load_arrays("detect", row, "scores")
    if arrays is None:
        return None
    values = arrays.values
    panels = {
        SCORES[name]: (values[f"{name}_edges"], {kind: values[f"{name}_{kind}"] for kind in ("inliers", "outliers")})
        for name in arrays.names
    }
    return histogram_panels(panels, {SCORES["strangeness"]: float(values["threshold"][0])}, columns=2)


def _roc(_params: Params, row: str) -> Figure | None:
    from pipeline.figures import curves

    arrays = load_arrays("detect", row, "roc")
    if arrays is None:
        return None
    values, titles = arrays.values, {name: SCORES[name].partition(" (")[0] for name in arrays.names}
    alarms = {titles[name]: values[f"{name}_alarms"] for name in arrays.names}
    detected = {titles[name]: values[f"{name}_detected"] for name in arrays.names}
    return curves(alarms, detected, "share of inliers taken for outliers", "share of outliers detected")


def _strangest(params: Params, row: str) -> Figure | None:
    from pipeline.figures import image_rows
    from pipeline.sources.common.patches import restore

    arrays = load_arrays("detect", row, "strangest")
    if arrays is None:
        return None
    kinds = {name: arrays.values[f"{i}_examples"] for i, name in enumerate(arrays.names)}
    if next(iter(kinds.values())).ndim == 4:
        images = {name: examples / 255 for name, examples in kinds.items()}
    elif params.dataset(params.detection(row).dataset).drawn_as == "patches":
        images = {name: 0.5 + restore(examples) for name, examples in kinds.items()}
    else:
        return None
    fewest = min(map(len, images.values()))
    return image_rows({name: examples[:fewest] for name, examples in images.items()})


# Stage -> name of the picture -> the function that draws it, or returns None if the row has no such picture.
DRAWN: Mapping[str, Mapping[str, Callable[[Params, str], Figure | None]]] = {
    "control": {
        "training-images": _images("control", "training-images", "images"),
        "kmeans-centroids": _images("control", "kmeans-centroids", "images"),
    },
    "train": {
        "training-vectors": _training_vectors,
        "reconstructions": _row_reconstructions,
        "open-dimensions": _row_open_dimensions,
        "codes": _row_codes,
    },
    "sample": {"samples": _row_samples, "samples-by-class": _samples_by_class, "truncated": _truncated},
    "evaluate": {
        "parzen-bandwidth": _parzen_bandwidth,
        "nearest-training-images": _nearest_training_images,
        "nearest-by-code": _images("evaluate", "nearest-by-code", "images"),
        "interpolations": _row_interpolations,
        "interpolation-log-likelihood": _row_interpolation_curves,
        "samples-beside-target": _samples_beside_target,
        "log-density": _log_density,
        "patches-beside-real": _patches_beside_real,
    },
    "detect": {"scores": _detection_scores, "roc": _roc, "strangest": _strangest},
}


# Rows side by side ---------------------------------------------------------------------------------------------------


def autoencoders_of(params: Params, dataset: str) -> list[str]:
    """Rows of `autoencoders` that are trained on a data set."""
    return [name for name in params.rows("autoencoders") if params.autoencoder(name).dataset == dataset]


def densities_of(params: Params, dataset: str) -> list[str]:
    """Rows of `densities` that model a data set."""
    return [name for name in params.rows("densities") if params.density(name).dataset == dataset]


def draw_combined(params: Params, folder: Path) -> None:
    """Draws the plots that compare the rows of each data set, and writes their curves as tables.

    Arguments:
        params: All tables.
        folder: Where they are written, as `<dataset>-<plot>.png`, and `<plot>.tsv` with the curves of all data sets.
    """
    from pipeline.figures import save_figure

    for dataset in params.rows("datasets"):
        for name, figure in _combined(params, dataset).items():
            if figure is not None:
                save_figure(figure, folder / f"{dataset}-{name}.png")
    _write_tables(params, folder)


def combined_pictures(dataset: str) -> list[Picture]:
    """The plots of a data set that `draw_combined` has drawn into `COMBINED`."""
    possible = [_picture(COMBINED / f"{dataset}-{name}.png", "combined", name) for name in _captions()["combined"]]
    return [picture for picture in possible if picture.path.exists()]


def _combined(params: Params, dataset: str) -> dict[str, Figure | None]:
    autoencoders, densities = autoencoders_of(params, dataset), densities_of(params, dataset)
    controls = [name for name in params.rows("controls") if params.control(name).dataset == dataset]
    incremental = any(getattr(params.autoencoder(name), "incremental", None) for name in autoencoders)
    variational = _by_kl_weight(params, autoencoders)
    titles = {name: name.removeprefix(f"{dataset}-") for name in (*autoencoders, *densities)}
    return {
        "samples": _samples(densities, titles),
        "grid-samples": _grid_samples(params, densities, titles),
        "grid-log-density": _grid_log_density(params, densities, titles),
        "reconstructions": _reconstructions(autoencoders, titles),
        "codes": _codes(variational),
        "trade-off": _trade_off(variational),
        "open-dimensions": _open_dimensions(autoencoders, controls, titles),
        "interpolations": _interpolations(params, densities, titles),
        "interpolation-log-likelihood": _interpolation_curves(densities, titles, params.dataset(dataset).label),
        "training-loss": _curves(_read_curves("train", autoencoders, "loss"), titles, "training loss", log_y=True),
        "opened-dimensions": _curves(
            _read_curves("train", autoencoders if incremental else [], "open_dimensions"), titles, "open dimensions"
        ),
        "validation": _curves(
            _read_curves("fit", densities, "valid_log_likelihood"), titles, "validation log-likelihood (nats)"
        ),
        "validation-given-context": _curves(
            _read_curves("fit", densities, "valid_conditional_log_likelihood"),
            titles,
            "validation log-likelihood given the context (nats)",
        ),
    }


# `titles` gives the name of a row in a picture: without the data set's name, which is in the heading.


def _samples(rows: Sequence[str], titles: Mapping[str, str]) -> Figure | None:
    """Figures 1, 8, 11 and 12: the first samples of each row."""
    from pipeline.figures import image_panels

    saved = {row: load_arrays("sample", row, "samples") for row in rows}
    panels = {titles[row]: arrays.values["samples"] for row, arrays in saved.items() if arrays is not None}
    panels = {row: samples for row, samples in panels.items() if samples.dtype == "uint8"}  # not of vectors
    if len(panels) < 2:
        return None
    large = any(samples.shape[-1] >= LARGE_PIXELS for samples in panels.values())
    count, columns = (LARGE_SIDE_BY_SIDE, 3) if large else (SIDE_BY_SIDE, 6)
    return image_panels({row: samples[:count] / 255 for row, samples in panels.items()}, columns=columns)


def _grid_arrays(
    params: Params, rows: Sequence[str], titles: Mapping[str, str]
) -> tuple[dict[str, Mapping[str, NDArray[Any]]], float]:
    """The arrays of each row on the grid density, by title, and the end of the axes."""
    grids = {titles[row]: load_arrays("evaluate", row, "grid") for row in rows}
    half_length = float(getattr(params.dataset(params.density(rows[0]).dataset), "half_length", 5.0)) if rows else 0.0
    return {row: arrays.values for row, arrays in grids.items() if arrays is not None}, half_length + 1


def _grid_samples(params: Params, rows: Sequence[str], titles: Mapping[str, str], fewest: int = 2) -> Figure | None:
    """Figure 5: samples of each row over the target's, for at least `fewest` rows."""
    from pipeline.figures import density_panels
    from pipeline.sources.common.bars import DROPPED_BOX

    found, limit = _grid_arrays(params, rows, titles)
    if len(found) < fewest:
        return None
    target = next(iter(found.values()))["target"]
    return density_panels(target, {row: arrays["samples"] for row, arrays in found.items()}, limit, DROPPED_BOX)


def _grid_log_density(params: Params, rows: Sequence[str], titles: Mapping[str, str], fewest: int = 2) -> Figure | None:
    """Figure 5, as heat maps: log-density of the truth and of each row that has one, for at least `fewest` rows."""
    from pipeline.figures import log_density_maps

    found, limit = _grid_arrays(params, rows, titles)
    maps = {row: arrays["model"] for row, arrays in found.items() if "model" in arrays}
    if len(maps) < fewest:
        return None
    truth = next(arrays["truth"] for arrays in found.values() if "truth" in arrays)
    return log_density_maps({"truth": truth} | maps, limit)


def _reconstructions(rows: Sequence[str], titles: Mapping[str, str]) -> Figure | None:
    """Figure 6: the first test images, and what each autoencoder makes of them, with its scores over all test images."""
    from pipeline.figures import reconstructions

    found = {row: load_arrays("train", row, "reconstructions") for row in rows}
    outputs = {row: arrays.values for row, arrays in found.items() if arrays is not None}
    if len(outputs) < 2:
        return None
    notes = {}
    for row in outputs:
        metrics = read_metrics("train", row)
        scores = (("test_mse", "MSE {:.4f}"), ("test_psnr", "PSNR {:.1f} dB"), ("test_ssim", "SSIM {:.3f}"))
        notes[titles[row]] = "\n".join(text.format(metrics[key]) for key, text in scores if key in metrics)
    inputs = next(iter(outputs.values()))["inputs"]
    columns = {titles[row]: values["reconstructions"][:RECONSTRUCTED] / 255 for row, values in outputs.items()}
    return reconstructions(inputs[:RECONSTRUCTED] / 255, columns, notes)


def _by_kl_weight(params: Params, rows: Sequence[str]) -> dict[str, float]:
    """The largest group of VAEs that differ in only the weight of their divergence (and the seed), by ascending weight."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        settings = asdict(params.autoencoder(row))
        weight = settings.pop("kl_weight", None)
        if weight is not None:
            groups.setdefault(str(settings | {"seed": 0}), {})[row] = weight
    largest = max(groups.values(), key=lambda group: len(set(group.values())), default={})
    return dict(sorted(largest.items(), key=lambda item: item[1])) if len(set(largest.values())) > 1 else {}


def _codes(rows: Mapping[str, float]) -> Figure | None:
    """Figure 2: codes of two numbers and reconstructions, by the weight of the divergence; the first trial of each weight."""
    from pipeline.figures import codes_and_reconstructions

    panels = {}
    for row, weight in rows.items():
        arrays = load_arrays("train", row, "reconstructions")
        if arrays is not None and "codes" in arrays.values and f"KL weight {weight:g}" not in panels:
            values = arrays.values
            images = values["inputs"] / 255, values["reconstructions"] / 255
            panels[f"KL weight {weight:g}"] = values["codes"], values.get("labels"), *images
    return codes_and_reconstructions(panels) if len(panels) > 1 else None


def _trade_off(rows: Mapping[str, float]) -> Figure | None:
    """Figure 13: reconstruction error and divergence on test images, averaged over the trials of each weight."""
    from pipeline.figures import trade_off

    scores: dict[float, list[tuple[float, float]]] = {}
    for row, weight in rows.items():
        metrics = read_metrics("train", row)
        if "test_kl" in metrics:
            scores.setdefault(weight, []).append((metrics["test_squared_error"], metrics["test_kl"]))
    if len(scores) < 2:
        return None
    means = [[sum(values) / len(values) for values in zip(*trials, strict=True)] for trials in scores.values()]
    return trade_off(list(scores), [error for error, _ in means], [kl for _, kl in means])


def _interpolations(params: Params, rows: Sequence[str], titles: Mapping[str, str]) -> Figure | None:
    """Figure 7: images between test images, once per autoencoder, however many densities it has."""
    from pipeline.figures import interpolation_panels

    found: dict[str, SavedArrays] = {}
    for row in rows:
        codes = params.density(row).codes
        arrays = load_arrays("evaluate", row, "interpolation")
        if arrays is not None and "images" in arrays.values:
            found.setdefault(codes, arrays)
    if len(found) < 2:
        return None
    first = next(iter(found.values()))
    ends = first.values["originals"] / 255
    panels = [
        (name, ends[i, 0], ends[i, 1], {titles[codes]: arrays.values["images"][i] / 255 for codes, arrays in found.items()})
        for i, name in enumerate(first.names)
    ]
    return interpolation_panels(panels, first.values["weights"].tolist())


def _interpolation_curves(rows: Sequence[str], titles: Mapping[str, str], label: str, fewest: int = 2) -> Figure | None:
    """Figure 10: log-likelihood between test codes of the same label (or domain) and of different ones, of `fewest` rows."""
    import numpy as np

    from pipeline.figures import curve_panels, pair_kinds

    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    weights: Sequence[float] = ()
    for row in rows:
        arrays = load_arrays("evaluate", row, "interpolation")
        values = arrays.values if arrays is not None else {}
        lines = {
            name: (values[f"{kind}_mean"], np.stack([values[f"{kind}_lower"], values[f"{kind}_upper"]]))
            for kind, name in pair_kinds(label).items()
            if f"{kind}_mean" in values
        }
        if lines:
            panels[titles[row]], weights = lines, values["curve_weights"].tolist()
    if len(panels) < fewest:
        return None
    return curve_panels(panels, weights, "weight a of the second code", "log-likelihood of the code (nats)")


def _open_dimensions(rows: Sequence[str], controls: Sequence[str], titles: Mapping[str, str]) -> Figure | None:
    """Test error against the number of open dimensions: each autoencoder's, and principal components."""
    from pipeline.figures import open_dimensions

    names = [("train", row, titles[row]) for row in rows] + [("control", row, "principal components") for row in controls]
    found = {name: load_arrays(stage, row, "open-dimensions") for stage, row, name in names}
    series = {name: (arrays.values["ks"], arrays.values["mse"]) for name, arrays in found.items() if arrays is not None}
    return open_dimensions(series) if series else None


def _curves(values: Values, titles: Mapping[str, str], label: str, log_y: bool = False) -> Figure | None:
    """One line per row against the step; rows with fewer than two values are left out."""
    from pipeline.figures import curves

    steps = {titles[row]: [step for step, _ in points] for row, points in values.items() if len(points) > 1}
    lines = {titles[row]: [value for _, value in points] for row, points in values.items() if len(points) > 1}
    if not lines:
        return None
    # A single line has no legend: name it in the title.
    title = "" if len(lines) > 1 else next(iter(lines))
    return curves(steps, lines, "step", label, title, log_y=log_y)


def _read_curves(stage: str, rows: Sequence[str], column: str) -> Values:
    """The values of a column of the rows' curves, with their steps."""
    import pandas as pd

    found: Values = {}
    for row in rows:
        path = workspace.curve_file(stage, row)
        if not path.exists():
            continue
        check_output(stage, row, path)
        try:
            table = pd.read_csv(path, sep="\t")
            table = table[[key for key in ("step", column) if key in table]].apply(pd.to_numeric).dropna()
        except (OSError, ValueError, TypeError) as error:  # ParserError and UnicodeDecodeError are ValueErrors
            problem = " ".join(str(error).split())[:200]
            raise PipelineError(f"{path} can't be read ({problem}); {workspace.rerun(stage, row)}") from None
        if {"step", column} <= set(table.columns):
            found[row] = list(zip(table["step"].tolist(), table[column].tolist(), strict=True))
    return found


def _write_tables(params: Params, folder: Path) -> None:
    """Curves of all rows as tables for `dvc plots`, one table per quantity: it can't combine the files of a folder."""
    for name, (stage, column) in TABLES.items():
        lines = [f"dataset\trow\tstep\t{column}"]
        for dataset in params.rows("datasets"):
            rows = autoencoders_of(params, dataset) if stage == "train" else densities_of(params, dataset)
            for row, points in _read_curves(stage, rows, column).items():
                lines += [f"{dataset}\t{row}\t{step}\t{value!r}" for step, value in points]
        write_text(folder / f"{name}.tsv", "\n".join(lines) + "\n")
