"""Plants the faults of mutants.yaml, one at a time, in a copy of the checkout, and prints which of them the tests notice.

    python -m tests.mutants             # all, with the exit status 1 where one survives
    python -m tests.mutants parzen best # those whose names hold one of the words

A fault is `{name, file, old, new, tests}`: in `file` the text `old`, which must occur exactly once, becomes `new`, and one of
`tests` (files or node ids) must fail. The working tree is never touched.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".yaml")
PATIENCE_SECONDS = 300  # a fault that makes the tests hang counts as caught
# Imported once, before the tests of each fault run in a fork: else each would wait for them.
HEAVY = ("torch", "matplotlib.figure", "sklearn.mixture", "scipy.linalg", "torchmetrics.image.fid", "webdataset", "zuko")
PASSED, FAILED, BROKEN = 0, 1, 2  # exit codes of pytest; the last one where a module can't even be imported


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault to plant."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The text of the file with the fault in it."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} holds the old text {text.count(self.old)} times instead of once")
        return text.replace(self.old, self.new)


def read_faults() -> list[Fault]:
    """The faults of mutants.yaml."""
    from ruamel.yaml import YAML

    return [Fault(**entry | {"tests": tuple(entry["tests"])}) for entry in YAML(typ="safe", pure=True).load(LIST)]


def copy_checkout(folder: Path) -> None:
    """Copies what git knows and what it doesn't ignore, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str]) -> int:
    """Exit code of pytest over the tests of a copy, in a fork; -9 if it takes too long."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        sys.dont_write_bytecode = True  # a fault of the same length in the same second would find the module of the last one
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        with open(folder / "pytest.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and whatever the tests have left
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(words: Sequence[str]) -> int:
    """Plants the faults whose names hold one of the words, or all; the number of those that no test noticed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    faults = [fault for fault in read_faults() if not words or any(word in fault.name for word in words)]
    for module in HEAVY:
        importlib.import_module(module)
    survived = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "checkout"
        copy_checkout(folder)
        tests = sorted({test for fault in faults for test in fault.tests})
        if (code := run_tests(folder, tests)) != PASSED:
            print((folder / "pytest.log").read_text()[-3000:])
            print(f"without any fault the tests end with {code}: nothing can be told")
            return 1
        for fault in faults:
            path = folder / fault.file
            text = path.read_text()
            path.write_text(fault.planted(text))
            started = time.monotonic()
            code = run_tests(folder, fault.tests)
            path.write_text(text)
            caught = code in (FAILED, BROKEN) or code < 0
            survived += not caught
            print(f"{'caught' if caught else 'SURVIVED':8} {time.monotonic() - started:5.1f} s  {fault.name}", flush=True)
    print(f"{len(faults)} faults planted, {len(faults) - survived} caught, {survived} survived")
    return survived


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the names of faults")
    sys.exit(min(main(parser.parse_args().words), 1))
