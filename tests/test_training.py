"""The training loop: schedule, averaging, NaN, resume to the bit, signals, and a golden curve."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small
import torch
from torch import Tensor, nn

from pipeline.autoencoders import ae
from pipeline.errors import PipelineError, TrainingError
from pipeline.settings import EvaluationSettings, NamedFile, QualitySettings, TrainingSettings, named_files, read_params
from pipeline.storage.batches import Batches
from pipeline.storage.codes import CodeReader
from pipeline.storage.shards import ShardReader
from pipeline.system.draws import normal
from pipeline.system.ranks import Ranks
from pipeline.training import checkpoint as checkpoints
from pipeline.training import loop as training
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import train
from pipeline.training.schedule import learning_rate
from pipeline.training.trainable import Step, Trainable, Training
from stages import train as train_stage

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNTS = [13, 9, 20]
DATA = np.random.default_rng(0).normal(size=(sum(COUNTS), 3)).astype(np.float32)


class Toy(Trainable):
    """Two phases, batch norm, dropout and noise: all that a resumed run could get wrong."""

    phases = ("model", "second")

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
            self.other = nn.Linear(3, 1)

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list((self.net if phase == "model" else self.other).parameters())

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        x = batch["x"]
        noisy = x + 0.1 * normal(x.shape, step.generator)
        net = self.net if phase == "model" else self.other
        loss = (net(noisy).squeeze(1) - x.sum(1)).square().mean()
        return {"loss": loss, "size": x.abs().mean()}


def batches(**arguments: Any) -> Batches:
    starts = np.cumsum([0, *COUNTS])
    return Batches(lambda i: {"x": DATA[starts[i] : starts[i + 1]]}, COUNTS, 8, seed=3, **{"window": 10, **arguments})


SETTINGS = TrainingSettings(
    epochs=4, batch_size=8, learning_rate=0.05, schedule="cosine", ema_decay=0.9, gradient_clip=1.0, weight_decay=0.01
)


def run(
    checkpoint: Checkpoint | None = None,
    settings: TrainingSettings = SETTINGS,
    best: bool = True,
    prepare: Callable[[dict[str, np.ndarray]], dict[str, Tensor]] | None = None,
    model: Trainable | None = None,
    loader: Batches | None = None,
) -> tuple[Trainable, Training]:
    model = model or Toy()

    @torch.no_grad()
    def validate() -> dict[str, float]:
        return {"score": -float(model("second", {"x": torch.from_numpy(DATA)}, Step(0, 0, torch.Generator()))["loss"])}

    record = train(
        model,
        loader or batches(),
        settings,
        ALONE,
        prepare=prepare or (lambda arrays: {"x": torch.from_numpy(arrays["x"])}),
        checkpoint=checkpoint,
        validate=validate,
        best="score" if best else None,
        extra=lambda step: {"twice": 2.0 * step.index},
    )
    return model, record


def same(a: tuple[Trainable, Training], b: tuple[Trainable, Training]) -> None:
    for (name, x), (_, y) in zip(a[0].state_dict().items(), b[0].state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    for key in ("curve", "validations", "best", "steps", "examples"):
        assert getattr(a[1], key) == getattr(b[1], key), key


class Interrupt:
    """Sends this process a signal at a step."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.at, self.number, self.count = at, number, 0

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)
        return {"x": torch.from_numpy(arrays["x"])}


# Schedule and averaging -----------------------------------------------------------------------------------------------


def test_schedules() -> None:
    constant = TrainingSettings(epochs=10, learning_rate=0.1)
    assert [learning_rate(constant, s, 5) for s in (0, 20, 49)] == [0.1, 0.1, 0.1]
    steps = TrainingSettings(epochs=10, learning_rate=0.1, schedule="steps", milestones=(2, 4))
    assert [learning_rate(steps, s, 5) for s in (0, 9, 10, 19, 20, 49)] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    cosine = TrainingSettings(epochs=10, learning_rate=0.1, schedule="cosine", warm_up=0.2)
    rates = [learning_rate(cosine, s, 5) for s in range(50)]
    assert all(a < b for a, b in itertools.pairwise(rates[1:11]))  # rises over 10 of 50 steps
    assert math.isclose(max(rates), 0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
    middle = 0.1 * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert any(math.isclose(r, middle, rel_tol=0.1) for r in rates)


@pytest.mark.parametrize("epochs", [1, 2, 3, 9, 40])
def test_a_warm_up_never_exceeds_the_highest_rate(epochs: int) -> None:
    settings = TrainingSettings(epochs=epochs, learning_rate=0.1, schedule="cosine", warm_up=0.1)
    assert max(learning_rate(settings, step, 1) for step in range(epochs)) <= 0.1


def test_averaged_weights_are_the_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=1, schedule="constant", ema_decay=0.3)
    seen: list[dict[str, Tensor]] = []
    update = training._Averages.update

    def noted(self: Any, model: nn.Module, step: int) -> None:
        seen.append({n: v.clone() for n, v in model.state_dict().items()})
        update(self, model, step)

    monkeypatch.setattr(training._Averages, "update", noted)
    model, _ = run(settings=settings, best=False)
    average = {n: v.clone().double() for n, v in Toy().state_dict().items() if v.is_floating_point()}
    for step, weights in enumerate(seen, start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {n: decay * v + (1 - decay) * weights[n].double() for n, v in average.items()}
    assert len(seen) > 3  # from then on the decay is the setting
    for name, value in average.items():
        assert torch.allclose(model.state_dict()[name].double(), value, atol=1e-6), name


def test_averaged_weights_are_validated() -> None:
    model = Toy()
    validated: list[Tensor] = []

    def validate() -> dict[str, float]:
        validated.append(model.other.weight.detach().clone())
        return {}

    train(model, batches(), SETTINGS, ALONE, prepare=lambda a: {"x": torch.from_numpy(a["x"])}, validate=validate)
    assert torch.equal(validated[-1], model.other.weight)  # without a best epoch the averaged weights are kept


def test_the_optimizer_is_the_one_that_is_asked_for() -> None:
    settings = dataclasses.replace(SETTINGS, betas=(0.8, 0.9), weight_decay=0.3)
    (optimizer,) = training._optimizers(Toy(), "model", settings)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], len(group["params"])) == ((0.8, 0.9), 0.3, 6)


def test_muon_is_set_as_it_is_asked_for() -> None:
    class ByMuon(Toy):
        muon_rate = 3.0

        def muon_parameters(self, phase: str) -> list[Tensor]:
            return [self.net[0].weight]

    _, muon = training._optimizers(ByMuon(), "model", dataclasses.replace(SETTINGS, weight_decay=0.3))
    (group,) = muon.param_groups
    assert (group["relative"], group["weight_decay"], len(group["params"])) == (3.0, 0.3, 1)


def test_the_best_epoch_is_kept() -> None:
    settings = dataclasses.replace(SETTINGS, learning_rate=3.0, ema_decay=0.0, schedule="constant", gradient_clip=0.0)
    model, record = run(settings=settings)
    scores = [row["score"] for row in record.validations]
    assert record.best["score"] == max(scores) > scores[-1]
    last, _ = run(settings=settings, best=False)
    assert not torch.equal(last.state_dict()["other.weight"], model.state_dict()["other.weight"])


def test_curve_rows_are_means_over_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CURVE_POINTS", 2)
    _, record = run()
    assert [row["step"] for row in record.curve] == [10, 20]
    assert set(record.curve[0]) == {"step", "epoch", "learning_rate", "loss", "size", "second_loss", "second_size", "twice"}
    monkeypatch.setattr(training, "CURVE_POINTS", 1000)
    _, fine = run()
    assert math.isclose(np.mean([row["loss"] for row in fine.curve[:10]]), record.curve[0]["loss"], rel_tol=1e-6)


def test_a_training_that_time_may_end_has_a_row_of_the_curve_for_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CURVE_POINTS", 1)
    epochs = SETTINGS.epochs
    steps = [epochs * batches().steps_per_epoch // epochs * number for number in range(1, 1 + epochs)]
    for minutes, expected in ((0.0, steps[-1:]), (10.0, steps)):
        record = train(
            Toy(),
            batches(),
            SETTINGS,
            ALONE,
            prepare=lambda arrays: {"x": torch.from_numpy(arrays["x"])},
            max_minutes=minutes,
        )
        assert [row["step"] for row in record.curve] == expected


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 5, 6, 13, 20])  # 5 steps an epoch, 20 in all
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_ends_with_the_same_bits(tmp_path: Path, at: int, number: signal.Signals) -> None:
    whole = run()
    checkpoint = Checkpoint(tmp_path, {"a": 1})
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    with pytest.raises(PipelineError, match=rf"stopped by {name} at step {at}; the checkpoint is written: run the same"):
        run(checkpoint, prepare=Interrupt(at, number))
    assert checkpoint.path.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = run(checkpoint)
    assert resumed[1].resumed_at == at
    assert 0 < resumed[1].seconds_before < resumed[1].seconds
    assert whole[1].seconds_before == 0
    same(whole, resumed)


@pytest.mark.parametrize(("max_minutes", "epoch"), [(0.0, "2 of 4"), (60.0, "2")])
def test_progress_shows_epoch_loss_and_validation(monkeypatch: pytest.MonkeyPatch, max_minutes: float, epoch: str) -> None:
    shown: list[dict[str, float | str]] = []
    monkeypatch.setattr(training.Progress, "advance", lambda self, count, **values: shown.append(values))
    train(
        *(Toy(), batches(), SETTINGS, ALONE),
        prepare=lambda arrays: {"x": torch.from_numpy(arrays["x"])},
        validate=lambda: {"minus_error": -0.5},
        max_minutes=max_minutes,
    )
    assert set(shown[0]) == {"epoch", "loss"}  # five steps per epoch
    assert (shown[5]["epoch"], shown[9]["epoch"], shown[9]["error"]) == (epoch, epoch, 0.5)


@pytest.mark.parametrize("change", [{"ema_decay": 0.0}, {"schedule": "steps", "milestones": (1, 2)}, {"precision": "bfloat16"}])
def test_resume_under_other_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, **change)
    whole = run(settings=settings, best=False)
    checkpoint = Checkpoint(tmp_path, {})
    for at in (3, 9):  # twice; the second time counted from the checkpoint
        with pytest.raises(PipelineError, match="stopped by"):
            run(checkpoint, settings, best=False, prepare=Interrupt(at))
    resumed = run(checkpoint, settings, best=False)
    assert resumed[1].resumed_at == 12
    same(whole, resumed)


def test_a_checkpoint_at_every_step_changes_nothing(tmp_path: Path) -> None:
    frequent = dataclasses.replace(SETTINGS, checkpoint_minutes=1e-9)
    same(run(), run(Checkpoint(tmp_path, {}), frequent))


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loader_workers_change_no_bit(workers: int) -> None:
    same(run(loader=batches(workers=0)), run(loader=batches(workers=workers, cache_mib=0)))


def test_a_checkpoint_of_another_run_is_not_picked_up(tmp_path: Path) -> None:
    identity = {"settings": repr(SETTINGS), "data": "d1", "code": "c1"}
    with pytest.raises(PipelineError, match="stopped by"):
        run(Checkpoint(tmp_path, identity), prepare=Interrupt(3))
    for key, value in (("settings", "other"), ("data", "d2"), ("code", "c2")):
        assert Checkpoint(tmp_path, identity | {key: value}).load() is None
    assert Checkpoint(tmp_path, dict(reversed(identity.items()))).load() is not None


def test_the_identity_holds_everything_that_decides_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "vgg19.pth"
    weights.write_bytes(b"some weights")
    digest = "@sha256:0123456789ab"  # compared where the file is read
    network = {"dataset": "toy", "objective": "ae", "latent_dim": 3, "blocks": 1}
    settings = ae.Settings(**network, perceptual_weight=0.1, perceptual_weights=f"{weights}{digest}")
    assert list(named_files(settings)) == ["perceptual_weights"]
    keys = [checkpoints.identity(settings, "d1")]
    keys.append(checkpoints.identity(dataclasses.replace(settings, seed=1), "d1"))
    keys.append(checkpoints.identity(settings, "d2"))
    weights.write_bytes(b"others")
    keys.append(checkpoints.identity(settings, "d1"))
    monkeypatch.setattr(checkpoints, "code_digest", lambda: "other code")
    keys.append(checkpoints.identity(settings, "d1"))
    assert len({Checkpoint(tmp_path, key).path for key in keys}) == len(keys)
    imagenet = dataclasses.replace(settings, perceptual_weights="imagenet")
    assert checkpoints.identity(imagenet, "d1")["files"] == {}


def test_files_of_nested_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "inception.pth").write_bytes(b"w")
    quality = QualitySettings(network="inception", weights=str(tmp_path / "inception.pth"))
    assert named_files(EvaluationSettings(quality=quality)) == {"quality.weights": NamedFile(tmp_path / "inception.pth", "")}
    assert named_files(EvaluationSettings()) == {}


def test_the_code_digest_covers_every_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PACKAGE", tmp_path)
    digests = [checkpoints.code_digest()]
    for name in ("a.py", "deep/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        for text in ("1", "2"):
            (tmp_path / name).write_text(text)
            digests.append(checkpoints.code_digest())
    assert len(set(digests)) == len(digests)


def test_checkpoints_of_other_settings_stay_until_they_are_old_or_many(tmp_path: Path) -> None:
    others = [Checkpoint(tmp_path, {"a": i}) for i in range(checkpoints.KEPT + 3)]
    now = time.time()
    for age, other in enumerate(others):
        assert other.save({"step": 1})
        os.utime(other.path, (now - age, now - age))
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save({"step": 1})
    assert set(tmp_path.iterdir()) == {checkpoint.path, *(other.path for other in others[: checkpoints.KEPT])}
    for other in others[1 : checkpoints.KEPT]:
        os.utime(other.path, (0, 0))
    checkpoint.save({"step": 1})
    assert set(tmp_path.iterdir()) == {checkpoint.path, others[0].path}
    for done in (checkpoint, others[0]):
        done.remove()
    assert not tmp_path.exists()


@pytest.mark.parametrize("place", ["file", "pipe", "pipe in the place of the checkpoint", "folder in its place"])
def test_training_goes_on_where_no_checkpoint_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoints", {})
    if place == "file":
        checkpoint.folder.write_text("")
    elif place == "pipe":
        os.mkfifo(checkpoint.folder)
    else:
        checkpoint.folder.mkdir()
        (os.mkfifo if place.startswith("pipe") else os.mkdir)(checkpoint.path)
    frequent = dataclasses.replace(SETTINGS, checkpoint_minutes=1e-9)
    same(run(), run(checkpoint, frequent))
    warnings = capsys.readouterr().err.splitlines()
    assert len([line for line in warnings if line.startswith("warning:")]) == len(warnings) <= 2


def test_the_message_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="at step 3; nothing is kept"):
        run(Checkpoint(tmp_path / "file", {}), prepare=Interrupt(3))
    with pytest.raises(PipelineError, match="at step 3; nothing is kept"):
        run(None, prepare=Interrupt(3))
    checkpoint = Checkpoint(tmp_path / "folder", {})
    with pytest.raises(PipelineError, match="at step 3; the checkpoint is written"):
        run(checkpoint, prepare=Interrupt(3))
    monkeypatch.setattr(Checkpoint, "save", lambda self, state: False)
    with pytest.raises(PipelineError, match="at step 5; the checkpoint of step 3 is kept"):
        run(checkpoint, prepare=Interrupt(2))


@pytest.mark.parametrize("key", ["step", "model", "optimizers", "averaged", "best_weights", "record", "sums", "summed"])
def test_a_checkpoint_that_lacks_a_part_is_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    with pytest.raises(PipelineError, match="stopped by"):
        run(checkpoint, prepare=Interrupt(7))
    state = checkpoint.load()
    assert state is not None
    del state[key]
    checkpoint.save(state)
    capsys.readouterr()
    same(run(), run(checkpoint))
    assert f"can't be read (KeyError: '{key}'); starting from the beginning" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."])
def test_a_broken_checkpoint_is_put_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.path.write_bytes(damage)
    same(run(), run(checkpoint))
    assert capsys.readouterr().err.count("can't be read") == 1
    assert not Path("owned").exists()


def test_any_flipped_byte_of_a_checkpoint_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    with pytest.raises(PipelineError, match="stopped by"):
        run(checkpoint, prepare=Interrupt(3))
    data = bytearray(checkpoint.path.read_bytes())
    whole = run()
    for place in range(5, len(data), len(data) // 24):
        checkpoint.path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        same(whole, run(checkpoint))
    assert "going on" not in capsys.readouterr().err


def test_a_signal_wakes_a_stopped_loader() -> None:
    loader = multiprocessing.get_context("fork").Process(target=lambda: os.kill(os.getpid(), signal.SIGSTOP))
    loader.start()
    os.waitid(os.P_PID, loader.pid, os.WSTOPPED | os.WNOWAIT)
    with training._signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        loader.join(10)
    assert (received, loader.exitcode) == ([signal.SIGTERM], 0)


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    def twice(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return {"x": torch.from_numpy(arrays["x"])}

    with pytest.raises(KeyboardInterrupt):
        run(Checkpoint(tmp_path, {}), prepare=twice)


def test_the_code_digest_follows_the_library() -> None:
    assert len(checkpoints.code_digest()) == 64
    assert checkpoints.code_digest() == checkpoints.code_digest()


@pytest.mark.parametrize("at", [6, 14])
def test_a_resumed_run_keeps_best_weights_and_sums_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(training, "CURVE_POINTS", 2)  # rows of the curve then span the interruption
    settings = dataclasses.replace(SETTINGS, learning_rate=3.0, ema_decay=0.0, schedule="constant", gradient_clip=0.0)
    scores = iter([3.0, 2.0, 1.0, 0.0] * 2)  # the first epoch is the best

    def fit(checkpoint: Checkpoint | None, interrupt: Callable[..., dict[str, Tensor]] | None = None) -> Any:
        model = Toy()
        prepare = interrupt or (lambda arrays: {"x": torch.from_numpy(arrays["x"])})
        record = train(
            model, batches(), settings, ALONE, prepare=prepare, checkpoint=checkpoint,
            validate=lambda: {"score": next(scores)}, best="score",
        )  # fmt: skip
        return model, record

    whole = fit(None)
    checkpoint = Checkpoint(tmp_path, {})
    with pytest.raises(PipelineError, match="stopped by"):
        fit(checkpoint, Interrupt(at))
    same(whole, fit(checkpoint))


@pytest.mark.parametrize("stage", ["train", "fit"])
def test_a_stage_names_its_checkpoint_by_all_that_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    small.write_raw(tmp_path, images=50, points=300)
    monkeypatch.chdir(tmp_path)
    steps = {
        "train": [("prepare", "blobs"), ("train", "blobs-ae")],
        "fit": [("prepare", "points"), ("train", "points"), ("extract", "points"), ("fit", "points-lde")],
    }[stage]
    seen: list[Any] = []

    def stop(self: object, folder: Path, identity: dict[str, Any]) -> None:
        seen.extend((folder, identity))
        raise PipelineError("seen")

    monkeypatch.setattr(Checkpoint, "__init__", stop)
    assert [small.run(*step).exit_code for step in steps] == [0] * (len(steps) - 1) + [1]
    folder, identity = seen
    assert folder == tmp_path / ".checkpoints" / Path(*steps[-1])
    table = read_params()
    settings = table.autoencoder("blobs-ae") if stage == "train" else table.density("points-lde")
    index = ShardReader("data/shards/blobs").index if stage == "train" else CodeReader("data/codes/points").index
    assert identity == checkpoints.identity(settings, index.digest)


# Settings that do something -------------------------------------------------------------------------------------------

PLAIN = TrainingSettings(epochs=2, batch_size=8, learning_rate=0.05)
CHANGES: list[dict[str, Any]] = [
    {"epochs": 3}, {"learning_rate": 0.04}, {"betas": (0.9, 0.999)}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.1},
    {"schedule": "cosine"}, {"schedule": "steps", "milestones": (1,)}, {"gradient_clip": 0.1}, {"ema_decay": 0.9},
    {"precision": "bfloat16"}, {"seed": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: " ".join(change))
def test_every_setting_of_training_changes_the_weights(change: dict[str, Any]) -> None:
    weights = [run(settings=dataclasses.replace(PLAIN, **values), best=False)[0].state_dict() for values in ({}, change)]
    for part in ("net.0.weight", "other.weight"):
        assert not torch.equal(weights[0][part], weights[1][part]), part


@pytest.mark.parametrize("change", [{"warm_up": 0.3}, {"milestones": (1,)}], ids=lambda change: " ".join(change))
def test_every_setting_of_a_schedule_changes_the_weights(change: dict[str, Any]) -> None:
    schedule = {"schedule": "cosine"} if "warm_up" in change else {"schedule": "steps", "milestones": ()}
    settings = dataclasses.replace(PLAIN, **schedule)
    weights = [run(settings=dataclasses.replace(settings, **values), best=False)[0].state_dict() for values in ({}, change)]
    assert not torch.equal(weights[0]["other.weight"], weights[1]["other.weight"])


def test_gradients_are_clipped_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    run(settings=dataclasses.replace(PLAIN, gradient_clip=0.01), best=False)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


@pytest.mark.parametrize(("validate_steps", "steps"), [(0, [5, 10]), (2, [2, 4, 5, 6, 8, 10]), (5, [5, 10])])
def test_validations_come_every_so_many_steps(validate_steps: int, steps: list[int]) -> None:
    record = train(
        Toy(), batches(), PLAIN, ALONE, prepare=lambda a: {"x": torch.from_numpy(a["x"])},
        validate=lambda: {"score": 1.0}, validate_steps=validate_steps,
    )  # fmt: skip
    assert [row["step"] for row in record.validations] == steps


def test_every_step_and_place_has_noise_of_its_own() -> None:
    rows: set[tuple[float, ...]] = set()
    seeds: set[int] = set()
    for rank in range(2):
        state = training._Run(
            Toy(), PLAIN, dataclasses.replace(ALONE, rank=rank), batches(rank=rank, world=2), "", None, 0.0, 0
        )
        for _ in range(6):
            rows |= {tuple(row) for row in normal((4, 3), state.next_step().generator).tolist()}
            seeds.add(torch.initial_seed())  # of layers that draw by themselves
            state.index += 1
    assert (len(rows), len(seeds)) == (2 * 6 * 4, 2 * 6)


# NaN ------------------------------------------------------------------------------------------------------------------


def test_nan_in_the_data_stops_with_step_and_cause_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    with pytest.raises(PipelineError, match="stopped by"):
        run(checkpoint, prepare=Interrupt(7))
    kept = checkpoint.path.read_bytes()

    def broken(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {"x": torch.full((8, 3), math.nan)}

    with pytest.raises(TrainingError, match=r"phase 'model' isn't finite at step 7: the data .*\(x\); check.*last good"):
        run(checkpoint, prepare=broken)
    assert checkpoint.path.read_bytes() == kept


def test_nan_from_too_high_a_rate_names_it_and_is_never_saved(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, learning_rate=1e38, checkpoint_minutes=1e-9, schedule="constant", ema_decay=0.0)
    checkpoint = Checkpoint(tmp_path, {})
    with pytest.raises(TrainingError, match="learning rate is probably too high; lower learning_rate"):
        run(checkpoint, settings, best=False)
    state = checkpoint.load()
    assert state is None or all(bool(torch.isfinite(v).all()) for v in state["model"].values())


def test_nan_in_the_validation_stops() -> None:
    with pytest.raises(TrainingError, match=r"score is nan after step"):
        train(
            Toy(), batches(), SETTINGS, ALONE, prepare=lambda a: {"x": torch.from_numpy(a["x"])},
            validate=lambda: {"score": math.nan}, best="score",
        )  # fmt: skip


def test_a_time_limit_ends_training_with_a_validation() -> None:
    model = Toy()
    record = train(
        model, batches(), SETTINGS, ALONE, prepare=lambda a: {"x": torch.from_numpy(a["x"])},
        validate=lambda: {"score": 1.0}, best="score", max_minutes=1e-9,
    )  # fmt: skip
    assert (record.ended_by, record.steps, len(record.validations)) == ("max_minutes", 1, 1)


def test_the_latest_validation_stands_beside_each_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.system.progress.LOG_SECONDS", 0.0)
    _, record = run()
    lines = [line for line in capsys.readouterr().err.splitlines() if " left, epoch " in line]
    assert len(lines) == record.steps
    shown = [line.partition(", score ")[2] for line in lines]
    assert shown == [""] * 5 + [f"{row['score']:.6g}" for row in record.validations[:3] for _ in range(5)]


# Golden curve ---------------------------------------------------------------------------------------------------------

GOLDEN = [0.171209, 0.153153, 0.124546, 0.0916812, 0.0640868, 0.0472528, 0.0366735, 0.0301573]


def test_golden_curve_of_a_tiny_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of this curve changes what every autoencoder learns. If it is intended, write the new figures here."""
    monkeypatch.setattr(training, "CURVE_POINTS", 8)
    settings = ae.Settings(
        dataset="toy", objective="ae", latent_dim=3, blocks=1, base_channels=4, epochs=8, batch_size=16, learning_rate=0.01
    )
    grid = np.mgrid[0:8, 0:8].astype(np.float32)
    centres = np.random.default_rng(0).uniform(1, 7, (64, 2, 1, 1)).astype(np.float32)
    images = np.exp(-((grid - centres) ** 2).sum(1, keepdims=True) / 4)  # (64, 1, 8, 8)
    model = ae.build(settings, (1, 8, 8), (0.0, 1.0))
    loader = Batches(lambda i: {"x": images[32 * i : 32 * i + 32]}, [32, 32], 16, seed=0)
    record = train(model, loader, settings, ALONE, prepare=lambda a: {"images": torch.from_numpy(a["x"])})
    assert [row["loss"] for row in record.curve] == pytest.approx(GOLDEN, rel=1e-3)


def test_half_of_the_images_are_mirrored() -> None:
    settings = ae.Settings(dataset="d", objective="ae", latent_dim=2, blocks=1, base_channels=4, mirror=True)
    images = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(1000, 1, 1, 1) / 64
    objective = ae.build(settings, (1, 8, 8), (0.0, 1.0))
    batch = objective.augment({"images": images}, Step(0, 0.0, torch.Generator().manual_seed(0)))["images"]
    mirrored = (batch == images.flip(3)).flatten(1).all(dim=1)
    assert torch.equal(batch[~mirrored], images[~mirrored])
    assert 430 < int(mirrored.sum()) < 570
    plain = ae.build(dataclasses.replace(settings, mirror=False), (1, 8, 8), (0.0, 1.0))
    assert plain.augment({"images": images}, Step(0, 0.0, torch.Generator()))["images"] is images


def test_the_autoencoder_that_reconstructs_validation_images_best_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.write_raw(tmp_path, images=60)
    monkeypatch.chdir(tmp_path)
    before = "epochs: 4, batch_size: 16,\n    learning_rate: 0.01, schedule: cosine"
    after = "epochs: 8, patience: 3, max_minutes: 5, batch_size: 16, learning_rate: 0.01"
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace(before, after))
    assert before in text
    assert small.run("prepare", "blobs").exit_code == 0
    # From the third epoch on, validation images are said to be reconstructed worse, whatever the processor's rounding.
    error_of, epochs = train_stage._validation_error, itertools.count()
    monkeypatch.setattr(train_stage, "_validation_error", lambda *given: error_of(*given) + (next(epochs) >= 2))
    result = small.run("train", "blobs-ae")
    assert result.exit_code == 0, result.output
    scores = json.loads(Path("reports/metrics/train/blobs-ae.json").read_text())
    curve = pd.read_csv("reports/curves/train/blobs-ae.tsv", sep="\t")["minus_valid_mse"].dropna()
    assert scores["valid_mse"] == pytest.approx(-curve.max(), rel=1e-4)
    run = json.loads(Path("reports/runs/train/blobs-ae.json").read_text())
    assert run["ended_by"] == "patience"
    assert len(curve) - 1 - curve.argmax() == 3
