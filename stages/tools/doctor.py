"""What the machine has: versions, device, memory, disk, data, tracking server, DVC and git."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click

from pipeline.errors import PipelineError
from pipeline.settings import Params, read_params
from stages.run import one_line_errors
from stages.tools.check import missing_data, row_count
from stages.tools.preset import Row, load_preset, preset_names
from stages.tracking.client import tracking_uri

__all__ = ["Finding", "doctor"]

PACKAGES: tuple[str, ...] = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib", "safetensors")
PACKAGES += ("webdataset", "zuko", "click", "dvc", "mlflow", "psutil")
LOCK = Path("requirements.lock")
PROBE_SECONDS = 2.0
LOW_DISK_GIB, NO_DISK_GIB = 10.0, 0.5
LOW_MEMORY_GIB = 2.0


class Finding(NamedTuple):
    """One line of the doctor's.

    Attributes:
        what: What was looked at.
        word: `ok`; `warn` and `missing`, which stop nothing; `fault`, which does.
        detail: What was found, and what to do.
    """

    what: str
    word: str
    detail: str


@click.command("doctor")
def doctor() -> None:
    """Check versions, device, memory, disk space, data, tracking server, DVC and git.

    Exit status 1 when something is found that stops the pipeline, marked `fault`.
    """
    with one_line_errors("doctor"):
        faults = 0
        for title, findings in (
            ("Software", _software()),
            ("Machine", _machine()),
            ("Workspace", _workspace()),
            ("Data", _data()),
        ):
            click.echo(title)
            listed = list(findings)
            width = max(len(finding.what) for finding in listed)
            for finding in listed:
                click.echo(f"  {finding.what:{width}}  {finding.word:7}  {finding.detail}")
            faults += sum(finding.word == "fault" for finding in listed)
        if faults:
            raise PipelineError(f"{faults} fault{'s' * (faults > 1)}, marked above")


def _software() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", version)
    locked = _locked_versions()
    for package in PACKAGES:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding(package, "fault", "isn't installed; `make install` installs all that is needed")
            continue
        # 2.14.1+cpu is another build of 2.14.1.
        if locked.get(package, found) not in (found, found.partition("+")[0]):
            yield Finding(package, "warn", f"{found}; {LOCK} says {locked[package]}")
        else:
            yield Finding(package, "ok", found)


def _locked_versions() -> dict[str, str]:
    if not LOCK.exists():
        return {}
    lines = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in LOCK.read_text(encoding="utf-8").splitlines())
    return {line[1].lower(): line[2] for line in lines if line}


def _machine() -> Iterator[Finding]:
    yield _device()
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding("cores", "ok", f"{usable} of {cores}" + (f", OMP_NUM_THREADS={threads}" if threads else ""))
    processes = os.environ.get("PROCESSES", "1")
    if not processes.isdigit() or int(processes) < 1:
        yield Finding("processes", "fault", f"PROCESSES is '{processes}': expected a number from 1 on")
    elif int(processes) > 1:
        yield Finding("processes", "ok", f"{processes} for each heavy stage")
    try:
        import psutil

        memory = psutil.virtual_memory()
        free, total = memory.available / 2**30, memory.total / 2**30
        yield Finding("memory", "warn" if free < LOW_MEMORY_GIB else "ok", f"{free:.1f} GiB free of {total:.1f}")
    except ImportError:
        pass  # said above
    free = shutil.disk_usage(".").free / 2**30
    if free < LOW_DISK_GIB:
        word = "fault" if free < NO_DISK_GIB else "warn"
        yield Finding("disk", word, f"{free:.1f} GiB free; outputs are kept twice, in data/ and in DVC's cache")
    else:
        yield Finding("disk", "ok", f"{free:.1f} GiB free")


def _device() -> Finding:
    wanted = os.environ.get("DEVICE", "auto")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("device", "fault", f"torch can't be imported: {' '.join(str(error).split())}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if wanted.startswith("cuda") and not gpus:
        return Finding("device", "fault", f"DEVICE is '{wanted}', and torch {torch.__version__} sees no GPU")
    if gpus and wanted != "cpu":
        return Finding("device", "ok", f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}: {', '.join(dict.fromkeys(gpus))}")
    return Finding("device", "ok", f"CPU, {torch.get_num_threads()} threads" + (" (DEVICE=cpu)" if wanted == "cpu" else ""))


def _workspace() -> Iterator[Finding]:
    try:
        params = read_params()
        problems = list(params.problems())
        if problems:
            more = f" (and {len(problems) - 1} more: `python -m stages check`)" if problems[1:] else ""
            yield Finding("params.yaml", "fault", problems[0] + more)
        else:
            yield Finding("params.yaml", "ok", f"{row_count(params)} rows")
    except PipelineError as error:
        yield Finding("params.yaml", "fault", str(error))
    yield _git()
    yield _dvc()
    yield _tracking()


def _git() -> Finding:
    if shutil.which("git") is None:
        return Finding("git", "fault", "isn't on the PATH; DVC needs it for experiments and diffs")
    inside = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if inside.returncode:
        return Finding("git", "warn", "no commit here: `dvc exp`, `dvc params diff` and `dvc metrics diff` need one")
    return Finding("git", "ok", f"at {inside.stdout.strip()}")


def _dvc() -> Finding:
    if not Path(".dvc").is_dir():
        return Finding("dvc", "fault", "not initialised here: run the command from the project's folder, or `dvc init`")
    if shutil.which("dvc") is None:
        beside = Path(sys.executable).parent / "dvc"
        remedy = f"it is in {beside.parent}: activate that environment" if beside.exists() else "`make install` installs it"
        return Finding("dvc", "warn", f"isn't on the PATH; {remedy}")
    return Finding("dvc", "ok", "initialised, on the PATH")


def _tracking() -> Finding:
    """A quick look at the tracking server. A stage does its work without one, so nothing here is a fault."""
    if os.environ.get("TRACKING", "on") == "off":
        return Finding("tracking", "ok", "off (TRACKING=off)")
    uri = tracking_uri()
    parts = urllib.parse.urlsplit(uri)
    shown = uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "", 1)  # without a password
    if parts.scheme == "sqlite":
        return _sqlite(Path(uri.removeprefix("sqlite:///")), shown)
    if parts.hostname is None:
        return Finding("tracking", "warn", f"{shown}: can't be probed from here")
    try:
        port = parts.port or {"https": 443, "postgresql": 5432, "mysql": 3306}.get(parts.scheme.partition("+")[0], 80)
        with socket.create_connection((parts.hostname, port), timeout=PROBE_SECONDS):
            return Finding("tracking", "ok", f"{shown} answers")
    except (OSError, ValueError) as error:
        return Finding("tracking", "warn", f"{shown} can't be reached ({error}); stages go on without tracking")


def _sqlite(path: Path, shown: str) -> Finding:
    import sqlite3

    if not path.exists():
        if path.parent.is_dir() and os.access(path.parent, os.W_OK):
            return Finding("tracking", "ok", f"{shown}, to be made by the first stage")
        return Finding("tracking", "warn", f"{shown}: no such folder, or no permission; stages go on without tracking")
    try:
        connection = sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode=ro", uri=True, timeout=PROBE_SECONDS)
        try:
            runs = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Finding("tracking", "warn", f"{shown}: {error}; stages go on without tracking")
    return Finding("tracking", "ok", f"{shown}, {runs} runs")


def _data() -> Iterator[Finding]:
    """The raw files of each row of `datasets`, and of each preset."""
    try:
        params = read_params()
    except PipelineError:
        params = Params({})  # said above
    missing = dict(line.removeprefix("datasets.").split(".root: ", 1) for line in missing_data(params))
    for name in params.rows("datasets"):
        root = params.tables["datasets"][name].get("root")
        yield Finding(name, *(("fault", missing[name]) if name in missing else ("ok", str(root))))
    for name in preset_names():
        try:
            rows = [row for row in load_preset(name).rows if row.table == "datasets"]
            lacking = dict(line.removeprefix("datasets.").split(".root: ", 1) for line in missing_data(_datasets(rows)))
        except PipelineError as error:
            yield Finding(f"preset {name}", "warn", str(error))
            continue
        roots = ", ".join(dict.fromkeys(str(row.values.get("root")) for row in rows))
        yield Finding(f"preset {name}", *(("missing", "; ".join(lacking.values())) if lacking else ("ok", roots)))
    if not params.rows("datasets") and not preset_names():
        yield Finding("rows", "missing", "no data set in params.yaml, and no presets")


def _datasets(rows: list[Row]) -> Params:
    return Params({"datasets": {row.name: row.plain() for row in rows}})
