"""The convolutional encoder and decoder of Figure 9."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.settings import build
from pipeline.system.files import atomic_file, check_regular

__all__ = ["Autoencoder", "Decoder", "Encoder", "filter_side", "fitting_blocks", "image_side"]

OUTPUTS = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}  # the decoder's last activation -> range of the pixels
ONE_VALUE = (
    "a batch of one image for each process leaves BatchNorm a single value per channel, since the blocks end at 1x1 pixels: "
    "take a larger batch_size and more training images, or one block less"
)
LOG_VARIANCE_BOUND = 10.0  # deviations between 0.007 and 148

_UNREADABLE = (
    *(OSError, SafetensorError, PipelineError, AttributeError, KeyError),
    *(TypeError, ValueError, RuntimeError),
)


def image_side(blocks: int, filter_side: int) -> int:
    """Side of the images, S * 2^(N+1) pixels for N blocks and the filter side S.

    Example:
        >>> image_side(blocks=1, filter_side=7)
        28
    """
    return filter_side << (blocks + 1)


def filter_side(blocks: int, image_side: int) -> int | None:
    """Filter side S for which images have the side S * 2^(N+1); None if no S fits.

    Example:
        >>> filter_side(blocks=2, image_side=48), filter_side(blocks=2, image_side=28)
        (6, None)
    """
    side, rest = divmod(image_side, 2 ** (blocks + 1))
    return side if side >= 1 and rest == 0 else None


def fitting_blocks(image_side: int) -> int:
    """The most blocks for which the filter side is at least 4 pixels; 0 for images that are too small for that.

    Example:
        >>> [fitting_blocks(side) for side in (28, 32, 48, 64, 128, 6)]
        [1, 2, 2, 3, 4, 0]
    """
    fitting = (blocks for blocks in range(11) if (filter_side(blocks, image_side) or 0) >= 4)
    return max(fitting, default=0)


class _Half(nn.Module):
    """Base of both halves: options, memory format, initial weights, and their file.

    Arguments:
        options: What the network is made of.
        shape: Shape (C, H, W) of an image.

    Attributes:
        blocks: Convolution blocks N.
        filter_side: Filter side S, in pixels.
        extras: Keys that a file's metadata hold for this half, in addition to the options.
        ignored: Options that concern only the other half.

    Raises:
        SettingsError: When images of this shape don't fit the options.
    """

    extras: ClassVar[tuple[str, ...]]
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: ConvolutionOptions, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = shape
        self.blocks = fitting_blocks(height) if options.blocks is None else options.blocks
        side = filter_side(self.blocks, height)
        if height != width or side is None or options.filter_side not in (None, side):
            raise SettingsError(f"blocks: images of {height}x{width} pixels don't fit {self.blocks} blocks")
        self.options = dataclasses.replace(options, blocks=self.blocks)
        self.filter_side, self.image_shape = side, (channels, height, width)

    def _start(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                continue  # shapes alone: `load` puts the weights in
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.orthogonal_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.BatchNorm2d) and self.options.batch_norm_gain == "paper":
                nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
        self.to(memory_format=self._memory_format)

    @property
    def latent_dim(self) -> int:
        """Length D of the code."""
        return self.options.latent_dim

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.options.channels_last else torch.contiguous_format

    def _metadata(self) -> dict[str, Any]:
        """The metadata that determine the network's shapes, as saved."""
        names = [f.name for f in dataclasses.fields(ConvolutionOptions) if f.name not in self.ignored]
        options = {name: getattr(self.options, name) for name in names}
        extras = {name: getattr(self, name) for name in self.extras}
        return options | extras | {"channels": self.image_shape[0], "filter_side": self.filter_side}

    @classmethod
    def _built(cls, metadata: dict[str, Any]) -> Self:
        """The network that the metadata describe."""
        extras = {name: metadata.pop(name) for name in cls.extras}
        channels = metadata.pop("channels")
        options = build(ConvolutionOptions, metadata, cls.__name__)
        side = image_side(options.blocks or 0, metadata["filter_side"])
        return cls(options, (channels, side, side), **extras)

    def save(self, path: str | Path) -> None:
        """Writes weights and settings as one safetensors file, whole or not at all; the same bytes for the same weights."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # Only one key: safetensors writes several in an order that changes from run to run.
        metadata = {"settings": json.dumps({"class": type(self).__name__, **self._metadata()}, sort_keys=True)}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Reads what `save` wrote, in evaluation mode.

        Raises:
            DataError: When the file is missing, truncated, or holds something else.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = json.loads((file.metadata() or {})["settings"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            kind = metadata.pop("class")
            if kind != cls.__name__:
                raise ValueError(f"it holds {kind}; give the other file of the pair")
            with torch.device("meta"):  # neither draws weights nor allocates memory until the shapes are known to agree
                network = cls._built(metadata)
            network.load_state_dict(tensors, assign=True)
            network.to(memory_format=network._memory_format)
        except FileNotFoundError:
            raise DataError(f"{path} is missing; train the autoencoder first") from None
        except (
            OSError,
            SafetensorError,
            PipelineError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path} is no {cls.__name__.lower()} of this pipeline ({reason}); train it again") from None
        return network.eval()


class Encoder(_Half):
    r"""The encoder of Figure 9, with N blocks and the filter side S.

    .. code-block:: text

        Conv(C -> 64, 4x4, stride 2, pad 1), LeakyReLU(0.2)
        Conv(64 * 2^(n-1) -> 64 * 2^n, 4x4, stride 2, pad 1), BatchNorm, LeakyReLU(0.2)      n = 1 .. N
        Conv(64 * 2^N -> D, SxS)

    Weights are orthogonal, biases zero.

    References:
        | Density Estimation and Incremental Learning of Latent Vector for Generative Autoencoders, supplement, section A
        | https://arxiv.org/abs/1902.04294

    Arguments:
        options: What the network is made of: blocks N, length D of the code, ..
        shape: Shape (C, H, W) of an image, S * 2^(N+1) pixels wide and high.
        variational: Whether a second head outputs log-variances, which start at 0.
        generator: Source of the initial weights; PyTorch's own when None.

    Example:
        >>> encoder = Encoder(ConvolutionOptions(blocks=1, latent_dim=8), shape=(1, 28, 28))
        >>> encoder(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 8])
    """

    extras = ("variational",)
    ignored = ("input_normalisation",)

    def __init__(
        self,
        options: ConvolutionOptions,
        shape: tuple[int, ...],
        *,
        variational: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(options, shape)
        self.variational = variational
        width = options.base_channels
        layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for _ in range(self.blocks):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2, inplace=True)]
            width *= 2
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, options.latent_dim, self.filter_side)
        self.log_variance_head = nn.Conv2d(width, options.latent_dim, self.filter_side) if variational else None
        self._start(generator)
        if self.log_variance_head is not None:
            nn.init.zeros_(self.log_variance_head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """The codes, with shape (B, D), of images with shape (B, C, H, W); the means if the encoder is variational."""
        return self._read(self.head, self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The heads' input, with shape (B, base_channels * 2^N, S, S)."""
        if self.training and len(images) == 1 and self.filter_side == 1 and type(self.layers[-2]) is nn.BatchNorm2d:
            raise SettingsError(f"batch_size: {ONE_VALUE}")
        features: Tensor = self.layers(images.contiguous(memory_format=self._memory_format))
        return features

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and log-variance of the variational posterior, each with shape (B, D).

        The head's log-variance l is bounded as :math:`10 \tanh(l / 10)`. Otherwise it could grow in the first steps until the
        noise overflows, in particular if the divergence has a small weight.
        """
        if self.log_variance_head is None:
            raise TypeError("this encoder has no log-variances: it was built with variational=False")
        features = self.features(images)
        log_variance = self._read(self.log_variance_head, features)
        return self._read(self.head, features), LOG_VARIANCE_BOUND * torch.tanh(log_variance / LOG_VARIANCE_BOUND)

    @staticmethod
    def _read(head: nn.Conv2d, features: Tensor) -> Tensor:
        codes: Tensor = head(features).flatten(1)  # (B, D, 1, 1) => (B, D)
        return codes.float()


class Decoder(_Half):
    r"""The decoder of Figure 9, the encoder's mirror.

    .. code-block:: text

        ConvT(D -> 64 * 2^N, SxS)
        ConvT(64 * 2^n -> 64 * 2^(n-1), 4x4, stride 2, pad 1), BatchNorm, LeakyReLU(0.2)     n = N .. 1
        ConvT(64 -> C, 4x4, stride 2, pad 1), tanh or sigmoid

    Weights are orthogonal, biases zero. Nothing follows the first layer in the authors' code.

    References:
        | Density Estimation and Incremental Learning of Latent Vector for Generative Autoencoders, supplement, section A
        | https://arxiv.org/abs/1902.04294

    Arguments:
        options: What the network is made of: blocks N, length D of the code, ..
        shape: Shape (C, H, W) of an image, S * 2^(N+1) pixels wide and high.
        output: `sigmoid` for images in 0..1, `tanh` for images in -1..1.
        generator: Source of the initial weights; PyTorch's own when None.

    Attributes:
        value_range: Least and greatest value of a pixel.

    Example:
        >>> decoder = Decoder(ConvolutionOptions(blocks=3, latent_dim=100), shape=(3, 64, 64), output="tanh")
        >>> decoder(torch.zeros(2, 100)).shape
        torch.Size([2, 3, 64, 64])
    """

    extras = ("output",)

    def __init__(
        self,
        options: ConvolutionOptions,
        shape: tuple[int, ...],
        *,
        output: str = "sigmoid",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(options, shape)
        self.output, self.value_range = output, OUTPUTS[output]
        width = options.base_channels * 2**self.blocks
        layers: list[nn.Module] = [nn.ConvTranspose2d(options.latent_dim, width, self.filter_side)]
        if options.input_normalisation:
            layers += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2, inplace=True)]
        for _ in range(self.blocks):
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
                nn.BatchNorm2d(width // 2),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width //= 2
        layers.append(nn.ConvTranspose2d(width, shape[0], 4, 2, 1))
        self.layers = nn.Sequential(*layers)
        self._start(generator)

    def forward(self, codes: Tensor) -> Tensor:
        """The images, with shape (B, C, H, W), float32 and in `value_range`, of codes with shape (B, D)."""
        columns = codes[:, :, None, None]  # (B, D) => (B, D, 1, 1)
        logits: Tensor = self.layers(columns.contiguous(memory_format=self._memory_format)).float()
        return torch.sigmoid(logits) if self.output == "sigmoid" else torch.tanh(logits)


class Autoencoder(nn.Module):
    """An encoder and a decoder of the same options, drawn from one generator.

    Arguments:
        options: What the network is made of.
        shape: Shape (C, H, W) of an image.
        value_range: Least and greatest value of a pixel, (0, 1) or (-1, 1).
        variational: Whether the encoder also outputs log-variances.
        generator: Source of the initial weights; PyTorch's own when None.

    Raises:
        SettingsError: When images of this shape or range don't fit.

    Example:
        >>> network = Autoencoder(ConvolutionOptions(blocks=2, latent_dim=15), shape=(1, 48, 48))
        >>> network(torch.rand(2, 1, 48, 48)).shape
        torch.Size([2, 1, 48, 48])
    """

    def __init__(
        self,
        options: ConvolutionOptions,
        shape: tuple[int, ...],
        value_range: tuple[float, ...] = (0.0, 1.0),
        *,
        variational: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        output = {bounds: name for name, bounds in OUTPUTS.items()}.get((value_range[0], value_range[1]))
        if output is None:
            low, high = value_range
            raise SettingsError(f"dataset: its pixels lie in {low:g}..{high:g}; the network needs 0..1 or -1..1")
        # A seeded generator leaves PyTorch's own unchanged: layers draw default weights before ours.
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            self.encoder = Encoder(options, shape, variational=variational, generator=generator)
            self.decoder = Decoder(options, shape, output=output, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstructions, with the images' shape (B, C, H, W)."""
        reconstructions: Tensor = self.decoder(self.encoder(images))
        return reconstructions
