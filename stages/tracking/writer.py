"""MLflow tracking, the writing process: it passes the stage's messages to MLflow and samples the machine's load."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import queue
import sys
import threading
import time
from typing import Any

from pipeline.errors import PipelineError
from stages.tracking.client import experiment_name, tracking_uri
from stages.tracking.database import check_experiment, database_file, open_database
from stages.workspace import git_state, main_checkout

# Description on the experiment's page.
ABOUT = """\
Runs named `pipeline` are states of the whole pipeline, with the headline scores of every row and a link to the report. Their
child runs are its stages, named by stage and row. Search `tags.stage = 'report'` to see only pipeline runs, and
`tags.stage = 'fit'` or `tags.row = 'digits-iae-lde'` to compare trials. Settings are logged without the row's name, so rows and
trials share their columns. Seconds, memory and the like are tags below `run.`.
"""
VIEW = "scores"  # name of the run list's view with the headline scores as columns
ROW_VIEW = "rows"  # name of the view with one line per row
VIEW_COLUMNS = 16
SYSTEM_METRICS_SECONDS = 2.0
LATE_SECONDS = 5.0  # a server that takes longer to open a run is slow


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without names
        return "unknown"


class _Writer:
    """Passes the messages of a stage to MLflow."""

    def __init__(self) -> None:
        import mlflow
        from mlflow.tracking import MlflowClient

        self.state = git_state()
        self.uri = tracking_uri()
        self.on_server = database_file(self.uri) is None
        self.late = self.on_server  # until a run is open
        self.artifacts = None if self.on_server else (main_checkout() / "mlartifacts").as_uri()
        address = open_database(self.uri)  # changes the working folder
        mlflow.set_tracking_uri(address)
        self.client = MlflowClient(address)
        self.run_id = ""
        self.registered = ""
        self.unknown: dict[str, dict[str, Any]] = {}  # rows whose run this server doesn't know, by name

    def experiment(self) -> str:
        """The experiment's id; a missing experiment is created."""
        from mlflow.exceptions import MlflowException

        name, refusal = experiment_name(), ""
        for _ in range(2):
            experiment = self.client.get_experiment_by_name(name)
            if experiment is not None:
                check_experiment(name, str(experiment.experiment_id), experiment.lifecycle_stage, self.uri)
                return str(experiment.experiment_id)
            # Without this tag the UI shows it as an experiment on language models.
            tags = {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": ABOUT}
            try:
                return str(self.client.create_experiment(name, artifact_location=self.artifacts, tags=tags))
            except MlflowException as error:  # another process may have created it meanwhile
                refusal = str(error)
        raise PipelineError(f"the experiment '{name}' can't be created: {refusal}")

    def start(self, name: str, tags: dict[str, str], params: dict[str, Any], pid: int) -> None:
        """Opens the run."""
        from mlflow.entities import Param

        begun = time.monotonic()
        tags = {
            "mlflow.source.name": "python -m stages",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
            "mlflow.source.git.commit": self.state["commit"],
            "git.dirty": self.state["dirty"],
            **tags,
        }
        run = self.client.create_run(self.experiment(), run_name=name, tags=tags)
        self.run_id = run.info.run_id
        flat = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, len(flat), 100):
            self.client.log_batch(self.run_id, params=flat[start : start + 100])
        self.late = self.on_server and time.monotonic() - begun > LATE_SECONDS

    def metrics(self, points: list[tuple[str, float, int, int]]) -> None:
        """Logs (name, value, step, milliseconds)."""
        from mlflow.entities import Metric

        for start in range(0, len(points), 1000):
            self.client.log_batch(self.run_id, metrics=[Metric(k, v, t, s) for k, v, s, t in points[start : start + 1000]])

    def dataset(self, name: str, digest: str, path: str, context: str) -> None:
        """Logs an input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name, digest=digest[:10], source_type="local", source=json.dumps({"uri": path}),
            profile=json.dumps({"sha256": digest}),
        )  # fmt: skip
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def artifact(self, path: str, folder: str | None) -> None:
        """Logs a file or the files of a folder."""
        if os.path.isdir(path):
            self.client.log_artifacts(self.run_id, path, folder)
        elif os.path.isfile(path):
            self.client.log_artifact(self.run_id, path, folder)

    def image(self, path: str, key: str, step: int) -> None:
        """Logs a picture of a series."""
        from PIL import Image

        with Image.open(path) as picture:
            self.client.log_image(self.run_id, picture.convert("RGB"), key=key, step=step)

    def set_tags(self, values: dict[str, str]) -> None:
        """Sets tags."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in values.items()])

    def describe(self, markdown: str) -> None:
        """Sets the description; `ARTIFACTS` in it becomes the address of the run's files."""
        self.client.set_tag(self.run_id, "mlflow.note.content", self._with_addresses(markdown))

    def _with_addresses(self, markdown: str) -> str:
        runs = f"#/experiments/{self.client.get_run(self.run_id).info.experiment_id}/runs"
        return markdown.replace("ARTIFACTS", f"{runs}/{self.run_id}/artifacts").replace("RUNS", runs)

    def view(self, metrics: list[str]) -> None:
        """Sets the view that `runs?viewStateShareKey=scores` shows: pipeline runs, with these metrics as columns.

        The UI stores shared views in such tags, and reads from them the keys that it knows.
        """
        self._share(VIEW, "tags.stage = 'report'", [f"metrics.`{name}`" for name in metrics[:VIEW_COLUMNS]])

    def _share(self, name: str, search: str, columns: list[str], **others: Any) -> None:
        state = {"searchFilter": search, "selectedColumns": columns, **others}
        self.client.set_experiment_tag(self.experiment(), f"mlflow.sharedViewState.{name}", json.dumps(state))

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Adds headline scores and settings to each row's last run, and sets the view `rows` that shows these runs only.

        What a run made that this server doesn't know is added to the small run that `pipeline` creates for it.

        Arguments:
            rows: For each row its name, the id of its run of `evaluate`, its scores and its settings, each under a short name.
        """
        from mlflow.entities import Metric, RunTag
        from mlflow.exceptions import MlflowException

        for row in rows:
            try:
                known = self.client.get_run(row["run_id"]) if row["run_id"] else None
            except MlflowException:
                known = None  # made by a run that this server doesn't know
            if known is None:
                self.unknown[row["row"]] = row
            elif known.data.tags.get("view") != ROW_VIEW:
                now = int(time.time() * 1000)
                metrics = [Metric(name, float(value), now, 0) for name, value in row["scores"].items()]
                tags = [RunTag(name, str(value)) for name, value in {**row["settings"], "view": ROW_VIEW}.items()]
                self.client.log_batch(row["run_id"], metrics=metrics, tags=tags)
        kinds = {"metrics": "scores", "tags": "settings"}
        columns = {f"{kind}.`{name}`": None for kind, key in kinds.items() for row in rows for name in row[key]}
        # Sorted by time, as by default, the UI hides them behind the runs of the pipeline that they belong to.
        order = {"orderByKey": "tags.`row`", "orderByAsc": True}
        self._share(ROW_VIEW, f"tags.view = '{ROW_VIEW}'", list(columns), **order)

    def pipeline(self, children: list[dict[str, Any]]) -> None:
        """Makes the runs of the stages children of this run.

        A run without a parent becomes a child. A run has one parent. So a run that has one already, because its results came
        from DVC's cache, is named by a new small child run. The same goes for a run that this server doesn't know.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        for child in children:
            known = None
            if child["run_id"]:
                with contextlib.suppress(MlflowException):
                    known = self.client.get_run(child["run_id"])
            if known is not None and "mlflow.parentRunId" not in known.data.tags:
                self.client.set_tag(child["run_id"], "mlflow.parentRunId", self.run_id)
                continue
            tags = {"mlflow.parentRunId": self.run_id, "stage": child["stage"], "row": child["row"], "cached": "true"}
            tags["made_by_run"] = str(child["run_id"] or "not tracked")
            metrics = dict(child["metrics"])
            if known is None:
                tags["made_by_run_unknown_here"] = "true"
                if child["stage"] == "evaluate" and (row := self.unknown.get(child["row"])):
                    search = (
                        f"tags.view = '{ROW_VIEW}' and tags.row = '{child['row']}' and tags.made_by_run_unknown_here = 'true'"
                    )
                    for earlier in self.client.search_runs([self.experiment()], search):
                        self.client.delete_tag(earlier.info.run_id, "view")
                    tags |= {name: str(value) for name, value in row["settings"].items()} | {"view": ROW_VIEW}
                    metrics |= row["scores"]
            light = self.client.create_run(self.experiment(), run_name=f"{child['stage']} {child['row']} (cached)", tags=tags)
            now = int(time.time() * 1000)
            self.client.log_batch(light.info.run_id, metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items()])
            self.client.set_terminated(light.info.run_id)

    def model(self, about: str, tags: dict[str, str], **values: Any) -> None:
        """Logs and registers a model from code, with a description in Markdown and tags for its version.

        `ARTIFACTS` and `RUNS` in the description become the addresses of this run's files and of the experiment's runs.
        """
        from stages.tracking.serving import log_model

        self.registered = log_model(self.run_id, **values)
        name, version = self.registered.split("/")[-2:]
        self.client.update_model_version(name, version, description=self._with_addresses(about))
        for key, value in tags.items():
            self.client.set_model_version_tag(name, version, key, value)

    def finish(self, status: str) -> None:
        """Closes the run."""
        self.client.set_terminated(self.run_id, status)


def _watch_system(pid: int, messages: queue.Queue[dict[str, Any]], done: threading.Event) -> None:
    """Puts CPU and memory of the stage's process into the queue, under MLflow's names."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        process.cpu_percent()
        step = 0
        while not done.wait(SYSTEM_METRICS_SECONDS):
            values = {
                "system/cpu_utilization_percentage": process.cpu_percent(),
                "system/process_memory_usage_megabytes": process.memory_info().rss / 2**20,
                "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
            }
            messages.put({"metrics": values, "step": step})
            step += 1


def main() -> None:
    """Reads messages from standard input until it ends, and answers with the run's id."""
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    done = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            messages.put(json.loads(line) | {"time": int(time.time() * 1000)})
        messages.put({"end": True})

    threading.Thread(target=read, daemon=True).start()
    error, refused = "", False
    writer: _Writer | None = None
    status: str | None = None
    points: list[tuple[str, float, int, int]] = []
    try:
        # Standard output must carry only the answer, so MLflow's output is discarded.
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            import logging

            logging.disable(logging.WARNING)
            while True:
                message = messages.get()
                if "metrics" in message:
                    stamp = message.get("time", int(time.time() * 1000))
                    points += [(k, float(v), int(message["step"]), stamp) for k, v in message["metrics"].items()]
                    if not messages.empty() and len(points) < 5000:
                        continue
                if points and writer is not None:
                    writer.metrics(points)
                    points = []
                if message.get("end"):
                    break
                for name in ("start", "dataset", "artifact", "image", "set_tags", "describe", "view", "rows", "model"):
                    if name in message:
                        if name == "start":
                            writer = _Writer()
                            threading.Thread(
                                target=_watch_system, args=(message["start"]["pid"], messages, done), daemon=True
                            ).start()
                        if writer is not None:
                            getattr(writer, name)(**message[name])
                if "pipeline" in message and writer is not None:
                    writer.pipeline(message["pipeline"])
                status = message.get("finish", status)
            done.set()
            if writer is not None:
                # Without a message `finish` the stage was killed.
                writer.finish(status or "KILLED")
    except Exception as problem:
        refused = isinstance(problem, PipelineError)
        error = " ".join(f"{'' if refused else f'{type(problem).__name__}: '}{problem}".split())[:500]
        while not messages.get().get("end"):
            pass
    run_id = writer.run_id or None if writer is not None else None
    answer = {"run_id": run_id, "error": error, "late": writer is not None and writer.late and not refused}
    if writer is not None and writer.registered:
        answer["model"] = writer.registered
    with contextlib.suppress(OSError):
        print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
