"""Monotone maps of each column, for skewed and heavy-tailed codes, with their log-determinants."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.errors import DataError

__all__ = ["TRANSFORMS", "Transform", "build_transform"]

FITTED_CODES = 20_000  # codes that a map is fitted to, at most
BINS = 10  # of the spline of `Quantile`, at most
CODES_PER_BIN = 15  # at least, so that the spline doesn't follow single codes
SMALLEST_GAP = 0.02  # between two knots, in standardised units: repeated values would make the density infinite


class Transform(nn.Module):
    r"""Base of all maps :math:`y_i = T_i(z_i)`, increasing in each column and onto the real line.

    Arguments:
        dim: The number of columns :math:`D`.

    Attributes:
        kind: Name of the map, as the setting `transform` has it.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def arguments(self) -> dict[str, Any]:
        """What `build_transform` needs, besides D, to make a map of the same shapes."""
        return {"kind": self.kind}

    def fit(self, codes: Tensor) -> None:
        """Fits the map.

        Arguments:
            codes: Codes, float64 with shape (N, D).

        Raises:
            DataError: When the map isn't defined for some of them.
        """

    def forward(self, z: Tensor) -> Tensor:
        """Codes (B, D) -> mapped codes (B, D)."""
        raise NotImplementedError

    def log_slopes(self, z: Tensor) -> Tensor:
        r"""The logarithms of the slopes :math:`T_i'(z_i)`, with shape (B, D), of codes (B, D)."""
        raise NotImplementedError

    def log_det(self, z: Tensor) -> Tensor:
        r"""The log-determinant :math:`\sum_i \log T_i'(z_i)`, with shape (B,), of codes (B, D)."""
        return self.log_slopes(z).sum(dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """Mapped codes (B, D) -> codes (B, D)."""
        raise NotImplementedError


class Log(Transform):
    r""":math:`T(z) = \log z`, for positive columns; other codes have density 0.

    Example:
        >>> Log(1).inverse(torch.zeros(1, 1))
        tensor([[1.]])
    """

    kind = "log"

    def fit(self, codes: Tensor) -> None:
        """Raises DataError when a column isn't positive."""
        bad = torch.nonzero((codes <= 0).any(dim=0)).flatten().tolist()
        if bad:
            raise DataError(
                f"transform: log needs positive codes, but dimension {', '.join(map(str, bad))} (counted from 0) has others; "
                "set transform: asinh or power"
            )

    def forward(self, z: Tensor) -> Tensor:
        """See `Transform`."""
        return z.clamp_min(torch.finfo(z.dtype).tiny).log()

    def log_slopes(self, z: Tensor) -> Tensor:
        """See `Transform`."""
        return torch.where(z > 0, -self(z), -torch.inf)

    def inverse(self, y: Tensor) -> Tensor:
        """See `Transform`."""
        return y.exp()


class _Scaled(Transform):
    """A map of u = (z - centre) / width."""

    centre: Tensor
    width: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("width", torch.ones(dim))

    def _set(self, centre: Tensor, width: Tensor) -> None:
        self.centre.copy_(centre)
        self.width.copy_(torch.where(width > 0, width, 1.0))


class Asinh(_Scaled):
    r""":math:`T(z) = \operatorname{asinh}\left(\frac{z - m}{w}\right)`: linear around the median m, a logarithm in both tails.

    The width w is that of the middle half, in units of a Gaussian's standard deviation.

    Example:
        >>> Asinh(1)(torch.tensor([[-1e6], [0.0], [1e6]])).flatten()
        tensor([-14.5087,   0.0000,  14.5087])
    """

    kind = "asinh"

    def fit(self, codes: Tensor) -> None:
        """See `Transform`."""
        low, centre, high = _quantiles(codes, torch.tensor([0.25, 0.5, 0.75]))
        width = (high - low) / 1.349
        self._set(centre, torch.where(width > 0, width, codes.std(dim=0, correction=0)))

    def forward(self, z: Tensor) -> Tensor:
        """See `Transform`."""
        return ((z - self.centre) / self.width).asinh()

    def log_slopes(self, z: Tensor) -> Tensor:
        """See `Transform`."""
        # log sqrt(1 + u^2) = log a + log(1 + (b / a)^2) / 2, with the larger a and the smaller b of 1 and |u|: no overflow.
        size = ((z - self.centre) / self.width).abs()
        larger, smaller = size.clamp_min(1), size.clamp_max(1)
        return -(larger.log() + 0.5 * (smaller / larger).square().log1p() + self.width.log())

    def inverse(self, y: Tensor) -> Tensor:
        """See `Transform`."""
        return self.centre + self.width * y.sinh()


class Power(_Scaled):
    r"""The power transformation of Yeo and Johnson, of standardised columns u.

    .. math:: T(u) = \frac{(1 + u)^\lambda - 1}{\lambda} \text{ for } u \geq 0, \quad
        T(u) = -\frac{(1 - u)^{2 - \lambda} - 1}{2 - \lambda} \text{ for } u < 0

    and the logarithms that these tend to at :math:`\lambda = 0` and 2. Each column's :math:`\lambda` is the most likely one, if
    T(u) is a Gaussian; it lies in [0, 2], where the map is onto the real line.

    References:
        | A new family of power transformations to improve normality or symmetry (Yeo, Johnson, 2000)
        | https://doi.org/10.1093/biomet/87.4.954

    Example:
        >>> Power(1)(torch.tensor([[-2.0], [0.0], [3.0]])).flatten()  # a lambda of 1 is the identity
        tensor([-2.,  0.,  3.])
    """

    kind = "power"

    exponent: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("exponent", torch.ones(dim))

    def fit(self, codes: Tensor) -> None:
        """See `Transform`."""
        mean, std = codes.mean(dim=0), codes.std(dim=0, correction=0)
        u = (codes - mean) / torch.where(std > 0, std, 1.0)
        # log T'(u) = (lambda - 1) sign(u) log(1 + |u|), and the variance of T(u) at its most likely value.
        slope = (u.sign() * u.abs().log1p()).mean(dim=0)
        exponent = torch.ones_like(slope)
        for step, reach in ((0.2, 5), (0.025, 7)):  # all of [0, 2], then around the best: the likelihood has one peak
            tried = [(exponent + step * number).clamp(0, 2) for number in range(-reach, reach + 1)]
            values = [(e - 1) * slope - 0.5 * _power(u, e).var(dim=0, correction=0).log() for e in tried]
            best = torch.stack(values).nan_to_num(-torch.inf).argmax(dim=0)
            exponent = torch.stack(tried).gather(0, best[None])[0]
        self._set(mean, std)
        self.exponent.copy_(exponent)

    def forward(self, z: Tensor) -> Tensor:
        """See `Transform`."""
        return _power((z - self.centre) / self.width, self.exponent)

    def log_slopes(self, z: Tensor) -> Tensor:
        """See `Transform`."""
        u = (z - self.centre) / self.width
        return (self.exponent - 1) * u.sign() * u.abs().log1p() - self.width.log()

    def inverse(self, y: Tensor) -> Tensor:
        """See `Transform`."""
        exponent = torch.where(y < 0, 2 - self.exponent, self.exponent)
        positive = exponent > 0
        safe = torch.where(positive, exponent, 1.0)
        size = torch.where(positive, (y.abs() * safe).log1p() / safe, y.abs()).expm1()
        return self.centre + self.width * y.sign() * size


def _power(u: Tensor, exponent: Tensor) -> Tensor:
    exponent = torch.where(u < 0, 2 - exponent, exponent)
    positive, log = exponent > 0, u.abs().log1p()
    safe = torch.where(positive, exponent, 1.0)
    return u.sign() * torch.where(positive, (log * safe).expm1() / safe, log)


class Quantile(Transform):
    r"""Each column's quantiles to those of a Gaussian: `Asinh`, then a monotone rational-quadratic spline with linear tails.

    The knots of the spline are as many quantiles as the codes support, at most 10.

    References:
        | Neural Spline Flows (Durkan et al., 2019), equations 4 to 8
        | https://arxiv.org/abs/1906.04032

    Arguments:
        dim: The number of columns :math:`D`.
        knots: The number of knots.
    """

    kind = "quantile"

    inputs: Tensor
    outputs: Tensor
    slopes: Tensor

    def __init__(self, dim: int, knots: int = BINS) -> None:
        super().__init__(dim)
        self.asinh = Asinh(dim)
        levels = torch.special.ndtri((torch.arange(knots) + 0.5) / knots)
        self.register_buffer("inputs", levels.repeat(dim, 1))
        self.register_buffer("outputs", levels.repeat(dim, 1))
        self.register_buffer("slopes", torch.ones(dim, knots))

    def arguments(self) -> dict[str, Any]:
        """See `Transform`."""
        return {"kind": self.kind, "knots": self.inputs.shape[1]}

    def fit(self, codes: Tensor) -> None:
        """See `Transform`."""
        self.asinh.fit(codes)
        mapped = self.asinh.double()(codes)
        self.asinh.to(self.inputs)
        knots = min(BINS, max(2, len(codes) // CODES_PER_BIN))
        levels = (torch.arange(knots, dtype=codes.dtype) + 0.5) / knots
        gap = SMALLEST_GAP * mapped.std(dim=0, correction=0).clamp_min(1e-6)[:, None]
        ramp = gap * torch.arange(knots, dtype=codes.dtype)
        inputs = (_quantiles(mapped, levels).T - ramp).cummax(dim=1).values + ramp  # (D, knots)
        outputs = torch.special.ndtri(levels).expand_as(inputs)
        steps, secants = inputs.diff(dim=1), outputs.diff(dim=1) / inputs.diff(dim=1)
        inner = (secants[:, :-1] * steps[:, 1:] + secants[:, 1:] * steps[:, :-1]) / (steps[:, 1:] + steps[:, :-1])
        slopes = torch.cat([secants[:, :1], inner, secants[:, -1:]], dim=1)
        for name, value in (("inputs", inputs), ("outputs", outputs), ("slopes", slopes)):
            self.register_buffer(name, value.to(self.inputs).contiguous())

    def _bin(self, values: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
        """Of values (B, D): starts and lengths of the bins in inputs and outputs, and the slopes at both ends."""
        number = (values[..., None] > knots).sum(dim=-1) - 1  # few knots, and ONNX knows no search
        number = number.clamp(0, knots.shape[1] - 2)
        tables = (self.inputs, self.outputs, self.slopes)
        (x, x_end), (y, y_end), (slope, slope_end) = (
            (table.T.gather(0, number), table.T.gather(0, number + 1)) for table in tables
        )
        return x, x_end - x, y, y_end - y, slope, slope_end

    def _spline(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, D) of the spline, and its derivatives (B, D)."""
        x, width, y, height, slope, slope_end = self._bin(a, self.inputs)
        share, secant = ((a - x) / width).clamp(0, 1), height / width
        bend = share * (1 - share)
        bottom = secant + (slope + slope_end - 2 * secant) * bend
        inside = y + height * (secant * share.square() + slope * bend) / bottom
        top = slope_end * share.square() + 2 * secant * bend + slope * (1 - share).square()
        # Beyond the first and the last knot `share` is 0 or 1, and the derivative is that of the knot.
        outside = slope * (a - x).clamp_max(0) + slope_end * (a - x - width).clamp_min(0)
        return inside + outside, (secant / bottom).square() * top

    def forward(self, z: Tensor) -> Tensor:
        """See `Transform`."""
        return self._spline(self.asinh(z))[0]

    def log_slopes(self, z: Tensor) -> Tensor:
        """See `Transform`."""
        return self._spline(self.asinh(z))[1].log() + self.asinh.log_slopes(z)

    def inverse(self, y: Tensor) -> Tensor:
        """See `Transform`."""
        x, width, start, height, slope, slope_end = self._bin(y, self.outputs)
        rise, secant = torch.minimum((y - start).clamp_min(0), height), height / width
        bend = rise * (slope + slope_end - 2 * secant)
        a, b, c = height * (secant - slope) + bend, height * slope - bend, -secant * rise
        share = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0).sqrt())
        below, above = (y - start).clamp_max(0) / slope, (y - start - height).clamp_min(0) / slope_end
        return self.asinh.inverse(x + share * width + below + above)


TRANSFORMS: dict[str, type[Transform]] = {kind.kind: kind for kind in (Log, Asinh, Power, Quantile)}


def build_transform(kind: str, dim: int, **arguments: Any) -> Transform:
    """The map of that name, for codes with `dim` columns, not fitted yet."""
    return TRANSFORMS[kind](dim, **arguments)


def _quantiles(codes: Tensor, levels: Tensor) -> Tensor:
    """Quantiles (L, D) of codes (N, D), between neighbours linearly; `torch.quantile` refuses large inputs."""
    ordered = codes.sort(dim=0).values
    place = levels.to(codes) * (len(codes) - 1)
    below = place.long()
    above = (below + 1).clamp_max(len(codes) - 1)
    return torch.lerp(ordered[below], ordered[above], (place - below)[:, None])
