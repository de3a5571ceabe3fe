"""Launchers: the same bits from local processes, torchrun, Ray and Slurm; rows side by side."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import small
from click.testing import CliRunner
from project import Project

from pipeline.errors import PipelineError
from pipeline.settings import read_params
from stages.launching import ray as ray_launcher
from stages.launching import slurm, torchrun
from stages.launching.common import choice
from stages.launching.common.choice import launched
from stages.launching.common.processes import Outcome, conclude, run_rank
from stages.run import _terminable
from stages.tools import repro as repro_tool
from stages.tools.repro import tasks

ROOT = Path(__file__).resolve().parents[1]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# The choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LAUNCHER": "mpi"}, "LAUNCHER is 'mpi': expected local, torchrun, ray or slurm"),
        ({"PROCESSES": "two"}, "PROCESSES is 'two': expected a number from 1 to 1024"),
        ({"PROCESSES": "2", "LAUNCHER": "torchrun", "RESTARTS": "-1"}, "RESTARTS is '-1': expected a number from 0 to 1024"),
        ({"LAUNCHER": "ray"}, "LAUNCHER=ray needs Ray: pip install"),
        ({"LAUNCHER": "slurm"}, "LAUNCHER=slurm needs submitit: pip install"),
    ],
)
def test_a_launcher_that_isnt_there_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("RANK", "LAUNCHER", "PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=message):
        launched()


def test_an_address_that_nobody_listens_at_is_noticed_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto"):
            ray_launcher._connect(address)
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(OSError):
            ray_launcher._connect(address)


def test_one_local_process_and_a_rank_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LAUNCHER", "PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    monkeypatch.setenv("LAUNCHER", "ray")
    monkeypatch.setenv("RANK", "0")
    assert not launched()


def test_a_rank_passes_on_what_it_prints_and_tells_its_error(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = "import os, sys; print('progress', file=sys.stderr); print('error: fit a: it broke', file=sys.stderr); sys.exit(1)"
    for rank in range(2):
        assert run_rank(["-c", code], {"RANK": str(rank)}, tmp_path) == Outcome(1, "it broke")
        assert capfd.readouterr().err == ("progress\n" if rank == 0 else "")
    started: list[subprocess.Popen[str]] = []
    assert run_rank(["-c", "import os; os.kill(os.getpid(), 9)"], {"RANK": "0"}, tmp_path, started) == Outcome(-9)
    assert started[0].returncode == -9


def test_the_last_line_of_a_rank_that_broke_off_is_told(tmp_path: Path) -> None:
    code = "import sys; print('warning', file=sys.stderr); raise ValueError('at line 7')"
    assert run_rank(["-S", "-c", code], {"RANK": "1"}, tmp_path) == Outcome(1, "ValueError: at line 7")
    lost = "import sys; print('progress', file=sys.stderr); sys.exit(3)"
    assert run_rank(["-S", "-c", lost], {"RANK": "1"}, tmp_path) == Outcome(3)


def test_the_cause_is_told_and_not_what_followed_from_it() -> None:
    conclude([Outcome(0), Outcome(0)])
    with pytest.raises(PipelineError, match=r"\Ait broke\Z"):
        conclude([Outcome(3), Outcome(-6), Outcome(1, "it broke")])
    with pytest.raises(PipelineError, match=r"\Aprocess 1 was killed by SIGKILL\Z"):
        conclude([Outcome(3), Outcome(-9)])


def test_a_signal_is_passed_on_to_torchrun_which_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\ntrap 'sleep 0.5; : > ended; exit 1' TERM\n: > ready\nwhile :; do sleep 0.05; done\n")
    stub.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(stub))

    def stop() -> None:
        while not Path("ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(PipelineError, match=r"stopped by SIGTERM: run the same command again"), _terminable():
        torchrun.launch(2)
    stopping.join()
    assert Path("ended").exists()


def test_a_process_of_torchrun_dies_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parents: list[int] = []
    monkeypatch.setattr(choice, "die_with_parent", parents.append)
    monkeypatch.setenv("RANK", "1")
    assert not launched()
    assert parents == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not launched()
    assert parents == [os.getppid()]


class Submitit(types.ModuleType):
    """What the launcher uses of submitit: an executor whose job ends with an error, and the environment of a task."""

    class FailedSubmissionError(RuntimeError): ...

    class UncompletedJobError(RuntimeError): ...

    class FailedJobError(UncompletedJobError): ...

    def __init__(self, folder: Path, submitting: Exception | None = None, ending: Exception | None = None) -> None:
        super().__init__("submitit")
        self.core = types.SimpleNamespace(utils=self)
        self.helpers = types.SimpleNamespace(DelayedSubmission=lambda task: task)
        self.AutoExecutor = lambda *_, **__: self
        self.update_parameters = lambda **_: None
        self.errors = {"submit": submitting, "results": ending}
        self.job_id, self.state, self.paths = "12", "OUT_OF_MEMORY", types.SimpleNamespace(folder=folder)
        self.paths.result_pickle = folder / "12_1_result.pkl"
        self.JobEnvironment = lambda: types.SimpleNamespace(
            paths=self.paths, global_rank=1, num_tasks=2, local_rank=1, num_nodes=1, hostnames=["a"]
        )

    def submit(self, _task: object) -> Submitit:
        if self.errors["submit"] is not None:
            raise self.errors["submit"]
        return self

    def results(self) -> None:
        assert self.errors["results"] is not None
        raise self.errors["results"]


@pytest.mark.parametrize(
    ("submitting", "ending", "message"),
    [
        (Submitit.FailedJobError("sbatch: error: invalid partition\n"), None, r"doesn't take the job \(sbatch: .* partition\)"),
        (Submitit.FailedSubmissionError("no job id"), None, r"Slurm doesn't take the job \(no job id\)"),
        (None, Submitit.FailedJobError("it broke\nat a line"), r"job 12 failed \(it broke\); its messages are in folder"),
        (None, Submitit.UncompletedJobError("Job 12 with\nno output"), r"job 12 failed \(OUT_OF_MEMORY: Job 12 with\); its"),
    ],
)
def test_a_job_that_slurm_refuses_or_ends_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, submitting: Exception | None, ending: Exception | None, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", Submitit(Path("folder"), submitting, ending))
    with pytest.raises(PipelineError, match=message):
        slurm.launch(2)


def test_a_task_that_doesnt_end_in_time_is_killed_and_queued_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", Submitit(tmp_path))
    monkeypatch.setattr(slurm, "END_SECONDS", 0.1)
    task = slurm.Task(["a"], str(tmp_path), 1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-S", "-c", deaf], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        task._started.append(process)
        again = task.checkpoint()
    assert process.returncode == -signal.SIGKILL
    assert (again.command, again.folder, again.port) == (["a"], str(tmp_path), 1)


def test_a_task_that_is_queued_again_leaves_no_earlier_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", Submitit(tmp_path))
    (tmp_path / "12_1_result.pkl").write_bytes(b"stopped by SIGTERM")
    assert slurm.Task(["-S", "-c", ""], str(tmp_path), 1)() == (0, "")
    assert not (tmp_path / "12_1_result.pkl").exists()


# Rows side by side ----------------------------------------------------------------------------------------------------


def test_tasks_hold_every_stage_once_after_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(small.PARAMS)
    found = tasks(read_params())
    stages = [stage for task in found.values() for stage in task.stages]
    assert sorted(stages) == sorted("@".join(stage) for stage in small.STAGES)
    done: set[str] = set()
    for name, task in found.items():
        assert task.needs <= done
        done.add(name)
    assert found["densities blobs-lde"].needs == {"autoencoders blobs-ae", "evaluations blobs"}
    assert found["controls blobs"].needs == {"evaluations blobs"}


def test_rows_side_by_side_start_with_no_mistake_in_any_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(small.PARAMS.replace("densities:\n", "densities:\n  broken: {family: lde}\n"))
    monkeypatch.setattr(repro_tool.subprocess, "call", lambda *_, **__: pytest.fail("DVC was started"))
    result = CliRunner().invoke(repro_tool.repro, ["--jobs", "2"])
    assert result.exit_code == 1
    assert result.output.startswith("error: repro: densities.broken.codes: missing")


PARAMS = """\
datasets:
  grid: {source: grid, root: pipeline/sources/grid.py, train_count: 2000, valid_count: 500, test_count: 500}
controls: {}
autoencoders:
  grid: {dataset: grid, objective: identity}
densities:
  a: {codes: grid, dataset: grid, family: lde, components: 2, epochs: 1}
  b: {codes: grid, dataset: grid, family: gmm, components: [2]}
  c: {codes: grid, dataset: grid, family: gaussian}
  d: {codes: grid, dataset: grid, family: gmm, components: [3]}
sampling: {count: 200, shard_examples: 100}
evaluations:
  grid: {}
detections: {}
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_rows_by_two_jobs_leave_a_lock_file_that_is_whole(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", PARAMS)
    project.environment["TRACKING"] = "off"
    output = project.call(sys.executable, "-m", "stages", "repro", "--jobs", "2")
    assert "Running stage" in output
    assert "up to date" in project.call("dvc", "status")
    assert project.repro() == set()
    assert len(project.metrics()) == 4 + 4 * 3
    # An error leaves the other rows done, and is told.
    project.edit("components: [3]", "components: [3000]")
    project.edit("components: [2]", "components: [4]")
    output = project.call(sys.executable, "-m", "stages", "repro", "--jobs", "2", code=1)
    assert "error: repro: failed: densities d" in output
    project.edit("components: [3000]", "components: [3]")
    assert project.repro() <= {"report"}
    assert project.repro() == set()


# The same bits --------------------------------------------------------------------------------------------------------

RUN = (("prepare", "blobs"), ("train", "blobs-ae"), ("extract", "blobs-ae"), ("features", "blobs"), ("fit", "blobs-lde"),
       ("sample", "blobs-lde"), ("evaluate", "blobs-lde"))  # fmt: skip


def start(folder: Path, *stage: str, **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TRACKING": "off",
        "PROCESSES": "2",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *stage], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=1000)
    assert process.returncode == 0, err[-4000:]
    return err


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    small.write_raw(folder)
    for stage in RUN:
        finish(start(folder, *stage))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of Ray on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray isn't installed: pip install '.[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default, which gets no turn on a busy machine
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        started.add_node(num_cpus=1)
        yield started.address
        started.shutdown()


def compare(local: Path, folder: Path) -> None:
    assert small.files(folder / "data") == small.files(local / "data")
    for stage, row in RUN:
        path = f"reports/metrics/{stage}/{row}.json"
        assert json.loads((folder / path).read_text()) == json.loads((local / path).read_text()), path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_ray_cluster_of_two_nodes_gives_the_bits_of_local_processes(local: Path, cluster: str, tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    for stage in RUN:
        finish(start(tmp_path, *stage, LAUNCHER="ray", RAY_ADDRESS=cluster))
    compare(local, tmp_path)
    assert not list((tmp_path / ".launching").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_worker_of_ray_killed_in_the_middle_of_fit_changes_no_bit(local: Path, cluster: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        shutil.copytree(local, folder)
        shutil.rmtree(folder / "data/densities")
        params = folder / "params.yaml"
        params.write_text(params.read_text().replace("epochs: 4", "epochs: 300"))
    finish(start(tmp_path / "whole", "fit", "blobs-lde"))
    process = start(tmp_path / "killed", "fit", "blobs-lde", LAUNCHER="ray", RAY_ADDRESS=cluster)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed/.checkpoints").rglob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [peer for peer in psutil.process_iter() if _is_rank(peer, tmp_path / "killed", "1")]
    assert ranks
    ranks[0].parent().kill()
    err = finish(process)
    assert "going on from the checkpoint" in err
    assert small.files(tmp_path / "killed/data/densities") == small.files(tmp_path / "whole/data/densities")


def _is_rank(process: psutil.Process, folder: Path, rank: str) -> bool:
    try:
        return process.cwd() == str(folder) and process.environ().get("RANK") == rank and "stages" in process.cmdline()
    except psutil.Error:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not installed("ray"), reason="Ray isn't installed: pip install '.[ray]'")
def test_a_cluster_that_isnt_there_is_told_in_a_line(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    process = start(tmp_path, "prepare", "blobs", LAUNCHER="ray", RAY_ADDRESS="127.0.0.1:1")
    _, err = process.communicate(timeout=1000)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("error: prepare blobs: no Ray cluster answers at '127.0.0.1:1'")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not installed("submitit"), reason="submitit isn't installed: pip install '.[slurm]'")
def test_a_job_of_slurm_gives_the_bits_of_local_processes(local: Path, tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    for stage in RUN:
        finish(start(tmp_path, *stage, LAUNCHER="slurm", SLURM_CLUSTER="local"))
    compare(local, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not installed("submitit"), reason="submitit isn't installed: pip install '.[slurm]'")
def test_an_error_of_a_job_is_told_in_a_line(local: Path, tmp_path: Path) -> None:
    shutil.copytree(local, tmp_path / "copy")
    path = tmp_path / "copy/data/shards/blobs/train-000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    process = start(tmp_path / "copy", "extract", "blobs-ae", LAUNCHER="slurm", SLURM_CLUSTER="local")
    _, err = process.communicate(timeout=1000)
    assert process.returncode == 1
    assert "error: extract blobs-ae:" in err.splitlines()[-1]
    assert "train-000001.tar doesn't match the digest" in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_torchrun_gives_the_bits_of_local_processes(local: Path, tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    for stage in RUN:
        finish(start(tmp_path, *stage, LAUNCHER="torchrun"))
    compare(local, tmp_path)
