"""Figures: the same bytes each time, modest files, pixels as given, no global state."""

from __future__ import annotations

import io
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from pipeline import figures

GENERATOR = np.random.default_rng(0)
GREY, COLOUR = GENERATOR.random((20, 1, 8, 8)), GENERATOR.random((20, 3, 16, 16))
POINTS, LABELS = GENERATOR.normal(size=(200, 2)), GENERATOR.integers(10, size=200)
X = np.arange(1, 9)

FIGURES = {
    "image_grid": lambda: figures.image_grid(GREY, title="samples"),
    "image_grid_colour": lambda: figures.image_grid(COLOUR, columns=6),
    "reconstructions": lambda: figures.reconstructions(GREY[:5], {"AE": GREY[5:10], "IAE": GREY[10:15]}, {"AE": "MSE 0.1"}),
    "interpolations": lambda: figures.interpolation_panels(
        [(name, COLOUR[0], COLOUR[1], {"AE": COLOUR[2:8], "IAE": COLOUR[8:14]}) for name in ("within", "within", "across")],
        np.linspace(0, 1, 6),
    ),
    "patches": lambda: figures.patches_beside_real(GREY[:, 0] - 0.5, GREY[:, 0] - 0.4),
    "curves": lambda: figures.curves(X, {"a": X, "b": X**2}, "step", "nats", bands={"a": 0.1 * X}, log_y=True),
    "parzen": lambda: figures.parzen_curves(X / 10, {"model": -np.square(X - 4.0), "control": [-1e6, *X[1:]]}, "gmmn"),
    "open_dimensions": lambda: figures.open_dimensions({"AE": (X, 1 / X), "PCA": (X[:3], 2 / X[:3])}),
    "trade_off": lambda: figures.trade_off([0, 0.01, 1], [1, 2, 3], [300, 20, 1]),
    "codes": lambda: figures.codes_and_reconstructions({"0": (POINTS, LABELS, GREY, GREY), "1": (POINTS, None, GREY, GREY)}),
    "density_panels": lambda: figures.density_panels(POINTS, {"LDE": POINTS, "GMMN": POINTS}, box=((1.6, 2.6), (2.5, 3.5))),
    "points in one dimension": lambda: figures.density_panels(POINTS[:, :1], {"LDE": POINTS[:, :1]}),
    "points in many": lambda: figures.density_panels(100 + np.tile(POINTS, 3), {"LDE": 100 + np.tile(POINTS, 3)}),
    "log_density_maps": lambda: figures.log_density_maps({"truth": GENERATOR.normal(size=(9, 9)), "LDE": -np.ones((9, 9))}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_modest_files(name, tmp_path):
    figures.save_figure(FIGURES[name](), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert 1_000 < len(data) < 300_000
    image = Image.open(io.BytesIO(data))
    assert 200 <= image.width <= 1600
    assert "Software" not in image.info
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["image_grid", "curves", "codes", "density_panels"])
def test_same_bytes_each_time(name, tmp_path):
    figures.save_figure(FIGURES[name](), tmp_path / "a.png")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9}):  # as a user's matplotlibrc would
        figures.save_figure(FIGURES[name](), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_points_lie_within_the_axes_wherever_they_are():
    figure = figures.density_panels(1000 + POINTS, {"LDE": 1000 + POINTS})
    for axes in figure.axes[:2]:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert left < 1000 + POINTS[:, 0].min()
        assert 1000 + POINTS[:, 0].max() < right
        assert bottom < 1000 + POINTS[:, 1].min()
        assert 1000 + POINTS[:, 1].max() < top


def test_a_grid_shows_every_pixel_as_given(tmp_path):
    figures.save_figure(figures.image_grid(GREY, columns=5), tmp_path / "grid.png")
    drawn = np.asarray(Image.open(tmp_path / "grid.png").convert("L"), dtype=float) / 255
    scale = round(700 / (5 * 9 - 1))
    assert drawn.shape == ((4 * 9 - 1) * scale, (5 * 9 - 1) * scale)
    small = drawn[scale // 2 :: scale, scale // 2 :: scale]
    np.testing.assert_allclose(small[9:17, 18:26], GREY[7, 0], atol=0.01)  # second row, third column
    np.testing.assert_allclose(small[8], 1)


def test_many_photographs_stay_small(tmp_path):
    figures.save_figure(figures.image_grid(GENERATOR.random((100, 3, 64, 64)).cumsum(2) / 40), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size < 600_000


def test_values_are_clipped_and_wrong_shapes_refused():
    figures.image_grid(GREY * 3 - 1)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        figures.image_grid(np.zeros((4, 2, 8, 8)))
    with pytest.raises(ValueError, match="differ in shape"):
        figures.image_rows({"a": GREY[:2], "b": GREY[:3]})


def test_pyplot_is_not_imported():
    code = "import sys, pipeline.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
