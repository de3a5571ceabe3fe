"""Benchmarks that need a machine of their own run here at toy size, so that they keep working."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from benchmarks import gpu, images, lde, simulate, units
from benchmarks.simulate import AFTER, BEFORE, Machines, Stage, Work, play

TOY = "--device cpu --px 28 --precisions float32 --dims 3 --batch 2 --codes 4 --points 8 --steps 1 --rounds 1 --clock cpu"


def test_the_benchmark_of_a_gpu_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("device", "clock"):
        monkeypatch.setattr(lde, name, getattr(lde, name))
    monkeypatch.setattr(gpu, "write_json", None)  # nothing is written without a GPU
    found = gpu.main([*TOY.split(), "--no-compile", "--no-peak"])
    assert [(row["px"], row["perceptual"]) for row in found["train"]] == [(28, "no"), (28, "yes")]
    assert [row["D"] for row in found["fit"]] == [3]
    for row in (*found["train"], *found["fit"], *found["parzen"]):
        assert all(value > 0 for name, value in row.items() if isinstance(value, float) and not math.isnan(value)), row
        assert [name for name in row if name.endswith("/s")]
    assert "| px | perceptual |" in capsys.readouterr().out


def test_the_table_of_samples_in_the_docs_is_that_on_record() -> None:
    rows = json.loads(images.RESULTS.read_text())["rows"]
    table = images.table(rows)
    assert table.count("\n") == len(rows) + 1
    assert table in (images.PROJECT / "docs/scores.md").read_text()


def test_methods_have_the_same_seconds_for_autoencoder_and_density() -> None:
    for method in ("ours", "before"):
        autoencoder, density = images._preset(method, 200.0)
        assert 60 * (autoencoder["max_minutes"] + density["max_minutes"]) == pytest.approx(200)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu.main([])


# The simulation -------------------------------------------------------------------------------------------------------

IDEAL = Machines(1, node_gpus=1, latency=0.0, exchange=0.0, slow_share=0.0, loss_hours=math.inf, start=0.0)
READING = Work(parts=400, examples=10, read_bytes=1e9)


def seconds(work: Work, machines: Machines, pipeline: simulate.Pipeline = AFTER) -> float:
    return play(Stage("stage", (work,)), machines, pipeline).seconds


def many(gpus: int, **values: float) -> Machines:
    return dataclasses.replace(IDEAL, gpus=gpus, **values)


@pytest.mark.parametrize("batch", [0, 40])
def test_what_limits_a_stage_decides_its_time(batch: int) -> None:
    computing = Work(parts=400, examples=10, compute=0.5, batch=batch)
    assert seconds(computing, many(1)) == pytest.approx(2000)
    assert seconds(computing, many(8)) == pytest.approx(250)
    reading = dataclasses.replace(READING, batch=batch)
    assert seconds(reading, many(1, network=1e9)) == pytest.approx(400)
    assert seconds(reading, many(8, network=1e9, store=4e9)) == pytest.approx(100)
    both = dataclasses.replace(reading, compute=0.5, batch=batch)  # at the same time, but for the first part
    assert 2000 < seconds(both, many(1, network=1e9)) < 2010
    assert seconds(dataclasses.replace(computing, compute=0.0, read=2.0), many(4, workers=2)) == pytest.approx(1000)


def test_what_a_thread_gathers_ahead_takes_no_time_of_its_own() -> None:
    work = Work(parts=400, examples=10, compute=0.5, gather=0.4, batch=10)
    assert seconds(work, many(1)) == pytest.approx(2000 + 4)
    assert seconds(work, many(1), BEFORE) == pytest.approx(2000 + 1600)


def test_gradients_pass_the_slowest_link() -> None:
    work = Work(parts=400, examples=10, batch=40, gradient_bytes=1e9)
    one, four = many(4, node_gpus=4, link=1e10), many(4, network=1e9)
    assert seconds(work, one) == pytest.approx(100 * 2 * 0.75 / 10)  # 100 steps
    assert seconds(work, four) == pytest.approx(100 * 2 * 0.75)
    assert seconds(work, dataclasses.replace(one, exchange=0.1)) == pytest.approx(100 * (2 * 0.75 / 10 + 2 * 0.1))


def test_a_node_keeps_what_it_has_read() -> None:
    again = dataclasses.replace(READING, passes=3)
    machines = many(1, network=1e9, disk=1e10)
    assert seconds(again, machines, BEFORE) == pytest.approx(1200)
    assert seconds(again, machines) == pytest.approx(400 + 2 * 40, rel=0.01)
    assert 600 < seconds(again, dataclasses.replace(machines, cache=200e9)) < 1200


def test_a_lost_node_costs_what_it_did_since_the_last_checkpoint() -> None:
    training = Work(parts=3600, examples=10, compute=0.8, batch=10)  # two hours on four nodes
    machines = many(4, loss_hours=1.0, restart=100.0, start=20.0, replace=900.0, person=3600.0)
    whole = seconds(training, dataclasses.replace(machines, loss_hours=math.inf))
    assert whole == pytest.approx(20 + 7200)
    # The first hour on four nodes, then on three: after an hour of each, 120 seconds are lost, and at most a minute of work.
    found = seconds(training, machines)
    assert 20 + 3580 + 3620 * 4 / 3 + 120 < found < 20 + 3580 + 3620 * 4 / 3 + 2 * (120 + 100)
    assert found < seconds(training, machines, BEFORE)
    everything = dataclasses.replace(training, batch=0)  # nothing but training has checkpoints
    assert seconds(everything, machines) == math.inf


def test_dvc_hashes_and_copies_all_parts_or_an_index() -> None:
    stage = Stage("prepare", (Work(1, 1),), output_bytes=1e12, hashing=2e-9)
    assert play(stage, many(1, network=1e9), BEFORE).seconds == pytest.approx(500 + 2000)
    assert play(stage, many(1, network=1e9), AFTER).seconds == 0.0
    assert play(stage, many(1, network=1e9), BEFORE).bottleneck == "DVC"


TOY_ROW = units.Row(
    image_px=28, channels=1, blocks=1, latent_dim=2, perceptual=False, components=2, batch=4, epochs=1, fit_epochs=1,
    part_examples=8, samples=10,
)  # fmt: skip


def test_the_simulation_measures_plays_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preset", "SMALL"):
        monkeypatch.setattr(simulate, name, (lambda: TOY_ROW) if name == "preset" else TOY_ROW)
    monkeypatch.setattr(units, "measure_exchange", lambda: {"latency": 1e-4, "bytes_per_second": 1e9})
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{simulate.START}\nold\n{simulate.END}\nAfter.\n")
    command = "--seconds 0.001 --photos 40 --images 4000 --gpus 1 16"
    output = tmp_path / "units.json"
    simulate.main([*command.split(), "--output", str(output), "--page", str(page)])
    found = json.loads(output.read_text())
    assert all(value > 0 for value in found["large"].values())
    assert found["large"].keys() == found["small"]["1"].keys() == found["small"]["2"].keys()
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "| after | 16 |" in text
    assert "| before | 1 |" in text
