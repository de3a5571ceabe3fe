"""A copy of the project in its own repository, and what `dvc` does in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Project:
    """A repository with DVC in it.

    Arguments:
        folder: An empty folder.
        params: The text of params.yaml.
        origin: A repository to clone instead of a copy of this one's files.
    """

    def __init__(self, folder: Path, params: str = "", origin: Path | None = None) -> None:
        self.folder = folder
        # Of a `make test` around this: with it, a `make` below says which folder it enters.
        outer = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        self.environment = outer | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TRACKING": "on",
            "HOME": str(folder.parent),
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        if origin is not None:
            self.call("git", "clone", "-q", str(origin), ".")
            self._name_author()
            return
        for name in ("pipeline", "stages", "presets"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "data/raw").mkdir(parents=True)
        shutil.copy(ROOT / "data/raw/.gitignore", folder / "data/raw/.gitignore")
        (folder / ".dvc").mkdir()
        for name in ("config", ".gitignore"):
            shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
        shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
        (folder / "params.yaml").write_text(params)
        self.call("git", "init", "-q")
        self._name_author()
        self.commit()

    def _name_author(self) -> None:
        self.call("git", "config", "user.name", "T")  # `dvc exp run` commits, too
        self.call("git", "config", "user.email", "t@example.org")

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def call(self, *command: str, code: int = 0) -> str:
        process = self.start(*command)
        output, _ = process.communicate(timeout=1500)
        assert process.returncode == code, output[-6000:]
        return output

    def commit(self) -> None:
        self.call("git", "add", "-A")
        self.call("git", "commit", "-q", "--allow-empty", "-m", "state")

    def repro(self) -> set[str]:
        """Runs what is out of date; the names of the stages that ran."""
        output = self.call("dvc", "repro")
        return set(re.findall(r"Running stage '([^']+)'", output))

    def edit(self, old: str, new: str) -> None:
        path = self.folder / "params.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def report(self) -> str:
        return (self.folder / "reports/report.md").read_text()

    def metrics(self) -> dict[str, bytes]:
        folder = self.folder / "reports/metrics"
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.json"))}
