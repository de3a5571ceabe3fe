"""What each metric that tables show is: key, title, unit, standard error, direction and format, said once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["DETECTION", "METRICS", "NETWORKS", "Metric"]

# Networks in whose features samples are compared with test images. Their scores aren't comparable, so each has its own columns.
NETWORKS = ("classifier", "vgg19", "inception")


@dataclass(frozen=True)
class Metric:
    """A score as `reports/metrics` holds it.

    Attributes:
        key: Its key there; NETWORK is replaced by one of `NETWORKS`.
        title: What it is called in tables.
        unit: As in docs/scores.md; `-` where there is none.
        better: Which way is better.
        meaning: What it is, in a line.
        error: Key of its standard error; empty where it has none.
        over: What that is over.
        count: Key of the number of what was scored; empty for test points.
        format: Format of a value without an error.
        short: Heading in the scoreboard, with | where a narrow column may break it.
    """

    key: str
    title: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    meaning: str
    error: str = ""
    over: str = "test points"
    count: str = ""
    format: str = ".5g"
    short: str = ""

    @property
    def in_features(self) -> bool:
        """Whether it is measured in the features of a network."""
        return self.key.startswith("NETWORK_")

    @property
    def heading(self) -> str:
        """Title with the unit where that is nats; a standard error is shown next to a score that says it."""
        return f"{self.title}, nats" if self.unit.startswith("nats") and not self.key.endswith("_se") else self.title

    def show(self, value: float) -> str:
        """A value in the metric's format.

        Example:
            >>> METRICS["samples_in_dropped_box"].show(0.0123), METRICS["test_mse"].show(0.01234)
            ('1.23 %', '0.0123')
        """
        return f"{value:{self.format}}".replace("%", " %")


# Name, which is `metric` in results.csv and a column of the scoreboard (after the network's) -> what it is.
METRICS: Mapping[str, Metric] = {
    "test_log_likelihood": Metric(
        "test_log_likelihood", "test log-likelihood", "nats, in the units of the codes", "higher",
        "mean log-likelihood of test points", error="test_log_likelihood_se",
    ),
    "parzen_test_log_likelihood": Metric(
        "parzen_test_log_likelihood", "Parzen test log-likelihood", "nats", "higher",
        "mean Parzen-window log-likelihood of test images", error="parzen_test_se", over="images", count="parzen_samples",
    ),
    "test_log_likelihood_group_se": Metric(
        "test_log_likelihood_group_se", "± over images", "nats", "neither",
        "standard error of the score over the images that test patches come from",
        count="test_groups", format=".2g", short="± over images",
    ),
    "gap_to_truth": Metric(
        "gap_to_truth", "gap to the truth", "nats", "lower",
        "nats by which the density falls short of the true one", format=".3f", short="gap|to truth",
    ),
    "samples_in_dropped_box": Metric(
        "samples_in_dropped_box", "share in the dropped box", "0..1", "lower", "share of samples where the true density is 0",
        error="samples_in_dropped_box_se", over="samples", count="samples", format=".2%", short="in dropped|box",
    ),
    "mmd_squared": Metric(
        "mmd_squared", "squared MMD", "-", "lower",
        "squared maximum mean discrepancy of samples and test points, unbiased; 0 where they agree",
        count="samples", format=".2g", short="MMD²",
    ),
    "kid": Metric(
        "NETWORK_kid", "KID", "-", "lower", "kernel distance of samples and test images; 0 where they agree",
        error="NETWORK_kid_se", over="subsets",
    ),
    "class_kid": Metric(
        "NETWORK_class_kid", "KID within classes", "-", "lower",
        "mean over classes of the kernel distance of samples and test images of one class", error="NETWORK_class_kid_se",
        over="subsets",
    ),
    "fid": Metric(
        "NETWORK_fid", "FID", "-", "lower", "Fréchet distance of samples and test images; it depends on their numbers",
        format=".3g",
    ),
    "precision": Metric(
        "NETWORK_precision", "precision", "0..1", "higher", "share of samples that lie among test images",
        error="NETWORK_precision_se", over="samples",
    ),
    "recall": Metric(
        "NETWORK_recall", "recall", "0..1", "higher", "share of test images that lie among samples",
        error="NETWORK_recall_se",
    ),
    "density": Metric(
        "NETWORK_density", "density", "-", "higher",
        "number of test images that a sample lies near, over the number of neighbours; 1 where the two agree",
        error="NETWORK_density_se", over="samples",
    ),
    "coverage": Metric(
        "NETWORK_coverage", "coverage", "0..1", "higher", "share of test images with a sample near",
        error="NETWORK_coverage_se",
    ),
    "code_log_likelihood": Metric(
        "test_log_likelihood", "log-likelihood of the codes", "nats, in the units of the codes", "higher",
        "mean log-likelihood of test codes, in addition to a score of images", error="test_log_likelihood_se",
    ),
    "test_conditional_log_likelihood": Metric(
        "test_conditional_log_likelihood", "log-likelihood given the context", "nats, in the units of the codes", "higher",
        "mean log-likelihood of test codes given their contexts", error="test_conditional_log_likelihood_se",
        count="test_conditional_scored",
    ),
    "class_accuracy": Metric(
        "class_accuracy", "accuracy of p(label | code)", "0..1", "higher",
        "share of test codes whose label is the most probable one by Bayes' rule", error="class_accuracy_se",
        count="class_scored",
    ),
    "class_calibration_error": Metric(
        "class_calibration_error", "calibration error", "0..1", "lower",
        "mean gap between the confidence of p(label | code) and its accuracy, over 15 bins", count="class_scored", format=".3f",
    ),
    **{
        f"{name}_class_{score}": Metric(
            f"{name}_class_{score}", f"{what} of {title}", "0..1", "higher" if score == "accuracy" else "lower",
            f"{what} of {title} on the same codes", error=f"{name}_class_{score}_se" if score == "accuracy" else "",
            count="class_scored", format=".3f",
        )
        for name, title in (("knn", "nearest neighbours"), ("logistic", "logistic regression"))
        for score, what in (("accuracy", "accuracy"), ("calibration_error", "calibration error"))
    },
    "test_mse": Metric(
        "test_mse", "test MSE", "per pixel", "lower", "mean squared error of reconstructed test images, in 0..1",
        error="test_mse_se", format=".4f", short="test|MSE",
    ),
    "manifold_log_likelihood": Metric(
        "manifold_log_likelihood", "log-likelihood on the manifold", "nats per D-dimensional volume", "higher",
        "mean log-likelihood of decoded test codes on the decoder's manifold; comparable between autoencoders of the same D",
        error="manifold_log_likelihood_se", over="codes", count="manifold_scored", format=".2f", short="on the|manifold",
    ),
    # Outliers told from inliers, by both scores joined.
    "auroc": Metric(
        "auroc", "AUROC", "0..1", "higher", "probability that an outlier is stranger than an inlier", error="auroc_se",
        over="inliers and outliers", count="outliers_scored", format=".4f",
    ),
    "average_precision": Metric(
        "average_precision", "average precision", "0..1", "higher", "mean precision over the outliers",
        error="average_precision_se", over="bootstraps", count="outliers_scored", format=".4f",
    ),
    "false_alarms_at_95": Metric(
        "false_alarms_at_95", "false alarms at 95 %", "0..1", "lower",
        "share of the inliers taken for outliers where 95 % of the outliers are detected", error="false_alarms_at_95_se",
        over="bootstraps", count="inliers_scored", format=".2%",
    ),
    # Likelihood of interpolated codes (Figure 10).
    **{
        f"interpolation_{pairs}_fall": Metric(
            f"interpolation_{pairs}_fall", f"fall {where}", "nats", "neither",
            "mean of both ends minus the mean of the middle between two test codes", error=f"interpolation_{pairs}_fall_se",
            over="pairs", count=f"interpolation_{pairs}_pairs",
        )
        for pairs, where in (("different", "across domains"), ("same", "within a domain"))
    },
}  # fmt: skip

DETECTION = ("auroc", "average_precision", "false_alarms_at_95")  # metrics of a row of `detections`
