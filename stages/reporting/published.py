"""Published scores, each with its data, protocol and number of samples.

A score is listed with one of ours only if data set, split and their sizes agree. For the Parzen window, the number of samples
and the protocol's name must agree too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.settings import flatten

__all__ = ["BENCHMARKS", "PUBLISHED", "Benchmark", "Published", "benchmark_of", "best_published", "paper_value"]

PAPER = "arXiv 1902.04294"


@dataclass(frozen=True)
class Benchmark:
    """A data set, split and protocol under which scores are comparable.

    Attributes:
        title: Its name.
        protocol: How it is measured.
        score: `parzen` or `likelihood`.
        dataset: Settings of a row of `datasets` that define this benchmark.
        samples: Number of samples n of the Parzen window; None if nothing is sampled.
        errors: What the value after +- is.
        train: Accepted numbers of training examples; empty for any number.
        test: Least number of test examples.
        window: Name of the Parzen window's protocol.
    """

    title: str
    protocol: str
    score: str
    dataset: Mapping[str, Any]
    samples: int | None
    errors: str
    train: tuple[int, ...] = ()
    test: int = 0
    window: str = ""


@dataclass(frozen=True)
class Published:
    """One published score.

    Attributes:
        benchmark: Key of `BENCHMARKS`.
        method: Name of the model.
        value: Mean test log-likelihood, in nats.
        error: The value after +-; None if none was given.
        source: Where it was published.
        ours: Settings of an autoencoder (`autoencoder.`) and density (`density.`) that make a row this method, with the paper's
            network if the method is the paper's; empty for methods that no row can be.
    """

    benchmark: str
    method: str
    value: float
    error: float | None
    source: str
    ours: Mapping[str, Any] = field(default_factory=dict)


_PARZEN = "Parzen window over 10,000 samples, bandwidth by grid search on validation images"
_OTHER = "other patches than those of the split of"

BENCHMARKS: Mapping[str, Benchmark] = {
    "mnist": Benchmark(
        "MNIST", _PARZEN, "parzen", {"source": "mnist"}, 10_000, "standard error",
        train=(50_000, 55_000), test=10_000, window="gmmn",
    ),
    # 102,236 images, of which 4,178 have a label; the unlabelled ones are for training.
    "tfd": Benchmark(
        "Toronto Face Database", _PARZEN, "parzen", {"source": "tfd", "train_on": "unlabelled"}, 10_000, "standard error",
        train=(102_236 - 4_178,), window="tfd-authors",
    ),
    "bsds300-rnade": Benchmark(
        "BSDS300, split of RNADE", f"mean log-likelihood of 1,000,000 test patches of 63 numbers, {_OTHER} MAF", "likelihood",
        {"source": "bsds300", "split": "rnade"}, None, "2 standard deviations over 5 trials where it is the paper's own",
        test=1_000_000,
    ),
    "bsds300-maf": Benchmark(
        "BSDS300, split of MAF", f"mean log-likelihood of 250,000 test patches of 63 numbers, {_OTHER} RNADE", "likelihood",
        {"source": "bsds300", "split": "maf"}, None, "as published", test=250_000,
    ),
    **{
        table: Benchmark(
            title, f"mean log-likelihood of {test:,} test rows of {dim} numbers, prepared by Papamakarios et al.", "likelihood",
            {"source": "tabular", "table": table}, None, "as published", test=test,
        )
        for table, title, test, dim in (
            ("power", "POWER", 204_928, 6), ("gas", "GAS", 105_206, 8),
            ("hepmass", "HEPMASS", 174_987, 21), ("miniboone", "MINIBOONE", 3_648, 43),
        )
    },
}  # fmt: skip

_TABLE_1, _TABLE_2 = f"{PAPER}, Table 1", f"{PAPER}, Table 2"
_YEUNG = "Yeung et al. 2017, Table 2"

# The paper's networks. Training and the standardisation of codes may differ.
_LDE: Mapping[str, Any] = {
    "density.family": "lde",
    "density.activation": "leaky_relu",
    "density.normalisation": "none",
    "density.blocks": "plain",
    "density.layers": 0,
    "density.width": 0,
    "density.channel_cap": 0,
    "density.dropout": 0.0,
    "density.position_embedding": False,
    "density.min_log_scale": None,
    "density.max_log_scale": None,
    "density.patch_orders": 1,
}
_AE: Mapping[str, Any] = {
    "autoencoder.objective": "ae",
    "autoencoder.base_channels": 64,
    "autoencoder.input_normalisation": False,
    "autoencoder.perceptual_weight": 0.0,
}
_CODES: Mapping[str, Mapping[str, Any]] = {
    "mnist": {"autoencoder.latent_dim": 8, "autoencoder.blocks": 1},
    "tfd": {"autoencoder.latent_dim": 15, "autoencoder.blocks": 2},
}
_AT_ONCE, _ONE_BY_ONE = {"autoencoder.incremental": None}, {"autoencoder.incremental.mode": "linear"}
_AAE: Mapping[str, Any] = {
    **_AT_ONCE,
    "autoencoder.objective": "aae",
    "autoencoder.prior": "normal",
    "density.family": "prior",
    "density.prior": "normal",
}
_GMMN: Mapping[str, Any] = {**_AT_ONCE, "autoencoder.objective": "ae", "density.family": "gmmn"}


def _lde(components: int) -> dict[str, Any]:
    return {"autoencoder.objective": "identity", "density.components": components, **_LDE}


def _ae_lde(benchmark: str, opened: Mapping[str, Any]) -> dict[str, Any]:
    return {**_AE, **_CODES[benchmark], **opened, "density.components": 30, **_LDE}


# Method and source; test log-likelihoods of POWER, GAS, HEPMASS and MINIBOONE.
_TABULAR = (
    ("TraDE, one order", "Fakoor et al. 2020, arXiv 2004.02441", (0.73, 13.27, -12.01, -9.49)),
    ("TAN", "Oliva et al., ICML 2018", (0.60, 12.06, -13.78, -11.01)),
    ("UMNN-MAF", "Wehenkel and Louppe 2019", (0.63, 10.89, -13.99, -9.67)),
    ("NAF-DDSF (5)", "Huang et al. 2018", (0.62, 11.91, -15.09, -8.86)),
    ("neural spline flow (RQ, coupling)", "Durkan et al. 2019", (0.64, 13.09, -14.75, -9.67)),
    ("neural spline flow (RQ, autoregressive)", "Durkan et al. 2019", (0.66, 13.09, -14.01, -9.22)),
    ("DEformer, any order", "Alcorn and Nguyen 2021, arXiv 2106.06989", (0.54, 13.17, -11.98, -9.32)),
    ("ACE, any order", "Strauss and Oliva 2021, arXiv 2102.04426", (0.58, 12.20, -15.04, -11.41)),
    ("MAF MoG (5)", "Papamakarios et al. 2017", (0.30, 9.59, -17.39, -11.68)),
)

PUBLISHED: tuple[Published, ...] = (
    Published("mnist", "DBN", 138, 2, _TABLE_2),
    Published("mnist", "Stacked CAE", 121, 1, _TABLE_2),
    Published("mnist", "Deep GSN", 214, 1, _TABLE_2),
    Published("mnist", "GAN", 225, 2, _TABLE_2),
    Published("mnist", "GMMN + AE", 282, 2, _TABLE_2, _GMMN),
    Published("mnist", "AAE", 340, 2, _TABLE_2, {**_AAE, **_CODES["mnist"]}),
    Published("mnist", "eVAE", 337, 2, _TABLE_2),
    Published("mnist", "mVAE", 338, 2, _YEUNG),
    Published("mnist", "AAE, an independent re-run", 345, 1.9, "PaddlePaddle, not reviewed"),
    Published("mnist", "AE + LDE (K = 30)", 326, 2, _TABLE_2, _ae_lde("mnist", _AT_ONCE)),
    Published("mnist", "IAE + LDE (K = 30)", 326, 2, _TABLE_2, _ae_lde("mnist", _ONE_BY_ONE)),
    Published("tfd", "DBN", 1909, 66, _TABLE_2),
    Published("tfd", "Stacked CAE", 2110, 50, _TABLE_2),
    Published("tfd", "Deep GSN", 1890, 29, _TABLE_2),
    Published("tfd", "GAN", 2057, 26, _TABLE_2),
    Published("tfd", "GMMN + AE", 2204, 20, _TABLE_2, _GMMN),
    Published("tfd", "AAE", 2252, 16, _TABLE_2, {**_AAE, **_CODES["tfd"]}),
    Published("tfd", "eVAE", 2371, 20, _TABLE_2),
    Published("tfd", "mVAE", 2358, 20, _YEUNG),
    Published("tfd", "AE + LDE (K = 30)", 2476, 33, _TABLE_2, _ae_lde("tfd", _AT_ONCE)),
    Published("tfd", "IAE + LDE (K = 30)", 2507, 32, _TABLE_2, _ae_lde("tfd", _ONE_BY_ONE)),
    Published("bsds300-rnade", "LDE (K = 1)", 152.68, 0.52, _TABLE_1, _lde(1)),
    Published("bsds300-rnade", "LDE (K = 10)", 157.75, 0.06, _TABLE_1, _lde(10)),
    Published("bsds300-rnade", "LDE (K = 30)", 158.02, 0.06, _TABLE_1, _lde(30)),
    Published("bsds300-rnade", "LDE (K = 100)", 157.03, 0.30, _TABLE_1, _lde(100)),
    Published("bsds300-rnade", "EoRNADE", 157.0, None, "Uria et al. 2014"),
    Published("bsds300-rnade", "deep RNADE (K = 10)", 155.2, None, _TABLE_1),
    Published("bsds300-maf", "TraDE, one order", 160.01, None, "Fakoor et al. 2020, arXiv 2004.02441"),
    Published("bsds300-maf", "TAN", 159.80, 0.07, "Oliva et al., ICML 2018"),
    Published("bsds300-maf", "UMNN-MAF", 157.98, 0.01, "Wehenkel and Louppe 2019"),
    Published("bsds300-maf", "NAF-DDSF (5)", 157.73, 0.04, _TABLE_1),
    Published("bsds300-maf", "neural spline flow (RQ, coupling)", 157.54, 0.28, "Durkan et al. 2019"),
    Published("bsds300-maf", "FFJORD", 157.40, None, "Grathwohl et al. 2019"),
    Published("bsds300-maf", "B-NAF", 157.36, 0.03, "De Cao et al. 2019"),
    Published("bsds300-maf", "MAF MoG (5)", 156.36, 0.28, _TABLE_1),
    Published("bsds300-maf", "MAF (5)", 155.69, 0.28, "Papamakarios et al. 2017"),
    Published("bsds300-maf", "MADE MoG", 153.71, 0.28, _TABLE_1),
    Published("bsds300-maf", "Real NVP (10)", 153.28, 1.78, _TABLE_1),
    Published("bsds300-maf", "MADE", 148.85, 0.28, "Papamakarios et al. 2017"),
    Published("bsds300-maf", "one full-covariance Gaussian", 96.67, 0.25, "Papamakarios et al. 2017"),
    *(
        Published(table, method, value, None, source)
        for method, source, values in _TABULAR
        for table, value in zip(("power", "gas", "hepmass", "miniboone"), values, strict=True)
    ),
)


def _agrees(settings: Mapping[str, Any], required: Mapping[str, Any]) -> bool:
    missing = object()
    return all(settings.get(key, missing) == value for key, value in required.items())


def benchmark_of(
    dataset: Mapping[str, Any], score: str, counts: Mapping[str, int], samples: int | None = None, window: str = ""
) -> str | None:
    """The benchmark that a score is comparable with.

    Arguments:
        dataset: Settings of the data set.
        score: `parzen` or `likelihood`.
        counts: `train_examples` and `test_examples` of the prepared data.
        samples: Number of samples of the Parzen window.
        window: Name of its protocol.

    Example:
        >>> counts = {"train_examples": 50_000, "test_examples": 10_000}
        >>> benchmark_of({"source": "mnist"}, "parzen", counts, 10_000, "gmmn")
        'mnist'
        >>> benchmark_of({"source": "mnist"}, "parzen", counts | {"train_examples": 10_000}, 10_000, "gmmn") is None
        True
    """

    def comparable(benchmark: Benchmark) -> bool:
        return (
            benchmark.score == score
            and _agrees(dataset, benchmark.dataset)
            and (not benchmark.train or counts.get("train_examples") in benchmark.train)
            and counts.get("test_examples", 0) >= benchmark.test
            and (benchmark.samples is None or (benchmark.samples, benchmark.window) == (samples, window))
        )

    return next((name for name, benchmark in BENCHMARKS.items() if comparable(benchmark)), None)


def paper_value(benchmark: str | None, autoencoder: Mapping[str, Any], density: Mapping[str, Any]) -> Published | None:
    """The paper's score for the method that a row's settings describe.

    Arguments:
        benchmark: Key of `BENCHMARKS`, or None.
        autoencoder: Settings of the autoencoder, defaults included.
        density: Settings of the density, defaults included.

    Example:
        >>> paper_value("tfd", {"objective": "ae", "incremental": None}, {"family": "gmmn"}).value
        2204
    """
    settings = flatten({"autoencoder": autoencoder, "density": density})
    return next((p for p in PUBLISHED if p.benchmark == benchmark and p.ours and _agrees(settings, p.ours)), None)


def best_published(benchmark: str | None) -> Published | None:
    """The highest published score of a benchmark.

    Example:
        >>> best_published("bsds300-maf").method
        'TraDE, one order'
        >>> best_published("miniboone").value
        -8.86
    """
    return max((p for p in PUBLISHED if p.benchmark == benchmark), key=lambda p: p.value, default=None)
