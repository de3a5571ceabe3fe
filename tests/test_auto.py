"""The contest of families, and the mixtures that win it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import contest
from pipeline.densities import Density, load_density
from pipeline.densities.auto import Mixture, stacked_weights
from pipeline.densities.gaussian import Gaussian
from pipeline.densities.gmm import GaussianMixture
from pipeline.errors import DataError
from pipeline.fitting import fit_density
from pipeline.settings import build, implementation
from pipeline.storage.codes import ArrayCodes
from pipeline.system.ranks import join
from pipeline.training.trainable import Training


def held(codes: np.ndarray, **settings: object) -> tuple[Density, Training]:
    """The contest on codes, a fifth of which are validation codes."""
    row = {"codes": "c", "dataset": "c", "family": "auto", "max_minutes": 0.2, "folds": 2, "families": ["gmm"], **settings}
    built = build(implementation("pipeline.densities", "auto", "family").Settings, row, "densities.row")
    codes = codes.astype(np.float32)
    return fit_density(built, ArrayCodes(codes[len(codes) // 5 :], codes[: len(codes) // 5]), join())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contest of few contestants."""
    monkeypatch.setattr(contest, "COMPONENTS", (1, 2, 3))
    monkeypatch.setattr(contest, "COVARIANCES", {"full": [{"ridge": [1e-6]}]})


def mixture() -> Mixture:
    near, far = Gaussian(2).double(), GaussianMixture(2, components=[2]).double()
    far.standardise(torch.tensor([50.0, 50.0]), torch.eye(2) + 0.5 * torch.ones(2, 2).tril(-1))
    far.means[1] += 1
    return Mixture.of([near, far], [0.3, 0.7])


def test_a_mixture_is_the_weighted_sum_of_its_members_and_a_file(tmp_path: Path) -> None:
    density, generator = mixture(), torch.Generator().manual_seed(0)
    z = 25 + 20 * torch.randn(30, 2, dtype=torch.float64, generator=generator)
    near, far = (member.log_prob(z) for member in density.members)
    expected = torch.logaddexp(near + np.log(0.3), far + np.log(0.7))  # the density itself is too small a number for some z
    torch.testing.assert_close(density.log_prob(z), expected, rtol=1e-12, atol=0)
    samples = density.sample(5000, torch.Generator().manual_seed(0))
    assert (samples[:, 0] > 25).double().mean().item() == pytest.approx(0.7, abs=0.02)
    density.save(tmp_path / "density")
    loaded = load_density(tmp_path / "density")
    assert torch.equal(loaded.log_prob(z), density.log_prob(z))
    assert loaded.parameter_count == density.parameter_count == 5 + 11 + 1


def test_stacking_finds_the_shares_of_a_mixture() -> None:
    density = mixture()
    z = density.sample(4000, torch.Generator().manual_seed(0))
    held_out = torch.stack([member.log_prob(z) for member in density.members], dim=1)
    torch.testing.assert_close(stacked_weights(held_out)[0].item(), 0.3, atol=0.02, rtol=0)


def test_gaussian_codes_are_a_gaussian(few: None) -> None:
    density, training = held(np.random.default_rng(0).normal(size=(300, 2)) @ [[2.0, 0.0], [1.0, 1.0]])
    assert isinstance(density, Mixture)
    assert {member.parameter_count for member in density.members} == {5}
    assert [row["weight"] for row in training.contest if row["weight"]] == [1.0]
    assert training.best["valid_log_likelihood"] == pytest.approx(-2 * 1.4189 - np.log(2), abs=0.2)


def test_it_finds_clusters_and_heavy_tails_and_says_so(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    codes = np.stack(
        [generator.choice([-8.0, 8.0], 1200) + generator.normal(size=1200), generator.standard_cauchy(1200)], axis=1
    )
    density, training = held(codes)
    truth = -1.4189 - np.log(2) - np.log(4 * np.pi)
    assert training.best["valid_log_likelihood"] == pytest.approx(truth, abs=0.4)
    assert training.contest[0]["valid_log_likelihood"] > training.contest[-1]["valid_log_likelihood"] + 4
    assert sum(row["weight"] for row in training.contest) == pytest.approx(1)
    assert all("quantile" in str(row["family"]) or "asinh" in str(row["family"]) for row in training.contest if row["weight"])
    samples = density.sample(4000, torch.Generator().manual_seed(0))
    quartiles = torch.quantile(samples[:, 1], torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([-1.0, 0.0, 1.0]), atol=0.5, rtol=0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("fitting: none, Gaussian: ")
    assert " nats held out, " in lines[-1]


def test_large_sets_have_one_fold_and_networks(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "FOLDED_CODES", 1000)
    codes = np.random.default_rng(0).normal(size=(1500, 2))
    codes[:, 1] += codes[:, 0] ** 2
    density, training = held(codes, max_minutes=0.06, families=["gmm", "lde"])
    names = [row["family"] for row in training.contest]
    assert any("none, LDE of width 128" in str(name) for name in names)
    assert len(density.members) == len([row for row in training.contest if row["weight"]])


def test_a_ridge_that_was_raised_is_lowered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two Gaussians count as the better the larger their ridge, but not clearly; three need the smallest.
    for name, values in {
        "COMPONENTS": (1, 2, 3),
        "COVARIANCES": {"full": [{"ridge": [ridge]} for ridge in (1e-6, 1e-3, 0.4)]},
        "TRANSFORMS": ("none",),
    }.items():
        monkeypatch.setattr(contest, name, values)
    tried: list[str] = []
    enter = contest._Judge._enter

    def noted(judge: contest._Judge, name: str, family: str, **values: object) -> contest.Contestant | None:
        contestant = enter(judge, name, family, **values)
        if contestant is not None and family == "gmm":
            tried.append(name)
            if "2 Gaussians" in name:
                contestant.held_out[:] = values["ridge"][0] + np.resize([-100.0, 100.0], 200)  # type: ignore[index]
        return contestant

    monkeypatch.setattr(contest._Judge, "_enter", noted)
    codes = np.repeat([[-1.0], [1.0]], 100, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(200, 1))
    _, training = held(np.random.default_rng(1).permutation(codes))
    ridges = [name.rpartition(" ")[2] for name in tried if "3 Gaussians" in name]
    assert ridges == ["0.4", "0.001", "1e-06"]
    assert "3 Gaussians, full, ridge 1e-06" in str(training.contest[0]["family"])


def test_few_gaussians_behind_each_map_tell_which_goes_on(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Narrow and wide codes along a line: one Gaussian needs a map for their tails, which bends the line that two describe.
    monkeypatch.setattr(contest, "COMPONENTS", (1, 2, 3, 5))
    monkeypatch.setattr(contest, "HEATS_OF_SHAPES", 2)
    tried: list[str] = []
    enter = contest._Judge._enter

    def noted(judge: contest._Judge, name: str, family: str, **values: object) -> contest.Contestant | None:
        tried.append(name)
        return enter(judge, name, family, **values)

    monkeypatch.setattr(contest._Judge, "_enter", noted)
    generator = np.random.default_rng(0)
    wide = np.where(generator.uniform(size=(1000, 1)) < 0.2, 20.0, 1.0)
    _, training = held(wide * generator.normal(size=(1000, 2)) @ [[1.0, 1.0], [0.0, 0.1]], max_minutes=5)
    scores = {str(row["family"]): float(row["valid_log_likelihood"]) for row in training.contest}
    alone = {name.partition(",")[0]: score for name, score in scores.items() if name.endswith(", Gaussian")}
    assert max(alone, key=lambda transform: alone[transform]) != "none"
    five = [number for number, name in enumerate(tried) if "5 Gaussians" in name]
    heats = [number for number, name in enumerate(tried) if "2 Gaussians" in name or "3 Gaussians" in name]
    assert max(heats) < min(five)
    order = [tried[number].partition(",")[0] for number in five]
    best = {name.partition(",")[0]: scores[name] for name in reversed(scores) if "2 Gaussians" in name or "3 Gaussians" in name}
    assert order[0] == max(best, key=lambda transform: best[transform]) == "none"
    assert sorted(order[-2:]) == ["asinh", "quantile"]  # both far behind


@pytest.mark.parametrize("dim", [2, 4])
def test_shapes_without_a_map_go_on_though_a_few_gaussians_are_far_behind(
    dim: int, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Clusters on a circle: few Gaussians behind quantiles are ahead of few Gaussians without a map, and eight are behind.
    found, ridges = dict[str, list[contest._Lane]](), list[float]()
    heats = contest._Judge._heats

    def noted(judge: contest._Judge, lanes: list[contest._Lane]) -> list[contest._Lane]:
        running = heats(judge, lanes)
        ridges.extend(values["ridge"][0] for values in judge.covariances["full"])
        found.update({transform: [lane for lane in lanes if lane.transform == transform] for transform in contest.TRANSFORMS})
        return running

    monkeypatch.setattr(contest._Judge, "_heats", noted)
    generator = np.random.default_rng(0)
    angle = generator.integers(0, 8, 3_000) * np.pi / 4
    codes = 4 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.5 * generator.normal(size=(3_000, 2))
    held(np.concatenate([codes, generator.normal(size=(3_000, dim - 2))], axis=1))
    gain = contest._gain(found["quantile"][0].best, found["none"][0].best)
    assert gain.mean > contest.FAR * gain.standard_error
    assert [lane.behind for lane in found["none"]] == [dim > contest.PLANE_DIM]
    assert ridges == ([1e-6, 1e-4] if dim <= contest.PLANE_DIM else [1e-6])


def test_a_number_of_gaussians_next_to_the_best_is_tried_where_more_do_not_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, values in {
        "COMPONENTS": (1, 2, 3, 4, 5, 6, 7, 8),
        "COVARIANCES": {"full": [{"ridge": [1e-6]}]},
        "TRANSFORMS": ("none",),
        "HEATS_OF_SHAPES": 0,  # they pass none over
    }.items():
        monkeypatch.setattr(contest, name, values)
    _, training = held(np.random.default_rng(0).normal(size=(3_000, 1)) + 20 * np.arange(3_000)[:, None] % 80)
    sizes = [str(row["family"]).split()[1] for row in training.contest if "Gaussians" in str(row["family"])]
    assert {"2", "3", "4", "5", "6", "7"} <= set(sizes)  # 5 clearly gains, so 4 and 6 are passed over; 7 doesn't


def test_mixtures_that_gain_when_their_half_of_the_time_is_over_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in {
        "COMPONENTS": (1, 2, 3, 4, 5),
        "COVARIANCES": {"full": [{"ridge": [1e-6]}]},
        "TRANSFORMS": ("none",),
    }.items():
        monkeypatch.setattr(contest, name, values)
    tried: list[str] = []
    enter = contest._Judge._enter

    def noted(judge: contest._Judge, name: str, family: str, **values: object) -> contest.Contestant | None:
        tried.append(name)
        return enter(judge, name, family, **values)

    monkeypatch.setattr(contest._Judge, "_enter", noted)
    # The first two numbers take more than the half that is theirs next to networks.
    monkeypatch.setattr(contest._Judge, "_spent", lambda judge: 0.6 if any("3 Gaussians" in name for name in tried) else 0.0)
    monkeypatch.setattr(contest._Judge, "_in_time_for_networks", lambda judge: True)
    monkeypatch.setattr(contest._Judge, "_networks", lambda judge: None)
    generator = np.random.default_rng(0)
    codes = 10.0 * generator.integers(5, size=(300, 1)) + generator.normal(size=(300, 2))
    _, training = held(codes, max_minutes=5, families=["gmm", "lde"])
    assert "none, 5 Gaussians" in str(training.contest[0]["family"])


def test_heats_of_shapes_have_more_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of clusters on a circle three Gaussians behind quantiles tell more, and eight without a map, which is what they are.
    led: list[str] = []
    heats = contest._Judge._heats

    def noted(judge: contest._Judge, lanes: list[contest._Lane]) -> list[contest._Lane]:
        heats(judge, lanes)
        led.append(max(lanes, key=lambda lane: lane.score).transform)
        return []

    monkeypatch.setattr(contest._Judge, "_heats", noted)
    monkeypatch.setattr(contest, "COVARIANCES", {"full": [{"ridge": [1e-6]}]})
    monkeypatch.setattr(contest, "TRANSFORMS", ("none", "quantile"))
    generator = np.random.default_rng(0)
    angle = generator.integers(0, 8, 3_000) * np.pi / 4
    codes = 4 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.5 * generator.normal(size=(3_000, 2))
    for count in (2, 6):
        monkeypatch.setattr(contest, "HEATS_OF_SHAPES", count)
        held(codes, families=["gmm"], max_minutes=5)
    assert led == ["quantile", "none"]


@pytest.mark.parametrize("folded", [False, True])
def test_steps_are_large_while_gains_hardly_fall_and_smaller_numbers_come_before_other_ridges(
    folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {1: 0.0, 2: 4.0, 3: 5.0, 4: 7.0, 6: 7.2, 7: 5.0, 5: 7.3, 8: 4.0}  # nats held out, for so many Gaussians
    tried: list[tuple[int, int]] = []

    def entered(
        judge: contest._Judge, lane: contest._Lane, components: int, strength: int, rival: contest.Contestant | None
    ) -> contest.Contestant:
        count = contest.COMPONENTS[components]
        tried.append((count, strength))
        lane.tried.add((components, strength))
        best = lane.best
        return contest.Contestant(str(count), best.densities, np.full_like(best.held_out, values[count] - strength), 0.0)

    monkeypatch.setattr(contest._Judge, "_enter_mixture", entered)
    monkeypatch.setattr(contest, "COMPONENTS", (1, 2, 3, 4, 5, 6, 7, 8))
    monkeypatch.setattr(contest, "COVARIANCES", {"full": [{"ridge": [1e-6]}, {"ridge": [1e-3]}]})
    monkeypatch.setattr(contest, "TRANSFORMS", ("none",))
    monkeypatch.setattr(contest, "HEATS_OF_SHAPES", 0)
    monkeypatch.setattr(contest, "FOLDED_CODES", 1000 if folded else 50)
    held(np.random.default_rng(0).normal(size=(100, 1)), families=["gmm"], max_minutes=5)
    if folded:  # fits that lose help the mixture of all, so another ridge comes at once
        assert tried[:5] == [(2, 0), (4, 0), (6, 0), (8, 0), (8, 1)]
        return
    # 3 and 5 are passed over; 6 gains less than half of what 4 gained; 7 loses, and 5 comes before another ridge.
    assert tried[:5] == [(2, 0), (4, 0), (6, 0), (7, 0), (5, 0)]
    assert tried[5:] == [(8, 0), (8, 1), (5, 1)]  # in the end another ridge for the best number


def test_no_mixture_starts_that_would_outlast_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fit takes 0.75 % of the time for each of its Gaussians, and each number gains less than the one before.
    tried: list[int] = []
    scores = {1: 0.0, 2: 4.0, 3: 6.0, 4: 9.0, 6: 9.1, 8: 14.0, 12: 14.1, 16: 20.0, 24: 21.0, 32: 26.0, 48: 27.0, 64: 32.0}

    def entered(
        judge: contest._Judge, lane: contest._Lane, components: int, strength: int, rival: contest.Contestant | None
    ) -> contest.Contestant:
        count = contest.COMPONENTS[components]
        tried.append(count)
        lane.tried.add((components, strength))
        lane.pace = 0.0075 * judge.limit
        best = lane.best
        return contest.Contestant(str(count), best.densities, np.full_like(best.held_out, scores[count] - strength), 0.0)

    monkeypatch.setattr(contest._Judge, "_enter_mixture", entered)
    monkeypatch.setattr(contest._Judge, "_spent", lambda judge: 0.0075 * sum(tried))
    monkeypatch.setattr(contest, "COMPONENTS", tuple(scores))
    monkeypatch.setattr(contest, "COVARIANCES", {"full": [{"ridge": [1e-6]}, {"ridge": [1e-3]}]})
    monkeypatch.setattr(contest, "TRANSFORMS", ("none",))
    monkeypatch.setattr(contest, "HEATS_OF_SHAPES", 0)
    monkeypatch.setattr(contest, "FOLDED_CODES", 50)
    held(np.random.default_rng(0).normal(size=(200, 1)), families=["gmm"], max_minutes=5)
    # After 2, 4, 8, 16 and 32 less than half of the time is left: enough for 48, not for 64, which comes next.
    assert tried == [2, 4, 8, 16, 32, 32]


def test_a_ridge_that_did_no_harm_to_a_few_is_lowered_for_more_where_codes_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(20, size=(3000, 1)) + 0.01 * generator.normal(size=(3000, 1))
    monkeypatch.setattr(contest, "COMPONENTS", (1, 2, 20, 40))
    monkeypatch.setattr(contest, "COVARIANCES", {"full": [{"ridge": [1e-6]}, {"ridge": [1e-2]}]})
    monkeypatch.setattr(contest, "TRANSFORMS", ("none",))
    monkeypatch.setattr(contest, "_with_fine_ridge", lambda values: values)
    tried: list[str] = []
    enter = contest._Judge._enter

    def entered(judge: contest._Judge, name: str, family: str, **values: object) -> contest.Contestant | None:
        tried.append(name)
        found = enter(judge, name, family, **values)
        if found is not None and name == "none, 2 Gaussians, full, ridge 1e-06":
            found.held_out -= 1.0  # so that the other suits them
        return found

    monkeypatch.setattr(contest._Judge, "_enter", entered)
    _, training = held(codes, families=["gmm"], max_minutes=5)
    scores = {str(row["family"]): float(row["valid_log_likelihood"]) for row in training.contest}
    assert scores["none, 20 Gaussians, full, ridge 0.01"] > scores["none, 2 Gaussians, full, ridge 0.01"]  # a clear gain
    assert tried.index("none, 20 Gaussians, full, ridge 1e-06") == tried.index("none, 20 Gaussians, full, ridge 0.01") + 1
    assert str(training.contest[0]["family"]).endswith("ridge 1e-06")


def test_maps_are_only_compared_where_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, values in {
        "COMPONENTS": (1, 2, 3, 4, 5),
        "COVARIANCES": {"full": [{"ridge": [1e-6]}]},
        "TRANSFORMS": ("none", "asinh"),
        "HEATS_OF_SHAPES": 2,
    }.items():
        monkeypatch.setattr(contest, key, values)
    tried: list[str] = []
    enter = contest._Judge._enter

    def noted(judge: contest._Judge, name: str, family: str, **values: object) -> contest.Contestant | None:
        tried.append(name)
        return enter(judge, name, family, **values)

    monkeypatch.setattr(contest._Judge, "_enter", noted)
    generator = np.random.default_rng(0)
    codes = 10.0 * generator.integers(5, size=(300, 1)) + generator.normal(size=(300, 2))
    # Each fit takes a share of the time: a tenth for two numbers behind a map is too much.
    for share, third in ((0.01, "asinh, 2 "), (0.1, "none, ")):
        tried.clear()
        monkeypatch.setattr(contest._Judge, "_spent", lambda judge, share=share: share * len(tried))
        held(codes, max_minutes=5, families=["gmm"])
        numbered = [name for name in tried if "Gaussians" in name]
        assert [name.partition(" Gaussians")[0] for name in numbered[:2]] == ["none, 2", "none, 3"]
        assert numbered[2].startswith(third)


def test_kernels_take_part_in_the_shape_of_the_codes_and_without(few: None) -> None:
    generator = np.random.default_rng(0)
    angle = generator.uniform(0, 2 * np.pi, 600)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.05 * generator.normal(size=(600, 2))
    density, training = held(ring @ [[3.0, 0.0], [2.9, 0.3]], families=["kde"])
    assert str(training.contest[0]["family"]).endswith("kernels, correlated")
    scores = {str(row["family"]): float(row["valid_log_likelihood"]) for row in training.contest}
    assert scores["none, kernels, correlated"] > scores["none, kernels, round"] > scores["none, Gaussian"]
    assert "kde" in {member.family for member in density.members}


@pytest.mark.parametrize(("dim", "tried"), [(20, False), (1, True)])
def test_kernels_are_tried_on_few_codes_of_a_large_set(
    few: None, monkeypatch: pytest.MonkeyPatch, dim: int, tried: bool
) -> None:
    monkeypatch.setattr(contest, "FOLDED_CODES", 500)
    monkeypatch.setattr(contest, "TRIAL", {"train": 200, "valid": 100})
    sizes: list[int] = []
    fit_kernels = contest._Judge._fit_mapped

    def noted(judge: contest._Judge, name: str, family: str, mapped: tuple, **values: object) -> Density:  # type: ignore[type-arg]
        if family == "kde":
            sizes.append(mapped[1].index.count("train"))
        return fit_kernels(judge, name, family, mapped, **values)

    monkeypatch.setattr(contest._Judge, "_fit_mapped", noted)
    codes = np.random.default_rng(0).normal(size=(1000, dim)) + 10 * (np.arange(1000) % 2)[:, None] * (dim == 1)
    _, training = held(codes, families=["kde"])
    assert any("kernels" in str(row["family"]) for row in training.contest) == tried
    assert sizes[0] == 200
    assert (800 in sizes) == tried


def test_a_contestant_far_behind_its_rival_is_given_up_after_a_fold(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []

    def counted(row: object, codes: object, name: str) -> Density:
        fitted.append(name)
        return fit(row, codes, name)  # type: ignore[arg-type]

    def noted(settings: object, codes: object, given: contest.Fit, label: str, quiet: bool) -> None:
        nonlocal fit
        fit = given
        judge = contest._Judge(settings, codes, counted, label, quiet)  # type: ignore[arg-type]
        best = judge._enter("best", "gmm", transform="none", components=[2], ridge=[1e-6])
        assert best is not None
        assert judge._enter("far behind", "gmm", transform="none", rival=best, components=[1], ridge=[1e-6]) is None
        assert judge._enter("level", "gmm", transform="none", rival=best, components=[3], ridge=[1e-6]) is not None
        raise DataError("that is all")

    fit: contest.Fit
    monkeypatch.setattr("pipeline.fitting.hold_contest", noted)
    codes = np.repeat([[-1.0], [1.0]], 200, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(400, 1))
    with pytest.raises(DataError, match="that is all"):
        held(np.random.default_rng(1).permutation(codes), folds=4)
    assert {name: fitted.count(name) for name in fitted} == {
        "fitting: best": 4, "fitting: far behind": 1, "fitting: level": 4,
    }  # fmt: skip


def test_each_code_is_scored_by_a_fit_that_has_not_seen_it() -> None:
    pool = np.arange(41.0)[:, None]
    folds = contest._folds(ArrayCodes(pool[10:], pool[:10]), 4, seed=0)
    held_out = [fold.load("valid", 0)["codes"].ravel() for fold in folds]
    assert sorted(np.concatenate(held_out)) == pool.ravel().tolist()
    for fold, codes in zip(folds, held_out, strict=True):
        assert not set(codes) & set(fold.load("train", 0)["codes"].ravel())


def test_what_no_lane_has_reached_is_tried_while_there_is_time(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "COVARIANCES", {"full": [{"ridge": [1e-6]}, {"pooled_codes": 10, "ridge": [1e-6]}]})
    monkeypatch.setattr(contest, "TRANSFORMS", ("none", "asinh"))
    _, training = held(np.random.default_rng(0).normal(size=(80, 2)), max_minutes=5)
    names = [row["family"] for row in training.contest]
    # Two Gaussians; and for each map three numbers, pooled or not, but for what falls far behind.
    assert 12 <= len(set(names)) == len(names) <= 2 + 2 * 3 * 2
    assert training.ended_by == "epochs"


def test_the_clock_ends_it_and_the_first_contestants_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    density, training = held(np.random.default_rng(0).normal(size=(60, 3)), max_minutes=1e-6)
    assert training.ended_by == "max_minutes"
    assert [row["family"] for row in training.contest if "Gaussians" in row["family"]] == []
    assert np.isfinite(density.log_prob(torch.zeros(1, 3)).item())


def test_two_fits_with_a_seed_are_one(few: None) -> None:
    codes = np.random.default_rng(1).gamma(1.0, size=(200, 2))
    first, second = (held(codes, max_minutes=5)[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("codes", [np.ones((30, 2)), np.zeros((4, 1))])
def test_constant_codes_are_refused(codes: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"no family can be fitted to these codes: .*don't vary"):
        held(codes, families=["kde", "gmm", "lde"])


def test_few_codes_of_many_dimensions(few: None) -> None:
    density, training = held(np.random.default_rng(0).normal(size=(12, 20)), folds=5, families=["kde", "gmm", "lde"])
    assert any("2 Gaussians" in str(row["family"]) for row in training.contest)
    assert np.isfinite(density.log_prob(torch.zeros(1, 20)).item())


def test_few_codes_of_many_dimensions_have_a_shrunk_gaussian(few: None) -> None:
    generator = np.random.default_rng(0)
    density, training = held(generator.normal(size=(75, 60)), folds=3, families=["gmm"], max_minutes=0.05)
    fresh = torch.from_numpy(generator.normal(size=(1000, 60)).astype(np.float32))
    truth = -0.5 * (fresh.square().sum(dim=1).mean().item() + 60 * np.log(2 * np.pi))
    assert density.log_prob(fresh).mean().item() > truth - 0.06 * 60  # the sample covariance has 2 nats per dimension less
    scores = {str(row["family"]): float(row["valid_log_likelihood"]) for row in training.contest}
    assert scores["none, Gaussian, shrunk"] > scores["none, Gaussian"] + 60


def test_boxes_take_part_where_codes_are_shapes_and_are_not_far_behind() -> None:
    from test_boxes import checkerboard

    density, training = held(checkerboard(6000, seed=0).numpy(), families=["boxes"], max_minutes=1)
    assert training.contest[0]["family"] == "none, boxes"
    assert density.log_prob(checkerboard(2000, seed=1)).mean().item() > -np.log(32) - 0.1
    line = np.random.default_rng(0).normal(size=(3000, 1)) @ [[1.0, 1.0]] + 1e-3 * np.random.default_rng(1).normal(
        size=(3000, 2)
    )
    for codes, tried in ((line, True), (np.concatenate([line, line], axis=1)[:, :4] + 0.1 * line[:, :1], False)):
        _, training = held(codes, families=["boxes"], max_minutes=1)
        names = [row["family"] for row in training.contest]
        assert ("none, boxes, tried" in names) == tried
        assert "none, boxes" not in names  # far behind the Gaussian of a thin line
