"""Runs what is out of date, several rows side by side."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import click

from pipeline.errors import PipelineError
from pipeline.settings import Params, read_params
from stages.run import check_all, one_line_errors

__all__ = ["Task", "repro", "tasks"]


@dataclass(frozen=True)
class Task:
    """Stages of a row that run one after another.

    Attributes:
        stages: Their names in DVC, in order.
        needs: Names of the tasks that must be done before.
    """

    stages: tuple[str, ...]
    needs: frozenset[str]


def tasks(params: Params) -> dict[str, Task]:
    """The rows of all tables as tasks, each by its table and name; a task comes after those that it needs.

    No two tasks write the same file, and none checks a stage of another. DVC would refuse that while a reader of the stage's
    output is running.
    """
    tables = params.tables
    found: dict[str, Task] = {}

    def add(table: str, row: str, stages: tuple[str, ...], *needs: str) -> None:
        names = tuple(f"{stage}@{row}" for stage in stages)
        found[f"{table} {row}"] = Task(names, frozenset(need for need in needs if need in found))

    for row in tables["datasets"]:
        add("datasets", row, ("prepare",))
    for row in tables["evaluations"]:
        add("evaluations", row, ("features",), f"datasets {row}")
    for row, values in tables["autoencoders"].items():
        add("autoencoders", row, ("train", "extract"), f"datasets {values['dataset']}")
    for row, values in tables["densities"].items():
        needs = (f"autoencoders {values['codes']}", f"evaluations {values['dataset']}")
        add("densities", row, ("fit", "sample", "evaluate"), *needs)
    for row, values in tables["controls"].items():
        add("controls", row, ("control",), f"evaluations {values['dataset']}")
    for row, values in tables["detections"].items():
        add("detections", row, ("detect",), f"densities {values['density']}", f"datasets {values['outliers']}")
    return found


@click.command("repro")
@click.option("--jobs", default=1, show_default=True, help="Rows at the same time.")
def repro(jobs: int) -> None:
    """Run what is out of date, several rows side by side, then everything else and the report."""
    with one_line_errors("repro"):
        if not 1 <= jobs <= 1024:
            raise PipelineError(f"--jobs is {jobs}: expected a number from 1 to 1024")
        if jobs > 1:
            params = read_params()
            check_all(params)
            _run(tasks(params), jobs)
        code = subprocess.call([*DVC, "repro"])
        if code:
            raise PipelineError(f"`dvc repro` ended with status {code}: its messages are above")


DVC = (sys.executable, "-m", "dvc")


def _run(waiting: dict[str, Task], jobs: int) -> None:
    """Runs each task as soon as what it needs is done.

    Raises:
        PipelineError: When some failed; all others that don't need them are done.
    """
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    waiting, done, failed = dict(waiting), set[str](), set[str]()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running: dict[concurrent.futures.Future[int], str] = {}
        while waiting or running:
            for name in [name for name, task in waiting.items() if task.needs <= done][: jobs - len(running)]:
                running[pool.submit(_repro, waiting.pop(name).stages, environment)] = name
            if not running:  # the others need what failed
                break
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                name = running.pop(future)
                (failed if future.result() else done).add(name)
    if failed:
        left = f"; not run: {', '.join(waiting)}" if waiting else ""
        raise PipelineError(f"failed: {', '.join(sorted(failed))} (messages are above){left}")


def _repro(stages: tuple[str, ...], environment: Mapping[str, str]) -> int:
    # DVC frees its lock while a command runs, and the others wait for it meanwhile. It would end at once without this option.
    return subprocess.call([*DVC, "--wait-for-lock", "repro", "--single-item", *stages], env=environment)
