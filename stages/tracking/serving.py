"""A trained generator as an MLflow model from code: density and decoder as safetensors, no pickle anywhere.

MLflow copies this file into the model and runs it where the model is loaded, so it defines the model and, at the end, names it.
The machine that serves it needs this project installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["generate", "log_model"]

COUNT = 100_000  # samples that one request may ask for, in all


def generate(density: Any, decoder: Any, requests: pd.DataFrame) -> pd.DataFrame:
    """Samples for each request, a row a sample.

    Arguments:
        density: The density of the codes.
        decoder: What turns codes into images; none where codes are the data.
        requests: A row a request, with columns `count`, the number of samples, and `seed`. The same request gives the same
            samples.

    Returns:
        Columns `request`, the number of the request's row; `sample`, the values of the sample as one list (of an image
        C * H * W pixels in 0..1); and `shape`, the sample's shape.

    Raises:
        ValueError: When a count isn't in 1..100000 in all, or a seed is negative.
    """
    from pipeline.sampling import draw

    counts, seeds = requests["count"].tolist(), requests["seed"].tolist()
    if not counts or min(counts) < 1 or sum(counts) > COUNT or min(seeds) < 0:
        raise ValueError(f"count has to lie in 1..{COUNT} in all, and seed has to be 0 or more")
    rows: list[dict[str, Any]] = []
    for number, (count, seed) in enumerate(zip(counts, seeds, strict=True)):
        samples, _ = draw(density, decoder, int(count), int(seed))
        shape = list(samples.shape[1:])
        rows += [{"request": number, "sample": sample.ravel().tolist(), "shape": shape} for sample in samples]
    return pd.DataFrame(rows)


def log_model(run_id: str, name: str, density: str, decoder: str | None = None) -> str:
    """Logs a generator to a run and registers it.

    Arguments:
        run_id: The run that it's logged to.
        name: Name of the density's row, under which it is registered.
        density: Path of the density's safetensors file.
        decoder: Path of the decoder's, if any.

    Returns:
        The model's address, which `mlflow models serve -m` takes.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array

    artifacts = {"density": Path(density).resolve().as_uri()}
    if decoder is not None:
        artifacts["decoder"] = Path(decoder).resolve().as_uri()
    inputs = Schema([ColSpec("long", "count"), ColSpec("long", "seed")])
    outputs = Schema([ColSpec("long", "request"), ColSpec(Array("double"), "sample"), ColSpec(Array("long"), "shape")])
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="generator",
            python_model=str(Path(__file__).resolve()),
            artifacts=artifacts,
            signature=ModelSignature(inputs, outputs),
            input_example=pd.DataFrame({"count": [2], "seed": [0]}),
            registered_model_name=name,
            pip_requirements=[],
            metadata={"row": name},
        )
    about = f"Samples of the row `{name}`: a request of `count` and `seed` gives a row a sample, with its shape."
    mlflow.MlflowClient().update_model_version(name, str(info.registered_model_version), description=about)
    return str(info.model_uri)


def _define() -> None:
    """Names the model to MLflow."""
    import mlflow

    class Generator(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
        """Images, or codes where there is no decoder, for a count and a seed."""

        def load_context(self, context: Any) -> None:
            """Reads density and decoder."""
            from pipeline.autoencoders.common.network import Decoder
            from pipeline.densities import load_density

            decoder = context.artifacts.get("decoder")
            self.density = load_density(context.artifacts["density"])
            self.decoder = None if decoder is None else Decoder.load(decoder)

        def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
            """The samples; see `generate`."""
            return generate(self.density, self.decoder, model_input)

    mlflow.models.set_model(Generator())


if __name__ not in ("stages.tracking.serving", "__main__"):  # MLflow runs this file under a name of its own
    _define()
