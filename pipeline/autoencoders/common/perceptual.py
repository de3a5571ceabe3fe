"""The perceptual loss: distances between features of an ImageNet VGG19."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import DataError, PipelineError
from pipeline.storage.shards import to_unit

__all__ = ["PerceptualLoss", "vgg19_weights"]

# torchvision's numbers of VGG19's convolutions up to relu3_1, with input and output channels.
CONVOLUTIONS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256)}
READ_AFTER = (0, 5, 10)  # conv1_1, conv2_1, conv3_1: the features are their ReLUs
POOL_BEFORE = (5, 10)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def vgg19_weights(source: str, key: str) -> dict[str, Tensor]:
    """The weights of VGG19's convolutions up to relu3_1, under torchvision's names, `features.0.weight` and so on.

    Arguments:
        source: A file, safetensors or a PyTorch state dict, with or without the other layers; or `imagenet` for
            torchvision's `IMAGENET1K_V1`, downloaded once into PyTorch's cache.
        key: The setting that names it, for messages.

    Raises:
        PipelineError: When the official weights can't be downloaded.
        DataError: When the file is missing, unreadable, or lacks a layer.
    """
    if source == "imagenet":
        return _select(_official_weights(key), "torchvision's VGG19", key)
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"{key}: {path} is missing; put a state dict of torchvision's vgg19 there (safetensors or .pth), "
            "or say 'imagenet' to download the official one"
        )
    try:
        if path.suffix == ".safetensors":
            tensors: Mapping[str, Tensor] = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds of error, all with the same meaning
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{key}: {path} can't be read as a state dict ({reason}); fetch it again") from None
    return _select(tensors, str(path), key)


def _official_weights(key: str) -> Mapping[str, Tensor]:
    from torchvision.models import VGG19_Weights

    url = VGG19_Weights.IMAGENET1K_V1.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, progress=False, weights_only=True)
    except (OSError, URLError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PipelineError(
            f"{key}: can't download the official VGG19 weights ({reason}); download {url} on another machine and "
            "give the file's path"
        ) from None


def _select(tensors: Mapping[str, Tensor], name: str, prefix: str) -> dict[str, Tensor]:
    selected = {}
    for layer, (inputs, outputs) in CONVOLUTIONS.items():
        for key, shape in ((f"features.{layer}.weight", (outputs, inputs, 3, 3)), (f"features.{layer}.bias", (outputs,))):
            tensor = tensors.get(key) if isinstance(tensors, Mapping) else None
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
                description = "missing" if not isinstance(tensor, Tensor) else f"of shape {tuple(tensor.shape)}"
                raise DataError(f"{prefix}: {name}: '{key}' is {description}, expected {shape}; give a state dict of vgg19")
            selected[key] = tensor.float()
    return selected


class PerceptualLoss(nn.Module):
    r"""Half the sum of the mean squared errors of VGG19's features at relu1_1, relu2_1 and relu3_1.

    .. math:: L(x, \hat{x}) = \frac{1}{2} \sum_l \mathrm{MSE}\left( \phi_l(x), \phi_l(\hat{x}) \right)

    This is the second term of (5). Only the five convolutions up to relu3_1 are built. They are never trained, and the targets'
    features carry no gradient. Images are first converted to ImageNet-normalised RGB, grey ones by repeating the channel.
    The scale of the loss is the scale of the features: a weight tuned on one set of VGG19 weights doesn't carry over to
    rescaled ones.

    References:
        | Perceptual Losses for Real-Time Style Transfer and Super-Resolution (Johnson et al., 2016)
        | https://arxiv.org/abs/1603.08155

        | Density Estimation and Incremental Learning of Latent Vector for Generative Autoencoders, (5)
        | https://arxiv.org/abs/1902.04294

    Arguments:
        weights: Weights under torchvision's names, as `vgg19_weights` gives them.
        value_range: Least and greatest value of a pixel.
        channels_last: Whether the channels lie last in memory.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> shapes = {f"features.{i}.weight": (o, c, 3, 3) for i, (c, o) in CONVOLUTIONS.items()}
        >>> shapes |= {f"features.{i}.bias": (o,) for i, (_, o) in CONVOLUTIONS.items()}
        >>> loss = PerceptualLoss({k: 0.01 * torch.randn(s, generator=g) for k, s in shapes.items()}, value_range=(0, 1))
        >>> images = torch.rand(2, 1, 28, 28, generator=g)
        >>> [tuple(f.shape) for f in loss.features(images)]
        [(2, 64, 28, 28), (2, 128, 14, 14), (2, 256, 7, 7)]
        >>> loss(images, images)
        tensor(0.)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Mapping[str, Tensor], value_range: tuple[float, float], *, channels_last: bool = False) -> None:
        super().__init__()
        self.value_range = value_range
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.convolutions = nn.ModuleDict()
        for layer, (inputs, outputs) in CONVOLUTIONS.items():
            convolution = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, padding=1)
            convolution.load_state_dict({k: weights[f"features.{layer}.{k}"] for k in ("weight", "bias")})
            self.convolutions[str(layer)] = convolution
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        self.requires_grad_(False).eval().to(memory_format=self.memory_format)

    def features(self, images: Tensor) -> list[Tensor]:
        """The features at relu1_1, relu2_1 and relu3_1, with shapes (B, 64, H, W), (B, 128, H/2, W/2), (B, 256, H/4, W/4).

        Arguments:
            images: Images with shape (B, C, H, W), C = 1 or 3, in `value_range`.
        """
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        hidden = (to_unit(images.float(), self.value_range) - self.mean) / self.std
        hidden = hidden.contiguous(memory_format=self.memory_format)
        read = []
        for layer in CONVOLUTIONS:
            if layer in POOL_BEFORE:
                hidden = nn.functional.max_pool2d(hidden, 2)
            hidden = nn.functional.relu_(self.convolutions[str(layer)](hidden))
            if layer in READ_AFTER:
                read.append(hidden)
        return read

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """The loss, a scalar in float32, between images and reconstructions, each with shape (B, C, H, W)."""
        if self.mean.device != images.device:
            # This module isn't among its owner's parameters, so it must move to the images' device here.
            self.to(images.device)
        with torch.no_grad():
            targets = self.features(images)
        pairs = zip(self.features(reconstructions), targets, strict=True)
        return 0.5 * torch.stack([nn.functional.mse_loss(ours.float(), target.float()) for ours, target in pairs]).sum()
