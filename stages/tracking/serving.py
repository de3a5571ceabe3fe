"""A trained generator as an MLflow model from code: density and networks as safetensors, columns as JSON, no pickle anywhere.

MLflow copies this file into the model and runs it when the model is loaded. So the file defines the model and, at the end,
registers it with MLflow. The machine that serves the model needs this project installed.
"""

from __future__ import annotations

import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["log_model", "predicted"]


def predicted(generator: Any, requests: pd.DataFrame, limits: Any = None) -> pd.DataFrame:
    """What a generator answers to a table of requests; see `pipeline.serving.answer`.

    Arguments:
        generator: The generator.
        requests: One request per row, one key per column.
        limits: What they may ask for, at most.

    Raises:
        MlflowException: When a request can't be answered, with the status 400 and one line; for any other error 500.
    """
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

    from pipeline.errors import PipelineError
    from pipeline.serving import answer

    try:
        return pd.DataFrame(answer(generator, _records(requests), limits))
    except PipelineError as error:
        raise _refusal(str(error), INVALID_PARAMETER_VALUE) from None
    except Exception:
        traceback.print_exc()
        raise _refusal("the server failed; its log says why", INTERNAL_ERROR) from None


def _records(requests: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as mappings. In a column with empty cells pandas holds whole numbers as floats."""
    columns: dict[str, list[Any]] = {str(name): list(requests[name]) for name in requests}
    for name, column in requests.items():
        if column.dtype.kind == "f" and column.isna().any():
            columns[str(name)] = [int(value) if value.is_integer() else value for value in map(float, column)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _refusal(line: str, code: int) -> Exception:
    """An exception whose message stays this line: MLflow's server would put the whole request before it."""
    from mlflow.exceptions import MlflowException

    class Refusal(MlflowException):
        message = property(lambda self: line, lambda self, value: None)

    return Refusal(line, error_code=code)


def log_model(run_id: str, name: str, folder: str) -> str:
    """Logs a generator to a run and registers it.

    Arguments:
        run_id: The run that it's logged to.
        name: Name of the density's row, under which it is registered.
        folder: What `python -m stages export` wrote.

    Returns:
        The model's address with its version, which `mlflow models serve -m` takes.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType, Array

    from pipeline.serving import KEYS, Limits

    # Of any type, and none required: what is wrong is said by `answer` in one line, and by MLflow with a stack trace.
    keys = dict.fromkeys(("query", *(key for keys in KEYS.values() for key in keys)))
    inputs = Schema([ColSpec(AnyType(), key, required=False) for key in keys])
    outputs: list[Any] = [ColSpec("long", "request"), ColSpec(Array("double"), "sample", required=False)]
    outputs += [ColSpec("double", key, required=False) for key in ("log_likelihood", "reconstruction_error", "strangeness")]
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="generator",
            python_model=str(Path(__file__).resolve()),
            artifacts={"generator": Path(folder).resolve().as_uri()},
            signature=ModelSignature(inputs, Schema(outputs)),
            input_example=pd.DataFrame({"count": [2], "seed": [0]}),
            registered_model_name=name,
            pip_requirements=[],
            model_config=asdict(Limits()),
            metadata={"row": name},
        )
    _forget_paths(info)
    about = f"Generator of the row `{name}`: draws samples, scores examples, completes tables; docs/running.md has requests."
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

    class Served(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
        """Answers requests; its configuration holds their limits."""

        def load_context(self, context: Any) -> None:
            """Reads the generator and the limits."""
            from pipeline.generator import Generator
            from pipeline.serving import Limits
            from pipeline.settings import build

            self.generator = Generator.load(context.artifacts["generator"])
            self.limits = build(Limits, context.model_config or {}, "model_config")

        def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
            """See `predicted`."""
            return predicted(self.generator, model_input, self.limits)

    mlflow.models.set_model(Served())


if __name__ not in ("stages.tracking.serving", "__main__"):  # MLflow runs this file under another name
    _define()
