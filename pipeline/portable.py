"""A generator -> ONNX files that give its numbers without this project: encoder, decoder, and the log-likelihood."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.densities import Density
from pipeline.densities.auto import Mixture
from pipeline.densities.common.flows import NormalisingFlow
from pipeline.densities.common.orders import reordered
from pipeline.densities.gaussian import Gaussian
from pipeline.densities.gmm import GaussianMixture
from pipeline.densities.kde import KernelDensity
from pipeline.errors import PipelineError
from pipeline.generator import Generator
from pipeline.storage.columns import Column, log_volume, varying
from pipeline.storage.shards import from_unit, to_unit

__all__ = ["TOLERANCE", "context_titles", "score_network", "write_onnx"]

TOLERANCE = 1e-4  # largest difference from the library; of numbers above 1 as a share of them
CHECKED = 48  # samples that files are compared on
BATCHES = (1, 3, 44)  # in which these are given
TRACED = 4  # length of the batch that a network is traced with

Network = Callable[[Tensor], Tensor]


class _LogProb(nn.Module):
    """`log_prob` of a density, marginal and joint with each context, without checks and chunks that depend on the batch."""

    def __init__(self, density: Density) -> None:
        super().__init__()
        self.density, self.networks = density, _networks(density)
        self.orders = getattr(density, "orders", None)
        self.weights = None if density.context is None else density.context.weights.log()
        factor = density.factor
        self.whitening = None if factor is None else torch.linalg.inv(factor.double()).T.to(factor.dtype)

    def joint(self, z: Tensor) -> Tensor:
        """Log-densities (B, M) of codes (B, D) in each context, or (B, 1) without."""
        density = self.density
        infinite = torch.isinf(z).any(dim=1) & ~torch.isnan(z).any(dim=1)
        z = torch.where(infinite[:, None], density.shift, z)
        offset = (z if density.transform is None else density.transform(z)) - density.shift
        white = offset / density.scale if self.whitening is None else offset @ self.whitening
        slope = -density.scale.log().sum()
        slopes = slope if density.transform is None else slope + density.transform.log_det(z)
        each = [torch.where(infinite, -math.inf, network(white) + slopes) for network in self.networks]
        return torch.stack(each, dim=1)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Log-densities (B,), and with contexts also those joint with each, (B, M)."""
        if self.orders is None:
            each = self.joint(z)
        else:
            views = torch.stack([self.joint(reordered(z, order)) for order in self.orders])
            each = torch.logsumexp(views, dim=0) - math.log(len(views))
        if self.weights is None:
            return each[:, 0]
        each = each + self.weights
        return torch.logsumexp(each, dim=1), each


def _networks(density: Density) -> list[Network]:
    """What gives log-densities (B,) of standardised codes (B, D), for each context of the training codes, or for all."""
    if isinstance(density, Mixture):
        members = [_LogProb(member) for member in density._members()]

        def mixed(z: Tensor) -> Tensor:
            each = torch.stack([density.log_weights[i] + member.joint(z)[:, 0] for i, member in enumerate(members)])
            return torch.logsumexp(each, dim=0)

        return [mixed]
    if isinstance(density, Gaussian | GaussianMixture | KernelDensity):
        classes = [None] if density.context is None else list(range(density.category_contexts))
        return [_mixture(density, c)._log_prob for c in classes]
    if density.context is None:
        return [density._log_prob]
    return [_in_context(density, row) for row in density.context.encode(density.context.rows, check=False)]


def _in_context(density: Density, row: Tensor) -> Network:
    """Log-densities (B,) of standardised codes (B, D) in an encoded context (E,)."""

    def log_prob(z: Tensor) -> Tensor:
        value: Tensor = density._log_prob(z, context=row.expand(len(z), -1))  # type: ignore[call-arg]
        return value

    return log_prob


def _mixture(density: Gaussian | GaussianMixture | KernelDensity, c: int | None) -> GaussianMixture:
    """A mixture of Gaussians, or that of a class, with a whitening matrix for each; ONNX solves no triangular systems."""
    if isinstance(density, KernelDensity):
        precisions = torch.exp(-density.log_widths)
        weights = torch.full_like(precisions, -math.log(len(precisions)))
        parts, covariance = (weights, density.points, precisions[:, None].expand_as(density.points)), "diagonal"
    elif isinstance(density, GaussianMixture):
        parts = (density.log_weights, density.means, density.whitening) if c is None else density._mixture(c)
        covariance = density.options.covariance
    else:
        mean, cholesky = (part if c is None else part[c] for part in (density.mean, density.cholesky))
        whitening = torch.linalg.inv(cholesky.double()).T.to(cholesky.dtype)
        parts, covariance = (mean.new_zeros(1), mean[None], whitening[None]), "full"
    mixture = GaussianMixture(density.dim, components=[len(parts[0])], covariance=covariance)
    mixture.to(parts[1])
    for name, part in zip(("log_weights", "means", "whitening"), parts, strict=True):
        getattr(mixture, name).copy_(part)
    return mixture.eval()


def score_network(density: Density) -> nn.Module:
    """A network that gives the log-likelihood (B,) of codes (B, D), and joint with each context (B, M) if there are contexts.

    Raises:
        PipelineError: When the density has no likelihood, or contexts that can't be listed.
    """
    if isinstance(density, NormalisingFlow):
        raise PipelineError(f"flows such as '{density.family}' can't be written as ONNX; the default format holds them")
    if isinstance(density, Mixture):
        for member in density._members():
            score_network(member)
    if not density.has_marginal:
        problem = "has no likelihood" if not density.has_log_prob else "has contexts that can't be listed"
        raise PipelineError(f"a density of the family '{density.family}' {problem}, so its score can't be written as ONNX")
    return _LogProb(density)


def _as_float32(density: Density) -> Density:
    """The density, told to round no products in scoring: files hold float32."""
    if getattr(density.options, "scoring_precision", "float32") != "float32":
        density.options = dataclasses.replace(density.options, scoring_precision="float32")
    return density


class _Encoder(nn.Module):
    """From images in 0..1 to codes."""

    def __init__(self, encoder: Encoder, value_range: tuple[float, ...]) -> None:
        super().__init__()
        self.encoder, self.value_range = encoder, value_range

    def forward(self, images: Tensor) -> Tensor:
        """Codes (B, D) of images (B, C, H, W)."""
        codes: Tensor = self.encoder(from_unit(images, self.value_range))
        return codes


class _Decoder(nn.Module):
    """From codes to images in 0..1."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) of codes (B, D)."""
        return to_unit(self.decoder(codes), self.decoder.value_range)


class _Rows(nn.Module):
    """The score of rows of a table, float64 in its units."""

    def __init__(self, score: nn.Module, columns: Sequence[Column]) -> None:
        super().__init__()
        dims = varying(columns)
        chosen = [columns[number] for number in dims]
        self.score, self.log_volume = score, log_volume(columns)
        self.dims = nn.Buffer(torch.tensor(dims))
        self.shift, self.scale = (
            nn.Buffer(torch.tensor([getattr(column, key) for column in chosen], dtype=torch.float64))
            for key in ("shift", "scale")
        )

    def forward(self, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """As of the score, of rows (B, C)."""
        values = self.score(((rows.index_select(1, self.dims) - self.shift) / self.scale).float())
        if isinstance(values, Tensor):
            return values + self.log_volume
        return values[0] + self.log_volume, values[1] + self.log_volume


def write_onnx(generator: Generator, folder: Path) -> dict[str, float]:
    """Writes `log_prob.onnx`, and of images `encoder.onnx` and `decoder.onnx`, and compares them with the library.

    The batch may have any length. Images are float32 in 0..1, codes float32; rows of a table float64 in its units.

    Arguments:
        generator: The generator, on the CPU.
        folder: Where the files go.

    Returns:
        For each file, the largest difference from the library's numbers on 48 samples, see `TOLERANCE`.

    Raises:
        PipelineError: When a package of the extra `[onnx]` is missing, the density can't be written, or a file gives other
            numbers.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PipelineError(f"--format onnx needs {error.name}; install it: pip install '.[onnx]'") from None
    density = _as_float32(generator.density)
    score, taken = score_network(density), "codes"
    drawn = generator.draw(CHECKED, seed=0)
    examples, codes = torch.from_numpy(drawn.examples), torch.from_numpy(drawn.codes)
    if not all(column.plain for column in generator.columns):
        score, taken = _Rows(score, generator.columns), "rows"
    networks: dict[str, tuple[nn.Module, Tensor, Sequence[str]]] = {
        "log_prob": (score, examples if taken == "rows" else codes, (taken, "log_prob", "log_joint"))
    }
    if generator.decoder is not None:
        networks["decoder"] = (_Decoder(generator.decoder), codes, ("codes", "images"))
        if generator.encoder is not None:
            encoder = _Encoder(generator.encoder, generator.decoder.value_range)
            networks["encoder"] = (encoder, examples, ("images", "codes"))
    expected: dict[str, Callable[[], NDArray[Any]]] = {
        "log_prob": lambda: generator.log_prob(drawn.examples) if taken == "rows" else density.log_prob(codes).numpy(),
        "decoder": lambda: generator.decode(drawn.codes),
        "encoder": lambda: generator.encode(drawn.examples),
    }
    differences = {}
    density.requires_grad_(False)
    for name, (network, inputs, names) in networks.items():
        path = folder / f"{name}.onnx"
        path.write_bytes(_exported(network, inputs[:TRACED], names, f"the {name} of the family '{density.family}'"))
        differences[path.name] = _difference(path, inputs.numpy(), expected[name]())
    return differences


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch prints on the way."""
    import logging
    import warnings

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@torch.no_grad()
def _exported(network: nn.Module, inputs: Tensor, names: Sequence[str], what: str) -> bytes:
    """The ONNX model of a network, without the paths of this machine that torch writes into it."""
    network = network.eval()
    results = network(inputs)
    outputs = list(names[1 : 1 + (1 if isinstance(results, Tensor) else len(results))])
    try:
        with _quiet():
            # Strict: otherwise `len(z)` would fix the length of the batch.
            traced = torch.export.export(network, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True)
            program = torch.onnx.export(traced, input_names=[names[0]], output_names=outputs, dynamo=True, verbose=False)
            assert program is not None
            model = program.model_proto
    except Exception as error:  # torch's errors have no base in common
        reason = " ".join(str(error).split())[:200]
        raise PipelineError(f"{what} can't be written as ONNX ({reason}); the default format holds it") from None
    for part in (model.graph, *model.functions):
        for item in (*part.node, *part.value_info, *getattr(part, "input", ()), *getattr(part, "output", ())):
            for field in ("doc_string", "metadata_props"):
                if hasattr(item, field):
                    item.ClearField(field)
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _difference(path: Path, inputs: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference of a file's first output from what is expected, with batches of several lengths."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    parts = np.split(inputs, np.cumsum(BATCHES)[:-1])
    given = np.concatenate([session.run(None, {taken.name: part})[0] for part in parts])
    largest = float((np.abs(given - expected) / np.maximum(1, np.abs(expected))).max())
    if not given.shape == expected.shape or not largest <= TOLERANCE:
        raise PipelineError(f"{path.name} gives other numbers than the library, by {largest:.2g}; the default format holds it")
    return largest


def context_titles(density: Density) -> list[str]:
    """What the contexts are called that `log_joint` lists; empty without."""
    return [] if density.context is None else [density.context.title(row) for row in density.context.rows.tolist()]
