"""Processes killed at random moments: what they leave is whole, and the next run ends with the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import small

ROOT = Path(__file__).resolve().parents[1]
# A process that has imported everything waits for a line, then runs the stage: a kill then falls into its work, not its start.
READY = """
import os, sys
import torch, numpy, safetensors.torch, webdataset, matplotlib.figure, pipeline.figures, pipeline.training.loop
import pipeline.scoring
import pipeline.extraction, pipeline.sampling, pipeline.fitting, pipeline.autoencoders.ae, pipeline.evaluation.reconstruction
import pipeline.densities.lde, pipeline.sources.images, torch._dynamo
import stages.prepare, stages.features, stages.control, stages.train, stages.extract, stages.fit, stages.sample, stages.evaluate
from stages.__main__ import cli
for line in sys.stdin:
    folder, stage, row = line.rstrip().split("\\t")
    if os.fork() == 0:
        os.chdir(folder)
        print(os.getpid(), flush=True)
        cli([stage, row])
    os.wait()
    print("done", flush=True)
"""


class Launcher:
    """Starts stages in forks of a process with all imports done, in a few milliseconds each."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRACKING": "off"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", READY], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, stage: tuple[str, str], kill_after: float | None = None) -> bool:
        """Runs a stage, or kills it after some seconds; returns whether it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\t".join((os.getcwd(), *stage)) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        killed = False
        if kill_after is not None:
            time.sleep(kill_after)
            try:
                os.kill(pid, signal.SIGKILL)
                killed = True
            except ProcessLookupError:
                pass
        for line in self.process.stdout:
            if line == "done\n":
                break
        return killed

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def workspace(folder: Path, epochs: int) -> Path:
    small.write_raw(folder)
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("epochs: 4", f"epochs: {epochs}"))
    return folder


def results(folder: Path) -> dict[str, str]:
    """Digests of what must be the same: data, scores and curves, not seconds."""
    found = small.files(folder)
    return {k: v for k, v in found.items() if k.startswith(("data/", "reports/")) and not k.startswith("reports/runs/")}


def check_whole(folder: Path, expected: dict[str, str]) -> None:
    """Whatever can be seen is complete: as the run that was never killed wrote it, or absent."""
    for path, digest in results(folder).items():
        if "/." not in path:
            assert expected[path] == digest, f"{path} is torn"
    for index in folder.glob("data/*/*/index.json"):
        shown = {str(p.relative_to(folder)) for p in index.parent.iterdir()}
        assert shown == {p for p in expected if p.startswith(f"{index.parent.relative_to(folder)}/")}


def kill_and_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: dict[tuple[str, str], int], epochs: int, seed: int
) -> int:
    """Runs the stages once without and once with so many kills each; returns how many kills hit a running stage."""
    chosen = random.Random(seed)
    count = 0
    launcher = Launcher()
    try:
        monkeypatch.chdir(workspace(tmp_path / "whole", epochs))
        took = {}
        for stage in kills:
            started = time.monotonic()
            launcher.run(stage)
            took[stage] = time.monotonic() - started
        expected = results(tmp_path / "whole")
        assert {f"reports/metrics/{stage}/{row}.json" for stage, row in kills} <= expected.keys()
        shutil.copytree(tmp_path / "whole/raw", tmp_path / "killed/raw")
        shutil.copy("params.yaml", tmp_path / "killed")
        monkeypatch.chdir(tmp_path / "killed")
        for stage in kills:
            for _ in range(kills[stage]):
                count += launcher.run(stage, chosen.uniform(0, took[stage]))
                check_whole(tmp_path / "killed", expected)
            launcher.run(stage)
            check_whole(tmp_path / "killed", expected)
        assert results(tmp_path / "killed") == expected
        assert not [p for p in Path(".").rglob("*.partial") if "metrics" in str(p)]
    finally:
        launcher.close()
    return count


def test_train_and_fit_killed_a_few_times_end_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = {("prepare", "blobs"): 0, ("train", "blobs-ae"): 3, ("extract", "blobs-ae"): 0, ("fit", "blobs-lde"): 3}
    assert kill_and_finish(tmp_path, monkeypatch, kills, epochs=10, seed=0) >= 2


def signal_once_saved(stage: tuple[str, str], number: signal.Signals) -> threading.Thread:
    """Sends this process a signal as soon as the stage, which runs in it, has written a checkpoint."""

    def watch() -> None:
        deadline = time.monotonic() + 100
        while not list(Path(".checkpoints", *stage).glob("*.pt")):
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_and_fit_stopped_by_a_signal_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    stages = [("prepare", "blobs"), ("train", "blobs-ae"), ("extract", "blobs-ae"), ("fit", "blobs-lde")]
    monkeypatch.chdir(workspace(tmp_path / "whole", epochs=40))
    for stage in stages:
        assert small.run(*stage).exit_code == 0
    monkeypatch.chdir(workspace(tmp_path / "stopped", epochs=40))
    for stage in stages:
        if stage[0] in ("train", "fit"):
            thread = signal_once_saved(stage, number)
            result = small.run(*stage)
            thread.join()
            assert result.exit_code == 1
            assert f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name} at step" in result.stderr
            assert "the checkpoint is written: run the same command to go on" in result.stderr
        result = small.run(*stage)
        assert result.exit_code == 0
        assert ("going on from the checkpoint at step" in result.stderr) == (stage[0] in ("train", "fit"))
        assert not list(Path(".checkpoints").rglob("*.pt")), "a checkpoint stays though its run is done"
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_killed_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [stage for stage in small.STAGES if stage[1].startswith("blobs")]
    count = kill_and_finish(tmp_path, monkeypatch, dict.fromkeys(stages, 10), epochs=60, seed=1)
    print(f"{count} kills")
    assert count >= 50
