"""Several processes: the same codes, samples, scores and curves as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipeline.densities.lde import LatentDensityEstimator
from pipeline.system import ranks
from pipeline.system.ranks import Ranks, synchronise_batch_norm

ROOT = Path(__file__).resolve().parents[1]


# Batch norm over ranks ------------------------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 2), nn.BatchNorm2d(1)
    ).double()


def gradients(network: nn.Module, x: torch.Tensor, share: slice) -> list[torch.Tensor]:
    x = x[share].clone().requires_grad_()
    loss = (network(x) - 0.3).pow(4).mean()
    loss.backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in network.parameters() if p.grad is not None), loss.detach()]


def _normalise(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    network = small_network()
    synchronise_batch_norm(network)
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = gradients(network, x, slice(3 * rank, 3 * rank + 3))
    torch.save({"gradients": found, "state": network.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_batch_norm_over_two_ranks_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    mp.start_processes(_normalise, (str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    network = small_network()
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = gradients(network, x, slice(None))
    # The loss of the whole is the mean of the ranks' losses, hence the halves.
    assert torch.allclose(torch.cat([r["gradients"][0] for r in ranks]) / 2, whole[0], atol=1e-12)
    for mine, *parts in zip(whole[1:], *(r["gradients"][1:] for r in ranks), strict=True):
        assert torch.allclose(sum(parts) / 2, mine, atol=1e-12)
    assert list(ranks[0]["state"]) == list(network.state_dict())
    for name, value in network.state_dict().items():
        for rank in ranks:
            assert torch.allclose(rank["state"][name].double(), value.double(), atol=1e-12), name


def small_density(dim: int) -> LatentDensityEstimator:
    torch.manual_seed(0)
    return LatentDensityEstimator(dim, components=2, width=4, normalisation="batch").double().train()


def density_gradients(density: LatentDensityEstimator, share: slice) -> list[torch.Tensor]:
    z = torch.randn(5, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = density.loss(z[share]) * len(z[share]) / len(z)  # losses of two and of three codes add up to that of five
    loss.backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in density.parameters()]


def _normalise_density(rank: int, folder: str, dim: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    density = small_density(dim)
    synchronise_batch_norm(density)
    found = density_gradients(density, (slice(0, 2), slice(2, 5))[rank])
    torch.save({"gradients": found, "state": density.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_density_with_batch_norm_over_two_ranks_is_that_of_the_whole_batch(tmp_path: Path, dim: int) -> None:
    mp.start_processes(_normalise_density, (str(tmp_path), dim), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    density = small_density(dim)
    whole = density_gradients(density, slice(None))
    for mine, *parts in zip(whole, *(r["gradients"] for r in ranks), strict=True):
        assert torch.allclose(sum(parts), mine, atol=1e-12)
    for name, value in density.state_dict().items():
        for rank in ranks:
            assert torch.allclose(rank["state"][name].double(), value.double(), atol=1e-12), name


def test_alone_and_in_evaluation_it_is_batch_norm() -> None:
    network, twin = small_network().eval(), small_network().eval()
    synchronise_batch_norm(twin)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    assert torch.equal(network(x), twin(x))


# Stages ---------------------------------------------------------------------------------------------------------------


def start(*stage: str, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRACKING": "off", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *stage], env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=1000)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    small.write_raw(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in small.STAGES:
            if stage[1].startswith("blobs"):
                assert small.run(*stage).exit_code == 0
    return folder


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "workspace"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


def test_only_the_first_process_writes_a_row_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.write_raw(tmp_path, images=0)
    monkeypatch.chdir(tmp_path)
    assert small.run("prepare", "points").exit_code == 0
    barriers: list[int] = []
    monkeypatch.setattr(Ranks, "barrier", lambda self: barriers.append(self.rank))
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(ranks, "join", lambda rank=rank: Ranks(rank, 2, torch.device("cpu")))
        assert small.run("train", "points").exit_code == 0
        assert Path("data/autoencoders/points").exists() == (rank == 0)
        assert Path("reports/arrays/train/points").exists() == (rank == 0)
    assert barriers == [1, 0]


def torchrun(*stage: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRACKING": "off"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stages", *stage]
    return subprocess.Popen(
        [sys.executable, *command], env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def two(*stage: str) -> subprocess.Popen[str]:
    return start(*stage, PROCESSES="2")


def test_two_processes_write_the_same_codes(workspace: Path) -> None:
    expected = small.files(Path("data"))
    shutil.rmtree("data/codes/blobs-ae")
    code, out, err = outcome(two("extract", "blobs-ae"))
    assert (code, out.count("extract blobs-ae:"), err) == (0, 1, "")
    assert small.files(Path("data")) == expected


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("launch", [two, torchrun])
def test_samples_codes_and_scores_dont_depend_on_the_number_of_ranks(
    workspace: Path, launch: Callable[..., subprocess.Popen[str]]
) -> None:
    expected = small.files(Path("data"))
    scored = (("evaluate", "blobs-lde"), ("control", "blobs"))
    files = [Path(f"reports/metrics/{stage}/{row}.json") for stage, row in scored]
    scores = [json.loads(file.read_text()) for file in files]
    for folder in ("shards/blobs", "codes/blobs-ae", "samples/blobs-lde"):
        shutil.rmtree(Path("data") / folder)
    for file in files:
        file.unlink()
    for stage in (("prepare", "blobs"), ("extract", "blobs-ae"), ("sample", "blobs-lde"), *scored):
        code, _, err = outcome(launch(*stage))
        assert code == 0, err
    assert small.files(Path("data")) == expected
    for file, values in zip(files, scores, strict=True):
        merged = json.loads(file.read_text())
        assert merged.keys() == values.keys()
        for key, value in values.items():
            assert merged[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def curve(stage: str, row: str) -> np.ndarray:
    lines = Path(f"reports/curves/{stage}/{row}.tsv").read_text().splitlines()
    column = lines[0].split("\t").index("loss")
    return np.array([float(line.split("\t")[column] or "nan") for line in lines[1:]])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_training_with_two_processes_has_the_curve_of_one(workspace: Path) -> None:
    """The batches, their noise and the statistics of batch norm are the same, so losses differ by rounding alone."""
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("epochs: 4", "epochs: 20"))
    for stage, row in (("train", "blobs-ae"), ("fit", "blobs-lde")):
        assert small.run(stage, row).exit_code == 0
        one = curve(stage, row)
        scored = json.loads(Path(f"reports/metrics/{stage}/{row}.json").read_text())
        code, _, err = outcome(two(stage, row))
        assert code == 0, err
        # Both share the scoring, too.
        assert json.loads(Path(f"reports/metrics/{stage}/{row}.json").read_text()).keys() == scored.keys()
        # Rounding grows from step to step; tests/test_elastic.py compares whole runs in float64.
        assert np.allclose(curve(stage, row)[:8], one[:8], rtol=1e-5, atol=1e-6, equal_nan=True), (stage, one)
        runs = json.loads(Path(f"reports/runs/{stage}/{row}.json").read_text())
        assert runs["processes"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_stopped_run_of_two_processes_goes_on_as_one(workspace: Path) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("epochs: 4", "epochs: 200"))
    assert small.run("train", "blobs-ae").exit_code == 0
    one = curve("train", "blobs-ae")
    process = two("train", "blobs-ae")
    deadline = time.monotonic() + 100
    while not list(Path(".checkpoints").rglob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert outcome(process)[0] == 1
    assert small.run("train", "blobs-ae").exit_code == 0
    assert json.loads(Path("reports/runs/train/blobs-ae.json").read_text())["resumed_at"] > 0
    assert np.allclose(curve("train", "blobs-ae"), one, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_error_of_several_processes_is_one_line(workspace: Path) -> None:
    path = Path("data/shards/blobs/train-000001.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out, err = outcome(two("extract", "blobs-ae"))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "train-000001.tar doesn't match the digest" in err


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_signal_to_several_processes_writes_one_checkpoint(workspace: Path) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("epochs: 4", "epochs: 100000"))
    process = two("train", "blobs-ae")
    deadline = time.monotonic() + 100
    while not list(Path(".checkpoints").rglob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, _, err = outcome(process)
    assert code == 1
    assert err.count("error:") == 1
    assert "stopped by SIGTERM" in err
    assert len(list(Path(".checkpoints").rglob("*.pt"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", ["signal", "watchdog"])
def test_a_stopped_process_hangs_nothing(workspace: Path, end: str, rank: int) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("epochs: 4", "epochs: 100000"))
    process = start("train", "blobs-ae", PROCESSES="2", STALL_MINUTES="0.2" if end == "watchdog" else "10")
    deadline = time.monotonic() + 100
    while not list(Path(".checkpoints").rglob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    peers = psutil.Process(process.pid).children()
    stopped = next(peer for peer in peers if peer.environ()["RANK"] == str(rank))
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    started = time.monotonic()
    if end == "signal":
        process.send_signal(signal.SIGTERM)
    code, _, err = outcome(process)
    assert time.monotonic() - started < (15 if end == "signal" else 30)
    assert code == 1
    assert ("stopped by SIGTERM" if end == "signal" else f"error: train blobs-ae: process {rank} has done nothing") in err
    assert not [peer for peer in peers if peer.is_running() and peer.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_mlflow_logs_a_run_of_two_processes_once(workspace: Path) -> None:
    import mlflow

    uri = f"sqlite:///{workspace}/mlflow.db"
    code, _, err = outcome(start("extract", "blobs-ae", PROCESSES="2", TRACKING="on", MLFLOW_TRACKING_URI=uri))
    assert code == 0, err
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [run.info.run_name for run in runs] == ["extract blobs-ae"]
