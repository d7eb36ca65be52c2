"""Priors that contain the guide, and are trained with it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._utils.checks import checked
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import within
from pyro_vae.datasets._columns import as_tensor
from pyro_vae.priors._posteriors import (
    RunsGuide,
    check_guide,
    posteriors,
    stand_in,
    uniform_mixture,
)


class GuideMixturePrior(RunsGuide):
    """A prior that is a mixture of the guide's posteriors for some rows.

    The prior is a part of the model, and the guide is created after the model. So create the guide
    first and then call :meth:`bind_guide`. From then on the guide is a part of the model, too.

    Args:
        *event_shape: shape of z, usually one number, its dimension.

    Raises:
        ValueError: No size is given, or a size is not positive. Or, when called, no guide is
            bound, or the guide's posterior of the latent depends on more than x.
    """

    @checked
    def __init__(self, *event_shape: int):
        super().__init__()
        if not event_shape or min(event_shape) < 1:
            raise ValueError(
                f"{type(self).__name__} needs event_shape (or dim), positive sizes of z, got "
                f"{event_shape}"
            )
        self.event_shape = torch.Size(event_shape)
        self.guide: Callable[..., Any] | None = None
        self._site = "z"
        self._checked = self.is_running = False

    def bind_guide(self, guide: Callable[..., Any], site: str = "z") -> None:
        """Bind the guide to the prior.

        Args:
            guide: program of q(z|x).
            site: name of the latent site that has this prior.
        """
        if not callable(guide):
            raise TypeError(f"guide must be a Pyro program that accepts a minibatch, got {guide!r}")
        self.guide, self._site = guide, site
        self._checked = False

    @abstractmethod
    def rows(self) -> Tensor:
        """Return the rows for the guide, ``(K, *event of x)``."""

    def mix(self, posteriors: TorchDistributionMixin) -> TorchDistributionMixin:
        """Build the prior from the guide's posteriors for the rows, batch shape (K,)."""
        return uniform_mixture([posteriors])

    def forward(self) -> TorchDistributionMixin:
        """Return p(z): batch shape (), event shape ``event_shape``."""
        self._require_guide()
        rows = self.rows()
        if self.is_running:
            return stand_in(self.event_shape, rows)
        return self.mix(self.posteriors(rows))

    def posteriors(self, rows: Tensor) -> TorchDistributionMixin:
        """Return the guide's posteriors for rows, batch shape (K,).

        Args:
            rows: x, ``(K, *event)``.

        Raises:
            ValueError: The guide's posterior depends on more than x, or has another event shape.
        """
        self.is_running = True
        try:
            if not self._checked:
                with evaluation_mode(self.guide):
                    check_guide(self.guide, self._site, [rows])
                self._checked = True
            found = posteriors(self.guide, self._site, [rows])
        finally:
            self.is_running = False
        if found.event_shape != self.event_shape:
            raise ValueError(
                f"{type(self).__name__} is for z of shape {tuple(self.event_shape)}, but the guide "
                f"gives site {self._site!r} the shape {tuple(found.event_shape)}"
            )
        return found

    def _require_guide(self) -> None:
        if self.guide is None:
            raise ValueError(
                f"{type(self).__name__} is a mixture of the guide's posteriors, but has no guide. "
                "Create the guide for the model, then call prior.bind_guide(guide)"
            )


@records_init_args
class VampPrior(GuideMixturePrior):
    r"""The variational mixture of posteriors, VampPrior (Tomczak & Welling 2018, eq. 9).

    .. math:: p(z) = \frac1K \sum_k q(z|u_k)

    with pseudo-inputs :math:`u_k` that are learned by gradient descent. The aggregated posterior of
    the training data would be the best prior. The VampPrior is the aggregated posterior of K
    learned data points instead. The guide must be able to score any value. If the guide is a flow,
    it is inverted K times for each z.

    Args:
        *event_shape: shape of z, usually one number, its dimension.
        pseudo_inputs: initial values of the pseudo-inputs, ``(K, *event of x)``, such as rows of
            the data. They must be within the bounds.
        bounds: range to which the pseudo-inputs are clamped; None for data without bounds.

    Raises:
        ValueError: There are no pseudo-inputs, some are outside the bounds, or the lower bound is
            not below the upper one. :class:`GuideMixturePrior` lists further conditions.

    Example:
        >>> import torch, pyro_vae as pv
        >>> prior = pv.priors.VampPrior(2, pseudo_inputs=torch.rand(10, 16))
        >>> likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16))
        >>> model = pv.LatentVariableModel(prior, likelihood)
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> prior.bind_guide(guide)
        >>> prior().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        *event_shape: int,
        pseudo_inputs: Tensor,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ):
        super().__init__(*event_shape)
        if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ValueError(f"bounds must be a lower and an upper bound, in order, got {bounds}")
        self.pseudo_inputs = nn.Parameter(as_rows("pseudo_inputs", pseudo_inputs))
        self.bounds = bounds
        low, high = self.pseudo_inputs.min().item(), self.pseudo_inputs.max().item()
        if bounds is not None and not bounds[0] <= low <= high <= bounds[1]:
            raise ValueError(
                f"pseudo_inputs are in [{low:g}, {high:g}], but bounds is {bounds}. Those outside "
                "have zero gradient. Clamp them, or pass other bounds, or None for no bounds."
            )

    def rows(self) -> Tensor:
        """Return the pseudo-inputs."""
        if self.bounds is None:
            return self.pseudo_inputs
        return within(self.pseudo_inputs, *self.bounds)  # rows of binary data are at the bounds


def as_rows(name: str, rows: Tensor) -> Tensor:
    """Return a copy of rows of x, which must be floating-point numbers ``(K, *event)``."""
    rows = as_tensor(rows, name).detach().clone()
    if rows.dim() < 2 or not rows.is_floating_point():
        raise ValueError(
            f"{name} must be rows of x, floating-point numbers of shape (K, *event), got "
            f"{rows.dtype} of shape {tuple(rows.shape)}"
        )
    return rows
