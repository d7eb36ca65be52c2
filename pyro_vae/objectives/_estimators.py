"""Other gradients of the same bounds. Each one is a choice of three weights per particle.

:func:`~pyro_vae.objectives.gradient` has the common equation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms, weighted
from pyro_vae._utils.checks import positive_integer, real_number, require_word
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.objectives._base import Objective, gradient
from pyro_vae.objectives._bounds import MIWAE, log_mean_weight, normalized_weights


@records_init_args
class StickingTheLanding(Objective):
    r"""The ELBO with the path derivative (Roeder et al. 2017): a = c = 1/K, b = 0.

    This gradient leaves out the score of log q at fixed samples, which is zero on average. Without
    the score, the gradient has no variance once q is the posterior.

    Args:
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one. Or, when the loss is computed, a site is
            global or scaled, or a guide site has no reparameterized sample.
    """

    hold_samples = True

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-weights over the particles."""
        terms.require_reparameterized("StickingTheLanding")
        log_weight = terms.log_weight.detach()
        equal = torch.full_like(log_weight, 1 / len(log_weight))
        return log_weight.mean(0) + gradient(terms, joint=equal, path=equal)


@records_init_args
class DReG(Objective):
    r"""The IWAE bound with the doubly reparameterized gradient (Tucker et al. 2019).

    The weights are a = :math:`\tilde w`, b = 0, c = :math:`\tilde w^2`, where
    :math:`\tilde w_k = w_k / \sum_j w_j`. The guide's gradient is unbiased. Its signal-to-noise
    ratio does not fall as K grows, unlike that of :class:`IWAE`.

    Args:
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one. Or, when the loss is computed, a site is
            global or scaled, or a guide site has no reparameterized sample.
    """

    hold_samples = True

    def bound(self, terms: Terms) -> Tensor:
        """Return the logarithm of the average weight."""
        terms.require_reparameterized("DReG")
        log_weight = terms.log_weight.detach()
        weights = normalized_weights(log_weight, 0)
        return log_mean_weight(log_weight, 0) + gradient(terms, joint=weights, path=weights**2)


@records_init_args
class PIWAE(MIWAE):
    r"""One bound for the model, another for the guide (Rainforth et al. 2018).

    The model is trained with the tighter bound, the IWAE with all M times K particles. The guide is
    trained with :class:`MIWAE`, whose gradient has less noise. The value is that of the IWAE.

    Args:
        num_bounds: M.
        num_particles: K, particles of each bound of the guide.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: A number is less than one, or a loss has a site that :class:`IWAE` rejects.
    """

    hold_samples = True

    def bound(self, terms: Terms) -> Tensor:
        """Return the logarithm of the average of all weights."""
        terms.require_reparameterized("PIWAE")
        log_weight = terms.log_weight.detach()
        of_each = normalized_weights(log_weight.unflatten(0, (self.num_bounds, -1)), 1)
        of_each = of_each.flatten(0, 1) / self.num_bounds
        joint = normalized_weights(log_weight, 0)
        return log_mean_weight(log_weight, 0) + gradient(
            terms, joint=joint, guide=of_each, path=of_each
        )


@records_init_args
class CUBO(Objective):
    r"""The chi upper bound on the evidence, minimized by the guide (Dieng et al. 2017).

    .. math::
        \mathcal{U}_n(x) = \frac1n \log \mathbb{E}_q\left[ \left(
        \frac{p(x, z)}{q(z|x)} \right)^n \right] \ge \log p(x)

    The estimate replaces the expectation by the average over K particles. On average it is below
    the bound, and the difference shrinks as K grows. The guide minimizes it, with b = c = -v,
    where :math:`v_k = w_k^n / \sum_j w_j^n`. The model's parameters get no gradient, because
    lowering an upper bound would lower the evidence. Train them with another objective. The loss
    is the upper bound itself.

    Args:
        n: the order, at least 1.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: A number is less than one, or a loss has a site that :class:`IWAE` rejects.
    """

    hold_samples = True

    def __init__(
        self, n: float = 2.0, num_particles: int = 64, *, vectorize_particles: bool | None = None
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if real_number("n", n) < 1:
            raise ValueError(f"n must be a number of at least 1, got {n}")
        self.n = float(n)

    def bound(self, terms: Terms) -> Tensor:
        """Return minus the upper bound, because objectives are maximized."""
        terms.require_reparameterized("CUBO")
        powers = self.n * terms.log_weight.detach()
        down = -normalized_weights(powers, 0)
        return -log_mean_weight(powers, 0) / self.n + gradient(terms, guide=down, path=down)


@records_init_args
class TVO(Objective):
    r"""The thermodynamic variational objective (Masrani et al. 2019).

    .. math::
        \mathcal{L}(x) = \sum_{s=1}^S (\beta_s - \beta_{s-1}) \,
        \mathbb{E}_{\pi_{\beta_{s-1}}}\left[\log w\right], \qquad
        \pi_\beta(z|x) \propto q(z|x)^{1-\beta} \, p(x, z)^\beta

    It is the left Riemann sum of :math:`\log p(x) = \int_0^1 \mathbb{E}_{\pi_\beta}[\log w]
    d\beta`. Its first term alone is the ELBO. The expectations weight the same K particles by
    :math:`w^\beta`. The gradient is the paper's, a covariance under these weights. So the guide's
    samples need not be reparameterized.

    Args:
        num_particles: K, at least 2.
        num_points: S, number of terms. The points are 0 and then S points up to 1, evenly spaced in
            log :math:`\beta`.
        first: :math:`\beta_1`, the first point after 0.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: An argument is out of range, or a loss has a global or scaled site.
    """

    hold_samples = True

    def __init__(
        self,
        num_particles: int = 10,
        num_points: int = 5,
        first: float = 1e-2,
        *,
        vectorize_particles: bool | None = None,
    ):
        positive_integer("num_points", num_points)
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if num_particles < 2:
            raise ValueError("TVO compares particles, so num_particles must be at least 2, got 1")
        if not 0 < real_number("first", first) < 1:
            raise ValueError(f"first must be between 0 and 1, got {first}")
        inner = torch.logspace(math.log10(first), 0, num_points, dtype=torch.float64)
        self.points = [0.0, *(inner.tolist() if num_points > 1 else [1.0])]

    def bound(self, terms: Terms) -> Tensor:
        """Sum the expected log-weights, each multiplied by the width of its interval."""
        log_weight = terms.log_weight.detach()
        value = torch.zeros_like(log_weight[0])
        joint, guide = torch.zeros_like(log_weight), torch.zeros_like(log_weight)
        for beta, after in zip(self.points, self.points[1:], strict=False):
            weights = normalized_weights(weighted(beta, log_weight), 0)
            expected = weighted(weights, log_weight).sum(0)
            value = value + (after - beta) * expected
            weights = (after - beta) * weights
            covariance = weighted(weights, log_weight - expected)
            covariance = torch.where(expected.isinf(), 0.0, covariance)  # as is the value
            joint = joint + weights + beta * covariance
            guide = guide + weights - (1 - beta) * covariance
        return value + gradient(terms, joint=joint, guide=guide)


@records_init_args
class ScoreFunction(Objective):
    r"""The ELBO with the score function estimator at every site (Ranganath et al. 2014, eq. 3).

    .. math::
        \frac1K \sum_k \left( \log w_k - b_k \right) \nabla_\phi \log q(z_k|x)

    Each data point is weighted by its own bound. Reparameterizable sites use the score function
    too, so that the two estimators can be compared. To treat only one site in this way, call
    ``.has_rsample_(False)`` on its distribution and use :class:`ELBO`.

    Args:
        num_particles: K.
        baseline: b, which lowers the variance and keeps the mean. ``"others"`` is the average
            log-weight of the data point's other particles (Kool et al. 2019) and needs K of at
            least 2. ``"average"`` is a moving average over batches, with weight 0.1 for the newest.
            None subtracts nothing. Baselines of guide sites, ``infer={"baseline": ...}``, are
            subtracted in addition.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` or ``baseline`` is invalid, or a loss has a global or scaled
            site.
    """

    hold_samples = True
    takes_baselines = True

    def __init__(
        self,
        num_particles: int = 1,
        baseline: Literal["others", "average"] | None = None,
        *,
        vectorize_particles: bool | None = None,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if baseline is not None:
            require_word("baseline", baseline, ("others", "average"), "None")
        if baseline == "others" and num_particles < 2:
            raise ValueError("baseline 'others' needs num_particles of at least 2, got 1")
        self.baseline = baseline
        self.average = torch.zeros((), dtype=torch.float64)

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-weights over the particles."""
        log_weight = terms.log_weight.detach()
        count = len(log_weight)
        signal = torch.where(log_weight.isinf(), 0.0, log_weight - self._baseline(log_weight))
        joint = torch.full_like(log_weight, 1 / count)
        bound = log_weight.mean(0) + gradient(terms, joint=joint, guide=-signal / count)
        return self.less_baselines(bound, terms, signal)

    def _baseline(self, log_weight: Tensor) -> Tensor | float:
        if self.baseline == "others":
            return (log_weight.sum(0) - log_weight) / (len(log_weight) - 1)
        if self.baseline == "average":
            before = self.average.clone()
            if torch.is_grad_enabled():
                newest = log_weight.mean().to(self.average)
                self.average.lerp_(torch.where(newest.isinf(), before, newest), 0.1)
            return before
        return 0.0


@records_init_args
class VIMCO(Objective):
    r"""The IWAE bound without reparameterization (Mnih & Rezende 2016, eq. 9).

    .. math::
        \sum_k \left( \hat L - \hat L_{-k} \right) \nabla_\phi \log q(z_k|x)
        + \sum_k \tilde w_k \nabla \log w_k

    where :math:`\hat L_{-k}` is the bound with :math:`w_k` replaced by the geometric mean of the
    other weights. Reparameterized sites keep their reparameterized gradient.

    Args:
        num_particles: K, at least 2.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than two, or a loss has a global or scaled site.
    """

    def __init__(self, num_particles: int = 10, *, vectorize_particles: bool | None = None):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if num_particles < 2:
            raise ValueError("VIMCO compares particles, so num_particles must be at least 2, got 1")

    def bound(self, terms: Terms) -> Tensor:
        """Return the logarithm of the average weight."""
        bound = log_mean_weight(terms.log_weight, 0)
        if terms.score is None:
            return bound
        log_weight = terms.log_weight.detach().unsqueeze(0)
        count = log_weight.shape[1]
        one = torch.eye(count, dtype=torch.bool, device=log_weight.device).unsqueeze(-1)
        # The sum minus one log-weight would be NaN for weights of zero.
        others = torch.where(one, 0.0, log_weight).sum(1) / (count - 1)
        without = log_mean_weight(torch.where(one, others, log_weight), 1)
        # If all other weights are zero, the signal would be infinite. Leave it out.
        signal = torch.where(without == -torch.inf, 0.0, bound.detach() - without)
        return bound + (signal * (terms.score - terms.score.detach())).sum(0)


@records_init_args
class ReweightedWakeSleep(Objective):
    r"""The wake-sleep algorithm with importance weights (Bornschein & Bengio 2015).

    The model maximizes the IWAE bound (wake :math:`\theta`, a = :math:`\tilde w`). The guide
    minimizes KL(p(z|x) || q(z|x)) by maximizing log q at samples of the posterior. In the wake
    update these are the guide's own samples, weighted (wake :math:`\phi`,
    b = :math:`-\tilde w`). In the sleep update the model samples z together with x
    (sleep :math:`\phi`). No sample needs to be reparameterized. The value is the IWAE bound.

    Args:
        num_particles: K.
        wake: weight of the guide's wake update.
        sleep: weight of the guide's sleep update; the model must observe its arguments unchanged.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: A weight or ``num_particles`` is out of range. Or, when the loss is computed, a
            site is global or scaled. With ``sleep``, the model does not observe its arguments
            unchanged, or has a factor.
    """

    hold_samples = True

    def __init__(
        self,
        num_particles: int = 10,
        wake: float = 1.0,
        sleep: float = 0.0,
        *,
        vectorize_particles: bool | None = None,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        wake, sleep = real_number("wake", wake), real_number("sleep", sleep)
        if not (wake >= 0 and sleep >= 0 and wake + sleep > 0):
            raise ValueError(
                f"wake and sleep must be weights >= 0, not both zero, got {wake} and {sleep}"
            )
        self.wake, self.sleep = wake, sleep

    def bound(self, terms: Terms) -> Tensor:
        """Return the logarithm of the average weight."""
        log_weight = terms.log_weight.detach()
        weights = normalized_weights(log_weight, 0)
        bound = log_mean_weight(log_weight, 0)
        bound = bound + gradient(terms, joint=weights, guide=-self.wake * weights)
        if self.sleep:
            if not terms.samples:
                raise ValueError(
                    "ReweightedWakeSleep with sleep > 0 trains the guide on latent variables that "
                    'the model samples. This pair has none in the plate "data". Use objectives.ELBO'
                )
            dreamt = terms.sample_joint().log_guide()
            bound = bound + self.sleep * (dreamt - dreamt.detach())
        return bound
