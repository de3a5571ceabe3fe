"""What all normalising flows have in common; their transformations are zuko's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from pipeline.densities.common.density import Density, standard_normal
from pipeline.settings import Checked, check_that

__all__ = ["AutoregressiveOptions", "FlowOptions", "NormalisingFlow"]


@dataclass(frozen=True, kw_only=True)
class FlowOptions(Checked):
    """Options that all flows have.

    Attributes:
        transforms: Transformations, one after another.
        hidden: Units of the hidden layers of each transformation's network.
    """

    takes_context: ClassVar[bool] = True

    transforms: int = 5
    hidden: tuple[int, ...] = (256, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.transforms >= 1, "transforms", "must be at least 1")
        check_that(len(self.hidden) > 0 and min(self.hidden) >= 1, "hidden", "must list numbers of at least 1")


@dataclass(frozen=True, kw_only=True)
class AutoregressiveOptions(FlowOptions):
    """Options that all autoregressive flows have.

    Attributes:
        residual: Whether layers of equal width become residual blocks.
    """

    residual: bool = False


class NormalisingFlow(Density):
    r"""A normalising flow, :math:`\log p(z) = \log \mathcal{N}(f(z); 0, I) + \log |\det \partial f / \partial z|`.

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of the family's `Options`.
    """

    options_type = FlowOptions
    has_meta = False  # masks are computed from values
    chunk_examples = sample_chunk_examples = 1024

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        context = 0 if self.context is None else self.context.features  # the flows' own: networks read it with the code
        self.flow = self._flow(
            features=dim, context=context, transforms=self.options.transforms, hidden_features=self.options.hidden
        )

    def _autoregressive(self) -> dict[str, Any]:
        """Arguments of zuko's autoregressive transformations; in one dimension they are elementwise and know no such blocks."""
        return {"residual": self.options.residual} if self.dim > 1 else {}

    def _flow(self, **common: Any) -> Any:
        """The flow, from what all flows of zuko are made of."""
        raise NotImplementedError

    def _log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        value: Tensor = self.flow(context).log_prob(z)
        return value

    def _sample(self, n: int, generator: Generator | None, context: Tensor | None = None) -> Tensor:
        z = standard_normal((n, self.dim), self.shift, generator)
        for transform in reversed(self.flow.transform.transforms):
            z = self._inverse(transform, z, context)
        return z

    @staticmethod
    def _inverse(transform: Any, y: Tensor, context: Tensor | None) -> Tensor:
        """The inverse of one transformation, (n, D) -> (n, D)."""
        x: Tensor = transform(context).inv(y)
        return x
