"""The convolutional encoder and decoder of Figure 9."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.system.files import atomic_file

__all__ = ["Autoencoder", "Decoder", "Encoder", "filter_side", "image_side"]

BatchNormGain = Literal["paper", "ones"]
OutputRange = Literal["sigmoid", "tanh"]

LOG_VARIANCE_BOUND = 10.0  # deviations between 0.007 and 148


def image_side(blocks: int, filter_side: int) -> int:
    """Side of the images, S * 2^(N+1) pixels for N blocks and the filter side S.

    Example:
        >>> image_side(blocks=1, filter_side=7)
        28
    """
    return filter_side << (blocks + 1)


def filter_side(blocks: int, image_side: int) -> int | None:
    """Filter side S for which images have the side S * 2^(N+1), None where there is none.

    Example:
        >>> filter_side(blocks=2, image_side=48), filter_side(blocks=2, image_side=28)
        (6, None)
    """
    side, rest = divmod(image_side, 2 ** (blocks + 1))
    return side if side >= 1 and rest == 0 else None


class _Half(nn.Module):
    """What both halves share: settings, memory format, initial weights, and their file."""

    settings: dict[str, Any]

    def _start(self, settings: dict[str, Any], generator: torch.Generator | None) -> None:
        self.settings = settings
        for module in self.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                continue  # shapes alone: `load` puts the weights in
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.orthogonal_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.BatchNorm2d) and settings["batch_norm_gain"] == "paper":
                nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
        self.to(memory_format=self._memory_format)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.settings["channels_last"] else torch.contiguous_format

    def save(self, path: str | Path) -> None:
        """Writes weights and settings as one safetensors file, whole or not at all; the same bytes for the same weights."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # One key alone: safetensors writes several in an order that changes from run to run.
        metadata = {"settings": json.dumps({"class": type(self).__name__, **self.settings}, sort_keys=True)}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Reads what `save` wrote, in evaluation mode.

        Raises:
            DataError: When the file is missing, truncated, or holds something else.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                settings = json.loads((file.metadata() or {})["settings"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            kind = settings.pop("class")
            if kind != cls.__name__:
                raise DataError(f"{path} holds {kind}, not {cls.__name__}; give the other file of the pair")
            if not 0 <= settings["blocks"] <= 10:  # as in the settings; a million would take minutes to refuse
                raise ValueError("impossible number of blocks")
            with torch.device("meta"):  # no weights are drawn, nor memory taken, before the shapes are known to agree
                network = cls(**settings)
            network.load_state_dict(tensors, assign=True)
            network.to(memory_format=network._memory_format)
        except FileNotFoundError:
            raise DataError(f"{path} is missing; train the autoencoder first") from None
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
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
        channels: Image channels C.
        blocks: Blocks N after the first convolution.
        filter_side: Side S of the last filter, in pixels. Images are S * 2^(N+1) pixels wide and high.
        latent_dim: Length D of the code.
        base_channels: Filters of the first convolution.
        batch_norm_gain: `paper`: drawn from a normal with mean 0 and standard deviation 0.02; `ones`: PyTorch's.
        variational: Whether a second head gives log-variances, starting at 0.
        channels_last: Whether weights and activations lie in memory with the channels last, faster on most machines.
        generator: Source of the initial weights; PyTorch's own when None.

    Example:
        >>> encoder = Encoder(channels=1, blocks=1, filter_side=7, latent_dim=8, generator=torch.Generator().manual_seed(0))
        >>> encoder(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        *,
        channels: int,
        blocks: int,
        filter_side: int,
        latent_dim: int,
        base_channels: int = 64,
        batch_norm_gain: BatchNormGain = "paper",
        variational: bool = False,
        channels_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        settings = {k: v for k, v in locals().items() if k not in ("self", "generator", "__class__")}
        layers: list[nn.Module] = [nn.Conv2d(channels, base_channels, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        width = base_channels
        for _ in range(blocks):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2, inplace=True)]
            width *= 2
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, latent_dim, filter_side)
        self.log_variance_head = nn.Conv2d(width, latent_dim, filter_side) if variational else None
        self._start(settings, generator)
        if self.log_variance_head is not None:
            nn.init.zeros_(self.log_variance_head.weight)

    @property
    def latent_dim(self) -> int:
        """Length D of the code."""
        return int(self.settings["latent_dim"])

    def forward(self, images: Tensor) -> Tensor:
        """The codes, with shape (B, D), of images with shape (B, C, H, W); the means where the encoder is variational."""
        return self._read(self.head, self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the heads read, with shape (B, base_channels * 2^N, S, S)."""
        features: Tensor = self.layers(images.contiguous(memory_format=self._memory_format))
        return features

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and log-variance of the variational posterior, each with shape (B, D).

        The log-variance l that the head gives is bounded as :math:`10 \tanh(l / 10)`: in the first steps nothing else keeps it
        from growing until the noise overflows, least of all with a divergence of small weight.
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
        channels: Image channels C.
        blocks: Blocks N before the last convolution.
        filter_side: Side S of the first filter, in pixels. Images are S * 2^(N+1) pixels wide and high.
        latent_dim: Length D of the code.
        output: `sigmoid` for images in 0..1, `tanh` for images in -1..1.
        base_channels: Filters that the last convolution reads.
        batch_norm_gain: `paper`: drawn from a normal with mean 0 and standard deviation 0.02; `ones`: PyTorch's.
        input_normalisation: Whether BatchNorm and LeakyReLU(0.2) follow the first layer too.
        channels_last: Whether weights and activations lie in memory with the channels last, faster on most machines.
        generator: Source of the initial weights; PyTorch's own when None.

    Example:
        >>> decoder = Decoder(channels=3, blocks=3, filter_side=4, latent_dim=100, output="tanh")
        >>> decoder(torch.zeros(2, 100)).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(
        self,
        *,
        channels: int,
        blocks: int,
        filter_side: int,
        latent_dim: int,
        output: OutputRange = "sigmoid",
        base_channels: int = 64,
        batch_norm_gain: BatchNormGain = "paper",
        input_normalisation: bool = False,
        channels_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        settings = {k: v for k, v in locals().items() if k not in ("self", "generator", "__class__")}
        width = base_channels * 2**blocks
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_dim, width, filter_side)]
        if input_normalisation:
            layers += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2, inplace=True)]
        for _ in range(blocks):
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
                nn.BatchNorm2d(width // 2),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width //= 2
        layers.append(nn.ConvTranspose2d(width, channels, 4, 2, 1))
        self.layers = nn.Sequential(*layers)
        self._start(settings, generator)

    @property
    def latent_dim(self) -> int:
        """Length D of the code."""
        return int(self.settings["latent_dim"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        side = image_side(self.settings["blocks"], self.settings["filter_side"])
        return self.settings["channels"], side, side

    @property
    def value_range(self) -> tuple[float, float]:
        """Least and greatest value of a pixel."""
        return (0.0, 1.0) if self.settings["output"] == "sigmoid" else (-1.0, 1.0)

    def forward(self, codes: Tensor) -> Tensor:
        """The images, with shape (B, C, H, W), float32 and in `value_range`, of codes with shape (B, D)."""
        columns = codes[:, :, None, None]  # (B, D) => (B, D, 1, 1)
        logits: Tensor = self.layers(columns.contiguous(memory_format=self._memory_format)).float()
        return torch.sigmoid(logits) if self.settings["output"] == "sigmoid" else torch.tanh(logits)


class Autoencoder(nn.Module):
    """An encoder and a decoder of the same dimensions, drawn from one generator.

    Arguments:
        channels: Image channels C.
        blocks: Blocks N.
        filter_side: Filter side S, in pixels. Images are S * 2^(N+1) pixels wide and high.
        latent_dim: Length D of the code.
        output: `sigmoid` for images in 0..1, `tanh` for images in -1..1.
        base_channels: Filters of the outermost convolutions.
        batch_norm_gain: `paper` or `ones`, see `Encoder`.
        variational: Whether the encoder gives log-variances too.
        input_normalisation: Whether BatchNorm and LeakyReLU follow the decoder's first layer.
        channels_last: Whether weights and activations lie in memory with the channels last.
        generator: Source of the initial weights; PyTorch's own when None.

    Example:
        >>> network = Autoencoder(channels=1, blocks=2, filter_side=6, latent_dim=15)
        >>> network(torch.rand(2, 1, 48, 48)).shape
        torch.Size([2, 1, 48, 48])
    """

    def __init__(
        self,
        *,
        channels: int,
        blocks: int,
        filter_side: int,
        latent_dim: int,
        output: OutputRange = "sigmoid",
        base_channels: int = 64,
        batch_norm_gain: BatchNormGain = "paper",
        variational: bool = False,
        input_normalisation: bool = False,
        channels_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {
            "channels": channels,
            "blocks": blocks,
            "filter_side": filter_side,
            "latent_dim": latent_dim,
            "base_channels": base_channels,
            "batch_norm_gain": batch_norm_gain,
            "channels_last": channels_last,
        }
        # A seeded generator leaves PyTorch's own where it was: layers draw weights of their own before ours.
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            self.encoder = Encoder(**common, variational=variational, generator=generator)
            self.decoder = Decoder(**common, output=output, input_normalisation=input_normalisation, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstructions, with the images' shape (B, C, H, W)."""
        reconstructions: Tensor = self.decoder(self.encoder(images))
        return reconstructions
