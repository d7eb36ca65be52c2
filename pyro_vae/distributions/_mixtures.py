"""Mixtures of diagonal Gaussians, reparameterized, and uniform mixtures of any distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor
from torch.distributions import Categorical
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pyro_vae._utils.checks import require_floats
from pyro_vae._utils.numerics import implicit
from pyro_vae._utils.precision import exact_product
from pyro_vae.distributions._casting import value_for

_LOG_DENSITIES_AT_A_TIME = 4_000_000  # 32 MB of float64
_LOG_DENSITIES_IN_CACHE = 1_000_000  # 8 MB


class MixtureOfDiagNormals(TorchDistribution):
    r"""A mixture of K diagonal Gaussians in D dimensions.

    .. math:: q(z) = \sum_k \pi_k \prod_d \mathcal{N}(z_d; \mu_{kd}, \sigma_{kd}^2)

    Samples are reparameterized: they have gradients with respect to all parameters, including the
    weights. This is implicit reparameterization (Figurnov et al. 2018, eq. 5-6, and section 3.2 for
    more dimensions),

    .. math::
        \partial z = -\Bigl(\frac{\partial F}{\partial z}\Bigr)^{-1} \partial_\theta F, \qquad
        F_d(z) = Q(z_d | z_{<d}) = \sum_k \pi_k(z_{<d}) \Phi_{kd}(z_d)

    The Jacobian is lower triangular. Only first-order gradients are available.

    The gradient with respect to the weights comes from samples between components. The farther
    apart the components, the rarer these samples and the larger their contributions. The gradient
    is unbiased. But from a distance of about six standard deviations, it is practically zero until
    such a sample occurs.

    Args:
        logits: logits of the weights, ``(*batch, K)``.
        loc: means, ``(*batch, K, D)``.
        scale: standard deviations, ``(*batch, K, D)``.

    Shape:
        the batch shape is ``batch`` and the event shape is ``(D,)``. A sample costs
        :math:`O(K D^2)`. If ``loc`` and ``scale`` are ``(K, D)``, many values are scored by one
        matrix product, so that K may be tens of thousands. Then components that are more than
        :math:`10^5` standard deviations apart have errors above :math:`10^{-6}` nats.

    Raises:
        ValueError: The shapes do not match. With validation on, a scale is not positive.

    Example:
        >>> import torch, pyro_vae as pv
        >>> locs, scales = torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1)
        >>> q = pv.distributions.MixtureOfDiagNormals(torch.zeros(2), locs, scales)
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
        for name, value in (("logits", logits), ("loc", loc), ("scale", scale)):
            require_floats(name, value, ())
        if (
            not logits.dim()
            or loc.dim() < 2
            or logits.shape[-1:] != loc.shape[-2:-1]
            or loc.shape != scale.shape
        ):
            raise ValueError(
                "MixtureOfDiagNormals needs logits (..., K), loc (..., K, D) and scale "
                f"(..., K, D), got shapes {tuple(logits.shape)}, {tuple(loc.shape)} and "
                f"{tuple(scale.shape)}"
            )
        batch = torch.broadcast_shapes(logits.shape[:-1], loc.shape[:-2])
        # Keep the parameters' own batch shapes, so that expand does not copy a mixture.
        self.logits, self.loc, self.scale = logits.log_softmax(-1), loc, scale
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None) -> MixtureOfDiagNormals:
        """Return the mixture with a larger batch shape."""
        new = self._get_checked_instance(MixtureOfDiagNormals, _instance)
        new.logits, new.loc, new.scale = self.logits, self.loc, self.scale
        batch_shape = torch.Size(batch_shape)
        super(MixtureOfDiagNormals, new).__init__(
            batch_shape, self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The mean, ``(*batch, D)``."""
        return self._mean().expand(*self.batch_shape, -1)

    @property
    def variance(self) -> Tensor:
        """The variance of each dimension, ``(*batch, D)``."""
        deviation = self.loc - self._mean().unsqueeze(-2)
        second = self.logits.exp().unsqueeze(-1) * (self.scale.square() + deviation.square())
        return second.sum(-2).expand(*self.batch_shape, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(z), ``(...)``, for z ``(..., D)``."""
        value = value_for(self.loc, value)
        if self._validate_args:
            self._validate_sample(value)
        if self.loc.dim() == self.scale.dim() == 2:
            return self._log_prob_of_rows(value)
        log_prob = self.log_joint(value).logsumexp(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def log_joint(self, value: Tensor) -> Tensor:
        r"""Return :math:`\log \pi_k q_k(z)`, ``(..., K)``, for z ``(..., D)``."""
        return self.logits + self._log_scalars(value).sum(-1)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Sample ``(*sample, *batch, D)``."""
        with torch.no_grad():
            logits = self.logits.expand(*self.batch_shape, -1)
            component = Categorical(logits=logits).sample(sample_shape)
            index = component[..., None, None].expand(*component.shape, 1, *self.event_shape)
            loc, scale = (
                t.expand(*component.shape, -1, -1).gather(-2, index).squeeze(-2)
                for t in (self.loc, self.scale)
            )
            # The numbers of torch.normal, which reads a value of the scale on the CPU.
            value = torch.randn(loc.shape, dtype=loc.dtype, device=loc.device) * scale + loc
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (self.logits, self.loc, self.scale)
        ):
            value = self._with_gradient(value)
        return value

    def _mean(self) -> Tensor:
        return (self.logits.exp().unsqueeze(-1) * self.loc).sum(-2)

    def _log_prob_of_rows(self, value: Tensor) -> Tensor:
        r"""Score values under components that all mixtures share.

        Expand the square in :math:`-\tfrac12 \sum_d (z_d - \mu_{kd})^2 / \sigma_{kd}^2`. Then all
        pairs are one matrix product of (z, z^2) with (mu/sigma^2, -1/(2 sigma^2)). Use float64 and
        subtract the median of three means from means and values, because of cancellation. The error
        is about 1e-16 times the squared distance from this center in standard deviations.
        """
        one_scale = self.scale.stride(0) == 0  # then z^2 has the same product with all of them
        loc, scale = self.loc.double(), (self.scale[:1] if one_scale else self.scale).double()
        first, middle, last = (loc.detach()[k] for k in (0, len(loc) // 2, -1))
        low, high = torch.minimum(first, last), torch.maximum(first, last)
        center = torch.maximum(low, torch.minimum(high, middle))
        loc = loc - center
        precision = scale.reciprocal().square()
        linear, quadratic = (loc * precision).T, -0.5 * precision.T
        bias = -(0.5 * loc.square() * precision).sum(1) - scale.log().sum(1)
        bias = bias - 0.5 * loc.shape[1] * math.log(2 * math.pi)
        weight = linear if one_scale else torch.cat([linear, quadratic])
        shape, logits = value.shape[:-1], None
        if self.logits.dim() == 1:
            bias = bias + self.logits
        else:  # each value has the logits of its mixture
            logits = self.logits.flatten(0, -2)
            mixture = torch.arange(len(logits), device=logits.device)
            mixture = mixture.reshape(self.logits.shape[:-1])
            shape = torch.broadcast_shapes(shape, mixture.shape)
            value, mixture = value.expand(*shape, -1), mixture.expand(shape).flatten()
        rows = (value.double() - center).reshape(-1, value.shape[-1])
        # Parts in a CPU's cache save a third of the time. A graph has the operations of each part.
        in_cache = rows.device.type == "cpu" and not is_in_torch_dispatch_mode()
        numbers = _LOG_DENSITIES_IN_CACHE if in_cache else _LOG_DENSITIES_AT_A_TIME
        at_a_time = max(1, numbers // len(bias))
        parts = []
        for first in range(0, max(1, len(rows)), at_a_time):
            z = rows[first : first + at_a_time]
            features = z if one_scale else torch.cat([z, z.square()], dim=1)
            log_joint = torch.addmm(bias, features, weight)
            if logits is not None:
                log_joint = log_joint + logits[mixture[first : first + at_a_time]]
            log_prob = log_joint.logsumexp(1)
            parts.append(log_prob + z.square() @ quadratic[:, 0] if one_scale else log_prob)
        log_prob = torch.cat(parts).reshape(shape).to(value.dtype)
        return log_prob.expand(torch.broadcast_shapes(shape, self.batch_shape))

    def _log_scalars(self, value: Tensor) -> Tensor:
        """Return the log-density of each dimension under each component, ``(..., K, D)``."""
        standardised = (value.unsqueeze(-2) - self.loc) / self.scale
        return -0.5 * (standardised.square() + math.log(2 * math.pi)) - self.scale.log()

    def _with_gradient(self, value: Tensor) -> Tensor:
        standardised = (value.unsqueeze(-2) - self.loc) / self.scale
        log_scalars = self._log_scalars(value)
        before = log_scalars.cumsum(-1) - log_scalars  # sum over the preceding dimensions
        weights = (self.logits.unsqueeze(-1) + before).softmax(-2)
        below = torch.special.ndtr(standardised)
        uniform = (weights * below).sum(-2)
        with torch.no_grad():
            slope = -standardised / self.scale  # derivative of log_scalars with respect to z
            jacobian = exact_product((weights * below).mT, slope)
            of_density = exact_product(weights.mT, slope)
            jacobian = jacobian - uniform.unsqueeze(-1) * of_density
            density = (weights * log_scalars.exp()).sum(-2)
            jacobian = jacobian.tril(-1) + torch.diag_embed(density)

        def solve(grad: Tensor) -> Tensor:
            solved = torch.linalg.solve_triangular(jacobian.mT, grad.unsqueeze(-1), upper=True)
            return solved.squeeze(-1)

        return implicit(value, uniform, solve)


class UniformMixture(TorchDistribution):
    r"""The uniform mixture :math:`\frac1N \sum_n q_n(z)` of all rows of one or several batches.

    Args:
        parts: distributions of batch shape ``(n_i,)``, N rows in all, with the same event shape.

    Shape:
        the batch shape is ``()`` and the event shape is that of the parts. Values are scored under
        all N rows.

    Raises:
        ValueError: There are no parts, or a batch shape is not ``(n,)``, or the event shapes
            differ.
    """

    arg_constraints = {}  # noqa: RUF012 - as torch declares them

    def __init__(self, parts: Sequence[TorchDistributionMixin]):
        self.parts = list(parts)
        events = {part.event_shape for part in self.parts}
        if len(events) != 1 or any(len(part.batch_shape) != 1 for part in self.parts):
            raise ValueError(
                "UniformMixture needs parts of batch shape (n,) and of one event shape, got "
                f"{[(tuple(p.batch_shape), tuple(p.event_shape)) for p in self.parts]}"
            )
        super().__init__(torch.Size(), events.pop(), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the parts."""
        return self.parts[0].support

    def expand(self, batch_shape, _instance=None) -> UniformMixture:
        """Return the mixture with a larger batch shape."""
        new = self._get_checked_instance(UniformMixture, _instance)
        new.parts = self.parts
        batch_shape = torch.Size(batch_shape)
        super(UniformMixture, new).__init__(batch_shape, self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density ``(...)`` of values ``(..., *event)``."""
        rows = value.unsqueeze(-1 - self.event_dim)
        scores = torch.cat([part.log_prob(rows) for part in self.parts], -1)
        log_prob = scores.logsumexp(-1) - math.log(scores.shape[-1])
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Sample a row at random, then a value ``(*sample, *batch, *event)`` of that row."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            sizes = [part.batch_shape[0] for part in self.parts]
            drawn = torch.cat([part.sample(shape) for part in self.parts], len(shape))
            row = torch.randint(sum(sizes), shape, device=drawn.device)
            row = row.reshape(*shape, 1, *(1,) * self.event_dim)
            row = row.expand(*shape, 1, *self.event_shape)
            return drawn.gather(len(shape), row).squeeze(len(shape))
