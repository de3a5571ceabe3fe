"""shards -> autoencoder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.settings import AutoencoderSettings, Params
from stages import workspace
from stages.run import Run, stage

if TYPE_CHECKING:
    import numpy as np

    from pipeline.autoencoders.common.base import Objective
    from pipeline.storage.shards import ShardReader
    from pipeline.system.ranks import Ranks
    from pipeline.training.trainable import Step

SHOWN = 10  # test images with their reconstructions
SCATTERED = 5000  # test codes of two numbers, or training points, saved for a picture
MAPPED = 400  # test images on the page's map of codes
PATCHES = 100  # training patches saved for a picture
VALIDATED = 10_000  # validation images that the epoch is chosen by, at most, rounded up to whole shards
SCORED = 200_000  # training and validation images scored at the end, at most, rounded up to whole shards; test images all are
PICTURE_EPOCHS = 10  # between pictures for MLflow, at most, where TRACKING_PICTURES doesn't say otherwise
GAUSSIAN = 500  # validation images whose codes make the Gaussian of those pictures
VALIDATION = "minus_valid_mse"  # by which the epoch is chosen, where a row has patience


@stage(
    settings=Params.autoencoder,
    reads=lambda settings, row: [workspace.shards_folder(settings.dataset)],
    writes=lambda settings, row: [
        workspace.autoencoder_folder(row),
        workspace.curve_file("train", row),
        workspace.arrays_folder("train", row),
    ],
    ranks=True,
)
def train(run: Run, settings: AutoencoderSettings) -> None:
    """Train an autoencoder, with or without incremental learning of its latent vector.

    NAME is a row of `autoencoders`. A killed run resumes from its last checkpoint. Vectors (objective `identity`) and given
    networks (`onnx`) need no training.
    """
    import torch

    from pipeline.settings import TrainingSettings, implementation
    from pipeline.storage.batches import Batches
    from pipeline.storage.shards import ShardReader, scale_pixels
    from pipeline.system.files import atomic_folder
    from pipeline.system.ranks import join
    from pipeline.training.checkpoint import Checkpoint, identity
    from pipeline.training.loop import train as train_model

    ranks = join()
    reader = ShardReader(workspace.shards_folder(settings.dataset))
    run.read(settings.dataset, reader.index.digest, reader.folder, "training")
    module = implementation("pipeline.autoencoders", settings.objective, "objective")
    objective: Objective = module.build(settings, reader.index.shape, reader.index.value_range)
    folder = workspace.autoencoder_folder(run.row)
    if not objective.trained or not isinstance(settings, TrainingSettings):
        if ranks.first:
            with atomic_folder(folder) as temporary:
                objective.save(temporary)
            run.curve([])
            if reader.index.kind == "vectors":
                _vectors(run, reader, run.params.dataset(settings.dataset).drawn_as)
        if objective.reconstructs:
            _score(run, objective, reader, ranks)
        ranks.barrier()
        return

    objective.to(ranks.device)
    batches = Batches(
        lambda number: reader.load("train", number),
        reader.counts("train"),
        settings.batch_size,
        settings.seed,
        window=settings.shuffle_examples,
        rank=ranks.rank,
        world=ranks.world,
    )

    def prepare(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(arrays["examples"]).to(ranks.device, non_blocking=True)
        images = scale_pixels(pixels, reader.index.value_range)
        if getattr(settings, "channels_last", False):
            images = images.contiguous(memory_format=torch.channels_last)
        return {"images": images}

    def validate() -> dict[str, float]:
        return {VALIDATION: -_validation_error(objective, reader, ranks)}

    pictures = _Pictures(run, objective, reader, ranks, settings.epochs) if run.tracker.on else None  # the first rank's

    def at_point(step: Step) -> dict[str, float]:
        if pictures is not None:
            pictures.draw_if_due(step)
        return {"open_dimensions": objective.open_dimensions(step)}

    checkpoint = Checkpoint(workspace.checkpoint_folder("train", run.row), identity(settings, reader.index.digest))
    training = train_model(
        objective,
        batches,
        settings,
        ranks,
        prepare=prepare,
        label=f"training {run.row}",
        checkpoint=checkpoint,
        validate=validate if settings.patience else None,
        best=VALIDATION if settings.patience else None,
        max_minutes=settings.max_minutes,
        patience=settings.patience,
        extra=at_point,
    )
    if ranks.first:
        with atomic_folder(folder) as temporary:
            objective.save(temporary)
        run.curve(training.table())
        run.when_finished(checkpoint.remove)
    _score(run, objective, reader, ranks)
    run.details(
        steps=training.steps,
        examples_seen=training.examples,
        training_seconds=training.seconds,
        examples_per_second=training.examples / max(training.seconds, 1e-9),
        parameters=sum(p.numel() for p in objective.parameters()),
        device=str(ranks.device),
        processes=ranks.world,
        resumed_at=training.resumed_at,
        seconds_before=round(training.seconds_before, 3),
        ended_by=training.ended_by,
    )
    ranks.barrier()


def _epochs_between_pictures(epochs: int) -> int:
    text = os.environ.get("TRACKING_PICTURES") or str(min(PICTURE_EPOCHS, -(-epochs // 10)))
    if not text.isdecimal():
        raise PipelineError(f"TRACKING_PICTURES={text}: write a number of epochs, or 0 for no pictures")
    return int(text)


class _Pictures:
    """Validation images, their reconstructions and samples, drawn for MLflow while an autoencoder trains.

    Samples are decoded from one Gaussian of the codes. Closed dimensions are 0 in all. Training isn't touched: nothing is drawn
    from its random numbers, and no statistic moves.
    """

    def __init__(self, run: Run, objective: Objective, reader: ShardReader, ranks: Ranks, epochs: int) -> None:
        self.run, self.objective, self.reader, self.ranks = run, objective, reader, ranks
        self.every, self.drawn = _epochs_between_pictures(epochs), 0

    def draw_if_due(self, step: Step) -> None:
        """Draws once in `every` epochs."""
        if not self.every or int(step.epoch / self.every) <= self.drawn:
            return
        self.drawn = int(step.epoch / self.every)
        self.objective.eval()
        try:
            self.run.picture("training", step.index, self._rows(self.objective.open_dimensions(step)))
        finally:
            self.objective.train()

    def _rows(self, open_dimensions: int) -> dict[str, np.ndarray]:
        import torch

        from pipeline.storage.shards import from_unit, scale_pixels, to_unit

        value_range = self.reader.index.value_range or (0.0, 1.0)
        examples = next(self.reader.blocks("valid", [0]))["examples"][:GAUSSIAN]
        images = torch.from_numpy(scale_pixels(examples, (0.0, 1.0))).to(self.ranks.device)
        with torch.no_grad():
            codes = self.objective.encode(from_unit(images, value_range))
            codes[:, open_dimensions:] = 0
            mean, centred = codes.mean(dim=0), codes - codes.mean(dim=0)
            # A sum of centred codes with weights from N(0, 1 / n) has their covariance.
            weights = torch.randn(SHOWN, len(codes), generator=torch.Generator().manual_seed(0)) / len(codes) ** 0.5
            samples = mean + weights.to(codes) @ centred
            decoded = to_unit(self.objective.decode(torch.cat([codes[:SHOWN], samples])), value_range).float().cpu().numpy()
        shown = min(SHOWN, len(codes))
        rows = {"validation images": images[:shown].cpu().numpy(), "reconstructions": decoded[:shown]}
        return rows | {"samples of a Gaussian of the codes": decoded[-shown:]}


def _validation_error(objective: Objective, reader: ShardReader, ranks: Ranks) -> float:
    """Squared error of the first validation images, mean over pixels in 0..1; ranks share the shards."""
    import numpy as np
    import torch

    from pipeline.evaluation.moments import Moments
    from pipeline.storage.shards import from_unit, scale_pixels, to_unit

    value_range = reader.index.value_range or (0.0, 1.0)
    counts = np.cumsum([0, *reader.counts("valid")[:-1]])
    shards = [number for number in ranks.share(len(counts)) if counts[number] < VALIDATED]
    moments = Moments()
    for block in reader.blocks("valid", shards):
        images = torch.from_numpy(scale_pixels(block["examples"], (0.0, 1.0))).to(ranks.device)
        with torch.no_grad():
            reconstructions = to_unit(objective.decode(objective.encode(from_unit(images, value_range))), value_range)
        moments.update((reconstructions - images).square().mean(dim=(1, 2, 3)).double().cpu().numpy())
    total, *others = ranks.gather(moments)
    for other in others:
        total.merge(other)
    return float(total.mean)


def _score(run: Run, objective: Objective, reader: ShardReader, ranks: Ranks) -> None:
    """MSE, PSNR and SSIM on every split; the MSE against the number of open dimensions; a VAE's divergence.

    All test images are scored, and `SCORED` of the training and validation images, from shards spread evenly over the split;
    where that leaves images out, the metric `train_scored` or `valid_scored` says how many were scored. There is no
    checkpoint here, so the work mustn't grow with the training set.

    Ranks share the shards; the first also saves arrays for pictures.
    """
    import numpy as np
    import torch

    from pipeline.evaluation.exploration import exploration
    from pipeline.evaluation.moments import KEPT, Moments
    from pipeline.evaluation.reconstruction import ReconstructionScore, open_dimension_errors, opened
    from pipeline.storage.parts import spread
    from pipeline.storage.shards import from_unit, scale_pixels, to_unit
    from pipeline.system.progress import Progress
    from stages.arrays import PER_EXAMPLE, as_bytes

    value_range = reader.index.value_range or (0.0, 1.0)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        return objective.encode(from_unit(images, value_range).to(ranks.device))

    @torch.no_grad()
    def decode(codes: torch.Tensor) -> torch.Tensor:
        return to_unit(objective.decode(codes), value_range).cpu()

    @torch.no_grad()
    def divergence(images: torch.Tensor) -> torch.Tensor | None:
        values = objective.divergence(from_unit(images, value_range).to(ranks.device))
        return None if values is None else values.cpu()

    def rank_blocks(split: str, label: str) -> Iterator[dict[str, np.ndarray]]:
        counts = reader.counts(split)
        shards = range(len(counts)) if split == "test" else spread(counts, SCORED)
        total = sum(counts[number] for number in shards)
        with Progress(total, f"{label} of {run.row}", unit="images", quiet=not ranks.first) as progress:
            for block in reader.blocks(split, [shards[i] for i in ranks.share(len(shards))]):
                yield block
                progress.advance(len(block["examples"]) * ranks.world)

    pictured: tuple[Any, Any] | None = None
    kept: list[np.ndarray] = []  # squared errors of the first test images
    for split in ("train", "valid", "test"):
        score, kl = ReconstructionScore(), Moments()
        for block in rank_blocks(split, f"reconstructions ({split})"):
            images = torch.from_numpy(scale_pixels(block["examples"], (0.0, 1.0)))
            reconstructions = decode(encode(images))
            errors = score.update(images.numpy(), reconstructions.numpy())
            if (values := divergence(images)) is not None:
                kl.update(values.numpy())
            if split == "test":
                kept.append(errors[: max(KEPT - sum(map(len, kept)), 0)])
                pictured = pictured or (images[:SHOWN].numpy(), reconstructions[:SHOWN].numpy())
        score, *rank_scores = ranks.gather(score)
        for rank_score in rank_scores:
            score.merge(rank_score)
        kl, *rank_divergences = ranks.gather(kl)
        for divergences in rank_divergences:
            kl.merge(divergences)
        run.metrics(score.metrics(split))
        if score.mse.count < reader.index.count(split):
            run.metrics({f"{split}_scored": score.mse.count})
        if kl.count:
            run.metrics({f"{split}_kl": kl.mean, f"{split}_kl_se": kl.result().standard_error})
    ks = opened(objective.latent_dim or 0)
    unit_blocks = (scale_pixels(block["examples"], (0.0, 1.0)) for block in rank_blocks("test", "open dimensions"))
    by_dimensions, *rank_errors = ranks.gather(open_dimension_errors(unit_blocks, encode, decode, ks))
    for part in rank_errors:
        by_dimensions.merge(part)
    squared_errors = _in_order(reader, ranks, np.concatenate(kept or [np.empty(0)]))
    if not ranks.first:
        return
    run.arrays("open-dimensions", {"ks": np.array(ks), "mse": by_dimensions.mse})
    run.tracked_curve("test_mse_first_k", ks, by_dimensions.mse)
    run.arrays(PER_EXAMPLE, {"test_mse": squared_errors.astype(np.float32)})
    assert pictured is not None
    arrays = {"inputs": as_bytes(pictured[0]), "reconstructions": as_bytes(pictured[1])}
    if objective.latent_dim == 2:
        codes: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for block in reader.blocks("test"):
            codes.append(encode(torch.from_numpy(scale_pixels(block["examples"], (0.0, 1.0)))).cpu().numpy())
            labels += [block["labels"]] if "labels" in block else []
            if sum(map(len, codes)) >= SCATTERED:
                break
        points = np.concatenate(codes)[:SCATTERED]
        colours = np.concatenate(labels)[:SCATTERED] if labels else None
        arrays |= {"codes": points} | ({} if colours is None else {"labels": colours})
    run.arrays("reconstructions", arrays)
    first = reader.first("test", MAPPED)
    run.arrays("exploration", exploration(scale_pixels(first["examples"], (0.0, 1.0)), first.get("labels"), encode, decode))


def _in_order(reader: ShardReader, ranks: Ranks, values: np.ndarray) -> np.ndarray:
    """Values of all ranks' first test images, in the order of the split.

    Arguments:
        reader: The shards.
        ranks: This process among its peers.
        values: Values of this rank's images, with shape (n,), at least those of its images among the first KEPT.
    """
    import numpy as np

    from pipeline.evaluation.moments import KEPT

    counts = [shard.count for shard in reader.index.parts("test")]
    starts = np.cumsum([0, *counts])
    ordered = np.empty(min(sum(counts), KEPT))
    for rank, of_rank in enumerate(ranks.gather(values[:KEPT])):
        numbers = [number for number in range(rank, len(counts), ranks.world) if starts[number] < len(ordered)]
        places = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in numbers] or [np.empty(0, int)])
        places = places[places < len(ordered)]
        ordered[places] = of_rank[: len(places)]
    return ordered


def _vectors(run: Run, reader: ShardReader, drawn_as: str) -> None:
    """The first training vectors: whole patches, or the first two numbers of points."""
    from pipeline.storage.columns import from_codes, varying

    vectors = reader.first("train", PATCHES if drawn_as == "patches" else SCATTERED)["examples"]
    columns = reader.index.columns
    points = from_codes(columns, vectors)[:, varying(columns)[:2] or slice(2)]
    run.arrays("training-vectors", {"vectors": vectors if drawn_as == "patches" else points})
