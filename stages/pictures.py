"""Pictures of the report, each with what to look for: those that stages left, and plots of all rows of a data set together."""

from __future__ import annotations

import base64
import functools
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.settings import Params
from stages import workspace
from stages.scoreboard import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COMBINED", "Picture", "autoencoders_of", "combined_pictures", "densities_of", "draw_combined", "pictures"]

REPORTS = Path("reports")
COMBINED = REPORTS / "combined"
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


def _picture(path: Path, stage: str, name: str, dimensions: int | None = None) -> Picture:
    known = _captions().get(stage, {})
    found = (
        known.get(f"{name}/{dimensions}") or known.get(name) or {"title": name.replace("-", " ").capitalize(), "caption": ""}
    )
    return Picture(path, found["title"], found["caption"])


def pictures(stage: str, row: str, dimensions: int | None = None, skip: Sequence[str] = ()) -> list[Picture]:
    """The pictures that a stage left, in order of their names.

    Arguments:
        stage: Name of the stage.
        row: Name of the row.
        dimensions: Numbers in an example that is a vector, for captions that depend on it.
        skip: Names of files that aren't shown.
    """
    paths = sorted(workspace.figure_folder(stage, row).glob("*.png"))
    return [_picture(path, stage, path.stem, dimensions) for path in paths if path.stem not in skip]


# Rows side by side ---------------------------------------------------------------------------------------------------


def autoencoders_of(params: Params, dataset: str) -> list[str]:
    """Rows of `autoencoders` that are trained on a data set."""
    return [name for name in params.rows("autoencoders") if params.autoencoder(name).dataset == dataset]


def densities_of(params: Params, dataset: str) -> list[str]:
    """Rows of `densities` that model a data set."""
    return [name for name in params.rows("densities") if params.density(name).dataset == dataset]


def draw_combined(params: Params, folder: Path) -> None:
    """Draws the plots that set the rows of each data set side by side.

    Arguments:
        params: All tables.
        folder: Where they are written, as `<dataset>-<plot>.png`.
    """
    from pipeline.figures import save_figure

    for dataset in params.rows("datasets"):
        for name, figure in _combined(params, dataset).items():
            if figure is not None:
                save_figure(figure, folder / f"{dataset}-{name}.png")


def combined_pictures(dataset: str) -> list[Picture]:
    """The plots of a data set that `draw_combined` has drawn into `COMBINED`."""
    found = [_picture(COMBINED / f"{dataset}-{name}.png", "combined", name) for name in _captions()["combined"]]
    return [picture for picture in found if picture.path.exists()]


def _combined(params: Params, dataset: str) -> dict[str, Figure | None]:
    autoencoders, densities = autoencoders_of(params, dataset), densities_of(params, dataset)
    incremental = any(getattr(params.autoencoder(name), "incremental", None) for name in autoencoders)
    return {
        "open-dimensions": _open_dimensions(autoencoders),
        "training-loss": _curves("train", autoencoders, "loss", "training loss", log_y=True),
        "opened-dimensions": _curves("train", autoencoders if incremental else [], "open_dimensions", "open dimensions"),
        "validation": _curves("fit", densities, "valid_log_likelihood", "validation log-likelihood (nats)"),
    }


def _open_dimensions(rows: Sequence[str]) -> Figure | None:
    from pipeline.figures import open_dimensions

    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        prefix = "test_mse_first_"
        errors = {int(key.removeprefix(prefix)): v for key, v in read_metrics("train", row).items() if key.startswith(prefix)}
        if errors:
            series[row] = sorted(errors), [errors[k] for k in sorted(errors)]
    return open_dimensions(series) if series else None


def _curves(stage: str, rows: Sequence[str], column: str, label: str, log_y: bool = False) -> Figure | None:
    """A column of the rows' curves against the step; rows with fewer than two values are left out."""
    import pandas as pd

    from pipeline.figures import curves

    steps: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    for row in rows:
        path = workspace.curve_file(stage, row)
        table = pd.read_csv(path, sep="\t") if path.exists() else pd.DataFrame()
        if {"step", column} <= set(table.columns):
            table = table[["step", column]].dropna()
            if len(table) > 1:
                steps[row], values[row] = table["step"].tolist(), table[column].tolist()
    if not values:
        return None
    # A single line has no legend: name it in the title.
    title = "" if len(values) > 1 else next(iter(values))
    return curves(steps, values, "step", label, title, log_y=log_y and all(v > 0 for some in values.values() for v in some))
