"""What a density is conditioned on: columns that belong to each code, categories such as labels, or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pipeline.errors import DataError, SettingsError
from pipeline.settings import Checked, build, check_that

__all__ = ["LABELS", "Column", "Context"]

LABELS = "labels"  # the column that every data set with labels has
NAMED = 10  # levels that a message lists


@dataclass(frozen=True, kw_only=True)
class Column(Checked):
    """A column of the context.

    Attributes:
        name: `labels`, or the name of a column of the data set.
        levels: Of categories the values in the training codes, ascending; empty for numbers.
        words: What each level is called in messages and commands.
    """

    name: str
    levels: tuple[float, ...] = ()
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(len(self.levels) == len(self.words), "words", "must name each level")
        check_that(list(self.levels) == sorted(set(self.levels)), "levels", "must ascend")

    @property
    def features(self) -> int:
        """Numbers that the column is encoded as."""
        return len(self.levels) or 1

    def word(self, value: float) -> str:
        """What a value is called."""
        return dict(zip(self.levels, self.words, strict=True)).get(value, f"{value:g}")

    def value(self, word: str) -> float:
        """The value that a word of a command means.

        Raises:
            SettingsError: When it is no level that the training codes have, or no number.
        """
        if not self.levels:
            try:
                return float(word)
            except ValueError:
                raise SettingsError(f"{self.name}: expected a number, got '{word}'") from None
        if word not in self.words:
            raise SettingsError(self.unseen(word))
        return self.levels[self.words.index(word)]

    def unseen(self, word: str) -> str:
        """What is wrong with a level that no training code has."""
        known = ", ".join(self.words[:NAMED]) + (f" and {len(self.words) - NAMED} more" if len(self.words) > NAMED else "")
        return f"{self.name}: no training code has '{word}'; known: {known}"


class Context(nn.Module):
    r"""The columns that a density is conditioned on, and the contexts that training codes have.

    Families see one vector per code: of each column of categories the indicators of its levels, of numbers the standardised
    number. A linear map of it is a learned vector for each level and a projection of each number.

    Arguments:
        columns: The columns, C of them.
        rows: The number M of contexts that are kept.
        complete: Whether these are all contexts of the training codes, with their frequencies.

    Attributes:
        rows: Contexts, with shape (M, C): all that training codes have, or a random subset.
        weights: Their frequencies, with shape (M,).
        mean: Mean of each column over training codes, with shape (C,); for numbers.
        std: Standard deviation of each column, with shape (C,).

    Example:
        >>> context = Context([Column(name="labels", levels=(3.0, 7.0), words=("3", "7")), Column(name="age")])
        >>> context.encode(torch.tensor([[7.0, 0.5], [3.0, 2.0]]))
        tensor([[0.0000, 1.0000, 0.5000],
                [1.0000, 0.0000, 2.0000]])
    """

    rows: Tensor
    weights: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, columns: Sequence[Column], rows: int = 1, complete: bool = False) -> None:
        super().__init__()
        self.columns, self.complete = tuple(columns), complete
        self.register_buffer("rows", torch.zeros(rows, len(columns)))
        self.register_buffer("weights", torch.full((rows,), 1 / rows))
        self.register_buffer("mean", torch.zeros(len(columns)))
        self.register_buffer("std", torch.ones(len(columns)))

    @classmethod
    def described(cls, arguments: Mapping[str, Any]) -> Context:
        """A context of the shapes that `arguments` gives, its contexts and moments to be loaded."""
        columns = [build(Column, column, "context") for column in arguments["columns"]]
        return cls(columns, int(arguments["rows"]), bool(arguments["complete"]))

    def arguments(self) -> dict[str, Any]:
        """What `described` makes a context of the same shapes from: plain types, as in a file."""
        return {"columns": [asdict(column) for column in self.columns], "rows": len(self.rows), "complete": self.complete}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(column.name for column in self.columns)

    @property
    def features(self) -> int:
        """Length E of the vector that families see."""
        return sum(column.features for column in self.columns)

    def _shaped(self, context: Tensor, count: int) -> Tensor:
        context = context[:, None] if context.ndim == 1 else context
        if context.shape != (count, len(self.columns)):
            raise DataError(
                f"expected a context with shape ({count}, {len(self.columns)}), {', '.join(self.names)} for each code, "
                f"got {tuple(context.shape)}"
            )
        return context.to(self.mean)

    def known(self, context: Tensor) -> Tensor:
        """Which contexts (B, C) have only levels that training codes have, and finite numbers, with shape (B,)."""
        context = self._shaped(context, len(context))
        good = torch.isfinite(context).all(dim=1)
        for column, values in zip(self.columns, context.T, strict=True):
            if column.levels:
                good &= torch.isin(values, values.new_tensor(column.levels))
        return good

    def encode(self, context: Tensor, check: bool = True) -> Tensor:
        """The vectors that families see.

        Arguments:
            context: The contexts, with shape (B, C), or (B,) for one column.
            check: Whether to look for levels that no training code has; that waits for a GPU.

        Returns:
            The vectors, with shape (B, E).

        Raises:
            DataError: When the shape is another, a number isn't finite, or no training code has a level.
        """
        context = self._shaped(context, len(context))
        if check and not (good := self.known(context)).all():
            worst = context[~good][0]
            for column, value in zip(self.columns, worst.tolist(), strict=True):
                if column.levels and value not in column.levels:
                    raise DataError(column.unseen(f"{value:g}"))
            raise DataError(f"a context isn't finite: {', '.join(self.names)} = {worst.tolist()}")
        parts = []
        for number, column in enumerate(self.columns):
            values = context[:, number, None]
            if column.levels:
                parts.append((values == values.new_tensor(column.levels)).to(values.dtype))
            else:
                parts.append((values - self.mean[number]) / self.std[number])
        return torch.cat(parts, dim=1)

    def draw(self, n: int, generator: Generator | None) -> Tensor:
        """Contexts at the frequencies of the training codes, with shape (n, C)."""
        device = self.weights.device if generator is None else generator.device
        levels = torch.rand(n, generator=generator, dtype=torch.float64, device=device).to(self.weights.device)
        cumulative = self.weights.double().cumsum(dim=0)
        chosen = torch.searchsorted(cumulative, levels * cumulative[-1], right=True).clamp_(max=len(cumulative) - 1)
        return self.rows[chosen]

    def classes(self, encoded: Tensor) -> Tensor:
        """Which of the contexts `rows` each encoded one is, with shape (B,); for columns of categories.

        Raises:
            DataError: When it is none of them.
        """
        matches = encoded @ self.encode(self.rows, check=False).T  # (B, M): columns in which the two agree
        best, index = matches.max(dim=1)
        if bool((best < len(self.columns) - 0.5).any()):
            raise DataError(f"no training code has this combination of {', '.join(self.names)}")
        return index

    def title(self, row: Sequence[float]) -> str:
        """What a context is called.

        Example:
            >>> Context([Column(name="labels", levels=(3.0,), words=("three",)), Column(name="age")]).title([3.0, 40.0])
            'three, age 40'
        """
        words = [column.word(value) for column, value in zip(self.columns, row, strict=True)]
        return ", ".join(
            word if column.name == LABELS else f"{column.name} {word}" for column, word in zip(self.columns, words, strict=True)
        )

    def parse(self, words: Mapping[str, str]) -> Tensor:
        """The context that words of a command name, with shape (C,).

        Arguments:
            words: A word for each column, by its name.

        Raises:
            SettingsError: When a column is missing or unknown, or no training code has the level.
        """
        for name in words:
            if name not in self.names:
                raise SettingsError(f"{name}: no column of this density's context, which has {', '.join(self.names)}")
        for name in self.names:
            if name not in words:
                raise SettingsError(f"{name}: give a value for each column of the context, {', '.join(self.names)}")
        return self.mean.new_tensor([column.value(words[column.name]) for column in self.columns])
