"""MLflow tracking, the stage's side: one run per stage, written by a separate process (`writer`).

The stage sends JSON lines to that process, which imports MLflow while the stage works. So a stage starts at once, MLflow takes
none of its memory, and a slow or unreachable server never delays it. If a stage is killed, its run is marked as killed.
Environment: MLFLOW_TRACKING_URI (default: a SQLite file in the project's root) and MLFLOW_EXPERIMENT_NAME.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.tracking.database import database_uri
from stages.workspace import main_checkout

__all__ = ["Tracker", "experiment_name", "prepare_environment", "shown_uri", "tracking_uri"]

EXPERIMENT = "latent-density-pipeline"
FINISH_SECONDS = 60.0
RETRY_SECONDS = 60.0  # how long all stages skip a server that didn't answer one of them in time


def tracking_uri() -> str:
    """Where runs are written: the environment's MLFLOW_TRACKING_URI, or mlflow.db in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or database_uri(main_checkout() / "mlflow.db")


def experiment_name() -> str:
    """The experiment that runs belong to: the environment's MLFLOW_EXPERIMENT_NAME, or the project's."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)


def shown_uri() -> str:
    """The same for messages, without user and password."""
    return _without_password(tracking_uri())


def _without_password(text: str) -> str:
    return re.sub(r"(://)[^/?#@\s]*@", r"\1", text)


def prepare_environment() -> None:
    """Turns telemetry off and shortens timeouts, unless the user has set them."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.pop("MLFLOW_RUN_ID", None)  # a child process would reopen and rename that run


class Tracker:
    """The stage's side: starts the tracking process and sends it what to log. It never makes the stage fail.

    Arguments:
        name: Name of the run.
        tags: Tags of the run.
        params: Flat parameters.
        off: Whether to track nothing (ranks other than the first, or TRACKING=off).
    """

    def __init__(self, name: str, tags: Mapping[str, str], params: Mapping[str, Any], off: bool = False) -> None:
        self.run_id: str | None = None
        self.registered = ""  # address of the model that was registered
        self._process: subprocess.Popen[str] | None = None
        if off or os.environ.get("TRACKING", "on") == "off":
            return
        if _left_alone():
            _warn(f"{shown_uri()} didn't answer in time a moment ago; this stage isn't recorded")
            return
        prepare_environment()
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
        environment["OMP_NUM_THREADS"] = "1"
        try:
            # In a new session: Ctrl-C ends the stage, and the tracking process then records how it ended.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stages.tracking.writer"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            _warn(f"its process can't be started ({error}); this stage isn't recorded")
            return
        self._send(start={"name": name, "tags": dict(tags), "params": dict(params), "pid": os.getpid()})

    @property
    def on(self) -> bool:
        """Whether anything is tracked."""
        return self._process is not None

    def _send(self, **message: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs numbers at a step."""
        self._send(
            metrics={k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}, step=step
        )

    def curve(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Logs rows of a curve, each with its own "step"."""
        for row in rows:
            self.metrics({k: v for k, v in row.items() if k != "step"}, int(row["step"]))

    def dataset(self, name: str, digest: str, path: str, context: str) -> None:
        """Logs that the run read a data set."""
        self._send(dataset={"name": name, "digest": digest, "path": path, "context": context})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Logs a file, or all files of a folder."""
        self._send(artifact={"path": os.path.abspath(path), "folder": folder})

    def image(self, path: str | Path, key: str, step: int) -> None:
        """Logs a picture of a series, which the UI shows with a slider over steps."""
        self._send(image={"path": os.path.abspath(path), "key": key, "step": step})

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Sets tags."""
        self._send(set_tags={"values": dict(values)})

    def describe(self, markdown: str) -> None:
        """Describes the run in Markdown; `ARTIFACTS` in it becomes the address of the run's files in the UI."""
        self._send(describe={"markdown": markdown})

    def view(self, metrics: Iterable[str]) -> None:
        """Makes metrics the columns of the run list's view `scores`; see `_Writer.view`."""
        self._send(view={"metrics": list(metrics)})

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Makes the run list's view `rows`, with one line per row; see `_Writer.rows`."""
        self._send(rows={"rows": rows})

    def pipeline(self, children: list[dict[str, Any]]) -> None:
        """Makes this run the parent of the stages' runs; see `_Writer.pipeline`."""
        self._send(pipeline=children)

    def model(self, **values: object) -> None:
        """Logs and registers a model from code; see `_Writer.model`."""
        self._send(model=values)

    def finish(self, status: str = "FINISHED") -> str | None:
        """Ends the run and returns its id; None if it couldn't be written."""
        process = self._process
        if process is None:
            return None
        self._send(finish=status)
        self._process = None
        with contextlib.suppress(OSError, ValueError):
            if process.stdin is not None:
                process.stdin.close()
        reply = ""
        if process.stdout is not None and select.select([process.stdout], [], [], FINISH_SECONDS)[0]:
            reply = process.stdout.readline()
        answer: dict[str, Any] = {"late": True, "error": "no answer in time"}
        with contextlib.suppress(ValueError):
            answer = json.loads(reply)
        self.run_id, self.registered = answer.get("run_id"), str(answer.get("model", ""))
        if answer.get("error"):
            _warn(f"{shown_uri()}: {_without_password(answer['error'])}; the results are complete without it")
        if answer.get("late"):
            _leave_alone()
        return self.run_id


def _warn(message: str) -> None:
    print(f"warning: tracking: {message}", file=sys.stderr)


# Waiting for a server that doesn't answer takes about 20 s. One stage waits, and the following ones skip the server.
def _unanswered() -> Path:
    return main_checkout() / ".checkpoints/tracking-unanswered"


def _leave_alone() -> None:
    with contextlib.suppress(OSError):
        _unanswered().parent.mkdir(exist_ok=True)
        _unanswered().write_text(tracking_uri(), encoding="utf-8")


def _left_alone() -> bool:
    with contextlib.suppress(OSError, ValueError):
        recent = 0 <= time.time() - _unanswered().stat().st_mtime < RETRY_SECONDS
        return recent and _unanswered().read_text(encoding="utf-8") == tracking_uri()
    return False
