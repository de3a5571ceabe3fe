"""density, codes (for the decoder) -> a self-contained generator, and a model in MLflow's registry."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages import workspace
from stages.run import one_line_errors

if TYPE_CHECKING:
    from pipeline.generator import Generator
    from pipeline.settings import DensitySettings, Params

NEXT = """in Python:
    from pipeline.generator import Generator
    samples = Generator.load("{folder}").sample(16, seed=0)"""
REQUEST = '{"dataframe_records": [{"count": 4}]}'
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
        f"-d '{REQUEST}'"
    )


def _about(row: str, scores: Iterable[str], pictures: Sequence[str], run_id: str | None) -> str:
    """The description of a registered model, in Markdown."""
    links = ", ".join(f"[{name}](ARTIFACTS/figures/{name}.png)" for name in pictures)
    parts = [
        f"Generator of the row `{row}`: draws samples, scores examples, completes tables; docs/running.md has requests.",
        "".join(f"\n- {score}" for score in scores),
        f"Pictures: {links}." if links else "",
        f"Made by [this run](RUNS/{run_id})." if run_id else "",
        f"A request:\n\n    {REQUEST}",
    ]
    return "\n\n".join(filter(None, parts))


def _register(row: str, params: Params, folder: Path) -> str | None:
    """Registers an exported folder with MLflow, with its scores, a picture of samples and the run that made it.

    Returns:
        The model's address; None if nothing was recorded.
    """
    from stages.arrays import read_run
    from stages.reporting.pictures import draw_row
    from stages.reporting.scoreboard import read_metrics
    from stages.run import shown_scores
    from stages.tracking.client import Tracker

    tracker = Tracker(f"export {row}", {"stage": "export", "row": row}, {})
    scores: dict[str, Any] = {}
    for stage, name in (("train", params.density(row).codes), ("fit", row), ("evaluate", row)):
        if workspace.metrics_file(stage, name).exists():
            scores |= read_metrics(stage, name)
    tracker.metrics(scores)
    shown = shown_scores(scores)
    with tempfile.TemporaryDirectory() as drawn:
        pictures = draw_row(params, "sample", row, Path(drawn))
        for picture in pictures:
            tracker.artifact(picture, "figures")
        about = _about(row, shown.values(), [picture.stem for picture in pictures], read_run("evaluate", row).get("run_id"))
        tags = {key: f"{scores[key]:.6g}" for key in shown}
        tracker.model(about=about, tags=tags, name=row, folder=str(folder.resolve()))
        return tracker.registered if tracker.finish() is not None else None  # waits until everything is logged


def _calibrate(row: str, settings: DensitySettings, relative_error: bool, folder: Path) -> bool:
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
    files = workspace.density_file(row), workspace.autoencoder_folder(settings.codes)
    scorer = load_scorer(*files, reader, relative_error=relative_error)
    save_calibration(calibrated(scorer, reader)[1], folder / CALIBRATION, relative_error)
    return True


def _copy(row: str, params: Params, folder: Path) -> bool:
    """Puts the files of a generator into a folder; whether it knows what validation examples score."""
    from pipeline.autoencoders.common.network import Decoder, Encoder
    from pipeline.errors import PipelineError
    from pipeline.storage.codes import CodeReader
    from pipeline.storage.columns import save_columns

    settings = params.density(row)
    codes = CodeReader(workspace.codes_folder(settings.codes))
    shutil.copyfile(workspace.density_file(row), folder / "density.safetensors")
    if codes.decoder_path is not None:
        if codes.decoder_path.suffix == ".onnx":
            raise PipelineError("its decoder is an ONNX file, which is portable as it is; export is for decoders trained here")
        Decoder.load(codes.decoder_path)
        shutil.copyfile(codes.decoder_path, folder / "decoder.safetensors")
        encoder = workspace.autoencoder_folder(settings.codes) / "encoder.safetensors"
        Encoder.load(encoder)
        shutil.copyfile(encoder, folder / encoder.name)
    if codes.index.columns:
        save_columns(codes.index.columns, folder / "columns.json")
    return _calibrate(row, settings, params.relative_error(row), folder)


def _write_onnx(row: str, params: Params, folder: Path) -> None:
    """Writes ONNX files and how to use them."""
    from tempfile import TemporaryDirectory

    from pipeline.densities import load_density
    from pipeline.generator import COLUMNS, Generator
    from pipeline.portable import context_titles, score_network, write_onnx
    from pipeline.system.files import write_json, write_text

    score_network(load_density(workspace.density_file(row)))  # refuses before anything is computed
    with TemporaryDirectory() as scratch:
        _copy(row, params, Path(scratch))
        generator = Generator.load(scratch)
        differences = write_onnx(generator, folder)
        if (Path(scratch) / COLUMNS).is_file():
            shutil.copyfile(Path(scratch) / COLUMNS, folder / COLUMNS)
    titles = context_titles(generator.density)
    about = {"row": row, "largest_difference": differences} | ({"log_joint": titles} if titles else {})
    write_json(folder / "generator.json", about)
    write_text(folder / "README.md", _onnx_readme(row, generator))


def _onnx_readme(row: str, generator: Generator) -> str:
    """How to use a folder of ONNX files."""
    plain = all(column.plain for column in generator.columns)
    taken = (
        ("codes", f"({generator.density.dim},)", "float32") if plain else ("rows", f"({len(generator.columns)},)", "float64")
    )
    lines = [
        f"# {row}",
        "",
        "ONNX files, for any runtime; the batch may have any length. Images are float32 in 0..1, with shape (N, C, H, W).",
        "",
        "| file | from | to |",
        "|---|---|---|",
        f"| `log_prob.onnx` | `{taken[0]}`, {taken[2]} with shape (N, {taken[1][1:-2]}) | `log_prob` (N,), in nats |",
    ]
    if generator.density.context is not None:
        lines[-1] = lines[-1][:-2] + ", and `log_joint` (N, M), joint with each context of `generator.json` |"
    if generator.decoder is not None:
        lines += ["| `encoder.onnx` | `images` | `codes` |", "| `decoder.onnx` | `codes` | `images` |"]
    return (
        "\n".join(lines)
        + f"""

With `pip install onnxruntime`:

```python
import numpy as np
import onnxruntime

score = onnxruntime.InferenceSession("log_prob.onnx")
{taken[0]} = np.ones((5, *{taken[1]}), np.{taken[2]})
log_prob = score.run(["log_prob"], {{"{taken[0]}": {taken[0]}}})[0]
```
"""
    )


@click.command("export")
@click.argument("row", metavar="NAME")
@click.option("--to", "target", default=None, help="Folder for the generator.  [default: data/exports/NAME]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "onnx"]),
    default="safetensors",
    show_default=True,
    help="`onnx` writes encoder, decoder and the log-likelihood for other runtimes, in data/exports/NAME-onnx.",
)
@click.option("--register/--no-register", default=True, help="Whether to log the generator to MLflow and register it there.")
def export(row: str, target: str | None, form: str, register: bool) -> None:
    """Copy a trained generator (density, decoder, encoder) into one folder, and register it as a model with MLflow.

    NAME is a row of `densities`. `pipeline.generator.Generator.load` reads the folder. The last lines say how to use both.
    With --format onnx, each file is compared with the library's numbers, and nothing is registered.
    """
    with one_line_errors(f"export {row}"):
        from pipeline.densities import load_density
        from pipeline.errors import PipelineError
        from pipeline.settings import read_params
        from pipeline.storage.codes import CodeReader
        from pipeline.system.files import atomic_folder, read_json, sha256_file, write_json, write_text

        params = read_params()
        settings = params.density(row)
        load_density(workspace.density_file(row))
        codes = CodeReader(workspace.codes_folder(settings.codes))
        folder = Path(target) if target else Path("data/exports") / (row if form == "safetensors" else f"{row}-onnx")
        if folder.exists() and not (folder / "generator.json").is_file():
            raise PipelineError(f"{folder} exists and is no exported generator; name another folder")
        if form == "onnx":
            with atomic_folder(folder) as temporary:
                _write_onnx(row, params, temporary)
            differences = read_json(folder / "generator.json")["largest_difference"]
            shown = ", ".join(f"{name} {value:.1g}" for name, value in differences.items())
            click.echo(f"exported to {folder}; largest differences from the library: {shown}")
            return
        with atomic_folder(folder) as temporary:
            calibrated = _copy(row, params, temporary)
            digests = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
            write_json(temporary / "generator.json", {"row": row, "codes": codes.index.digest, "sha256": digests})
            write_text(temporary / "README.md", _readme(row, codes.decoder_path is not None, calibrated))
        click.echo(f"exported to {folder}\n" + NEXT.format(folder=folder))
        if register and (address := _register(row, params, folder)) is not None:
            click.echo(f"registered as {address}\n" + _serving(address))
