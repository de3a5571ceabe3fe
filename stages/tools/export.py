"""density, codes (for the decoder) -> a self-contained generator, and a model in MLflow's registry."""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING

import click

from stages import workspace
from stages.run import one_line_errors

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.settings import DensitySettings

NEXT = """in Python:
    from pipeline.generator import Generator
    samples = Generator.load("{folder}").sample(16, seed=0)"""
PORT = 5001  # the interface of MLflow takes 5000


def _readme(row: str, images: bool, calibrated: bool) -> str:
    """How to use the exported folder."""
    use = f"""\
# {row}

A generator: {"a density of codes, and the encoder and decoder between codes and images" if images else "a density of codes"}.
In an environment with the project that made it (`pip install .`):

```python
from pipeline.generator import Generator

generator = Generator.load(".")  # this folder
samples = generator.sample(16, seed=0)
scores = generator.score(samples)
{"strangeness, p_values = generator.strangeness(samples)  # compared with validation examples" if calibrated else ""}
""".rstrip()
    use += "\n```\n\n"
    shape = "`samples` has shape (16, C, H, W), in 0..1; `encode` and `decode` give codes and images." if images else ""
    return use + f"{shape} `log_prob` is in nats, of the codes.\n".lstrip()


def _serving(model: str) -> str:
    """Commands that serve a registered model, and ask it."""
    from stages.tracking.client import shown_uri

    return (
        f"over HTTP:\n    MLFLOW_TRACKING_URI={shlex.quote(shown_uri())} mlflow models serve -m {model} --env-manager local "
        f"--port {PORT}\n    curl http://127.0.0.1:{PORT}/invocations -H 'Content-Type: application/json' "
        """-d '{"dataframe_records": [{"count": 4}]}'"""
    )


def _calibrate(row: str, settings: DensitySettings, folder: Path) -> bool:
    """Puts the scores of validation examples into the folder, so that others can be compared with them; whether it could."""
    from pipeline.densities import load_density
    from pipeline.detection import calibrated, load_scorer
    from pipeline.generator import CALIBRATION, save_calibration
    from pipeline.storage.shards import ShardReader

    shards = workspace.shards_folder(settings.dataset)
    if not load_density(workspace.density_file(row)).has_marginal:
        return False  # it can't score
    if not (shards / "index.json").is_file():
        click.echo(f"without {shards} scores come without p-values; `dvc repro prepare@{settings.dataset}` makes it", err=True)
        return False
    reader = ShardReader(shards)
    scorer = load_scorer(workspace.density_file(row), workspace.autoencoder_folder(settings.codes), reader)
    save_calibration(calibrated(scorer, reader)[1], folder / CALIBRATION)
    return True


@click.command("export")
@click.argument("row", metavar="NAME")
@click.option("--to", "target", default=None, help="Folder for the generator.  [default: data/exports/NAME]")
@click.option("--register/--no-register", default=True, help="Whether to log the generator to MLflow and register it there.")
def export(row: str, target: str | None, register: bool) -> None:
    """Copy a trained generator (density, decoder, encoder) into one folder, and register it as a model with MLflow.

    NAME is a row of `densities`. `pipeline.generator.Generator.load` reads the folder. The last lines say how to use both.
    """
    with one_line_errors(f"export {row}"):
        from pathlib import Path

        from pipeline.autoencoders.common.network import Decoder, Encoder
        from pipeline.densities import load_density
        from pipeline.errors import PipelineError
        from pipeline.settings import read_params
        from pipeline.storage.codes import CodeReader
        from pipeline.storage.columns import save_columns
        from pipeline.system.files import atomic_folder, sha256_file, write_json, write_text

        settings = read_params().density(row)
        density, codes = workspace.density_file(row), CodeReader(workspace.codes_folder(settings.codes))
        load_density(density)
        folder = Path(target) if target else Path("data/exports") / row
        if folder.exists() and not (folder / "generator.json").is_file():
            raise PipelineError(f"{folder} exists and is no exported generator; name another folder")
        with atomic_folder(folder) as temporary:
            shutil.copyfile(density, temporary / "density.safetensors")
            if codes.decoder_path is not None:
                if codes.decoder_path.suffix == ".onnx":
                    raise PipelineError(
                        "its decoder is an ONNX file, which is portable as it is; export is for decoders trained here"
                    )
                Decoder.load(codes.decoder_path)
                shutil.copyfile(codes.decoder_path, temporary / "decoder.safetensors")
                encoder = workspace.autoencoder_folder(settings.codes) / "encoder.safetensors"
                Encoder.load(encoder)
                shutil.copyfile(encoder, temporary / encoder.name)
            if codes.index.columns:
                save_columns(codes.index.columns, temporary / "columns.json")
            calibrated = _calibrate(row, settings, temporary)
            digests = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
            write_json(temporary / "generator.json", {"row": row, "codes": codes.index.digest, "sha256": digests})
            write_text(temporary / "README.md", _readme(row, codes.decoder_path is not None, calibrated))
        click.echo(f"exported to {folder}\n" + NEXT.format(folder=folder))
        if register:
            from stages.tracking.client import Tracker

            tracker = Tracker(f"export {row}", {"stage": "export", "row": row}, {})
            tracker.model(name=row, folder=str(folder.resolve()))
            if tracker.finish() is not None:
                click.echo(f"registered as {tracker.registered}\n" + _serving(tracker.registered))
