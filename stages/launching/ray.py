"""Processes on a Ray cluster (LAUNCHER=ray). A lost node restarts the stage from its checkpoint on what is left."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from stages.launching.common.processes import Outcome, conclude, free_port, restart_count, run_rank, stage_command

__all__ = ["launch"]

PASSED_ON = (
    "DEVICE",
    "CACHE_MIB",
    "LOADER_WORKERS",
    "STALL_MINUTES",
    "TRACKING",
    "TRACKING_PICTURES",
    "OMP_NUM_THREADS",
    "STORE",
    "STORE_CACHE",
    "STORE_CACHE_GIB",
)
# Starts of names: what DVC says of the stage, and where the tracking server and the store are.
ALL_OF = ("DVC_", "MLFLOW_", "FSSPEC_", "AWS_", "AZURE_", "GOOGLE_")
CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 24 * 3600


def launch(processes: int) -> None:
    """Runs the stage as workers of Ray Train, in this folder, which all nodes must share.

    Raises:
        PipelineError: When Ray isn't installed, no cluster answers or the stage failed.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise PipelineError("LAUNCHER=ray needs Ray: pip install 'latent-density-pipeline[ray]'") from None
    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        _connect(address)
        # Workers import this module, wherever they are.
        path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
        ray.init(address, logging_level="error", log_to_driver=True, runtime_env={"env_vars": {"PYTHONPATH": path}})
    except (OSError, RuntimeError, ValueError):
        raise PipelineError(
            f"no Ray cluster answers at {address!r}: start one by `ray start --head`, or set RAY_ADDRESS"
        ) from None
    records = Path(".launching").absolute() / f"ray-{os.getpid()}"
    settings = {
        "command": stage_command(),
        "folder": os.getcwd(),
        "environment": {name: os.environ[name] for name in os.environ if name in PASSED_ON or name.startswith(ALL_OF)},
    }
    gpu = os.environ.get("DEVICE") != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    try:
        trainer = TorchTrainer(
            _work,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="gloo", timeout_s=PATIENCE_SECONDS),  # of the launcher; the stage has its own
            scaling_config=ScalingConfig(num_workers=(1, processes) if processes > 1 else 1, use_gpu=gpu),
            run_config=RunConfig(storage_path=str(records), failure_config=FailureConfig(max_failures=restart_count())),
        )
        result = trainer.fit()
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise PipelineError(f"a process was lost {restart_count() + 1} times ({reason})") from None
    finally:
        ray.shutdown()
        shutil.rmtree(records, ignore_errors=True)
    conclude([Outcome(*outcome) for outcome in result.return_value])


def _connect(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _work(settings: dict[str, Any]) -> list[tuple[int, str]]:
    """One worker: runs the stage as its rank, and returns how it ended on all of them."""
    import ray
    import torch.distributed as dist

    own = (ray.util.get_node_ip_address(), free_port())
    meeting: list[Any] = [own]
    dist.broadcast_object_list(meeting, src=0)
    host, port = meeting[0]
    environment = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    environment |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), **settings["environment"]}
    outcome = run_rank(settings["command"], environment, settings["folder"])
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, astuple(outcome))  # fails where a worker was lost
    if any(code for code, _ in outcomes) and not any(Outcome(*each).final for each in outcomes):
        print(f"a process of the stage was lost: {outcomes}", file=sys.stderr)
        raise RuntimeError(f"a process of the stage was lost: {outcomes}")
    return outcomes
