"""The stages of the pipeline with their state, and their places in a drawing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeline.settings import Params
from stages.reporting.scoreboard import duration, read_run, stages_and_rows

__all__ = ["Graph", "Node", "StageState", "repro_started", "stage_states"]


def repro_started() -> float | None:
    """When the `dvc` that runs this process started, in seconds since the epoch; None if no `dvc` does."""
    if not os.environ.get("DVC_STAGE"):
        return None
    import psutil

    try:
        for process in psutil.Process().parents():
            if any(Path(word).name in ("dvc", "dvc.exe") for word in process.cmdline()[:3]):
                return float(process.create_time())
    except psutil.Error:
        pass
    return None


@dataclass(frozen=True)
class StageState:
    """One stage of the reported state.

    Attributes:
        stage: Name of the stage.
        row: Name of the row.
        seconds: How long it took when it last ran.
        memory: Peak memory in MiB.
        finished: When it last finished, in that machine's time zone.
        how: `ran` in this run of the pipeline, `cached` if its results existed before, empty if unknown.
        run_id: Its MLflow run.
        digest: Digest of its output, if it has one.
    """

    stage: str
    row: str
    seconds: float | None
    memory: float | None
    finished: str
    how: str
    run_id: str | None
    digest: str

    @property
    def label(self) -> str:
        """Time, and whether it ran or was cached."""
        how = {"ran": "● ran", "cached": "○ cached"}.get(self.how, "")
        return " · ".join(part for part in (duration(self.seconds), how) if part)


def stage_states(params: Params, since: float | None) -> list[StageState]:
    """Every stage of the reported state.

    Arguments:
        params: All tables.
        since: When the pipeline was started, in seconds since the epoch; None when unknown.
    """
    states = []
    for stage, row in stages_and_rows(params):
        run = read_run(stage, row)
        finished, how = str(run.get("finished", "")), ""
        try:
            moment = datetime.strptime(finished, "%Y-%m-%dT%H:%M:%S%z")
        except ValueError:
            pass
        else:
            # The file has whole seconds.
            how = "" if since is None else "ran" if moment.timestamp() >= int(since) else "cached"
            finished = moment.strftime("%Y-%m-%d %H:%M:%S %Z")
        seconds, memory, digest = run.get("seconds"), run.get("peak_memory_mib"), str(run.get("digest", ""))
        states.append(StageState(stage, row, seconds, memory, finished, how, run.get("run_id"), digest))
    return states


# The drawing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A box: its upper left corner, two lines of text, and the text on hover."""

    x: int
    y: int
    name: str
    text: str
    title: str
    how: str


WIDTH, HEIGHT, STEP_X, STEP_Y, TOP = 142, 42, 168, 56, 30  # pixels
COLUMNS = ("prepare", "train", "extract", "fit", "sample", "evaluate", "report")


class Graph:
    """Stages placed from left to right, one lane per density and per control, for the template to draw.

    Arguments:
        params: All tables.
        states: As made by `stage_states`.
    """

    def __init__(self, params: Params, states: Sequence[StageState]) -> None:
        self.nodes: list[Node] = []
        self.edges: list[str] = []
        self.heads = [(i * STEP_X + WIDTH // 2, name) for i, name in enumerate(COLUMNS)]
        self.node_width, self.node_height = WIDTH, HEIGHT
        self._states = {(s.stage, s.row): s for s in states}
        ends: list[Node] = []
        lane = 0
        for dataset in params.rows("datasets"):
            lane, last = self._dataset(params, dataset, lane)
            ends += last
        report = self._place("report", "report", COLUMNS.index("report"), max(lane - 1, 0) / 2)
        for end in ends:
            self._join(end, report)
        self.width, self.height = STEP_X * (len(COLUMNS) - 1) + WIDTH + 2, TOP + STEP_Y * max(lane, 1)

    def _dataset(self, params: Params, dataset: str, lane: int) -> tuple[int, list[Node]]:
        """Places a data set's stages from `lane` on; returns the next free lane and the nodes that lead to the report."""
        first = lane
        starts: list[Node] = []
        ends: list[Node] = []
        fitted_nodes: dict[str, Node] = {}
        for autoencoder in [n for n in params.rows("autoencoders") if params.autoencoder(n).dataset == dataset]:
            top = lane
            fits: list[Node] = []
            for density in [n for n in params.rows("densities") if params.density(n).codes == autoencoder]:
                fitted, sampled, evaluated = (
                    self._place(s, density, COLUMNS.index(s), lane) for s in ("fit", "sample", "evaluate")
                )
                self._join(fitted, sampled)
                self._join(sampled, evaluated)
                fits.append(fitted)
                fitted_nodes[density] = fitted
                ends.append(evaluated)
                lane += 1
            lane = max(lane, top + 1)
            trained, extracted = (
                self._place(s, autoencoder, COLUMNS.index(s), (top + lane - 1) / 2) for s in ("train", "extract")
            )
            self._join(trained, extracted)
            for fitted in fits:
                self._join(extracted, fitted)
            starts.append(trained)
            ends += [] if fits else [extracted]
        # Outside the chains: the features that all rows share, and the controls.
        shared = [("features", name) for name in params.rows("evaluations") if name == dataset]
        shared += [("control", name) for name in params.rows("controls") if params.control(name).dataset == dataset]
        for stage, row in shared:
            node = self._place(stage, row, COLUMNS.index("train"), lane)
            starts.append(node)
            ends.append(node)
            lane += 1
        for detection in [name for name in params.rows("detections") if params.detection(name).dataset == dataset]:
            node = self._place("detect", detection, COLUMNS.index("evaluate"), lane)
            self._join(fitted_nodes[params.detection(detection).density], node)
            ends.append(node)
            lane += 1
        lane = max(lane, first + 1)
        prepared = self._place("prepare", dataset, COLUMNS.index("prepare"), (first + lane - 1) / 2)
        for start in starts:
            self._join(prepared, start)
        ends += [] if starts else [prepared]
        return lane, ends

    def _place(self, stage: str, row: str, column: int, lane: float) -> Node:
        state = self._states.get((stage, row))
        name = f"{stage} {row}" if stage in ("features", "control", "detect") else row
        name = name if len(name) <= 19 else name[:18] + "…"
        title = f"{stage} {row}" if stage != row else stage
        if state is not None and state.finished:
            title += f": {state.label}, finished {state.finished}"
        label, how = (state.label, state.how) if state is not None else ("", "")
        self.nodes.append(Node(column * STEP_X, TOP + round(STEP_Y * lane), name, label, title, how))
        return self.nodes[-1]

    def _join(self, start: Node, end: Node) -> None:
        x0, y0, x1, y1 = start.x + WIDTH, start.y + HEIGHT // 2, end.x, end.y + HEIGHT // 2
        bend = x1 - (STEP_X - WIDTH)
        # Straight along its own lane, then over to the next column.
        self.edges.append(f"M{x0} {y0} H{bend} C{bend + 16} {y0} {x1 - 16} {y1} {x1} {y1}")
