"""The SQLite file of the runs: its address, its tables (created all or none), and the checks on it.

SQLAlchemy unquotes the path of an address and ends it at the first `?`. MLflow makes the path's folder without unquoting it. So
MLflow gets the file's name alone, relative to the working folder: see `open_database`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sqlite3
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.system.files import atomic_file
from stages.workspace import main_checkout

__all__ = ["check_database", "check_experiment", "database_file", "database_uri", "experiment_state", "open_database"]

LOCK_SECONDS = 20.0  # how long to wait while another process writes


def database_uri(path: Path) -> str:
    """The address of a SQLite file, as SQLAlchemy and `mlflow` on the command line read it."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def database_file(uri: str) -> Path | None:
    """The SQLite file that an address names, relative to the main checkout; None for a server, or a database in memory."""
    match = re.match(r"sqlite(?:\+pysqlite)?:///([^?]+)", uri)
    if match is None or match[1] == ":memory:" or match[1].startswith("file:"):
        return None
    return main_checkout() / urllib.parse.unquote(match[1])


def open_database(uri: str) -> str:
    """Creates a SQLite file's tables if there are none, checks them, and enters its folder. Does nothing for a server.

    Arguments:
        uri: Where runs are recorded.

    Returns:
        The address for MLflow; a SQLite file's is relative to the working folder.

    Raises:
        PipelineError: When runs can't be recorded there; the message says what to do.
    """
    named = database_file(uri)
    if named is None:
        return uri
    database = Path(os.path.realpath(named))
    try:
        str(database).encode()
    except UnicodeEncodeError:
        raise PipelineError(f"{str(database)!a}: MLflow needs folder names in UTF-8; rename the folder") from None
    database.parent.mkdir(parents=True, exist_ok=True)
    with _alone(database):
        if not database.exists() or database.stat().st_size == 0:
            _make_tables(database)
    check_database(database)
    os.chdir(database.parent)
    return database_uri(Path(database.name)) + "".join(uri.partition("?")[1:])


@contextlib.contextmanager
def _alone(database: Path) -> Iterator[None]:
    """Excludes other processes while the tables are created."""
    import fcntl

    with open(f"{database}.lock", "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_tables(database: Path) -> None:
    """Creates the tables in a temporary file and moves it into place: MLflow can't resume an interrupted creation."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "mlflow.db"
        # The default experiment needs a folder here: a quote in the working folder's name would break MLflow's SQL.
        store = SqlAlchemyStore(database_uri(made), (database.parent / "mlartifacts").as_uri())
        store.engine.dispose()
        with atomic_file(database) as temporary:
            shutil.copyfile(made, temporary)


def check_database(database: Path) -> int:
    """The number of runs in a SQLite file.

    Raises:
        PipelineError: When MLflow can't use the file; the message says what to do.
    """
    for path in (database, database.parent):
        if not os.access(path, os.W_OK):
            raise PipelineError(f"no permission to write {path}")
    with _connected(database) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        runs = int(connection.execute("SELECT count(*) FROM runs").fetchone()[0]) if "runs" in tables else 0
        known = "alembic_version" in tables
        versions = {name for (name,) in connection.execute("SELECT version_num FROM alembic_version")} if known else set()
    if problem := _schema_problem(tables, versions, runs, database):
        raise PipelineError(f"{database} {problem}")
    return runs


def _schema_problem(tables: set[str], versions: set[str], runs: int, database: Path) -> str:
    """Why MLflow can't use these tables, and what to do; empty if it can."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.db.base_sql_model import Base

    schemas = ScriptDirectory.from_config(utils._get_alembic_config(""))
    if versions == set(schemas.get_heads()) and tables >= set(Base.metadata.tables):
        return ""
    if versions - {schema.revision for schema in schemas.walk_revisions()}:
        return "was made by a newer MLflow: install that version, or name another file in MLFLOW_TRACKING_URI"
    if tables and "experiments" not in tables:
        return "holds tables of another program: name another file in MLFLOW_TRACKING_URI"
    if not runs:
        return (
            f"is unfinished or outdated and holds no runs: `rm {shlex.quote(str(database))}`; the next stage creates a new one"
        )
    upgrade = f"mlflow db upgrade {shlex.quote(database_uri(database))}"
    return f"was made by an older MLflow: copy the file, then run `{upgrade}`; if that was interrupted, restore the copy first"


@contextlib.contextmanager
def _connected(database: Path) -> Iterator[sqlite3.Connection]:
    try:  # not read-only: opening it rolls back an interrupted write
        connection = sqlite3.connect(f"file:{urllib.parse.quote(str(database))}?mode=rw", uri=True, timeout=LOCK_SECONDS)
        with contextlib.closing(connection):
            yield connection
    except sqlite3.Error as error:
        raise PipelineError(f"{database}: {error}") from None


def experiment_state(database: Path, name: str) -> tuple[str, str]:
    """Id and state of an experiment; empty if there is none."""
    with _connected(database) as connection:
        row = connection.execute("SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?", (name,)).fetchone()
    return (str(row[0]), str(row[1])) if row else ("", "")


def check_experiment(name: str, identity: str, state: str, uri: str) -> None:
    """Rejects an experiment that was deleted.

    Raises:
        PipelineError: When it was deleted; the message says how to restore it.
    """
    if state == "deleted":
        restore = f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow experiments restore --experiment-id {identity}"
        raise PipelineError(f"the experiment '{name}' was deleted: `{restore}`, or name another in MLFLOW_EXPERIMENT_NAME")


if __name__ == "__main__":  # `make ui`, before MLflow would create the tables in place
    try:
        open_database(os.environ.get("MLFLOW_TRACKING_URI") or database_uri(Path("mlflow.db")))
    except PipelineError as error:
        sys.exit(f"Error: {error}")
