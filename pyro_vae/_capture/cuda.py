"""A function of tensors on a CUDA device, recorded once as the kernels it launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae._capture.tracing import Outputs


class CudaGraph:
    """A CUDA graph of one call of a function, whose replay costs a single launch.

    Random numbers are those of the device's generator: each replay goes on from where it stands.

    Args:
        function: of tensors; it must not read a value back.
        inputs: its arguments. A call copies others of the same shapes to where they are kept.
    """

    def __init__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor]):
        self._inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(stream):  # libraries choose their algorithms and workspaces
            for _ in range(3):
                function(*self._inputs)
        torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Replay; the outputs hold until the next call, which overwrites them."""
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs
