"""density, a table with missing values -> the table without, as `.csv`."""

from __future__ import annotations

from pathlib import Path

import click

from stages import workspace
from stages.run import one_line_errors


@click.command("complete")
@click.argument("row", metavar="NAME")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--draws", type=click.IntRange(1, 1000), default=None, help="How many times each row is written, by new draws.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="The file.  [default: data/completed/NAME.csv]",
)
def complete(row: str, path: Path, draws: int | None, seed: int, output: Path | None) -> None:
    """Fill in the missing values of a table.

    NAME is a row of `densities` of vectors: a gaussian, a gmm, a kde, or an lde with `orders: any`. FILE is a table with the
    same columns, by their names where both have names; empty cells and NaN are missing. They become means of 100 draws, each
    with its spread in a column of its own. With --draws, each row is written so many times instead, with values drawn from the
    density given the row's other values.
    """
    with one_line_errors(f"complete {row}"):
        from pipeline.completion import Incomplete, write_completed
        from pipeline.densities import load_density
        from pipeline.errors import PipelineError
        from pipeline.settings import read_params
        from pipeline.storage.codes import CodeReader
        from pipeline.system.ranks import join

        params = read_params()
        settings = params.density(row)
        codes = CodeReader(workspace.codes_folder(settings.codes)).index
        if codes.decoder_sha256 is not None:
            raise PipelineError(f"the data set '{settings.dataset}' holds images; only rows of vectors have columns to fill in")
        density = load_density(workspace.density_file(row)).to(join().device)
        names = [column.name for column in codes.columns]
        table = Incomplete(path, params.dataset(settings.dataset), len(names) or density.dim, names)
        target = output or Path("data/completed") / f"{row}.csv"
        write_completed(density, table, target, draws or 0, seed, codes.columns)
        click.echo(
            f"complete {row}: {table.missing.sum()} missing values in {table.incomplete_rows} of {table.count} rows "
            f"{'drawn' if draws else 'became means of draws'}; table: {target}"
        )
