"""How well images are reconstructed: squared error, PSNR, SSIM, and the error with only the first k latent dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d

from pipeline.errors import DataError
from pipeline.evaluation.blocks import Blocks, rebatch
from pipeline.evaluation.moments import Moments

__all__ = ["OpenDimensions", "PrincipalComponents", "ReconstructionScore", "open_dimension_errors", "opened", "psnr", "ssim"]

SMALLEST_MSE = 1e-10  # below the rounding error of a float32 copy; limits the PSNR of one image to 100 dB
SSIM_WINDOW = 11  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def psnr(mse: NDArray[np.float64]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio, -10 log10(MSE) in dB, for values in 0..1; at most 100 dB.

    Example:
        >>> psnr(np.array([0.01, 0.0])).round(6).tolist()
        [20.0, 100.0]
    """
    return -10 * np.log10(np.maximum(mse, SMALLEST_MSE))


def ssim(images: NDArray[np.float32], reconstructions: NDArray[np.float32]) -> NDArray[np.float64]:
    r"""Structural similarity of each pair, in -1..1: mean over channels and over all windows within the image.

    .. math:: \frac{2 \mu_x \mu_y + c_1}{\mu_x^2 + \mu_y^2 + c_1}
            \cdot \frac{2 \sigma_{xy} + c_2}{\sigma_x^2 + \sigma_y^2 + c_2}

    where c_1 = 0.01^2, c_2 = 0.03^2, and moments are under a Gaussian window of 11 by 11 pixels, sigma 1.5.

    Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004

    Arguments:
        images: Images in 0..1 with shape (n, C, H, W), H and W at least 11.
        reconstructions: Their reconstructions, with the same shape.

    Returns:
        One value per image, with shape (n,).
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float32) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window /= window.sum()
    n, _, height, width = images.shape
    # Second moments about 0.5 lose fewer digits to cancellation than those about 0.
    x, y = (torch.from_numpy(i).reshape(-1, 1, height, width) - 0.5 for i in (images, reconstructions))  # (n C, 1, H, W)
    fields = torch.cat([x, y, x * x, y * y, x * y])
    fields = conv2d(conv2d(fields, window.reshape(1, 1, 1, -1)), window.reshape(1, 1, -1, 1))
    mean_x, mean_y, square_x, square_y, product = fields.chunk(5)
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x.square() + mean_y.square() + SSIM_C1)
    similarity = luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    result: NDArray[np.float64] = similarity.reshape(n, -1).mean(1, dtype=torch.float64).numpy()
    return result


@dataclass
class ReconstructionScore:
    """Streaming scores of reconstructions, in float64. Pixels are in 0..1, whatever the network's range.

    Attributes:
        mse: Squared error, mean over pixels; one value per image.
        psnr: Peak signal-to-noise ratio of each image, in dB; its mean is over images.
        ssim: Structural similarity of each image; empty for vectors and for images smaller than 11 pixels.
        pixels: Values in an image, C H W.

    Example:
        >>> score = ReconstructionScore()
        >>> score.update(np.zeros((2, 1, 16, 16)), np.full((2, 1, 16, 16), 0.1)).round(4).tolist()
        [0.01, 0.01]
        >>> {name: round(value, 4) for name, value in score.metrics("test").items()}
        {'test_mse': 0.01, 'test_mse_se': 0.0, 'test_squared_error': 2.56, 'test_psnr': 20.0, 'test_psnr_se': 0.0,
         'test_ssim': 0.0099, 'test_ssim_se': 0.0}
    """

    mse: Moments = field(default_factory=Moments)
    psnr: Moments = field(default_factory=Moments)
    ssim: Moments = field(default_factory=Moments)
    pixels: int = 0

    def update(self, images: NDArray[np.floating], reconstructions: NDArray[np.floating]) -> NDArray[np.float64]:
        """Adds a block of images in 0..1 and their reconstructions, both with shape (n, C, H, W) or (n, d).

        Returns:
            The squared error of each image, mean over pixels, with shape (n,).
        """
        if images.shape != reconstructions.shape:
            raise DataError(f"images have shape {images.shape}, their reconstructions {reconstructions.shape}")
        if not len(images):
            return np.empty(0)
        images, reconstructions = images.astype(np.float32), reconstructions.astype(np.float32)
        errors: NDArray[np.float64] = (
            np.square(images - reconstructions).reshape(len(images), -1).mean(axis=1, dtype=np.float64)
        )
        self.pixels = images[0].size
        self.mse.update(errors)
        self.psnr.update(psnr(errors))
        if images.ndim == 4 and min(images.shape[2:]) >= SSIM_WINDOW:
            self.ssim.update(ssim(images, reconstructions))
        return errors

    def merge(self, other: ReconstructionScore) -> None:
        """Adds what another rank has seen."""
        self.pixels = max(self.pixels, other.pixels)
        for name in ("mse", "psnr", "ssim"):
            getattr(self, name).merge(getattr(other, name))

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat metrics, each with its standard error; `squared_error` is the sum over the pixels of an image."""
        values: dict[str, float] = {}
        for name in ("mse", "psnr", "ssim"):
            result = getattr(self, name).result()
            if not result.number:
                continue
            values[f"{prefix}_{name}"] = result.mean
            if result.number > 1:
                values[f"{prefix}_{name}_se"] = result.standard_error
            if name == "mse":
                values[f"{prefix}_squared_error"] = result.mean * self.pixels
        return values


@dataclass
class OpenDimensions:
    """Squared error against the number k of open dimensions; the others are zero.

    Attributes:
        ks: Numbers of open dimensions, ascending.
        total: Sum of squared errors over images and pixels, with shape (len(ks),), float64.
        images: Number of images.
        pixels: Values in an image.
    """

    ks: tuple[int, ...]
    total: NDArray[np.float64]
    images: int = 0
    pixels: int = 1

    @property
    def squared_error(self) -> NDArray[np.float64]:
        """Squared error per image, summed over its pixels, with shape (len(ks),)."""
        return self.total / self.images

    @property
    def mse(self) -> NDArray[np.float64]:
        """Squared error, mean over pixels, with shape (len(ks),)."""
        return self.squared_error / self.pixels

    def merge(self, other: OpenDimensions) -> None:
        """Adds what another rank has seen."""
        self.total, self.images, self.pixels = (
            self.total + other.total,
            self.images + other.images,
            max(self.pixels, other.pixels),
        )


def opened(latent_dim: int) -> tuple[int, ...]:
    """Numbers of open dimensions to score: all if there are up to 32, otherwise a dozen at equal ratios.

    Example:
        >>> opened(4), len(opened(200)), opened(200)[-3:]
        ((1, 2, 3, 4), 12, (83, 129, 200))
    """
    if latent_dim <= 32:
        return tuple(range(1, latent_dim + 1))
    return tuple(sorted({round(float(k)) for k in np.geomspace(1, latent_dim, 13)}))


@torch.no_grad()
def open_dimension_errors(
    blocks: Iterable[np.ndarray],
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    ks: Iterable[int],
) -> OpenDimensions:
    """Squared error when only the first k latent dimensions are open, for each k.

    Arguments:
        blocks: Blocks of images in 0..1, each with shape (n, C, H, W) or (n, d).
        encode: Images in 0..1, float32 -> codes with shape (n, D).
        decode: Codes -> images in 0..1 with the shape of the block.
        ks: Numbers of open dimensions.

    Example:
        >>> images = np.eye(3, dtype=np.float32)
        >>> open_dimension_errors([images], lambda x: x, lambda z: z, ks=[0, 1, 2, 3]).squared_error.round(4).tolist()
        [1.0, 0.6667, 0.3333, 0.0]
    """
    ks = tuple(sorted(ks))
    result = OpenDimensions(ks, np.zeros(len(ks)))
    for block in blocks:
        images = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))
        codes = encode(images)
        masked = torch.zeros_like(codes)
        for i, k in enumerate(ks):
            masked[:, :k] = codes[:, :k]
            result.total[i] += float((decode(masked).cpu() - images).square().sum(dtype=torch.float64))
        result.images += len(images)
        result.pixels = images[0].numel()
    return result


class PrincipalComponents:
    r"""Principal components of streamed images: the best linear reconstruction with k dimensions, for every k.

    .. math:: e_k(x) = \| x - \mu \|^2 - \sum_{i \le k} \langle v_i, x - \mu \rangle^2

    Components are computed in one pass; memory holds about a thousand images (Ross et al., Incremental Learning for Robust
    Visual Tracking, 2008, as in scikit-learn).

    Arguments:
        components: Number of components D.

    Example:
        >>> images = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
        >>> pca = PrincipalComponents(2).fit(lambda: [images])
        >>> bool((np.diff(pca.errors([images], ks=[0, 1, 2]).squared_error) < 0).all())
        True
    """

    def __init__(self, components: int) -> None:
        self.components = components
        self.mean: NDArray[np.float64] = np.empty(0)
        self.directions: NDArray[np.float64] = np.empty((0, 0))

    def fit(self, blocks: Blocks) -> PrincipalComponents:
        """Computes mean and directions from blocks of images, each with shape (n, ...)."""
        from sklearn.decomposition import IncrementalPCA  # takes over a second to import

        model = IncrementalPCA(self.components)
        # Large batches lose less beyond the first components; scikit-learn refuses a last batch smaller than D.
        for batch in rebatch(blocks(), max(10 * self.components, 1000)):
            if len(batch) >= self.components:
                model.partial_fit(batch.reshape(len(batch), -1).astype(np.float64))
        if not hasattr(model, "components_"):
            raise DataError(f"PCA: {self.components} components need at least as many images")
        self.mean, self.directions = model.mean_, model.components_
        return self

    def errors(self, blocks: Iterable[np.ndarray], ks: Iterable[int]) -> OpenDimensions:
        """Squared error with the first k components, for each k up to D."""
        ks = tuple(sorted(ks))
        result = OpenDimensions(ks, np.zeros(len(ks)))
        for block in blocks:
            centred = block.reshape(len(block), -1).astype(np.float64) - self.mean
            energy = np.square(centred @ self.directions.T).sum(axis=0)  # (D,)
            explained = np.concatenate([[0.0], np.cumsum(energy)])
            result.total += np.square(centred).sum() - explained[list(ks)]
            result.images += len(block)
            result.pixels = centred.shape[1]
        return result
