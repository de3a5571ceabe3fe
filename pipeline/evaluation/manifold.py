"""Log-likelihood of decoded images on the decoder's manifold: one number across autoencoders."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp, vjp

from pipeline.autoencoders.common.network import Decoder
from pipeline.densities import Density
from pipeline.evaluation.moments import Moments
from pipeline.storage.codes import CodeReader
from pipeline.storage.shards import to_unit
from pipeline.system.progress import Progress
from pipeline.system.streams import stream_seed

__all__ = ["log_volume", "manifold_log_likelihood", "manifold_scores", "unit_decoder"]

EXACT_DIMENSIONS = 256  # up to here D columns cost less than an estimate
NUMBERS = 2**23  # of a Jacobian that is held at once
PROBES, STEPS = 4, 24  # of the estimate
SCORED_NUMBERS, FEWEST, MOST = 20_000, 100, 1000  # test codes scored: SCORED_NUMBERS / D, within these bounds

Decode = Callable[[Tensor], Tensor]


def unit_decoder(decoder: Decoder) -> Decode:
    """A decoder as a map from codes (B, D) to images (B, P) in 0..1, of P = C * H * W numbers each."""
    return lambda z: to_unit(decoder(z), decoder.value_range).flatten(1)


def log_volume(decode: Decode, codes: Tensor, exact: int = EXACT_DIMENSIONS, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""By how much a decoder stretches volume at codes.

    .. math:: \tfrac{1}{2} \log \det J^\top J, \qquad J = \frac{\partial\, \text{decode}}{\partial z}

    Up to `exact` dimensions J is computed column after column, by forward-mode differentiation. Above, the log-determinant is
    estimated by stochastic Lanczos quadrature from 4 probes of 24 steps, each of which costs a product with J and one with its
    transpose. The error that goes with it is that over probes, together with the change that the last third of the steps made.

    References:
        | Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature (Ubaru, Chen and Saad, 2017)

    Arguments:
        decode: Maps codes (B, D) to outputs (B, P), each by itself.
        codes: The codes, with shape (B, D).
        exact: Dimensions up to which it is exact.
        seed: Seed of the probes.

    Returns:
        The logarithms in nats, and the standard errors of estimates, both float64 with shape (B,); -inf where J has not full
        rank.

    Example:
        >>> values, errors = log_volume(lambda z: torch.cat([3 * z, 4 * z], dim=1), torch.zeros(2, 1))
        >>> values.exp().round(decimals=6).tolist(), errors.tolist()
        ([5.0, 5.0], [0.0, 0.0])
    """
    if codes.shape[1] > exact:
        return _estimated(decode, codes, seed)
    with torch.no_grad():
        outputs = decode(codes[:1]).numel()
    rows = max(1, NUMBERS // (outputs * codes.shape[1]))
    values = torch.cat([_exact(decode, part) for part in codes.split(rows)])
    return values, torch.zeros_like(values)


def _pushed(decode: Decode, codes: Tensor, vectors: Tensor) -> Tensor:
    """J v (B, P) of vectors (B, D)."""
    with warnings.catch_warnings():
        # Torch's first jvp loads rules of its own that are written as it advises against.
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        product: Tensor = jvp(decode, (codes,), (vectors,))[1]
        return product


@torch.no_grad()
def _exact(decode: Decode, codes: Tensor) -> Tensor:
    directions = torch.eye(codes.shape[1], dtype=codes.dtype, device=codes.device)
    columns = [_pushed(decode, codes, direction.expand_as(codes).contiguous()) for direction in directions]
    jacobian = torch.stack(columns, dim=2).double()  # (B, P, D)
    sign, value = torch.linalg.slogdet(jacobian.transpose(1, 2) @ jacobian)
    return torch.where(sign > 0, value / 2, -math.inf)


def _estimated(decode: Decode, codes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(stream_seed("probes of a volume", seed))
    dim = codes.shape[1]
    pulled: Callable[[Tensor], tuple[Tensor]] = vjp(decode, codes)[1]

    def product(vectors: Tensor) -> Tensor:
        return pulled(_pushed(decode, codes, vectors.to(codes)))[0].detach().double()

    estimates, shorter = [], []
    for _ in range(PROBES):
        signs = 2.0 * torch.randint(0, 2, (len(codes), dim), generator=generator, dtype=torch.float64).to(codes.device) - 1
        diagonal, beside = _lanczos(product, signs / math.sqrt(dim), min(STEPS, dim))
        estimates.append(dim * _quadrature(diagonal, beside))
        kept = max(1, 2 * diagonal.shape[1] // 3)
        shorter.append(dim * _quadrature(diagonal[:, :kept], beside[:, : kept - 1]))
    values = torch.stack(estimates)  # (probes, B)
    over_probes = values.std(dim=0) / math.sqrt(PROBES)
    change = (values - torch.stack(shorter)).mean(dim=0)
    return values.mean(dim=0) / 2, torch.hypot(over_probes, change) / 2


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Tridiagonal matrices (B, m) and (B, m - 1) of symmetric operators in the Krylov spaces of unit vectors (B, D)."""
    basis, diagonal, beside = [start], list[Tensor](), list[Tensor]()
    for step in range(steps):
        image = product(basis[-1])
        diagonal.append((image * basis[-1]).sum(dim=1))
        if step + 1 == steps:
            break
        every = torch.stack(basis, dim=1)  # (B, step + 1, D)
        for _ in range(2):  # once more, since rounding leaves some of what was taken out
            image = image - torch.einsum("bsd,bs->bd", every, torch.einsum("bsd,bd->bs", every, image))
        length = image.norm(dim=1)
        beside.append(length)
        basis.append(image / length.clamp_min(torch.finfo(length.dtype).tiny)[:, None])
    return torch.stack(diagonal, dim=1), torch.stack(beside, dim=1) if beside else start.new_empty(len(start), 0)


def _quadrature(diagonal: Tensor, beside: Tensor) -> Tensor:
    """The first entry of the logarithm of tridiagonal matrices, with shape (B,)."""
    matrices = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    nodes, vectors = torch.linalg.eigh(matrices)
    tiny = nodes.amax(dim=1, keepdim=True) * torch.finfo(nodes.dtype).eps ** 2
    values: Tensor = (vectors[:, 0].square() * torch.maximum(nodes, tiny).log()).sum(dim=1)
    return values


def manifold_log_likelihood(density: Density, decoder: Decoder, codes: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log-likelihood of decoded images on the decoder's manifold.

    .. math:: \log p(x) = \log p(z) - \tfrac{1}{2} \log \det J^\top J

    It is in nats per D-dimensional volume, with lengths in units of the pixel range 0..1. Unlike that of codes it doesn't
    change when codes are stretched, so rows of different autoencoders of the same data and the same D are comparable. It leaves
    out how far an image is from the manifold: that is the reconstruction error. Where two codes decode to one image, only one
    of them is counted.

    Arguments:
        density: The density of the codes.
        decoder: The decoder from codes to images.
        codes: The codes z, with shape (B, D).

    Returns:
        Log-likelihoods in nats, and the standard errors of estimates, 0 where the volume is exact; float64 with shape (B,).
    """
    volumes, errors = log_volume(unit_decoder(decoder), codes)
    with torch.no_grad():
        return density.log_prob(codes).double() - volumes, errors


def manifold_scores(density: Density, decoder: Decoder, codes: CodeReader, quiet: bool = False) -> dict[str, float]:
    """Mean log-likelihood of decoded test codes on the manifold, in nats, with its standard error, as metrics.

    Arguments:
        density: The density.
        decoder: The decoder.
        codes: The codes; the first 20,000 / D of the test split are scored, but at least 100 and at most 1,000.
        quiet: Whether to show no progress.
    """
    moments, estimates = Moments(), Moments()
    count = min(codes.index.count("test"), max(FEWEST, min(MOST, SCORED_NUMBERS // codes.index.dim)))
    with Progress(count, "stretch of the decoder", "codes", quiet=quiet) as progress:
        for part in _parts(codes, count):
            values, errors = manifold_log_likelihood(density, decoder, torch.from_numpy(part).to(density.shift.device))
            moments.update(values.cpu().numpy())
            estimates.update(errors.square().cpu().numpy())
            progress.advance(len(part))
    mean, error, number = moments.result()
    scores = {"manifold_log_likelihood": mean, "manifold_log_likelihood_se": error, "manifold_scored": float(number)}
    # The spread of the values holds that of their estimates, which is told apart.
    return scores | ({"manifold_estimate_se": math.sqrt(estimates.mean)} if estimates.mean else {})


def _parts(codes: CodeReader, count: int, rows: int = 64) -> Iterator[np.ndarray]:
    for block in codes.blocks("test", count):
        yield from np.array_split(block["codes"], math.ceil(len(block["codes"]) / rows))
