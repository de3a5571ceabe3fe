"""The one loop for all that is trained: schedule, precision, averaging, ranks, checkpoints, resume.

A run that was killed and resumed ends with the same bits as one that never was: the order of examples, the noise and the
learning rate are functions of the seed and the number of the step, and everything else stands in the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import DataError, PipelineError, TrainingError
from pipeline.settings import TrainingSettings
from pipeline.storage.batches import Batches
from pipeline.system.devices import has_bfloat16
from pipeline.system.files import atomic_file
from pipeline.system.progress import Progress
from pipeline.system.ranks import Ranks, synchronise_batch_norm
from pipeline.training.muon import Muon

__all__ = ["Checkpoint", "Step", "Trainable", "Training", "code_digest", "learning_rate", "train"]

PACKAGE = Path(__file__).parents[1]
CURVE_POINTS = 200  # rows of a training curve, about


@dataclass(frozen=True)
class Step:
    """Where training stands when a loss is computed.

    Attributes:
        index: Steps done before this one.
        epoch: Fractional epoch, index / steps an epoch.
        generator: Source of all randomness of the step. It is seeded anew from (seed, index, rank) at every step, so a resumed
            run draws the same numbers with no state to keep. It lives on the CPU.
    """

    index: int
    epoch: float
    generator: torch.Generator


class Trainable(nn.Module):
    """A network together with the losses that train it.

    Attributes:
        phases: Names of the parts of a step, each with its own optimizers, in order. Most have one.
        muon_rate: Muon's learning rate, as a multiple of AdamW's.
    """

    phases: tuple[str, ...] = ("model",)
    muon_rate: float = 1.0

    def phase_parameters(self, phase: str) -> Iterable[nn.Parameter]:
        """The parameters that the phase's optimizers move."""
        return self.parameters()

    def muon_parameters(self, phase: str) -> Iterable[Tensor]:
        """Those of them that Muon moves; AdamW moves the others."""
        return ()

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The loss of a phase under the key "loss", and what else is to be logged, each a scalar.

        Arguments:
            phase: One of `phases`.
            batch: "images" with shape (B, C, H, W) in the range of the data set, or "codes" with shape (B, D); "labels" (B,)
                where there are any.
            step: Where training stands.
        """
        raise NotImplementedError


@dataclass
class Training:
    """What a training run leaves besides the weights.

    Attributes:
        curve: Rows of the training curve: step, epoch, learning_rate, the means of the logged losses since the row before.
        validations: A row for each validation: step, epoch, and what `validate` gave.
        validation_seconds: When each validation ended, in seconds of the loop; apart, since the rows are the same in every run.
        best: Step and value of the best validation, where a key was given.
        steps: Steps taken in all.
        seconds: Time spent in the loop, over all pieces of a resumed run.
        examples: Examples seen.
        resumed_at: Step of the checkpoint that this process went on from; none for a fresh start.
        ended_by: `epochs`, or `max_minutes`.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    validation_seconds: list[float] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    examples: int = 0
    resumed_at: int | None = None
    ended_by: str = "epochs"


def learning_rate(settings: TrainingSettings, step: int, steps_per_epoch: int, progress: float | None = None) -> float:
    r"""The learning rate of a step.

    `steps` halves it at each milestone, counted in epochs; `cosine` rises linearly over the first share :math:`w` of all steps
    and then follows :math:`\frac{1}{2} (1 + \cos(\pi (p - w) / (1 - w)))` with :math:`p` the share of all steps done.

    Arguments:
        settings: Schedule and highest learning rate.
        step: Steps done before.
        steps_per_epoch: Steps in an epoch.
        progress: Share of the training that is done, where time and not epochs sets its end.

    Example:
        >>> settings = TrainingSettings(epochs=10, learning_rate=0.4, schedule="steps", milestones=(2, 5))
        >>> [learning_rate(settings, step, 1) for step in (0, 2, 5)]
        [0.4, 0.2, 0.1]
    """
    if settings.schedule == "steps":
        return float(settings.learning_rate * 0.5 ** sum(step >= m * steps_per_epoch for m in settings.milestones))
    if settings.schedule == "cosine":
        total = settings.epochs * steps_per_epoch
        done = max(step / total, progress or 0.0)
        if done < settings.warm_up:
            return settings.learning_rate * max(done, 1 / total) / settings.warm_up
        return (
            settings.learning_rate
            * 0.5
            * (1 + math.cos(math.pi * min((done - settings.warm_up) / (1 - settings.warm_up), 1.0)))
        )
    return settings.learning_rate


def _optimizers(model: Trainable, phase: str, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    by_muon = list(model.muon_parameters(phase))
    those = {id(parameter) for parameter in by_muon}
    adamw = torch.optim.AdamW(
        [parameter for parameter in model.phase_parameters(phase) if id(parameter) not in those],
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    if not by_muon:
        return [adamw]
    group = {"params": by_muon, "relative": model.muon_rate}
    return [adamw, Muon([group], settings.learning_rate, weight_decay=settings.weight_decay)]


def code_digest() -> str:
    """Digest of the library's source, so that a checkpoint of other code is never picked up."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Checkpoint:
    """The resume state of one run, in a file named by what the run is made of.

    Arguments:
        folder: Folder of this stage and row; checkpoints of other settings are removed from it on the first save.
        identity: Settings, digests of data and code: a checkpoint is found again only if all of it is the same.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:20]
        self.path = self.folder / f"{key}.pt"

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes tensors and plain types, whole or not at all, and their digest, since PyTorch checks only part of its file."""
        # By way of memory: of a full disk PyTorch's own writer says no more than that something went wrong.
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())
        for other in self.folder.glob("*.pt"):
            if other != self.path:
                other.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state, or none where there is no checkpoint of this very run; one that can't be read is put aside."""
        if not self.path.exists():
            return None
        try:
            with self.path.open("rb") as file:
                digest, data = file.read(32), file.read()
            if hashlib.sha256(data).digest() != digest:
                raise DataError("its digest is another")
            state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:
            print(f"warning: {self.path} can't be read ({type(error).__name__}); starting from the beginning", file=sys.stderr)
            self.path.unlink(missing_ok=True)
            return None
        return state

    def remove(self) -> None:
        """Removes the checkpoint, once what it leads to is safely written."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the loop ends between two steps. The second one ends at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals aren't ours
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Averaged:
    """Exponential moving average of the weights and the running statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._float = [n for n, v in self.values.items() if v.is_floating_point()]

    def update(self, model: nn.Module, step: int) -> None:
        # The average of few steps follows the weights closely, else the start would weigh too much.
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        torch._foreach_lerp_([self.values[n] for n in self._float], [current[n] for n in self._float], 1 - decay)
        for name, value in current.items():
            if not value.is_floating_point():
                self.values[name].copy_(value)

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights, for a validation."""
        kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(kept)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _seed_global_generators(seed: int, device: torch.device) -> None:
    # torch.manual_seed also leaves a seed, with a trace of the stack, for each kind of device that isn't in use: that took a
    # fifth of a small step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def train(
    model: Trainable,
    batches: Batches,
    settings: TrainingSettings,
    ranks: Ranks,
    *,
    prepare: Callable[[dict[str, np.ndarray]], dict[str, Tensor]],
    label: str = "training",
    checkpoint: Checkpoint | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    best: str | None = None,
    validate_steps: int = 0,
    extra: Callable[[Step], dict[str, float]] | None = None,
    max_minutes: float = 0.0,
) -> Training:
    """Trains a model in place.

    Arguments:
        model: The model, on the rank's device.
        batches: Shuffled batches of this rank.
        settings: Epochs, optimizer, schedule, precision, averaging.
        ranks: This process among its peers.
        prepare: Arrays of a batch -> tensors on the device.
        label: What stands before the progress.
        checkpoint: Where to save and look for the resume state.
        validate: Called at the end of an epoch in evaluation mode, on all ranks: numbers to keep in the curve.
        best: Key of `validate`'s numbers whose largest value says which weights are kept; none keeps the last.
        validate_steps: Steps between two more validations within an epoch; 0 for none.
        extra: More columns of the curve, from where training stands.
        max_minutes: Time after which training ends as if the epochs were over; 0 for none.

    Raises:
        TrainingError: When a loss isn't finite, with the step and the likely cause; the last checkpoint stays.
        PipelineError: On SIGINT or SIGTERM, after a checkpoint was written.
    """
    device = ranks.device
    if settings.sync_batch_norm and ranks.world > 1:
        synchronise_batch_norm(model)
    optimizers = {phase: _optimizers(model, phase, settings) for phase in model.phases}
    averaged = _Averaged(model, settings.ema_decay) if settings.ema_decay else None
    best_weights: dict[str, Tensor] | None = None
    record = Training()
    sums: dict[str, float] = {}
    summed = 0

    def state(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "model": model.state_dict(),
            "optimizers": {phase: [optimizer.state_dict() for optimizer in those] for phase, those in optimizers.items()},
            "averaged": None if averaged is None else averaged.values,
            "best_weights": best_weights,
            "record": {
                "curve": record.curve,
                "validations": record.validations,
                "validation_seconds": record.validation_seconds,
                "best": record.best,
                "seconds": record.seconds,
            },
            "sums": sums,
            "summed": summed,
        }

    start_step = 0
    restored = checkpoint.load() if checkpoint is not None else None
    if restored is not None:
        start_step = int(restored["step"])
        model.load_state_dict(restored["model"])
        for phase, those in optimizers.items():
            for optimizer, values in zip(those, restored["optimizers"][phase], strict=True):
                optimizer.load_state_dict(values)
        if averaged is not None:
            averaged.values = {name: value.to(device) for name, value in restored["averaged"].items()}
        best_weights = restored["best_weights"]
        record = Training(**restored["record"], resumed_at=start_step)
        sums, summed = restored["sums"], int(restored["summed"])
        if ranks.first:
            print(f"{label}: going on from the checkpoint at step {start_step}", file=sys.stderr)

    if len(set(ranks.gather(start_step))) > 1:
        raise PipelineError(f"{label}: the processes find different checkpoints; put .checkpoints on a file system they share")
    wrapped: nn.Module = model
    if ranks.world > 1:
        from torch.nn.parallel import DistributedDataParallel

        wrapped = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=len(model.phases) > 1
        )

    steps_per_epoch = batches.steps_per_epoch
    total = settings.epochs * steps_per_epoch
    every = max(total // CURVE_POINTS, 1)
    generator = torch.Generator()
    seconds_before = record.seconds
    started = saved = time.monotonic()
    index = start_step
    ended = False
    autocast_type = torch.bfloat16 if settings.precision == "bfloat16" else None
    if autocast_type is not None and not has_bfloat16(device) and ranks.first:
        print(f"warning: {label}: this {device.type} imitates bfloat16, slowly; try precision: float32", file=sys.stderr)

    def save() -> None:
        # Best weights and losses are checked, so that a checkpoint is always a good state.
        if checkpoint is not None and ranks.first and all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            checkpoint.save(state(index))
        ranks.barrier()

    def save_if_due() -> None:
        nonlocal saved
        due = time.monotonic() - saved >= settings.checkpoint_minutes * 60
        number, wanted = (int(v) for v in ranks.greatest(received[0] if received else 0, due))
        if number or wanted:
            save()
            saved = time.monotonic()
        if number:
            kept = "the checkpoint is written: run the same command to go on" if checkpoint is not None else "nothing is kept"
            raise PipelineError(f"{label}: stopped by {signal.Signals(number).name} at step {index}; {kept}")

    def validate_now() -> None:
        nonlocal best_weights
        if validate is None:
            return
        model.eval()
        with averaged.swapped_in(model) if averaged is not None else contextlib.nullcontext():
            values = validate()
            record.seconds = time.monotonic() - started + seconds_before
            row: dict[str, float] = {"step": index, "epoch": index / steps_per_epoch, **values}
            record.validations.append(row)
            record.validation_seconds.append(record.seconds)
            if best is not None:
                if not math.isfinite(values[best]):
                    raise TrainingError(
                        f"{label}: {best} is {values[best]} after step {index}: lower learning_rate or set gradient_clip"
                    )
                if not record.best or values[best] > record.best[best]:
                    record.best = row
                    best_weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        model.train()
        progress.note(**values)

    def latest() -> dict[str, float]:
        # Beside each loss, since the line of a validation is left out soon after another.
        row = record.validations[-1] if record.validations else {}
        return {name: value for name, value in row.items() if name not in ("step", "epoch")}

    left = max_minutes * 60 - record.seconds if max_minutes else math.inf
    progress = Progress(total, label, unit="steps", initial=index, quiet=not ranks.first, seconds=left)
    with _signals() as received, progress:
        for epoch in range(index // steps_per_epoch, settings.epochs):
            if ended:
                break
            model.train()
            for arrays in batches.epoch(epoch, skip=index - epoch * steps_per_epoch):
                seed = _step_seed(settings.seed, index, ranks.rank)
                generator.manual_seed(seed)
                _seed_global_generators(seed, device)  # dropout draws from them
                step = Step(index, index / steps_per_epoch, generator)
                batch = prepare(arrays)
                share = ranks.greatest(record.seconds / 60 / max_minutes)[0] if max_minutes else None
                rate = learning_rate(settings, index, steps_per_epoch, share)
                shown = 0.0
                for phase in model.phases:
                    groups = [group for optimizer in optimizers[phase] for group in optimizer.param_groups]
                    for group in groups:
                        group["lr"] = rate * group.get("relative", 1.0)
                    with torch.autocast(device.type, autocast_type, enabled=autocast_type is not None):
                        losses = wrapped(phase, batch, step)
                    loss = losses["loss"]
                    for name, value in losses.items():
                        key = name if phase == model.phases[0] else f"{phase}_{name}"
                        sums[key] = sums.get(key, 0.0) + float(value.detach())
                    if not math.isfinite(float(loss.detach())):
                        raise TrainingError(_not_finite(label, index, phase, batch, checkpoint))
                    for optimizer in optimizers[phase]:
                        optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    if settings.gradient_clip:
                        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], settings.gradient_clip)
                    for optimizer in optimizers[phase]:
                        optimizer.step()
                    shown = shown or float(loss.detach())
                summed += 1
                index += 1
                if averaged is not None:
                    averaged.update(model, index)
                if index % every == 0 or index == total:
                    means = dict(zip(sums, ranks.mean([value / summed for value in sums.values()]), strict=True))
                    record.curve.append(
                        {"step": index, "epoch": index / steps_per_epoch, "learning_rate": rate}
                        | means
                        | (extra(step) if extra is not None else {})
                    )
                    sums, summed = {}, 0
                progress.advance(1, loss=shown, **latest())
                record.seconds = time.monotonic() - started + seconds_before
                if max_minutes and ranks.greatest(record.seconds / 60)[0] >= max_minutes:
                    ended, record.ended_by = True, "max_minutes"
                    break
                # At the end of an epoch the validation comes first, so that a resumed run has it too.
                if index % steps_per_epoch:
                    if validate_steps and index % validate_steps == 0:
                        validate_now()
                    save_if_due()
            validate_now()
            save_if_due()
    if best_weights is not None:
        model.load_state_dict(best_weights)
    elif averaged is not None:
        model.load_state_dict(averaged.values)
    # Running statistics that aren't synchronised differ between ranks; what the first one saves is what all of them score.
    ranks.take_from_first(model.state_dict().values())
    model.eval()
    record.steps = index
    record.examples = index * batches.batch_size
    record.seconds = time.monotonic() - started + seconds_before
    return record


def _not_finite(label: str, step: int, phase: str, batch: Mapping[str, Tensor], checkpoint: Checkpoint | None) -> str:
    bad = [name for name, value in batch.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    cause = f"the data hold values that aren't finite ({', '.join(bad)})" if bad else "the learning rate is probably too high"
    remedy = "check the data set" if bad else "lower learning_rate or set gradient_clip"
    kept = " The last good checkpoint is kept." if checkpoint is not None and os.path.exists(checkpoint.path) else ""
    return f"{label}: the loss of phase '{phase}' isn't finite at step {step}: {cause}; {remedy}.{kept}"
