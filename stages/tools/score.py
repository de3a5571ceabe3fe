"""density, autoencoder, new examples -> a table of scores: which of them don't belong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages import workspace
from stages.run import one_line_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.detection import Extremes, Scorer
    from pipeline.settings import DatasetSettings
    from pipeline.storage.shards import ShardReader

FALSE_ALARMS = 0.01  # of the examples that belong, where there are enough to tell
SHOWN = 36  # examples of either kind on the contact sheet
NAMED = 5  # strangest examples that are printed
DIMENSIONS = 3  # of a vector that are named


@click.command("score")
@click.argument("row", metavar="NAME")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Table of scores.  [default: data/scores/NAME.csv]",
)
@click.option(
    "--false-alarms",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=None,
    help="Share of examples that belong which may be taken for outliers.  [default: 0.01, or more with few examples]",
)
@click.option(
    "--relative-error/--absolute-error",
    default=None,
    help="Whether reconstruction errors are relative to the image.  [default: as in the row's detections, else absolute]",
)
@click.option("--manifold", is_flag=True, help="Also score decoded images on the decoder's manifold, which takes long.")
def score(
    row: str, path: Path, output: Path | None, false_alarms: float | None, relative_error: bool | None, manifold: bool
) -> None:
    """Score new examples, and tell which of them don't belong to what a row was fitted on.

    NAME is a row of `densities`. PATH is what it was fitted on, any number of them: a folder, zip or file of images, or a
    table of vectors. The table has one line per example: log-likelihood of the code, squared error of the reconstruction, and
    the two joined as `strangeness`, all compared with validation examples. `outlier` is 1 where a fresh example that belongs is
    as strange with a probability of at most --false-alarms. A picture next to the table shows the strangest examples.
    """
    with one_line_errors(f"score {row}"):
        _score(row, path, output or Path("data/scores") / f"{row}.csv", false_alarms, manifold, relative_error)


def _score(row: str, path: Path, output: Path, asked: float | None, manifold: bool, relative_error: bool | None) -> None:
    import csv

    from pipeline.detection import Extremes, calibrated, load_scorer, strange
    from pipeline.errors import printable
    from pipeline.examples import open_examples
    from pipeline.settings import read_params
    from pipeline.storage.shards import ShardReader
    from pipeline.system.files import atomic_file
    from pipeline.system.progress import Progress
    from pipeline.system.ranks import join

    params = read_params()
    settings = params.density(row)
    dataset = params.dataset(settings.dataset)
    reader = ShardReader(workspace.shards_folder(settings.dataset))
    examples = open_examples(path, dataset, reader.index.shape, reader.index.columns)
    files = workspace.density_file(row), workspace.autoencoder_folder(settings.codes)
    relative = params.relative_error(row) if relative_error is None else relative_error
    scorer = load_scorer(*files, reader, join().device, manifold, relative)
    calibration, _ = calibrated(scorer, reader)
    false_alarms = asked or max(FALSE_ALARMS, calibration.least_false_alarms)
    threshold = calibration.threshold(false_alarms)
    usual = _usual_terms(scorer, reader) if examples.dimensions and scorer.density.has_terms else None

    extremes = Extremes(SHOWN)
    counted = outliers = 0
    with atomic_file(output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        with Progress(examples.total, f"scoring {path.name}", "examples") as progress:
            for names, block in examples.blocks():
                scores = scorer(block)
                joined = calibration.join(strange(scores))
                p_values = calibration.p_values(joined)
                out = joined > threshold
                columns = scores | {"strangeness": joined, "percentile": 100 * (1 - p_values), "p_value": p_values}
                if not counted:
                    writer.writerow(["example", *columns, "outlier", *(["dimensions"] if usual is not None else [])])
                dimensions = None if usual is None else _dimensions(scorer, block, usual, examples.dimensions)
                for i, name in enumerate(names):
                    numbers = [f"{column[i]:.7g}" for column in columns.values()]
                    writer.writerow([name, *numbers, int(out[i]), *([] if dimensions is None else [dimensions[i]])])
                extremes.add(joined, block, names)
                counted, outliers = counted + len(names), outliers + int(out.sum())
                progress.advance(len(names))
    click.echo(
        f"score {row}: {outliers} of {counted} examples ({100 * outliers / counted:.3g} %) are outliers, stranger than "
        f"{threshold:.3g} nats; of examples that belong, at most {100 * false_alarms:.3g} % are taken for outliers"
    )
    strangest = (f"{name} ({value:.3g})" for value, _, name in extremes.strangest[:NAMED])
    click.echo(printable(f"the strangest: {', '.join(strangest)}"))
    if examples.unreadable:
        click.echo(
            f"files that can't be read and have no line: {len(examples.unreadable)}; the first: {examples.unreadable[0]}",
            err=True,
        )
    for name, count in (+examples.deviating).items():
        click.echo(
            printable(
                f"column '{name}' holds one value in the data set and isn't scored; in {count} rows it holds another one"
            ),
            err=True,
        )
    click.echo(f"table: {output}")
    if (sheet := _contact_sheet(extremes, dataset, output.with_suffix(".png"))) is not None:
        click.echo(f"picture: {sheet}")


def _usual_terms(scorer: Scorer, reader: ShardReader) -> NDArray[np.float64]:
    """Mean term of each dimension over validation examples, with shape (D,)."""
    import numpy as np

    from pipeline.detection import CALIBRATING

    vectors = reader.first("valid", CALIBRATING)["examples"]
    return np.asarray(scorer.density.terms(scorer.codes(vectors)).double().mean(dim=0).cpu().numpy())


def _dimensions(scorer: Scorer, vectors: NDArray[np.generic], usual: NDArray[np.float64], names: tuple[str, ...]) -> list[str]:
    """The dimensions that lower the log-likelihood of each vector the most, with by how much, in nats."""
    lost = usual - scorer.density.terms(scorer.codes(vectors)).double().cpu().numpy()  # (n, D)
    order = (-lost).argsort(axis=1, kind="stable")[:, :DIMENSIONS]
    return [
        "; ".join(f"{names[d]} {values[d]:+.3g}" for d in chosen if values[d] > 0)
        for values, chosen in zip(lost, order, strict=True)
    ]


def _contact_sheet(extremes: Extremes, dataset: DatasetSettings, path: Path) -> Path | None:
    """The strangest and the most ordinary examples as a picture; None if they are no images."""
    import numpy as np

    from pipeline.figures import image_panels, save_figure
    from pipeline.sources.common.patches import restore

    panels = {
        name: np.stack([example for _, example, _ in kept])
        for name, kept in (("the strangest", extremes.strangest), ("the most ordinary", extremes.ordinary))
    }
    if dataset.drawn_as == "patches":
        panels = {name: 0.5 + restore(vectors) for name, vectors in panels.items()}
    elif next(iter(panels.values())).ndim != 4:
        return None
    else:
        panels = {name: images / 255 for name, images in panels.items()}
    save_figure(image_panels(panels), path)
    return path
