"""What all stages share: settings are checked first, outputs written whole, scores tracked, errors printed in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.errors import PipelineError, printable
from pipeline.settings import Params, changed_defaults, flatten, read_params
from pipeline.system.files import sha256_file, write_json, write_text
from stages import workspace
from stages.launching.common.choice import launched
from stages.launching.common.processes import PEER_LOST
from stages.tracking.client import Tracker

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Run", "check_all", "one_line_errors", "shown_scores", "stage"]

Settings = TypeVar("Settings")

# Folder below data/ -> the stage that writes it.
WRITER_OF = {"shards": "prepare", "features": "features", "autoencoders": "train", "codes": "extract", "densities": "fit"}
WRITER_OF["samples"] = "sample"
# In the line that ends a stage.
SHOWN_SCORES = ("parzen_test_log_likelihood", "test_log_likelihood", "gap_to_truth", "kid", "recall", "test_mse")
OUT_OF_MEMORY = "out of memory: lower batch_size, shuffle_examples or shard_examples"
FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "a file is too large"}


class Run:
    """One run of one stage on one row.

    Arguments:
        stage: Name of the stage.
        row: Name of the row.
        params: All tables.
        settings: The row's settings, for the record.
        flags: Options of the command that were given.
        summary: One sentence on what the stage does.
    """

    def __init__(
        self, stage: str, row: str, params: Params, settings: object, flags: set[str] | None = None, summary: str = ""
    ) -> None:
        self.flags, self.summary = flags or set(), summary
        self.stage, self.row, self.params, self.settings = stage, row, params, settings
        self.first = os.environ.get("RANK", "0") == "0"
        if self.first and os.environ.get("DVC_STAGE") and (place := _place(params, stage, row)):
            print(f"{stage} {row}: {place}", flush=True)
        self.scores: dict[str, float] = {}
        self._details: dict[str, Any] = {}
        self._outputs: list[Path] = []  # small files that `report` reads, with their digests
        self._when_finished: list[Callable[[], None]] = []
        self._pictures: tempfile.TemporaryDirectory[str] | None = None  # until they are tracked
        self._started = time.monotonic()
        tags = {
            "stage": stage,
            "row": row,
            "dvc.stage": os.environ.get("DVC_STAGE", ""),
            "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        }
        self._details |= workspace.git_state()  # taken now: the code may change before the run ends
        # Keys don't contain the row's name. That lets the UI compare two rows of a table.
        flat = flatten(asdict(settings)) if settings is not None else {}  # type: ignore[call-overload]
        self.tracker = Tracker(f"{stage} {row}", {k: v for k, v in tags.items() if v}, flat, off=not self.first)

    def metrics(self, values: Mapping[str, float | int | str | None]) -> None:
        """Adds scores; they are written to `reports/metrics` at the end. Times and rates belong to `details`.

        A value that isn't finite, such as the standard error of one value, becomes null.
        """
        self.scores |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}  # type: ignore[misc]

    def details(self, **values: object) -> None:
        """Adds values that differ between runs, such as seconds; they are written to `reports/runs` at the end."""
        self._details |= values

    def curve(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Writes a curve as tab-separated values and tracks it. Each row has its "step"; no rows give a header alone."""
        if not self.first:
            return
        columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
        lines = ["\t".join(columns)] + ["\t".join(_cell(row.get(c)) for c in columns) for row in rows]
        path = workspace.curve_file(self.stage, self.row)
        write_text(path, "\n".join(lines) + "\n")
        self._outputs.append(path)
        self.tracker.curve(rows)

    def tracked_curve(self, name: str, steps: Iterable[int], values: Iterable[float]) -> None:
        """Tracks numbers as a curve over whole steps; the numbers themselves belong to `arrays`."""
        self.tracker.curve({"step": step, name: float(value)} for step, value in zip(steps, values, strict=True))

    def arrays(self, name: str, values: Mapping[str, NDArray[Any]], names: Sequence[str] = ()) -> None:
        """Writes small arrays to `reports/arrays`. Pictures are drawn from them, here for MLflow and in `report` for the page.

        Arguments:
            name: Name of the file.
            values: The arrays by name.
            names: Names of the entries along the first axis of one of the arrays.
        """
        from stages.arrays import save_arrays

        if self.first:
            self._outputs.append(save_arrays(self.stage, self.row, name, values, names))

    def picture(self, key: str, step: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Tracks a picture of rows of images in 0..1, each with shape (n, C, H, W), one of a series over steps."""
        from pipeline.figures import image_rows, save_figure

        self._pictures = self._pictures or tempfile.TemporaryDirectory()
        path = Path(self._pictures.name) / f"{key}-{step}.png"
        save_figure(image_rows(rows), path)
        self.tracker.image(path, key, step)

    def read(self, name: str, digest: str, path: Path, context: str) -> None:
        """Records that the run reads a data set, for the lineage."""
        self._details.setdefault("inputs", {})[str(path)] = digest
        self.tracker.dataset(name, digest, str(path), context)

    def when_finished(self, action: Callable[[], None]) -> None:
        """Registers a callback to run once everything is written, such as the removal of a checkpoint."""
        self._when_finished.append(action)

    def finish(self) -> None:
        """Writes scores and details, and closes the tracked run."""
        if not self.first:
            return
        path = workspace.metrics_file(self.stage, self.row)
        write_json(path, self.scores)
        self._outputs.append(path)
        self.tracker.metrics({k: v for k, v in self.scores.items() if isinstance(v, (int, float))})
        self.tracker.artifact(path, "metrics")
        self._details |= {
            # Those of the processes that a resumed run had before count too.
            "seconds": round(time.monotonic() - self._started + self._details.pop("seconds_before", 0.0), 3),
            "peak_memory_mib": round(_peak_memory_mib(), 1),
        }
        self._details |= {"cores": _cores(), "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if gpu := _gpu():
            self._details["gpu"] = gpu
        # Tags, not metrics: they would be the first plots of the run's page.
        numbers = {key: value for key, value in self._details.items() if isinstance(value, (int, float))}
        self.tracker.set_tags({f"run.{key}": f"{value:.6g}" for key, value in numbers.items()})
        run_id = self._finish_tracking() if self.tracker.on else None
        self._discard_pictures()
        digests = {path.as_posix(): sha256_file(path) for path in self._outputs}
        write_json(workspace.run_file(self.stage, self.row), {"run_id": run_id, "outputs": digests, **self._details})
        for action in self._when_finished:
            action()
        texts = [f"{self._details['seconds']:.1f} s", ", ".join(shown_scores(self.scores).values())]
        print(f"{self.stage} {self.row}: " + ": ".join(filter(None, texts)), flush=True)

    def _finish_tracking(self) -> str | None:
        """Draws pictures for the run's page in MLflow, describes the run, and returns its id."""
        from stages.reporting.pictures import draw_row

        with tempfile.TemporaryDirectory() as folder:
            pictures = draw_row(self.params, self.stage, self.row, Path(folder))
            for path in pictures:
                self.tracker.artifact(path, "figures")
            self.tracker.describe(self._description([path.stem for path in pictures]))
            return self.tracker.finish()  # waits until everything is logged

    def _description(self, pictures: Sequence[str]) -> str:
        """The description on the run's page in MLflow, in Markdown."""
        links = ", ".join(f"[{name}](ARTIFACTS/figures/{name}.png)" for name in pictures)
        text = f"{self.summary}\n\n    python -m stages {self.stage} {self.row}\n\n"
        return (
            text + (f"Pictures: {links}. " if links else "") + "The parent run holds the report, with the scores of all rows."
        )

    def fail(self) -> None:
        """Closes the tracked run as failed."""
        self.tracker.finish("FAILED")
        self._discard_pictures()

    def _discard_pictures(self) -> None:
        if self._pictures is not None:
            self._pictures.cleanup()


def _place(params: Params, stage: str, row: str) -> str:
    """Which of all stages this one is, by dvc.lock; empty for a stage that is done and runs again, as after an edit of code."""
    from stages.reporting.states import DONE, states

    state_of = states(params)
    if state_of.get((stage, row)) == DONE:
        return ""
    return f"stage {sum(state == DONE for state in state_of.values()) + 1} of {len(state_of)}"


def _cell(value: float | int | None) -> str:
    return "" if value is None else repr(value)


def shown_scores(scores: Mapping[str, Any]) -> dict[str, str]:
    """The scores that the scoreboard is about: key -> title, score and its error."""
    from stages.reporting.metrics import METRICS, NETWORKS
    from stages.reporting.scoreboard import plus_minus

    shown = {}
    for metric in map(METRICS.__getitem__, SHOWN_SCORES):
        for network in NETWORKS if metric.in_features else ("",):
            key, error_key = (key.replace("NETWORK", network) for key in (metric.key, metric.error))
            if (value := scores.get(key)) is not None:
                shown[key] = f"{metric.title} {plus_minus(value, scores.get(error_key))}"
    return shown


def _gpu() -> str:
    """Name of the GPU in use; empty if none is."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_initialized() else ""


def _cores() -> int:
    """Number of cores that this process may use; a job scheduler or taskset may limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _peak_memory_mib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _with_command(message: str) -> str:
    """Replaces "run .. again" in a message by the command that rewrites the file, even if DVC's cache holds the damaged one.

    Example:
        >>> _with_command("data/codes/grid/index.json isn't an index; run extract again")
        "data/codes/grid/index.json isn't an index; run `dvc repro -f -s extract@grid`"
    """
    place = re.search(rf"\bdata/({'|'.join(WRITER_OF)})/([a-z0-9-]+)", message)
    if place is None:
        return message
    return re.sub(r"run (the stage that writes it|[a-z]+) again", workspace.rerun(WRITER_OF[place[1]], place[2]), message)


@contextlib.contextmanager
def one_line_errors(name: str) -> Any:
    """Turns errors that the user can fix into one line and exit status 1."""
    try:
        yield
    except PipelineError as error:
        message = _with_command(str(error))
    except OSError as error:
        named = f" ({error.filename})" if error.filename else ""
        if error.errno in FULL:
            message = f"{FULL[error.errno]}{named}: free some and run the command again; existing files are intact"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"no permission{named}: {error.strerror}"
        else:
            message = f"the system says: {error.strerror or error}{named}"
    except KeyboardInterrupt:
        message = "interrupted; no file was left half-written: run the same command again"
    except MemoryError:
        message = OUT_OF_MEMORY
    except RuntimeError as error:
        if re.search(r"gloo|NCCL", str(error)) and os.environ.get("WORLD_SIZE", "1") != "1":
            sys.exit(PEER_LOST)  # another process has ended and prints why
        if not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        message = OUT_OF_MEMORY
    else:
        return
    click.echo(printable(f"error: {name}: {message}"), err=True)
    sys.exit(1)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treats SIGTERM like Ctrl-C: unfinished output is deleted."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stage(
    *,
    reads: Callable[[Any, str], Iterable[Path]],
    writes: Callable[[Any, str], Iterable[Path]],
    settings: Callable[[Params, str], Settings],
    ranks: bool = False,
    flags: Mapping[str, str] | None = None,
) -> Callable[[Callable[[Run, Settings], None]], click.Command]:
    """Makes a stage's function a command of `python -m stages`.

    Arguments:
        reads: Files and folders that the stage reads, from settings and row.
        writes: What it writes besides metrics and the run's file.
        settings: The typed settings of a row.
        ranks: Whether several processes may share the work (PROCESSES, torchrun).
        flags: Further options of the command: name -> help. `Run.flags` holds the ones that were passed.
    """

    def decorate(function: Callable[[Run, Settings], None]) -> click.Command:
        name = function.__name__

        @click.command(name, help=function.__doc__)
        @click.argument("row", metavar="NAME", shell_complete=_complete_rows(name))
        @click.option("--params", "params_file", default="params.yaml", show_default=True, help="Settings file.")
        @click.option(
            "--dry-run",
            is_flag=True,
            help="Print all settings, marking those that aren't defaults, and all files.",
        )
        def command(row: str, params_file: str, dry_run: bool, **options: bool) -> None:
            with one_line_errors(f"{name} {row}"), _terminable():
                params = read_params(params_file)
                if os.environ.get("DVC_STAGE"):
                    check_all(params)
                chosen = settings(params, row)
                inputs, outputs = list(reads(chosen, row)), list(writes(chosen, row))
                if dry_run:
                    _print_plan(name, row, chosen, inputs, outputs)
                    return
                for path in inputs:
                    if not path.exists():
                        raise PipelineError(f"{path} is missing; run the stage that writes it, or `dvc repro`")
                if ranks and launched():
                    return
                summary = (function.__doc__ or "").partition("\n")[0]
                run = Run(name, row, params, chosen, {flag for flag, on in options.items() if on}, summary)
                try:
                    function(run, chosen)
                    run.finish()
                except BaseException:
                    run.fail()
                    raise

        for flag, text in (flags or {}).items():
            click.option(f"--{flag}", is_flag=True, help=text)(command)
        return command

    return decorate


def check_all(params: Params) -> None:
    """Rejects a mistake in any row: `dvc repro` stops at its first stage, not after the trainings before that row's stages."""
    problems = list(params.problems())
    if problems:
        more = f" (and {len(problems) - 1} more, see `python -m stages check`)" if problems[1:] else ""
        raise PipelineError(f"{problems[0]}{more}")


def _print_plan(name: str, row: str, settings: Any, inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    click.echo(f"{name} {row}")
    defaults = changed_defaults(settings)
    for key, value in flatten(asdict(settings)).items():
        click.echo(f"  {key}: {json.dumps(value)}" + (f"  # default {json.dumps(defaults[key])}" if key in defaults else ""))
    for path in inputs:
        click.echo(f"  reads {path}" + ("" if path.exists() else " (missing)"))
    for path in [*outputs, workspace.metrics_file(name, row), workspace.run_file(name, row)]:
        click.echo(f"  writes {path}")


def _complete_rows(name: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def complete(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
        with contextlib.suppress(PipelineError):
            return [row for row in read_params().rows(workspace.TABLE_OF_STAGE[name]) if row.startswith(start)]
        return []

    return complete
