"""Priors that contain the guide: mixtures of its posteriors for some rows, trained with it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._programs.parameters import evaluation_mode
from pyro_vae._utils.checks import checked
from pyro_vae._utils.constructor_calls import constructor_call
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import softplus_scale, within
from pyro_vae.datasets._columns import as_tensor
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals
from pyro_vae.priors._posteriors import (
    RunsGuide,
    check_guide,
    diagonal_gaussian,
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
        if self.guide is None:
            raise ValueError(
                f"{type(self).__name__} is a mixture of the guide's posteriors, but has no guide. "
                "Create the guide for the model, then call prior.bind_guide(guide)"
            )
        rows = self.rows()
        if self.is_running:
            return stand_in(self.event_shape, rows)
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
        return self.mix(found)


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
        self.pseudo_inputs = nn.Parameter(_rows("pseudo_inputs", pseudo_inputs))
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


class ExemplarPrior(GuideMixturePrior):
    r"""A Gaussian around the code of each exemplar (Norouzi et al. 2020).

    .. math:: p(z) = \frac1M \sum_m \mathcal{N}(z; \mu(x_m), \sigma^2 I)

    with the mean :math:`\mu(x)` of the guide's Gaussian, and one learned :math:`\sigma` for all.
    In training, each call draws M new exemplars at random. In evaluation, all exemplars are used.
    A data point can be its own exemplar, so choose M much smaller than the data.

    Args:
        dim: dimension of z.
        exemplars: rows of the data, ``(N, *event of x)``.
        num_drawn: M; default all exemplars.

    Raises:
        ValueError: There are no exemplars, or fewer than ``num_drawn``, or the guide is not a
            diagonal Gaussian. Also under the conditions of :class:`GuideMixturePrior`.
    """

    @checked
    def __init__(self, dim: int, *, exemplars: Tensor, num_drawn: int | None = None):
        super().__init__(dim)
        self.register_buffer("exemplars", _rows("exemplars", exemplars), persistent=False)
        if num_drawn is not None and not 1 <= num_drawn <= len(self.exemplars):
            raise ValueError(
                f"num_drawn must be between 1 and the {len(self.exemplars)} exemplars, got "
                f"{num_drawn}"
            )
        self.num_drawn = num_drawn
        self.raw_scale = nn.Parameter(torch.tensor(0.0))

    def __repr__(self) -> str:
        return constructor_call(type(self), self.as_arguments())

    def as_arguments(self) -> dict[str, Any]:
        """Return the arguments that create this prior again."""
        return {
            "dim": self.event_shape[0],
            "exemplars": self.exemplars,
            "num_drawn": self.num_drawn,
        }

    def rows(self) -> Tensor:
        """Return all exemplars, or in training a new random sample of them."""
        if not self.training or self.num_drawn is None:
            return self.exemplars
        count = len(self.exemplars)
        index = torch.randint(count, (self.num_drawn,), device=self.exemplars.device)
        return self.exemplars[index]

    def mix(self, posteriors: TorchDistributionMixin) -> TorchDistributionMixin:
        """Put a Gaussian around each mean."""
        gaussian = diagonal_gaussian(posteriors)
        if gaussian is None:
            raise ValueError(
                "ExemplarPrior needs a guide that is a diagonal Gaussian, such as AmortizedNormal, "
                f"got the posterior {posteriors}"
            )
        loc = gaussian[0]
        scale = softplus_scale(self.raw_scale).to(loc).expand(loc.shape)
        return MixtureOfDiagNormals(loc.new_zeros(len(loc)), loc, scale)


def _rows(name: str, rows: Tensor) -> Tensor:
    rows = as_tensor(rows, name).detach().clone()
    if rows.dim() < 2 or not rows.is_floating_point():
        raise ValueError(
            f"{name} must be rows of x, floating-point numbers of shape (K, *event), got "
            f"{rows.dtype} of shape {tuple(rows.shape)}"
        )
    return rows
