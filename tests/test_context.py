"""Densities given a context: they are densities, they know their context, and they refuse one that they have never seen."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from small import DENSITIES

from pipeline.densities import Density, load_density
from pipeline.densities.common.adaptation import Gaussians, adapted, by_class, shrunk
from pipeline.densities.common.context import Column, Context
from pipeline.densities.common.density import build_density
from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.fitting import fit_context, fit_density
from pipeline.settings import build, implementation
from pipeline.storage.codes import CodeIndex, CodeReader, write_part
from pipeline.storage.columns import VectorMoments
from pipeline.storage.parts import SPLITS, write_index
from pipeline.storage.shards import ShardReader
from pipeline.system.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
CONDITIONAL = ("lde", "gaussian", "gmm", "maf", "nsf", "realnvp", "naf")
QUICK = tuple(family for family in CONDITIONAL if family != "naf")  # whose inverse is a search
OTHERS = sorted(set(DENSITIES) - set(CONDITIONAL))
BLOCKS = {
    "lde-separate": {"family": "lde", "blocks": "separate", "width": 8},
    "lde-batch": {"family": "lde", "normalisation": "batch"},
    "lde-attention": {"family": "lde", "blocks": "attention", "width": 8, "layers": 1},
    "lde-any": {"family": "lde", "blocks": "attention", "width": 8, "layers": 1, "orders": "any", "averaged_orders": 2},
}


def context(levels=(2.0, 5.0), numbers=0) -> Context:
    columns = [Column(name="labels", levels=levels, words=tuple(f"c{v:g}" for v in levels))]
    columns += [Column(name=f"number{i}") for i in range(numbers)]
    result = Context(columns, len(levels), complete=numbers == 0)
    result.rows[:, 0] = torch.tensor(levels)
    result.weights.copy_(torch.tensor([0.25, 0.75]))
    result.mean += 0.5
    result.mean[0] = 0
    return result


def density(family: str, dim: int = 2, given: Context | None = None, **settings) -> Density:
    """A density in float64 whose parameters are all random, so that everything depends on the context."""
    torch.manual_seed(0)
    name = str(BLOCKS.get(family, {}).get("family", family))
    row = {"codes": "c", "dataset": "d", **DENSITIES[name], "family": name, **BLOCKS.get(family, {}), **settings}
    settings = build(implementation("pipeline.densities", name, "family").Settings, row, "row")
    built = build_density(settings, dim, context() if given is None else given).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.12 * torch.randn_like(parameter)
        if name in ("gaussian", "gmm"):
            for buffer in (
                (built.mean, built.cholesky) if name == "gaussian" else (built.log_weights, built.means, built.whitening)
            ):
                buffer += 0.3 * torch.rand_like(buffer).tril()
        if name == "gmm":
            built.log_weights.copy_(torch.log_softmax(built.log_weights, dim=-1))
            built.whitening.copy_(built.whitening.triu())
    built.standardise(torch.tensor([3.0]).expand(dim), torch.tensor([2.0]).expand(dim))
    return built.eval()


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> CodeReader:
    """Two classes of codes, 2 thrice as frequent as 0; class 1 is in the test codes only."""
    folder = tmp_path_factory.mktemp("codes")
    random = np.random.default_rng(0)
    moments, parts = VectorMoments(2), {}
    for split in SPLITS:
        labels = np.tile([0, 2, 2, 2] if split != "test" else [0, 1, 2, 2], 50)
        z = (random.normal(size=(200, 2)) * 0.5 + np.stack([3.0 * labels, 2.0 - labels], 1)).astype(np.float32)
        if split == "train":
            moments.update(z)
        parts[split] = (write_part(folder, split, 0, z, labels),)
    index = CodeIndex(
        dim=2, mean=tuple(moments.mean), std=tuple(moments.std), source_digest="", label_names=("zero", "one", "two"), **parts
    )
    write_index(folder, index)
    return CodeReader(folder)


def fitted(codes: CodeReader, family: str, **settings) -> Density:
    row = {
        "codes": "c",
        "dataset": "d",
        "family": family,
        **DENSITIES[family],
        "context": "labels",
        "epochs": 4,
        "batch_size": 20,
    }
    row |= {"learning_rate": 0.02} | settings
    return fit_density(build(implementation("pipeline.densities", family, "family").Settings, row, "row"), codes, ALONE)[0]


# A density, whatever the context -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*QUICK, *BLOCKS])
def test_integrates_to_one_for_every_context_in_two_dimensions(family):
    model = density(family)
    axis = torch.linspace(-34, 40, 297, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    area = float(axis[1] - axis[0]) ** 2
    with torch.no_grad():
        each = {label: model.log_prob(z, torch.full((len(z),), label)) for label in (2.0, 5.0)}
        marginal = model.log_prob(z)
    for values in (*each.values(), marginal):
        assert values.exp().sum().item() * area == pytest.approx(1, abs=1e-2)
    assert (each[2.0] - each[5.0]).abs().max() > 0.1
    expected = torch.logaddexp(each[2.0] + math.log(0.25), each[5.0] + math.log(0.75))
    torch.testing.assert_close(marginal, expected)


@pytest.mark.parametrize("family", [f for f in (*CONDITIONAL, *BLOCKS) if f != "realnvp"])
def test_integrates_to_one_for_every_context_in_one_dimension(family):
    given = context(numbers=0) if family in ("gaussian", "gmm") else context(numbers=1)
    model = density(family, dim=1, given=given)
    grid = torch.linspace(-60, 66, 20001, dtype=torch.float64)[:, None]
    contexts = [[2.0], [5.0]] if family in ("gaussian", "gmm") else [[2.0, 0.3], [5.0, 0.3], [5.0, -2.0]]
    seen = []
    for row in contexts:
        with torch.no_grad():
            seen.append(model.log_prob(grid, torch.tensor([row]).expand(len(grid), -1)))
        assert torch.trapezoid(seen[-1].exp(), grid[:, 0]).item() == pytest.approx(1, abs=2e-3)
    assert all((first - other).abs().max() > 0.05 for first, other in itertools.pairwise(seen))


@pytest.mark.parametrize("family", [*QUICK, *BLOCKS])
def test_samples_follow_their_own_context(family):
    model = density(family)
    labels = torch.tensor([2.0, 5.0]).repeat(1000)
    samples = model.sample(2000, torch.Generator().manual_seed(0), labels)
    axis = torch.linspace(-34, 40, 297, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    for label in (2.0, 5.0):
        with torch.no_grad():
            weights = model.log_prob(z, torch.full((len(z),), label)).exp()
        mean = weights @ z / weights.sum()
        std = (weights @ (z - mean).square() / weights.sum()).sqrt()
        drawn = samples[labels == label]
        assert ((drawn.mean(dim=0) - mean).abs() < 5 * std / math.sqrt(1000) + 0.02).all()
        torch.testing.assert_close(drawn.std(dim=0), std, rtol=0.3, atol=0)


@pytest.mark.parametrize("family", ["lde", "lde-separate"])
def test_a_walk_gives_the_outputs_of_the_network(family):
    model, z = density(family, dim=5), torch.randn(6, 5, dtype=torch.float64)
    context = model.context.encode(torch.tensor([[2.0], [5.0]]).repeat(3, 1))
    with torch.no_grad():
        first, others = model.network(z, None, context)
        walk = model.network.walk(context=context)
        torch.testing.assert_close(walk.first, first)
        for i in range(1, 5):
            torch.testing.assert_close(walk(z[:, :i]), others[i - 1])


@pytest.mark.parametrize("family", [*CONDITIONAL, *BLOCKS])
def test_files_chunks_and_order_change_nothing(family, tmp_path):
    model = density(family)
    model.save(tmp_path / "density.safetensors")
    loaded = load_density(tmp_path / "density.safetensors")
    assert loaded.context.names == ("labels",)
    z, labels = torch.randn(30, 2, dtype=torch.float64), torch.tensor([2.0, 5.0, 5.0]).repeat(10)
    with torch.no_grad():
        whole = model.log_prob(z, labels)
        assert torch.equal(loaded.log_prob(z, labels), whole)
        model.chunk_examples = 7
        torch.testing.assert_close(model.log_prob(z, labels[:, None]), whole)
        order = torch.randperm(30)
        torch.testing.assert_close(model.log_prob(z[order], labels[order]), whole[order])
    draws = [d.sample(50, torch.Generator().manual_seed(1)) for d in (model, loaded)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("family", ["lde", "lde-attention"])
def test_gradients_in_parts_are_those_at_once(family):
    model = density(family, dim=5)
    z, labels = torch.randn(40, 5, dtype=torch.float64), torch.tensor([2.0, 5.0]).repeat(20)
    found = []
    for examples in (1000, 9):
        model.chunk_examples = examples
        model.zero_grad()
        model.loss(z, None, labels).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert all(gradient.abs().max() > 0 for gradient in found[0])


def test_an_untrained_lde_is_the_one_without_a_context():
    from pipeline.densities import LatentDensityEstimator

    torch.manual_seed(0)
    plain = LatentDensityEstimator(3, components=2)
    torch.manual_seed(0)
    given = LatentDensityEstimator(3, components=2, context=context())
    z = torch.randn(5, 3)
    torch.testing.assert_close(plain.log_prob(z), given.log_prob(z, torch.full((5,), 2.0)))
    assert given.parameter_count - plain.parameter_count == 2 * 16 + 2 * 6  # a vector for each class, twice


@pytest.mark.parametrize("family", ["gaussian", "gmm", "lde-any"])
def test_some_dimensions_given_others_and_a_context(family):
    model = density(family)
    if family == "gaussian":
        model.mean[1] += 2  # so that what is observed says much of the context
    axis = torch.linspace(-60, 66, 4001, dtype=torch.float64)
    z = torch.stack([torch.full_like(axis, 4.0), axis], dim=1)
    given = torch.tensor([True, False])
    with torch.no_grad():
        each = {label: model.log_prob(z, torch.full((len(z),), label), given=given) for label in (2.0, 5.0)}
        marginal = model.log_prob(z, given=given)
    for values in (*each.values(), marginal):
        assert torch.trapezoid(values.exp(), axis).item() == pytest.approx(1, abs=2e-3)
    if family != "lde-any":  # whose orders are averaged before the quotient is taken
        for label, values in each.items():
            joint = model.log_prob(z, torch.full((len(z),), label)).exp()
            torch.testing.assert_close(values.exp(), joint / torch.trapezoid(joint, axis), rtol=1e-3, atol=1e-9)
        joint = model.log_prob(z).exp()
        torch.testing.assert_close(marginal.exp(), joint / torch.trapezoid(joint, axis), rtol=1e-3, atol=1e-9)
    values = torch.tensor([[4.0, math.nan]], dtype=torch.float64)
    for density_of, label in ((each[5.0], torch.tensor([5.0])), (marginal, None)):
        drawn = model.sample(3000, torch.Generator().manual_seed(0), label, given=values)[:, 0]
        assert (drawn[:, 0] == 4.0).all()
        cumulative = torch.cumulative_trapezoid(density_of.exp(), axis)
        below = [(drawn[:, 1] <= axis[1 + int((cumulative < level).sum())]).double().mean().item() for level in (0.25, 0.75)]
        assert below == pytest.approx([0.25, 0.75], abs=0.04)


# Labels ----------------------------------------------------------------------------------------------------------------


def test_labels_are_drawn_at_training_frequencies():
    drawn = context().draw(100_000, torch.Generator().manual_seed(0))
    assert (drawn == 5).float().mean().item() == pytest.approx(0.75, abs=0.006)
    assert set(drawn.flatten().tolist()) == {2.0, 5.0}


def test_bayes_rule():
    model = density("gaussian")
    z = torch.randn(20, 2, dtype=torch.float64)
    joint = model.joint_log_prob(z)
    for column, (label, share) in enumerate([(2.0, 0.25), (5.0, 0.75)]):
        torch.testing.assert_close(joint[:, column], model.log_prob(z, torch.full((20,), label)) + math.log(share))


def test_what_is_never_seen_is_refused_by_name():
    model = density("lde")
    z = torch.zeros(2, 2)
    with pytest.raises(DataError, match="labels: no training code has '7'; known: c2, c5"):
        model.log_prob(z, torch.tensor([2.0, 7.0]))
    with pytest.raises(DataError, match="labels: no training code has '7'"):
        model.sample(2, None, torch.tensor([2.0, 7.0]))
    with pytest.raises(SettingsError, match="labels: no training code has 'c9'; known: c2, c5"):
        model.context.parse({"labels": "c9"})
    assert model.context.parse({"labels": "c5"}).tolist() == [5.0]
    with pytest.raises(SettingsError, match="age: no column of this density's context, which has labels"):
        model.context.parse({"labels": "c5", "age": "3"})
    with pytest.raises(DataError, match=r"2 codes have 3 contexts"):
        model.log_prob(z, torch.tensor([2.0, 2.0, 2.0]))
    with pytest.raises(DataError, match=r"expected a context with shape \(2, 1\), labels for each code, got \(2, 3\)"):
        model.log_prob(z, torch.zeros(2, 3))
    numbers = density("lde", given=context(numbers=1))
    with pytest.raises(PipelineError, match="this density is conditioned on labels, number0: give a context"):
        numbers.log_prob(z)
    with pytest.raises(DataError, match="a context isn't finite"):
        numbers.log_prob(z, torch.tensor([[2.0, 1.0], [2.0, math.nan]]))


@pytest.mark.parametrize("family", OTHERS)
def test_families_without_a_context_say_so(family):
    module = implementation("pipeline.densities", family, "family")
    with pytest.raises(SettingsError, match=f"row.context: the family {family} can't be conditioned; lde, gmm"):
        build(module.Settings, {"codes": "c", "dataset": "d", "family": family, "context": "labels"}, "row")
    with pytest.raises(PipelineError, match=f"'{family}' can't be conditioned on a context"):
        module.Model(2, context=context())
    plain = module.Model(2)
    if plain.has_log_prob:
        with pytest.raises(PipelineError, match=f"this density '{family}' wasn't fitted with a context: leave it out"):
            plain.log_prob(torch.zeros(1, 2), torch.zeros(1))


def test_numbers_are_no_classes():
    with pytest.raises(PipelineError, match="'gmm' needs a context of few categories, and labels, number0 can't be listed"):
        density("gmm", given=context(numbers=1))


# Fitting ---------------------------------------------------------------------------------------------------------------


def test_context_of_codes(codes):
    found = fit_context(codes, ["labels"], seed=0)
    assert found.complete
    assert found.rows.tolist() == [[0.0], [2.0]]
    assert found.weights.tolist() == [0.25, 0.75]
    assert found.columns == (Column(name="labels", levels=(0.0, 2.0), words=("zero", "two")),)
    with pytest.raises(DataError, match="have no column 'age' to condition on; they have labels"):
        fit_context(codes, ["age"], seed=0)


@pytest.mark.parametrize("family", ["lde", "gaussian", "gmm", "maf"])
def test_fits_know_their_classes(codes, family):
    model = fitted(codes, family).eval()
    arrays = codes.load("valid", 0)
    z, labels = torch.from_numpy(arrays["codes"]), torch.from_numpy(arrays["labels"])
    with torch.no_grad():
        right = model.log_prob(z, labels)
        assert (right > model.log_prob(z, 2 - labels)).float().mean() > 0.99
        guessed = model.context.rows[model.joint_log_prob(z).argmax(dim=1), 0]
    assert (guessed == labels).float().mean() > 0.97
    samples = model.sample(400, torch.Generator().manual_seed(0), torch.full((400,), 2.0))
    assert ((samples.mean(dim=0) - torch.tensor([6.0, 0.0])).abs() < 1.0).all()


def test_gaussian_of_each_class_is_the_closed_form(codes):
    model = fitted(codes, "gaussian", pseudo_codes=[7.0]).double()
    arrays = codes.load("train", 0)
    z = (torch.from_numpy(arrays["codes"]).double() - model.shift) / model.scale
    own = z[torch.from_numpy(arrays["labels"]) == 0]
    # Of 7 pseudo-codes only the moments count.
    mean = (own.sum(dim=0) + 7 * z.mean(dim=0)) / (len(own) + 7)
    second = (own.T @ own + 7 * z.T @ z / len(z)) / (len(own) + 7)
    torch.testing.assert_close(model.mean[0], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.covariance[0], second - torch.outer(mean, mean), rtol=1e-4, atol=1e-5)


def test_pseudo_codes_are_chosen_by_validation(codes):
    best = fitted(codes, "gaussian", pseudo_codes=[1.0, 1e6])
    assert best.chosen() == {"pseudo_codes": 1.0}
    torch.testing.assert_close(best.mean, fitted(codes, "gaussian", pseudo_codes=[1.0]).mean)
    pulled = fitted(codes, "gaussian", pseudo_codes=[1e9])
    plain = fitted(codes, "gaussian", context=None)
    torch.testing.assert_close(pulled.mean[0], plain.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pulled.covariance[1], plain.covariance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "tied", "diagonal"])
def test_adaptation_is_a_step_of_em_with_codes_of_the_common_mixture(kind):
    torch.manual_seed(0)
    means = torch.randn(3, 2).double()
    root = torch.randn(3, 2, 2).double()
    matrices = root @ root.mT + torch.eye(2).double()
    covariances = {"full": matrices, "tied": matrices[0], "diagonal": matrices.diagonal(dim1=1, dim2=2)}
    common = Gaussians(torch.tensor([0.5, 0.3, 0.2]).double(), means, covariances[kind], kind)
    z = torch.randn(50, 2).double()
    full = {"full": matrices, "tied": matrices[0].expand(3, 2, 2), "diagonal": torch.diag_embed(covariances["diagonal"])}
    parts = [torch.distributions.MultivariateNormal(m, c).log_prob(z) for m, c in zip(means, full[kind], strict=True)]
    joint = torch.stack(parts, dim=1) + common.weights.log()
    torch.testing.assert_close(common.joint(z), joint)
    shares = torch.softmax(joint, dim=1)
    step = adapted(common, z, pseudo_codes=4.0, iterations=1, tolerance=0.0)
    for k in range(3):
        own, prior = shares[:, k], 4.0 * common.weights[k]
        total = own.sum() + prior
        mean = (own @ z + prior * means[k]) / total
        torch.testing.assert_close(step.weights[k], total / (50 + 4.0))
        torch.testing.assert_close(step.means[k], mean)
        second = ((z.T * own) @ z + prior * (full[kind][k] + torch.outer(means[k], means[k]))) / total - torch.outer(mean, mean)
        expected = {"full": second, "tied": covariances["tied"], "diagonal": second.diagonal()}[kind]
        torch.testing.assert_close(step.covariances if kind == "tied" else step.covariances[k], expected)
    # From step to step the codes and the pseudo-codes become more likely together; without codes nothing changes.
    assert adapted(common, z, 0.1, 20, 0.0).joint(z).logsumexp(1).mean() > step.joint(z).logsumexp(1).mean()
    empty = shrunk(common, torch.zeros(3), torch.zeros(3, 2), torch.zeros(common.covariances.shape), 4.0)
    torch.testing.assert_close(empty.covariances, common.covariances)


def test_by_class_keeps_the_order():
    classes, z = torch.tensor([2, 0, 2, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert by_class(classes, z, lambda c, rows: 10 * c + rows).tolist() == [21.0, 2.0, 23.0, 14.0]


def test_ranks_of_contexts_and_unknown_labels(codes, tmp_path: Path):
    from pipeline.evaluation.likelihood import log_likelihood, with_context

    model = fitted(codes, "gaussian")
    arrays = codes.load("test", 0)
    known = arrays["labels"] != 1
    score = log_likelihood(model, with_context(model, codes, codes.blocks("test")))
    assert score.number == int(known.sum()) == 150
    with torch.no_grad():
        expected = model.log_prob(torch.from_numpy(arrays["codes"][known]), torch.from_numpy(arrays["labels"][known]))
    assert score.mean == pytest.approx(expected.double().mean().item(), rel=1e-6)


# From raw files to codes ---------------------------------------------------------------------------------------------------


def test_columns_are_carried_to_the_codes_and_the_samples(tmp_path, monkeypatch):
    import small

    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    ward, age, z = random.integers(0, 2, 400), random.normal(50, 10, 400), random.normal(size=(400, 2))
    z += 4 * ward[:, None] + 0.2 * age[:, None]
    lines = [
        f"{a!r},{b!r},{'north' if w else 'south'},{c!r}" for (a, b), w, c in zip(z.tolist(), ward, age.tolist(), strict=True)
    ]
    (tmp_path / "raw.csv").write_text("\n".join(["x,y,ward,age", *lines]) + "\n")
    (tmp_path / "params.yaml").write_text(
        """\
datasets:
  patients: {source: vectors, root: raw.csv, categories: [ward], numbers: [age]}
autoencoders:
  patients: {dataset: patients, objective: identity}
densities:
  patients-lde: {codes: patients, dataset: patients, family: lde, components: 2, context: [age, ward], epochs: 3,
    learning_rate: 0.02}
  patients-wrong: {codes: patients, dataset: patients, family: lde, context: [height]}
  patients-labels: {codes: patients, dataset: patients, family: lde, context: labels}
sampling: {count: 40}
evaluations:
  patients: {}
"""
    )
    for stage, row in [("prepare", "patients"), ("features", "patients"), ("train", "patients"), ("extract", "patients")]:
        result = small.run(stage, row)
        assert result.exit_code == 0, result.output
    codes = CodeReader("data/codes/patients")
    arrays = codes.load("train", 0)
    assert codes.index.dim == 2
    assert codes.words("ward") == ("north", "south")
    assert codes.words("age") is None
    rows = {tuple(np.float32(v)): (np.float32(1 - w), np.float32(a)) for v, w, a in zip(z, ward, age, strict=True)}
    assert [rows[tuple(code)] for code in arrays["codes"]] == [tuple(row) for row in arrays["context"]]
    for stage in ("fit", "sample", "evaluate"):
        result = small.run(stage, "patients-lde")
        assert result.exit_code == 0, result.output
    model = load_density("data/densities/patients-lde/density.safetensors")
    assert model.context.names == ("age", "ward")
    assert not model.context.complete
    shards = ShardReader("data/samples/patients-lde")
    assert [column.name for column in shards.index.context] == ["age", "ward"]
    drawn = shards.load("samples", 0)
    known = {tuple(row) for split in SPLITS for row in codes.load(split, 0)["context"][:, ::-1].tolist()}
    assert {tuple(row) for row in drawn["context"].tolist()} <= known
    scores = json.loads(Path("reports/metrics/evaluate/patients-lde.json").read_text())
    assert "test_log_likelihood" not in scores
    assert scores["test_conditional_log_likelihood"] < 0
    drawing = ("draw", "patients-lde", "--count", "50", "--output", "drawn", "--given", "ward=north", "--given")
    means = []
    for age_given in ("30", "70"):
        assert small.run(*drawing, f"age={age_given}").exit_code == 0
        samples = load_file("drawn/samples.safetensors")["samples"]
        listed = pd.read_csv("drawn/samples.csv")
        assert list(listed) == [column.name for column in codes.index.columns]
        assert np.array_equal(listed.to_numpy(samples.dtype), samples)
        means.append(samples.mean())
    assert means[1] > means[0] + 2  # the true difference is 8
    assert "age: expected a number, got 'old'" in small.run(*drawing, "age=old").output
    assert "densities.patients-wrong.context: 'height' isn't carried by datasets.patients" in small.run("check").output
    assert "have no column 'labels' to condition on; they have ward, age" in small.run("fit", "patients-labels").output
