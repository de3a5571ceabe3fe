"""The list of faults stays one that can be planted."""

from __future__ import annotations

import re

import pytest
from mutants import ROOT, read_faults

FAULTS = read_faults()


def test_names_differ() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_can_be_planted(fault) -> None:
    path = ROOT / fault.file
    planted = fault.planted(path.read_text())
    assert planted != path.read_text()
    compile(planted, fault.file, "exec")
    assert fault.file.startswith(("pipeline/", "stages/", "benchmarks/"))
    assert fault.tests
    for test in fault.tests:
        file, *names = test.split("::")
        text = (ROOT / file).read_text()
        for name in names:
            assert re.search(rf"(def|class) {re.escape(name.partition('[')[0])}\b", text), test
