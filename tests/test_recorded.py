"""Results of a benchmark that grow run by run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.recorded import Recorded, Run


def page(runs: list[Run]) -> str:
    return "".join(f"{run['set']} {run['score']}\n" for run in runs)


def test_a_benchmark_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    recorded = Recorded(path, page, ("set",))
    assert not recorded.holds({"set": "wine"})
    recorded.add({"set": "wine", "seconds": 1, "score": 0.5})
    assert capsys.readouterr().out == "{'set': 'wine', 'seconds': 1, 'score': 0.5}\n"
    Recorded(path, page, ("set",)).add({"set": "iris", "seconds": 1, "score": 0.25})
    again = Recorded(path, page, ("set",))
    assert again.holds({"set": "wine", "seconds": 1})
    assert not again.holds({"set": "wine", "seconds": 2})
    assert (tmp_path / "found.md").read_text() == "wine 0.5\niris 0.25\n"


def test_a_run_replaces_that_of_other_settings_and_no_other(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path / "found.json", page, ("set", "split"))
    for run in (("wine", 0, 1), ("wine", 1, 1), ("iris", 0, 1), ("wine", 0, 2)):
        recorded.add(dict(zip(("set", "split", "seconds"), run, strict=True)) | {"score": 0.0})
    runs = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert [(run["set"], run["split"], run["seconds"]) for run in runs] == [("wine", 1, 1), ("iris", 0, 1), ("wine", 0, 2)]
