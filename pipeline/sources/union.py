"""Several sources of image files as the domains of one data set (section 4.2.2); the label of an image is its domain."""

from __future__ import annotations

import collections
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal

import numpy as np

from pipeline.settings import check_that
from pipeline.sources.common.image_files import ImageFiles, ImageSettings
from pipeline.sources.common.source import Block, Source, generator
from pipeline.storage.parts import SPLITS

__all__ = ["Settings", "Union", "open_source"]


def _modules() -> dict[str, ModuleType]:
    from pipeline.sources import celeba, images, shoes

    return {"celeba": celeba, "images": images, "shoes": shoes}


@dataclass(frozen=True, kw_only=True)
class Settings(ImageSettings):
    """A row of `datasets` with `source: union`; limits hold for each domain.

    Attributes:
        sources: The source of each domain: `celeba`, `shoes` or `images`, with its default settings.
        roots: Path of the raw files of each domain, relative to `root`.
        domains: Names of the domains; by default, those of the sources.
        split: `own` uses the split that a domain's files include, if any; `seeded` always draws one.
    """

    pixel_range: tuple[float, ...] = (-1.0, 1.0)
    sources: tuple[str, ...]
    roots: tuple[str, ...]
    domains: tuple[str, ...] = ()
    split: Literal["own", "seeded"] = "own"
    label: ClassVar[str] = "domain"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.sources:
            check_that(name in _modules(), "sources", f"'{name}' is none of {', '.join(_modules())}")
        check_that(len(self.sources) >= 2, "sources", "must be at least two")
        check_that(len(self.roots) == len(self.sources), "roots", "must name one for each of sources")
        check_that(all(root.strip() and root[0] not in "/~" for root in self.roots), "roots", "must be paths below root")
        names = self.domains or self.sources
        check_that(len(set(names)) == len(self.sources), "domains", "must give each of sources its own name")


class Union(Source):
    """Sources read together: the order of the domains is drawn by seed, each source keeps its own order.

    Arguments:
        sources: The source of each domain.
        names: The name of each domain.
        settings: The row of `datasets`.
    """

    kind = "images"

    def __init__(self, sources: list[ImageFiles], names: tuple[str, ...], settings: Settings) -> None:
        self.sources, self.seed, self.settings = sources, settings.split_seed, settings
        self.label_names = names
        self.value_range = settings.value_range
        self.counts = {split: sum(source.counts[split] for source in sources) for split in SPLITS}
        self.split_origin = "; ".join(f"{name}: {source.split_origin}" for name, source in zip(names, sources, strict=True))
        self.skipped = sum((collections.Counter(source.skipped) for source in sources), collections.Counter[str]())

    def read(self, split: str, start: int, stop: int) -> Block:
        """Images, uint8 with shape (n, C, H, W), and the domain of each."""
        counts = [source.counts[split] for source in self.sources]
        order = generator(self.seed, "union", split).permutation(np.repeat(np.arange(len(counts)), counts))
        examples = np.empty((stop - start, *self.settings.shape), np.uint8)
        readable = np.ones(stop - start, bool)
        unreadable: list[str] = []
        enlarged = dark = 0
        for domain, source in enumerate(self.sources):
            places = np.flatnonzero(order[start:stop] == domain)
            first = int(np.count_nonzero(order[:start] == domain))
            block = source.read(split, first, first + len(places))
            enlarged += block.enlarged
            dark += block.dark
            if not block.unreadable:
                examples[places] = block.examples
                continue
            # Rare: only reading one by one shows which are missing.
            for i, place in enumerate(places):
                single = source.read(split, first + i, first + i + 1)
                unreadable += single.unreadable
                readable[place] = not single.unreadable
                if readable[place]:
                    examples[place] = single.examples[0]
        return Block(
            examples=examples[readable],
            labels=order[start:stop][readable].astype(np.int64),
            unreadable=tuple(unreadable),
            enlarged=enlarged,
            dark=dark,
        )


def open_source(settings: Settings, root: Path) -> Union:
    """The source of a row; `root` is the folder that `roots` are relative to.

    Raises:
        DataError: When the files of a domain are missing or wrong.
    """
    sources = []
    for name, below in zip(settings.sources, settings.roots, strict=True):
        module = _modules()[name]
        own_keys = {field.name for field in fields(module.Settings)} - {"source", "root"}
        common = {key: value for key, value in vars(settings).items() if key in own_keys}
        sources.append(module.open_source(module.Settings(source=name, root=str(root / below), **common), root / below))
    return Union(sources, settings.domains or settings.sources, settings)
