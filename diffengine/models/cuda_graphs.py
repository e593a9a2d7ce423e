"""Replaying a function's GPU kernels, without launching them one by one."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor


@final
class CudaGraphs:
    """Records a function of GPU tensors, once per shape of its inputs, and replays it. On a CPU it calls it.

    The function must read nothing from the device and draw no random numbers, and what else it uses (weights) must stay
    where it is. The result is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not inputs[0].is_cuda:
            return self._function(*inputs)
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._record(inputs)
        graph, static, output = self._graphs[key]
        for own, given in zip(static, inputs):
            own.copy_(given)
        graph.replay()
        return output

    def clear(self) -> None:
        """Forget what was recorded, after weights have moved."""
        self._graphs.clear()

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        static = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces, and blocks are compiled
            for _ in range(3):
                self._function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._function(*static)
        return graph, static, output
