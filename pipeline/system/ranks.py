"""Processes that work together: rank, device, and the values that they exchange.

Under `torchrun`, which sets RANK and WORLD_SIZE, the processes join a group (gloo on CPUs, NCCL on GPUs). With one process,
everything here costs nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import SettingsError
from pipeline.system.files import atomic_folder
from pipeline.system.watchdog import Watchdog, stall_seconds, worked

__all__ = ["Ranks", "batch_mean", "join", "shared_folder", "synchronise_batch_norm"]

PATIENCE = datetime.timedelta(days=1)  # the others wait while the first rank scores and writes; the watchdog still runs


@dataclass(frozen=True)
class Ranks:
    """A process among its peers.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def exchange(self, *values: float) -> list[list[float]]:
        """The numbers of all ranks, in order, on every rank: what decisions are made of that all ranks must share."""
        if self.world == 1:
            return [list(values)]
        worked()
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device if dist.get_backend() == "nccl" else "cpu")
        numbers = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(numbers, tensor)
        exchanged: list[list[float]] = torch.stack(numbers).tolist()
        return exchanged

    def greatest(self, value: float) -> float:
        """The greatest over all ranks of a number."""
        return max(numbers[0] for numbers in self.exchange(value))

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank: plain types only."""
        if self.world == 1:
            return [value]
        worked()
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Copies the first rank's values of each tensor to all ranks, in place."""
        if self.world > 1:
            worked()
            for tensor in tensors:
                dense = tensor.contiguous()  # channels-last weights aren't
                dist.broadcast(dense, src=0)
                tensor.copy_(dense)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            worked()
            dist.barrier()

    def share(self, count: int) -> range:
        """The numbers among 0..count-1 that belong to this rank."""
        return range(self.rank, count, self.world)


@functools.cache
def join() -> Ranks:
    """Joins the group that `torchrun` set up, if any.

    The device comes from the environment's DEVICE: `auto` (a GPU if there is one), `cpu`, `cuda`.

    Raises:
        SettingsError: When there is no such device, or STALL_MINUTES isn't a number.
    """
    wanted = os.environ.get("DEVICE") or "auto"
    if wanted not in ("auto", "cpu", "cuda") or (wanted == "cuda" and not torch.cuda.is_available()):
        missing = "this PyTorch sees no GPU" if wanted == "cuda" else "expected auto, cpu or cuda"
        raise SettingsError(f"DEVICE is {wanted[:40]!r}: {missing}")
    cuda = wanted != "cpu" and torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    if world > 1:
        patience = stall_seconds()
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        if patience:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, world, is_master=False)  # type: ignore[attr-defined]
            Watchdog(store, rank, world, patience).start()
    return Ranks(rank, world, device)


@contextlib.contextmanager
def shared_folder(path: str | Path, ranks: Ranks) -> Iterator[Path]:
    """An `atomic_folder` that all ranks fill together; it replaces `path` once all have left the context."""
    with contextlib.ExitStack() as stack:
        temporary = str(stack.enter_context(atomic_folder(path))) if ranks.first else ""
        yield Path(ranks.gather(temporary)[0])
        ranks.barrier()
    ranks.barrier()


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum of the ranks' gradients, to any order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total: Tensor = _SumOverRanks.apply(gradient)
        return total


class _SynchronisedVectorNorm(nn.BatchNorm1d):
    """Weights and statistics of a batch norm that `batch_mean` computes over all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """Raises an error in training mode, where its owner normalises."""
        if self.training:
            raise NotImplementedError("a batch norm over vectors is synchronised by its owner, with batch_mean")
        return super().forward(x)


def batch_mean(norm: nn.BatchNorm1d, x: Tensor) -> tuple[Tensor, Tensor | int]:
    r"""Mean over all but the last dimension, and over all ranks if the norm is synchronised, with its gradient.

    .. math:: \frac{\sum_r \sum_i x_{ri}}{\sum_r n_r}

    Arguments:
        norm: The batch norm that uses the mean.
        x: The features of this rank, with shape (*, C).

    Returns:
        The mean, with shape (C), and the number of vectors in it; on the device if the norm is synchronised.
    """
    dims = tuple(range(x.ndim - 1))
    count = x.numel() // x.shape[-1]
    if not isinstance(norm, _SynchronisedVectorNorm):
        return x.mean(dim=dims), count
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = _SumOverRanks.apply(torch.cat([wide.sum(dim=dims), wide.new_full((1,), count)]))  # (C + 1,)
    count = total[-1].detach()
    return total[:-1] / count, count


class _SynchronisedBatchNorm(nn.BatchNorm2d):
    r"""Batch norm in training mode with mean and variance over the batches of all ranks, on any device.

    .. math:: \mu = \frac{\sum_r \sum_i x_{ri}}{\sum_r n_r}, \qquad \sigma^2 = \frac{\sum_r \sum_i (x_{ri} - \mu)^2}{\sum_r n_r}

    PyTorch's own works on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalised features, with the input's shape (B, C, H, W)."""
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        ones = wide.new_full((1,), x.numel() / x.shape[1])
        total = _SumOverRanks.apply(torch.cat([wide.sum(dim=(0, 2, 3)), ones]))  # (C + 1,)
        count = total[-1].detach()
        mean = total[:-1] / count
        deviation = wide - mean[:, None, None]
        variance = _SumOverRanks.apply(deviation.square().sum(dim=(0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean), momentum)
                self.running_var.lerp_((variance * count / (count - 1).clamp(min=1)).to(self.running_var), momentum)
        factor = torch.rsqrt(variance + self.eps) * self.weight
        normalised: Tensor = deviation * factor[:, None, None] + self.bias[:, None, None]
        return normalised.to(x.dtype)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Makes every batch norm take its statistics over all ranks; names of weights don't change."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SynchronisedBatchNorm
        elif type(module) is nn.BatchNorm1d:
            module.__class__ = _SynchronisedVectorNorm
