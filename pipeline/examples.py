"""New examples of any size, from files like those that a data set is made of: a folder, zip or file of images, or a table."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, printable
from pipeline.settings import DatasetSettings
from pipeline.sources.common.archives import file_stamp, open_files
from pipeline.sources.common.idx import read_idx
from pipeline.sources.common.image_files import ENDINGS, WHITE, decode, find_images, fit, image_names
from pipeline.sources.common.tables import Table, open_table, shared_names
from pipeline.storage.columns import Column, to_codes, varying
from pipeline.system.streams import stream

__all__ = ["Examples", "open_examples"]

AT_ONCE = 256


@dataclass
class Examples:
    """Examples of a path, read in blocks.

    Attributes:
        total: Number of examples; an upper bound if files may be unreadable.
        dimensions: Names of the dimensions of vectors; empty for images.
        unreadable: Files that were skipped, each with the reason; known once they are read.
        deviating: Columns that hold one value in the data set, so that none is scored, and another one in so many rows.
    """

    total: int
    dimensions: tuple[str, ...] = ()
    unreadable: list[str] = field(default_factory=list)
    deviating: Counter[str] = field(default_factory=Counter)

    def blocks(self) -> Iterator[tuple[list[str], NDArray[np.generic]]]:
        """Names of examples, and the examples: pixels 0..255, uint8 with shape (n, C, H, W), or vectors (n, D), float32."""
        raise NotImplementedError


def open_examples(path: Path, settings: DatasetSettings, shape: tuple[int, ...], columns: Sequence[Column] = ()) -> Examples:
    """New examples in the form in which a data set was prepared.

    Arguments:
        path: For images, a folder or zip of them at any depth, one image file, or an IDX file (MNIST's format). For vectors a
            file or folder of a table (`.npy`, `.safetensors`, Parquet, `.csv`, `.tsv`).
        settings: The data set's row: how its images were cut, which columns its vectors are.
        shape: Shape of its examples, (C, H, W) or (D,).
        columns: The columns of the table that its vectors are rows of, by which new rows become vectors; empty for none. Where
            they and those of the file have names, these count, in any order; else the order.

    Raises:
        DataError: When there is nothing of the kind, or it has another shape.
    """
    if not path.exists():
        raise DataError(f"{path} is missing; name a folder, zip or file of what the row was trained on")
    if len(shape) == 1:
        return _Vectors(path, settings, shape[0], columns)
    return (
        _Idx(path, shape)
        if path.is_file() and "-idx3-" in path.name.replace(".idx3-", "-idx3-")
        else _Images(path, settings, shape)
    )


class _Images(Examples):
    """Images of a folder or zip, or a single one, cut and scaled as those of the data set."""

    def __init__(self, path: Path, settings: DatasetSettings, shape: tuple[int, ...]) -> None:
        single = path.is_file() and path.suffix.lower() in ENDINGS
        if not single:
            path = find_images(path, "name a folder, a zip or a file of images")
        self._path, self._shape = path, shape
        self._names = (path.name,) if single else image_names(path)
        self._files = open_files(path.parent if single else path) if not single else None
        self._white = getattr(settings, "white_level", WHITE)
        padded = settings.source == "shoes" or getattr(settings, "fit", "crop") == "pad"
        self._crop = None if padded else float(getattr(settings, "crop", 1.0))
        super().__init__(len(self._names))

    def blocks(self) -> Iterator[tuple[list[str], NDArray[np.generic]]]:
        """See `Examples`."""
        channels, side, _ = self._shape
        names, images = list[str](), list[NDArray[np.uint8]]()
        for name in self._names:
            try:
                data = self._path.read_bytes() if self._files is None else self._files.read(name)
                picture = fit(decode(data, name, self._white), side, self._crop).convert("L" if channels == 1 else "RGB")
            except (OSError, ValueError, KeyError, MemoryError) as error:
                self.unreadable.append(printable(f"{name}: {str(error) or type(error).__name__}"))
                continue
            names.append(name)
            images.append(np.asarray(picture).reshape(side, side, channels).transpose(2, 0, 1))  # HWC -> CHW
            if len(names) == AT_ONCE:
                yield names, np.stack(images)
                names, images = [], []
        if names:
            yield names, np.stack(images)
        elif len(self.unreadable) == self.total:
            raise DataError(f"{self._path}: none of its {self.total} images can be read; the first: {self.unreadable[0]}")


class _Idx(Examples):
    """The images of an IDX file, named by their numbers."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        if shape != (1, 28, 28):
            raise DataError(f"{path} holds images with shape (1, 28, 28), and the row's have {shape}")
        self._images = read_idx(path, 3, file_stamp(path))
        super().__init__(len(self._images))

    def blocks(self) -> Iterator[tuple[list[str], NDArray[np.generic]]]:
        """See `Examples`."""
        for start in range(0, self.total, AT_ONCE):
            images = self._images[start : start + AT_ONCE, None]
            yield [str(start + i) for i in range(len(images))], images


class _Vectors(Examples):
    """The rows of a table, named by their numbers, as codes of the data set's columns; dequantised as the data set was."""

    def __init__(self, path: Path, settings: DatasetSettings, dim: int, columns: Sequence[Column]) -> None:
        tensor = getattr(settings, "tensor", "")
        carried = [getattr(settings, key, "") for key in ("labels", "groups")]
        carried += [name for key in ("categories", "numbers") for name in getattr(settings, key, ())]
        extras = tuple(dict.fromkeys(name for name in carried if name))  # columns that are no dimensions
        named = getattr(settings, "columns", ()) or shared_names(path, tensor, [column.name for column in columns], extras)
        dropped = {column.name: column.constant for column in columns if column.constant is not None}
        self._table = _table(path, tensor, named, extras, tuple(name for name in named if name not in dropped))
        wanted = named or tuple(name for name in self._table.names if name not in extras)
        absent = [name for name in wanted if name not in self._table.names and name not in dropped]
        number = len(columns) or dim
        if dropped and not named and len(wanted) == dim:  # a table without the columns that hold one value
            wanted = tuple(column.name for column in columns)
            absent = [column.name for column in columns if column.constant is None and column.name not in self._table.names]
        if absent or len(wanted) != number:
            problem = f"no column '{absent[0]}'" if absent else f"{len(wanted)} columns of numbers"
            chosen = hasattr(settings, "columns") and len(wanted) > number
            remedy = "; name those of the data set by its setting 'columns'" if chosen else ""
            raise DataError(f"{path} has {problem}, and the row takes vectors of {number} numbers{remedy}")
        dims = varying(columns) or list(range(dim))
        names = tuple(wanted[i] for i in dims)
        places = {name: place for place, name in enumerate(self._table.names)}
        self._numbers = [places[name] for name in names]
        self._columns = [columns[i] for i in dims] if columns else [Column(name=name) for name in names]
        constants = [(name, column.constant) for name, column in zip(wanted, columns, strict=False)]
        self._constants = [(name, places[name], value) for name, value in constants if value is not None and name in places]
        super().__init__(self._table.count, names)

    def blocks(self) -> Iterator[tuple[list[str], NDArray[np.generic]]]:
        """See `Examples`."""
        for start in range(0, self.total, AT_ONCE):
            whole = self._table.rows(start, min(start + AT_ONCE, self.total))
            self.deviating.update({name: int((whole[:, place] != value).sum()) for name, place, value in self._constants})
            rows = whole[:, self._numbers]
            # As in preparation: values without noise would be unlike those of the validation examples.
            vectors = to_codes(self._columns, rows, stream("noise of new rows", start).random(rows.shape))
            if not np.isfinite(vectors).all():
                row, column = np.argwhere(~np.isfinite(vectors))[0]
                raise DataError(
                    f"{self._table.path}: row {start + row}, column '{self.dimensions[column]}' is missing or not finite in "
                    "float32; fill in or take out such rows"
                )
            yield [str(start + i) for i in range(len(vectors))], vectors


def _table(path: Path, tensor: str, columns: tuple[str, ...], extras: tuple[str, ...], needed: tuple[str, ...]) -> Table:
    """The table with all its columns, or with fewer: new rows need neither labels nor columns that hold one value."""
    for named, carried in dict.fromkeys([(columns, extras), (columns, ()), (needed, ())]):
        with contextlib.suppress(DataError):
            return open_table(path, tensor, named, carried)
    return open_table(path, tensor, needed)  # says what is wrong
