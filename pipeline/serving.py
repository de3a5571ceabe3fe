"""Requests to a served generator -> answers, within limits: samples, scores, and completed rows."""

from __future__ import annotations

import base64
import binascii
import io
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.generator import Generator
from pipeline.settings import Checked, check_that
from pipeline.sources.common.image_files import decode

__all__ = ["KEYS", "Limits", "answer"]

SEEDS = 2**63
FALSE_ALARMS = 0.01
KEYS: Mapping[str, tuple[str, ...]] = {
    "draw": ("count", "seed", "label", "context", "format"),
    "score": ("example", "false_alarms"),
    "complete": ("example", "count", "seed"),
}
Request = Mapping[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Limits(Checked):
    """What a request may ask for, at most.

    Attributes:
        values: Values in all samples or completed rows of an answer; as numbers and JSON, 4,000,000 take about 300 MB.
        examples: Examples to score or complete.
    """

    values: int = 4_000_000
    examples: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("values", "examples"):
            check_that(getattr(self, key) >= 1, key, "must be at least 1")


def answer(generator: Generator, requests: Sequence[Request], limits: Limits | None = None) -> Rows:
    """What a generator answers; keys that are absent or null have their defaults.

    A request's `query` is `draw` (the default), `score` or `complete`, the same for all that come together. Its other keys are

    - of `draw`: `count`, the number of samples; `seed`, by default others each time; `label` and `context`, a mapping of
      columns to values, of a density that is conditioned; `format`, `numbers` or `png`. The answer has one row for each sample:
      `request`, the number of its request; `sample`, its values as one list (of an image C * H * W pixels in 0..1, of a table
      all columns in its units), and their `shape`; or `png`, the image as a PNG file in base64; and `context`, if there is one.
    - of `score`: `example`, a list of values at any depth, or for images a file in base64; `false_alarms`, by default 0.01. The
      answer has one row for each: `log_likelihood` in nats; of an image `reconstruction_error`; and where
      the scores of validation examples are known `strangeness`, `p_value` and `outlier`, see docs/outliers.md.
    - of `complete`: `example`, a row of a table with null where a value is missing; `count` and `seed` as above. The answer has
      `count` rows for each, with `sample`; without a count one row with means of draws as `sample`, and their `spread`.

    Arguments:
        generator: The generator.
        requests: One request for each row.
        limits: What they may ask for, at most.

    Raises:
        DataError: When a request can't be answered or asks for too much: what is wrong, in one line.

    Example:
        >>> from pipeline.densities import LatentDensityEstimator
        >>> answer(Generator(LatentDensityEstimator(3)), [{"count": 1, "seed": 0}])[0]["shape"]
        [3]
    """
    given = [{key: value for key, value in request.items() if not _is_null(value)} for request in requests]
    if not given:
        raise DataError(f"there is no request; its keys are query, {', '.join(dict.fromkeys(sum(KEYS.values(), ())))}")
    queries = {str(request.pop("query", "draw")) for request in given}
    query = queries.pop()
    if queries or query not in KEYS:
        raise DataError(f"query must be one of {', '.join(KEYS)}, the same in all rows of a request")
    for request in given:
        if unknown := [key for key in request if key not in KEYS[query]]:
            raise DataError(f"'{unknown[0]}' is no key of {query}; known: {', '.join(KEYS[query])}")
    answers: Mapping[str, Callable[[Generator, Sequence[Request], Limits], Rows]] = {
        "draw": _draw,
        "score": _score,
        "complete": _complete,
    }
    return answers[query](generator, given, limits or Limits())


def _is_null(value: Any) -> bool:
    """Whether a key is left out; in a table of requests, NaN takes the place of null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _count(request: Request) -> int:
    value = request.get("count")
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise DataError("count must be a whole number, at least 1")
    return int(value)


def _seed(request: Request) -> int:
    value = request.get("seed", secrets.randbelow(SEEDS))
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < SEEDS:
        raise DataError("seed must be a whole number, at least 0 and at most 2^63 - 1")
    return int(value)


def _within(wanted: int, each: int, limits: Limits) -> None:
    if wanted * each > limits.values:
        raise DataError(f"count must be at most {limits.values // each} in all, of {each} values each")


def _width(generator: Generator) -> int:
    """Values of an example."""
    if generator.decoder is None:
        return len(generator.columns) or generator.density.dim
    return math.prod(generator.decoder.image_shape)


def _draw(generator: Generator, requests: Sequence[Request], limits: Limits) -> Rows:
    counts = [_count(request) for request in requests]
    seeds = [_seed(request) for request in requests]
    _within(sum(counts), _width(generator), limits)
    rows: Rows = []
    for number, (request, count, seed) in enumerate(zip(requests, counts, seeds, strict=True)):
        form = request.get("format", "numbers")
        if form not in ("numbers", "png") or (form == "png" and generator.decoder is None):
            raise DataError("format must be numbers, or png for images")
        context, label = request.get("context", {}), request.get("label")
        if not isinstance(context, Mapping) or not all(isinstance(value, str | float | Integral) for value in context.values()):
            raise DataError("context must map columns to words or numbers")
        if not isinstance(label, str | int | None):
            raise DataError("label must be a word or a number")
        samples = generator.draw(count, seed, label, context)
        for i, sample in enumerate(samples.examples):
            row: dict[str, Any] = {"request": number}
            if form == "png":
                row["png"] = _png(sample)
            else:
                row |= {"sample": sample.ravel().tolist(), "shape": list(sample.shape)}
            if samples.context is not None and generator.density.context is not None:
                row["context"] = generator.density.context.title(samples.context[i].tolist())
            rows.append(row)
    return rows


def _png(image: NDArray[np.float32]) -> str:
    """An image (C, H, W) in 0..1 as a PNG file in base64."""
    from PIL import Image

    pixels = np.rint(image * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _score(generator: Generator, requests: Sequence[Request], limits: Limits) -> Rows:
    examples = _examples(generator, requests, limits, missing=False)
    shares = [request.get("false_alarms", FALSE_ALARMS) for request in requests]
    if not all(isinstance(share, float) and 0 < share < 1 for share in shares):
        raise DataError("false_alarms must be a share between 0 and 1")
    if generator.calibration is not None:
        generator.calibration.threshold(min(shares))  # refuses a share that too few examples are there for
    scores = generator.score(examples)
    columns: dict[str, list[Any]] = {"log_likelihood": scores.log_prob.tolist()}
    if generator.decoder is not None:
        columns["reconstruction_error"] = scores.reconstruction_error.tolist()
    if generator.calibration is not None:
        compared = generator.strangeness(examples)
        columns |= {"strangeness": compared.strangeness.tolist(), "p_value": compared.p_value.tolist()}
        columns["outlier"] = [bool(p <= share) for p, share in zip(compared.p_value, shares, strict=True)]
    return [{"request": i} | {name: values[i] for name, values in columns.items()} for i in range(len(requests))]


def _complete(generator: Generator, requests: Sequence[Request], limits: Limits) -> Rows:
    if generator.decoder is not None:
        raise DataError("only rows of a table can be completed, not images")
    examples = _examples(generator, requests, limits, missing=True)
    counts = [_count(request) if "count" in request else 0 for request in requests]
    _within(sum(max(count, 1) for count in counts), _width(generator), limits)
    rows: Rows = []
    for number, (request, count, example) in enumerate(zip(requests, counts, examples, strict=True)):
        seed = _seed(request)
        if count:
            drawn = generator.complete(example[None], count, seed)[:, 0]
            rows += [{"request": number, "sample": values.tolist()} for values in drawn]
        else:
            (means,), (spreads,) = generator.complete_by_means(example[None], seed)
            spread = [None if math.isnan(value) else value for value in spreads.tolist()]
            rows.append({"request": number, "sample": means.tolist(), "spread": spread})
    return rows


def _examples(generator: Generator, requests: Sequence[Request], limits: Limits, missing: bool) -> NDArray[np.float64]:
    """The requests' examples, with shape (n, C, H, W) or (n, columns), NaN where a value is missing."""
    if len(requests) > limits.examples:
        raise DataError(f"there are {len(requests)} examples, and a request takes at most {limits.examples}")
    shape = (_width(generator),) if generator.decoder is None else generator.decoder.image_shape
    return np.stack([_example(request.get("example"), shape, missing) for request in requests])


def _example(given: Any, shape: tuple[int, ...], missing: bool) -> NDArray[np.float64]:
    expected = f"example must be {' x '.join(map(str, shape))} numbers" + (", null where one is missing" if missing else "")
    images = len(shape) == 3
    if images:
        expected += " in 0..1, or an image file in base64"
    if isinstance(given, str) and images:
        return _image(given, shape)
    try:
        values = np.asarray(given, dtype=np.float64)  # null becomes NaN
    except (TypeError, ValueError):
        raise DataError(expected) from None
    bad = np.isinf(values) | (np.isnan(values) & (not missing))
    if values.size != math.prod(shape) or bad.any() or (images and not (values.min() >= 0 and values.max() <= 1)):
        raise DataError(expected)
    return values.reshape(shape)


def _image(text: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The image of a file in base64."""
    channels, height, width = shape
    try:
        picture = decode(base64.b64decode(text, validate=True))
    except (binascii.Error, OSError, ValueError, MemoryError):
        raise DataError("example is no image file in base64") from None
    if picture.size != (width, height):
        size = f"{picture.width}x{picture.height}"
        raise DataError(f"the image of example has {size} pixels, expected {width}x{height}: scale it before")
    pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.float64) / 255
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
