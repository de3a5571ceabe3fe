"""density, decoder -> samples on demand, of one class or at the frequencies of the training codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stages import workspace
from stages.run import one_line_errors

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

COLUMNS = 10  # of the contact sheet


@click.command("draw")
@click.argument("row", metavar="NAME")
@click.option("--label", default=None, help="Label of all samples, by its name, of a row with `context: labels`.")
@click.option("--given", "columns", multiple=True, metavar="COLUMN=VALUE", help="Value of another column of the row's context.")
@click.option("--count", default=64, show_default=True, type=click.IntRange(1, 100_000), help="Number of samples.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the draw; the same one draws the same."
)
@click.option("--output", required=True, metavar="DIR", help="Folder for the samples, which must not exist or hold a draw.")
def draw(row: str, label: str | None, columns: tuple[str, ...], count: int, seed: int, output: str) -> None:
    """Draw samples from a fitted density, for example of one label.

    NAME is a row of `densities`. Writes `samples.safetensors` with the codes, their contexts and the samples; for images also a
    PNG of each and a contact sheet, `samples.png`; for tables `samples.csv`. Without --label and --given, contexts are drawn at
    the frequencies of the training codes. Example: draw digits-iae-lde-labels --label 7 --count 64 --seed 1 --output sevens
    """
    with one_line_errors(f"draw {row}"):
        from pathlib import Path

        import numpy as np

        from pipeline.autoencoders.common.network import Decoder
        from pipeline.densities import load_density
        from pipeline.densities.common.context import LABELS
        from pipeline.errors import PipelineError, SettingsError
        from pipeline.sampling import draw as draw_samples
        from pipeline.settings import read_params
        from pipeline.storage.codes import CodeReader
        from pipeline.system.files import atomic_folder, write_json

        settings, path, folder = read_params().density(row), workspace.density_file(row), Path(output)
        if not path.exists():
            raise PipelineError(f"{path} is missing; run `dvc repro fit@{row}`")
        if folder.exists() and not (folder / "draw.json").is_file():
            raise PipelineError(f"{folder} exists and holds no draw; name another folder")
        density, codes = load_density(path), CodeReader(workspace.codes_folder(settings.codes))
        decoder = None if codes.decoder_path is None else Decoder.load(codes.decoder_path)
        words = {} if label is None else {LABELS: label}
        for column in columns:
            name, equals, value = column.partition("=")
            if not equals:
                raise SettingsError(f"--given {column}: write COLUMN=VALUE")
            words[name] = value
        if words and density.context is None:
            raise SettingsError(
                f"densities.{row} isn't conditioned: leave out --label and --given, or give the row a `context`"
            )
        context = density.context.parse(words) if words and density.context is not None else None
        drawn = draw_samples(density, decoder, count, seed, context=context, columns=codes.index.columns)
        if not np.isfinite(drawn.examples).all():
            raise PipelineError("samples aren't finite: the density has diverged; fit it with a lower learning_rate")
        from safetensors.numpy import save_file

        arrays = {"samples": drawn.examples, "codes": drawn.codes, "context": drawn.context}
        with atomic_folder(folder) as temporary:
            kept = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
            save_file(kept, temporary / "samples.safetensors")
            if decoder is not None:
                _write_images(temporary, drawn.examples)
            else:
                _write_table(temporary, drawn.examples, [column.name for column in codes.index.columns])
            names = () if density.context is None else density.context.names
            write_json(
                temporary / "draw.json", {"row": row, "seed": seed, "count": count, "context": words, "columns": list(names)}
            )
        click.echo(f"{count} samples of {row}" + "".join(f", {name} {word}" for name, word in words.items()) + f": {folder}")


def _write_images(folder: Path, images: np.ndarray) -> None:
    """A PNG of each image in 0..1, named by its number, and one of all of them."""
    from PIL import Image

    from pipeline.figures import image_grid, save_figure
    from stages.arrays import as_bytes

    for number, pixels in enumerate(as_bytes(images)):
        channels_last = pixels.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
        image = Image.fromarray(channels_last[..., 0] if len(pixels) == 1 else channels_last)
        image.save(folder / f"{number:05d}.png")
    save_figure(image_grid(images, columns=COLUMNS), folder / "samples.png")


def _write_table(folder: Path, rows: np.ndarray, names: list[str]) -> None:
    """The rows of a table with the names of its columns; without names, with their numbers."""
    import csv

    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names or range(rows.shape[1]))
        writer.writerows([str(value) for value in row] for row in rows)
