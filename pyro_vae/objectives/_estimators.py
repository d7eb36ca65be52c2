"""Other gradients of the same bounds: each a choice of three weights for each particle.

:func:`~pyro_vae.objectives.gradient` has the equation that they share.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms
from pyro_vae._utils.checks import positive_integer, real_number
from pyro_vae.objectives._base import Objective, gradient
from pyro_vae.objectives._bounds import MIWAE, log_mean_weight


class StickingTheLanding(Objective):
    r"""The ELBO with the path derivative (Roeder et al. 2017): a = c = 1/K, b = 0.

    What is left out of the reparameterised gradient, the score of log q at fixed samples, is zero
    on average; without it the gradient has no variance once q is the posterior.

    Args:
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one; in a loss, a site is global or scaled, or a
            guide site has no reparameterised sample.
    """

    hold_samples = True

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-weights over the particles."""
        terms.require_reparameterized("StickingTheLanding")
        log_weight = terms.log_weight.detach()
        equal = torch.full_like(log_weight, 1 / len(log_weight))
        return log_weight.mean(0) + gradient(terms, joint=equal, path=equal)


class DReG(Objective):
    r"""The IWAE bound with the doubly reparameterised gradient (Tucker et al. 2019).

    The weights are a = :math:`\tilde w`, b = 0, c = :math:`\tilde w^2`, where
    :math:`\tilde w_k = w_k / \sum_j w_j`. The guide's gradient is unbiased, and its signal does not
    drown in noise as K grows, as that of :class:`IWAE` does.

    Args:
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than one; in a loss, a site is global or scaled, or a
            guide site has no reparameterised sample.
    """

    hold_samples = True

    def bound(self, terms: Terms) -> Tensor:
        """Take the logarithm of the average weight."""
        terms.require_reparameterized("DReG")
        log_weight = terms.log_weight.detach()
        weights = log_weight.softmax(0)
        return log_mean_weight(log_weight, 0) + gradient(terms, joint=weights, path=weights**2)


class PIWAE(MIWAE):
    r"""One bound for the model, another for the guide (Rainforth et al. 2018).

    The model ascends the IWAE bound of all M times K particles, which is the tighter one; the guide
    ascends :class:`MIWAE`, whose gradient has the better signal. The value is the former's.

    Args:
        num_bounds: M.
        num_particles: K, of each of the guide's bounds.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: a number is less than one; in a loss, what :class:`IWAE` refuses.
    """

    hold_samples = True

    def bound(self, terms: Terms) -> Tensor:
        """Take the logarithm of the average of all weights."""
        terms.require_reparameterized("PIWAE")
        log_weight = terms.log_weight.detach()
        of_each = log_weight.unflatten(0, (self.num_bounds, -1)).softmax(1).flatten(0, 1)
        of_each = of_each / self.num_bounds
        return log_mean_weight(log_weight, 0) + gradient(
            terms, joint=log_weight.softmax(0), guide=of_each, path=of_each
        )


class CUBO(Objective):
    r"""The chi upper bound on the evidence (Dieng et al. 2017), which the guide lowers.

    .. math::
        \mathcal{U}_n(x) = \frac1n \log \mathbb{E}_q\left[ \left(
        \frac{p(x, z)}{q(z|x)} \right)^n \right] \ge \log p(x)

    The estimate puts the average over K particles in place of the expectation, and so lies below
    the bound on average, by less the larger K is. The guide descends it, with b = c = -v, where
    :math:`v_k = w_k^n / \sum_j w_j^n`. The model's parameters get no gradient: to lower an upper
    bound would lower the evidence. Train them with another objective. The loss is the upper bound
    itself.

    Args:
        n: the order, at least 1.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: a number is less than one; in a loss, what :class:`IWAE` refuses.
    """

    hold_samples = True

    def __init__(
        self, n: float = 2.0, num_particles: int = 64, *, vectorize_particles: bool = True
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if real_number("n", n) < 1:
            raise ValueError(f"n must be a number of at least 1, got {n}")
        self.n = float(n)

    def bound(self, terms: Terms) -> Tensor:
        """Take the logarithm of the average power, and its opposite to be maximised."""
        terms.require_reparameterized("CUBO")
        powers = self.n * terms.log_weight.detach()
        down = -powers.softmax(0)
        return -log_mean_weight(powers, 0) / self.n + gradient(terms, guide=down, path=down)


class TVO(Objective):
    r"""The thermodynamic variational objective (Masrani et al. 2019).

    .. math::
        \mathcal{L}(x) = \sum_{s=1}^S (\beta_s - \beta_{s-1}) \,
        \mathbb{E}_{\pi_{\beta_{s-1}}}\left[\log w\right], \qquad
        \pi_\beta(z|x) \propto q(z|x)^{1-\beta} \, p(x, z)^\beta

    It is the left Riemann sum of :math:`\log p(x) = \int_0^1 \mathbb{E}_{\pi_\beta}[\log w]
    d\beta`; its first term alone is the ELBO. The expectations weigh the same K particles by
    :math:`w^\beta`. The gradient is the paper's, a covariance under these weights, so the guide's
    samples need not be reparameterised.

    Args:
        num_particles: K, at least 2.
        num_points: S, from 0 on: 0, then evenly spaced in log :math:`\beta` up to 1.
        first: :math:`\beta_1`.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: numbers out of range; in a loss, a site is global or scaled.
    """

    hold_samples = True

    def __init__(
        self,
        num_particles: int = 10,
        num_points: int = 5,
        first: float = 1e-2,
        *,
        vectorize_particles: bool = True,
    ):
        positive_integer("num_points", num_points)
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if num_particles < 2:
            raise ValueError("TVO compares particles: num_particles must be at least 2, got 1")
        if not 0 < real_number("first", first) < 1:
            raise ValueError(f"first must be between 0 and 1, got {first}")
        inner = torch.logspace(math.log10(first), 0, num_points, dtype=torch.float64)
        self.points = [0.0, *(inner.tolist() if num_points > 1 else [1.0])]

    def bound(self, terms: Terms) -> Tensor:
        """Sum the expected log-weights, each over its width."""
        log_weight = terms.log_weight.detach()
        value = torch.zeros_like(log_weight[0])
        joint, guide = torch.zeros_like(log_weight), torch.zeros_like(log_weight)
        for beta, after in zip(self.points, self.points[1:], strict=False):
            weights = (beta * log_weight).softmax(0)
            expected = (weights * log_weight).sum(0)
            value = value + (after - beta) * expected
            weights = (after - beta) * weights
            covariance = weights * (log_weight - expected)
            joint = joint + weights + beta * covariance
            guide = guide + weights - (1 - beta) * covariance
        return value + gradient(terms, joint=joint, guide=guide)


class ScoreFunction(Objective):
    r"""The ELBO with the score function estimator at every site (Ranganath et al. 2014, eq. 3).

    .. math::
        \frac1K \sum_k \left( \log w_k - b_k \right) \nabla_\phi \log q(z_k|x)

    Each datum is weighted by its own bound. Sites that could be reparameterised are not: for the
    comparison of the two. To treat one site so and others not, give its distribution
    ``.has_rsample_(False)`` and take :class:`ELBO`.

    Args:
        num_particles: K.
        baseline: b, which leaves the average as it is and lowers the variance. ``"others"``: the
            average log-weight of the datum's other particles (Kool et al. 2019), for K of at least
            2; ``"average"``: of the last batches, decaying by a tenth with each; None. Baselines
            that guide sites ask for by ``infer={"baseline": ...}`` are subtracted besides.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` or ``baseline`` out of range; in a loss, a site is global or
            scaled.
    """

    hold_samples = True
    takes_baselines = True

    def __init__(
        self,
        num_particles: int = 1,
        baseline: Literal["others", "average"] | None = None,
        *,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if baseline not in ("others", "average", None):
            raise ValueError(f"baseline must be 'others', 'average' or None, got {baseline!r}")
        if baseline == "others" and num_particles < 2:
            raise ValueError("baseline 'others' needs num_particles of at least 2, got 1")
        self.baseline = baseline
        self.average = torch.zeros((), dtype=torch.float64)

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-weights over the particles."""
        log_weight = terms.log_weight.detach()
        count = len(log_weight)
        signal = log_weight - self._baseline(log_weight)
        joint = torch.full_like(log_weight, 1 / count)
        bound = log_weight.mean(0) + gradient(terms, joint=joint, guide=-signal / count)
        return self.less_baselines(bound, terms, signal)

    def _baseline(self, log_weight: Tensor) -> Tensor | float:
        if self.baseline == "others":
            return (log_weight.sum(0) - log_weight) / (len(log_weight) - 1)
        if self.baseline == "average":
            before = self.average.clone()
            if torch.is_grad_enabled():
                self.average.lerp_(log_weight.mean().to(self.average), 0.1)
            return before
        return 0.0


class VIMCO(Objective):
    r"""The IWAE bound for latents without a reparameterised sample (Mnih & Rezende 2016, eq. 9).

    .. math::
        \sum_k \left( \hat L - \hat L_{-k} \right) \nabla_\phi \log q(z_k|x)
        + \sum_k \tilde w_k \nabla \log w_k

    where :math:`\hat L_{-k}` has the geometric mean of the other weights in place of
    :math:`w_k`. Sites that are reparameterised stay so.

    Args:
        num_particles: K, at least 2.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``num_particles`` is less than two; in a loss, a site is global or scaled.
    """

    def __init__(self, num_particles: int = 10, *, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if num_particles < 2:
            raise ValueError("VIMCO compares particles: num_particles must be at least 2, got 1")

    def bound(self, terms: Terms) -> Tensor:
        """Take the logarithm of the average weight."""
        bound = log_mean_weight(terms.log_weight, 0)
        if terms.score is None:
            return bound
        log_weight = terms.log_weight.detach()
        others = (log_weight.sum(0) - log_weight) / (len(log_weight) - 1)
        one = torch.eye(len(log_weight), dtype=torch.bool, device=log_weight.device).unsqueeze(-1)
        without = log_mean_weight(torch.where(one, others, log_weight.unsqueeze(0)), 1)
        signal = bound.detach() - without
        return bound + (signal * (terms.score - terms.score.detach())).sum(0)


class ReweightedWakeSleep(Objective):
    r"""Wake and sleep, with importance weights (Bornschein & Bengio 2015).

    The model ascends the IWAE bound (wake :math:`\theta`: a = :math:`\tilde w`). The guide lowers
    the divergence from the posterior to itself, by ascending log q at samples of the posterior:
    those of the guide, weighted (wake :math:`\phi`: b = :math:`-\tilde w`), or those that the model
    draws together with an x (sleep :math:`\phi`). No sample needs to be reparameterised. The value
    is the IWAE bound.

    Args:
        num_particles: K.
        wake: weight of the wake update of the guide.
        sleep: weight of its sleep update; the model must observe its arguments as they are.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: numbers out of range; in a loss, a site is global or scaled, or the model
            does not observe its arguments as they are.
    """

    hold_samples = True

    def __init__(
        self,
        num_particles: int = 10,
        wake: float = 1.0,
        sleep: float = 0.0,
        *,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        wake, sleep = real_number("wake", wake), real_number("sleep", sleep)
        if not (wake >= 0 and sleep >= 0 and wake + sleep > 0):
            raise ValueError(
                f"wake and sleep must be weights, not both zero, got {wake} and {sleep}"
            )
        self.wake, self.sleep = wake, sleep

    def bound(self, terms: Terms) -> Tensor:
        """Take the logarithm of the average weight."""
        log_weight = terms.log_weight.detach()
        weights = log_weight.softmax(0)
        bound = log_mean_weight(log_weight, 0)
        bound = bound + gradient(terms, joint=weights, guide=-self.wake * weights)
        if self.sleep:
            if not terms.samples:
                raise ValueError(
                    "ReweightedWakeSleep with sleep trains the guide on latents that the model "
                    'draws, and this pair has none in the plate "data": use objectives.ELBO'
                )
            dreamt = terms.sample_joint().log_guide()
            bound = bound + self.sleep * (dreamt - dreamt.detach())
        return bound
