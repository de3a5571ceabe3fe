"""The SQLite file that runs are recorded in: its address, its tables made whole or not at all, and what may be wrong with it.

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
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.system.files import atomic_file
from stages.workspace import main_checkout

__all__ = ["check_database", "check_experiment", "database_file", "database_uri", "experiment_state", "open_database"]

LOCK_SECONDS = 20.0  # how long another process may be writing


def database_uri(path: Path) -> str:
    """The address of a SQLite file, as SQLAlchemy and `mlflow` on the command line read it."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def database_file(uri: str) -> Path | None:
    """The SQLite file that an address names, relative to the main checkout; None for a server, or a database in memory."""
    found = re.match(r"sqlite(?:\+pysqlite)?:///([^?]+)", uri)
    if found is None or found[1] == ":memory:" or found[1].startswith("file:"):
        return None
    return main_checkout() / urllib.parse.unquote(found[1])


def open_database(uri: str) -> str:
    """Makes a SQLite file's tables where there are none, checks them, and enters its folder. Leaves a server alone.

    Arguments:
        uri: Where runs are recorded.

    Returns:
        The address for MLflow; of a SQLite file relative to the working folder.

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
    """Keeps other processes away while the tables are made."""
    import fcntl

    with open(f"{database}.lock", "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_tables(database: Path) -> None:
    """Makes the tables in a file elsewhere and puts it in place: MLflow can't go on where it was killed while it made them."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "mlflow.db"
        # Its own experiment gets a folder too, in a statement that a quote in the working folder's name would end.
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
    """What keeps MLflow from using these tables, and what to do; empty when nothing does."""
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
        return f"is unfinished or outdated and holds no runs: `rm {shlex.quote(str(database))}`; the next stage makes a new one"
    upgrade = f"mlflow db upgrade {shlex.quote(database_uri(database))}"
    return f"was made by an older MLflow: copy the file, then run `{upgrade}`; where that was stopped, put the copy back first"


@contextlib.contextmanager
def _connected(database: Path) -> Iterator[sqlite3.Connection]:
    try:  # not read-only: what a killed process was writing is rolled back here
        connection = sqlite3.connect(f"file:{urllib.parse.quote(str(database))}?mode=rw", uri=True, timeout=LOCK_SECONDS)
        with contextlib.closing(connection):
            yield connection
    except sqlite3.Error as error:
        raise PipelineError(f"{database}: {error}") from None


def experiment_state(database: Path, name: str) -> tuple[str, str]:
    """Id and state of an experiment; empty where there is none."""
    with _connected(database) as connection:
        found = connection.execute("SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?", (name,)).fetchone()
    return (str(found[0]), str(found[1])) if found else ("", "")


def check_experiment(name: str, identity: str, state: str, uri: str) -> None:
    """Refuses an experiment that was deleted.

    Raises:
        PipelineError: When it was; the message says how to restore it.
    """
    if state == "deleted":
        restore = f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow experiments restore --experiment-id {identity}"
        raise PipelineError(f"the experiment '{name}' was deleted: `{restore}`, or name another in MLFLOW_EXPERIMENT_NAME")
