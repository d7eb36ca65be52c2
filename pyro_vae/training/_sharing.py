"""One step by the processes of a group: each takes its rows of the minibatch, and all the mean.

The loss of a minibatch is the mean over its rows. So its gradient is the mean of the gradients that
the processes find on their shares, each weighted by the rows it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae._utils.distributed import num_processes, rank, sum_over_processes

Selection = tuple[Tensor, ...]


def local_rows(selection: Selection) -> Selection:
    """Return the rows of a minibatch that are this process's: none, if there are too few."""
    return tuple(column.tensor_split(num_processes())[rank()] for column in selection)


class SharedGradient:
    """The loss and gradients of whole minibatches, of which each process sees a share.

    Args:
        parameters: what the gradients are of.
        is_sharded: whether minibatches are shares already.

    Attributes:
        error: a ValueError of this process's share in the last step: the others learn of it by a
            loss that is NaN.
    """

    def __init__(self, parameters: Sequence[Tensor], *, is_sharded: bool):
        self._parameters = parameters
        self._is_sharded = is_sharded
        self.error: ValueError | None = None

    def __call__(
        self, gradient: Callable[..., list[Tensor | None]], selection: Selection
    ) -> list[Tensor | None]:
        """Return the loss per datum and the gradients, the same in all processes.

        Args:
            gradient: of a share.
            selection: the whole minibatch.
        """
        self.error = None
        mine = selection if self._is_sharded else local_rows(selection)
        rows = len(mine[0])
        if rows:
            loss, *gradients = self._of_share(gradient, mine)
        else:
            loss, gradients = torch.zeros((), device=mine[0].device), [None] * len(self._parameters)
        # Losses, numbers of rows, and who has a gradient are of one type in all processes; and
        # whatever may have a gradient is sent, so that all send the same.
        flags = [float(value is not None) for value in gradients]
        sums = torch.tensor([0.0, rows, *flags], dtype=torch.float64, device=loss.device)
        sums[0] = loss * rows if rows else 0.0
        pairs = zip(self._parameters, gradients, strict=True)
        sent = [torch.zeros_like(p) if g is None else g * rows for p, g in pairs if p.requires_grad]
        sum_over_processes([sums, *sent])
        if not all(flags):  # no look at numbers on the device where it tells nothing new
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
