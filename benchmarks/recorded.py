"""Results of a benchmark that grow run by run, so that it can be stopped, and goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.system.files import read_json, write_json, write_text

__all__ = ["Recorded", "Run"]

Run = dict[str, Any]


class Recorded:
    """The runs in a JSON file, and a page about them next to it, with the ending `.md`. Both are written after each run.

    Arguments:
        path: The JSON file; it may not exist yet.
        page: All runs -> the page, in Markdown.
        place: Keys of a run that say what was measured. A new run replaces the one in its place, which had other settings.

    Attributes:
        runs: The runs, in the order in which they were added.
    """

    def __init__(self, path: Path, page: Callable[[list[Run]], str], place: tuple[str, ...]) -> None:
        self.path, self.page, self.place = path.resolve(), page, place
        self.runs: list[Run] = read_json(self.path)["runs"] if self.path.exists() else []

    def holds(self, key: Run) -> bool:
        """Whether there is a run with these values, settings among them."""
        return any(key.items() <= run.items() for run in self.runs)

    def add(self, run: Run) -> None:
        """Writes both files again, with a new run, and prints it."""
        taken = {name: run[name] for name in self.place}
        self.runs = [other for other in self.runs if not taken.items() <= other.items()] + [run]
        write_json(self.path, {"runs": self.runs})
        write_text(self.path.with_suffix(".md"), self.page(self.runs))
        print(run, flush=True)
