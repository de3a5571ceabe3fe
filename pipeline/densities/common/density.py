"""What all densities have in common: standardisation, chunks, files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from pipeline.densities.common.context import Context
from pipeline.densities.common.transforms import Transform, build_transform
from pipeline.errors import DataError, PipelineError
from pipeline.settings import Checked, DensitySettings, build, implementation
from pipeline.system import draws
from pipeline.system.draws import Randomness
from pipeline.system.files import atomic_file, check_regular

__all__ = [
    "Density",
    "Proceed",
    "build_density",
    "build_described",
    "dropout_mask",
    "load_density",
    "standard_normal",
    "uniform",
]

Codes = Tensor | tuple[Tensor, Tensor]  # codes (B, D), with their contexts (B, C) if the density is conditioned on them
Proceed = Callable[[str, float], bool]  # name and validation log-likelihood of a candidate -> whether to try another

METADATA_KEY = "density"  # one key only: safetensors writes several in no fixed order, and equal models must be equal files


class Density(nn.Module):
    r"""Base of all densities p(z) over codes z with D dimensions.

    Codes are standardised before a family sees them, and the log-determinant is added back:

    .. math:: \log p(z) = \log q\left(\frac{z - \text{shift}}{\text{scale}}\right) - \sum_i \log \text{scale}_i

    or, with a lower triangular factor :math:`L` whose diagonal is the scale,
    :math:`\log q(L^{-1} (z - \text{shift})) - \sum_i \log L_{ii}`; dimension i then depends on :math:`z_1, \ldots, z_i` only,
    so that an autoregressive family stays one. Before that, a `transform` may map each column, see
    `pipeline.densities.common.transforms`. Every public method speaks in the units of the data. A family implements
    `_log_prob` and `_sample`, on standardised codes; one that isn't trained by gradient implements `_estimate`.

    A density may be conditioned on a context c of each code, such as its label: :math:`p(z \mid c)`. Without a context,
    `log_prob` is then the marginal :math:`\log \sum_c p(c) \, p(z \mid c)`, with the frequencies p(c) of the training codes,
    and `sample` draws contexts at these frequencies. A family whose `Options` say `takes_context = True` is given the encoded
    contexts (B, E), see `Context`, as an argument `context` of `_log_prob` and `_sample`.

    Arguments:
        dim: The number of dimensions :math:`D`.
        context: What the density is conditioned on; None for nothing.
        options: The fields of the family's `Options`; they are saved with the weights.

    Attributes:
        family: Name of the family, as in params.yaml and as its file.
        options_type: The class of the family's options, each with its meaning, default and range.
        options: Those of this density.
        has_log_prob: Whether the family has a likelihood.
        has_mean_loss: Whether `loss` is a mean over examples. If not, every process computes it on the whole batch.
        has_meta: Whether it can be built on torch's `meta` device, which holds shapes but no values.
        has_vmap: Whether `log_prob` can be transformed by `torch.func.vmap`, `grad` and the like.
        has_given: Whether it can be asked about some dimensions given others.
        candidates: Fits that `estimate` chooses from, at most.
        has_terms: Whether it has a term of the likelihood for each dimension.
        trained_by_gradient: Whether it is trained by the gradient of `loss`; otherwise by `estimate`.
        chunk_examples: Codes scored at once in evaluation mode, which bounds memory.
        gpu_chunks: Chunks of a CPU, made to fit its cache, that a GPU takes at once, to be kept busy.
        sample_chunk_examples: Samples drawn at once.
        retired: Arguments in files of earlier versions that this family never read.
    """

    family: ClassVar[str]
    options_type: ClassVar[type[Checked]] = Checked
    has_log_prob: ClassVar[bool] = True
    has_mean_loss: ClassVar[bool] = True
    has_meta: bool = True
    has_vmap: bool = True
    has_terms: bool = False
    trained_by_gradient: ClassVar[bool] = True
    gpu_chunks: ClassVar[int] = 8
    retired: ClassVar[frozenset[str]] = frozenset()
    candidates: int = 1
    chunk_examples: int = 4096
    sample_chunk_examples: int = 4096

    shift: Tensor
    scale: Tensor
    factor: Tensor | None
    transform: Transform | None
    context: Context | None

    options: Any

    def __init__(self, dim: int, *, context: Context | None = None, **options: Any) -> None:
        super().__init__()
        if dim < 1:
            raise PipelineError(f"a density needs at least 1 dimension, not {dim}")
        self.dim = dim
        self.options = build(self.options_type, options, self.family)
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("factor", None)
        self.transform = None
        if context is not None and not getattr(self.options, "takes_context", False):
            raise PipelineError(
                f"'{self.family}' can't be conditioned on a context: leave out `context`, or take another family"
            )
        self.context = context

    # What a family implements

    def _log_prob(self, z: Tensor) -> Tensor:
        """Log-density (B,) in nats of standardised codes (B, D)."""
        raise PipelineError(f"'{self.family}' has no likelihood; ask for a Parzen score of its samples instead")

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        """Standardised samples (n, D), for n up to `sample_chunk_examples`."""
        raise NotImplementedError

    @property
    def has_given(self) -> bool:
        """Whether `log_prob` and `sample` take `given`."""
        return False

    def _log_prob_given(self, z: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-densities (B,) in nats: of the observed dimensions, and of the others given these.

        Codes z (B, D) are standardised by shift and scale alone, not by the factor; `given` (B, D) says what is observed.
        """
        raise NotImplementedError

    def _sample_given(
        self, n: int, z: Tensor, given: Tensor, generator: Generator | None, context: Tensor | None = None
    ) -> Tensor:
        """Completed codes (n, B, D), from codes (B, D) as `_log_prob_given` has them, with 0 where a number is missing."""
        raise NotImplementedError

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        """`estimate` on standardised codes, each block (B, D), or (B, D + E) with the encoded contexts behind the codes."""
        raise PipelineError(f"'{self.family}' is trained by gradient steps on its loss, not in one go")

    def chosen(self) -> dict[str, float]:
        """What `estimate` chose among the options' candidates, by name; for the metrics of `fit`."""
        return {}

    def hidden_matrices(self) -> list[Tensor]:
        """The weights between hidden layers, matrices or stacks of them, of families that can be trained by Muon."""
        return []

    # What a user calls

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Sets shift and scale.

        Arguments:
            mean: The mean of the training codes, with shape (D,), or () for one of all dimensions.
            std: Their standard deviation, with the same shape; or the Cholesky factor of their covariance, with shape (D, D).

        Raises:
            DataError: When some dimension doesn't vary or isn't finite, or a shape is another.
        """
        mean, std = (torch.as_tensor(value).to(self.shift) for value in (mean, std))
        if mean.shape not in ((), (self.dim,)) or std.shape not in ((), (self.dim,), (self.dim, self.dim)):
            raise DataError(
                f"a mean with shape {tuple(mean.shape)} and a scale with shape {tuple(std.shape)} "
                f"don't fit {self.dim} dimensions"
            )
        factor = std.tril() if std.ndim == 2 else None
        mean, std = (value.expand(self.dim) for value in (mean, std if factor is None else factor.diagonal()))
        good = torch.isfinite(mean) & torch.isfinite(std) & (std > 0)
        if factor is not None:
            good &= torch.isfinite(factor).all(dim=1)
        if not good.all():
            bad = ", ".join(str(i) for i in torch.nonzero(~good).flatten().tolist())
            raise DataError(
                f"the codes don't vary or aren't finite in dimension {bad} (counted from 0), so there is no density to fit"
            )
        self.shift.copy_(mean)
        self.scale.copy_(std)
        self.factor = factor

    def _check(self, z: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise DataError(f"expected codes with shape (B, {self.dim}), got {tuple(z.shape)}")
        if torch.promote_types(z.dtype, self.shift.dtype) != self.shift.dtype:
            raise DataError(
                f"codes in {z.dtype} are wider than this density in {self.shift.dtype}: convert the one or the other"
            )

    def _standardised(self, z: Tensor) -> Tensor:
        self._check(z)
        if self.transform is not None:
            z = self.transform(z)
        if self.factor is not None:
            whitened: Tensor = torch.linalg.solve_triangular(self.factor.T, z - self.shift, upper=True, left=False)
            return whitened
        return (z - self.shift) / self.scale

    def _restored(self, z: Tensor, generator: Generator | None) -> Tensor:
        """The inverse of `_standardised`, for samples."""
        z = torch.addmm(self.shift, z, self.factor.T) if self.factor is not None else self.shift + z * self.scale
        return z if self.transform is None else self.transform.inverse(z)

    def _encoded(self, context: Tensor | None, count: int, check: bool = True) -> dict[str, Tensor]:
        """What `_log_prob` and `_sample` are given besides: nothing, or encoded contexts with shape (B, E)."""
        if self.context is None:
            if context is not None:
                raise PipelineError(f"this density '{self.family}' wasn't fitted with a context: leave it out")
            return {}
        if context is None:
            raise PipelineError(f"this density is conditioned on {', '.join(self.context.names)}: give a context")
        if len(context) != count:
            raise DataError(f"{count} codes have {len(context)} contexts")
        return {"context": self.context.encode(context, check)}

    @property
    def likelihood(self) -> str:
        """What scores call the log-likelihood of codes given their contexts, if there are any."""
        return "log_likelihood" if self.context is None else "conditional_log_likelihood"

    @property
    def has_marginal(self) -> bool:
        """Whether `log_prob` needs no context: there is none, or all contexts of the training codes can be listed."""
        return self.has_log_prob and (self.context is None or self.context.complete)

    @property
    def category_contexts(self) -> int:
        """The number M of contexts, for a family that has parameters of its own for each.

        Raises:
            PipelineError: When they can't be listed: there are numbers among them, or too many combinations.
        """
        if self.context is None or not self.context.complete:
            names = "" if self.context is None else ", ".join(self.context.names)
            raise PipelineError(
                f"'{self.family}' needs a context of few categories, and {names} can't be listed: take the family lde or nsf"
            )
        return len(self.context.rows)

    def joint_log_prob(self, z: Tensor) -> Tensor:
        r"""Log-likelihood of codes together with each context of the training codes, :math:`\log p(c_m) \, p(z \mid c_m)`.

        By Bayes, its softmax over m is the probability of each context given the code.

        Arguments:
            z: The codes, with shape (B, D).

        Returns:
            The logarithms, in nats, with shape (B, M), in the order of `context.rows`.

        Raises:
            PipelineError: When the density isn't conditioned, or has numbers in its context, which can't be listed.
        """
        if self.context is None:
            raise PipelineError(f"this density '{self.family}' wasn't fitted with a context")
        if not self.context.complete:
            raise PipelineError(f"the contexts of this density, {', '.join(self.context.names)}, can't be listed")
        each = [self.log_prob(z, row.expand(len(z), -1)) for row in self.context.rows]
        return torch.stack(each, dim=1) + self.context.weights.log()

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, given: Tensor | None = None) -> Tensor:
        r"""Log-likelihood of codes, in nats a code, in the units of the data.

        With `given`, that of the missing dimensions u given the observed ones o, :math:`\log p(z_u \mid z_o)`. Families whose
        `has_given` is true know it.

        In evaluation mode and without gradients it is computed in chunks, so that memory doesn't grow with B.

        Arguments:
            z: The codes, with shape (B, D).
            context: Of a density that is conditioned, the context of each code, with shape (B, C), or (B,) for one column; None
                for the marginal over the contexts of the training codes.
            given: Which dimensions are observed: booleans with shape (D,), or (B, D) for other ones in each code.

        Returns:
            The log-density, with shape (B,); -inf where a number is infinite, 0 where all numbers are given.

        Raises:
            PipelineError: When the family has no likelihood, or none of some dimensions given others, or there is a context and
                the density isn't conditioned.
            DataError: When z or the context has another shape, z has a wider type than the density, no training code has a
                label, or an observed number isn't finite.
        """
        if given is not None:
            return self._observed_and_missing(z, given, context)[1]
        self._check(z)
        if context is None and self.context is not None and self.context.complete:
            return torch.logsumexp(self.joint_log_prob(z), dim=1)
        encoded = self._encoded(context, len(z))
        if not self.has_vmap and torch._C._are_functorch_transforms_active():
            raise PipelineError(
                f"'{self.family}' can't be transformed by torch.func (vmap, grad, ..): give it a whole batch, and take "
                "gradients by torch.autograd.grad"
            )
        infinite = torch.isinf(z).any(dim=1) & ~torch.isnan(z).any(dim=1)
        # Infinities would become NaN within a network, and so would the gradients of its weights.
        z = torch.where(infinite[:, None], self.shift.to(z.dtype), z)
        log_det = self.scale.log().sum()
        if torch.is_grad_enabled() or self.training:
            value = self._log_prob(self._standardised(z), **encoded) - log_det
        else:
            chunks = self._chunks(z)
            parts = encoded["context"].split(len(chunks[0])) if encoded else (None,) * len(chunks)
            values = [
                self._log_prob(self._standardised(chunk), **({} if part is None else {"context": part}))
                for chunk, part in zip(chunks, parts, strict=True)
            ]
            value = torch.cat(values) - log_det
        value = value if self.transform is None else value + self.transform.log_det(z)
        return value.masked_fill(infinite, -math.inf)

    def _observed_and_missing(self, z: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-likelihoods (B,) in nats, in the units of the data: of the observed dimensions, and of the others given these."""
        self._check(z)
        self._check_has_given()
        if given.dtype != torch.bool or given.shape not in (z.shape, z.shape[1:]):
            raise DataError(
                f"expected given as booleans with shape ({self.dim},) or {tuple(z.shape)}, got {given.dtype} with shape "
                f"{tuple(given.shape)}"
            )
        given = given.to(z.device).expand_as(z)
        if context is None and self.context is not None and self.context.complete:
            rows = [self._observed_and_missing(z, given, row.expand(len(z), -1)) for row in self.context.rows]
            each = torch.stack([torch.stack(row) for row in rows], dim=1)  # (2, M, B)
            joint = self.context.weights.log()[:, None] + each[0]
            evidence = torch.logsumexp(joint, dim=0)
            return evidence, torch.logsumexp(joint - evidence + each[1], dim=0)
        encoded = self._encoded(context, len(z))
        if not torch.isfinite(z[given]).all():
            raise DataError("observed numbers must be finite")
        infinite = torch.isinf(z).any(dim=1) & ~torch.isnan(z).any(dim=1)
        z = torch.where(torch.isinf(z), self.shift.to(z.dtype), z)
        at_once = torch.is_grad_enabled() or self.training
        asked = (self._scaled(z), given, *encoded.values())  # all that the family is asked about
        chunks = [asked] if at_once else zip(*map(self._chunks, asked), strict=True)
        parts = [torch.stack(self._log_prob_given(*chunk)) for chunk in chunks]
        slopes = -self.scale.log().expand_as(z)  # of the map to standardised codes, in each dimension
        slopes = slopes if self.transform is None else slopes + self.transform.log_slopes(z)
        observed, missing = torch.cat(parts, dim=1)
        observed = observed + torch.where(given, slopes, 0).sum(dim=1)
        missing = (missing + torch.where(given, 0, slopes).sum(dim=1)).masked_fill(given.all(dim=1), 0)
        return observed, missing.masked_fill(infinite, -math.inf)

    def _check_has_given(self) -> None:
        if not self.has_given:
            raise PipelineError(
                f"this density of the family '{self.family}' can't predict some dimensions from others: fit a gaussian, a gmm, "
                "a kde, boxes, or an lde with `blocks: attention` and `orders: any`"
            )

    def _scaled(self, z: Tensor) -> Tensor:
        """Codes mapped by the transform and standardised by shift and scale, in each dimension by itself."""
        return ((z if self.transform is None else self.transform(z)) - self.shift) / self.scale

    def _chunks(self, z: Tensor) -> tuple[Tensor, ...]:
        """Codes (B, D) in parts that are computed one after another."""
        parts: tuple[Tensor, ...] = z.split(self.chunk_examples * (self.gpu_chunks if z.is_cuda else 1))
        return parts

    def terms(self, z: Tensor) -> Tensor:
        r"""The terms of the log-likelihood, in nats in the units of the data: which dimensions make a code improbable.

        .. math:: \log p(z) = \sum_{i=1}^D t_i(z)

        A term speaks of its dimension given those that are read before it, so it isn't high or low by the others' merit. With
        a Cholesky factor it is that of the dimension less its linear prediction.

        Arguments:
            z: The codes, with shape (B, D).

        Returns:
            The terms, with shape (B, D), without gradients.

        Raises:
            PipelineError: When the family's likelihood isn't a product over dimensions.
        """
        raise PipelineError(f"the likelihood of '{self.family}' has no term for each dimension")

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The same as `log_prob`."""
        return self.log_prob(z, context)

    def loss(self, z: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> Tensor:
        r"""Training loss :math:`-\frac{1}{D} \log q`, mean over the batch, in nats a dimension of standardised codes (eq. 4).

        Arguments:
            z: The codes in the units of the data, with shape (B, D).
            generator: Source of all randomness, such as dropout.
            context: Their contexts, with shape (B, C), if the density is conditioned.
        """
        return -self._log_prob(self._standardised(z), **self._encoded(context, len(z), check=False)).mean() / self.dim

    @torch.no_grad()
    def sample(
        self,
        n: int,
        generator: Generator | None = None,
        context: Tensor | None = None,
        *,
        given: Tensor | None = None,
    ) -> Tensor:
        """Samples in the units of the data, drawn in evaluation mode whatever the mode of the module.

        With `given`, the missing numbers of codes are drawn given the observed ones, n times for each code. Families whose
        `has_given` is true can do it.

        They are drawn in chunks of `sample_chunk_examples`, so that memory doesn't grow with n beyond the output.

        Arguments:
            n: The number of samples, or of draws for each code.
            generator: Source of randomness. One on the CPU gives the same noise whatever the device of the module.
            context: Of a density that is conditioned, the context of each sample, with shape (n, C), or (n,) for one column;
                None to draw contexts at the frequencies of the training codes first.
            given: The codes to complete, with shape (B, D), NaN where a number is missing.

        Returns:
            The samples, with shape (n, D); with `given` (n, B, D), observed numbers as they are.

        Raises:
            PipelineError: When codes are given to a family that can't complete them.
            DataError: When these have another shape, or an infinite number.
        """
        training = self.training
        self.eval()
        try:
            if given is not None:
                return self._completed(n, given, generator, context)
            if context is None and self.context is not None:
                context = self.context.draw(n, generator)
            encoded = self._encoded(context, n)
            samples = self.shift.new_empty(n, self.dim)
            for start in range(0, n, self.sample_chunk_examples):
                stop = min(start + self.sample_chunk_examples, n)
                part = {name: value[start:stop] for name, value in encoded.items()}
                samples[start:stop] = self._restored(self._sample(stop - start, generator, **part), generator)
            return samples
        finally:
            self.train(training)

    def _completed(self, n: int, values: Tensor, generator: Generator | None, context: Tensor | None) -> Tensor:
        """Draws (n, B, D) of the missing numbers of codes (B, D)."""
        self._check(values)
        self._check_has_given()
        if torch.isinf(values).any():
            raise DataError("observed numbers must be finite")
        given = ~torch.isnan(values)
        z = torch.where(given, self._scaled(values), 0)
        if (
            context is None and self.context is not None and self.context.complete
        ):  # a context for each draw, given the observed
            drawn = self._contexts_given(n, z, given, generator)  # (n, B, C)
            repeated = values.expand(n, -1, -1).flatten(0, 1)
            return self._completed(1, repeated, generator, drawn.flatten(0, 1))[0].view(n, *values.shape)
        encoded = self._encoded(context, len(values))
        samples = self.shift.new_empty(n, *values.shape)
        most = self.sample_chunk_examples
        for start in range(0, n, most):
            draws = slice(start, min(start + most, n))
            for rows in torch.arange(len(z), device=z.device).split(max(1, most // max(n, 1))):
                part = {name: value[rows] for name, value in encoded.items()}
                drawn = self._sample_given(draws.stop - draws.start, z[rows], given[rows], generator, **part)
                drawn = drawn * self.scale + self.shift
                if self.transform is not None:
                    drawn = self.transform.inverse(drawn.flatten(0, 1)).view_as(drawn)
                samples[draws, rows] = torch.where(given[rows], values[rows].to(drawn), drawn)
        return samples

    def _contexts_given(self, n: int, z: Tensor, given: Tensor, generator: Generator | None) -> Tensor:
        """Contexts (n, B, C) drawn from their probabilities given the observed numbers of standardised codes (B, D)."""
        assert self.context is not None
        encoded = self.context.encode(self.context.rows, check=False)
        observed = torch.stack([self._log_prob_given(z, given, row.expand(len(z), -1))[0] for row in encoded])  # (M, B)
        cumulative = torch.softmax(self.context.weights.log()[:, None] + observed, dim=0).cumsum(dim=0)
        levels = uniform((n, len(z)), self.shift, generator) * cumulative[-1]
        return self.context.rows[(cumulative[:, None] <= levels).sum(dim=0).clamp_(max=len(cumulative) - 1)]

    def discrepancy(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """How far samples are from codes, with shape (): what a family without likelihood is validated by."""
        raise NotImplementedError

    def estimate(
        self,
        blocks: Callable[[], Iterable[Codes]],
        valid: Codes,
        seed: int = 0,
        proceed: Proceed = lambda name, value: True,
    ) -> None:
        """Fits a family that isn't trained by gradient.

        Arguments:
            blocks: Gives a new pass over the training codes, in blocks with shape (B, D) in the units of the data; for a
                density that is conditioned, each a pair of codes and contexts (B, C).
            valid: Codes that choices are made on, with shape (N, D), in the units of the data; or a pair, as above.
            seed: Seed of initial values.
            proceed: Told the name of each candidate and its mean log-likelihood of validation codes, in nats in the units of
                the data; says whether there is time for another.

        Raises:
            PipelineError: When the family is trained by gradient.
        """
        with torch.no_grad():
            self._estimate(lambda: (self._joined(block) for block in blocks()), self._joined(valid), seed, proceed)

    def _joined(self, codes: Codes) -> Tensor:
        """Standardised codes (B, D), or (B, D + E) with their encoded contexts behind them."""
        z, context = (codes, None) if isinstance(codes, Tensor) else codes
        return torch.cat([self._standardised(z), *self._encoded(context, len(z)).values()], dim=1)

    @property
    def parameter_count(self) -> int:
        """The number of free parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # A density is built before it is known whether a Cholesky factor goes with its scale.
        factor = state_dict.get(prefix + "factor")
        self.factor = None if factor is None else self.shift.new_empty(factor.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    # Files

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor that gives a density of the same shapes."""
        return {"dim": self.dim, **dataclasses.asdict(self.options)}

    def description(self) -> dict[str, Any]:
        """What `build_described` makes a density of the same shapes from, besides its `factor`: plain types, as in a file."""
        described = {"family": self.family, "arguments": self.arguments()}
        parts = {"transform": self.transform, "context": self.context}
        return described | {name: part.arguments() for name, part in parts.items() if part is not None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: the weights, and in its metadata the family and the constructor's arguments."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        metadata = json.dumps(self.description(), sort_keys=True)
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA_KEY: metadata})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote, in evaluation mode, on the CPU.

        Raises:
            DataError: When the file is missing, damaged or of another family.
        """
        density = load_density(path)
        if not isinstance(density, cls):
            raise DataError(f"{path} holds a density of the family '{density.family}', which isn't a {cls.__name__}")
        return density


_UNREADABLE = (
    *(OSError, SafetensorError, ImportError, AttributeError, LookupError),
    *(TypeError, ValueError, ArithmeticError, RuntimeError, PipelineError),
)


def load_density(path: str | os.PathLike[str]) -> Density:
    """Reads a density of any family, in evaluation mode, on the CPU.

    Raises:
        DataError: When the file is missing, damaged, or no density.
    """
    try:
        check_regular(path)
        with safe_open(Path(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file isn't a mapping)
        description = metadata | {"factor": "factor" in tensors}
        _check_shapes(description, tensors)
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave the global generator alone
            density = build_described(description)
        density.to(tensors["scale"].dtype)
        density.load_state_dict(tensors)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run the stage that fits it") from None
    except _UNREADABLE as error:
        raise DataError(
            f"{path} isn't a saved density ({' '.join(str(error).split())[:200]}); run the stage that fits it again"
        ) from None
    return density.eval()


def build_described(description: Mapping[str, Any]) -> Density:
    """The density of the shapes that `Density.description` gives, its weights to be loaded."""
    model: type[Density] = _model(description)
    arguments = {key: value for key, value in description["arguments"].items() if key not in model.retired}
    if "context" in description:
        arguments["context"] = Context.described(description["context"])
    density = model(**arguments)
    if description.get("factor"):
        density.factor = torch.zeros(density.dim, density.dim)
    if "transform" in description:
        density.transform = build_transform(dim=density.dim, **description["transform"])
    return density


def _model(description: Mapping[str, Any]) -> type[Density]:
    family = description["family"].replace("-", "_")  # `made-mog` in files of earlier versions
    model: type[Density] = implementation("pipeline.densities", family, "family").Model
    return model


def _integers(value: Any) -> Iterator[int]:
    """Integers at any depth of mappings and lists."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_integers, value))
    elif isinstance(value, int):
        yield value


def _check_shapes(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    # Reject files with forged shapes before allocating anything.
    numbers = max(1024, sum(tensor.numel() for tensor in tensors.values()))
    if any(value > numbers for value in _integers(description)):
        raise ValueError("fewer weights than its arguments ask for")
    if not _model(description).has_meta:
        return  # loading the weights will tell
    with torch.device("meta"):
        expected = {name: value.shape for name, value in build_described(description).state_dict().items()}
    if expected != {name: value.shape for name, value in tensors.items()}:
        raise ValueError("weights of other names or shapes than its arguments ask for")


def build_density(settings: DensitySettings, dim: int, context: Context | None = None) -> Density:
    """The untrained density that a row of `densities` describes, of codes with `dim` dimensions and perhaps contexts."""
    model: type[Density] = implementation("pipeline.densities", settings.family, "family").Model
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(model.options_type)}
    return model(dim, context=context, **options)


def uniform(shape: tuple[int, ...], like: Tensor, generator: Randomness | None, dim: int = 0) -> Tensor:
    """Numbers from U[0, 1) in the dtype and on the device of `like`, drawn where the generator lives.

    Arguments:
        shape: Their shape.
        like: A tensor.
        generator: Their source.
        dim: Dimension along which the examples of a batch lie.
    """
    return draws.uniform(shape, generator, like.dtype, _home(generator, like), dim).to(like.device)


def dropout_mask(like: Tensor, rate: float, generator: Randomness | None, dim: int = 0) -> Tensor:
    """Factors for dropout: 0 with probability `rate`, else 1 / (1 - rate); examples lie along `dim`."""
    return (uniform(tuple(like.shape), like, generator, dim) >= rate).to(like.dtype) / (1 - rate)


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: Randomness | None) -> Tensor:
    """Numbers from N(0, 1) in the dtype and on the device of `like`, drawn where the generator lives."""
    return draws.normal(shape, generator, like.dtype, _home(generator, like)).to(like.device)


def _home(generator: Randomness | None, like: Tensor) -> torch.device | None:
    if generator is None:
        return like.device
    return generator.device if isinstance(generator, Generator) else None


def random_subset(blocks: Iterable[Tensor], limit: int, seed: int) -> Tensor:
    """At most `limit` rows of blocks of codes, drawn evenly, in their order: those with the smallest of random keys.

    Raises:
        DataError: When there are no codes.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, keys = list[Tensor](), list[Tensor]()
    for block in blocks:
        rows.append(block.cpu())
        keys.append(torch.rand(len(block), generator=generator, dtype=torch.float64))
        if sum(map(len, rows)) > 2 * limit:
            rows, keys = _smallest(rows, keys, limit)
    if not rows:
        raise DataError("there are no training codes")
    return _smallest(rows, keys, limit)[0][0]


def _smallest(rows: list[Tensor], keys: list[Tensor], limit: int) -> tuple[list[Tensor], list[Tensor]]:
    joined, key = torch.cat(rows), torch.cat(keys)
    indices = key.argsort()[:limit].sort().values
    return [joined[indices]], [key[indices]]
