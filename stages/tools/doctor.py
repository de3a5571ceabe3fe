"""A check of the machine: versions, device, memory, disk, data, tracking server, DVC and git."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import shlex
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
from stages.reporting.states import recorded_outs
from stages.run import one_line_errors
from stages.tools.check import missing_data, row_count
from stages.tools.preset import preset_datasets, preset_names
from stages.tracking.client import experiment_name, prepare_environment, shown_uri, tracking_uri
from stages.tracking.database import check_database, check_experiment, database_file, experiment_state

__all__ = ["Finding", "doctor"]

PACKAGES: tuple[str, ...] = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib", "safetensors")
PACKAGES += ("webdataset", "zuko", "click", "dvc", "mlflow", "psutil")
LOCK = Path("requirements.lock")
PROBE_SECONDS = 2.0
LOW_DISK_GIB, NO_DISK_GIB = 10.0, 0.5
LOW_MEMORY_GIB = 2.0


class Finding(NamedTuple):
    """One line of the doctor's output.

    Attributes:
        what: What was checked.
        word: `ok`; `warn` or `missing`, with which the pipeline still runs; `fault`, with which it doesn't.
        detail: The state, and what to do.
    """

    what: str
    word: str
    detail: str


@click.command("doctor")
@click.option("--cache", is_flag=True, help="Also compare the files of DVC's cache with their digests.")
def doctor(cache: bool) -> None:
    """Check versions, device, memory, disk space, data, tracking server, DVC and git.

    Exit status 1 if something stops the pipeline; it is marked `fault`.
    """
    with one_line_errors("doctor"):
        faults = 0
        checks = [("Software", _software), ("Machine", _machine), ("Workspace", _workspace), ("Data", _data)]
        if cache:
            checks.append(("Cache", _cache))
        for title, findings in checks:
            click.echo(title)
            listed = list(findings())
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
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding(package, "fault", "isn't installed; `make install` installs all packages")
            continue
        # 2.14.1+cpu is another build of 2.14.1.
        if locked.get(package, version) not in (version, version.partition("+")[0]):
            yield Finding(package, "warn", f"{version}; {LOCK} says {locked[package]}")
        else:
            yield Finding(package, "ok", version)


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
    count = f"{usable} of {cores}" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    load = os.getloadavg()[0]
    if load > usable:
        yield Finding("cores", "warn", f"{count}; other programs keep them busy (load {load:.1f}): stages take longer")
    else:
        yield Finding("cores", "ok", count)
    if _asks_for_bfloat16():
        yield _bfloat16()
    processes = os.environ.get("PROCESSES", "1")
    if not processes.isdigit() or int(processes) < 1:
        yield Finding("processes", "fault", f"PROCESSES is '{processes}': expected a whole number, at least 1")
    elif int(processes) > 1:
        yield Finding("processes", "ok", f"{processes} for each heavy stage")
    try:
        import psutil

        memory = psutil.virtual_memory()
        free, total = memory.available / 2**30, memory.total / 2**30
        yield Finding("memory", "warn" if free < LOW_MEMORY_GIB else "ok", f"{free:.1f} GiB free of {total:.1f}")
    except ImportError:
        pass  # reported above
    free = shutil.disk_usage(".").free / 2**30
    if free < LOW_DISK_GIB:
        word = "fault" if free < NO_DISK_GIB else "warn"
        yield Finding("disk", word, f"{free:.1f} GiB free; outputs are kept twice, in data/ and in DVC's cache")
    else:
        yield Finding("disk", "ok", f"{free:.1f} GiB free")


def _device() -> Finding:
    device = os.environ.get("DEVICE", "auto")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("device", "fault", f"torch can't be imported: {' '.join(str(error).split())}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if device.startswith("cuda") and not gpus:
        return Finding("device", "fault", f"DEVICE is '{device}', and torch {torch.__version__} sees no GPU")
    if gpus and device != "cpu":
        return Finding("device", "ok", f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}: {', '.join(dict.fromkeys(gpus))}")
    if device != "cpu" and Path("/dev/nvidia0").exists():
        return Finding(
            "device", "warn", f"CPU: there is an NVIDIA GPU, but torch {torch.__version__} sees none: is its driver too old?"
        )
    return Finding("device", "ok", f"CPU, {torch.get_num_threads()} threads" + (" (DEVICE=cpu)" if device == "cpu" else ""))


def _asks_for_bfloat16() -> bool:
    try:
        tables = read_params().tables
        rows = [row for table in ("autoencoders", "densities") for row in tables.get(table, {}).values()]
        return any("bfloat16" in (row.get("precision"), row.get("scoring_precision")) for row in rows)
    except (PipelineError, AttributeError):
        return False  # reported below


def _bfloat16() -> Finding:
    import torch

    from pipeline.system.devices import has_bfloat16

    device = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu" else "cpu")
    if has_bfloat16(device):
        return Finding("bfloat16", "ok", f"computed by the {device.type}")
    consequence = "rows with precision: bfloat16 train slowly, and scoring uses float32"
    return Finding("bfloat16", "warn", f"the {device.type} only imitates it: {consequence}")


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
    yield from _user()
    yield from _git()
    yield _dvc()
    yield _tracking()


def _user() -> Iterator[Finding]:
    """DVC fails in `getpwuid` if the user has no name, and its libraries if there is no home folder."""
    try:
        getpass.getuser()
        lacking = "home folder" if os.path.expanduser("~") == "~" else ""
    except (KeyError, OSError):
        lacking = "name"
    if lacking:
        remedy = "`export LOGNAME=me HOME=/some/folder` before running anything"
        yield Finding("user", "fault", f"user id {os.getuid()} has no {lacking}, and DVC fails without one: {remedy}")


def _git() -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("git", "fault", "isn't on the PATH; DVC needs it for experiments and diffs")
        return
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if "dubious ownership" in head.stderr:
        remedy = f"`git config --global --add safe.directory {shlex.quote(str(Path.cwd()))}`"
        yield Finding("git", "warn", f"this clone belongs to another user, and runs record no commit: {remedy}")
    elif "not a git repository" in head.stderr and not _without_git():
        without = "`dvc config --local core.no_scm true` (which disables `dvc exp`, `dvc params diff` and `dvc metrics diff`)"
        remedy = f"`git init`, and commit all files; or {without}"
        yield Finding("git", "fault", f"no git repository here, and `dvc repro` refuses to run without one: {remedy}")
    elif head.returncode:
        yield Finding("git", "warn", "no commit here: `dvc exp`, `dvc params diff` and `dvc metrics diff` need one")
    else:
        yield Finding("git", "ok", f"at {head.stdout.strip()}")
        keys = [
            key
            for key in ("user.name", "user.email")
            if subprocess.run(["git", "config", key], capture_output=True, check=False).returncode
        ]
        if keys:
            remedy = " and ".join(f"`git config {key} ..`" for key in keys)
            yield Finding("git author", "warn", f"unknown, and `dvc exp run` commits: {remedy}")


def _without_git() -> bool:
    """Whether DVC is configured to run without git."""
    files = [path for path in (Path(".dvc/config"), Path(".dvc/config.local")) if path.is_file()]
    return any(re.search(r"^\s*no_scm\s*=\s*true\s*$", file.read_text(encoding="utf-8"), re.M | re.I) for file in files)


def _dvc() -> Finding:
    if not Path(".dvc").is_dir():
        return Finding("dvc", "fault", "not initialised here: run the command from the project's folder, or `dvc init`")
    if shutil.which("dvc") is None:
        script = Path(sys.executable).parent / "dvc"
        remedy = f"it is in {script.parent}: activate that environment" if script.exists() else "`make install` installs it"
        return Finding("dvc", "warn", f"isn't on the PATH; {remedy}")
    return Finding("dvc", "ok", "initialised, on the PATH")


def _tracking() -> Finding:
    """A quick check of the tracking server. Stages also work without one, so nothing here is a fault."""
    if os.environ.get("TRACKING", "on") == "off":
        return Finding("tracking", "ok", "off (TRACKING=off)")
    uri, shown = tracking_uri(), shown_uri()
    database = database_file(uri)
    try:
        return _sqlite(database, shown) if database is not None else _server(uri, shown)
    except (PipelineError, ImportError, OSError, ValueError) as error:
        return Finding("tracking", "warn", f"{shown}: {' '.join(str(error).split())}; stages run without tracking")


def _sqlite(database: Path, shown: str) -> Finding:
    if database.exists() and database.stat().st_size:
        runs = check_database(database)
        check_experiment(experiment_name(), *experiment_state(database, experiment_name()), shown)
        return Finding("tracking", "ok", f"{shown}, {runs} runs")
    if database.parent.is_dir() and os.access(database.parent, os.W_OK):
        return Finding("tracking", "ok", f"{shown}; the first stage creates it")
    raise PipelineError("no such folder, or no permission")


def _server(uri: str, shown: str) -> Finding:
    parts = urllib.parse.urlsplit(uri)
    if parts.hostname is None:
        return Finding("tracking", "warn", f"{shown}: can't be probed from here")
    port = parts.port or {"https": 443, "postgresql": 5432, "mysql": 3306}.get(parts.scheme.partition("+")[0], 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise PipelineError(f"can't be reached ({error})") from None
    if parts.scheme in ("http", "https"):
        _ask(uri, shown)
    return Finding("tracking", "ok", f"{shown} answers")


def _ask(uri: str, shown: str) -> None:
    """Asks for the experiment, as a stage does."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{PROBE_SECONDS:.0f}")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    prepare_environment()
    try:
        experiment = MlflowClient(uri).get_experiment_by_name(experiment_name())
    except MlflowException as error:
        raise PipelineError(f"doesn't answer like MLflow ({str(error).replace(uri, shown)[:200]})") from None
    if experiment is not None:
        check_experiment(experiment_name(), str(experiment.experiment_id), experiment.lifecycle_stage, shown)


def _data() -> Iterator[Finding]:
    """The raw files of each row of `datasets`, and of each preset."""
    try:
        params = read_params()
    except PipelineError:
        params = Params({})  # reported above
    missing = dict(line.removeprefix("datasets.").split(".root: ", 1) for line in missing_data(params))
    for name in params.rows("datasets"):
        root = params.tables["datasets"][name].get("root")
        yield Finding(name, *(("fault", missing[name]) if name in missing else ("ok", str(root))))
    for name in preset_names():
        try:
            preset = preset_datasets(name)
            lacking = dict(line.removeprefix("datasets.").split(".root: ", 1) for line in missing_data(preset))
        except PipelineError as error:
            yield Finding(f"preset {name}", "warn", str(error))
            continue
        roots = ", ".join(dict.fromkeys(str(row.get("root")) for row in preset.tables["datasets"].values()))
        yield Finding(f"preset {name}", *(("missing", "; ".join(lacking.values())) if lacking else ("ok", roots)))
    if not params.rows("datasets") and not preset_names():
        yield Finding("rows", "missing", "no data set in params.yaml, and no presets")


def _cache() -> Iterator[Finding]:
    """Files of DVC's cache whose digest isn't their name. DVC would check them out as they are."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        yield Finding("dvc cache", "warn", f"`dvc cache dir` fails: {' '.join(done.stderr.split())[:200]}")
        return
    folder = Path(done.stdout.strip()) / "files/md5"
    whole: dict[Path, bool] = {}
    for stage, digest in recorded_outs():
        for file in _files_of(folder, digest):
            if file not in whole:
                whole[file] = _is_whole(file)
                if not whole[file]:
                    remedy = f"rm -f {shlex.quote(str(file))} && dvc repro --force --single-item {stage}"
                    yield Finding(stage, "fault", f"its output is damaged in the cache: `{remedy}`")
    yield Finding("dvc cache", "ok", f"{sum(whole.values())} of {len(whole)} files are whole")


def _files_of(folder: Path, digest: str) -> Iterator[Path]:
    """The cached files that an output consists of, if they exist."""
    path = folder / digest[:2] / digest[2:]
    if not path.is_file():
        return
    yield path
    if digest.endswith(".dir") and _is_whole(path):
        for entry in json.loads(path.read_bytes()):
            file = folder / entry["md5"][:2] / entry["md5"][2:]
            if file.is_file():
                yield file


def _is_whole(file: Path) -> bool:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == (
            file.parent.name + file.name.removesuffix(".dir")
        )
