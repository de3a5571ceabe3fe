"""Density, autoencoder, examples -> how strange each example is, and which of them don't belong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.autoencoders.common.foreign import OnnxDecoder, decoder_file, load_decoder, load_encoder
from pipeline.autoencoders.common.network import Decoder
from pipeline.densities import Density, load_density
from pipeline.errors import DataError, PipelineError
from pipeline.evaluation.detection import Calibration
from pipeline.evaluation.manifold import manifold_log_likelihood
from pipeline.sources.common.patches import restore
from pipeline.storage.columns import Column, are_named, from_codes, log_volume, to_codes, varying
from pipeline.storage.shards import ShardReader, from_unit, scale_pixels, to_unit
from pipeline.system.progress import track
from pipeline.system.streams import stream

__all__ = ["JOINED", "Extremes", "Scorer", "Scores", "calibrated", "fitted", "load_scorer", "recoded", "scored", "strange"]

# Scores that are joined into one -> the sign that makes larger ones stranger. Others are given, but not joined.
JOINED: Mapping[str, int] = {"log_likelihood": -1, "reconstruction_error": 1}
AT_ONCE = 256  # examples
CALIBRATING = 10_000  # validation examples, at most, the first of the split
GREY = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # of red, green and blue

Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Scorer:
    """Scores of single examples.

    Attributes:
        density: The density of the codes, in evaluation mode.
        encoder: From images to codes; None if codes are the data.
        decoder: From codes to images; None if there is none.
        value_range: Range of the pixels that the encoder takes.
        on_manifold: Whether to score decoded images on the decoder's manifold too, which takes D times as long.
        log_volume: What is added to log-likelihoods, for the units of a table.
        relative_error: Whether reconstruction errors are relative to the image, |decoded - x|^2 / (1 + |x|^2). A dark image, of
            which little must be reconstructed, has a small error however badly that is done.
    """

    density: Density
    encoder: nn.Module | None = None
    decoder: Decoder | OnnxDecoder | None = None
    value_range: tuple[float, ...] = (0.0, 1.0)
    on_manifold: bool = False
    log_volume: float = 0.0
    relative_error: bool = False

    def __post_init__(self) -> None:
        if not self.density.has_marginal:
            problem = "has no likelihood" if not self.density.has_log_prob else "has a likelihood only for a given context"
            raise PipelineError(f"'{self.density.family}' {problem}, so examples can't be scored; name another density")

    @torch.no_grad()
    def codes(self, examples: NDArray[np.generic]) -> Tensor:
        """The codes (n, D) of pixels 0..255 or images in 0..1, with shape (n, C, H, W), or the vectors themselves."""
        device = self.density.shift.device
        if self.encoder is None:
            return torch.from_numpy(np.ascontiguousarray(examples, np.float32)).to(device)
        codes: Tensor = self.encoder(self._images(examples).to(device)).float()
        return codes

    def _images(self, examples: NDArray[np.generic]) -> Tensor:
        if examples.dtype == np.uint8:
            return torch.from_numpy(scale_pixels(examples, self.value_range))
        return from_unit(torch.from_numpy(np.ascontiguousarray(examples, np.float32)), self.value_range)

    def __call__(self, examples: NDArray[np.generic]) -> Scores:
        """The scores of n examples, each with shape (n,).

        Returns:
            `log_likelihood` of the code, or in the units of a table, in nats; with a decoder `reconstruction_error`, the
            squared error summed over pixels in 0..1, or relative to the image; and if wished `manifold_log_likelihood`, in
            nats.
        """
        codes = self.codes(examples)
        scores = {"log_likelihood": self._log_likelihood(codes)}
        if self.encoder is not None and self.decoder is not None:
            with torch.no_grad():
                decoded = to_unit(self.decoder(codes), self.decoder.value_range)
                given = to_unit(self._images(examples).to(codes.device), self.value_range)
                errors, energy = ((x.double().square().flatten(1).sum(1)) for x in (decoded - given, given))
                scores["reconstruction_error"] = (errors / (1 + energy) if self.relative_error else errors).cpu().numpy()
            if self.on_manifold and isinstance(self.decoder, Decoder):
                values, _ = manifold_log_likelihood(self.density, self.decoder, codes)
                scores["manifold_log_likelihood"] = values.cpu().numpy()
        return scores

    @torch.no_grad()
    def _log_likelihood(self, codes: Tensor) -> NDArray[np.float64]:
        return self.density.log_prob(codes).double().cpu().numpy() + self.log_volume


def load_scorer(
    density: Path,
    autoencoder: Path,
    reader: ShardReader,
    device: torch.device | str = "cpu",
    on_manifold: bool = False,
    relative_error: bool = False,
) -> Scorer:
    """The scorer of a row.

    Arguments:
        density: File of the density.
        autoencoder: Folder of the autoencoder.
        reader: Shards of the data set that it was trained on.
        device: Where to compute.
        on_manifold: Whether to score decoded images on the decoder's manifold too.
        relative_error: Whether reconstruction errors are relative to the image.

    Raises:
        DataError: When a file is missing, damaged or of another row.
        PipelineError: When the density has no likelihood.
    """
    model = load_density(density).to(device)
    if reader.index.kind == "vectors":
        return Scorer(model, log_volume=log_volume(reader.index.columns))
    encoder, path = load_encoder(autoencoder, device), decoder_file(autoencoder)
    decoder = None if path is None else load_decoder(path, device)
    if encoder.latent_dim != model.dim:
        raise DataError(
            f"{density} is of codes with {model.dim} numbers, and {autoencoder} makes {encoder.latent_dim}; fit it again"
        )
    assert reader.index.value_range is not None
    on_manifold = on_manifold and isinstance(decoder, Decoder)  # others can't be differentiated
    return Scorer(model, encoder, decoder, reader.index.value_range, on_manifold, relative_error=relative_error)


def strange(scores: Scores) -> Scores:
    """The scores that are joined, each with the sign that makes larger ones stranger."""
    return {name: sign * scores[name] for name, sign in JOINED.items() if name in scores}


def calibrated(
    scorer: Scorer, reader: ShardReader, limit: int = CALIBRATING, quiet: bool = False
) -> tuple[Calibration, Scores]:
    """What validation examples score, so that others can be compared with them.

    Arguments:
        scorer: Gives the scores.
        reader: Shards of the data set that the density was fitted on.
        limit: Validation examples, at most, the first of the split.
        quiet: Whether to show no progress.

    Returns:
        The calibration, and the validation examples' scores.
    """
    scorer = replace(scorer, on_manifold=False)  # that score isn't joined
    blocks = (block["examples"] for block in reader.blocks("valid"))
    scores, _ = scored(scorer, None, _first(blocks, limit), min(limit, reader.index.count("valid")), "validation", quiet=quiet)
    return Calibration(strange(scores)), scores


def scored(
    scorer: Scorer,
    calibration: Calibration | None,
    blocks: Iterable[NDArray[np.generic]],
    total: int,
    label: str,
    shown: int = 0,
    quiet: bool = False,
) -> tuple[Scores, Extremes]:
    """Scores of a stream of examples, and the strangest and the most ordinary of them; memory holds a block, and the scores.

    Arguments:
        scorer: Gives the scores.
        calibration: Joins them into the score `strangeness`, in nats; None for none.
        blocks: Blocks of examples.
        total: Number of examples, for progress messages.
        label: Whose they are.
        shown: Examples to keep of either kind.
        quiet: Whether to show no progress.

    Returns:
        Scores with shape (N,), and the examples kept.
    """
    parts: list[Scores] = []
    extremes = Extremes(shown)
    for examples in track(_cut(blocks), total, f"scoring {label}", "examples", quiet=quiet):
        scores = scorer(examples)
        if calibration is not None:
            scores["strangeness"] = calibration.join(strange(scores))
            extremes.add(scores["strangeness"], examples)
        parts.append(scores)
    if not parts:
        raise DataError(f"there is no example to score: {label}")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, extremes


def _first(blocks: Iterable[NDArray[np.generic]], limit: int) -> Iterator[NDArray[np.generic]]:
    for block in blocks:
        yield block[:limit]
        limit -= len(block)
        if limit <= 0:
            return


def _cut(blocks: Iterable[NDArray[np.generic]]) -> Iterator[NDArray[np.generic]]:
    return (block[start : start + AT_ONCE] for block in blocks for start in range(0, len(block), AT_ONCE))


@dataclass
class Extremes:
    """The strangest and the most ordinary examples of a stream.

    Attributes:
        count: Examples to keep of either kind.
        strangest: Those with the largest scores, the strangest first.
        ordinary: Those with the smallest, the most ordinary first.

    Example:
        >>> extremes = Extremes(2)
        >>> extremes.add(np.array([3.0, 1.0, 2.0]), np.array([30, 10, 20]), ["c", "a", "b"])
        >>> extremes.add(np.array([4.0]), np.array([40]), ["d"])
        >>> [example.item() for _, example, _ in extremes.strangest], [name for *_, name in extremes.ordinary]
        ([40, 30], ['a', 'b'])
    """

    count: int
    strangest: list[tuple[float, NDArray[np.generic], str]] = field(default_factory=list)
    ordinary: list[tuple[float, NDArray[np.generic], str]] = field(default_factory=list)

    def add(self, scores: NDArray[np.float64], examples: NDArray[np.generic], names: Sequence[str] = ()) -> None:
        """Adds examples (n, ...) with their scores (n,), and names if they have any."""
        if not self.count:
            return
        order = np.argsort(scores, kind="stable")
        for kept, chosen, sign in ((self.strangest, order[::-1], -1), (self.ordinary, order, 1)):
            kept += [(float(scores[i]), examples[i].copy(), names[i] if names else "") for i in chosen[: self.count]]
            kept.sort(key=lambda item, sign=sign: sign * item[0])  # type: ignore[misc]
            del kept[self.count :]


def fitted(examples: NDArray[np.generic], shape: tuple[int, ...], name: str, patches: bool = False) -> NDArray[np.generic]:
    """Examples of another data set in the shape of one's own: images are resized and get its number of channels.

    Arguments:
        examples: Pixels 0..255 or images in 0..1 with shape (n, C, H, W), or vectors (n, D).
        shape: Shape of one's own examples.
        name: Name of the other data set, for messages.
        patches: Whether its vectors are image patches, to be compared with images as such: 8x8 grey levels around 0.5.

    Returns:
        The examples as they are if they have that shape, else images in 0..1.

    Raises:
        DataError: When vectors have another length, or vectors are to be compared with images.
    """
    if examples.shape[1:] == shape:
        return examples
    if patches and len(shape) == 3:
        examples = (0.5 + restore(examples.astype(np.float32)))[:, None].clip(0, 1)  # (n, 1, 8, 8)
    if examples.ndim != 4 or len(shape) != 3:
        raise DataError(f"'{name}' holds examples with shape {examples.shape[1:]}, which can't be compared with {shape}")
    images = torch.from_numpy(np.ascontiguousarray(scale_pixels(examples, (0.0, 1.0)), np.float32))
    if images.shape[1] == 3 and shape[0] == 1:
        images = (images * GREY).sum(dim=1, keepdim=True)
    images = images.expand(-1, shape[0], -1, -1)
    resized = nn.functional.interpolate(images, shape[1:], mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(0, 1).numpy()


def recoded(
    codes: NDArray[np.generic], theirs: Sequence[Column], own: Sequence[Column], name: str, number: int = 0
) -> NDArray[np.generic]:
    """Codes of the rows of another table as codes of one's own columns, which may be stored by other shifts and scales.

    Where both tables have names of columns, these count, in any order; else the order.

    Arguments:
        codes: Codes of the other table, with shape (n, D).
        theirs: Columns of the other table; empty if the codes are the values.
        own: Columns of one's own table; empty if its codes are the values.
        name: Name of the other data set, for messages.
        number: Number of the block, for the noise of dequantised columns.

    Raises:
        DataError: When the tables have different columns.
    """
    if tuple(theirs) == tuple(own):
        return codes
    rows = from_codes(theirs, codes)  # (n, C)
    names, wanted = [column.name for column in theirs], [column.name for column in own]
    if are_named(names) and are_named(wanted):
        if absent := [column for column in wanted if column not in names]:
            raise DataError(f"'{name}' has no column '{absent[0]}'; it has {', '.join(names)}")
        rows = rows[:, [names.index(column) for column in wanted]]
    if not own:
        return rows.astype(np.float32)
    if rows.ndim != 2 or rows.shape[1] != len(own):
        raise DataError(f"'{name}' holds examples with shape {rows.shape[1:]}, which can't be compared with {(len(own),)}")
    dims = varying(own)
    noise = stream("noise of new rows", number).random((len(rows), len(dims)))
    return to_codes([own[i] for i in dims], rows[:, dims], noise)
