"""A semi-supervised model: only some data points have labels."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.checks import require_batch, require_distribution
from pyro_vae._utils.init_args import records_init_args

UNKNOWN = -1  # the label of a data point whose class is unknown


@records_init_args
class SemiSupervisedModel(PyroModule):
    r"""Model M2 of Kingma et al. (2014), with the class as a latent variable where it is unknown.

    .. math:: p(x, y, z) = p(y)\, p(z)\, p(x|z, y)

    Args:
        classes: C.
        prior: returns p(z) when called without arguments.
        likelihood: returns p(x|z, y) when called on z and the one-hot class (C zeros and ones).
            Wrap a network in ``nets.Joined`` to call it on both.

    Shape:
        x is ``(B, *event)``. y is ``(B,)``, integers, with -1 where the class is unknown.

    Sites:
        ``"y"`` is observed and masked to the labeled data points. ``"y_missing"`` is latent,
        enumerated and masked to the others. ``"z"`` is latent and ``"x"`` is observed. All are in
        the plate ``"data"``. p(y) is learned.

    Raises:
        ValueError: There are fewer than two classes, or the labels are not integers, one per data
            point. With validation on, a label is out of range.

    Example:
        See :class:`pyro_vae.guides.SemiSupervisedGuide`.
    """

    def __init__(
        self,
        classes: int,
        prior: Callable[[], TorchDistributionMixin],
        likelihood: Callable[..., TorchDistributionMixin],
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"SemiSupervisedModel needs at least two classes, got {classes}")
        self.classes = classes
        self.logits = nn.Parameter(torch.zeros(classes))
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Run the program on a minibatch x and its labels, and return x."""
        check_labels(x, y, self.classes)
        p_y, p_z = dist.Categorical(logits=self.logits), require_distribution("prior", self.prior())
        known = y != UNKNOWN
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            with poutine.mask(mask=known):
                pyro.sample("y", p_y, obs=torch.where(known, y, 0))
            with poutine.mask(mask=~known):
                missing = pyro.sample("y_missing", p_y, infer={"enumerate": "parallel"})
            label = one_hot(torch.where(known, y, missing), self.classes).to(p_y.logits)
            z = pyro.sample("z", p_z)
            p_x = require_distribution("likelihood", self.likelihood(z, label))
            return pyro.sample("x", p_x, obs=x)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return the one-hot labels, Booleans ``(..., C)``."""
    return labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)


def check_labels(x: Tensor, y: Tensor, classes: int) -> None:
    """Raise ValueError if the labels are not integers, one per data point.

    Raises:
        ValueError: The labels are not integers of shape (B,). With validation on, a label is out
            of range.
    """
    whole = not y.is_floating_point() and not y.is_complex() and y.dtype != torch.bool
    if not whole or y.shape != x.shape[:1]:
        raise ValueError(
            f"labels must be integers of shape ({x.shape[0]},), one per data point, with -1 "
            f"where the class is unknown; got {y.dtype} of shape {tuple(y.shape)}"
        )
    if torch.distributions.Distribution._validate_args:  # this synchronizes with the device
        outside = ((y < 0) & (y != UNKNOWN)) | (y >= classes)
        if outside.any():
            row = outside.nonzero()[0].item()
            raise ValueError(
                f"labels must lie in 0 to {classes - 1}, or be {UNKNOWN} where the class is "
                f"unknown; got {y[row].item()} in row {row}"
            )
