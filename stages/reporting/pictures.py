"""Pictures of the report, each with what to look for: those that stages left, and plots of all rows of a data set together."""

from __future__ import annotations

import base64
import functools
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.settings import Params
from pipeline.system.files import write_text
from stages import workspace
from stages.arrays import Arrays, load_arrays
from stages.reporting.scoreboard import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["COMBINED", "Picture", "autoencoders_of", "combined_pictures", "densities_of", "draw_combined", "pictures"]

REPORTS = Path("reports")
COMBINED = REPORTS / "combined"
# Table for `dvc plots` -> the stage whose curves it holds, and their column.
TABLES = {
    "training-loss": ("train", "loss"),
    "opened-dimensions": ("train", "open_dimensions"),
    "validation": ("fit", "valid_log_likelihood"),
}
Values = dict[str, list[tuple[float, float]]]  # by row: (step, value)
RECONSTRUCTED = 6  # test images in the figure of all autoencoders
CAPTIONS = Path(__file__).parent / "templates" / "captions.yaml"


@dataclass(frozen=True)
class Picture:
    """A picture on disk with what to look for.

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
    found = known.get(f"{name}/{drawn_as}") or known.get(name) or {"title": name.replace("-", " ").capitalize(), "caption": ""}
    return Picture(path, found["title"], found["caption"])


def pictures(stage: str, row: str, drawn_as: str | None = None, skip: Sequence[str] = ()) -> list[Picture]:
    """The pictures that a stage left, in order of their names.

    Arguments:
        stage: Name of the stage.
        row: Name of the row.
        drawn_as: What vectors are drawn as, for captions that depend on it.
        skip: Names of files that aren't shown.
    """
    paths = sorted(workspace.figure_folder(stage, row).glob("*.png"))
    return [_picture(path, stage, path.stem, drawn_as) for path in paths if path.stem not in skip]


# Rows side by side ---------------------------------------------------------------------------------------------------


def autoencoders_of(params: Params, dataset: str) -> list[str]:
    """Rows of `autoencoders` that are trained on a data set."""
    return [name for name in params.rows("autoencoders") if params.autoencoder(name).dataset == dataset]


def densities_of(params: Params, dataset: str) -> list[str]:
    """Rows of `densities` that model a data set."""
    return [name for name in params.rows("densities") if params.density(name).dataset == dataset]


def draw_combined(params: Params, folder: Path) -> None:
    """Draws the plots that set the rows of each data set side by side, and writes their curves as tables.

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
    found = [_picture(COMBINED / f"{dataset}-{name}.png", "combined", name) for name in _captions()["combined"]]
    return [picture for picture in found if picture.path.exists()]


def _combined(params: Params, dataset: str) -> dict[str, Figure | None]:
    autoencoders, densities = autoencoders_of(params, dataset), densities_of(params, dataset)
    controls = [name for name in params.rows("controls") if params.control(name).dataset == dataset]
    incremental = any(getattr(params.autoencoder(name), "incremental", None) for name in autoencoders)
    variational = _by_kl_weight(params, autoencoders)
    shown = {name: name.removeprefix(f"{dataset}-") for name in (*autoencoders, *densities)}
    return {
        "samples": _samples(densities, shown),
        "grid-samples": _grid_samples(params, dataset, shown),
        "grid-log-density": _grid_log_density(params, dataset, shown),
        "reconstructions": _reconstructions(autoencoders, shown),
        "codes": _codes(variational),
        "trade-off": _trade_off(variational),
        "open-dimensions": _open_dimensions(autoencoders, controls, shown),
        "interpolations": _interpolations(params, densities, shown),
        "interpolation-log-likelihood": _interpolation_curves(densities, shown, params.dataset(dataset).label),
        "training-loss": _curves(_read_curves("train", autoencoders, "loss"), shown, "training loss", log_y=True),
        "opened-dimensions": _curves(
            _read_curves("train", autoencoders if incremental else [], "open_dimensions"), shown, "open dimensions"
        ),
        "validation": _curves(
            _read_curves("fit", densities, "valid_log_likelihood"), shown, "validation log-likelihood (nats)"
        ),
    }


# `shown` gives the name of a row as it stands in a picture: without that of the data set, which stands above all of them.


def _samples(rows: Sequence[str], shown: Mapping[str, str]) -> Figure | None:
    """Figures 1, 8, 11 and 12: the first samples of each row."""
    from pipeline.figures import image_panels

    found = {row: load_arrays("sample", row, "samples") for row in rows}
    panels = {shown[row]: arrays.values["samples"] / 255 for row, arrays in found.items() if arrays is not None}
    few = any(len(images) <= 9 for images in panels.values())
    return image_panels(panels, columns=3 if few else 6) if len(panels) > 1 else None


def _grid_arrays(params: Params, dataset: str, shown: Mapping[str, str]) -> tuple[dict[str, Mapping[str, NDArray[Any]]], float]:
    """What `evaluate` left of each row on the grid density, by the name shown, and the end of the axes."""
    found = {shown[row]: load_arrays("evaluate", row, "grid") for row in densities_of(params, dataset)}
    half_length = float(getattr(params.dataset(dataset), "half_length", 5.0))
    return {row: arrays.values for row, arrays in found.items() if arrays is not None}, half_length + 1


def _grid_samples(params: Params, dataset: str, shown: Mapping[str, str]) -> Figure | None:
    """Figure 5: samples of each row over the target's."""
    from pipeline.figures import density_panels
    from pipeline.sources.grid import DROPPED_BOX

    found, limit = _grid_arrays(params, dataset, shown)
    if len(found) < 2:
        return None
    target = next(iter(found.values()))["target"]
    return density_panels(target, {row: arrays["samples"] for row, arrays in found.items()}, limit, DROPPED_BOX)


def _grid_log_density(params: Params, dataset: str, shown: Mapping[str, str]) -> Figure | None:
    """Figure 5, as heat maps: log-density of the truth and of each row that has one."""
    from pipeline.figures import log_density_maps

    found, limit = _grid_arrays(params, dataset, shown)
    maps = {row: arrays["model"] for row, arrays in found.items() if "model" in arrays}
    if len(maps) < 2:
        return None
    truth = next(arrays["truth"] for arrays in found.values() if "truth" in arrays)
    return log_density_maps({"truth": truth} | maps, limit)


def _reconstructions(rows: Sequence[str], shown: Mapping[str, str]) -> Figure | None:
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
        notes[shown[row]] = "\n".join(text.format(metrics[key]) for key, text in scores if key in metrics)
    inputs = next(iter(outputs.values()))["inputs"]
    columns = {shown[row]: values["reconstructions"][:RECONSTRUCTED] / 255 for row, values in outputs.items()}
    return reconstructions(inputs[:RECONSTRUCTED] / 255, columns, notes)


def _by_kl_weight(params: Params, rows: Sequence[str]) -> dict[str, float]:
    """The largest group of VAEs that differ in the weight of their divergence (and in the seed) alone, by ascending weight."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        settings = asdict(params.autoencoder(row))
        weight = settings.pop("kl_weight", None)
        if weight is not None:
            groups.setdefault(str(settings | {"seed": 0}), {})[row] = weight
    largest = max(groups.values(), key=lambda group: len(set(group.values())), default={})
    return dict(sorted(largest.items(), key=lambda item: item[1])) if len(set(largest.values())) > 1 else {}


def _codes(rows: Mapping[str, float]) -> Figure | None:
    """Figure 2: codes of two numbers and reconstructions, by the weight of the divergence; the first trial of each."""
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
    """Figure 13: reconstruction error and divergence on test images, means over trials of one weight."""
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


def _interpolations(params: Params, rows: Sequence[str], shown: Mapping[str, str]) -> Figure | None:
    """Figure 7: images between test images, by autoencoder, however many densities it has."""
    from pipeline.figures import interpolation_panels

    found: dict[str, Arrays] = {}
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
        (name, ends[i, 0], ends[i, 1], {shown[codes]: arrays.values["images"][i] / 255 for codes, arrays in found.items()})
        for i, name in enumerate(first.names)
    ]
    return interpolation_panels(panels, first.values["weights"].tolist())


def _interpolation_curves(rows: Sequence[str], shown: Mapping[str, str], label: str) -> Figure | None:
    """Figure 10: log-likelihood between test codes of the same label (or domain) and of different ones."""
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
            panels[shown[row]], weights = lines, values["curve_weights"].tolist()
    if len(panels) < 2:
        return None
    return curve_panels(panels, weights, "weight a of the second code", "log-likelihood of the code (nats)")


def _open_dimensions(rows: Sequence[str], controls: Sequence[str], shown: Mapping[str, str]) -> Figure | None:
    """Test error against the number of open dimensions: each autoencoder's, and principal components."""
    from pipeline.figures import open_dimensions

    series: dict[str, tuple[list[int], list[float]]] = {}
    sources = [("train", row, "test_mse_first_", shown[row]) for row in rows]
    sources += [("control", row, "pca_test_mse_first_", "principal components") for row in controls]
    for stage, row, prefix, name in sources:
        errors = {int(key.removeprefix(prefix)): v for key, v in read_metrics(stage, row).items() if key.startswith(prefix)}
        if errors:
            series[name] = sorted(errors), [errors[k] for k in sorted(errors)]
    return open_dimensions(series) if series else None


def _curves(values: Values, shown: Mapping[str, str], label: str, log_y: bool = False) -> Figure | None:
    """A line for each row against the step; rows with fewer than two values are left out."""
    from pipeline.figures import curves

    steps = {shown[row]: [step for step, _ in points] for row, points in values.items() if len(points) > 1}
    lines = {shown[row]: [value for _, value in points] for row, points in values.items() if len(points) > 1}
    if not lines:
        return None
    # A single line has no legend: name it in the title.
    title = "" if len(lines) > 1 else next(iter(lines))
    return curves(steps, lines, "step", label, title, log_y=log_y)


def _read_curves(stage: str, rows: Sequence[str], column: str) -> Values:
    """A column of the rows' curves, where it has a value, with its steps."""
    import pandas as pd

    found: Values = {}
    for row in rows:
        path = workspace.curve_file(stage, row)
        table = pd.read_csv(path, sep="\t") if path.exists() else pd.DataFrame()
        if {"step", column} <= set(table.columns):
            table = table[["step", column]].dropna()
            found[row] = list(zip(table["step"].tolist(), table[column].tolist(), strict=True))
    return found


def _write_tables(params: Params, folder: Path) -> None:
    """Curves of all rows as tables for `dvc plots`, one a quantity: it can't set files of a folder side by side."""
    for name, (stage, column) in TABLES.items():
        lines = [f"dataset\trow\tstep\t{column}"]
        for dataset in params.rows("datasets"):
            rows = autoencoders_of(params, dataset) if stage == "train" else densities_of(params, dataset)
            for row, points in _read_curves(stage, rows, column).items():
                lines += [f"{dataset}\t{row}\t{step}\t{value!r}" for step, value in points]
        write_text(folder / f"{name}.tsv", "\n".join(lines) + "\n")
