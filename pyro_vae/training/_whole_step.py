"""The gradient of a step and its update as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae._capture.captured import Captured
from pyro_vae._capture.comparing import disagreement
from pyro_vae._capture.cuda import CudaGraph
from pyro_vae._capture.tracing import Outputs
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.random import generator_state, preserve_rng_state, preserve_tensors
from pyro_vae.training._adam import Adam


class WholeStep:
    """Replay the captured gradient and the update of Adam together.

    A launch of the update from Python takes longer than the gradient of a small network. So both
    are recorded as one CUDA graph. The first step runs the graph and the two parts from the same
    state, and the results must agree. If they do not, a warning names the difference, and all
    steps run in two parts. The graph is recorded again if the gradient is captured again, or if a
    setting or a tensor of the optimizer is replaced.

    Args:
        captured: Returns the loss and the gradients.
        optimizer: Updates the parameters.
        parameters: The parameters, in the order of the gradients.

    Attributes:
        is_used: Whether steps run as one graph.
    """

    def __init__(self, captured: Captured, optimizer: Adam, parameters: Sequence[Tensor]):
        self._captured, self._optimizer, self._parameters = captured, optimizer, parameters
        self._graph: CudaGraph | None = None
        self._tensors: list[object] = []  # those of the graph, without the parameters
        self._numbers: list[object] = []  # settings of the optimizer in the graph
        self._has_failed = False

    @property
    def is_used(self) -> bool:
        return self._graph is not None and not self._has_failed

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """Take a step.

        Args:
            inputs: The inputs of the captured gradient.

        Returns:
            The loss before the step, or None if there was no step. It must run in two parts then.
        """
        if self._has_failed or not self._captured.replays(*inputs):
            return None
        if self._graph is None or self._is_outdated():
            return self._record(inputs)
        self._optimizer.write_learning_rates()
        return self._graph(*inputs)[0].clone()

    def _is_outdated(self) -> bool:
        now = self._tensors_of_graph()
        return (
            self._numbers != self._optimizer.numbers()
            or len(now) != len(self._tensors)
            or any(a is not b for a, b in zip(now, self._tensors, strict=True))
        )

    def _tensors_of_graph(self) -> list[object]:
        return [self._captured.constants, *self._optimizer.tensors()]

    def _record(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Record the graph, compare it with the two parts, and take a step."""
        captured, optimizer = self._captured, self._optimizer
        updated = [*self._parameters, *optimizer.tensors()]
        changed = [*updated, *captured.writable]
        before = [tensor.detach().clone() for tensor in updated]
        with (
            torch.no_grad(),
            preserve_rng_state(inputs) as rewind,
            preserve_tensors(changed) as restore,
        ):
            try:
                self._graph = CudaGraph(self._step, inputs)
                rewind()
                restore()
                found = _copied(self._graph(*inputs))
            except Exception as error:  # of the recording, which may raise any
                rewind()
                restore()
                self._give_up(f"{type(error).__name__}: {first_line(error)}")
                return None
            noise = [*captured.writable, generator_state(inputs)]
            replayed = [*found, *_copied(noise), *_differences(updated, before)]
            rewind()
            restore()
            expected = _copied(captured(*inputs))
            noise = [*captured.writable, generator_state(inputs)]
            # Adam divides by the size of the gradient. With the same gradient, no rounding grows.
            self._update(found[1:])
            results = [*expected, *noise, *_differences(updated, before)]
            if failure := disagreement(results, replayed, captured.rounding):
                rewind()
                restore()
                self._give_up(failure)
                return None
        self._tensors, self._numbers = self._tensors_of_graph(), optimizer.numbers()
        return found[0]

    def _step(self, *inputs: Tensor) -> Outputs:
        outputs = self._captured.run_graph(*inputs)
        self._update(outputs[1:])
        return outputs

    def _update(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.update()
        for parameter in self._parameters:
            parameter.grad = None

    def _give_up(self, reason: str) -> None:
        self._graph, self._has_failed = None, True  # the step then runs in two parts
        warnings.warn(
            f"the optimizer is not part of the CUDA graph of a step: {reason}", stacklevel=2
        )


def _copied(tensors: Outputs) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def _differences(after: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(after, before, strict=True)]
