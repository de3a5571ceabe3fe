"""No stage's peak memory grows with the number of examples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_ten_times_the_data_take_no_more_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "--examples", "2000", "--output", str(tmp_path / "memory.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert {row["stage"] for row in rows} == {"prepare", "features", "control", "train", "extract", "fit", "sample", "evaluate"}
