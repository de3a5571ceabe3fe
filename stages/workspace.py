"""The paths of the workspace, relative to the folder that holds params.yaml."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = [
    "CHAIN",
    "HEADLINE",
    "TABLE_OF_STAGE",
    "arrays_folder",
    "autoencoder_folder",
    "checkpoint_folder",
    "codes_folder",
    "committed",
    "curve_file",
    "density_file",
    "features_folder",
    "figure_folder",
    "git_state",
    "main_checkout",
    "metrics_file",
    "rerun",
    "run_file",
    "samples_folder",
    "shards_folder",
    "uncommitted",
]

# The stages that run over the rows of a table, in the order of the pipeline; `report` runs over all.
TABLE_OF_STAGE = {
    "prepare": "datasets",
    "features": "evaluations",
    "control": "controls",
    "train": "autoencoders",
    "extract": "autoencoders",
    "fit": "densities",
    "sample": "densities",
    "evaluate": "densities",
    "detect": "detections",
}
HEADLINE = Path("reports/headline")  # scores that git keeps, one file per row
CHAIN = ("train", "extract", "fit", "sample", "evaluate")  # stages behind a density's scores


def shards_folder(dataset: str) -> Path:
    """WebDataset shards of a data set."""
    return Path("data/shards") / dataset


def features_folder(dataset: str) -> Path:
    """The feature network of a data set and the features of its test images."""
    return Path("data/features") / dataset


def autoencoder_folder(autoencoder: str) -> Path:
    """Trained encoder and decoder."""
    return Path("data/autoencoders") / autoencoder


def codes_folder(autoencoder: str) -> Path:
    """Latent codes of every split, with the decoder."""
    return Path("data/codes") / autoencoder


def density_file(density: str) -> Path:
    """A fitted density."""
    return Path("data/densities") / density / "density.safetensors"


def samples_folder(density: str) -> Path:
    """Shards of samples: codes, and images if there is a decoder."""
    return Path("data/samples") / density


def metrics_file(stage: str, row: str) -> Path:
    """Scores of a stage; the same seed gives the same bytes."""
    return Path("reports/metrics") / stage / f"{row}.json"


def curve_file(stage: str, row: str) -> Path:
    """Training curve of a stage, as tab-separated values."""
    return Path("reports/curves") / stage / f"{row}.tsv"


def figure_folder(stage: str, row: str) -> Path:
    """Pictures of a stage, drawn by `report`."""
    return Path("reports/figures") / stage / row


def arrays_folder(stage: str, row: str) -> Path:
    """Small arrays of a stage, for `report`. They are kept apart from the pictures, which DVC plots."""
    return Path("reports/arrays") / stage / row


def run_file(stage: str, row: str) -> Path:
    """Values that differ between runs: seconds, memory, MLflow run."""
    return Path("reports/runs") / stage / f"{row}.json"


def rerun(stage: str, row: str) -> str:
    """The command that rewrites the files of a stage's row, even if DVC's cache holds damaged ones."""
    return f"run `dvc repro -f -s {stage}@{row}`"


def checkpoint_folder(stage: str, row: str) -> Path:
    """State to resume from, outside the folders that DVC deletes before a run."""
    return main_checkout() / ".checkpoints" / stage / row


def main_checkout() -> Path:
    """The user's checkout. DVC names it even if an experiment runs in a copy of it (`dvc exp run --temp`)."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def _changes(*paths: str, untracked: bool = False) -> str:
    """What git says has changed since the last commit, one line per file."""
    mode = "all" if untracked else "no"
    command = ["git", "status", "--porcelain", f"--untracked-files={mode}", "--", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def uncommitted(*paths: Path) -> bool:
    """Whether files or folders differ from the last commit's; False outside a git repository."""
    try:
        return bool(_changes(*map(str, paths), untracked=True))
    except (OSError, subprocess.SubprocessError):
        return False


def committed(path: Path) -> str | None:
    """The text of a file at the last commit; None if it wasn't there, or this is no git repository."""
    command = ["git", "show", f"HEAD:./{path.as_posix()}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def git_state() -> dict[str, str]:
    """The commit of the working tree and whether it has uncommitted changes, ignoring what runs write."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changes = _changes(".", ":!dvc.lock", ":!reports/headline")
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": "unknown"}
    return {"commit": commit.stdout.strip(), "dirty": str(bool(changes)).lower()}
