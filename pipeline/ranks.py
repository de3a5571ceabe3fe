"""Processes that work together: rank, device, and the few things they tell each other.

Under `torchrun`, which sets RANK and WORLD_SIZE, the processes join a group (gloo on CPUs, NCCL on GPUs); alone, everything
here costs nothing.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["Ranks", "join"]


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
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks of an array of float64."""
        if self.world == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.float64).copy())
        tensor = tensor.to(self.device) if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(np.array([float(flag)]))[0] > 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank: plain types only."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def share(self, count: int) -> range:
        """The numbers among 0..count-1 that fall to this rank."""
        return range(self.rank, count, self.world)


@functools.cache
def join() -> Ranks:
    """Joins the group that `torchrun` set up, or stands alone.

    The device comes from the environment's DEVICE: `auto` (a GPU where there is one), `cpu`, `cuda`.
    """
    wanted = os.environ.get("DEVICE", "auto")
    cuda = torch.cuda.is_available() if wanted == "auto" else wanted.startswith("cuda")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(rank, world, device)
