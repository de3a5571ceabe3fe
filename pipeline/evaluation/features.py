"""Networks in whose features images are compared: a small classifier, VGG19, Inception. Their scores aren't comparable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.errors import DataError
from pipeline.evaluation.blocks import unit_blocks
from pipeline.evaluation.moments import Moments
from pipeline.settings import QualitySettings, checked_path
from pipeline.storage.shards import ShardReader, scale_pixels
from pipeline.system.files import atomic_file, atomic_folder, read_json, sha256_file, write_json
from pipeline.system.progress import Progress, track
from pipeline.system.streams import stream_seed

__all__ = [
    "Classifier",
    "FeatureNetwork",
    "RealFeatures",
    "classifier_network",
    "extract_features",
    "inception_network",
    "load_classifier",
    "read_features",
    "save_classifier",
    "train_classifier",
    "vgg19_network",
    "write_features",
]

LEARNING_RATE = 3e-3  # of the classifier

LabelledBlocks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # a fresh pass over blocks of (images, labels)


@dataclass(frozen=True)
class FeatureNetwork:
    """A named map from images to feature vectors.

    Attributes:
        name: Part of each score's name, so scores of two networks are never compared by mistake.
        function: Images in 0..1, float32 with shape (n, C, H, W) -> features with shape (n, F).
    """

    name: str
    function: Callable[[Tensor], Tensor]


@torch.no_grad()
def extract_features(network: FeatureNetwork, blocks: Iterable[np.ndarray], batch_size: int = 256) -> NDArray[np.float32]:
    """Features of a stream of images, with shape (N, F); images aren't kept in memory.

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
    """The Inception network of published FID and KID, through torchmetrics and torch-fidelity: F = 2048.

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

    Features are divided by their root mean square over the training images, since KID depends on their scale.

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
    """Batches of one epoch; each block is shuffled separately."""
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
        torch.manual_seed(stream_seed("classifier weights", seed))
        network = Classifier(channels, classes)
    generator = torch.Generator().manual_seed(stream_seed("classifier batches", seed))
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


def save_classifier(classifier: Classifier, path: str | Path) -> None:
    """Writes the classifier's weights as safetensors."""
    with atomic_file(path) as temporary:
        save_file({name: value.contiguous() for name, value in classifier.state_dict().items()}, temporary)


def load_classifier(path: str | Path) -> Classifier:
    """Reads what `save_classifier` wrote, in evaluation mode.

    Raises:
        DataError: When the file is missing, damaged or holds something else.
    """
    try:
        tensors = load_file(path)
        classifier = Classifier(tensors["hidden.0.weight"].shape[1], tensors["head.weight"].shape[0])
        classifier.load_state_dict(tensors)
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} can't be read ({' '.join(str(error).split())[:200]}); run the stage that writes it again"
        ) from None
    return classifier.eval().requires_grad_(False)


# What all rows of a data set share -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealFeatures:
    """The reference that all rows of a data set are compared with.

    Attributes:
        network: The network that the features are of.
        values: Features of all test images, float32 with shape (N, F).
    """

    network: FeatureNetwork
    values: NDArray[np.float32]


TURNS = (0, 1, 2, 3)
CLASSIFIER, TEST, INDEX = "classifier.safetensors", "test.safetensors", "index.json"


def rotated(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square images in four orientations, with the number of quarter turns as their label: classes for images without labels.

    References:
        | Unsupervised Representation Learning by Predicting Image Rotations (Gidaris, Singh, Komodakis, 2018)
        | https://arxiv.org/abs/1803.07728

    Arguments:
        images: Images with shape (n, C, H, H).

    Returns:
        Images with shape (4 n, C, H, H), and labels with shape (4 n,).
    """
    turned = np.concatenate([np.rot90(images, turns, axes=(2, 3)) for turns in TURNS])
    return turned, np.repeat(np.array(TURNS), len(images))


def _train_classifier(settings: QualitySettings, reader: ShardReader) -> Classifier:
    def labelled() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        remaining = settings.classifier_examples
        for block in reader.blocks("train"):
            images = scale_pixels(block["examples"], (0.0, 1.0))[:remaining]
            yield (images, block["labels"][:remaining]) if "labels" in block else rotated(images)
            remaining -= len(images)
            if remaining <= 0:
                return

    classes = len(reader.index.label_names or ()) or 1 + max(int(labels.max()) for _, labels in labelled())
    return train_classifier(labelled, classes, settings.seed, settings.classifier_epochs)


def _network(settings: QualitySettings, folder: Path) -> FeatureNetwork:
    """The network of the settings. The classifier's weights are in the folder, those of other networks in a separate file."""
    if settings.network == "inception":
        return inception_network(checked_path(settings.weights or "", "quality.weights"))
    if settings.network == "vgg19":
        from pipeline.autoencoders.common.perceptual import vgg19_weights

        return vgg19_network(vgg19_weights(checked_path(settings.weights or "", key := "quality.weights"), key))
    return classifier_network(load_classifier(folder / CLASSIFIER))


def _features_identity(settings: QualitySettings | None, reader: ShardReader) -> dict[str, Any]:
    """Everything that determines the features of a data set: its images, the network, and how the classifier is trained."""
    if settings is None:
        return {"data": reader.index.digest, "network": None}
    keys = ("network", "weights", "classifier_examples", "classifier_epochs", "seed")
    return {"data": reader.index.digest} | {key: getattr(settings, key) for key in keys}


def write_features(folder: Path, settings: QualitySettings | None, reader: ShardReader) -> tuple[int, int] | None:
    """Writes what all rows of a data set share: features of all test images and, if used, the classifier.

    Arguments:
        folder: The folder to write.
        settings: Which network, and where its weights come from; None writes a folder without features.
        reader: Shards of the data set; the classifier is trained on its training images, to tell their labels, or where they
            have none their orientation.

    Returns:
        The shape (N, F) of the features, or None.

    Raises:
        DataError: When the weights are missing.
    """
    settings = settings if reader.index.kind == "images" else None
    shape: tuple[int, int] | None = None
    with atomic_folder(folder) as temporary:
        if settings is not None:
            if settings.network == "classifier":
                save_classifier(_train_classifier(settings, reader), temporary / CLASSIFIER)
            tests = track(unit_blocks(reader, "test")(), reader.index.count("test"), "features of test images")
            values = extract_features(_network(settings, temporary), tests)
            shape = (len(values), values.shape[1])
            save_file({"features": torch.from_numpy(values)}, temporary / TEST)
        digests = {path.name: sha256_file(path) for path in sorted(temporary.glob("*.safetensors"))}
        write_json(temporary / INDEX, _features_identity(settings, reader) | {"files": digests})
    return shape


def read_features(folder: Path, settings: QualitySettings, reader: ShardReader) -> RealFeatures:
    """Reads what `write_features` wrote for the same images and network.

    Raises:
        DataError: When a file is missing or damaged, or is of other images or settings.
    """
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(digests := index.pop("files", None), dict):
        raise DataError(f"{folder / INDEX} isn't an index; run the stage that writes it again")
    if index != _features_identity(settings, reader):
        raise DataError(f"{folder} holds features of other images or of another network; run the stage that writes it again")
    for name in (TEST, *([CLASSIFIER] if settings.network == "classifier" else [])):
        if not (folder / name).is_file() or sha256_file(folder / name) != digests.get(name):
            raise DataError(f"{folder / name} is missing or damaged; run the stage that writes it again")
    return RealFeatures(_network(settings, folder), load_file(folder / TEST)["features"].numpy())
