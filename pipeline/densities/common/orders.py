"""Orders in which dimensions can be read: random ones, and those of the pixels of a square patch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import SettingsError

__all__ = ["ORDERS", "patch_orders", "random_order", "reordered"]

ORDERS = (1, 2, 4, 8)  # groups of symmetries of the square, each within the next


def patch_orders(dim: int, count: int) -> Tensor:
    """The first of the eight symmetries of a square, as orders of its pixels.

    One: as they are. Two: also turned by half a turn, which is reading them backwards. Four: also mirrored, top to bottom and
    left to right. Eight: each of these also with rows and columns exchanged. Each set is a group: it holds the inverse of each
    of its members.

    Arguments:
        dim: The number of numbers of a patch: a square number, or, for patches of mean 0 without their last pixel, one less.
        count: The number of orders, 1, 2, 4 or 8.

    Returns:
        The pixel that is read at each place, with shape (count, side * side).

    Raises:
        SettingsError: When patches with so many numbers aren't square.

    Example:
        >>> patch_orders(4, 2)
        tensor([[0, 1, 2, 3],
                [3, 2, 1, 0]])
    """
    side = math.isqrt(dim + 1)
    if side * side != dim + 1:
        side = math.isqrt(dim)
    if side * side not in (dim, dim + 1):
        raise SettingsError(
            f"patch_orders and training_orders are for square patches, with or without their last pixel, not {dim} numbers"
        )
    rows = torch.arange(side * side).view(side, side)
    views = [rows, rows.flip(0, 1), rows.flip(0), rows.flip(1)]
    views += [view.T for view in views]
    return torch.stack([view.flatten() for view in views[:count]])


def random_order(dim: int, seed: int) -> Tensor:
    """The dimension that is read at each place, with shape (D,)."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(dim)).to(torch.zeros(()).device)


def reordered(patches: Tensor, orders: Tensor) -> Tensor:
    r"""Patches read in another order.

    Of a patch of mean 0 without its last pixel, that pixel is minus the sum of the others. Either way the map is linear with a
    determinant of 1 or -1, so a density of the one is a density of the other: it permutes the pixels of a plane in which the
    numbers but one are coordinates, whichever is left out.

    Arguments:
        patches: The patches, with shape (B, D).
        orders: The order of all, with shape (P), or of each, with shape (B, P); P is D or D + 1.

    Returns:
        The patches, with shape (B, D).

    Example:
        >>> reordered(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([3, 2, 1, 0]))
        tensor([[-6.,  3.,  2.]])
    """
    if orders.shape[-1] > patches.shape[1]:
        patches = torch.cat([patches, -patches.sum(dim=1, keepdim=True)], dim=1)
        orders = orders[..., :-1]
    return patches.gather(1, orders.expand(len(patches), -1))
