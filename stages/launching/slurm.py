"""A job of Slurm (LAUNCHER=slurm), queued again when it is pre-empted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from stages.launching.common.processes import END_SECONDS, Outcome, conclude, free_port, restart_count, run_rank, stage_command

__all__ = ["launch"]

PLACES = ("partition", "account", "qos", "constraint")


def launch(processes: int) -> None:
    """Submits the stage as a job of PROCESSES tasks, in this folder, which all nodes must share, and waits for it.

    The environment's NODES says how many nodes they lie on (default 1), MINUTES how long they may take (default 1440), and
    SLURM_PARTITION, SLURM_ACCOUNT, SLURM_QOS and SLURM_CONSTRAINT where. SLURM_CLUSTER=local runs the job on this machine.

    Raises:
        PipelineError: When submitit isn't installed, there is no Slurm or the stage failed.
    """
    try:
        import submitit
    except ImportError:
        raise PipelineError("LAUNCHER=slurm needs submitit: pip install 'latent-density-pipeline[slurm]'") from None
    nodes, minutes = (_positive(name, default) for name, default in (("NODES", "1"), ("MINUTES", "1440")))
    if processes % nodes:
        raise PipelineError(f"PROCESSES is {processes} and NODES is {nodes}: each node must have as many processes")
    cluster = os.environ.get("SLURM_CLUSTER") or "slurm"
    try:
        executor = submitit.AutoExecutor(
            Path(".launching/%j"), cluster=cluster, **({} if cluster == "local" else {"slurm_max_num_timeout": restart_count()})
        )
    except (RuntimeError, ValueError) as error:
        raise PipelineError(f"no Slurm on this machine ({error}): log in to a node that has sbatch, or set LAUNCHER") from None
    places = {
        f"slurm_{name}": os.environ[f"SLURM_{name.upper()}"] for name in PLACES if os.environ.get(f"SLURM_{name.upper()}")
    }
    executor.update_parameters(
        name=" ".join(sys.argv[1:3]).replace(" ", "-"),
        nodes=nodes,
        tasks_per_node=processes // nodes,
        gpus_per_node=processes // nodes if os.environ.get("DEVICE") == "cuda" else 0,
        timeout_min=minutes,
        **places,
    )
    try:
        job = executor.submit(Task(stage_command(), os.getcwd(), free_port()))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise PipelineError(f"Slurm doesn't take the job ({str(error).strip()})") from None
    try:
        results = job.results()
    except submitit.core.utils.UncompletedJobError as error:  # it failed, or left no result: cancelled, out of memory
        state = "" if isinstance(error, submitit.core.utils.FailedJobError) else f"{job.state}: "
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(f"job {job.job_id} failed ({state}{reason}); its messages are in {job.paths.folder}") from None
    except KeyboardInterrupt:
        job.cancel()
        raise
    conclude([Outcome(*result) for result in results])


def _positive(name: str, default: str) -> int:
    value = os.environ.get(name) or default
    if not value.isdecimal() or not 1 <= int(value) <= 10**6:
        raise PipelineError(f"{name} is {value[:40]!r}: expected a number from 1 on")
    return int(value)


class Task:
    """One task of the job: runs the stage as its rank.

    Arguments:
        command: Arguments of Python.
        folder: The project.
        port: Where the tasks meet, on the first node.
    """

    def __init__(self, command: list[str], folder: str, port: int) -> None:
        self.command, self.folder, self.port = command, folder, port
        self._started: list[subprocess.Popen[str]] = []

    def __call__(self) -> tuple[int, str]:
        """Exit status, and the error."""
        import submitit

        job = submitit.JobEnvironment()
        # That of a task that ended before the job was queued again; the launcher would take it for the end of this one.
        job.paths.result_pickle.unlink(missing_ok=True)
        environment = {"RANK": str(job.global_rank), "WORLD_SIZE": str(job.num_tasks), "LOCAL_RANK": str(job.local_rank)}
        host = job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1"
        environment["LOCAL_WORLD_SIZE"] = str(job.num_tasks // job.num_nodes)
        environment |= {"MASTER_ADDR": host, "MASTER_PORT": str(self.port)}
        return astuple(run_rank(self.command, environment, self.folder, self._started))

    def checkpoint(self) -> Any:
        """Called before pre-emption and when time is up: the stage writes its checkpoint, and the job is queued again."""
        import submitit

        for process in self._started:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:  # in a long validation, say: the last checkpoint is kept
                process.kill()
        return submitit.helpers.DelayedSubmission(Task(self.command, self.folder, self.port))
