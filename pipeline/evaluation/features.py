"""Networks whose features images are compared by: a small classifier of our own, VGG19, Inception. Scores of two never mix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.errors import DataError
from pipeline.evaluation.moments import Moments
from pipeline.system.progress import Progress

__all__ = [
    "Classifier",
    "FeatureNetwork",
    "classifier_network",
    "extract_features",
    "inception_network",
    "train_classifier",
    "vgg19_network",
]

LEARNING_RATE = 3e-3  # of the classifier

LabelledBlocks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # a fresh pass over blocks of (images, labels)


@dataclass(frozen=True)
class FeatureNetwork:
    """A named map from images to feature vectors.

    Attributes:
        name: Part of each score's name, so that scores of two networks are never set side by side by mistake.
        function: Images in 0..1, float32 with shape (n, C, H, W) -> features with shape (n, F).
    """

    name: str
    function: Callable[[Tensor], Tensor]


@torch.no_grad()
def extract_features(network: FeatureNetwork, blocks: Iterable[np.ndarray], batch_size: int = 256) -> NDArray[np.float32]:
    """Features of a stream of images, with shape (N, F); images aren't held.

    Arguments:
        network: The network.
        blocks: Blocks of images in 0..1, each with shape (n, C, H, W).
        batch_size: Images that go through the network at once.
    """
    parts = []
    for block in blocks:
        images = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))
        parts += [network.function(batch).float().cpu().numpy() for batch in images.split(batch_size)]
    if not parts:
        raise DataError("there are no images to take features of")
    return np.concatenate(parts)


# VGG19 and Inception ------------------------------------------------------------------------------------------------


def vgg19_network(weights: Mapping[str, Tensor]) -> FeatureNetwork:
    """VGG19 up to relu3_1, mean over positions: F = 256.

    Arguments:
        weights: Weights under torchvision's names, `features.0.weight` up to `features.10.bias`.
    """
    from pipeline.autoencoders.common.perceptual import PerceptualLoss

    network = PerceptualLoss(weights, value_range=(0.0, 1.0))
    return FeatureNetwork("vgg19", lambda images: network.features(images)[-1].mean(dim=(2, 3)))


def inception_network(weights: str | Path) -> FeatureNetwork:
    """The Inception of published FID and KID, through torchmetrics and torch-fidelity: F = 2048.

    Arguments:
        weights: The file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity. It is never downloaded here.

    Raises:
        DataError: When the file or torch-fidelity is missing.
    """
    if not Path(weights).is_file():
        raise DataError(
            f"{weights} is missing; put torch-fidelity's weights-inception-2015-12-05-6726825d.pth there, or use vgg19"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
    except ModuleNotFoundError:
        raise DataError("Inception features need the package torch-fidelity; install it, or use vgg19") from None

    def function(images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        features: Tensor = network((images * 255).round().clamp(0, 255).to(torch.uint8))
        return features.reshape(len(images), -1)

    return FeatureNetwork("inception", function)


# A classifier of our own --------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A small convolutional classifier, whose last hidden layer gives 128 features.

    Features are divided by their root mean square over the training images: KID isn't free of scale.

    Arguments:
        channels: Channels of an image.
        classes: Number of labels.

    Example:
        >>> network = Classifier(channels=1, classes=10)
        >>> network(torch.zeros(2, 1, 28, 28)).shape, network.features(torch.zeros(2, 1, 28, 28)).shape
        (torch.Size([2, 10]), torch.Size([2, 128]))
    """

    scale: Tensor

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(channels, 32, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),  # (n, 64, 4, 4) -> (n, 1024)
            nn.Linear(1024, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, classes)
        self.register_buffer("scale", torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer over `scale`, with shape (n, 128), of images in 0..1 with shape (n, C, H, W)."""
        features: Tensor = self.hidden(images) / self.scale
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits with shape (n, classes)."""
        logits: Tensor = self.head(self.hidden(images))
        return logits


def _batches(blocks: LabelledBlocks, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch, each block in an order of its own."""
    for images, labels in blocks():
        order = torch.randperm(len(images), generator=generator)
        x = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))[order]
        y = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))[order]
        yield from zip(x.split(batch_size), y.split(batch_size), strict=True)


def train_classifier(blocks: LabelledBlocks, classes: int, seed: int, epochs: int = 5, batch_size: int = 64) -> Classifier:
    """Trains the classifier on labelled images; the same seed gives the same weights.

    Arguments:
        blocks: Gives a pass over blocks of images in 0..1 with shape (n, C, H, W) and labels with shape (n,), in mixed order.
        classes: Number of labels, which are 0, .. classes - 1.
        seed: Seed of weights and order.
        epochs: Passes over the images.
        batch_size: Images in a step.

    Raises:
        DataError: When there are no images, or a label is out of range.
    """
    steps, channels = 0, 0
    for images, labels in blocks():
        if len(labels) and (np.min(labels) < 0 or np.max(labels) >= classes):
            raise DataError(f"labels go from {np.min(labels)} to {np.max(labels)}, expected 0 to {classes - 1}")
        steps, channels = steps + -(-len(images) // batch_size), images.shape[1]
    if not steps:
        raise DataError("there are no labelled images to train the classifier on")
    with torch.random.fork_rng(devices=[]):  # initial weights come from the global generator: leave it as it was
        torch.manual_seed(seed)
        network = Classifier(channels, classes)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=epochs * steps)
    with Progress(epochs * steps, "training the classifier of features", unit="steps") as progress:
        for _ in range(epochs):
            for x, y in _batches(blocks, batch_size, generator):
                optimizer.zero_grad()
                loss = cross_entropy(network(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance(loss=loss.item())
    network.eval().requires_grad_(False)
    squares = Moments()
    for x, _ in _batches(blocks, 1024, generator):
        squares.update(network.features(x).square().mean(1).numpy())
    network.scale.fill_(max(squares.mean, 1e-12) ** 0.5)
    return network


def classifier_network(classifier: Classifier) -> FeatureNetwork:
    """The features of a trained classifier: F = 128."""
    return FeatureNetwork("classifier", classifier.features)
