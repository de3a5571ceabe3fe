"""ONNX files of a generator: they give the library's numbers, or the export says in one line why not."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from test_serving import IMAGES, labelled

from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.densities import Density
from pipeline.densities.auto import Mixture
from pipeline.densities.common.context import Column as ContextColumn
from pipeline.densities.common.context import Context
from pipeline.densities.common.transforms import build_transform
from pipeline.errors import PipelineError
from pipeline.generator import Generator
from pipeline.portable import score_network, write_onnx
from pipeline.settings import implementation
from pipeline.storage.columns import Column

HERE = Path(__file__).resolve().parents[1]


@pytest.fixture
def packages() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)


def density(family: str, dim: int = 3, **options: object) -> Density:
    """A density with weights that aren't those it starts with."""
    torch.manual_seed(0)
    found: Density = implementation("pipeline.densities", family, "family").Model(dim, **options)
    for parameter in found.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    found.standardise(torch.tensor([0.5, -1.0, 2.0]), torch.linalg.cholesky(torch.eye(3) + 0.5))
    return found.eval()


def behind(kind: str) -> Density:
    found = density("gmm", components=[2])
    found.transform = build_transform(kind, 3)
    found.transform.fit(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).exp().double())
    return found.float()


def kernels() -> Density:
    found, codes = density("kde", sensitivity=[0.5]), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    found.estimate(lambda: [codes], codes)
    return found


WRITTEN: dict[str, Callable[[], Density]] = {
    "gaussian of each label": lambda: density("gaussian", context=labelled()),
    "gmm of each label": lambda: density("gmm", components=[3], covariance="diagonal", context=labelled()),
    "kde": kernels,
    "boxes": lambda: density("boxes", components=3),
    "gmm behind a map": lambda: behind("quantile"),
    "lde": lambda: density("lde", components=3, context=labelled()),
    "separate": lambda: density("lde", blocks="separate", width=8, components=3),
    "attention": lambda: density("lde", blocks="attention", width=8, heads=2, layers=1, components=3),
    "patches": lambda: density("lde", components=2, patch_orders=2, scoring_precision="bfloat16"),
    "rnade": lambda: density("rnade", components=3, hidden=16),
    "made_mog": lambda: density("made_mog", components=3, hidden=(16,)),
    "auto": lambda: Mixture.of([density("gaussian"), behind("asinh")], [0.3, 0.7]),
}


@pytest.mark.slow  # torch takes some seconds to trace each
@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_density_gives_the_same_log_likelihoods(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model = WRITTEN[name]()
    assert write_onnx(Generator(model), tmp_path)["log_prob.onnx"] < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "log_prob.onnx")
    codes = torch.cat([2 * torch.randn(7, 3), torch.tensor([[0.0, torch.inf, 0.0]])])
    given = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"codes": codes.numpy()}), strict=True))
    with torch.no_grad():
        assert np.allclose(given["log_prob"], model.log_prob(codes), rtol=1e-5, atol=1e-4)
        assert given["log_prob"][-1] == -np.inf
        assert ("log_joint" in given) == (model.context is not None)
        if model.context is not None:
            assert np.allclose(given["log_joint"][:-1], model.joint_log_prob(codes[:-1]), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("packages")
def test_a_table_is_scored_in_its_units(tmp_path: Path) -> None:
    import onnxruntime

    columns = [Column(name="when", shift=1.7e9, scale=100.0), Column(name="one", constant=1.0)]
    generator = Generator(density("gaussian"), columns=[*columns, Column(name="x"), Column(name="die", levels=(1.0, 2.0))])
    write_onnx(generator, tmp_path)
    rows = generator.sample(5, seed=3)
    (values,) = onnxruntime.InferenceSession(tmp_path / "log_prob.onnx").run(None, {"rows": rows})
    assert np.allclose(values, generator.log_prob(rows), atol=1e-4)


def test_what_cant_be_written_is_refused() -> None:
    by_number = Context([ContextColumn(name="age")], 1)
    for model, said in (
        (density("maf", transforms=1, hidden=(8,)), "flows such as 'maf' can't be written as ONNX"),
        (density("gmmn", hidden=(8,)), "'gmmn' has no likelihood, so its score can't be written"),
        (density("lde", components=2, context=by_number), "'lde' has contexts that can't be listed, so its score can't"),
    ):
        with pytest.raises(PipelineError, match=said):
            score_network(model)


@pytest.mark.usefixtures("packages")
def test_other_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "decode", lambda self, codes: np.zeros((len(codes), 1, 8, 8)))
    generator = Generator(density("gaussian"), Decoder(IMAGES, (1, 8, 8)).eval())
    with pytest.raises(PipelineError, match=r"decoder\.onnx gives other numbers than the library, by 0\.[0-9]+; the default"):
        write_onnx(generator, tmp_path)


def test_without_the_packages_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PipelineError, match=r"--format onnx needs onnx; install it: pip install '\.\[onnx\]'"):
        write_onnx(Generator(density("gaussian")), tmp_path)


@pytest.mark.usefixtures("packages")
def test_export_writes_networks_and_how_to_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.write_raw(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKING", "off")
    for stage in (("prepare", "blobs"), ("train", "blobs-ae"), ("extract", "blobs-ae"), ("fit", "blobs-lde")):
        assert small.run(*stage).exit_code == 0
    done = small.run("export", "blobs-lde", "--format", "onnx")
    folder = Path("data/exports/blobs-lde-onnx")
    assert re.fullmatch(rf"exported to {folder}; largest differences from the library: log_prob.onnx .*\n", done.stdout)
    files = ["README.md", "decoder.onnx", "encoder.onnx", "generator.json", "log_prob.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert max(json.loads((folder / "generator.json").read_text())["largest_difference"].values()) <= 1e-4
    for path in folder.glob("*.onnx"):
        content = path.read_bytes()
        assert str(HERE).encode() not in content
        assert b".py" not in content
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, np.ndarray] = {}
    monkeypatch.chdir(folder)
    exec(lines, names)
    monkeypatch.chdir(tmp_path)
    generator = Generator.load("blobs-lde")
    expected = generator.density.log_prob(torch.from_numpy(names["codes"])).detach()
    assert np.allclose(names["log_prob"], expected, atol=1e-4)
    # Its own encoder and decoder are of any make, too.
    import onnxruntime

    images = generator.sample(5, seed=0)
    (codes,) = onnxruntime.InferenceSession(folder / "encoder.onnx").run(None, {"images": images})
    (decoded,) = onnxruntime.InferenceSession(folder / "decoder.onnx").run(None, {"codes": codes})
    assert np.allclose(codes, generator.encode(images), atol=1e-4)
    assert np.allclose(decoded, generator.decode(codes), atol=1e-4)


@pytest.mark.slow
def test_both_networks_of_images_in_another_range(tmp_path: Path, packages: None) -> None:
    torch.manual_seed(0)
    networks = Decoder(IMAGES, (1, 8, 8), output="tanh").eval(), Encoder(IMAGES, (1, 8, 8)).eval()
    assert set(write_onnx(Generator(density("gaussian"), *networks), tmp_path)) == {
        "log_prob.onnx", "decoder.onnx", "encoder.onnx",
    }  # fmt: skip
