"""density, codes (for the decoder) -> a self-contained generator, and a model in MLflow's registry."""

from __future__ import annotations

import shutil

import click

from stages import workspace
from stages.run import one_line_errors


@click.command("export")
@click.argument("row", metavar="NAME")
@click.option("--to", "target", default=None, help="Folder for the generator.  [default: data/exports/NAME]")
@click.option("--register/--no-register", default=True, help="Whether to log the generator to MLflow and register it there.")
def export(row: str, target: str | None, register: bool) -> None:
    """Copy a trained generator (density and decoder) into one folder, and register it as a model with MLflow.

    NAME is a row of `densities`. Then `mlflow models serve -m models:/NAME/1 --env-manager local` serves samples.
    """
    with one_line_errors(f"export {row}"):
        from pathlib import Path

        from pipeline.autoencoders.common.network import Decoder
        from pipeline.densities import load_density
        from pipeline.errors import PipelineError
        from pipeline.settings import read_params
        from pipeline.storage.codes import CodeReader
        from pipeline.system.files import atomic_folder, sha256_file, write_json

        settings = read_params().density(row)
        density, codes = workspace.density_file(row), CodeReader(workspace.codes_folder(settings.codes))
        load_density(density)
        folder = Path(target) if target else Path("data/exports") / row
        if folder.exists() and not (folder / "generator.json").is_file():
            raise PipelineError(f"{folder} exists and is no exported generator; name another folder")
        with atomic_folder(folder) as temporary:
            shutil.copyfile(density, temporary / "density.safetensors")
            if codes.decoder_path is not None:
                Decoder.load(codes.decoder_path)
                shutil.copyfile(codes.decoder_path, temporary / "decoder.safetensors")
            digests = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
            write_json(temporary / "generator.json", {"row": row, "codes": codes.index.digest, "sha256": digests})
        click.echo(f"exported to {folder}")
        if register:
            from stages.tracking.client import Tracker

            tracker = Tracker(f"export {row}", {"stage": "export", "row": row}, {})
            files = {file.stem: str(file.resolve()) for file in folder.glob("*.safetensors")}
            tracker.model(name=row, **files)
            if tracker.finish() is not None:
                click.echo(f"registered as models:/{row}")
