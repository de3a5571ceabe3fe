"""Who may import whom, what stays light, and what is never done."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((PROJECT / "pipeline").rglob("*.py"))
FORBIDDEN = {"dvc", "mlflow", "click", "stages"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(PROJECT)))
def test_the_library_knows_nothing_of_how_it_is_run(path: Path) -> None:
    assert not imports(path) & FORBIDDEN


def test_the_library_needs_neither_dvc_nor_mlflow_nor_click() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(FORBIDDEN)}));"
        "from pipeline.densities import LatentDensityEstimator as L; print(L(2).sample(3).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "torch.Size([3, 2])" in done.stdout


@pytest.mark.parametrize("path", [*LIBRARY, *sorted((PROJECT / "stages").rglob("*.py"))], ids=lambda p: p.name)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not imports(path) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    text = path.read_text()
    loaders = ("unsafe_load", "UnsafeLoader", "FullLoader", "CLoader", "yaml.Loader")  # of YAML, that make objects
    for word in ("weights_only=False", "allow_pickle=True", "shell=True", *loaders):
        assert word not in text
