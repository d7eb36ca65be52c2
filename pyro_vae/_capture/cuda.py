"""CUDA graphs: record the kernels that a function launches, then replay them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae._capture.tracing import Outputs


class CudaGraph:
    """A CUDA graph of one call of a function. A replay costs a single launch.

    Each replay continues the random sequence of the device's generator.

    Args:
        function: function of tensors. It must not copy values to the CPU.
        inputs: its arguments. A replay copies new inputs of the same shapes to their memory.
    """

    def __init__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor]):
        self._inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(stream):  # warm-up: libraries choose algorithms
            for _ in range(3):
                function(*self._inputs)
        torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Replay the graph. The next call overwrites the outputs."""
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs
