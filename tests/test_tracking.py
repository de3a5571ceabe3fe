"""Runs that write to one MLflow database at the same time."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 4
# MLflow is imported once; the processes are forked from there, so that they open the database within milliseconds.
AT_ONCE = f"""
import os, sys
import mlflow, mlflow.store.tracking.sqlalchemy_store
from stages.tracking.writer import _Writer
ready, go = os.pipe()
for number in range({PROCESSES}):
    if os.fork() == 0:
        os.close(go)
        os.read(ready, 1)
        try:
            writer = _Writer()
            writer.start(f"run {{number}}", {{}}, {{"number": number}}, os.getpid())
            writer.metrics([("loss", 1.0, step, 0) for step in range(20)])
            writer.finish("FINISHED")
        except BaseException as error:
            print(f"{{type(error).__name__}}: {{error}}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
os.close(go)
sys.exit(any([os.wait()[1] for _ in range({PROCESSES})]))
"""


def test_a_new_database_opened_by_many_at_once(tmp_path: Path) -> None:
    database = tmp_path / "new" / "mlflow.db"
    database.parent.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{database}"}
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with sqlite3.connect(database) as connection:
        names = sorted(name for (name,) in connection.execute("select name from runs where status = 'FINISHED'"))
        points = connection.execute("select count(*) from metrics where key = 'loss'").fetchone()[0]
        experiments = connection.execute("select count(*) from experiments where name <> 'Default'").fetchone()[0]
    assert names == [f"run {number}" for number in range(PROCESSES)]
    assert (points, experiments) == (20 * PROCESSES, 1)
