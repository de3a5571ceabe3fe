"""A function of a batch, recorded on a GPU once and replayed: one launch where there were hundreds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Recorded"]

Function = Callable[[Tensor], list[Tensor]]


class Recorded:
    """Calls a function of a batch and of weights that stay in their places, as a CUDA graph.

    Kernels of a small step take less time than their launches. All but the values of batch and weights is as it was when the
    graph was recorded. It is recorded again when the shape of the batch, mixed precision, or the place of a weight changes, or
    which of them are trained. The function must neither wait for the GPU nor draw random numbers.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []

    def __reduce__(self) -> tuple[type[Recorded], tuple[()]]:
        return Recorded, ()  # a copy of the weights has other places

    def __call__(self, function: Function, batch: Tensor, *weights: Tensor) -> list[Tensor]:
        """What `function(batch)` gives.

        Arguments:
            function: The function, the same in every call but for the values of weights.
            batch: The batch, on a GPU.
            weights: All other tensors that the function reads.
        """
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        places = ((weight.data_ptr(), weight.requires_grad) for weight in weights)
        key = (batch.shape, batch.dtype, precision, *places)
        if self._graph is None or key != self._key:
            self._record(function, batch)
            self._key = key
        assert self._graph is not None
        assert self._input is not None
        self._input.copy_(batch)
        self._graph.replay()
        return list(torch._foreach_mul(self._outputs, 1.0))  # the next replay overwrites its own

    def _record(self, function: Function, batch: Tensor) -> None:
        self._graph, self._outputs, self._input = None, [], batch.clone()
        # The GPU of the batch, which need not be the one that is current.
        current, stream = torch.cuda.current_stream(batch.device), torch.cuda.Stream(batch.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # once unrecorded, so that the libraries set themselves up
            function(self._input)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._outputs = function(self._input)
        self._graph = graph
