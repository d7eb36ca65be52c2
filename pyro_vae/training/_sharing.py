"""One step in a group of processes, where each process has a share of the rows.

The loss of a minibatch is the mean over its rows. So its gradient is a weighted mean of the
gradients of all processes. The weight of a process is its number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae._utils.distributed import num_processes, rank, sum_over_processes

Selection = tuple[Tensor, ...]


def local_rows(selection: Selection) -> Selection:
    """Return this process's rows of a minibatch. There may be none."""
    return tuple(column.tensor_split(num_processes())[rank()] for column in selection)


class SharedGradient:
    """Compute the loss and gradients of minibatches that several processes share.

    Args:
        parameters: The parameters of the gradients.
        is_sharded: Whether each process receives its own rows only.

    Attributes:
        error: The ValueError of this process in the last step. The loss is then NaN in all
            processes.
    """

    def __init__(self, parameters: Sequence[Tensor], *, is_sharded: bool):
        self._parameters = parameters
        self._is_sharded = is_sharded
        self.error: ValueError | None = None

    def __call__(
        self, gradient: Callable[..., list[Tensor | None]], selection: Selection
    ) -> list[Tensor | None]:
        """Return the loss per data point and the gradients, equal in all processes.

        Args:
            gradient: Computes the loss and the gradients of a share.
            selection: The whole minibatch, or this process's rows if ``is_sharded``.
        """
        self.error = None
        mine = selection if self._is_sharded else local_rows(selection)
        rows = len(mine[0])
        if rows:
            loss, *gradients = self._of_share(gradient, mine)
        else:
            loss, gradients = torch.zeros((), device=mine[0].device), [None] * len(self._parameters)
        # All processes must send tensors of the same shapes and dtypes. So each process sends a
        # gradient for every trainable parameter, with flags for those that it has.
        flags = [float(value is not None) for value in gradients]
        sums = torch.tensor([0.0, rows, *flags], dtype=torch.float64, device=loss.device)
        sums[0] = loss * rows if rows else 0.0
        pairs = zip(self._parameters, gradients, strict=True)
        sent = [torch.zeros_like(p) if g is None else g * rows for p, g in pairs if p.requires_grad]
        sum_over_processes([sums, *sent])
        if not all(flags):  # reads from the device only if needed
            flags = sums[2:].tolist()
        means = iter(value / sums[1] for value in sent)
        found = [next(means) if p.requires_grad else None for p in self._parameters]
        used = [g if flag else None for g, flag in zip(found, flags, strict=True)]
        return [sums[0] / sums[1], *used]

    def _of_share(
        self, gradient: Callable[..., list[Tensor | None]], mine: Selection
    ) -> list[Tensor | None]:
        try:
            return gradient(*mine)
        except ValueError as error:
            self.error = error
            loss = torch.tensor(math.nan, device=mine[0].device)
            return [
                loss,
                *(torch.zeros_like(p) if p.requires_grad else None for p in self._parameters),
            ]
