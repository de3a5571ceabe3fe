"""The same seed on the same machine gives the same bits, however many processes read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small
from PIL import Image

# Whether it is wise to start more processes than there are cores is not the question here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader")


def outputs(folder: Path, readers: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Digests of all that the stages leave, but for the files that say what differs from run to run."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    small.write_raw(folder)
    monkeypatch.setattr("os.cpu_count", lambda: readers or 1)  # processes that prepare starts
    monkeypatch.setenv("LOADER_WORKERS", str(readers))
    monkeypatch.setenv("CACHE_MIB", "0")  # else the workers would read but once
    for stage in small.STAGES:
        result = small.run(*stage)
        assert result.exit_code == 0, result.output
    return {k: v for k, v in small.files(folder).items() if not k.startswith(("reports/runs", "raw"))}


def test_every_stage_gives_the_same_bits_with_no_reader_and_with_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, four = (outputs(tmp_path / str(readers), readers, monkeypatch) for readers in (0, 4))
    assert {path.split("/")[1] for path in alone if "/" in path} >= {
        "shards",
        "codes",
        "samples",
        "metrics",
        "curves",
        "arrays",
    }
    assert four == alone


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_autoencoder_learns_the_same_and_twice_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.write_raw(tmp_path)
    monkeypatch.chdir(tmp_path)
    params, losses, weights = Path("params.yaml"), [], []
    assert small.run("prepare", "blobs").exit_code == 0
    for keys in ("epochs: 4", "epochs: 4, compile: true", "epochs: 4, compile: true"):
        params.write_text(small.PARAMS.replace("epochs: 4", keys, 1))
        result = small.run("train", "blobs-ae")
        assert result.exit_code == 0, result.output
        losses.append(pd.read_csv("reports/curves/train/blobs-ae.tsv", sep="\t")["loss"].to_numpy())
        weights.append(small.files(Path("data/autoencoders/blobs-ae"))["decoder.safetensors"])
    assert weights[1] == weights[2] != weights[0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


class Recorder:
    """A tracker that counts pictures and what they show."""

    on, run_id = True, None
    pictures: list[tuple[str, int, tuple[int, int]]] = []

    def __init__(self, name: str, tags: object, params: object, off: bool = False) -> None:
        self.name = name

    def image(self, path: Path, key: str, step: int) -> None:
        with Image.open(path) as picture:
            Recorder.pictures.append((key, step, picture.size))

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *values, **named: None


@pytest.mark.parametrize(("epochs", "steps"), [("2", [14]), ("0", [])])
def test_pictures_of_a_training_change_no_bit(
    epochs: str, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: Path) -> dict[str, str]:
        folder.mkdir()
        monkeypatch.chdir(folder)
        small.write_raw(folder)
        params = Path("params.yaml")
        text = params.read_text().replace("objective: ae", "objective: vae")
        params.write_text(text.replace("epochs: 4", "epochs: 4, incremental: {mode: linear, warm_up_epochs: 3}", 1))
        for stage in ("prepare", "blobs"), ("train", "blobs-ae"):
            result = small.run(*stage)
            assert result.exit_code == 0, result.output
        return {path: digest for path, digest in small.files(folder).items() if "/runs/" not in path}

    plain = trained(tmp_path / "plain")
    monkeypatch.setattr("stages.run.Tracker", Recorder)
    monkeypatch.setattr(Recorder, "pictures", [])
    monkeypatch.setenv("TRACKING_PICTURES", epochs)
    assert trained(tmp_path / "pictured") == plain
    assert [(key, step) for key, step, _ in Recorder.pictures] == [("training", step) for step in steps]
    assert all(min(size) > 100 for *_, size in Recorder.pictures)


def test_a_number_of_epochs_between_pictures_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small.write_raw(tmp_path)
    assert small.run("prepare", "blobs").exit_code == 0
    monkeypatch.setattr("stages.run.Tracker", Recorder)
    monkeypatch.setenv("TRACKING_PICTURES", "often")
    result = small.run("train", "blobs-ae")
    assert result.exit_code == 1
    assert "TRACKING_PICTURES=often: write a number of epochs, or 0 for no pictures" in result.output
    assert not Path("data/autoencoders/blobs-ae").exists()
