"""codes -> density."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.settings import DensitySettings, Params
from stages import workspace
from stages.run import Run, stage

if TYPE_CHECKING:
    from pipeline.training.trainable import Training

SCORED = 20_000  # at most so many codes of a split are scored here, the first ones; evaluate scores every test code


@stage(
    settings=Params.density,
    reads=lambda settings, row: [workspace.codes_folder(settings.codes)],
    writes=lambda settings, row: [workspace.density_file(row).parent, workspace.curve_file("fit", row)],
    ranks=True,
)
def fit(run: Run, settings: DensitySettings) -> None:
    """Fit a density on cached codes: the latent density estimator (LDE) or one of its rivals.

    NAME is a row of `densities`. The epoch with the best validation likelihood is kept; for a family without likelihood, the
    epoch whose samples are closest to validation codes. A killed run resumes from its last checkpoint.
    """
    from pipeline.evaluation.likelihood import log_likelihood, with_context
    from pipeline.fitting import fit_density
    from pipeline.storage.codes import CodeReader
    from pipeline.system.files import atomic_folder
    from pipeline.system.progress import track
    from pipeline.system.ranks import join
    from pipeline.training.checkpoint import Checkpoint, identity

    ranks = join()
    codes = CodeReader(workspace.codes_folder(settings.codes))
    run.read(settings.codes, codes.index.digest, codes.folder, "training")
    checkpoint = Checkpoint(workspace.checkpoint_folder("fit", run.row), identity(settings, codes.index.digest))
    density, training = fit_density(settings, codes, ranks, f"fitting {run.row}", checkpoint)
    if ranks.first:
        with atomic_folder(workspace.density_file(run.row).parent) as temporary:
            density.save(temporary / "density.safetensors")
    if density.has_log_prob:
        for split in ("train", "valid", "test"):
            blocks = with_context(density, codes, codes.blocks(split, SCORED))
            name = f"{split}_{density.likelihood}"
            number = min(codes.index.count(split), SCORED)
            tracked = track(blocks, number, f"scoring {split} codes of {run.row}", "codes", quiet=not ranks.first)
            mean, error, count = log_likelihood(density, tracked, ranks, codes.index.log_volume)
            run.metrics({name: mean, f"{name}_se": error, f"{name}_per_dimension": mean / codes.index.dim})
            run.metrics({f"{name}_per_dimension_se": error / codes.index.dim, f"{split}_scored": count})
    if training.contest:
        # The contest also fits densities to validation codes. Each is scored on codes that it wasn't fitted to.
        mean, error = training.best["valid_log_likelihood"], training.best["valid_log_likelihood_se"]
        run.metrics({"valid_log_likelihood": mean, "valid_log_likelihood_se": error})
        run.metrics({"valid_log_likelihood_per_dimension": mean / codes.index.dim})
        run.metrics({"valid_log_likelihood_per_dimension_se": error / codes.index.dim})
        run.metrics({"valid_scored": int(training.best["valid_scored"])})
        run.details(contest=training.contest)
    run.metrics({"parameters": density.parameter_count})
    run.metrics(density.chosen())
    if training.best:
        run.metrics({"best_epoch": training.best["epoch"]})
        if not density.has_log_prob:
            run.metrics({key: value for key, value in training.best.items() if key.startswith("valid_")})
    run.curve(training.table())
    run.details(
        steps=training.steps,
        examples_seen=training.examples,
        training_seconds=training.seconds,
        examples_per_second=training.examples / max(training.seconds, 1e-9),
        parameters=density.parameter_count,
        ended_by=training.ended_by,
        validations=_learning_curve(training),
        device=str(ranks.device),
        processes=ranks.world,
        resumed_at=training.resumed_at,
        seconds_before=round(training.seconds_before, 3),
    )
    if ranks.first:
        run.when_finished(checkpoint.remove)
    ranks.barrier()


def _learning_curve(training: Training) -> list[dict[str, float]]:
    """Examples seen, minutes and scores of each validation."""
    batch = training.examples // max(training.steps, 1)
    return [
        {"examples": int(row["step"]) * batch, "minutes": round(seconds / 60, 3), **row}
        for row, seconds in zip(training.validations, training.validation_seconds, strict=False)
    ]
