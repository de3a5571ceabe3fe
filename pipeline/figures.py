"""Arrays -> matplotlib figures, drawn without pyplot, reproducible byte for byte."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from pipeline.system.files import atomic_file

__all__ = [
    "codes_and_reconstructions",
    "curve_panels",
    "curves",
    "density_panels",
    "histogram_panels",
    "image_grid",
    "image_panels",
    "image_rows",
    "interpolation_panels",
    "log_density_maps",
    "open_dimensions",
    "pair_kinds",
    "parzen_curves",
    "patches_beside_real",
    "reconstructions",
    "save_figure",
    "trade_off",
]

# Okabe and Ito's colours, distinguishable with any colour vision. Line styles distinguish series in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D5D5D", "#000000", "#8C6BB1", "#A6761D")
LINES = ("-", "--", "-.", ":")
TARGET, SAMPLES = "#E69F00", "#0072B2"  # as in Figure 5: the target in orange, samples in blue

DPI = 110  # pixels per inch
LARGEST_FILE = 300_000  # bytes

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so figures are the same everywhere
    "font.size": 9,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "xtick.color": "#444444",
    "xtick.labelsize": 8.5,
    "ytick.color": "#444444",
    "ytick.labelsize": 8.5,
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    # From matplotlib's own defaults: a user's matplotlibrc never changes a figure.
    settings: Any = {**mpl.rcParamsDefault, **STYLE}
    with mpl.rc_context(settings):
        yield


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG, whole or not at all; the same figure gives the same bytes.

    A figure above 300 kB, for example of many colour photographs, is written with a palette of 256 colours.

    Arguments:
        figure: The figure.
        path: The file.
    """
    drawn = io.BytesIO()
    with _style():
        FigureCanvasAgg(figure)
        # Without the writer's version and date, which differ across machines.
        figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    with atomic_file(path) as temporary:
        if drawn.tell() > LARGEST_FILE:
            picture = (
                Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
            )
            picture.save(temporary, format="png", optimize=True)
        else:
            temporary.write_bytes(drawn.getvalue())


def _new(width: float, height: float, title: str = "") -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _pixels(images: ArrayLike) -> NDArray[np.float64]:
    """Images in 0..1 with shape (n, H, W) or (n, C, H, W), C = 1 or 3 -> (n, H, W, 3), clipped."""
    values = np.asarray(images, dtype=np.float64)
    if values.ndim == 3:
        values = values[:, None]
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise ValueError(f"images have shape (n, C, H, W) with 1 or 3 channels, not {values.shape}")
    values = values.transpose(0, 2, 3, 1).clip(0, 1)  # CHW => HWC
    return np.repeat(values, 3, axis=3) if values.shape[3] == 1 else values


def _mosaic(images: NDArray[np.float64], columns: int, gap: int) -> NDArray[np.float64]:
    """Images (n, H, W, 3) side by side, row after row, with a gap in pixels between them."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def _picture(
    canvas: NDArray[np.float64],
    width: int,
    title: str = "",
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> Figure:
    """A canvas (H, W, 3) at an integer zoom, with names next to the rows and above the columns, all of equal length.

    A non-integer zoom would drop or double lines of pixels.

    Arguments:
        canvas: The picture.
        width: Rough width of the drawn canvas in pixels.
        title: A line above.
        row_names: Names at the left, top to bottom.
        column_names: Names above, left to right; `title` is above them.
    """
    scale = max(1, round(width / canvas.shape[1]))
    drawn_height, drawn_width = canvas.shape[0] * scale, canvas.shape[1] * scale
    left = 16 + max(map(_text_width, row_names)) if row_names else 0
    lines = max((name.count("\n") + 1 for name in column_names), default=0)
    titles, names = 28 if title else 0, 7 + 15 * lines if lines else 0
    total_height, total_width = drawn_height + titles + names, drawn_width + left
    figure = Figure(figsize=(total_width / DPI, total_height / DPI))
    axes = figure.add_axes((left / total_width, 0, drawn_width / total_width, drawn_height / total_height))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    if title:
        figure.text((left + drawn_width / 2) / total_width, 1 - 14 / total_height, title, ha="center", va="center", fontsize=10)
    for i, name in enumerate(row_names):
        y = drawn_height * (1 - (i + 0.5) / len(row_names)) / total_height
        figure.text((left - 8) / total_width, y, name, ha="right", va="center", fontsize=9)
    for i, name in enumerate(column_names):
        x = (left + drawn_width * (i + 0.5) / len(column_names)) / total_width
        figure.text(x, (drawn_height + names / 2) / total_height, name, ha="center", va="center", fontsize=9)
    return figure


def _text_width(text: str, points: float = 9) -> int:
    """Width of a line in screen pixels."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    extents = TextPath((0, 0), text or " ", size=points, prop=FontProperties(family=STYLE["font.family"])).get_extents()
    return math.ceil(float(extents.x1) * DPI / 72)


def _gap(side: int) -> int:
    return max(1, side // 16)


# Images -------------------------------------------------------------------------------------------------------------


def image_grid(images: ArrayLike, columns: int = 10, title: str = "") -> Figure:
    """Images in the order given, row after row.

    Arguments:
        images: Images in 0..1 with shape (n, C, H, W), C = 1 or 3.
        columns: Images per row.
        title: What they are.
    """
    with _style():
        pixels = _pixels(images)
        return _picture(_mosaic(pixels, min(columns, len(pixels)), _gap(pixels.shape[1])), 700, title)


def image_rows(rows: Mapping[str, ArrayLike], title: str = "", column_names: Sequence[str] = ()) -> Figure:
    """One row of images per name, with names at the left.

    Arguments:
        rows: By name, images in 0..1 with shape (n, C, H, W); the same n for all.
        title: What they are.
        column_names: What the columns are.
    """
    with _style():
        pixels = [_pixels(images) for images in rows.values()]
        if len({p.shape for p in pixels}) > 1:
            raise ValueError(f"rows of images differ in shape: {[p.shape for p in pixels]}")
        n, height, _, _ = pixels[0].shape
        canvas = _mosaic(np.concatenate(pixels), n, _gap(height))
        return _picture(canvas, min(900, 80 * n), title, list(rows), column_names)


def reconstructions(
    inputs: ArrayLike, outputs: Mapping[str, ArrayLike], notes: Mapping[str, str] | None = None, title: str = ""
) -> Figure:
    """Figure 6: the inputs in the first column, each model's reconstructions in a column to the right.

    Arguments:
        inputs: Images in 0..1 with shape (n, C, H, W).
        outputs: By model, their reconstructions with the same shape.
        notes: By model, lines below its name, such as its error.
        title: What they are.
    """
    with _style():
        columns = [_pixels(images) for images in (inputs, *outputs.values())]
        names = ["input", *(f"{name}\n{notes[name]}" if notes and name in notes else name for name in outputs)]
        n, height, width, _ = columns[0].shape
        scale = max(1, round(110 / width))
        # Columns are as far apart as their names require.
        widest = max(_text_width(line) for name in names for line in name.split("\n")) + 14
        gap, apart = _gap(height), max(_gap(height), -(-widest // scale) - width)
        canvas = np.ones((n * (height + gap) - gap, len(columns) * (width + apart), 3))
        for i, images in enumerate(columns):
            left = i * (width + apart) + apart // 2
            canvas[:, left : left + width] = _mosaic(images, 1, gap)
        return _picture(canvas, scale * canvas.shape[1], title, column_names=names)


def interpolation_panels(
    panels: Sequence[tuple[str, ArrayLike, ArrayLike, Mapping[str, ArrayLike]]], weights: Sequence[float], title: str = ""
) -> Figure:
    """Figure 7, for many pairs: one row per pair and model, with the interpolated images between the two originals.

    Arguments:
        panels: For each pair, its kind; its originals at weight 0 and at 1, in 0..1, each with shape (C, H, W); and by model,
            decoded images with shape (len(weights), C, H, W). The kind is above the rows, once for consecutive equal ones.
        weights: Weights of the last image.
        title: What they are.
    """
    with _style():
        parts: list[tuple[str, NDArray[np.float64]]] = []  # name, a row of images
        headings: list[str] = []
        before = ""
        for name, first, last, rows in panels:
            ends = [np.asarray(image)[None] for image in (first, last)]
            for i, (model, images) in enumerate(rows.items()):
                pixels = _pixels(np.concatenate([ends[0], np.asarray(images), ends[1]]))
                parts.append((model, _mosaic(pixels, len(pixels), _gap(pixels.shape[1]))))
                headings.append("" if i else name if name != before else " ")
            before = name
        height, width, _ = parts[0][1].shape
        scale = max(1, round(700 / width))
        gap, above = _gap(height) * scale, {"": 0, " ": 14}  # screen pixels
        left = 16 + max(_text_width(name) for name, _ in parts)
        tops, y = [], (28 if title else 0) + 20
        for heading in headings:
            y += above.get(heading, 30)
            tops.append(y)
            y += height * scale + gap
        total_width, total_height = left + width * scale, y - gap
        figure = Figure(figsize=(total_width / DPI, total_height / DPI))
        middle = (left + width * scale / 2) / total_width
        if title:
            figure.text(middle, 1 - 14 / total_height, title, ha="center", va="center", fontsize=10)
        for (name, row), heading, top in zip(parts, headings, tops, strict=True):
            bottom = 1 - (top + height * scale) / total_height
            axes = figure.add_axes((left / total_width, bottom, width * scale / total_width, height * scale / total_height))
            axes.imshow(row, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            centre = bottom + height * scale / 2 / total_height
            figure.text((left - 8) / total_width, centre, name, ha="right", va="center", fontsize=9)
            if heading.strip():
                y_text = 1 - (top - 13) / total_height
                figure.text(left / total_width, y_text, heading, ha="left", va="center", fontsize=9.5, weight="bold")
        columns = ["original", *(f"a = {w:.1f}" for w in weights), "original"]
        for i, name in enumerate(columns):
            x = (left + width * scale * (i + 0.5) / len(columns)) / total_width
            figure.text(x, 1 - ((28 if title else 0) + 10) / total_height, name, ha="center", va="center", fontsize=9)
        return figure


def image_panels(panels: Mapping[str, ArrayLike], columns: int = 6, across: int = 4, title: str = "") -> Figure:
    """One square of images per name, at most `across` in a row.

    Arguments:
        panels: By name, images in 0..1 with shape (n, C, H, W), the same H and W for all.
        columns: Images per row of a square.
        across: Squares per row.
        title: What they are.
    """
    with _style():
        squares = {}
        for name, images in panels.items():
            pixels = _pixels(images)
            squares[name] = _mosaic(pixels, min(columns, len(pixels)), _gap(pixels.shape[1]))
        height, width = (max(square.shape[axis] for square in squares.values()) for axis in (0, 1))
        rows, across = _arrange(len(squares), across)
        scale = max(1, round(min(380, 1500 / across) / width))
        gap, names, top = 14, 24, 28 if title else 0  # screen pixels
        total_width, total_height = across * (width * scale + gap) - gap, rows * (height * scale + names) + top
        figure = Figure(figsize=(total_width / DPI, total_height / DPI))
        if title:
            figure.text(0.5, 1 - 14 / total_height, title, ha="center", va="center", fontsize=10)
        for i, (name, square) in enumerate(squares.items()):
            left = (i % across) * (width * scale + gap)
            bottom = total_height - top - (i // across) * (height * scale + names) - names - square.shape[0] * scale
            drawn = (square.shape[1] * scale, square.shape[0] * scale)
            place = (left / total_width, bottom / total_height, drawn[0] / total_width, drawn[1] / total_height)
            axes = figure.add_axes(place)
            axes.imshow(square, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            y = (bottom + drawn[1] + names / 2) / total_height
            figure.text((left + drawn[0] / 2) / total_width, y, name, ha="center", va="center", fontsize=9)
        return figure


def patches_beside_real(real: ArrayLike, samples: ArrayLike, columns: int = 10, title: str = "") -> Figure:
    """Real patches at the left and sampled ones at the right, on one grey scale, symmetric about zero.

    Arguments:
        real: Patches of any range, with shape (n, H, W).
        samples: Samples with shape (n, H, W), in the same units.
        columns: Patches per row of each half.
        title: What they are.
    """
    with _style():
        both = [np.asarray(p, dtype=np.float64) for p in (real, samples)]
        # One scale for both, from the real patches: a sample that is too bright looks too bright.
        limit = float(np.quantile(np.abs(both[0]), 0.99)) or 1.0
        halves = [_mosaic(_pixels((p / limit + 1) / 2), min(columns, len(p)), 1) for p in both]
        between = np.ones((halves[0].shape[0], 4, 3))
        canvas = np.concatenate([halves[0], between, halves[1]], axis=1)
        return _picture(canvas, 900, title, column_names=("real", "samples"))


# Curves -------------------------------------------------------------------------------------------------------------


def _plot(
    axes: Axes, x: Mapping[str, ArrayLike] | ArrayLike, series: Mapping[str, ArrayLike], bands: Mapping[str, ArrayLike]
) -> None:
    for i, (name, values) in enumerate(series.items()):
        y = np.asarray(values, dtype=np.float64)
        points = np.asarray(x[name] if isinstance(x, Mapping) else x, dtype=np.float64)[: len(y)]
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        axes.plot(points, y, line, color=colour, label=name, marker="o" if len(y) <= 12 else None, markersize=3.5)
        if name in bands:
            half = np.asarray(bands[name], dtype=np.float64)
            low, high = (half, half) if half.ndim == 1 else (half[0], half[1])
            axes.fill_between(points, y - low, y + high, color=colour, alpha=0.15, linewidth=0)


def _plain_log(value: float, _: object) -> str:
    """0.02 rather than 2 x 10^-2, and no label at 3, 4, 6 .. of a decade."""
    leading = value / 10 ** np.floor(np.log10(value) + 1e-9) if value > 0 else 0.0
    return f"{value:g}" if round(leading, 3) in (1, 2, 5) else ""


def curves(
    x: Mapping[str, ArrayLike] | ArrayLike,
    series: Mapping[str, ArrayLike],
    x_label: str,
    y_label: str,
    title: str = "",
    bands: Mapping[str, ArrayLike] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Lines by name.

    Arguments:
        x: Abscissas with shape (n,), for all series or by name.
        series: By name, ordinates with shape (n,).
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        title: What is shown.
        bands: By name, half widths of a band around the line with shape (n,), or (2, n) for below and above.
        log_x: Whether x is on a logarithmic scale.
        log_y: Whether y is on a logarithmic scale, if its values are positive and span a factor of 5.
    """
    with _style():
        figure = _new(6.0, 3.6)
        axes = figure.add_subplot()
        _plot(axes, x, series, bands or {})
        if log_x:
            axes.set_xscale("log")
        # A logarithmic scale over less than a factor of 5 may have one label or none.
        every = np.concatenate([np.asarray(y, dtype=np.float64) for y in series.values()])
        if log_y and every.min() > 0 and every.max() >= 5 * every.min():
            axes.set_yscale("log")
            for pick in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                pick(_plain_log)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if len(series) > 1:
            axes.legend()
        return figure


def pair_kinds(label: str) -> dict[str, str]:
    """Names of the kinds of pairs in figures.

    Arguments:
        label: What a label of the data set is called.

    Example:
        >>> pair_kinds("domain")["different"]
        'different domains'
    """
    return {"same": f"same {label}", "different": f"different {label}s", "any": "any two"}


def curve_panels(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], x: ArrayLike, x_label: str, y_label: str, columns: int = 4
) -> Figure:
    """Lines with bands by name, one panel per model, each with its own scale (Figure 10).

    Arguments:
        panels: By model, by series, (ordinates with shape (n,), edges of the band below and above with shape (2, n)).
        x: Abscissas with shape (n,).
        x_label: What x is.
        y_label: What y is.
        columns: Panels per row, at most.
    """
    with _style():
        rows, columns = _arrange(len(panels), columns)
        figure = _new(columns * 3.1 + 0.3, rows * 2.6 + 0.5)
        grid = figure.subplots(rows, columns, squeeze=False)
        handles: dict[str, Any] = {}
        for i, (axes, (name, series)) in enumerate(zip(grid.ravel(), panels.items(), strict=False)):
            lines = {kind: values for kind, (values, _) in series.items()}
            bands = {}
            for kind, (values, edges) in series.items():
                y, (low, high) = np.asarray(values, dtype=np.float64), np.asarray(edges, dtype=np.float64)
                bands[kind] = np.stack([y - low, high - y])
            _plot(axes, x, lines, bands)
            handles |= {line.get_label(): line for line in axes.get_lines()}
            axes.set_title(name)
            if i + columns >= len(panels):
                axes.set_xlabel(x_label)
            if i % columns == 0:
                axes.set_ylabel(y_label)
        for axes in grid.ravel()[len(panels) :]:
            axes.set_axis_off()
        if len(handles) > 1:
            figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles))
        return figure


def histogram_panels(
    panels: Mapping[str, tuple[ArrayLike, Mapping[str, ArrayLike]]], marks: Mapping[str, float], columns: int = 4
) -> Figure:
    """Histograms of two or more groups over each other, one panel per score.

    Arguments:
        panels: By score, the edges of the bins with shape (B + 1,), and by group the share of its examples in each, with
            shape (B,).
        marks: By score, a value that a dotted line marks, such as a threshold.
        columns: Panels per row, at most.
    """
    with _style():
        rows, columns = _arrange(len(panels), columns)
        figure = _new(columns * 3.1 + 0.3, rows * 2.4 + 0.5)
        grid = figure.subplots(rows, columns, squeeze=False)
        handles: dict[str, Any] = {}
        for axes, (name, (edges, groups)) in zip(grid.ravel(), panels.items(), strict=False):
            for colour, (group, shares) in zip((SAMPLES, COLOURS[1], *COLOURS[2:]), groups.items(), strict=False):
                handles[group] = axes.stairs(
                    np.asarray(shares), np.asarray(edges), color=colour, alpha=0.5, fill=True, label=group
                )
            if name in marks:
                axes.axvline(marks[name], color="#444444", linestyle=":", linewidth=1.2)
            axes.set(title=name, yticks=[])
        for axes in grid.ravel()[len(panels) :]:
            axes.set_axis_off()
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles))
        return figure


def parzen_curves(bandwidths: ArrayLike, series: Mapping[str, ArrayLike], protocol: str = "") -> Figure:
    """Mean validation log-likelihood against the bandwidth, with the chosen one marked.

    Arguments:
        bandwidths: Bandwidths h in units of the pixel range 0..1, with shape (n,).
        series: By name, mean log-likelihoods of the validation points in nats, with shape (n,).
        protocol: Name of the protocol, for the title.
    """
    with _style():
        title = "Parzen window: bandwidth search" + (f" (protocol {protocol})" if protocol else "")
        h = np.asarray(bandwidths, dtype=np.float64)
        named = {}
        for name, values in series.items():
            y = np.asarray(values, dtype=np.float64)
            named[f"{name}: {y.max():.1f} at h = {h[y.argmax()]:g}"] = y
        figure = curves(h, named, "bandwidth h (pixel range 0..1)", "validation log-likelihood (nats)", title)
        axes, tops = figure.axes[0], list(named.values())
        for i, y in enumerate(tops):
            axes.plot(h[y.argmax()], y.max(), "o", color=COLOURS[i % len(COLOURS)], markersize=6)
        axes.legend(loc="lower right" if len(named) > 1 else "lower center")
        # A bandwidth far too narrow scores -10,000 nats and would flatten the peak.
        highest, middle = max(float(y.max()) for y in tops), min(float(np.median(y)) for y in tops)
        lowest = min(float(y.min()) for y in tops)
        span = max(highest - middle, 1e-9)
        axes.set_ylim(max(lowest - 0.1 * span, highest - 3 * span), highest + 0.3 * span)
        return figure


def open_dimensions(series: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str = "", log_y: bool = True) -> Figure:
    """Test error against the number k of open latent dimensions.

    Arguments:
        series: By model, (numbers k, squared errors as mean over pixels), each with shape (n,).
        title: What is shown.
        log_y: Whether the error is on a logarithmic scale.
    """
    x = {name: k for name, (k, _) in series.items()}
    y = {name: errors for name, (_, errors) in series.items()}
    title = title or "Reconstruction from the first k dimensions"
    figure = curves(x, y, "open dimensions k", "test MSE (mean over pixels, range 0..1)", title, log_y=log_y)
    with _style():
        figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def trade_off(kl_weights: Sequence[float], reconstruction: ArrayLike, kl: ArrayLike, title: str = "") -> Figure:
    """Figure 13: reconstruction error (left axis) and KL divergence (right axis) against the weight of the KL term.

    Arguments:
        kl_weights: Weights, from 0 up, placed at equal distances.
        reconstruction: Squared error per image, with shape (n,).
        kl: KL divergence per image in nats, with shape (n,).
        title: What is shown.
    """
    with _style():
        figure = _new(6.0, 3.6)
        left = figure.add_subplot()
        right = left.twinx()
        position = np.arange(len(kl_weights))
        axes_and_values = (
            (left, reconstruction, "squared error an image", 0, "-"),
            (right, kl, "KL divergence (nats)", 1, "--"),
        )
        for axes, values, label, i, line in axes_and_values:
            y = np.asarray(values, dtype=np.float64)
            axes.plot(position, y, line, marker="o", markersize=4, color=COLOURS[i])
            axes.set_ylabel(label, color=COLOURS[i])
            axes.tick_params(axis="y", colors=COLOURS[i])
            # At weight 0 nothing bounds the curve: a value powers of ten above the rest would flatten it.
            if len(y) > 2 and kl_weights[0] == 0 and y[0] > 5 * (highest := float(y[1:].max())) > 0:
                axes.set_ylim(-0.05 * highest, 1.25 * highest)
                axes.annotate(
                    f"\u2191 {y[0]:.3g}", (0.02, 0.97 - 0.07 * i), xycoords="axes fraction", va="top", color=COLOURS[i]
                )
        right.spines["right"].set_visible(True)
        right.grid(visible=False)
        left.set_xticks(position, [f"{w:g}" for w in kl_weights])
        left.set(xlabel="weight of the KL term", title=title or "Reconstruction and regularisation")
        return figure


# Points -------------------------------------------------------------------------------------------------------------


def _arrange(panels: int, most: int) -> tuple[int, int]:
    """Rows and columns of a grid with at most `most` columns and few empty cells."""
    rows = -(-panels // most)
    return rows, -(-panels // rows)


def _scatter(axes: Axes, points: NDArray[np.float64], labels: NDArray[Any] | None) -> list[Any]:
    if labels is None:
        return [axes.scatter(points[:, 0], points[:, 1], s=3, color=COLOURS[0], alpha=0.5, linewidths=0, rasterized=True)]
    drawn = []
    for i, label in enumerate(np.unique(labels).tolist()):
        class_points = points[labels == label]
        drawn.append(
            axes.scatter(
                class_points[:, 0], class_points[:, 1], s=4, color=COLOURS[i % 10], alpha=0.6, linewidths=0, label=str(label)
            )
        )
    return drawn


def codes_and_reconstructions(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike | None, ArrayLike, ArrayLike]], columns: int = 5
) -> Figure:
    """Figure 2: codes in the plane, coloured by label, with test images and their reconstructions below, one panel per name.

    Arguments:
        panels: By title, codes with shape (n, 2), their labels with shape (n,) or None, images in 0..1 and reconstructions,
            both with shape (m, C, H, W).
        columns: Panels per row, at most.
    """
    with _style():
        rows, columns = _arrange(len(panels), columns)
        side = 4.4 if columns == 1 else 2.6
        figure = _new(columns * side + 0.9, rows * side * 1.35)
        grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1, 0.32] * rows)
        legend: dict[str, Any] = {}
        for i, (name, (points, labels, inputs, outputs)) in enumerate(panels.items()):
            above, below = grid[2 * (i // columns), i % columns], grid[2 * (i // columns) + 1, i % columns]
            drawn = _scatter(above, np.asarray(points, dtype=np.float64), None if labels is None else np.asarray(labels))
            legend |= {handle.get_label(): handle for handle in drawn} if labels is not None else {}
            above.set(title=name, xlabel="z1", ylabel="z2" if i % columns == 0 else "")
            shown = min(len(np.asarray(inputs)), 8)
            pixels = _pixels(np.concatenate([np.asarray(inputs)[:shown], np.asarray(outputs)[:shown]]))
            below.imshow(_mosaic(pixels, shown, _gap(pixels.shape[1])), interpolation="nearest")
        for axes in grid[1::2].ravel():
            axes.set_axis_off()
        for i in range(len(panels), rows * columns):
            grid[2 * (i // columns), i % columns].set_axis_off()
        if legend:
            names = sorted(legend, key=lambda n: (len(n), n))
            figure.legend([legend[n] for n in names], names, loc="outside right center", markerscale=3, handletextpad=0.1)
        return figure


def _plane(points: ArrayLike) -> NDArray[np.float64]:
    """The first two numbers of each vector, with shape (n, 2); a single number is paired with its index."""
    values = np.asarray(points, dtype=np.float64)
    return values[:, :2] if values.shape[1] > 1 else np.column_stack([values, np.linspace(0, 1, len(values))])


def density_panels(
    target: ArrayLike,
    samples: Mapping[str, ArrayLike],
    limit: float | None = None,
    box: tuple[tuple[float, float], tuple[float, float]] | None = None,
    columns: int = 4,
) -> Figure:
    """Figure 5: points of the target in orange, samples of each model in blue over it; the first two numbers of longer vectors.

    Arguments:
        target: Points of the target with shape (n, D); if D = 1, the second axis is their index.
        samples: By model, samples with shape (m, D).
        limit: Both axes go from -limit to limit; by default, a little further than the target on every side.
        box: Bounds of x1 and of x2 of the region where the target has no mass, outlined.
        columns: Panels per row, at most.
    """
    with _style():
        points = _plane(target)
        low, high = (points.min(axis=0), points.max(axis=0)) if limit is None else (np.full(2, -limit), np.full(2, limit))
        margin = 0.05 * (high - low) + 1e-6 if limit is None else np.zeros(2)
        (left, bottom), (right, top) = low - margin, high + margin
        panels: dict[str, NDArray[np.float64] | None] = {"target": None}
        panels |= {name: _plane(values) for name, values in samples.items()}
        rows, columns = _arrange(len(panels), columns)
        figure = _new(columns * 2.6, rows * 2.65 + 0.35)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        dots: dict[str, Any] = {"s": 1.5, "linewidths": 0}
        for i, (axes, (name, drawn)) in enumerate(zip(grid.ravel(), panels.items(), strict=False)):
            axes.scatter(points[:, 0], points[:, 1], color=TARGET, alpha=0.5 if drawn is None else 0.25, **dots)
            if drawn is not None:
                axes.scatter(drawn[:, 0], drawn[:, 1], color=SAMPLES, alpha=0.5, **dots)
            if box is not None:
                (x0, x1), (y0, y1) = box
                axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="#444444", linewidth=0.8)
            axes.set(title=name, xlim=(left, right), ylim=(bottom, top), aspect="auto" if limit is None else "equal")
            if i + columns >= len(panels):
                axes.set_xlabel("x1")
                axes.tick_params(labelbottom=True)
            if i % columns == 0:
                axes.set_ylabel("x2" if np.shape(target)[1] > 1 else "order")
        for axes in grid.ravel()[len(panels) :]:
            axes.set_axis_off()
        return figure


def log_density_maps(maps: Mapping[str, ArrayLike], limit: float = 6.0, columns: int = 4, depth: float = 12.0) -> Figure:
    """Log-density of each model on a square grid, on one colour scale.

    Arguments:
        maps: By model, log-densities in nats with shape (m, m), rows along x2 from -limit to limit.
        limit: Both axes go from -limit to limit.
        columns: Panels per row, at most.
        depth: Range of the colour scale, in nats below the highest value.
    """
    with _style():
        values = {name: np.asarray(m, dtype=np.float64) for name, m in maps.items()}
        # The first map (usually the truth) sets the scale: a spike of one model would darken all others.
        highest = float(np.nanmax(next(iter(values.values()))))
        rows, columns = _arrange(len(values), columns)
        figure = _new(columns * 2.6 + 0.8, rows * 2.65 + 0.35)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        image = None
        for i, (axes, (name, m)) in enumerate(zip(grid.ravel(), values.items(), strict=False)):
            extent = (-limit, limit, -limit, limit)
            image = axes.imshow(
                m, origin="lower", extent=extent, vmin=highest - depth, vmax=highest, cmap="magma", interpolation="nearest"
            )
            axes.grid(visible=False)
            axes.set_title(name)
            if i + columns >= len(values):
                axes.set_xlabel("x1")
                axes.tick_params(labelbottom=True)
            if i % columns == 0:
                axes.set_ylabel("x2")
        for axes in grid.ravel()[len(values) :]:
            axes.set_axis_off()
        if image is not None:
            figure.colorbar(image, ax=grid.ravel().tolist(), label="log-density (nats)", extend="both", shrink=0.8)
        return figure
