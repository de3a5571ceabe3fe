"""The latent density estimator: a mixture density network on dilated causal convolutions."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import functional_call

from pipeline.densities.common import mixtures, orders
from pipeline.densities.common.attention import AttentionNetwork, as_pairs
from pipeline.densities.common.causal import CausalNetwork
from pipeline.densities.common.density import Density, standard_normal, uniform
from pipeline.densities.common.first_order import first_order
from pipeline.densities.common.options import NetworkOptions
from pipeline.densities.common.orders import ORDERS
from pipeline.densities.common.recorded import Recorded
from pipeline.densities.common.separate import SeparateNetworks
from pipeline.errors import PipelineError
from pipeline.settings import DensitySettings, check_that
from pipeline.system.devices import has_bfloat16
from pipeline.system.draws import BatchGenerator, Randomness
from pipeline.system.streams import stream_seed

__all__ = ["LatentDensityEstimator", "Options", "Settings"]

Network = CausalNetwork | SeparateNetworks | AttentionNetwork
NETWORKS: dict[str, type[Network]] = {"separate": SeparateNetworks, "attention": AttentionNetwork}  # the others: convolutions


@dataclass(frozen=True, kw_only=True)
class Options(NetworkOptions):
    """Options of the latent density estimator, besides those of its network.

    Attributes:
        min_log_scale: Soft floor on the log standard deviations, in standardised units; null for none.
        max_log_scale: Soft ceiling on them; null for none. It keeps samples from running away where a conditional is asked
            about values beyond those it was trained on, as in heavy-tailed data such as pixels.
        patch_orders: Orders of the pixels of a square patch that the density is averaged over, 1, 2, 4 or 8; scoring takes as
            many times as long.
        training_orders: Orders that training patches are read in, 1, 2, 4 or 8, one drawn for each patch of a batch; 1 for
            the first alone.
        order: Order in which the dimensions are read: 0 for their own; any other number is the seed of a random one.
        orders: `one`: training and scoring read the dimensions in one order. `any`: each training code is read in a random
            order, and any dimensions can be predicted from any others; for `attention` blocks only.
        averaged_orders: With `orders: any`, how many orders the density is averaged over. The first is `order`, the others are
            random; scoring takes as many times as long.
        noise: Standard deviation of Gaussian noise on training codes, in standardised units, for few codes.
        scoring_precision: `float32`, or `bfloat16` for matrix products of scoring. Rounded products make another mixture for
            each conditional. What is scored is a density as well, in a third of the time. It is close to that of
            float32 where standard deviations are well above 0.01 of the means' size. Where the device has no such instructions,
            and for a density in float64, nothing is rounded.
    """

    min_log_scale: float | None = None
    max_log_scale: float | None = None
    patch_orders: int = 1
    training_orders: int = 1
    order: int = 0
    orders: Literal["one", "any"] = "one"
    averaged_orders: int = 1
    noise: float = 0.0
    scoring_precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.patch_orders in ORDERS, "patch_orders", f"must be one of {', '.join(map(str, ORDERS))}")
        check_that(self.order >= 0, "order", "must be 0 or more")
        check_that(self.noise >= 0, "noise", "must be 0 or more")
        check_that(self.training_orders in ORDERS, "training_orders", f"must be one of {', '.join(map(str, ORDERS))}")
        check_that(self.averaged_orders >= 1, "averaged_orders", "must be at least 1")
        if self.orders == "any":
            check_that(self.blocks == "attention", "orders", "`any` is for `blocks: attention` only")
            symmetries = self.patch_orders > 1 or self.training_orders > 1
            check_that(not symmetries, "orders", "`any` holds those of patch_orders and training_orders: leave these out")
        else:
            check_that(self.averaged_orders == 1, "averaged_orders", "is for `orders: any` only")
        if self.min_log_scale is not None and self.max_log_scale is not None:
            check_that(self.min_log_scale < self.max_log_scale, "max_log_scale", "must be greater than min_log_scale")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """The latent density estimator; the defaults are the paper's network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        mixed = self.orders == "any" and self.standardise == "cholesky"
        check_that(not mixed, "standardise", "`cholesky` mixes the dimensions, which `orders: any` keeps apart")


def _several(dim: int, count: int) -> Tensor | None:
    return orders.patch_orders(dim, count) if count > 1 else None


class _LossInParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, density: LatentDensityEstimator, z: Tensor, generator: Randomness | None, *parameters: Tensor
    ) -> Tensor:
        names = [name for name, parameter in density.network.named_parameters() if parameter.requires_grad]

        def loss_and_gradients(z: Tensor) -> list[Tensor]:
            # Leaves of their own: the gradients of the parameters are gathered on the stream that these were first used on,
            # which a recording must not touch.
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            total, sums = z.new_zeros(()), [torch.zeros_like(parameter) for parameter in parameters]
            for packed, source in density._chunks_to_learn(z, generator):
                part, context = density._unpacked(packed)
                with torch.enable_grad():
                    weights = dict(zip(names, leaves, strict=True))
                    outputs = functional_call(density.network, weights, (part, source, context))
                    value = density._mixtures(outputs, part).sum() / (-density.dim * len(z))
                gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
                torch._foreach_add_(sums, gradients)
                total += value.detach()
            return [total, *sums]

        if z.is_cuda and not density._drops:
            read = (*density.network.parameters(), *density.network.buffers())
            total, *sums = density._recorded(loss_and_gradients, z, *read)
        else:
            total, *sums = loss_and_gradients(z)
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *torch._foreach_mul(ctx.saved_tensors, grad)


class LatentDensityEstimator(Density):
    r"""The latent density estimator (LDE).

    .. math:: \log p(z) = \sum_{i=1}^D \log \sum_{k=1}^K \pi_{ik} \, \mathcal{N}(z_i; \mu_{ik}, \sigma_{ik}^2)

    The parameters of the i-th conditional come from features :math:`h_i` of :math:`z_{<i}`. They are made by
    :math:`L = \lceil \log_2 D \rceil` causal convolutions with kernel 2, dilations 1, 2, 4, .. and 16, 32, 64, .. filters, from
    the values and a mask that is 1 on values and 0 on the padding before them. It is exact: no floor inside the logarithm.

    With a context c of each code, such as its label, the conditionals are :math:`p(z_i \mid z_{<i}, c)`. It adds a learned
    vector to what the first layer gives at each dimension, and another one to the outputs of the first conditional, which has
    no features of its own.

    A deep network may be told which dimension it is at by a learned vector for each, added to what the first layer gives there;
    else it must count from the padding.

    On padding a layer computes the same vector at every position. It is computed once, which leaves out more than a quarter
    of the work. Drawing keeps what the convolutions have seen, so that all D dimensions cost about as much as one `log_prob`.

    With batch norm, `log_prob` is a density in evaluation mode only: in training mode it mixes the examples of a batch.
    Padded positions count in its statistics, as they do where they are computed.

    The density of square patches can be averaged over the orders in which their pixels can be read, the symmetries :math:`A_m`
    of the square: :math:`p(z) = \frac{1}{M} \sum_{m=1}^M p_1(A_m z)`. Trained in the first order alone, it holds for the others
    as far as patches look alike when turned and mirrored. Trained in all, by :math:`-\log p_1(A_m z)` with m drawn for each
    patch, it is tuned to their mean, and sees each patch in as many ways.

    With `orders: any` an attention network is trained in random orders. It predicts any dimensions u from any others o by
    reading these first, averaged over M orders :math:`\sigma_m` of both:
    :math:`p(z_u \mid z_o) = \frac{1}{M} \sum_m \prod_i p(z_{u_i} \mid z_o, z_{u_{<i}}; \sigma_m)`.

    References:
        | Density Estimation and Incremental Learning of Latent Vector for Generative Autoencoders, section 3.3
        | https://arxiv.org/abs/1902.04294
        | A Deep and Tractable Density Estimator (Uria et al., 2014), for ensembles of orders
        | https://arxiv.org/abs/1310.1757
        | DEformer: an order-agnostic distribution estimating transformer (Alcorn, Nguyen, 2021)
        | https://arxiv.org/abs/2106.06989

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Raises:
        SettingsError: For a setting out of range, or several orders where patches with D numbers aren't square.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> density = LatentDensityEstimator(dim=63, components=10)
        >>> density.parameter_count
        365646
        >>> z = density.sample(2, torch.Generator().manual_seed(0))
        >>> z.shape
        torch.Size([2, 63])
        >>> density.log_prob(z)
        tensor([-117.2049, -128.1442], grad_fn=<MaskedFillBackward0>)
    """

    family = "lde"
    has_vmap = False  # gradients are computed by hand
    options_type = Options
    gpu_chunks = 64

    orders: Tensor | None
    training_orders: Tensor | None
    order: Tensor | None
    averaged_orders: Tensor | None

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.register_buffer("orders", _several(dim, self.options.patch_orders), persistent=False)
        self.register_buffer("training_orders", _several(dim, self.options.training_orders), persistent=False)
        self.register_buffer("order", orders.random_order(dim, self.options.order) if self.options.order else None)
        self.register_buffer("averaged_orders", self._averaged_orders(), persistent=False)
        context = 0 if self.context is None else self.context.features
        self.network: Network = NETWORKS.get(self.options.blocks, CausalNetwork)(dim, self.options, context)
        # Few enough to stay in the cache between two layers (8 MB each); while drawing, as many as make good matrix products
        # of one position at a time, with at most 256 MB of inputs kept.
        self.chunk_examples = max(32, 2**21 // (dim * self.network.features))
        self.sample_chunk_examples = min(1024, max(32, 2**26 // max(self.network.kept, 1)))
        self._recorded = Recorded()

    def _averaged_orders(self) -> Tensor | None:
        """The orders (M, D) that `orders: any` is averaged over."""
        if self.options.orders == "one":
            return None
        first = torch.arange(self.dim) if self.order is None else self.order
        seeds = (stream_seed("averaged orders", self.options.order, m) for m in range(1, self.options.averaged_orders))
        return torch.stack([first, *(orders.random_order(self.dim, seed) for seed in seeds)])

    def _bounded(self, outputs: Tensor) -> Tensor:
        """The network's outputs with the log standard deviations above their floor and below their ceiling."""
        floor, ceiling = self.options.min_log_scale, self.options.max_log_scale
        if floor is None and ceiling is None:
            return outputs
        logits, means, log_scales = mixtures.unpack(outputs)
        if ceiling is not None:
            log_scales = ceiling - F.softplus(ceiling - log_scales)
        if floor is not None:
            log_scales = floor + F.softplus(log_scales - floor)
        return torch.cat([logits, means, log_scales], dim=-1)

    def _log_prob(self, z: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> Tensor:
        if self.averaged_orders is None:
            return self._read(self._ordered(z), generator, context)
        each = torch.stack([self._read(as_pairs(z, order), generator, context) for order in self.averaged_orders])
        return torch.logsumexp(each, dim=0) - math.log(len(each))

    def _ordered(self, z: Tensor) -> Tensor:
        """Standardised codes with their dimensions in the order in which they are read."""
        return z if self.order is None else z[:, self.order]

    def _packed(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """What the network reads, (B, D) or pairs (B, D, 2), and encoded contexts (B, E), as one tensor."""
        return inputs if context is None else torch.cat([inputs.flatten(1), context], dim=1)

    def _unpacked(self, packed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of `_packed`."""
        if self.context is None:
            return packed, None
        inputs, context = packed.split([packed.shape[1] - self.context.features, self.context.features], dim=1)
        return inputs if inputs.shape[1] == self.dim else inputs.unflatten(1, (self.dim, 2)), context

    def _read(self, inputs: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> Tensor:
        """Log-density (B,) of what the network reads: codes (B, D), or pairs (B, D, 2) as `as_pairs` gives them."""
        return self._mixtures(self.network(inputs, generator, context), inputs)

    def _mixtures(self, outputs: tuple[Tensor, Tensor], inputs: Tensor) -> Tensor:
        """Log-density (B,) of what the network read, from its outputs."""
        first, others = self._terms(outputs, inputs)
        return first + others.sum(dim=0)

    def _terms(self, outputs: tuple[Tensor, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of the first number that the network read (B,), and of each other given those before (D - 1, B)."""
        first, others = map(self._bounded, outputs)
        z = inputs if inputs.ndim == 2 else inputs[..., 0]
        value = mixtures.log_likelihood(first.expand(len(z), -1), z[:, 0])
        return value, mixtures.log_likelihood(others, z[:, 1:].T)

    def loss(self, z: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> Tensor:
        """The loss of equation 4, see `Density.loss`; orders and dropout are drawn from the generator.

        Its gradient with respect to the parameters is computed at once, chunk after chunk, so that features stay in the cache
        and memory doesn't grow with B. On a GPU and without dropout it is recorded, and replayed for all further batches of the
        same length.
        """
        encoded = self._encoded(context, len(z), check=False)
        z = self._standardised(self._in_drawn_order(z, self.training_orders, generator))
        if self.options.noise and self.training:
            z = z + self.options.noise * standard_normal(tuple(z.shape), z, generator)
        inputs = self._ordered(z) if self.options.orders == "one" else as_pairs(z, _random_orders(z, generator))
        normalised = self.training and self.options.normalisation == "batch"  # that needs the batch as a whole
        at_once = len(self._chunks(z)) == 1 and not z.is_cuda
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if normalised or z.requires_grad or not torch.is_grad_enabled() or at_once or not trained:
            return -self._read(inputs, generator, **encoded).mean() / self.dim
        loss: Tensor = _LossInParts.apply(self, self._packed(inputs, **encoded), generator, *trained)
        return loss

    @property
    def _drops(self) -> bool:
        return self.training and self.options.dropout > 0

    def _chunks_to_learn(self, z: Tensor, generator: Randomness | None) -> list[tuple[Tensor, Randomness | None]]:
        """Codes (B, D) in parts that the loss is computed of one after another, each with the source of its dropout."""
        chunks = self._chunks(z)
        if not self._drops or not isinstance(generator, BatchGenerator):
            return [(part, generator) for part in chunks]
        sources = generator.split(len(chunks[0]))
        return list(zip(z.split([len(source.places) for source in sources]), sources, strict=True))

    def _apply(self, *arguments: Any, **keywords: Any) -> Self:
        self._recorded = Recorded()  # weights move away, and a recording holds memory of the GPU
        moved: Self = super()._apply(*arguments, **keywords)
        return moved

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, given: Tensor | None = None) -> Tensor:
        """Log-likelihood of codes, see `Density.log_prob`; averaged over the orders of a patch if there are several."""
        if context is None and self.context is not None:  # the marginal asks again, for each context
            return super().log_prob(z, given=given)
        wanted = self.options.scoring_precision == "bfloat16" and not torch.is_grad_enabled()
        rounded = wanted and self.shift.dtype == torch.float32 and has_bfloat16(z.device)
        with torch.autocast(z.device.type, torch.bfloat16) if rounded else contextlib.nullcontext():
            if self.orders is None or given is not None:
                return super().log_prob(z, context, given=given)
            each = [super(LatentDensityEstimator, self).log_prob(orders.reordered(z, order), context) for order in self.orders]
        return torch.logsumexp(torch.stack(each), dim=0) - math.log(len(each))

    def _restored(self, z: Tensor, generator: Generator | None) -> Tensor:
        # The inverse of a random symmetry is a random symmetry.
        return self._in_drawn_order(super()._restored(z, generator), self.orders, generator)

    @staticmethod
    def _in_drawn_order(z: Tensor, several: Tensor | None, generator: Randomness | None) -> Tensor:
        if several is None:
            return z
        drawn = (uniform((len(z),), z, generator) * len(several)).long().clamp_(max=len(several) - 1)
        return orders.reordered(z, several[drawn])

    @property
    def has_terms(self) -> bool:  # type: ignore[override]
        """Whether `terms` are given: not for a mean over several orders or contexts, which is no product."""
        return self.orders is None and self.averaged_orders is None and self.context is None

    @torch.no_grad()
    def terms(self, z: Tensor) -> Tensor:
        r"""The terms :math:`\log p(z_i \mid z_{<i})` of the log-likelihood, see `Density.terms`."""
        if not self.has_terms:
            return super().terms(z)
        self._check(z)
        infinite = torch.isinf(z)
        z = torch.where(infinite, self.shift.to(z.dtype), z)
        parts = []
        for part in self._chunks(z):
            read = self._ordered(self._standardised(part))
            first, others = self._terms(self.network(read), read)
            conditionals = torch.cat([first[:, None], others.T], dim=1)
            parts.append(conditionals if self.order is None else conditionals[:, self.order.argsort()])
        terms = torch.cat(parts) - self.scale.log()
        terms = terms if self.transform is None else terms + self.transform.log_slopes(z)
        return terms.masked_fill(infinite, -math.inf)

    def hidden_matrices(self) -> list[Tensor]:
        """The weights between hidden layers: taps of all convolutions but the first, and the matrices within blocks."""
        return self.network.hidden_matrices()

    def conditionals(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and standard deviations of the mixtures that the dimensions of z are drawn from, given those before.

        With several orders of a patch, those of the first.

        Arguments:
            z: The codes, with shape (B, D).
            context: Their contexts, with shape (B, C), if the density is conditioned.

        Returns:
            Three tensors with shape (B, D, K), in the units of the data.

        Raises:
            PipelineError: When the columns are mapped by a `transform` or read in another `order`.
        """
        if self.transform is not None or self.order is not None or self.averaged_orders is not None:
            raise PipelineError("conditionals are given only without `transform`, and with the dimensions in their own order")
        standardised = self._standardised(z)
        first, others = map(self._bounded, self.network(standardised, **self._encoded(context, len(z))))
        outputs = torch.cat([first.expand(len(z), -1)[None], others]).transpose(0, 1)  # (B, D, 3K)
        logits, means, log_scales = mixtures.unpack(outputs)
        shift = self.shift if self.factor is None else self.shift + standardised @ self.factor.tril(-1).T  # (D) or (B, D)
        scale = self.scale[:, None]
        return torch.softmax(logits, dim=-1), shift[..., None] + scale * means, scale * log_scales.exp()

    def _sample(self, n: int, generator: Generator | None, context: Tensor | None = None) -> Tensor:
        if self.averaged_orders is None:
            z = self._drawn(self.network.walk(context=context), n, generator)
            return z if self.order is None else z[:, self.order.argsort()]
        return self._drawn_in(self._chosen_orders(n, generator), generator, context=context)

    def _chosen_orders(self, n: int, generator: Generator | None) -> Tensor:
        """One of the averaged orders for each of n codes, with shape (n, D)."""
        assert self.averaged_orders is not None
        count = len(self.averaged_orders)
        return self.averaged_orders[(uniform((n,), self.shift, generator) * count).long().clamp_(max=count - 1)]

    def _drawn_in(
        self,
        orders: Tensor,
        generator: Generator | None,
        z: Tensor | None = None,
        counts: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Standardised codes (n, D), each drawn in its own order (n, D); the first `counts` (n,) are those of z (n, D)."""
        assert isinstance(self.network, AttentionNetwork)
        known = None if z is None else z.gather(1, orders)
        drawn = self._drawn(self.network.walk(orders, context=context), len(orders), generator, known, counts)
        return torch.empty_like(drawn).scatter_(1, orders, drawn)

    def _drawn(
        self, walk: Any, n: int, generator: Generator | None, known: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor:
        """Codes (n, D) in the order of the walk; the first `counts` (n,) numbers of each are the known ones (n, D)."""
        # In this order: which component each dimension is drawn from, then the noise within it.
        uniforms = uniform((n, self.dim), self.shift, generator)
        normals = standard_normal((n, self.dim), self.shift, generator)
        z = torch.empty_like(normals)
        outputs = walk.first.expand(n, -1)
        for i in range(self.dim):
            z[:, i] = mixtures.draw(self._bounded(outputs), uniforms[:, i], normals[:, i])
            if known is not None and counts is not None:
                z[:, i] = torch.where(i < counts, known[:, i], z[:, i])
            if i + 1 < self.dim:
                outputs = walk(z[:, : i + 1])
        return z

    @property
    def has_given(self) -> bool:
        """Whether it is read in any order, and no matrix mixes the dimensions before."""
        return self.options.orders == "any" and self.factor is None

    def _log_prob_given(self, z: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert self.averaged_orders is not None
        count, parts = given.sum(dim=1), list[Tensor]()
        for order in self.averaged_orders:
            inputs = as_pairs(z, _observed_first(order.expand_as(given), given))
            first, others = self._terms(self.network(inputs, None, context), inputs)
            terms = torch.cat([first[None], others])  # (D, B)
            known = torch.arange(self.dim, device=z.device)[:, None] < count
            parts.append(torch.stack([torch.where(known == observed, terms, 0).sum(dim=0) for observed in (True, False)]))
        observed, missing = torch.logsumexp(torch.stack(parts), dim=0) - math.log(len(parts))
        return observed, missing

    def _sample_given(
        self, n: int, z: Tensor, given: Tensor, generator: Generator | None, context: Tensor | None = None
    ) -> Tensor:
        z, given = z.repeat(n, 1), given.repeat(n, 1)  # (n B, D)
        context = None if context is None else context.repeat(n, 1)
        orders = _observed_first(self._chosen_orders(len(z), generator), given)
        return self._drawn_in(orders, generator, z, given.sum(dim=1), context).view(n, -1, self.dim)


def _random_orders(z: Tensor, generator: Randomness | None) -> Tensor:
    """A random order for each code, with the shape of z (B, D)."""
    return uniform(tuple(z.shape), z, generator).argsort(dim=1)


def _observed_first(orders: Tensor, given: Tensor) -> Tensor:
    """Orders (B, D) with the observed dimensions before the others, else as they were."""
    return orders.gather(1, (~given.gather(1, orders)).long().argsort(dim=1, stable=True))


Model = LatentDensityEstimator
