"""The page's first screen: for each data set what was drawn, what is real, and the result in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.settings import Params
from stages.arrays import PER_EXAMPLE, load_arrays
from stages.reporting.differences import difference
from stages.reporting.explore import Sprite, sprite
from stages.reporting.metrics import NETWORKS
from stages.reporting.pictures import Picture, autoencoders_of, combined_pictures, pictures
from stages.reporting.scoreboard import OF_CODES, contenders, is_missing, plus_minus, read_metrics, remark

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["Card", "cards", "verdict"]

Line = Mapping[Any, Any]
Tone = Literal["good", "mixed", "bad", "none"]
COLUMNS, ROWS = 10, 2  # samples of a card
SURE = 2.0  # standard errors
SCORES = ("parzen_test_log_likelihood", "test_log_likelihood")


@dataclass(frozen=True)
class Card:
    """A data set on the first screen.

    Attributes:
        name: Name of the data set.
        row: The row whose samples are shown; empty if none is.
        tone: How good the result is: `good`, `mixed`, `bad`, or `none` where nothing says it.
        sentences: The verdict.
        samples: Two rows of ten samples, the first ones drawn; None for points.
        real: Two rows of ten real images, or fewer.
        picture: What is shown instead, for points.
    """

    name: str
    row: str
    tone: Tone
    sentences: tuple[str, ...]
    samples: Sprite | None = None
    real: Sprite | None = None
    picture: Picture | None = None


def cards(params: Params, board: pd.DataFrame) -> Iterator[Card]:
    """One card per data set that has a score."""
    for dataset in params.rows("datasets"):
        lines = board[board["dataset"] == dataset].to_dict("records")
        row = _shown_row(lines)
        tone, sentences = verdict(params, lines)
        if not row:
            continue
        samples, real = _images(params, dataset, row)
        drawn = {
            "samples": sprite(samples[: COLUMNS * ROWS], COLUMNS, 1) if samples is not None else None,
            "real": sprite(real[: COLUMNS * ROWS], COLUMNS, 1) if real is not None and len(real) else None,
        }
        picture = None if drawn["samples"] else _picture(params, dataset, row)
        yield Card(dataset, row, tone, tuple(sentences), drawn["samples"], drawn["real"], picture)


def _shown_row(lines: Sequence[Line]) -> str:
    """The row of `densities` that comes first in the verdict, or its first trial."""
    rivals = contenders(lines)
    best = _best(rivals)
    if best is None:
        return ""
    if best["kind"] == "model":
        return str(best["row"])
    return next(str(line["row"]) for line in lines if str(line["row"]).startswith(f"{best['row']}-s"))


def _images(params: Params, dataset: str, row: str) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Samples of a row and real examples, as 8-bit images; None for points."""
    arrays = load_arrays("sample", row, "samples")
    samples = arrays.values["samples"] if arrays is not None else None
    if samples is not None and samples.dtype == "uint8":
        return samples, _real_images(params, dataset)
    patches = load_arrays("evaluate", row, "patches")
    if patches is None:
        return None, None
    from pipeline.sources.common.patches import restore
    from stages.arrays import as_bytes

    real, drawn = (as_bytes(0.5 + restore(patches.values[key]))[:, None] for key in ("real", "samples"))  # (n, 1, H, W)
    return drawn, real


def _real_images(params: Params, dataset: str) -> NDArray[Any] | None:
    """Real images, of the test split if an autoencoder left some; otherwise the control's training images."""
    for name in autoencoders_of(params, dataset):
        if (arrays := load_arrays("train", name, "exploration")) is not None:
            return arrays.values["originals"]
    for name in params.rows("controls"):
        if params.control(name).dataset == dataset and (arrays := load_arrays("control", name, "training-images")) is not None:
            return arrays.values["images"]
    return None


def _picture(params: Params, dataset: str, row: str) -> Picture | None:
    """The picture of points next to the target."""
    drawn_as = params.dataset(dataset).drawn_as
    found = [p for p in combined_pictures(dataset) if p.path.stem.endswith("-samples")]
    found += [p for stage in ("evaluate", "sample") for p in pictures(stage, row, drawn_as) if "samples" in p.path.stem]
    return found[0] if found else None


# The verdict ----------------------------------------------------------------------------------------------------------


def verdict(params: Params, lines: Sequence[Line]) -> tuple[Tone, list[str]]:
    """How good the result of a data set is, and why, in a few sentences; none if nothing is scored.

    Arguments:
        params: All tables.
        lines: The lines of the scoreboard of one data set.
    """
    rivals = contenders([line for line in lines if not is_missing(line["value"]) or _network(line)])
    best = _best(rivals)
    if best is None:
        return "none", []
    by_score = not is_missing(best["value"]) and not _of_codes(rivals)
    tone: Tone = "none"
    control, quality = "", ""
    if by_score and not is_missing(best["against_control"]):
        tone = "bad" if best["against_control"] == "worse" else "good"
        control = _against_control(best)
    if network := _network(best):
        seen, quality = _quality(best, [line for line in lines if line["kind"] == "control"], network)
        tone = seen if tone in ("none", seen) else "mixed" if seen != "none" else tone
    other = _runner_up(rivals, best)
    sentences = [_score(best), control, quality] if by_score else [quality]
    sentences.append(_against_runner_up(best, other) if other else "")
    return tone, [sentence for sentence in sentences if sentence]


def _of_codes(rivals: Sequence[Line]) -> bool:
    """Whether likelihoods are those of several autoencoders' codes, whose units differ."""
    codes = {line["autoencoder"] for line in rivals if not is_missing(line["autoencoder"])}
    return any(line["score"] == OF_CODES for line in rivals) and len(codes) > 1


def _best(rivals: Sequence[Line]) -> Line | None:
    """The line with the best score; by KID where likelihoods are of different codes, or there are none."""
    if not _of_codes(rivals) and (scored := [line for line in rivals if not is_missing(line["value"])]):
        return max(scored, key=lambda line: float(line["value"]))
    for network in NETWORKS:
        if scored := [line for line in rivals if not is_missing(line.get(f"{network}_kid"))]:
            return min(scored, key=lambda line: float(line[f"{network}_kid"]))
    return rivals[0] if rivals and not _of_codes(rivals) else None


def _network(line: Line) -> str:
    """The network whose features the samples were compared in; empty if they weren't."""
    return next((network for network in NETWORKS if not is_missing(line.get(f"{network}_kid"))), "")


def _named(line: Line) -> str:
    """A row's name, with a remark if it isn't a row of `densities`."""
    return f"{line['row']} ({remark(line)})" if remark(line) else str(line["row"])


def _score(best: Line) -> str:
    text = f"{_named(best)}: {plus_minus(best['value'], best['error'])} nats ({best['score']})"
    if not is_missing(best["gap_to_truth"]):
        text += f", {best['gap_to_truth']:.3f} nats short of the true density"
    if not is_missing(best["paper"]):
        text += f"; the paper: {plus_minus(best['paper'], best['paper_error'])}"
    return text + "."


def _runner_up(rivals: Sequence[Line], best: Line) -> Line | None:
    """The second-best row of the same score; none for means, whose trials differ by more than their points."""
    alike = ("score", "samples", "kind")
    others = [line for line in rivals if line is not best and all(line[key] == best[key] for key in alike)]
    return _best(others) if best["kind"] == "model" else None


def _against_runner_up(best: Line, other: Line) -> str:
    """Whether the best row differs from the next one, point by point where both kept their points."""
    pair = other, best
    scores = [read_metrics("evaluate", str(line["row"])) for line in pair]
    named = (key for key in SCORES if all(s.get(key) == line["value"] for s, line in zip(scores, pair, strict=True)))
    key = next(named, "")
    key = key if key and other["value"] != best["value"] and not _of_codes([best, other]) else f"{_network(best)}_kid"
    if any(s.get(key) is None for s in scores):
        return f"{other['row']} comes next."
    arrays = [load_arrays("evaluate", str(line["row"]), PER_EXAMPLE) for line in pair]
    points = [kept.values if kept is not None else {} for kept in arrays]
    found = difference(key, scores[0], scores[1], points[0], points[1])
    unit = "nats" if key in SCORES else "in KID"
    if not found.error > 0:
        return f"{other['row']} comes next, {abs(found.value):.3g} {unit} away."
    gap = f"{plus_minus(abs(found.value), found.error)} {unit}" + (", over the same test points" if found.paired else "")
    words = "is worse by more than chance" if found.sure else "is level with it, within the error of the difference"
    return f"The next one, {other['row']}, {words} ({gap})."


def _against_control(best: Line) -> str:
    gap, control = f"{abs(best['control_difference']):.1f} nats", best["best_control"]
    words = {"better": f"{gap} above", "worse": f"{gap} below", "level": "level with"}[best["against_control"]]
    return f"The score is {words} the best control ({control}); averages score high, too, so the score alone proves little."


def _quality(best: Line, controls: Sequence[Line], network: str) -> tuple[Tone, str]:
    """What the features of a network say of the samples, with training images as the reference."""
    kid, recall = f"{network}_kid", f"{network}_recall"
    score = f"KID {plus_minus(best[kid], best[f'{kid}_se'])}"
    covered = _percent(best[recall])
    reference = next((line for line in controls if not is_missing(line.get(kid))), None)
    if reference is None:
        text = f"{_named(best)}: {score} in the features of {network} (0 where samples and test images agree)"
        return "none", f"{text}; its samples cover {covered} of the test images (recall)."
    gap = float(best[kid]) - float(reference[kid])
    error = math.hypot(*(0.0 if is_missing(line[f"{kid}_se"]) else float(line[f"{kid}_se"]) for line in (best, reference)))
    close = gap <= SURE * error
    real = f"training images {plus_minus(reference[kid], reference[f'{kid}_se'])}"
    if close:
        told = "as close to test images as training images are, within the error"
    else:
        told = "further from test images than training images are, by more than chance"
    text = (
        f"The samples of {_named(best)} are {told}: {score}, {real} (lower is closer; features of {network}). They cover "
        f"{covered} of the test images (recall), training images {_percent(reference[recall])}."
    )
    if not close:
        return "bad", text
    if network == "classifier":  # too small a network to call blurred samples good
        return "none", f"{text} This small network sees shapes rather than sharpness: look at the pictures, too."
    return "good", text


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")
