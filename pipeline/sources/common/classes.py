"""Data sets with some of their classes alone, for those that don't belong: train without a digit, then look for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import SettingsError
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.source import Block, Source

__all__ = ["ClassSettings", "of_classes"]


@dataclass(frozen=True, kw_only=True)
class ClassSettings(DatasetSettings):
    """Keys of sources whose examples have labels.

    Attributes:
        classes: Numbers of the classes to keep, counted from 0; by default all.
    """

    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(len(set(self.classes)) == len(self.classes), "classes", "names one twice")


class _OfClasses(Source):
    """A source without the examples of other classes; labels and their names stay as they are."""

    def __init__(self, source: Source, classes: tuple[int, ...]) -> None:
        self._source, self._classes = source, classes
        self.counts = source.counts  # an upper bound
        self.kind, self.value_range, self.label_names = source.kind, source.value_range, source.label_names

    def read(self, split: str, start: int, stop: int) -> Block:
        """The examples of these classes among those that the source has there."""
        block = self._source.read(split, start, stop)
        assert block.labels is not None
        kept = np.isin(block.labels, self._classes)
        return Block(examples=block.examples[kept], labels=block.labels[kept])


def of_classes(source: Source, settings: ClassSettings) -> Source:
    """The source, or its examples of the row's `classes`.

    Raises:
        SettingsError: When it has no such class.
    """
    names = source.label_names or ()
    for number in settings.classes:
        if not 0 <= number < len(names):
            raise SettingsError(f"classes: there is no class {number}; they are 0 to {len(names) - 1}")
    return _OfClasses(source, settings.classes) if settings.classes else source
