"""The common keys of each table of params.yaml; the file of a choice extends them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipeline.settings.build import Checked, check_that, file_setting

__all__ = [
    "AutoencoderSettings",
    "ControlSettings",
    "DatasetSettings",
    "DensitySettings",
    "DetectionSettings",
    "EvaluationSettings",
    "InterpolationSettings",
    "ParzenSettings",
    "QualitySettings",
    "SamplingSettings",
    "TrainingSettings",
]


@dataclass(frozen=True, kw_only=True)
class DatasetSettings(Checked):
    """Common keys of a row of `datasets`; a module of `pipeline/sources` extends them.

    Attributes:
        source: Name of the module in `pipeline/sources` that reads the raw files.
        root: Path of the raw files; for a packaged set, its source module.
        split_seed: Seed of the split and of the source's other random draws.
        shard_examples: Examples per shard, at most.
        label: Name of a label in figures; not a key of the row.
        drawn_as: How figures draw a vector: as `points` of its first two numbers, as points of the `grid` density, or as
            image `patches`; not a key of the row.
    """

    source: str
    root: str
    split_seed: int = 0
    label: ClassVar[str] = "label"
    drawn_as: ClassVar[str] = "points"
    shard_examples: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(bool(self.root.strip()), "root", "is empty; write the path of the raw files")
        check_that(not self.root.startswith("~"), "root", "DVC doesn't expand '~'; write the full path of your home folder")
        check_that("\0" not in self.root, "root", "no path holds a null character")
        check_that(self.shard_examples >= 1, "shard_examples", "must be at least 1")
        check_that(self.split_seed >= 0, "split_seed", "must be 0 or more")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an example: (C, H, W) for an image, (D,) for a vector; (0,) if only the file determines it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Checked):
    """How a network is trained: common to autoencoders and densities.

    Attributes:
        epochs: Passes over the training examples.
        batch_size: Examples per step, over all processes together.
        learning_rate: The highest learning rate.
        betas: Adam's decay rates; (0.5, 0.999) in the paper's supplement, section A.
        weight_decay: Decoupled weight decay, in units of the learning rate; 0 is plain Adam.
        schedule: `constant`; `steps`: halved at each of `milestones`; `cosine`: a linear warm-up over `warm_up` of all
            steps, then a cosine to zero.
        milestones: Epochs at which the schedule `steps` halves the learning rate.
        warm_up: Share of all steps over which `cosine` rises.
        gradient_clip: Largest norm of the gradient; 0 switches clipping off.
        ema_decay: Decay of the exponential moving average of the weights, which is the result; 0 keeps the last weights.
        precision: `float32`, or `bfloat16` for mixed precision, which is slow on processors without such instructions.
        checkpoint_minutes: Minutes between checkpoints.
        shuffle_examples: Size of the shuffle window in memory, in examples; it consists of whole shards.
        max_minutes: Time limit of training, in minutes; 0 for no limit. With a limit, the result depends on the machine's
            speed, and `cosine` falls to zero within the limit. `gmm` checks the time after each number of Gaussians.
        patience: Validations without a new best until training ends, at the end of an epoch; 0 for no such end.
        seed: Seed of initial weights, order of examples and noise.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, ...] = (0.5, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant", "steps", "cosine"] = "constant"
    milestones: tuple[int, ...] = ()
    warm_up: float = 0.1
    gradient_clip: float = 0.0
    ema_decay: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_minutes: float = 1.0
    shuffle_examples: int = 16_384
    max_minutes: float = 0.0
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.epochs >= 1, "epochs", "must be at least 1")
        check_that(self.batch_size >= 1, "batch_size", "must be at least 1")
        check_that(self.learning_rate > 0, "learning_rate", "must be positive")
        check_that(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "must be two numbers in [0, 1)")
        check_that(self.weight_decay >= 0, "weight_decay", "must be 0 or more")
        check_that(0 <= self.warm_up < 1, "warm_up", "must lie in [0, 1)")
        check_that(self.gradient_clip >= 0, "gradient_clip", "must be 0 or more")
        check_that(0 <= self.ema_decay < 1, "ema_decay", "must lie in [0, 1)")
        check_that(self.checkpoint_minutes > 0, "checkpoint_minutes", "must be positive")
        check_that(self.shuffle_examples >= 1, "shuffle_examples", "must be at least 1")
        check_that(self.max_minutes >= 0, "max_minutes", "must be 0 or more")
        check_that(self.patience >= 0, "patience", "must be 0 or more")
        check_that(self.seed >= 0, "seed", "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(Checked):
    """Common keys of a row of `autoencoders`; a module of `pipeline/autoencoders` extends them.

    Attributes:
        dataset: Row of `datasets` to train on.
        objective: Name of the module in `pipeline/autoencoders`: `ae`, `identity`, ..
    """

    dataset: str
    objective: str

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Rejects a data set that the objective doesn't support; by default, all are supported.

        Arguments:
            shape: Shape of an example, (C, H, W) for images, (D,) for vectors, (0,) if only the file determines it.

        Raises:
            SettingsError: When it isn't supported.
        """


@dataclass(frozen=True, kw_only=True)
class DensitySettings(TrainingSettings):
    """Common keys of a row of `densities`; a module of `pipeline/densities` extends them.

    Attributes:
        codes: Row of `autoencoders` whose codes to fit.
        dataset: Data set of those codes (named again, since DVC can't look it up; checked for agreement).
        family: Density family: `lde`, `gmm`, `maf`, ..
        context: What the density is conditioned on, p(z | c): `labels`, or a list of `labels` and of columns that the data set
            carries as its `context`. Samples are drawn at the frequencies of the training codes.
        standardise: `dimension` shifts and scales each code dimension to mean 0 and variance 1 over the training codes,
            `scalar` uses one mean and one scale for all, `none` changes nothing. `cholesky` subtracts from each dimension its
            linear prediction from the preceding ones, L^-1 (z - mean) with the covariance L L^T, which suits strongly
            correlated codes such as pixels. The log-determinant is added back in every likelihood.
        shrinkage: Whether `cholesky` shrinks the correlations towards 0, by Ledoit and Wolf's estimate. Use it for few codes,
            even fewer than dimensions.
        transform: A monotone map of each column before standardising, fitted to training codes, for skewed or long tails:
            `none`; `log` of positive columns; `asinh`, a logarithm in both tails; `power`, that of Yeo and Johnson; `quantile`,
            a spline to the quantiles of a Gaussian. Its log-determinant is also added back.
        optimizer: `adamw`, or `muon`: orthogonalised momentum with decay 0.95 for the weights between hidden layers of an
            `lde`, AdamW for the others. Deep networks then need a fraction of the steps.
        muon_rate: Muon's learning rate, as a multiple of AdamW's; the decay of its weights is multiplied too.
        validate_steps: Steps between validations within an epoch, in addition to those at its end; 0 for none.
        shuffle_examples: Size of the shuffle window in memory, in codes; it consists of whole files.
    """

    codes: str
    dataset: str
    family: str
    context: str | tuple[str, ...] | None = None
    learning_rate: float = 2e-4
    standardise: Literal["dimension", "scalar", "cholesky", "none"] = "dimension"
    transform: Literal["none", "log", "asinh", "power", "quantile"] = "none"
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_rate: float = 3.0
    validate_steps: int = 0
    shrinkage: bool = False
    shuffle_examples: int = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        empty = self.context is not None and not all(self.context_names or ("",))
        check_that(not empty, "context", "is empty; write `labels`, or leave it out")
        check_that(len(set(self.context_names)) == len(self.context_names), "context", "names a column twice")
        conditional = getattr(self, "takes_context", False)  # said by the family's `Options`
        check_that(
            not self.context_names or conditional,
            "context",
            f"the family {self.family} can't be conditioned; lde, gmm, gaussian and the flows (maf, nsf, realnvp, naf) can",
        )
        check_that(self.optimizer in ("adamw", "muon"), "optimizer", f"must be one of adamw, muon, not {self.optimizer!r}")
        check_that(self.optimizer == "adamw" or self.family == "lde", "optimizer", "can be muon for the family lde only")
        check_that(self.muon_rate > 0, "muon_rate", "must be positive")
        check_that(not self.shrinkage or self.standardise == "cholesky", "shrinkage", "is for standardise: cholesky")
        check_that(self.validate_steps >= 0, "validate_steps", "must be 0 or more")

    @property
    def context_names(self) -> tuple[str, ...]:
        """Names of the columns that the density is conditioned on."""
        return (self.context,) if isinstance(self.context, str) else self.context or ()


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Checked):
    """The section `sampling`.

    Attributes:
        count: Samples drawn from each density.
        seed: Seed of the draws.
        shard_examples: Samples per shard, at most.
        rounding: `none`, or `8-bit` to round decoded pixels to 256 levels as the paper's authors do.
    """

    count: int = 10_000
    seed: int = 0
    shard_examples: int = 2_000
    rounding: Literal["none", "8-bit"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.count >= 1, "count", "must be at least 1")
        check_that(self.seed >= 0, "seed", "must be 0 or more")
        check_that(self.shard_examples >= 1, "shard_examples", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ParzenSettings(Checked):
    """Protocol of the Parzen-window score.

    Attributes:
        protocol: Name of the protocol, shown with each score.
        bandwidth_start: First bandwidth of the grid, in units of the pixel range 0..1.
        bandwidth_stop: Last bandwidth of the grid.
        bandwidth_count: Number of bandwidths.
        spacing: `linear` or `log`.
        validation_count: Validation examples for the search, the first of the split; 0 takes all.
    """

    protocol: str = "gmmn"
    bandwidth_start: float = 0.10
    bandwidth_stop: float = 0.29
    bandwidth_count: int = 20
    spacing: Literal["linear", "log"] = "linear"
    validation_count: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(1 <= self.bandwidth_count <= 1000, "bandwidth_count", "must lie in 1..1000")
        check_that(1e-6 <= self.bandwidth_start <= 1e6, "bandwidth_start", "must be between 1e-6 and 1e6")
        check_that(
            self.bandwidth_start <= self.bandwidth_stop <= 1e6, "bandwidth_stop", "must be between bandwidth_start and 1e6"
        )
        check_that(self.validation_count >= 0, "validation_count", "must be 0 or more")

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """The grid, in ascending order."""
        if self.bandwidth_count == 1:
            return (self.bandwidth_start,)
        steps = [i / (self.bandwidth_count - 1) for i in range(self.bandwidth_count)]
        if self.spacing == "log":
            ratio = self.bandwidth_stop / self.bandwidth_start
            return tuple(round(self.bandwidth_start * ratio**s, 12) for s in steps)
        return tuple(round(self.bandwidth_start + s * (self.bandwidth_stop - self.bandwidth_start), 12) for s in steps)


@dataclass(frozen=True, kw_only=True)
class QualitySettings(Checked):
    """How samples are compared with test images in the features of a network.

    Attributes:
        network: `classifier`: a small one, trained to tell the labels of the training images, or without labels which of four
            orientations they have; `vgg19`: up to relu3_1; `inception`: that
            of published scores. Scores of two networks aren't comparable.
        weights: The weights: a file with its digest, `PATH@sha256:HEX`, or `imagenet` for torchvision's official VGG19,
            downloaded once; null for the classifier.
        samples: Samples to compare, at most: the first drawn.
        neighbours: k of precision and recall.
        classifier_examples: Training images for the classifier, at most: the first of the split.
        classifier_epochs: Passes over them.
        seed: Seed of the classifier and of the subsets of KID.
    """

    network: Literal["classifier", "vgg19", "inception"]
    weights: str | None = file_setting()
    samples: int = 10_000
    neighbours: int = 3
    classifier_examples: int = 10_000
    classifier_epochs: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(
            (self.network == "classifier") == (self.weights is None),
            "weights",
            "the classifier is trained here: leave it out"
            if self.network == "classifier"
            else f"missing; {self.network} needs a file with its weights" + (", or 'imagenet'" * (self.network == "vgg19")),
        )
        check_that(self.samples >= 20, "samples", "must be at least 20")
        check_that(1 <= self.neighbours <= 100, "neighbours", "must lie in 1..100")
        check_that(self.classifier_examples >= 1, "classifier_examples", "must be at least 1")
        check_that(self.classifier_epochs >= 1, "classifier_epochs", "must be at least 1")
        check_that(self.seed >= 0, "seed", "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class InterpolationSettings(Checked):
    """How interpolated test codes are scored (Figure 10) and shown (Figure 7).

    Attributes:
        pairs: Pairs of test codes of the same label, and as many of different labels.
        seed: Seed of the draw of pairs.
    """

    pairs: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(2 <= self.pairs <= 1_000_000, "pairs", "must lie in 2..1000000")
        check_that(self.seed >= 0, "seed", "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Checked):
    """A row of `evaluations`, named like its data set.

    Attributes:
        parzen: Protocol of the Parzen score; null for none.
        quality: Comparison of samples with test images in a feature space; null for none.
        interpolation: Scores and images of interpolated test codes; null for none.
    """

    parzen: ParzenSettings | None = None
    quality: QualitySettings | None = None
    interpolation: InterpolationSettings | None = None


@dataclass(frozen=True, kw_only=True)
class ControlSettings(Checked):
    """A row of `controls`: scores of a data set's own images, to compare with those of a model's samples and reconstructions.

    Attributes:
        dataset: Row of `datasets`, of images.
        seed: Seed of the choice of training images and of k-means.
        kmeans_centroids: Number of centroids; 0 takes as many as the models have samples. A data set with no more training
            images than that needs fewer, since each image would be its own centroid; their score then has a different n.
        kmeans_batch_size: Images per step of mini-batch k-means.
        kmeans_epochs: Passes over the training images.
        pca_components: Number of principal components up to which PCA reconstructions are scored, next to the autoencoders'
            open dimensions; 0 for none.
    """

    dataset: str
    seed: int = 0
    kmeans_centroids: int = 0
    kmeans_batch_size: int = 4096
    kmeans_epochs: int = 10
    pca_components: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.seed >= 0, "seed", "must be 0 or more")
        check_that(self.kmeans_centroids >= 0, "kmeans_centroids", "must be 0 or more")
        check_that(self.kmeans_batch_size >= 1, "kmeans_batch_size", "must be at least 1")
        check_that(self.kmeans_epochs >= 1, "kmeans_epochs", "must be at least 1")
        check_that(0 <= self.pca_components <= 4096, "pca_components", "must lie in 0..4096")


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(Checked):
    """A row of `detections`: how well a density tells what doesn't belong from test examples of its own data set.

    Attributes:
        density: Row of `densities` that scores.
        family: Its family, its codes and its data set (named again, since DVC can't look them up; checked for agreement).
        codes: See `family`.
        dataset: See `family`; its test examples are the inliers.
        outliers: Row of `datasets` whose test examples are the outliers. Images are resized to those of `dataset`, patches too.
        outlier_classes: Numbers of the labels whose examples are outliers, counted from 0; by default all.
        error: How reconstruction errors are measured: `absolute`, the sum over pixels, or `relative` to the image, for images
            of which some hold much less than others. Rows of one density agree, since `score` and `export` follow them.
        false_alarms: Share of the inliers that may be taken for outliers, by which the threshold is set on validation examples.
        seed: Seed of the bootstrap that gives standard errors.
    """

    density: str
    family: str
    codes: str
    dataset: str
    outliers: str
    outlier_classes: tuple[int, ...] = ()
    error: Literal["absolute", "relative"] = "absolute"
    false_alarms: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.outliers != self.dataset, "outliers", "must be another data set than 'dataset'")
        check_that(0 < self.false_alarms < 1, "false_alarms", "must be between 0 and 1")
        check_that(all(number >= 0 for number in self.outlier_classes), "outlier_classes", "must be numbers from 0")
        check_that(self.seed >= 0, "seed", "must be 0 or more")
