"""A trained generator as an MLflow model from code: density and decoder as safetensors, columns as JSON, no pickle anywhere.

MLflow copies this file into the model and runs it when the model is loaded. So the file defines the model and, at the end,
registers it with MLflow. The machine that serves the model needs this project installed.
"""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["generate", "log_model"]

VALUES = 4_000_000  # in all samples of one request; as numbers and JSON they take about 300 MB
SEEDS = 2**63


def generate(density: Any, decoder: Any, requests: pd.DataFrame, columns: Sequence[Any] = ()) -> pd.DataFrame:
    """Samples for each request, one per row.

    Arguments:
        density: The density of the codes.
        decoder: Turns codes into images; None if codes are the data.
        requests: One request per row, with columns `count`, the number of samples, and `seed`. The same seed gives the same
            samples; without the column, or where it is null, they are others each time.
        columns: Columns of the table that the codes are rows of, if any.

    Returns:
        Columns `request`, the number of the request's row; `sample`, the values of the sample as one list (of an image
        C * H * W pixels in 0..1, of a table all columns in its units); and `shape`, the sample's shape.

    Raises:
        MlflowException: When a count or seed isn't a whole number in its range, or the samples have more than 4,000,000 values.
    """
    from mlflow.exceptions import MlflowException

    from pipeline.sampling import draw

    counts = list(requests["count"])
    given: list[Any] = list(requests["seed"]) if "seed" in requests else [None] * len(counts)
    seeds: list[Any] = [secrets.randbelow(SEEDS) if _is_null(seed) else seed for seed in given]
    values = (len(columns) or density.dim) if decoder is None else math.prod(decoder.image_shape)
    whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in (*counts, *seeds))
    if not counts or not whole or min(counts) < 1 or min(seeds) < 0 or max(seeds) >= SEEDS:
        raise MlflowException.invalid_parameter_value(
            "count must be a whole number, at least 1, and seed a whole number in 0..2^63 - 1, null or left out"
        )
    if sum(map(int, counts)) * values > VALUES:
        raise MlflowException.invalid_parameter_value(
            f"count must be at most {VALUES // values} in all, of {values} values each"
        )
    rows: list[dict[str, Any]] = []
    for number, (count, seed) in enumerate(zip(counts, seeds, strict=True)):
        samples = draw(density, decoder, int(count), int(seed), columns=columns).examples
        shape = list(samples.shape[1:])
        rows += [{"request": number, "sample": sample.ravel().tolist(), "shape": shape} for sample in samples]
    return pd.DataFrame(rows)


def _is_null(value: Any) -> bool:
    """Whether a cell of a request is empty; a column with empty cells may hold floats."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def log_model(run_id: str, name: str, density: str, decoder: str | None = None, columns: str | None = None) -> str:
    """Logs a generator to a run and registers it.

    Arguments:
        run_id: The run that it's logged to.
        name: Name of the density's row, under which it is registered.
        density: Path of the density's safetensors file.
        decoder: Path of the decoder's, if any.
        columns: Path of the file of the table's columns, if any.

    Returns:
        The model's address with its version, which `mlflow models serve -m` takes.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType, Array

    # They are whole numbers. For others MLflow prints a stack trace, `generate` one line.
    inputs = Schema([ColSpec(AnyType(), "count"), ColSpec(AnyType(), "seed", required=False)])
    outputs = Schema([ColSpec("long", "request"), ColSpec(Array("double"), "sample"), ColSpec(Array("long"), "shape")])
    files = {key: path for key, path in (("density", density), ("decoder", decoder), ("columns", columns)) if path is not None}
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="generator",
            python_model=str(Path(__file__).resolve()),
            artifacts={key: Path(path).resolve().as_uri() for key, path in files.items()},
            signature=ModelSignature(inputs, outputs),
            input_example=pd.DataFrame({"count": [2], "seed": [0]}),
            registered_model_name=name,
            pip_requirements=[],
            metadata={"row": name},
        )
    _forget_paths(info)
    about = f"Samples of the row `{name}`: a request of `count` and `seed` gives one row per sample, with its shape."
    mlflow.MlflowClient().update_model_version(name, str(info.registered_model_version), description=about)
    return f"models:/{name}/{info.registered_model_version}"


def _forget_paths(info: Any) -> None:
    """Deletes this machine's paths from the model's description; loading uses only the file names."""
    import mlflow
    from mlflow.models import Model

    model = Model.load(info.model_uri)
    code = model.flavors["python_function"]
    model.artifact_path, code["model_code_path"] = "generator", Path(code["model_code_path"]).name
    for file in code["artifacts"].values():
        file["uri"] = file["path"]
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/MLmodel")
        mlflow.MlflowClient().log_model_artifact(info.model_id, f"{folder}/MLmodel")


def _define() -> None:
    """Registers the model with MLflow."""
    import mlflow

    class Generator(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
        """Images, or codes without a decoder, for a count and a seed."""

        def load_context(self, context: Any) -> None:
            """Reads density, decoder and columns."""
            from pipeline.autoencoders.common.network import Decoder
            from pipeline.densities import load_density
            from pipeline.storage.columns import load_columns

            decoder, columns = context.artifacts.get("decoder"), context.artifacts.get("columns")
            self.density = load_density(context.artifacts["density"])
            self.decoder = None if decoder is None else Decoder.load(decoder)
            self.columns = () if columns is None else load_columns(Path(columns))

        def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
            """The samples; see `generate`."""
            return generate(self.density, self.decoder, model_input, self.columns)

    mlflow.models.set_model(Generator())


if __name__ not in ("stages.tracking.serving", "__main__"):  # MLflow runs this file under another name
    _define()
