"""What an edit reruns, by real DVC on a tiny copy of the project whose outputs are only placeholders."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT, Project

PARAMS = """\
datasets:
  grid: {source: grid, root: data/raw, train_count: 2000, valid_count: 500, test_count: 500}
  photos: {source: images, root: data/raw, image_px: 8}
controls: {}
autoencoders:
  grid: {dataset: grid, objective: identity}
  photos: {dataset: photos, objective: ae, latent_dim: 3, blocks: 1, perceptual_weights: vgg19.pth@sha256:0123456789ab}
densities:
  grid-gaussian: {codes: grid, dataset: grid, family: gaussian}
  grid-gmm: {codes: grid, dataset: grid, family: gmm, components: [1]}
  grid-lde: {codes: grid, dataset: grid, family: lde, components: 3, epochs: 1}
sampling: {count: 200}
evaluations:
  grid: {}
  photos: {quality: {network: vgg19, weights: vgg19.pth@sha256:0123456789ab}}
detections:
  photos-by-gmm: {density: grid-gmm, family: gmm, codes: grid, dataset: grid, outliers: photos}
"""


class Committed:
    """A project that DVC considers up to date."""

    def __init__(self, folder: Path) -> None:
        from dvc.repo import Repo

        self.folder = folder
        Project(folder, PARAMS)
        (folder / "data/raw").mkdir(parents=True, exist_ok=True)
        (folder / "data/raw/points").touch()
        with contextlib.chdir(folder), Repo() as repo:
            for stage in repo.index.stages:
                for out in stage.outs:
                    path = Path(out.fs_path)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(f"{stage.addressing}\n")
            repo.commit(force=True)

    def changed(self) -> set[str]:
        """Stages that `dvc status` lists."""
        from dvc.repo import Repo

        with contextlib.chdir(self.folder), Repo() as repo:
            return set(repo.status())

    def append(self, path: str) -> None:
        file = self.folder / path
        file.write_text((file.read_text() if file.exists() else "") + "\n# changed\n")


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Committed:
    folder = tmp_path_factory.mktemp("reruns") / "project"
    folder.mkdir()
    return Committed(folder)


@pytest.fixture(autouse=True)
def _undone(committed: Committed) -> Iterator[None]:
    """Undoes a test's changes."""
    before = {path: path.read_bytes() for path in (committed.folder / "pipeline").rglob("*.py")}
    yield
    (committed.folder / "params.yaml").write_text(PARAMS)
    for path in (committed.folder / "pipeline").rglob("*.py"):
        if path not in before:
            path.unlink()
        elif path.read_bytes() != before[path]:
            path.write_bytes(before[path])


def rows(*names: str) -> set[str]:
    return {f"{stage}@{name}" for name in names for stage in ("fit", "sample", "evaluate")}


def test_a_new_choice_reruns_nothing(committed: Committed) -> None:
    assert committed.changed() == set()
    for path in ("sources/stripes.py", "autoencoders/sparse.py", "densities/independent.py"):
        committed.append(f"pipeline/{path}")
    assert committed.changed() == set()


@pytest.mark.parametrize(
    ("edited", "listed"),
    [
        ("pipeline/densities/gmm.py", rows("grid-gmm") | {"detect@photos-by-gmm"}),
        ("pipeline/evaluation/detection.py", {"detect@photos-by-gmm"}),
        ("pipeline/figures.py", {"report"}),
        ("pipeline/sources/celeba.py", set()),
        ("pipeline/autoencoders/identity.py", {"train@grid"}),
        ("pipeline/evaluation/likelihood.py", rows("grid-gaussian", "grid-gmm", "grid-lde") - {
            f"sample@grid-{name}" for name in ("gaussian", "gmm", "lde")
        }),
    ],
)  # fmt: skip
def test_an_edit_reruns_what_it_decides(committed: Committed, edited: str, listed: set[str]) -> None:
    committed.append(edited)
    assert committed.changed() == listed


def test_the_content_of_a_named_file_decides_its_rows(committed: Committed) -> None:
    (committed.folder / "params.yaml").write_text(PARAMS.replace("0123456789ab", "ba9876543210"))
    assert committed.changed() == {"features@photos", "train@photos", "extract@photos", "report"}


# The cache ------------------------------------------------------------------------------------------------------------

WRITER = """\
from pathlib import Path
from pipeline.system.files import atomic_folder, write_json

number = int(Path("number").read_text())
with atomic_folder("out/shards") as folder:
    for i in range(3):
        (folder / f"{i}.tar").write_bytes(bytes([number, i]) * 500_000)
write_json("out/metrics.json", {"number": number})
"""


def test_with_hard_links_the_parts_of_a_folder_lie_on_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("write.py").write_text(WRITER)
    Path("dvc.yaml").write_text(
        f"stages: {{write: {{cmd: {sys.executable} write.py, deps: [number], outs: [out/shards, out/metrics.json]}}}}"
    )
    Path("number").write_text("1")

    def ran() -> bool:
        return bool(repo.reproduce())

    def bytes_of_parts() -> int:
        """On disk, in the folder and in the cache."""
        sizes = {status.st_ino: status.st_size for status in map(Path.stat, filter(Path.is_file, Path().rglob("*")))}
        return sum(size for size in sizes.values() if size == 10**6)

    with Repo.init(no_scm=True) as repo:
        with repo.config.edit() as config:
            config["cache"]["type"] = "hardlink,copy"  # as docs/cluster.md has it
        repo.config.load()
    with Repo() as repo:
        assert ran()
        assert bytes_of_parts() == 3 * 10**6
        first = {str(path): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
        assert {path.stat().st_nlink for path in Path("out/shards").iterdir()} == {2}
        assert not ran()
        Path("number").write_text("2")
        assert ran()
        assert bytes_of_parts() == 6 * 10**6  # and the first version in the cache
        assert Path("out/metrics.json").read_bytes() != first["out/metrics.json"]
        Path("number").write_text("1")  # the undone edit comes from the cache: nothing was written through a link into it
        ran()
        assert {str(path): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == first
        assert {path.stat().st_nlink for path in Path("out/shards").iterdir()} == {2}
        assert not repo.status()
