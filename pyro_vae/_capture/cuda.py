"""CUDA graphs: record the kernels that a function launches, then replay them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pyro_vae._capture.tracing import Outputs

_DEVICES_WITH_GRAPHS = ("cuda",)


def has_graphs(device: torch.device) -> bool:
    """Return whether calls on a device are recorded, so that one launch replays all kernels."""
    return device.type in _DEVICES_WITH_GRAPHS


class CudaGraph:
    """A CUDA graph of one call of a function. A replay costs a single launch.

    Each replay continues the random sequence of the device's generator.

    Args:
        function: function of tensors. It must not copy values to the CPU.
        inputs: its arguments. A replay copies new inputs of the same shapes to their memory.
    """

    def __init__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor]):
        device = inputs[0].device
        self._inputs = [tensor.clone() for tensor in inputs]
        with torch.cuda.device(device):  # a graph belongs to the current device
            before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            stream.wait_stream(before)
            try:
                with torch.cuda.stream(stream):  # warm-up: libraries choose algorithms
                    for _ in range(2):
                        function(*self._inputs)
                    with _refused_synchronization():
                        function(*self._inputs)
            finally:
                before.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.stream(before),  # torch stays on the other stream if recording fails
                # Other threads may use the device, such as one that copies a stream of data to it.
                torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Replay the graph. The next call overwrites the outputs."""
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs


@contextlib.contextmanager
def _refused_synchronization() -> Iterator[None]:
    """Raise a RuntimeError if the CPU waits for the device, as it does when it reads a value.

    Such a function cannot be recorded, and torch does not recover from a recording that fails.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def versions_elsewhere(tensors: Sequence[Tensor], device: torch.device) -> list[tuple[Tensor, int]]:
    """Return the tensors on other devices, each with its version. A change in place raises it.

    A CUDA graph keeps the values that tensors on the CPU had when it was recorded.
    """
    return [(t, t._version) for t in tensors if t.device != device and not t.is_inference()]
