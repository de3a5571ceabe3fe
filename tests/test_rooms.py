"""Which package may import which, which imports are cheap, and what code never does."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

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


# Floors ---------------------------------------------------------------------------------------------------------------

# From the ground; the longest name that a module begins with counts. A module imports from its own floor and from those below.
FLOORS = (
    ("pipeline.errors",),
    ("pipeline.system", "pipeline.settings"),
    ("pipeline.storage", "pipeline.priors", "pipeline.figures"),
    ("pipeline.training",),
    ("pipeline.sources.common", "pipeline.autoencoders.common", "pipeline.densities.common"),
    ("pipeline.sources", "pipeline.autoencoders", "pipeline.densities"),
    ("pipeline.evaluation",),
    ("pipeline",),  # the actions
    ("stages.workspace",),
    ("stages.arrays", "stages.tracking", "stages.launching"),
    ("stages.reporting",),
    ("stages.run",),
    ("stages", "stages.tools"),
    ("stages.__main__",),
)
ACTIONS = ("preparation", "extraction", "fitting", "sampling", "scoring", "completion", "detection", "examples")
CHOICES = ("sources", "autoencoders", "densities")


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in ("pipeline", "stages") for path in sorted((PROJECT / folder).rglob("*.py"))}


@functools.cache
def imported(module: str) -> frozenset[str]:
    """Modules of the project that a module imports, at its top or in a function, but for those that only annotations need."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & MODULES.keys()) | ({node.module} if inner - MODULES.keys() else set())
            waiting.append(node)
    return frozenset(found & MODULES.keys())


def floor(module: str) -> int:
    fits = {name: number for number, names in enumerate(FLOORS) for name in names if f"{module}.".startswith(f"{name}.")}
    return fits[max(fits, key=len)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_down(module: str) -> None:
    assert not {other for other in imported(module) if floor(other) > floor(module)}


def test_imports_go_in_no_circle() -> None:
    graphlib.TopologicalSorter({module: imported(module) - {module} for module in MODULES}).prepare()


def test_the_report_reads_files_and_acts_on_nothing() -> None:
    reporting = {module for module in MODULES if module.startswith("stages.reporting")}
    assert not {other for module in reporting for other in imported(module)} & {f"pipeline.{name}" for name in ACTIONS}


# What reruns what -----------------------------------------------------------------------------------------------------

# What decides no result: messages, progress, the command line, where a stage runs, tracking, and drawing.
PLUMBING = (
    "pipeline.errors",
    "pipeline.system.progress",
    "pipeline.system.processes",
    "pipeline.system.watchdog",
    "pipeline.storage.stores",
    "stages.run",
    "stages.workspace",
    "stages.arrays",
    "stages.tracking",
    "stages.launching",
)


def _is_plumbing(module: str) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in PLUMBING)


def _decisive(module: str) -> set[str]:
    """Files of a module, of the modules that it imports, and so on; choices are found by name, not here."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = MODULES[name].relative_to(PROJECT).as_posix()
        if path not in found and not _is_plumbing(name):
            found.add(path)
            waiting += imported(name)
    # The file of a package says where its modules are, no more.
    return {path for path in found if not path.endswith("__init__.py")}


def _dependencies(stage: str) -> list[str]:
    entry = YAML(typ="safe").load(PROJECT / "dvc.yaml")["stages"][stage]
    return [path for path in entry.get("do", entry)["deps"] if path.startswith(("pipeline", "stages"))]


def _covers(dependency: str, path: str) -> bool:
    return path == dependency or path.startswith(f"{dependency}/")


STAGES = ("prepare", "features", "control", "train", "extract", "fit", "sample", "evaluate", "report")


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_imports_is_among_its_dependencies(stage: str) -> None:
    dependencies = _dependencies(stage)
    missing = {
        path for path in _decisive(f"stages.{stage}") if not any(_covers(dependency, path) for dependency in dependencies)
    }
    missing -= {"pipeline/densities/auto.py"}  # its contest is imported only for rows that name it, which depend on it
    assert not missing, f"add these to the deps of {stage} in dvc.yaml"


@pytest.mark.parametrize("stage", STAGES)
def test_a_dependency_is_imported_or_a_choice(stage: str) -> None:
    decisive = _decisive(f"stages.{stage}")
    for dependency in _dependencies(stage):
        folder, _, name = dependency.rpartition("/")
        if name.startswith("${item."):
            decisive = decisive.union(*(_decisive(choice) for choice in _choices(folder)))
    spare = {d for d in _dependencies(stage) if "$" not in d and not any(_covers(d, path) for path in decisive)}
    spare -= {"stages/arrays.py", "stages/reporting/templates"} if stage == "report" else set()
    assert not spare, f"take these out of the deps of {stage} in dvc.yaml"


def _choices(folder: str) -> list[str]:
    return [f"{folder.replace('/', '.')}.{path.stem}" for path in (PROJECT / folder).glob("*.py") if path.stem != "__init__"]


@pytest.mark.parametrize("package", CHOICES)
def test_what_a_choice_imports_is_among_the_dependencies_of_those_who_name_it(package: str) -> None:
    for stage in STAGES:
        dependencies = _dependencies(stage)
        if not any(d.startswith(f"pipeline/{package}/${{") for d in dependencies):
            continue
        for choice in _choices(f"pipeline/{package}"):
            own = MODULES[choice].relative_to(PROJECT).as_posix()
            paths = {path for path in _decisive(choice) if path != own}
            if choice == "pipeline.sources.union":  # whose rows name sources by a list
                paths -= {f"pipeline/sources/{name}.py" for name in ("celeba", "images", "shoes")}
            missing = {path for path in paths if not any(_covers(d, path) for d in dependencies)}
            assert not missing, f"{choice}: add these to the deps of {stage} in dvc.yaml"
