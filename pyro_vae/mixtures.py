"""Mixtures of diagonal Gaussians with a reparameterised sample."""

from __future__ import annotations

import math

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical

from pyro_vae.implicit import implicit


class MixtureOfNormals(TorchDistribution):
    r"""A mixture of K diagonal Gaussians in D dimensions.

    .. math:: q(z) = \sum_k \pi_k \prod_d \mathcal{N}(z_d; \mu_{kd}, \sigma_{kd}^2)

    A sample has gradients to all parameters, the weights included, though its component is drawn
    at random: by implicit reparameterisation (Figurnov et al. 2018, eq. 5-6, and section 3.2 for
    more dimensions) of :math:`F_d(z) = Q(z_d | z_{<d}) = \sum_k \pi_k(z_{<d}) \Phi_{kd}(z_d)`,

    .. math:: \partial z = -\Bigl(\frac{\partial F}{\partial z}\Bigr)^{-1} \partial_\theta F

    whose Jacobian is a lower triangle. Gradients of first order only.

    The gradient to the weights comes from draws between the components. The farther apart these
    are, the rarer such draws, and the larger their share: no bias, but from some six standard
    deviations on the gradient to the weights is practically zero until one comes.

    Args:
        logits: of the weights, ``(*batch, K)``.
        loc: means, ``(*batch, K, D)``.
        scale: standard deviations, ``(*batch, K, D)``.

    Shape:
        batch shape ``batch``, event shape ``(D,)``; a sample costs :math:`O(K D^2)`.

    Raises:
        ValueError: the shapes do not fit, or validation finds a scale that is not positive.

    Example:
        >>> import torch, pyro_vae as pv
        >>> q = pv.MixtureOfNormals(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> q.rsample((5,)).shape, q.log_prob(torch.zeros(5, 1)).shape
        (torch.Size([5, 1]), torch.Size([5]))
    """

    arg_constraints = {  # noqa: RUF012 - as torch declares them
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None
    ):
        if loc.dim() < 2 or logits.shape[-1:] != loc.shape[-2:-1] or loc.shape != scale.shape:
            raise ValueError(
                "a mixture needs logits (..., K), loc (..., K, D) and scale (..., K, D), got "
                f"{tuple(logits.shape)}, {tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        batch = torch.broadcast_shapes(logits.shape[:-1], loc.shape[:-2])
        self.logits = logits.log_softmax(-1).expand(*batch, -1)
        self.loc, self.scale = loc.expand(*batch, -1, -1), scale.expand(*batch, -1, -1)
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None) -> MixtureOfNormals:
        """Return the mixture with a larger batch shape."""
        new = self._get_checked_instance(MixtureOfNormals, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(*batch_shape, -1)
        new.loc, new.scale = (t.expand(*batch_shape, -1, -1) for t in (self.loc, self.scale))
        super(MixtureOfNormals, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The mean, ``(*batch, D)``."""
        return (self.logits.exp().unsqueeze(-1) * self.loc).sum(-2)

    @property
    def variance(self) -> Tensor:
        """The variance of each dimension, ``(*batch, D)``."""
        second = self.logits.exp().unsqueeze(-1) * (self.scale.square() + self.loc.square())
        return second.sum(-2) - self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(z), ``(...)``, for z ``(..., D)``."""
        if self._validate_args:
            self._validate_sample(value)
        return (self.logits + self._log_scalars(value).sum(-1)).logsumexp(-1)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Draw ``(*sample, *batch, D)``."""
        with torch.no_grad():
            component = Categorical(logits=self.logits).sample(sample_shape)
            index = component[..., None, None].expand(*component.shape, 1, *self.event_shape)
            loc, scale = (
                t.expand(*component.shape, -1, -1).gather(-2, index).squeeze(-2)
                for t in (self.loc, self.scale)
            )
            value = torch.normal(loc, scale)
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (self.logits, self.loc, self.scale)
        ):
            value = self._with_gradient(value)
        return value

    def _log_scalars(self, value: Tensor) -> Tensor:
        """Log-densities of each dimension under each component, ``(..., K, D)``."""
        standardised = (value.unsqueeze(-2) - self.loc) / self.scale
        return -0.5 * (standardised.square() + math.log(2 * math.pi)) - self.scale.log()

    def _with_gradient(self, value: Tensor) -> Tensor:
        standardised = (value.unsqueeze(-2) - self.loc) / self.scale
        log_scalars = self._log_scalars(value)
        before = log_scalars.cumsum(-1) - log_scalars  # of the dimensions before
        weights = (self.logits.unsqueeze(-1) + before).softmax(-2)
        below = torch.special.ndtr(standardised)
        uniform = (weights * below).sum(-2)
        with torch.no_grad():
            slope = -standardised / self.scale  # of log_scalars in z
            jacobian = (weights * below).mT @ slope
            jacobian = jacobian - uniform.unsqueeze(-1) * (weights.mT @ slope)
            density = (weights * log_scalars.exp()).sum(-2)
            jacobian = jacobian.tril(-1) + torch.diag_embed(density)

        def solve(grad: Tensor) -> Tensor:
            solved = torch.linalg.solve_triangular(jacobian.mT, grad.unsqueeze(-1), upper=True)
            return solved.squeeze(-1)

        return implicit(value, uniform, solve)
