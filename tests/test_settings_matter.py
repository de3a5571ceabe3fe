"""Every setting of every choice changes something that can be seen: bytes, weights, scores, or an error.

A setting in no table here fails the test. Those that by their meaning change no result have separate tests.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image
from ruamel.yaml import YAML
from test_sources_files import bsds_files, faces, idx_bytes, jpeg, write_hdf5, write_mat, write_tgz
from test_sources_images import encode, plain, write_folder, write_zip
from test_sources_tabular import write_miniboone

from pipeline import fitting
from pipeline.densities import lde
from pipeline.errors import PipelineError
from pipeline.evaluation import interpolation as interpolations
from pipeline.preparation import prepare_shards
from pipeline.sampling import write_samples
from pipeline.settings import (
    ControlSettings,
    DetectionSettings,
    EvaluationSettings,
    InterpolationSettings,
    NamedFile,
    SamplingSettings,
    TrainingSettings,
    build,
    implementation,
)
from pipeline.settings.params import choices
from pipeline.storage.codes import CodeIndex, CodeReader, write_part
from pipeline.storage.columns import VectorMoments
from pipeline.storage.parts import SPLITS, write_index
from pipeline.system.ranks import Ranks
from pipeline.training import loop

Row = dict[str, Any]
ALONE = Ranks(0, 1, torch.device("cpu"))


class Change:
    """A value to change a setting to, in a row with some other settings."""

    def __init__(self, to: Any, **given: Any) -> None:
        self.to, self.given = to, given


def settings_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """Names of all settings of a class, dotted where one holds others."""
    for name, hint in typing.get_type_hints(kind).items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        yield prefix + name
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            if dataclasses.is_dataclass(option):
                yield from settings_of(option, f"{prefix}{name}.")


def changed(row: Row, key: str, value: Any) -> Row:
    first, _, rest = key.partition(".")
    return row | {first: changed(row[first], rest, value) if rest else value}


def check(kind: type, base: Row, changes: Mapping[str, Any], elsewhere: set[str], look: Callable[[Row], object]) -> None:
    """Changes each setting once.

    Arguments:
        kind: The class of the settings.
        base: A row.
        changes: What each setting is changed to, perhaps in another row.
        elsewhere: Settings that change no result, or are shown to matter by another test.
        look: What can be seen of a row.
    """
    assert set(settings_of(kind)) - elsewhere == set(changes), "each setting needs a line in a table of this file"
    before: dict[str, object] = {}

    def seen(row: Row) -> object:
        key = json.dumps(row, sort_keys=True)
        if key not in before:
            try:
                before[key] = look(row)
            except PipelineError as error:
                before[key] = f"error: {error}"
        return before[key]

    first = look(base)
    assert first == look(base), "what is looked at differs from run to run"
    inert = []
    for key, value in changes.items():
        change = value if isinstance(value, Change) else Change(value)
        row = base | change.given
        assert not str(seen(row)).startswith("error"), (key, seen(row))
        if seen(row) == seen(changed(row, key, change.to)):
            inert.append(key)
    assert inert == [], "these settings are accepted and do nothing"


# Sources --------------------------------------------------------------------------------------------------------------

IMAGES = {
    "image_px": 9,
    "channels": 1,
    "pixel_range": [-1.0, 1.0],
    "train_limit": 5,
    "valid_limit": 1,
    "test_limit": 1,
    "unreadable_share": 0.0,
    "white_level": 4095,
}
# Of images that bring a split: another is drawn on request, by these shares.
SHARES = {
    "split": "seeded",
    "split_seed": Change(1, split="seeded"),
    "valid_share": Change(0.2, split="seeded"),
    "test_share": Change(0.2, split="seeded"),
}
COMMON = {"split_seed": 1, "shard_examples": 7}
COUNTS = {"train_count": 41, "valid_count": 11, "test_count": 12}
# What a source never reads: the root of packaged data, and the seed of a split that is fixed.
PACKAGED, FIXED = {"root"}, {"split_seed"}


def grey16() -> bytes:
    """An image with 16 bit."""
    return encode(Image.fromarray(np.full((20, 16), 3000, np.uint16)))


def photographs(folder: Path) -> None:
    """Images in folders of their splits, one with 16 bit and one that can't be read."""
    write_folder(folder, {f"{'test' if i % 5 == 0 else 'train'}/{i}.png": plain(8 * i, height=20, width=14) for i in range(30)})
    write_folder(folder, {"train/grey.png": grey16(), "train/bad.png": b"x"})


def faces_of_celebrities(folder: Path) -> None:
    names = [f"{i:06d}.png" for i in range(30)]
    images = {name: plain(8 * i, height=20, width=14) for i, name in enumerate(names)} | {names[3]: grey16(), names[4]: b"x"}
    write_folder(folder / "img_align_celeba", images)
    attributes = "".join(f"{name} {1 - 2 * (i % 2)} 1\n" for i, name in enumerate(names))
    (folder / "list_attr_celeba.txt").write_text("30\nSmiling Young\n" + attributes)
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(names)))


def mnist(folder: Path) -> None:
    random = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 20)):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(random.integers(0, 256, (count, 28, 28))))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(random.integers(0, 10, count)))


def bsds(folder: Path) -> None:
    write_tgz(folder, bsds_files(train=8))
    write_hdf5(folder)


def domains(folder: Path) -> None:
    photographs(folder / "a")
    write_folder(folder / "a", {f"train/{i}.jpg": jpeg(20, 16, 100 + i) for i in range(20)})
    write_folder(folder / "b", {f"x/{i}.jpg": jpeg(20, 16, i) for i in range(20)})
    write_folder(folder / "c", {f"x/{i}.jpg": jpeg(20, 16, 50 + i) for i in range(20)})


def vectors(folder: Path) -> None:
    import pyarrow.parquet
    from safetensors.numpy import save_file

    arrays = np.random.default_rng(0).normal(size=(2, 90, 3)).astype(np.float32)
    save_file({"a": arrays[0], "b": arrays[1]}, folder / "points.safetensors")
    table = pyarrow.table({**dict(zip("xyz", arrays[0].T, strict=True)), "kind": np.arange(90) % 4, "zero": np.zeros(90)})
    pyarrow.parquet.write_table(table, folder / "table.parquet")


SMALL_COUNTS = {"train_count": 40, "valid_count": 10, "test_count": 10}
SOURCES: dict[str, tuple[Callable[[Path], object], Row, Row, set[str]]] = {
    # How its raw files are made, the row, changes beyond the common ones, what is never read.
    "bsds300": (bsds, SMALL_COUNTS | {"valid_images": 2}, COUNTS | {"split": "maf", "valid_images": 3}, set()),
    "celeba": (
        faces_of_celebrities,
        {"unreadable_share": 0.5, "image_px": 8},
        IMAGES | SHARES | {"pixel_range": [0.0, 1.0], "crop": 0.4, "attributes": ["Smiling"]},
        set(),
    ),
    "digits5k": (lambda folder: None, {}, {"classes": [3, 5]}, PACKAGED),
    "fashion_mnist": (
        mnist,
        {"train_count": 40, "valid_count": 10},
        {"train_count": 41, "valid_count": 11, "classes": [3, 5]},
        FIXED,
    ),
    "grid": (lambda folder: None, SMALL_COUNTS, COUNTS | {"half_length": 6.0}, PACKAGED),
    "images": (
        photographs,
        {"unreadable_share": 0.5, "image_px": 8},
        IMAGES | SHARES | {"fit": "pad", "crop": 0.4},
        set(),
    ),
    "mnist": (
        mnist,
        {"train_count": 40, "valid_count": 10},
        {"train_count": 41, "valid_count": 11, "classes": [3, 5]},
        FIXED,
    ),
    "patches": (lambda folder: None, SMALL_COUNTS, COUNTS, PACKAGED),
    "shoes": (
        lambda folder: write_zip(
            folder / "shoes.zip",
            {f"{c}/{i}.jpg": jpeg(20, 16, i + ord(c)) for c in "ab" for i in range(15)}
            | {"a/bad.jpg": b"x", "a/grey.png": grey16()},
        ),
        {"unreadable_share": 0.5, "image_px": 8, "valid_count": 4, "test_count": 6},
        IMAGES | {"pixel_range": [0.0, 1.0], "valid_count": 5, "test_count": 8},
        set(),
    ),
    "tabular": (write_miniboone, {"table": "miniboone"}, {"table": "power"}, FIXED),
    "tfd": (lambda folder: write_mat(folder, **faces()), {}, {"fold": 1, "train_on": "all"}, FIXED),
    "union": (
        domains,
        {"sources": ["images", "images"], "roots": ["a", "b"], "domains": ["x", "y"], "unreadable_share": 0.5, "image_px": 8},
        IMAGES
        | {
            "pixel_range": [0.0, 1.0],
            "split": "seeded",
            "sources": ["celeba", "images"],
            "roots": ["c", "b"],
            "domains": ["x", "z"],
        },
        set(),
    ),
    "vectors": (
        vectors,
        {"root": "raw/points.safetensors", "tensor": "a"},
        {
            "tensor": "b",
            "valid_share": 0.2,
            "test_share": 0.2,
            "columns": ["0", "1"],
            "discrete": Change("dequantise", root="raw/table.parquet", tensor="", columns=["x", "kind"]),
            "labels": Change("kind", root="raw/table.parquet", tensor="", columns=["x", "y"]),
            "categories": Change(["kind"], root="raw/table.parquet", tensor="", columns=["x", "y"]),
            "numbers": Change(["z"], root="raw/table.parquet", tensor="", columns=["x", "y"]),
            "groups": Change("kind", root="raw/table.parquet", tensor="", columns=["x", "y"]),
            "drop_constant": Change(True, root="raw/table.parquet", tensor="", columns=["x", "zero"]),
        },
        set(),
    ),
}


@pytest.mark.parametrize("source", choices("pipeline.sources"))
def test_sources(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_raw, row, changes, never = SOURCES[source]
    (tmp_path / "raw").mkdir()
    write_raw(tmp_path / "raw")
    kind = implementation("pipeline.sources", source, "source").Settings

    def look(row: Row) -> object:
        report = prepare_shards(build(kind, row, "row"), "shards", processes=1)
        return small.files(Path("shards")), dataclasses.asdict(report)

    base = {"source": source, "root": "raw", "split_seed": 0, "shard_examples": 4096, **row}
    every = COMMON | {"root": "elsewhere"} | changes
    check(kind, base, {key: value for key, value in every.items() if key not in never}, {"source"} | never, look)
    for key in never:
        assert look(base) == look(base | {key: every[key]}), f"{key} is read: it belongs to the changes"


# Training -------------------------------------------------------------------------------------------------------------

TRAINING = {
    "epochs": 3,
    "batch_size": 12,
    "learning_rate": 0.02,
    "betas": [0.8, 0.9],
    "weight_decay": 0.5,
    "schedule": "cosine",
    "milestones": Change([1], schedule="steps"),
    "warm_up": Change(0.7, schedule="cosine"),
    "gradient_clip": 0.001,
    "ema_decay": 0.5,
    "precision": "bfloat16",
    "shuffle_examples": 8,
    "seed": 1,
}
# Neither changes a result: how often a checkpoint is written, and what several processes tell each other.
ELSEWHERE = {"checkpoint_minutes"}


def toy(**settings: Any) -> None:
    """Trains a batch norm for a few steps."""
    from pipeline.storage.batches import Batches
    from pipeline.training.trainable import Step, Trainable

    class Toy(Trainable):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2)

        def forward(self, phase: str, batch: dict[str, torch.Tensor], step: Step) -> dict[str, torch.Tensor]:
            return {"loss": self.norm(batch["x"]).square().mean()}

    batches = Batches(lambda i: {"x": np.eye(2, dtype=np.float32)}, [2], 1, seed=0)
    checkpoint = settings.pop("checkpoint", None)
    row = TrainingSettings(epochs=2, **settings)
    loop.train(
        Toy(), batches, row, ALONE, prepare=lambda a: {"x": torch.from_numpy(a["x"]).repeat(2, 1)}, checkpoint=checkpoint
    )


@pytest.mark.parametrize(("minutes", "written"), [(1e-9, 4), (60.0, 0)])
def test_checkpoint_minutes_are_those_between_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, written: int
) -> None:
    from pipeline.training.checkpoint import Checkpoint

    clock = itertools.count(step=60.0)  # a minute passes whenever the time is looked at
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    saved: list[int] = []

    class Counted(Checkpoint):
        def save(self, state: Mapping[str, Any]) -> None:
            saved.append(state["step"])

    toy(checkpoint_minutes=minutes, checkpoint=Counted(tmp_path, {}))
    assert len(saved) == written


# Autoencoders ---------------------------------------------------------------------------------------------------------

NETWORK = {
    "latent_dim": 2,
    "blocks": 2,
    "filter_side": 3,
    "base_channels": 5,
    "batch_norm_gain": "ones",
    "input_normalisation": True,
    "incremental": {"mode": "linear", "warm_up_epochs": 2.0},
    "incremental.mode": Change("stepwise", incremental={"mode": "linear", "warm_up_epochs": 2.0, "steps": 1}),
    "incremental.warm_up_epochs": Change(0.5, incremental={"mode": "linear", "warm_up_epochs": 2.0}),
    "incremental.steps": Change(2, incremental={"mode": "stepwise", "warm_up_epochs": 2.0, "steps": 1}),
    "incremental.cut_off": Change("uniform", incremental={"mode": "nested_dropout"}),
    "incremental.geometric_rate": Change(0.9, incremental={"mode": "nested_dropout"}),
    "pixel_loss": "absolute",
    "mirror": True,
    "max_minutes": 1e-9,
    "patience": Change(1, epochs=12, learning_rate=0.1),
    "perceptual_weight": Change(0.5, perceptual_weights="WEIGHTS/vgg19.safetensors"),
    "perceptual_weights": Change(
        "WEIGHTS/other.safetensors", perceptual_weights="WEIGHTS/vgg19.safetensors", perceptual_weight=0.5
    ),
}
OBJECTIVES: dict[str, tuple[Row, Row]] = {
    "ae": ({}, {}),
    "aae": (
        {"discriminator_width": 8, "discriminator_layers": 1},
        {"prior": "two_normals", "discriminator_width": 9, "discriminator_layers": 2},
    ),
    "rae": ({"decoder_weight": 0.1}, {"code_weight": 0.5, "decoder_penalty": "gradient", "decoder_weight": 1.0}),
    "vae": ({}, {"kl_weight": 0.1}),
}
# The order of pixels in memory and a compiler are matters of speed, but for rounding.
MEMORY = {"channels_last", "compile"}


@pytest.fixture(scope="module")
def vgg19(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of random weights for VGG19."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    for name, seed in (("vgg19", 0), ("other", 1)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"features.{i}.weight": torch.randn(*s, 3, 3, generator=generator) / 20 for i, s in shapes.items()}
        biases = {f"features.{i}.bias": torch.zeros(s[0]) for i, s in shapes.items()}
        save_file(tensors | biases, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace with shards of small images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.run.workspace.git_state", dict)
    monkeypatch.setattr("stages.train._score", lambda *arguments: None)
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(8 * i, 256, (8, 8), np.uint8)) for i in range(30)]
    write_folder(Path("raw"), {f"{i}.png": encode(picture) for i, picture in enumerate(pictures)})
    kind = implementation("pipeline.sources", "images", "source").Settings
    settings = kind(source="images", root="raw", image_px=8, channels=1, shard_examples=10)
    prepare_shards(settings, "data/shards/blobs", processes=1)


def write_params(**tables: Any) -> None:
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(tables, file)


def numbers(path: Path) -> dict[str, bytes]:
    """The tensors of a file; without its settings."""
    from safetensors.numpy import load_file

    return {name: array.tobytes() for name, array in load_file(path).items()}


RAE = {"objective": "rae", "decoder_penalty": "gradient"}
BLOBS = {"source": "images", "root": "raw", "image_px": 8, "channels": 1}


@pytest.mark.parametrize("objective", [name for name in choices("pipeline.autoencoders") if name not in ("identity", "onnx")])
def test_objectives(images: None, vgg19: Path, objective: str) -> None:
    """Weights and curve of a few steps."""
    row, changes = OBJECTIVES[objective]

    def look(row: Row) -> object:
        if source := row.get("perceptual_weights"):
            row = row | {"perceptual_weights": NamedFile.of(str(source).replace("WEIGHTS", str(vgg19))).pinned()}
        write_params(datasets={"blobs": BLOBS}, autoencoders={"row": row})
        result = small.run("train", "row")
        if result.exit_code:
            raise PipelineError(result.output)
        folder = Path("data/autoencoders/row")
        weights = [numbers(folder / f"{half}.safetensors") for half in ("encoder", "decoder")]
        return weights, Path("reports/curves/train/row.tsv").read_text()

    base = {"dataset": "blobs", "objective": objective, "latent_dim": 3, "blocks": 1, "base_channels": 4, "epochs": 2} | row
    base |= {"batch_size": 8, "learning_rate": 0.01}
    kind = implementation("pipeline.autoencoders", objective, "objective").Settings
    check(kind, base, TRAINING | NETWORK | changes, {"dataset", "objective"} | ELSEWHERE | MEMORY, look)


@pytest.mark.parametrize("last", [True, False])
def test_channels_last_is_an_order_in_memory(images: None, monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    from pipeline.autoencoders import ae

    colours = BLOBS | {"channels": 3}  # the order of a single channel can't be told
    prepare_shards(implementation("pipeline.sources", "images", "source").Settings(**colours), "data/shards/blobs", processes=1)
    seen: list[bool] = []

    def forward(self: ae.AutoencoderObjective, phase: str, batch: dict[str, torch.Tensor], step: object) -> Any:
        tensors = (batch["images"], self.encoder.layers[2].weight)
        seen.extend(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors)
        raise PipelineError("seen")

    monkeypatch.setattr(ae.AutoencoderObjective, "forward", forward)
    row = {"dataset": "blobs", "objective": "ae", "latent_dim": 3, "blocks": 1, "base_channels": 4, "channels_last": last}
    write_params(datasets={"blobs": colours}, autoencoders={"row": row})
    assert "seen" in small.run("train", "row").output
    assert seen == [last, last]


def test_a_compiled_network_has_the_same_weights_and_needs_a_compiler(images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    row = {
        "dataset": "blobs",
        "objective": "ae",
        "latent_dim": 3,
        "blocks": 1,
        "base_channels": 4,
        "epochs": 1,
        "batch_size": 8,
    }
    names = []
    for keys in ({}, {"compile": True}):
        write_params(datasets={"blobs": BLOBS}, autoencoders={"row": row | keys})
        assert small.run("train", "row").exit_code == 0
        names.append(numbers(Path("data/autoencoders/row/decoder.safetensors")).keys())
    assert compiled == ["Encoder", "Decoder"]
    assert names[0] == names[1]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "compile: needs a C++ compiler, and there is no 'no-such-compiler' here" in small.run("train", "row").output
    write_params(datasets={"blobs": BLOBS}, autoencoders={"row": row | RAE | {"compile": True}})
    assert "compiled networks have no second derivatives" in small.run("train", "row").output


def test_vectors_need_no_settings() -> None:
    assert set(settings_of(implementation("pipeline.autoencoders", "identity", "objective").Settings)) == {
        "dataset",
        "objective",
    }


# Densities ------------------------------------------------------------------------------------------------------------

FITTING = TRAINING | {
    "shrinkage": Change(True, standardise="cholesky"),
    "patience": Change(1, epochs=12, learning_rate=0.1),
    "standardise": "scalar",
    "context": "labels",
    "transform": "asinh",
    "max_minutes": 1e-9,
    "validate_steps": 1,
}
# Muon moves the weights of an lde alone; another family refuses it.
MUON = {"optimizer": "muon", "muon_rate": Change(1.0, optimizer="muon")}
NO_MUON = {"optimizer", "muon_rate"}
# Families that are fitted in one go know no steps.
STEPS = {*TRAINING, "validate_steps", "patience"} - {"seed"}
FAMILIES: dict[str, tuple[Row, Row, set[str]]] = {
    # The row, changes, what does nothing.
    "lde": (
        {"components": 2},
        MUON
        | {
            "components": 3,
            "activation": "tanh",
            "normalisation": "batch",
            "blocks": Change("residual", width=8),
            "layers": 3,
            "width": 8,
            "heads": Change(2, blocks="attention", width=8),
            "channel_cap": 8,
            "dropout": 0.5,
            "position_embedding": True,
            "min_log_scale": 1.0,
            "max_log_scale": -1.0,
            "patch_orders": 2,
            "training_orders": 2,
            "order": 1,
            "orders": Change("any", blocks="attention", width=8),
            "averaged_orders": Change(2, blocks="attention", width=8, orders="any"),
            "noise": 0.5,
            "start": "gaussian",
            "scoring_precision": "bfloat16",
        },
        set(),
    ),
    "gaussian": ({}, {"ridge": 0.5, "pseudo_codes": Change([5.0], context="labels")}, STEPS | {"seed", "max_minutes"}),
    "gmm": (
        {"components": [1, 2]},
        {
            "components": [3],
            "covariance": "diagonal",
            "ridge": [0.5],
            "pooled_codes": Change(10.0, components=[5]),
            "starts": Change(5, components=[5]),
            "iterations": Change(1, components=[5]),
            "tolerance": Change(1.0, components=[5]),
            "max_examples": 20,
            "pseudo_codes": Change([5.0], context="labels"),
        },
        STEPS,
    ),
    "boxes": (
        {"components": 3, "steps": 20},
        {"components": 4, "least_codes": Change(9.0, steps=60), "steps": 30, "max_examples": 20},
        STEPS,
    ),
    "gmmn": (
        {"hidden": [8]},
        {"noise_dim": 3, "hidden": [9], "bandwidths": [0.3], "output": Change("sigmoid", standardise="none")},
        set(),
    ),
    "kde": (
        {},
        {"bandwidths": [0.9], "sensitivity": [1.0], "max_examples": 20, "seed": Change(1, max_examples=20)},
        STEPS,
    ),
    "made_mog": ({"hidden": [8, 8], "components": 2}, {"hidden": [8, 9], "components": 3, "residual": True}, set()),
    "maf": ({"transforms": 1, "hidden": [8, 8]}, {"transforms": 2, "hidden": [8, 9], "residual": True}, set()),
    "naf": (
        {"transforms": 1, "hidden": [8, 8], "signal": 4},
        {"transforms": 2, "hidden": [8, 9], "residual": True, "signal": 5},
        set(),
    ),
    "nsf": (
        {"transforms": 1, "hidden": [8, 8], "bins": 4},
        {"transforms": 2, "hidden": [8, 9], "residual": True, "bins": 5, "coupling": True},
        set(),
    ),
    "prior": ({}, {"prior": "two_normals"}, STEPS | {"seed", "max_minutes", "shrinkage", "transform"}),
    "realnvp": ({"transforms": 1, "hidden": [8]}, {"transforms": 2, "hidden": [9]}, set()),
    "rnade": ({"components": 2, "hidden": 8}, {"components": 3, "hidden": 9}, set()),
}


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> CodeReader:
    """Two clusters of correlated codes with four numbers, in three files to train on."""
    folder = tmp_path_factory.mktemp("codes")
    random = np.random.default_rng(0)
    mixing = random.normal(size=(4, 4)) + np.eye(4)
    values = (random.normal(size=(100, 4)) @ mixing + 12 * random.integers(0, 2, (100, 1))).astype(np.float32)
    moments = VectorMoments(4)
    moments.update(values[:60])
    parts = {
        split: tuple(
            write_part(folder, split, i, part, np.arange(20) % 2) for i, part in enumerate(np.split(array, len(array) // 20))
        )
        for split, array in zip(SPLITS, np.split(values, [60, 80]), strict=True)
    }
    write_index(folder, CodeIndex(dim=4, mean=tuple(moments.mean), std=tuple(moments.std), source_digest="", **parts))
    return CodeReader(folder)


# `auto` is a contest of the others against the clock, in which its minutes and its seed alone matter: tests/test_auto.py.
@pytest.mark.parametrize("family", [name for name in choices("pipeline.densities") if name != "auto"])
def test_families(codes: CodeReader, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Weights, curve, validations, and likelihoods or else samples, of a few steps."""
    monkeypatch.setattr(lde, "has_bfloat16", lambda device: True)
    row, changes, nothing = FAMILIES[family]
    kind = implementation("pipeline.densities", family, "family").Settings
    test = torch.from_numpy(codes.load("test", 0)["codes"])

    def look(row: Row) -> object:
        density, training = fitting.fit_density(build(kind, row, "row"), codes, ALONE, "quiet")
        with torch.no_grad():
            shown = density.log_prob(test) if density.has_log_prob else density.sample(5, torch.Generator().manual_seed(0))
        weights = {name: value.float().numpy().tobytes() for name, value in density.state_dict().items()}
        return weights, training.curve, training.validations, shown.tolist()

    base = {"codes": "c", "dataset": "d", "family": family, "epochs": 2, "batch_size": 16, "learning_rate": 0.01} | row
    every = {"optimizer": "muon"} | FITTING | changes
    refused = set() if getattr(kind, "takes_context", False) else {"context"}
    kept = {key: value for key, value in every.items() if key not in nothing | refused}
    muon = set() if family == "lde" else {"muon_rate"}
    check(kind, base, kept, {"codes", "dataset", "family"} | ELSEWHERE | nothing | muon | refused, look)


# Sampling, controls, evaluations --------------------------------------------------------------------------------------


def test_sampling(tmp_path: Path) -> None:
    from pipeline.autoencoders.common.network import Decoder
    from pipeline.autoencoders.common.options import ConvolutionOptions

    options = ConvolutionOptions(blocks=0, latent_dim=3, base_channels=4)
    decoder = Decoder(options, shape=(1, 8, 8), output="sigmoid").eval()
    density = lde.LatentDensityEstimator(3, components=2).eval()

    def look(row: Row) -> object:
        write_samples(density, decoder, build(SamplingSettings, row, "sampling"), tmp_path / "samples", ALONE)
        return small.files(tmp_path / "samples")

    check(SamplingSettings, {"count": 30}, {"count": 31, "seed": 1, "shard_examples": 7, "rounding": "8-bit"}, set(), look)


PARZEN = {
    "protocol": "another",
    "bandwidth_start": 0.02,
    "bandwidth_stop": 0.3,
    "bandwidth_count": 4,
    "spacing": "log",
    "validation_count": 3,
}
WIDE = {"bandwidth_start": 0.01, "bandwidth_stop": 0.2, "bandwidth_count": 3}
QUALITY = {"network": "classifier", "samples": 25, "classifier_epochs": 1}


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace with shards of small labelled images, equal in all splits."""
    from test_splits import Told, draw_marks

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.run.workspace.git_state", dict)
    drawn = [array["train"] for array in draw_marks()]
    arrays = [dict(zip(SPLITS, np.split(array, [60, 90]), strict=True)) for array in drawn]
    monkeypatch.setattr("pipeline.sources.images.open_source", lambda settings, root: Told("images", *arrays))
    kind = implementation("pipeline.sources", "images", "source").Settings
    settings = kind(source="images", root="raw", image_px=12, channels=1, shard_examples=25, unreadable_share=0.1)
    prepare_shards(settings, "data/shards/marks", processes=1)


def control_scores(control: Row, evaluation: Row) -> object:
    dataset = {"source": "images", "root": "raw", "image_px": 12, "channels": 1}
    write_params(
        datasets={"marks": dataset}, controls={"row": control}, sampling={"count": 40}, evaluations={"marks": evaluation}
    )
    for stage, row in (("features", "marks"), ("control", "row")):
        result = small.run(stage, row)
        if result.exit_code:
            raise PipelineError(result.output)
    arrays = small.files(Path("reports/arrays/control/row"))
    return json.loads(Path("reports/metrics/control/row.json").read_text()), arrays.get("open-dimensions.safetensors")


def test_controls(marks: None) -> None:
    base = {"dataset": "marks", "kmeans_centroids": 10, "kmeans_epochs": 1, "kmeans_batch_size": 20}
    changes = {"seed": 1, "kmeans_centroids": 11, "kmeans_batch_size": 30, "kmeans_epochs": 2, "pca_components": 2}
    check(ControlSettings, base, changes, {"dataset"}, lambda row: control_scores(row, {"parzen": WIDE}))


@pytest.mark.filterwarnings("ignore:Parzen score")
def test_evaluations(marks: None, vgg19: Path) -> None:
    """Those of a control; interpolation has a separate test."""
    weights = {name: NamedFile.of(str(vgg19 / f"{name}.safetensors")).pinned() for name in ("vgg19", "other")}
    vgg19 = {**QUALITY, "network": "vgg19", "weights": weights["vgg19"]}
    changes: Row = {"parzen": None, "quality": Change(QUALITY, parzen=WIDE)}
    changes |= {f"parzen.{key}": value for key, value in PARZEN.items()}
    changes |= {
        f"quality.{key}": Change(to, parzen=None, quality=QUALITY)
        for key, to in {"samples": 30, "neighbours": 15, "classifier_examples": 30, "classifier_epochs": 2, "seed": 1}.items()
    }
    changes["quality.weights"] = Change(weights["other"], parzen=None, quality=vgg19)
    changes["quality.network"] = Change("vgg19", parzen=None, quality=QUALITY)
    interpolation = {"interpolation", "interpolation.pairs", "interpolation.seed"}

    def look(row: Row) -> object:
        if (row.get("quality") or {}).get("network") == "vgg19" and "weights" not in row["quality"]:
            row = row | {"quality": vgg19}  # the two go together
        control = {"dataset": "marks", "kmeans_centroids": 5, "kmeans_epochs": 1, "pca_components": 1}
        return control_scores(control, row)

    check(EvaluationSettings, {"parzen": WIDE}, changes, interpolation, look)


def test_detections(marks: None) -> None:
    dataset = {"source": "images", "root": "raw", "image_px": 12, "channels": 1}
    rows = dict.fromkeys(("marks", "others", "more"), dataset)
    network = {"objective": "ae", "latent_dim": 2, "blocks": 1, "base_channels": 2, "epochs": 1, "batch_size": 30}
    density = {"codes": "marks", "dataset": "marks", "family": "gaussian"}
    base = {"density": "marks", "family": "gaussian", "codes": "marks", "dataset": "marks", "outliers": "others"}
    tables = {"datasets": rows, "autoencoders": {"marks": network | {"dataset": "marks"}}, "densities": {"marks": density}}
    write_params(**tables, detections={"row": base})
    for stage in ("train", "extract", "fit"):
        assert (result := small.run(stage, "marks")).exit_code == 0, result.output
    for name in ("others", "more"):
        shutil.copytree("data/shards/marks", f"data/shards/{name}")
    document = json.loads(Path("data/shards/more/index.json").read_text())  # a data set with fewer test examples
    document["test"] = document["test"][:1]
    Path("data/shards/more/index.json").write_text(json.dumps(document))

    def look(row: Row) -> object:
        write_params(**tables, detections={"row": row})
        if (result := small.run("detect", "row")).exit_code:
            raise PipelineError(result.output)
        return json.loads(Path("reports/metrics/detect/row.json").read_text())

    changes = {"outliers": "more", "outlier_classes": [1], "error": "relative", "false_alarms": 0.3, "seed": 1}
    named = {"density", "family", "codes", "dataset"}  # that they must agree is a test of the settings
    check(DetectionSettings, base | {"false_alarms": 0.2}, changes, named, look)


def test_interpolation() -> None:
    density = lde.LatentDensityEstimator(3, components=2).eval()
    codes = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    labels = np.arange(30) % 3

    def look(row: Row) -> object:
        settings = build(InterpolationSettings, row, "interpolation")
        curves = interpolations.interpolation_curves(density, codes, labels, settings)
        return {kind: (curve.mean.tolist(), curve.pairs) for kind, curve in curves.items()}

    check(InterpolationSettings, {"pairs": 20}, {"pairs": 21, "seed": 1}, set(), look)
