"""States of the stages, read from dvc.lock and the existing files, without starting DVC."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.settings import Params
from stages.workspace import TABLE_OF_STAGE

__all__ = ["DONE", "recorded_outs", "states"]

DONE, CHANGED, OUTDATED, MISSING, NOT_RUN = "done", "settings changed", "input changed", "output missing", "not yet run"


def states(params: Params, lock_file: str | Path = "dvc.lock") -> dict[tuple[str, str], str]:
    """The state of each stage of each row.

    `done`, `settings changed` since it ran, `input changed` (an earlier stage isn't done, or has written a different output
    since), `output missing`, `not yet run`. Code and raw files aren't checked; `dvc status` checks them.

    Arguments:
        params: The tables of params.yaml.
        lock_file: DVC's record of what ran.

    Returns:
        States by stage and row; the report's row is "".
    """
    lock = _read_lock(Path(lock_file))
    writers = {out["path"]: (key, _digest(out)) for key, entry in lock.items() for out in entry.get("outs", [])}
    known: dict[str, str] = {}

    def state(key: str) -> str:
        if key not in known:
            known[key] = OUTDATED  # ends the recursion if the lock file has a cycle
            known[key] = _state(key)
        return known[key]

    def _state(key: str) -> str:
        entry = lock.get(key)
        if entry is None:
            return NOT_RUN
        if any(not _same(value, _look_up(params.tables, dotted)) for dotted, value in _recorded(entry)):
            return CHANGED
        for dependency in entry.get("deps", []):
            writer, digest = writers.get(dependency["path"], (None, None))
            if writer is not None and (digest != _digest(dependency) or state(writer) not in (DONE, MISSING)):
                return OUTDATED
        if not all(Path(out["path"]).exists() for out in entry.get("outs", [])):
            return MISSING
        return DONE

    by_row = {(stage, row): state(f"{stage}@{row}") for stage, table in TABLE_OF_STAGE.items() for row in params.rows(table)}
    report = state("report")
    # The report depends on a folder that all other stages write to.
    return by_row | {("report", ""): OUTDATED if report == DONE and set(by_row.values()) - {DONE, MISSING} else report}


def recorded_outs(lock_file: str | Path = "dvc.lock") -> Iterator[tuple[str, str]]:
    """Stage and digest of each output that dvc.lock records."""
    for stage, entry in _read_lock(Path(lock_file)).items():
        for out in entry.get("outs", []):
            if digest := out.get("md5"):
                yield stage, str(digest)


def _recorded(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for values in entry.get("params", {}).values():
        yield from values.items()


def _look_up(tables: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tables
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _digest(item: Mapping[str, Any]) -> object:
    return item.get("md5")


def _same(there: Any, here: Any) -> bool:
    """Whether a value of dvc.lock, with its scalars read as strings, equals a value of params.yaml."""
    if isinstance(here, Mapping):
        return isinstance(there, Mapping) and there.keys() == here.keys() and all(_same(there[key], here[key]) for key in here)
    if isinstance(here, list):
        return isinstance(there, list) and len(there) == len(here) and all(map(_same, there, here))
    if not isinstance(there, str):
        return False
    if isinstance(here, bool):
        return there == str(here).lower()
    if here is None:
        return there in ("", "null", "~")
    try:
        return float(there) == float(here)  # dvc.lock writes 1e-4 as 0.0001
    except (TypeError, ValueError):
        return there == str(here)


def _read_lock(path: Path) -> dict[str, Any]:
    """Entries of dvc.lock by stage, all scalars as strings; none if the file is missing or can't be read."""
    # A base loader makes only strings, lists and mappings, and ignores tags.
    # For a hundred stages the C loader takes about 20 ms, ruamel.yaml seconds. PyYAML comes with MLflow.
    yaml: Any = importlib.import_module("yaml")
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    stages = document.get("stages") if isinstance(document, dict) else None
    return stages if isinstance(stages, dict) else {}
