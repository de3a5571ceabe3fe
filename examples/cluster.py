"""The same training by one process and by two, and how far apart the results are, in a minute.

Run with `python examples/cluster.py [LAUNCHER]` from the project's folder. The launcher is `local` by default; `torchrun`,
`ray` and `slurm` take the same commands to more machines, as docs/cluster.md says. Work is done in a temporary folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARAMS = """\
datasets:
  digits: {source: digits5k, root: digits5k.py, shard_examples: 500}
autoencoders:
  digits-ae: {dataset: digits, objective: ae, latent_dim: 8, blocks: 1, base_channels: 8, batch_norm_gain: ones, epochs: 2,
    batch_size: 64, learning_rate: 0.002, schedule: cosine, seed: 0}
controls: {}
densities: {}
evaluations: {}
"""
launcher = sys.argv[1] if len(sys.argv) > 1 else "local"
project = Path(__file__).resolve().parents[1]


def stage(*arguments: str, **environment: str) -> float:
    """Runs a stage and returns its seconds. Settings say what is computed; the environment says where."""
    started = time.monotonic()
    where = os.environ | {"PYTHONPATH": str(project), "TRACKING": "off", "OMP_NUM_THREADS": "1"} | environment
    subprocess.run([sys.executable, "-m", "stages", *arguments], env=where, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    Path("params.yaml").write_text(PARAMS)
    Path("digits5k.py").symlink_to(project / "pipeline/sources/digits5k.py")

    # Images are split into shards once. Each shard is a file that one process reads, so a cluster reads many at a time.
    stage("prepare", "digits")
    print("shards:", len(list(Path("data/shards/digits").glob("*.tar"))))

    # Each process computes its part of every batch, and the gradients are averaged: the batch, its order and its noise are the
    # same however many processes share it.
    errors = {}
    for processes in ("1", "2"):
        seconds = stage("train", "digits-ae", PROCESSES=processes, LAUNCHER=launcher)
        errors[processes] = json.loads(Path("reports/metrics/train/digits-ae.json").read_text())["test_mse"]
        print(f"{processes} process{'es' * (processes > '1')}: {seconds:.0f} s, test error {errors[processes]:.6f}")
    print(f"relative difference: {abs(errors['2'] / errors['1'] - 1):.1e}, by rounding alone")

    # A row of `autoencoders` is trained by all processes together. Rows that don't need each other run side by side with
    # `make repro JOBS=2`, and `LAUNCHER=slurm PROCESSES=16 NODES=2 dvc repro` makes each stage a job.
    os.chdir(project)
