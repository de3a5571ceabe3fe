"""Processes that are stopped, not killed: they end the run instead of hanging it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import preparation
from pipeline.errors import PipelineError, SettingsError
from pipeline.storage.batches import Batches
from pipeline.system import watchdog
from pipeline.system.processes import die_with_parent
from pipeline.system.ranks import join
from stages.launching import local
from stages.launching.common.processes import forwarded


class Group:
    """Forks of this process that join a group, each running `work`; what they write to stderr lies in files.

    Arguments:
        folder: For those files.
        world: Number of processes.
        work: Called with the rank, after the process has joined.
    """

    def __init__(self, folder: Path, world: int, work: object, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, value in {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DEVICE": "cpu"}.items():
            monkeypatch.setenv(name, str(value))
        self.errors = [folder / f"{rank}.txt" for rank in range(world)]
        self.pids: list[int] = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    os.environ["RANK"] = str(rank)
                    join.cache_clear()  # another test may have joined as a single process
                    os.dup2(os.open(self.errors[rank], os.O_CREAT | os.O_WRONLY), 2)
                    sys.stderr = os.fdopen(2, "w")
                    code = 0 if work(rank, join()) is None else 1  # type: ignore[operator]
                finally:
                    os._exit(code)
            self.pids.append(pid)

    def wait(self, rank: int, seconds: float) -> int:
        """The exit status of a process; negative for a signal."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.pids[rank] = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError(f"process {rank} is still there")

    def close(self) -> None:
        for pid in filter(None, self.pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize(("stopped", "busy"), [(0, False), (1, False), (1, True)])
def test_a_stopped_process_ends_the_run_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int, busy: bool
) -> None:
    def work(rank: int, ranks: object) -> None:
        if rank == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        while busy:  # the others go on working
            watchdog.worked()
            time.sleep(0.01)
        ranks.barrier()  # type: ignore[attr-defined]

    monkeypatch.setenv("STALL_MINUTES", "0.01")
    group = Group(tmp_path, 2, work, monkeypatch)
    try:
        assert group.wait(1 - stopped, 8) == 1
        assert f"process {stopped} has done nothing for 0.01 minutes" in group.errors[1 - stopped].read_text()
    finally:
        group.close()


def test_a_process_that_hangs_ends_the_run_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int, ranks: object) -> None:
        if rank == 1:
            time.sleep(60)
        ranks.barrier()  # type: ignore[attr-defined]

    monkeypatch.setenv("STALL_MINUTES", "0.01")
    group = Group(tmp_path, 2, work, monkeypatch)
    try:
        assert group.wait(0, 8) == 1
        assert "process 1 has done nothing" in group.errors[0].read_text()
    finally:
        group.close()


def test_processes_that_work_or_wait_for_one_that_does_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int, ranks: object) -> None:
        end = time.monotonic() + 2
        while rank == 0 and time.monotonic() < end:
            watchdog.worked()
            time.sleep(0.01)
        ranks.barrier()  # type: ignore[attr-defined]

    monkeypatch.setenv("STALL_MINUTES", "0.01")
    group = Group(tmp_path, 2, work, monkeypatch)
    try:
        assert [group.wait(rank, 8) for rank in range(2)] == [0, 0]
    finally:
        group.close()


@pytest.mark.parametrize(("share", "active"), [(0.002, False), (0.2, True)])
def test_a_process_is_busy_if_it_computes_and_not_if_its_threads_wait(
    monkeypatch: pytest.MonkeyPatch, share: float, active: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.time, "process_time", lambda: 0.9 + share * now[0])

    class Hour:
        def is_set(self) -> bool:
            return now[0] >= 3600

        def wait(self, seconds: float) -> None:
            now[0] += seconds

    class Reports(list[str]):
        def set(self, _key: str, value: str) -> None:
            self.append(value)

        def multi_get(self, _keys: list[str]) -> list[bytes]:
            return []

    dog = watchdog.Watchdog(Reports(), 0, 1, 600.0)
    monkeypatch.setattr(dog, "_ended", Hour())
    dog._exchange()
    assert len(dog.store) == 721
    assert (len({report.partition(" ")[2] for report in dog.store[:-1]}) > 1) == active


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "1e9"])
def test_the_limit_is_checked(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("STALL_MINUTES", value)
    with pytest.raises(SettingsError, match=r"STALL_MINUTES is .*: expected a number of minutes"):
        watchdog.stall_seconds()


# The launcher ---------------------------------------------------------------------------------------------------------


def peer(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-S", "-c", f"print(flush=True); {code}"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    return process


def test_peers_of_a_dead_process_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PATIENCE_SECONDS", 0.2)
    peers = [peer("import time; time.sleep(60)"), peer("import os; os._exit(1)")]
    assert local._wait_for(peers, []) == (1, [0])
    assert [p.returncode for p in peers] == [-signal.SIGKILL, 1]


def test_a_signal_ends_processes_that_dont_heed_it_and_wakes_stopped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PATIENCE_SECONDS", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    peers = [peer(deaf), peer("import time; time.sleep(60)")]
    peers[0].stdout.read(1)  # type: ignore[union-attr]
    os.kill(peers[1].pid, signal.SIGSTOP)
    with forwarded(peers) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert local._wait_for(peers, received) == (1, [0])
    assert [p.returncode for p in peers] == [-signal.SIGKILL, -signal.SIGTERM]


def test_a_signal_ends_the_run_though_no_process_heeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PATIENCE_SECONDS", 0.2)
    peers = [peer("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(5)")]
    peers[0].stdout.read(1)  # type: ignore[union-attr]
    with forwarded(peers) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert local._wait_for(peers, received) == (None, [0])


# Children of a stage --------------------------------------------------------------------------------------------------


def test_a_child_dies_with_its_parent() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        me = os.getpid()
        if os.fork() == 0:
            die_with_parent(me)
            os.write(write, b"x")
            time.sleep(60)
        time.sleep(60)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    started = time.monotonic()
    assert os.read(read, 1) == b""  # no one holds the other end any more
    assert time.monotonic() - started < 5


def test_a_child_of_a_dead_parent_ends_at_once() -> None:
    child = os.fork()
    if child == 0:
        die_with_parent(os.getpid())  # which isn't its parent
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


class Numbers:
    """A source whose second block is never read."""

    def __init__(self, act: object) -> None:
        self.act = act

    def read(self, split: str, start: int, stop: int) -> int:
        if start == 1:
            self.act()  # type: ignore[operator]
        return start


def read_all(source: Numbers) -> list[int]:
    return [value for _, value in preparation._read_all(source, [("train", i, i + 1) for i in range(8)], 2)]


def test_a_stopped_reader_ends_prepare_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STALL_MINUTES", "0.01")
    with pytest.raises(PipelineError, match=r"reads examples 1 to 2 of split 'train' has done nothing for 0.01 minutes"):
        read_all(Numbers(lambda: os.kill(os.getpid(), signal.SIGSTOP)))


def test_a_signal_ends_prepare_though_a_reader_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            read_all(Numbers(lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    finally:
        signal.signal(signal.SIGALRM, before)


def descendants_end_with(start: object) -> float:
    """Seconds from the SIGKILL of a fork that runs `start`, given a pipe that its children inherit, until they have ended."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        start(write)  # type: ignore[operator]
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    started = time.monotonic()
    assert os.read(read, 1) == b""
    os.close(read)
    return time.monotonic() - started


def _announce_and_sleep(write: int) -> None:
    os.write(write, b"x")
    time.sleep(60)


def test_readers_die_with_prepare() -> None:
    assert descendants_end_with(lambda write: read_all(Numbers(lambda: _announce_and_sleep(write)))) < 2


def test_loaders_die_with_training() -> None:
    def start(write: int) -> None:
        def load(_number: int) -> dict[str, np.ndarray]:
            _announce_and_sleep(write)
            return {}

        list(Batches(load, [10], 5, seed=0, workers=1).epoch(0))

    assert descendants_end_with(start) < 2


def test_a_stopped_loader_ends_training_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_number: int) -> dict[str, np.ndarray]:
        os.kill(os.getpid(), signal.SIGSTOP)
        return {}

    monkeypatch.setenv("STALL_MINUTES", "0.01")
    with pytest.raises(PipelineError, match=r"\Aa loader process has done nothing for 0.01 minutes"):
        list(Batches(load, [10], 5, seed=0, workers=1).epoch(0))
