"""Random numbers of a training step: each belongs to an example's place in the batch, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from pipeline.system.streams import stream_seed

__all__ = ["BatchGenerator", "Randomness", "integers", "normal", "uniform"]

BLOCK = 64  # places that share a generator


class BatchGenerator:
    """The source of all randomness of a step, for the places of a batch that this process computes.

    Each block of 64 places has a generator, whose seed is a function of (seed, step, block). A process draws for whole blocks
    and takes what belongs to its places. So an example gets the same noise whoever computes it.

    Arguments:
        seed: Seed of the row.
        step: Number of the step.
        batch: Examples of the step, over all processes together.
        places: Those of them that this process computes; all by default.

    Example:
        >>> whole = BatchGenerator(0, step=5, batch=100)
        >>> half = BatchGenerator(0, step=5, batch=100, places=range(50, 100))
        >>> torch.equal(normal((100, 2), whole)[50:], normal((50, 2), half))
        True
    """

    def __init__(self, seed: int, step: int, batch: int, places: range | None = None) -> None:
        self.seed, self.step, self.batch = seed, step, batch
        self.places = range(batch) if places is None else places
        self._generators: dict[int, Generator] = {}  # made when they are first drawn from: most steps draw nothing

    def split(self, examples: int) -> list[BatchGenerator]:
        """Generators of consecutive places, about `examples` each and at least a block, that draw as this one would."""
        unit = max(examples // BLOCK, 1) * BLOCK
        edges = [
            self.places.start,
            *range(-(-(self.places.start + 1) // unit) * unit, self.places.stop, unit),
            self.places.stop,
        ]
        parts = [BatchGenerator(self.seed, self.step, self.batch, range(*pair)) for pair in zip(edges, edges[1:], strict=False)]  # noqa: RUF007
        for part in parts:
            part._generators = self._generators
        return parts

    def draw(self, function: Callable[[Sequence[int], Generator], Tensor], shape: Sequence[int], dim: int) -> Tensor:
        """What `function` draws for these places.

        Arguments:
            function: Draws a tensor of a shape from a generator.
            shape: The shape, with the places along `dim`.
            dim: That dimension.
        """
        if shape[dim] != len(self.places):
            raise ValueError(f"{shape[dim]} examples at {len(self.places)} places of a batch")
        drawn = []
        for block in range(self.places.start // BLOCK, -(-self.places.stop // BLOCK)):
            first, stop = block * BLOCK, min((block + 1) * BLOCK, self.batch)
            if block not in self._generators:
                self._generators[block] = Generator().manual_seed(stream_seed("step", self.seed, self.step, block))
            numbers = function([*shape[:dim], stop - first, *shape[dim + 1 :]], self._generators[block])
            start, end = max(self.places.start, first), min(self.places.stop, stop)
            drawn.append(numbers.narrow(dim, start - first, end - start))
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn, dim)


Randomness = Generator | BatchGenerator


def _drawn(
    function: Callable[[Sequence[int], Generator | None], Tensor], shape: Sequence[int], generator: Randomness | None, dim: int
) -> Tensor:
    if isinstance(generator, BatchGenerator):
        return generator.draw(function, shape, dim)
    return function(shape, generator)


def uniform(
    shape: Sequence[int],
    generator: Randomness | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    dim: int = 0,
) -> Tensor:
    """Numbers from U[0, 1).

    Arguments:
        shape: Their shape.
        generator: Their source.
        dtype: Their type.
        device: Where they are drawn: the generator's device.
        dim: Dimension along which the examples of a batch lie.
    """
    return _drawn(lambda s, g: torch.rand(s, generator=g, dtype=dtype, device=device), shape, generator, dim)


def normal(
    shape: Sequence[int],
    generator: Randomness | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    dim: int = 0,
) -> Tensor:
    """Numbers from N(0, 1), see `uniform`."""
    return _drawn(lambda s, g: torch.randn(s, generator=g, dtype=dtype, device=device), shape, generator, dim)


def integers(high: int, shape: Sequence[int], generator: Randomness | None, dim: int = 0) -> Tensor:
    """Numbers from 0..high-1, see `uniform`."""
    return _drawn(lambda s, g: torch.randint(high, s, generator=g), shape, generator, dim)
