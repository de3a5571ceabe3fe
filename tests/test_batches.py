"""Shuffled batches: a function of (seed, epoch) alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.storage.batches import AHEAD, Batches, run_ahead
from pipeline.system.streams import stream


def batches(counts: list[int], batch_size: int, **arguments: int) -> Batches:
    starts = np.cumsum([0, *counts])
    return Batches(lambda i: {"x": np.arange(starts[i], starts[i + 1])}, counts, batch_size, **{"seed": 0, **arguments})


def epoch(b: Batches, number: int = 0, skip: int = 0) -> list[list[int]]:
    return [batch["x"].tolist() for batch in b.epoch(number, skip)]


COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.integers(1, 64), st.integers(1, 200), st.integers(0, 5))
def test_each_example_at_most_once_an_epoch_and_all_but_a_rest(
    counts: list[int], batch_size: int, window: int, seed: int
) -> None:
    b = batches(counts, batch_size, window=window, seed=seed)
    taken = epoch(b)
    seen = [x for batch in taken for x in batch]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(sum(counts)))
    assert sum(counts) - len(seen) < b.batch_size
    assert len(taken) == b.steps_per_epoch
    assert {len(batch) for batch in taken} == {b.batch_size}


def joined(b: list[Batches], number: int) -> list[list[int]]:
    """The batches of an epoch, of the places of all processes one after another."""
    return [[x for part in parts for x in part] for parts in zip(*(epoch(rank, number) for rank in b), strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 64), st.integers(2, 6), st.integers(1, 300))
def test_a_batch_is_the_same_in_the_same_order_on_any_number_of_processes(
    counts: list[int], batch_size: int, world: int, window: int
) -> None:
    if min(sum(counts), batch_size) < world:
        with pytest.raises(SettingsError, match=rf"set PROCESSES to {min(sum(counts), batch_size)} or fewer"):
            batches(counts, batch_size, world=world)
        return
    ranks = [batches(counts, batch_size, rank=rank, world=world, window=window) for rank in range(world)]
    assert joined(ranks, 1) == epoch(batches(counts, batch_size, window=window), 1)
    assert sum(rank.share for rank in ranks) == pytest.approx(world)
    assert [x for rank in ranks for x in rank.places] == list(range(ranks[0].batch_size))


@pytest.mark.parametrize(  # in the second, the lanes that have any left aren't the first ones
    "counts", [[10] * 23, [10, 10, 3] + [10] * 20, [10, 10, 3, 10, 25, 10, 1, 10, 40], [7, 9]]
)
@pytest.mark.parametrize("batch_size", [8, 12])
def test_the_order_is_that_of_a_naive_deal(counts: list[int], batch_size: int) -> None:
    """Parts go to lanes in turn, windows of each are shuffled, and lanes that have any left give an example each in turn."""
    b = batches(counts, batch_size, window=60)
    starts = np.cumsum([0, *counts])
    order = stream("order of parts", 0, 2).permutation(len(counts)).tolist()
    lengths = [sum(counts[part] for part in order[lane :: b.lanes]) for lane in range(b.lanes)]
    dealt = [(lane, i) for i in range(max(lengths)) for lane in range(b.lanes) if i < lengths[lane]]
    dealt = dealt[: len(dealt) // batch_size * batch_size]
    lanes: list[list[int]] = []
    for lane in range(b.lanes):
        rows, gathered, number = list[int](), list[int](), lane
        wanted = sum(owner == lane for owner, _ in dealt)
        for part in order[lane :: b.lanes]:
            gathered += range(starts[part], starts[part + 1])
            if len(gathered) >= 60 / b.lanes or len(rows) + len(gathered) >= wanted:
                rows += np.array(gathered)[stream("order of examples", 0, 2, number).permutation(len(gathered))].tolist()
                gathered, number = [], number + b.lanes
        lanes.append(rows)
    cut = [sorted(dealt[start : start + batch_size]) for start in range(0, len(dealt), batch_size)]
    assert epoch(b, 2) == [[lanes[lane][i] for lane, i in batch] for batch in cut]


@pytest.mark.parametrize(("world", "most"), [(1, 40), (2, 20), (4, 10), (8, 10)])  # four lanes
def test_a_process_reads_its_share_of_the_parts(world: int, most: int) -> None:
    read: list[int] = []

    def load(i: int) -> dict[str, np.ndarray]:
        read.append(i)
        return {"x": np.zeros(16)}

    for rank in range(world):
        read.clear()
        b = Batches(load, [16] * 40, 64, seed=0, window=79, rank=rank, world=world, cache_mib=0)
        assert b.lanes == 4
        list(b.epoch(0))
        assert len(read) == len(set(read)) == most


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(1, 30), st.integers(1, 3), st.integers(1, 100), st.integers(0, 20))
def test_a_resumed_epoch_goes_on_where_it_stopped(
    counts: list[int], batch_size: int, number: int, window: int, skip: int
) -> None:
    b = batches(counts, batch_size, window=window)
    assert epoch(b, number, skip) == epoch(batches(counts, batch_size, window=window), number)[skip:]


def test_a_batch_of_fewer_examples_than_processes_is_refused_in_a_line() -> None:
    with pytest.raises(
        SettingsError, match=r"\Aa batch of 4 examples can't be shared by 6 processes: set PROCESSES to 4 or fewer\Z"
    ):
        batches([3, 1], 128, rank=5, world=6)


def test_epochs_and_seeds_differ() -> None:
    b = batches([50, 50, 50], 10)
    orders = [epoch(b, 0), epoch(b, 1), epoch(batches([50, 50, 50], 10, seed=1), 0)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(x for batch in orders[0] for x in batch) == sorted(x for batch in orders[1] for x in batch)


def test_the_window_mixes_parts() -> None:
    first = epoch(batches([100] * 4, 50, window=400))[0]
    assert len({x // 100 for x in first}) == 4
    first = epoch(batches([100] * 4, 50, window=1))[0]
    assert len({x // 100 for x in first}) == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("cache_mib", [0, 512])
def test_loader_workers_and_cache_change_nothing(cache_mib: int) -> None:
    expected = [epoch(batches([30, 20, 40, 10], 16, window=50), e) for e in range(2)]
    for workers in (0, 1, 4):
        b = batches([30, 20, 40, 10], 16, window=50, workers=workers, cache_mib=cache_mib)
        assert [epoch(b, e) for e in range(2)] == expected


def test_the_cache_reads_each_part_once_and_keeps_its_bound() -> None:
    read: list[int] = []

    def load(i: int) -> dict[str, np.ndarray]:
        read.append(i)
        return {"x": np.zeros((100, 1024), np.float32)}  # 0.4 MiB

    b = Batches(load, [100] * 4, 50, seed=0, cache_mib=2)
    for e in range(3):
        list(b.epoch(e))
    assert sorted(read) == [0, 1, 2, 3]
    read.clear()
    b = Batches(load, [100] * 4, 50, seed=0, cache_mib=1)
    for e in range(3):
        list(b.epoch(e))
    assert len(read) == 4 + 2 * 2  # two parts fit


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_keeps_its_one_line(workers: int) -> None:
    def load(i: int) -> dict[str, np.ndarray]:
        raise DataError("shard 3 is broken")

    with pytest.raises(DataError, match=r"\Ashard 3 is broken\Z"):
        list(Batches(load, [10], 5, seed=0, workers=workers).epoch(0))


def test_a_killed_loader_is_told_in_one_line() -> None:
    def load(i: int) -> dict[str, np.ndarray]:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    for take in (iter, run_ahead):  # in the main thread, and in another, which isn't told when a process dies
        with pytest.raises(PipelineError, match="lower LOADER_WORKERS"):
            list(take(Batches(load, [10], 5, seed=0, workers=1).epoch(0)))


@pytest.mark.parametrize("name", ["LOADER_WORKERS", "CACHE_MIB"])
@pytest.mark.parametrize("value", ["many", "-1", "1.5", "9" * 50, "٣٣x"])
def test_numbers_of_the_environment_are_checked(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        batches([10], 5)


def test_a_data_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [sorted(batch) for batch in epoch(batches([3, 2], 128))] == [[0, 1, 2, 3, 4]]


# Ahead ----------------------------------------------------------------------------------------------------------------


def test_a_thread_gathers_the_same_batches_a_few_ahead() -> None:
    made: list[int] = []

    def source() -> Iterator[dict[str, np.ndarray]]:
        for number in range(20):
            made.append(number)
            yield {"x": np.array([number])}

    ahead = run_ahead(source())
    for number in range(20):
        assert int(next(ahead)["x"][0]) == number
        assert len(made) <= number + AHEAD + 2  # one in hand, and one that waits to be put
    assert next(ahead, None) is None


def test_an_error_of_the_thread_is_raised_where_batches_are_taken() -> None:
    def source() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": np.zeros(1)}
        raise DataError("shard 3 is broken")

    ahead = run_ahead(source())
    next(ahead)
    with pytest.raises(DataError, match=r"\Ashard 3 is broken\Z"):
        next(ahead)


def test_a_thread_ends_when_no_batch_is_wanted_any_more() -> None:
    closed: list[bool] = []

    def source() -> Iterator[dict[str, np.ndarray]]:
        try:
            while True:
                yield {"x": np.zeros(1)}
        finally:
            closed.append(True)

    ahead = run_ahead(source())
    next(ahead)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]
    assert closed == [True]
