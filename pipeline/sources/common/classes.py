"""Data sets with some of their classes alone, for those that don't belong: train without a digit, then look for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.source import Block, Source

__all__ = ["ClassSettings", "of_classes"]


@dataclass(frozen=True, kw_only=True)
class ClassSettings(DatasetSettings):
    """Keys of sources whose examples have labels.

    Attributes:
        classes: Numbers of the classes to keep, counted from 0; by default all.
        class_count: Number of classes; not a key of the row.
    """

    classes: tuple[int, ...] = ()
    class_count: ClassVar[int] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        known = all(0 <= number < self.class_count for number in self.classes)
        check_that(known, "classes", f"must be numbers from 0 to {self.class_count - 1}")
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
    """The source, or its examples of the row's `classes`."""
    return _OfClasses(source, settings.classes) if settings.classes else source
