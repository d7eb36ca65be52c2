"""A model of data of which some have labels."""

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
from pyro_vae._utils.checks import require_batch
from pyro_vae._utils.init_args import records_init_args

UNKNOWN = -1  # the label of a datum that has none


@records_init_args
class SemiSupervisedModel(PyroModule):
    r"""M2 of Kingma et al. (2014): the class is a latent where it is not known.

    .. math:: p(x, y, z) = p(y)\, p(z)\, p(x|z, y)

    Args:
        classes: C.
        prior: called without arguments, gives p(z).
        likelihood: called on z and on the class, as C zeros and ones, gives p(x|z, y).
            ``nets.Joined`` makes a network take both.

    Shape:
        x is ``(B, *event)``; y ``(B,)``, whole numbers, -1 where the class is not known.

    Sites:
        ``"y"`` observed, where it is known; ``"y_missing"``, where it is not, and ``"z"`` latent;
        ``"x"`` observed; all in the plate ``"data"``. p(y) is learned.

    Raises:
        ValueError: fewer than two classes; labels are no whole numbers, or not one for each datum;
            while values are validated: one is out of range.

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
        p_y, p_z = dist.Categorical(logits=self.logits), self.prior()
        known = y != UNKNOWN
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            with poutine.mask(mask=known):
                pyro.sample("y", p_y, obs=torch.where(known, y, 0))
            with poutine.mask(mask=~known):
                missing = pyro.sample("y_missing", p_y, infer={"enumerate": "parallel"})
            label = one_hot(torch.where(known, y, missing), self.classes).to(p_y.logits)
            z = pyro.sample("z", p_z)
            return pyro.sample("x", self.likelihood(z, label), obs=x)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return whether each label is each class, ``(..., C)``."""
    return labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)


def check_labels(x: Tensor, y: Tensor, classes: int) -> None:
    """Refuse labels that are no whole numbers, one for each datum; and, if validating, others.

    Raises:
        ValueError: as said.
    """
    whole = not y.is_floating_point() and not y.is_complex() and y.dtype != torch.bool
    if not whole or y.shape != x.shape[:1]:
        raise ValueError(
            f"labels must be whole numbers, one for each of the {x.shape[0]} data, -1 where it is "
            f"not known; got {y.dtype} of shape {tuple(y.shape)}"
        )
    if torch.distributions.Distribution._validate_args:  # it waits for the device
        outside = ((y < 0) & (y != UNKNOWN)) | (y >= classes)
        if outside.any():
            row = outside.nonzero()[0].item()
            raise ValueError(
                f"labels must lie in 0 to {classes - 1}, or be {UNKNOWN} where the class is not "
                f"known; got {y[row].item()} in row {row}"
            )
