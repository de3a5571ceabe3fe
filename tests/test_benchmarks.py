"""Benchmarks that need a machine of their own run here at toy size, so that they keep working."""

from __future__ import annotations

import math

import pytest

from benchmarks import gpu, lde

TOY = "--device cpu --px 28 --precisions float32 --dims 3 --batch 2 --codes 4 --points 8 --steps 1 --rounds 1 --clock cpu"


def test_the_benchmark_of_a_gpu_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("device", "clock"):
        monkeypatch.setattr(lde, name, getattr(lde, name))
    monkeypatch.setattr(gpu, "write_json", None)  # nothing is written without a GPU
    found = gpu.main([*TOY.split(), "--no-compile", "--no-peak"])
    assert [(row["px"], row["perceptual"]) for row in found["train"]] == [(28, "no"), (28, "yes")]
    assert [row["D"] for row in found["fit"]] == [3]
    for row in (*found["train"], *found["fit"], *found["parzen"]):
        assert all(value > 0 for name, value in row.items() if isinstance(value, float) and not math.isnan(value)), row
        assert [name for name in row if name.endswith("/s")]
    assert "| px | perceptual |" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu.main([])
