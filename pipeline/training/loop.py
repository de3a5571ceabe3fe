"""The training loop of all models.

A killed and resumed run ends with the same bits as an uninterrupted one. The order of examples, the noise and the learning rate
are functions of the seed and the step; everything else is in the checkpoint. On any number of processes a step has the same
batch, the same noise and the same statistics of batch norm. Its loss and its gradient differ by rounding alone, and another
number of processes can resume from a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError, TrainingError
from pipeline.settings import TrainingSettings
from pipeline.storage.batches import Batches
from pipeline.system.devices import has_bfloat16
from pipeline.system.draws import BatchGenerator
from pipeline.system.progress import Progress
from pipeline.system.ranks import Ranks, synchronise_batch_norm
from pipeline.system.streams import stream_seed
from pipeline.system.watchdog import worked
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.muon import Muon
from pipeline.training.schedule import learning_rate
from pipeline.training.trainable import Step, Trainable, Training

__all__ = ["train"]

CURVE_POINTS = 200  # approximate number of rows of a training curve
CALM = "lower learning_rate or set gradient_clip"
RESUMED = (
    "curve",
    "validations",
    "validation_seconds",
    "best",
    "seconds",
    "ended_by",
)  # fields of the record that a resumed run restores


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
    patience: int = 0,
) -> Training:
    """Trains a model in place.

    Arguments:
        model: The model, on the rank's device.
        batches: Shuffled batches, the places of this rank.
        settings: Epochs, optimizer, schedule, precision, averaging.
        ranks: This process among its peers.
        prepare: Arrays of a batch -> tensors on the device.
        label: Prefix of progress messages.
        checkpoint: Where to save and look for the resume state.
        validate: Called at the end of an epoch in evaluation mode, on all ranks: numbers to keep in the curve.
        best: Key of `validate`'s numbers whose largest value chooses the weights; None keeps the last.
        validate_steps: Steps between further validations within an epoch; 0 for none.
        extra: More columns of the curve, given the current step.
        max_minutes: Time limit, after which training ends as after the last epoch; 0 for none.
        patience: Validations without a new best until training ends, at the end of an epoch; 0 for no such end.

    Raises:
        TrainingError: When a loss isn't finite, with the step and the likely cause; the last checkpoint is kept.
        PipelineError: On SIGINT or SIGTERM, after a checkpoint was written.
    """
    run = _Run(model, settings, ranks, batches, label, checkpoint, max_minutes, patience)
    run.resume()
    with _signals() as received, run.progress as progress:
        while not run.over:
            model.train()
            for arrays in batches.epoch(run.epoch, skip=run.index % run.steps_per_epoch):
                step, batch = run.next_step(), prepare(arrays)
                loss = run.optimise(step, batch)
                run.add_to_curve(step, extra)
                progress.advance(1, loss=loss, **run.last_validation())
                if run.out_of_time() or run.between_epochs:
                    break
                if validate_steps and run.index % validate_steps == 0:
                    run.validate(validate, best)
                run.save_if_due(received)
            # At the end of an epoch the validation comes first: a resumed run then has it too.
            run.validate(validate, best)
            run.save_if_due(received)
    return run.finish()


class _Run:
    """State of one training run: optimizers, averages, the record, the step, the checkpoint.

    Arguments:
        model, settings, ranks, batches, label, checkpoint, max_minutes, patience: As for `train`.

    Attributes:
        index: Steps done.
        record: The record so far.
    """

    def __init__(
        self,
        model: Trainable,
        settings: TrainingSettings,
        ranks: Ranks,
        batches: Batches,
        label: str,
        checkpoint: Checkpoint | None,
        max_minutes: float,
        patience: int,
    ) -> None:
        self.model, self.settings, self.ranks, self.label, self.checkpoint = model, settings, ranks, label, checkpoint
        self.batches, self.steps_per_epoch = batches, batches.steps_per_epoch
        self.total = settings.epochs * self.steps_per_epoch
        self.limit = max_minutes * 60 or math.inf  # seconds
        self.patience = patience
        if ranks.world > 1:
            synchronise_batch_norm(model)
        self.wrapped: nn.Module = model
        self._begin()

    def _begin(self) -> None:
        self.optimizers = {phase: _optimizers(self.model, phase, self.settings) for phase in self.model.phases}
        self.averages = _Averages(self.model, self.settings.ema_decay) if self.settings.ema_decay else None
        self.best_weights: dict[str, Tensor] | None = None
        self.record = Training()
        self.index = 0
        self.sums: dict[str, float] = {}  # of each loss since the last row of the curve
        self.summed = 0  # steps in them
        self.rate = 0.0
        self.saved_step: int | None = None  # of the checkpoint

    # Progress ---------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the next step."""
        return self.index // self.steps_per_epoch

    @property
    def between_epochs(self) -> bool:
        """Whether the last step ended an epoch."""
        return self.index % self.steps_per_epoch == 0

    @property
    def over(self) -> bool:
        """Whether all steps are done."""
        return self.index >= self.total or self.record.ended_by != "epochs" or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Whether the allowed number of validations without a new best is reached."""
        best = self.record.best
        return bool(self.patience and best) and (
            sum(row["step"] > best["step"] for row in self.record.validations) >= self.patience
        )

    def out_of_time(self) -> bool:
        """Updates the time; whether any rank has reached the limit, which then stops all ranks."""
        self._note_time()
        if self.limit < math.inf and self.ranks.greatest(self.record.seconds / self.limit)[0] >= 1:
            self.record.ended_by = "max_minutes"
        return self.record.ended_by == "max_minutes"

    def _note_time(self) -> None:
        self.record.seconds = time.monotonic() - self.started

    # Resume -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain types."""
        return {
            "step": self.index,
            "model": self.model.state_dict(),
            "optimizers": {
                phase: [optimizer.state_dict() for optimizer in optimizers] for phase, optimizers in self.optimizers.items()
            },
            "averaged": None if self.averages is None else self.averages.values,
            "best_weights": self.best_weights,
            "record": {name: getattr(self.record, name) for name in RESUMED},
            "sums": self.sums,
            "summed": self.summed,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.index = int(state["step"])
        self.model.load_state_dict(state["model"])
        for phase, optimizers in self.optimizers.items():
            for optimizer, values in zip(optimizers, state["optimizers"][phase], strict=True):
                optimizer.load_state_dict(values)
        if self.averages is not None:
            self.averages.values = {name: value.to(self.ranks.device) for name, value in state["averaged"].items()}
        self.best_weights = state["best_weights"]
        self.record = Training(**state["record"], resumed_at=self.index)
        self.sums, self.summed = state["sums"], int(state["summed"])

    def resume(self) -> None:
        """Resumes from the checkpoint, if any, and synchronises the ranks."""
        state = self.checkpoint.load() if self.checkpoint is not None else None
        if self.checkpoint is not None and state is not None:
            initial = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            try:
                self._restore(state)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # complete, but not of this run
                self.checkpoint.ignore(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                self.model.load_state_dict(initial)
                self._begin()
            else:
                self.saved_step = self.index
                if self.ranks.first:
                    print(f"{self.label}: going on from the checkpoint at step {self.index}", file=sys.stderr)
        if len(set(self.ranks.gather(self.index))) > 1:
            raise PipelineError(
                f"{self.label}: the processes find different checkpoints; put .checkpoints on a file system they share"
            )
        device = self.ranks.device
        if self.ranks.world > 1:
            from torch.nn.parallel import DistributedDataParallel

            self.wrapped = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=len(self.model.phases) > 1,
                broadcast_buffers=False,  # statistics of batch norm are those of the whole batch on every rank
            )
        if self.settings.precision == "bfloat16" and not has_bfloat16(device) and self.ranks.first:
            emulated = f"this {device.type} emulates bfloat16, slowly; try precision: float32"
            print(f"warning: {self.label}: {emulated}", file=sys.stderr)
        self.saved = time.monotonic()
        self.started = self.saved - self.record.seconds
        remaining = self.limit - self.record.seconds
        self.progress = Progress(
            self.total, self.label, "steps", initial=self.index, quiet=not self.ranks.first, seconds=remaining
        )

    def save_if_due(self, received: list[int]) -> None:
        """Saves the state when it's due, and ends the run after a signal.

        Raises:
            PipelineError: After a signal.
        """
        due = time.monotonic() - self.saved >= self.settings.checkpoint_minutes * 60
        number, wanted = (int(v) for v in self.ranks.greatest(received[0] if received else 0, due))
        if number or wanted:
            self._save()
        if number:
            raise PipelineError(
                f"{self.label}: stopped by {signal.Signals(number).name} at step {self.index}; {self._what_is_kept()}"
            )

    def _save(self) -> None:
        # The sums of all ranks, so that any number of ranks can go on from them.
        self.sums = dict(zip(self.sums, self.ranks.mean(list(self.sums.values())), strict=True))
        # Best weights and losses are checked: a checkpoint is always a good state.
        written = (
            self.checkpoint is not None
            and self.ranks.first
            and all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())
            and self.checkpoint.save(self.state())
        )
        if self.ranks.greatest(written)[0]:
            self.saved_step = self.index
        self.saved = time.monotonic()

    def _what_is_kept(self) -> str:
        if self.saved_step == self.index:
            return "the checkpoint is written: run the same command to go on"
        if self.saved_step is not None:
            return f"the checkpoint of step {self.saved_step} is kept: run the same command to go on from there"
        return "nothing is kept"

    # A step -----------------------------------------------------------------------------------------------------------

    def next_step(self) -> Step:
        """The next step, with generators seeded by its number."""
        seed = self.settings.seed
        # For layers that draw by themselves, such as nn.Dropout. None of ours does: their noise couldn't follow the example.
        _seed_global_generators(stream_seed("step of a process", seed, self.index, self.ranks.rank), self.ranks.device)
        generator = BatchGenerator(seed, self.index, self.batches.batch_size, self.batches.places)
        return Step(self.index, self.index / self.steps_per_epoch, generator)

    def optimise(self, step: Step, batch: dict[str, Tensor]) -> float:
        """Takes a step in every phase and returns the loss of the first."""
        worked()  # the batch has arrived; if one process doesn't get its batch, the others wait within the step
        share = self.ranks.greatest(self.record.seconds / self.limit)[0] if self.limit < math.inf else None
        self.rate = learning_rate(self.settings, self.index, self.steps_per_epoch, share)
        displayed_loss = 0.0
        for phase in self.model.phases:
            loss = self._optimise_phase(phase, batch, step)
            displayed_loss = displayed_loss or loss
        self.index += 1
        if self.averages is not None:
            self.averages.update(self.model, self.index)
        return displayed_loss

    def _optimise_phase(self, phase: str, batch: dict[str, Tensor], step: Step) -> float:
        optimizers = self.optimizers[phase]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = self.rate * group.get("relative", 1.0)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            losses = self.wrapped(phase, batch, step)
        for name, value in losses.items():
            key = name if phase == self.model.phases[0] else f"{phase}_{name}"
            self.sums[key] = self.sums.get(key, 0.0) + self.batches.share * float(value.detach())
        loss = losses["loss"]
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(self._not_finite(phase, batch))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (loss if self.batches.share == 1 else loss * self.batches.share).backward()
        if self.settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], self.settings.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.detach())

    def _not_finite(self, phase: str, batch: Mapping[str, Tensor]) -> str:
        bad = [name for name, value in batch.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        cause = (
            f"the data hold values that aren't finite ({', '.join(bad)})" if bad else "the learning rate is probably too high"
        )
        remedy = "check the data set" if bad else CALM
        remark = " The last good checkpoint is kept." if self.saved_step is not None else ""
        return f"{self.label}: the loss of phase '{phase}' isn't finite at step {self.index}: {cause}; {remedy}.{remark}"

    # The record -------------------------------------------------------------------------------------------------------

    def add_to_curve(self, step: Step, extra: Callable[[Step], dict[str, float]] | None) -> None:
        """Adds the step's losses, and a row of their means to the curve when it's due."""
        self.summed += 1
        if self.index % max(self.total // CURVE_POINTS, 1) and self.index != self.total:
            return
        means = self.ranks.mean([value / self.summed for value in self.sums.values()])
        self.record.curve.append(
            {"step": self.index, "epoch": self.index / self.steps_per_epoch, "learning_rate": self.rate}
            | dict(zip(self.sums, means, strict=True))
            | (extra(step) if extra is not None else {})
        )
        self.sums, self.summed = {}, 0

    def validate(self, validate: Callable[[], dict[str, float]] | None, best: str | None) -> None:
        """Validates the averaged weights, and keeps a copy if they are the best so far.

        Raises:
            TrainingError: When the number to choose by isn't finite.
        """
        if validate is None:
            return
        self.model.eval()
        with self.averages.swapped_in(self.model) if self.averages is not None else contextlib.nullcontext():
            values = validate()
            self._note_time()
            row: dict[str, float] = {"step": self.index, "epoch": self.index / self.steps_per_epoch, **values}
            self.record.validations.append(row)
            self.record.validation_seconds.append(self.record.seconds)
            if best is not None:
                if not math.isfinite(values[best]):
                    raise TrainingError(f"{self.label}: {best} is {values[best]} after step {self.index}: {CALM}")
                if not self.record.best or values[best] > self.record.best[best]:
                    self.record.best = row
                    self.best_weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        self.model.train()
        self.progress.note(**values)

    def last_validation(self) -> dict[str, float]:
        """Scores of the last validation, to show with each loss."""
        row = self.record.validations[-1] if self.record.validations else {}
        return {name: value for name, value in row.items() if name not in ("step", "epoch")}

    def finish(self) -> Training:
        """Puts the best, or averaged, weights into the model of every rank, and returns the record."""
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        elif self.averages is not None:
            self.model.load_state_dict(self.averages.values)
        # Ranks may differ by rounding; all score what the first one saves.
        self.ranks.take_from_first(self.model.state_dict().values())
        self.model.eval()
        if self.record.ended_by == "epochs" and self.index < self.total:
            self.record.ended_by = "patience"
        self.record.steps = self.index
        self.record.examples = self.index * self.batches.batch_size
        self._note_time()
        return self.record


def _optimizers(model: Trainable, phase: str, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    by_muon = list(model.muon_parameters(phase))
    moved_by_muon = {id(parameter) for parameter in by_muon}
    adamw = torch.optim.AdamW(
        [parameter for parameter in model.phase_parameters(phase) if id(parameter) not in moved_by_muon],
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    if not by_muon:
        return [adamw]
    group = {"params": by_muon, "relative": model.muon_rate}
    return [adamw, Muon([group], settings.learning_rate, weight_decay=settings.weight_decay)]


class _Averages:
    """Exponential moving average of the weights and the running statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._float = [n for n, v in self.values.items() if v.is_floating_point()]

    def update(self, model: nn.Module, step: int) -> None:
        # Over the first steps the average follows the weights closely; otherwise the start would weigh too much.
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        torch._foreach_lerp_([self.values[n] for n in self._float], [current[n] for n in self._float], 1 - decay)
        for name, value in current.items():
            if not value.is_floating_point():
                self.values[name].copy_(value)

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights, for a validation."""
        snapshot = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(snapshot)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM: the loop ends between two steps. The second signal ends it at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        for loader in multiprocessing.active_children():  # a stopped one would hold up the step
            with contextlib.suppress(ProcessLookupError):
                os.kill(cast(int, loader.pid), signal.SIGCONT)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # outside the main thread, handlers can't be set
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seed_global_generators(seed: int, device: torch.device) -> None:
    # torch.manual_seed also queues a seed, with a stack trace, for each kind of device that isn't in use, which took a fifth
    # of a small step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
