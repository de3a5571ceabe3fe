"""Shuffled batches: a function of (seed, epoch, rank) alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.storage.batches import Batches


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


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.integers(1, 64), st.integers(1, 4), st.integers(1, 200))
def test_ranks_take_equal_steps_and_share_the_examples(counts: list[int], batch_size: int, world: int, window: int) -> None:
    if sum(counts) < world:
        with pytest.raises(SettingsError, match=rf"set PROCESSES to {sum(counts)} or fewer"):
            batches(counts, batch_size, world=world)
        return
    ranks = [batches(counts, batch_size, rank=r, world=world, window=window) for r in range(world)]
    taken = [epoch(b) for b in ranks]
    assert len({len(t) for t in taken}) == 1
    assert len({b.steps_per_epoch for b in ranks}) == 1
    assert {len(batch) for t in taken for batch in t} == {ranks[0].rank_batch}
    # Where the parts divide evenly no example comes twice, and what is left out is less than a batch.
    if len(set(counts)) == 1 and (len(counts) % world == 0):
        seen = [x for t in taken for batch in t for x in batch]
        assert len(seen) == len(set(seen))
        assert sum(counts) - len(seen) < ranks[0].batch_size
    # A rank that ran out starts again, but no two ranks ever read the same example.
    owners: dict[int, int] = {}
    for rank, t in enumerate(taken):
        for x in {x for batch in t for x in batch}:
            assert owners.setdefault(x, rank) == rank


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(1, 30), st.integers(1, 3), st.integers(1, 100), st.integers(0, 20))
def test_a_resumed_epoch_goes_on_where_it_stopped(
    counts: list[int], batch_size: int, number: int, window: int, skip: int
) -> None:
    b = batches(counts, batch_size, window=window)
    assert epoch(b, number, skip) == epoch(batches(counts, batch_size, window=window), number)[skip:]


@pytest.mark.parametrize(("counts", "world"), [([1, 2], 3), ([4], 4), ([1, 1, 1, 2], 5), ([3, 1], 4)])
def test_every_rank_trains_on_its_share_however_few_there_are(counts: list[int], world: int) -> None:
    shares = [{x for batch in epoch(batches(counts, 128, rank=rank, world=world)) for x in batch} for rank in range(world)]
    assert all(shares)
    assert sum(map(len, shares)) == len(set.union(*shares)) == sum(counts)


def test_fewer_examples_than_processes_are_refused_in_a_line() -> None:
    with pytest.raises(SettingsError, match=r"\A4 examples can't be shared by 6 processes: set PROCESSES to 4 or fewer\Z"):
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

    with pytest.raises(PipelineError, match="lower LOADER_WORKERS"):
        list(Batches(load, [10], 5, seed=0, workers=1).epoch(0))


@pytest.mark.parametrize("name", ["LOADER_WORKERS", "CACHE_MIB"])
@pytest.mark.parametrize("value", ["many", "-1", "1.5", "9" * 50, "٣٣x"])
def test_numbers_of_the_environment_are_checked(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        batches([10], 5)


def test_a_data_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [sorted(batch) for batch in epoch(batches([3, 2], 128))] == [[0, 1, 2, 3, 4]]
