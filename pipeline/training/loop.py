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
from pipeline.storage.batches import Batches, run_ahead
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
LOOK_SECONDS, LOOK_STEPS = 1.0, 1000  # between two looks at the losses, at most
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
            epoch = batches.epoch(run.epoch, skip=run.index % run.steps_per_epoch)
            with contextlib.closing(run_ahead(epoch, pinned=ranks.device.type == "cuda")) as ahead:
                for arrays in ahead:
                    step, batch = run.next_step(), prepare(arrays)
                    run.optimise(step, batch)
                    looks = run.is_time_to_look(validate_steps, received)
                    if looks:
                        run.look(received, prepare)
                        run.add_to_curve(step, extra)
                    progress.advance(1, **run.shown())
                    if not looks:
                        continue
                    if run.out_of_time or run.between_epochs:
                        break
                    if validate_steps and run.index % validate_steps == 0:
                        run.validate(validate, best)
                    run.save_if_due()
            # At the end of an epoch the validation comes first: a resumed run then has it too.
            if validate is not None:
                run.validate(validate, best)
                run.look(received, prepare)
            run.save_if_due()
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
        first, *others = model.phases
        self.phase_of = {"loss": first} | {f"{phase}_loss": phase for phase in others}  # by the loss's name in the curve
        self._begin()

    def _begin(self) -> None:
        self.optimizers = {phase: _optimizers(self.model, phase, self.settings) for phase in self.model.phases}
        self.averages = _Averages(self.model, self.settings.ema_decay) if self.settings.ema_decay else None
        self.best_weights: dict[str, Tensor] | None = None
        self.record = Training()
        self.index = 0
        self.losses: list[dict[str, Tensor]] = []  # of the steps since the last look, on the device
        self.loss = math.nan  # of the step before the last look
        self.seconds = self.looked = 0.0  # the greatest of all ranks: at the last look, and at the last with losses
        self.look_at = 1  # step of the next look
        self.signal, self.due = 0, False  # at the last look, over all ranks: a signal to end, and whether a checkpoint is due
        self.sums: dict[str, float] = {}  # of each loss since the last row of the curve, over all ranks
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

    @property
    def out_of_time(self) -> bool:
        """Whether a rank had reached the time limit at the last look, which stops all ranks."""
        return self.record.ended_by == "max_minutes"

    def _note_time(self) -> None:
        self.record.seconds = time.monotonic() - self.started

    @property
    def _curve_steps(self) -> int:
        """Steps between rows of the curve; at most an epoch where time may end the training long before the last one."""
        steps = max(self.total // CURVE_POINTS, 1)
        return min(steps, self.steps_per_epoch) if self.limit < math.inf else steps

    def is_time_to_look(self, validate_steps: int, received: list[int]) -> bool:
        """Whether something is due that needs the losses, or that all ranks must decide together.

        On several ranks it is a function of the step and of what they have agreed on, so they all look after the same step. One
        alone also looks at once when it has received a signal, when a checkpoint is due or when its time is over.
        """
        if self.ranks.world == 1:
            self._note_time()
            if received or self._checkpoint_is_due() or self.record.seconds >= self.limit:
                return True
        return (
            self.index >= min(self.look_at, self.total)
            or self.between_epochs
            or self.index % self._curve_steps == 0
            or bool(validate_steps and self.index % validate_steps == 0)
        )

    def look(self, received: list[int], prepare: Callable[[dict[str, np.ndarray]], dict[str, Tensor]]) -> None:
        """Reads the losses of the steps since the last look, and agrees with the other ranks on what is due.

        Apart from validations and checkpoints, only here does the loop wait for the device, and do ranks exchange numbers.

        Raises:
            TrainingError: When a loss isn't finite, on all ranks.
        """
        self._note_time()
        steps = len(self.losses)
        first = self.index - steps
        bad = math.inf  # number of the first loss that isn't finite
        names = list(self.losses[0]) if steps else []
        values = torch.stack([value for losses in self.losses for value in losses.values()]).tolist() if steps else []
        for number, value in enumerate(values):
            name = names[number % len(names)]
            self.sums[name] = self.sums.get(name, 0.0) + self.batches.share * value
            if name in self.phase_of and not math.isfinite(value):
                bad = min(bad, number)
        self.losses = []
        told = self.ranks.exchange(
            received[0] if received else 0,
            self._checkpoint_is_due(),
            self.record.seconds,
            -bad,
            self.batches.share * values[-len(names)] if steps else self.loss,
            *self.sums.values(),
        )
        signals, due, seconds, bads, losses, *sums = zip(*told, strict=True)
        if max(bads) > -math.inf:
            step, number = divmod(int(-max(bads)), len(names))
            raise TrainingError(self._not_finite(first + step, self.phase_of[names[number]], prepare))
        self.signal, self.due, self.seconds = int(max(signals)), any(due), max(seconds)
        self.sums = {name: math.fsum(parts) / len(told) for name, parts in zip(self.sums, sums, strict=True)}
        if steps:
            self.loss = math.fsum(losses) / len(told)
            pace = max(self.seconds - self.looked, 1e-9) / steps
            self.look_at = self.index + max(min(int(LOOK_SECONDS / pace), 2 * steps, LOOK_STEPS), 1)
            self.looked = self.seconds
        if self.seconds >= self.limit:
            self.record.ended_by = "max_minutes"

    def _checkpoint_is_due(self) -> bool:
        return time.monotonic() - self.saved >= self.settings.checkpoint_minutes * 60

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
        self.record = Training(**state["record"], resumed_at=self.index, seconds_before=float(state["record"]["seconds"]))
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
            )
        if self.settings.precision == "bfloat16" and not has_bfloat16(device) and self.ranks.first:
            emulated = f"this {device.type} emulates bfloat16, slowly; try precision: float32"
            print(f"warning: {self.label}: {emulated}", file=sys.stderr)
        self.saved = time.monotonic()
        self.started = self.saved - self.record.seconds
        self.seconds = self.looked = self.record.seconds
        self.look_at = self.index + 1
        remaining = self.limit - self.record.seconds
        self.progress = Progress(
            self.total, self.label, "steps", initial=self.index, quiet=not self.ranks.first, seconds=remaining
        )

    def save_if_due(self) -> None:
        """Saves the state if that was due at the last look, and ends the run after a signal.

        Raises:
            PipelineError: After a signal.
        """
        if self.signal or self.due:
            self._save()
        if self.signal:
            raise PipelineError(
                f"{self.label}: stopped by {_signal_name(self.signal)} at step {self.index}; {self._what_is_kept()}"
            )

    def _save(self) -> None:
        # Best weights and losses are checked: a checkpoint is always a good state.
        written = (
            self.checkpoint is not None
            and self.ranks.first
            and all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())
            and self.checkpoint.save(self.state())
        )
        if self.ranks.greatest(written):
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

    def optimise(self, step: Step, batch: dict[str, Tensor]) -> None:
        """Takes a step in every phase."""
        worked()  # the batch has arrived; if one process doesn't get its batch, the others wait within the step
        seconds = self.record.seconds if self.ranks.world == 1 else self.seconds
        share = seconds / self.limit if self.limit < math.inf else None
        self.rate = learning_rate(self.settings, self.index, self.steps_per_epoch, share)
        self.losses.append({})
        batch = self.model.augment(batch, step)
        for phase in self.model.phases:
            self._optimise_phase(phase, batch, step)
        self.index += 1
        self.summed += 1
        if self.averages is not None:
            self.averages.update(self.model, self.index)

    def _optimise_phase(self, phase: str, batch: dict[str, Tensor], step: Step) -> None:
        optimizers = self.optimizers[phase]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = self.rate * group.get("relative", 1.0)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            losses = self.wrapped(phase, batch, step)
        for name, value in losses.items():
            key = name if phase == self.model.phases[0] else f"{phase}_{name}"
            self.losses[-1][key] = value.detach()
        loss = losses["loss"]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (loss if self.batches.share == 1 else loss * self.batches.share).backward()
        if self.settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], self.settings.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()

    def _not_finite(self, step: int, phase: str, prepare: Callable[[dict[str, np.ndarray]], dict[str, Tensor]]) -> str:
        # The batch is gone, but it can be made again.
        epoch, skip = divmod(step, self.steps_per_epoch)
        batch = prepare(next(self.batches.epoch(epoch, skip)))
        own = [name for name, value in batch.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        bad = sorted({name for names in self.ranks.gather(own) for name in names})
        cause = (
            f"the data hold values that aren't finite ({', '.join(bad)})" if bad else "the learning rate is probably too high"
        )
        remedy = "check the data set" if bad else CALM
        remark = " The last good checkpoint is kept." if self.saved_step is not None else ""
        return f"{self.label}: the loss of phase '{phase}' isn't finite at step {step}: {cause}; {remedy}.{remark}"

    # The record -------------------------------------------------------------------------------------------------------

    def add_to_curve(self, step: Step, extra: Callable[[Step], dict[str, float]] | None) -> None:
        """Adds a row of the mean losses to the curve when it's due."""
        if self.index % self._curve_steps and self.index != self.total:
            return
        self.record.curve.append(
            {"step": self.index, "epoch": self.index / self.steps_per_epoch, "learning_rate": self.rate}
            | {name: value / self.summed for name, value in self.sums.items()}
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
        self.progress.note(**_without_minus(values))

    def shown(self) -> dict[str, float | str]:
        """The epoch, the loss at the last look, and the scores of the last validation."""
        row = self.record.validations[-1] if self.record.validations else {}
        scores = _without_minus({name: value for name, value in row.items() if name not in ("step", "epoch")})
        epoch = f"{(self.index - 1) // self.steps_per_epoch + 1}"
        # With a time limit, the number of epochs is only a bound.
        of = "" if self.limit < math.inf else f" of {self.settings.epochs}"
        return {"epoch": epoch + of, "loss": self.loss, **scores}

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


def _signal_name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _without_minus(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers for people: `minus_valid_mse`, by which an epoch is chosen, as `valid_mse`."""
    return {name.removeprefix("minus_"): -value if name.startswith("minus_") else value for name, value in values.items()}


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
