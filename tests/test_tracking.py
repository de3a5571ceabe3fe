"""Runs in MLflow: a database with all its tables or none, shared, in folders of any name; slow servers; how a run ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.tracking import client
from stages.tracking.database import database_file, database_uri

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 4
# MLflow is imported once; each test runs in a fork of that process, in its own folder.
FORKS = """
import json, os, sys, traceback
import mlflow, mlflow.store.tracking.sqlalchemy_store
from stages.tracking.writer import _Writer
for line in sys.stdin:
    folder, code = json.loads(line)
    if os.fork() == 0:
        try:
            os.chdir(folder)
            exec(code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
KILLED = """
import signal, sqlalchemy
left = [{statements}]
@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "before_cursor_execute")
def count(*_):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
_Writer()
"""
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
_Writer()
"""
AT_ONCE = f"""
ready, go = os.pipe()
for number in range({PROCESSES}):
    if os.fork() == 0:
        os.close(go)
        os.read(ready, 1)
        writer = _Writer()
        writer.start(f"run {{number}}", {{}}, {{"number": number}}, os.getpid())
        writer.metrics([("loss", 1.0, step, 0) for step in range(20)])
        writer.finish("FINISHED")
        os._exit(0)
os.close(go)
assert not any([os.wait()[1] for _ in range({PROCESSES})])
"""
ONE_RUN = """
os.environ["MLFLOW_EXPERIMENT_NAME"] = "of its own"
open("note.txt", "w").write("x")
note = os.path.abspath("note.txt")
writer = _Writer()
writer.start("run", {}, {}, os.getpid())
writer.artifact(note, "notes")
writer.finish("FINISHED")
"""
# Twice, as by two reports of the same results. A run of another machine is unknown here, and a stage without tracking has none.
ROWS = """
writer = _Writer()
writer.start("evaluate a-lde", {"stage": "evaluate"}, {}, os.getpid())
row = {"row": "a-lde", "run_id": writer.run_id, "scores": {"parzen": 250.5}, "settings": {"latent_dim": 8}}
unknown = {"row": "b-lde", "run_id": "0" * 32, "scores": {"kid": 0.5}, "settings": {"family": "lde"}}
rows = [row, unknown, unknown | {"row": "c-lde", "run_id": None}]
for _ in range(2):
    writer.rows(rows)
    stages = [(stage, row) for row in rows for stage in ("fit", "evaluate")]
    writer.pipeline([{"stage": stage, "row": row["row"], "run_id": row["run_id"], "metrics": {}} for stage, row in stages])
"""
MODEL = """
import stages.tracking.serving
stages.tracking.serving.log_model = lambda run_id, name: f"models:/{name}/1"
writer = _Writer()
writer.start("export a-lde", {}, {}, os.getpid())
writer.client.create_registered_model("a-lde")
writer.client.create_model_version("a-lde", "file:///nowhere", writer.run_id)
writer.model("[samples](ARTIFACTS/samples.png) of [a run](RUNS/1)", {"kid": "0.5"}, name="a-lde")
version = writer.client.get_model_version("a-lde", "1")
assert version.tags == {"kid": "0.5"}
runs = f"#/experiments/{writer.experiment()}/runs"
assert version.description == f"[samples]({runs}/{writer.run_id}/artifacts/samples.png) of [a run]({runs}/1)"
"""
SERIES = """
from PIL import Image
Image.new("L", (30, 20), 128).save("picture.png")
writer = _Writer()
writer.start("series", {}, {}, os.getpid())
for step in (40, 80):
    writer.image(os.path.abspath("picture.png"), "training", step)
names = sorted(item.path for item in writer.client.list_artifacts(writer.run_id, "images"))
assert [name.split("+timestamp+")[0] for name in names if name.endswith(".png")] == [
    f"images/training+step+{step}" for step in (40, 80)
]
"""
# What a stage sends before it is killed, or ends as it says.
SENT = """
import io
from stages.tracking import writer
messages = [{{"start": {{"name": {name!r}, "tags": {{}}, "params": {{}}, "pid": os.getpid()}}}}, *{then!r}]
sys.stdin, sys.stdout = io.StringIO("".join(json.dumps(message) + "\\n" for message in messages)), open(os.devnull, "w")
writer.main()
"""

Fork = Callable[[Path, str], int]


@pytest.fixture(scope="module")
def fork() -> Iterator[Fork]:
    """Runs code in a fork of a process that has imported MLflow, in a folder; gives its exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def run(folder: Path, code: str) -> int:
            stdin.write(json.dumps([str(folder), code]) + "\n")
            stdin.flush()
            return int(stdout.readline())

        yield run
        stdin.close()


@pytest.fixture(scope="module")
def database(fork: Fork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that was killed three times while its tables were made, found no space once, and was then opened by many."""
    folder = tmp_path_factory.mktemp("new")
    for statements in (1, 60, 250):
        assert fork(folder, KILLED.format(statements=statements)) == -9
        assert not (folder / "mlflow.db").exists()
    assert fork(folder, FULL_DISK) == 1
    assert not (folder / "mlflow.db").exists()
    assert fork(folder, AT_ONCE) == 0
    return folder / "mlflow.db"


def test_a_database_survives_kills_a_full_disk_and_many_at_once(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        names = sorted(name for (name,) in connection.execute("select name from runs where status = 'FINISHED'"))
        points = connection.execute("select count(*) from metrics where key = 'loss'").fetchone()[0]
        experiments = connection.execute("select count(*) from experiments where name <> 'Default'").fetchone()[0]
    assert names == [f"run {number}" for number in range(PROCESSES)]
    assert (points, experiments) == (20 * PROCESSES, 1)
    assert sorted(path.name for path in database.parent.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


UI = """
import runpy
os.environ.pop("MLFLOW_TRACKING_URI", None)
runpy.run_module("stages.tracking.database", run_name="__main__")
"""


def test_the_ui_finds_all_tables_and_no_others(fork: Fork, tmp_path: Path) -> None:
    assert fork(tmp_path, UI) == 0
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (0,)
        connection.execute("drop table metrics")
    assert fork(tmp_path, UI) == 1


NAMES = ("my%20clone", "feature%2Fx?", string.punctuation.replace("/", "") + " é\n日本")


@pytest.mark.parametrize("name", NAMES)
def test_an_address_names_the_same_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "mlflow.db"
    assert database_file(database_uri(path)) == path


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stays_in_a_folder_of_any_name(name: str, fork: Fork, database: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(database, folder)
    assert fork(folder, ONE_RUN) == 0
    with sqlite3.connect(folder / "mlflow.db") as connection:
        assert connection.execute("select status from runs where name = 'run'").fetchall() == [("FINISHED",)]
    assert len(list(folder.glob("mlartifacts/*/artifacts/notes/note.txt"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_view_of_rows_has_one_line_per_row_under_short_headings(fork: Fork, database: Path) -> None:
    assert fork(database.parent, ROWS) == 0
    with sqlite3.connect(database) as connection:
        runs = [run for (run,) in connection.execute("select run_uuid from tags where key = 'view' and value = 'rows'")]
        found = [
            (
                connection.execute("select key, value from metrics where run_uuid = ?", (run,)).fetchall(),
                dict(connection.execute("select key, value from tags where run_uuid = ?", (run,))),
            )
            for run in runs
        ]
        ((view,),) = connection.execute(
            "select value from experiment_tags where key = 'mlflow.sharedViewState.rows'"
        ).fetchall()
    known, *unknown = sorted(found, key=lambda pair: pair[1].get("row", ""))
    assert known[0] == [("parzen", 250.5)]
    assert (known[1]["latent_dim"], known[1]["stage"]) == ("8", "evaluate")
    assert [metrics for metrics, _ in unknown] == [[("kid", 0.5)]] * 2
    assert [(tags["row"], tags["stage"], tags["family"]) for _, tags in unknown] == [
        ("b-lde", "evaluate", "lde"),
        ("c-lde", "evaluate", "lde"),
    ]
    assert json.loads(view) == {
        "searchFilter": "tags.view = 'rows'",
        "selectedColumns": ["metrics.`parzen`", "metrics.`kid`", "tags.`latent_dim`", "tags.`family`"],
        "orderByKey": "tags.`row`",  # any order but that of time shows them side by side
        "orderByAsc": True,
    }


def test_a_registered_model_carries_scores_pictures_and_its_run(fork: Fork, database: Path) -> None:
    assert fork(database.parent, MODEL) == 0


def test_a_series_of_pictures_has_its_steps(fork: Fork, database: Path, tmp_path: Path) -> None:
    shutil.copy(database, tmp_path)
    assert fork(tmp_path, SERIES) == 0


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ([], "KILLED"),
        ([{"metrics": {"loss": 1.0}, "step": 0}], "KILLED"),
        ([{"finish": "FAILED"}], "FAILED"),
        ([{"finish": "FINISHED"}], "FINISHED"),
    ],
)
def test_a_run_ends_as_its_stage(then: list[dict[str, object]], status: str, fork: Fork, database: Path) -> None:
    name = f"ends {len(then)} {status}"
    assert fork(database.parent, SENT.format(name=name, then=then)) == 0
    with sqlite3.connect(database) as connection:
        assert connection.execute("select status from runs where name = ?", (name,)).fetchall() == [(status,)]


def test_one_stage_decides_for_a_minute_that_a_server_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    answer = {"run_id": None, "error": "", "late": True}
    started = []

    class Writer:
        """A process that answers as told."""

        def __init__(self, *_: object, **__: object) -> None:
            started.append(self)
            self.stdin, self.stdout = io.StringIO(), (tmp_path / "answer").open("w+")
            self.stdout.write(json.dumps(answer) + "\n")
            self.stdout.seek(0)

    monkeypatch.setattr(subprocess, "Popen", Writer)
    monkeypatch.setattr(client.select, "select", lambda *streams: streams)

    def stage() -> str:
        client.Tracker("fit a", {}, {}).finish()
        return capsys.readouterr().err

    assert stage() == ""
    assert stage() == "warning: tracking: http://127.0.0.1:9 didn't answer in time a moment ago; this stage isn't recorded\n"
    assert len(started) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:10")
    assert stage() == ""  # another server
    minute_ago = time.time() - 61
    os.utime(tmp_path / ".checkpoints/tracking-unanswered", (minute_ago, minute_ago))
    answer |= {"late": False, "error": "http://me:secret@host can't be reached"}
    complete = "the results are complete without it\n"
    assert stage() == f"warning: tracking: http://127.0.0.1:10: http://host can't be reached; {complete}"
    assert len(started) == 3
