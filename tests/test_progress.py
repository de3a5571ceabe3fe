"""Progress of long work in a log."""

from __future__ import annotations

import pytest

from pipeline.system import progress as module
from pipeline.system.progress import Progress


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (
            float("inf"),
            ["work: 1/100 steps, 0.1 steps/s, 16 min left, loss 0.5", "work: 3/100 steps, 0.15 steps/s, 10 min left"],
        ),
        (60.0, ["work: 1/6 steps, 0.1 steps/s, 50 s left, loss 0.5", "work: 3/9 steps, 0.15 steps/s, 40 s left"]),
    ],
)
def test_lines_of_a_log_tell_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, lines: list[str]
) -> None:
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "LOG_SECONDS", 10.0)
    with Progress(100, "work", unit="steps", seconds=seconds) as progress:
        progress.advance(1, loss=0.5)
        progress.advance(2)
    assert capsys.readouterr().err.splitlines() == lines


def test_it_never_runs_past_its_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    with Progress(100, "work", unit="codes") as progress:
        progress.advance(64)
        progress.advance(64)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "work: 64/100 codes",
        "work: 100/100 codes",
    ]


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    with Progress(2, "work", quiet=True) as progress:
        progress.advance(2)
        progress.note(loss=0.5)
    assert capsys.readouterr() == ("", "")
