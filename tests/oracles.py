"""Closed forms to test against, with random weights."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


class LinearGaussian:
    """x = W z + mu + e with z ~ N(0, I_d), e ~ N(0, s2 I_D): a VAE with closed forms.

    The guide q(z|x) = N(V (x - mu), S): the posterior itself (``exact``) or the best diagonal one.
    """

    def __init__(self, d=2, D=5, *, exact=False, noise=0.2, dtype=torch.float64, weight=None):  # noqa: N803
        self.weight = torch.randn(D, d, dtype=torch.float64) if weight is None else weight.double()
        D, self.d = self.weight.shape  # noqa: N806
        self.mu = torch.randn(D, dtype=torch.float64)
        self.s2 = noise + torch.rand((), dtype=torch.float64)
        self.eye = torch.eye(d, dtype=torch.float64)
        self.covariance = self.weight @ self.weight.T + self.s2 * torch.eye(D, dtype=torch.float64)
        self.precision = (self.weight.T @ self.weight + self.s2 * self.eye) / self.s2
        self.v = torch.linalg.solve(self.precision * self.s2, self.weight.T)
        diagonal = torch.diag(self.precision.diagonal().reciprocal())
        self.s = self.precision.inverse() if exact else diagonal
        self.dtype = dtype
        self.exact = exact

    def sample(self, count: int) -> Tensor:
        return self._p_x().sample((count,)).to(self.dtype)

    def plate(self, x: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x))

    def model(self, x: Tensor) -> None:
        prior = dist.Normal(torch.zeros(self.d, dtype=x.dtype), 1.0).to_event(1)
        with self.plate(x):
            z = pyro.sample("z", prior)
            mean = z @ self.weight.T.to(x.dtype) + self.mu.to(x.dtype)
            pyro.sample("x", dist.Normal(mean, self.s2.sqrt().to(x.dtype)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        mean = (x - self.mu.to(x.dtype)) @ self.v.T.to(x.dtype)
        with self.plate(x):
            if self.exact:
                pyro.sample("z", dist.MultivariateNormal(mean, self.s.to(x.dtype)))
            else:
                scale = self.s.diagonal().sqrt().to(x.dtype)
                pyro.sample("z", dist.Normal(mean, scale).to_event(1))

    def full_covariance_guide(self, x: Tensor) -> None:
        """The same density as a full-covariance site, which surgery scores by running it."""
        mean = (x - self.mu.to(x.dtype)) @ self.v.T.to(x.dtype)
        with self.plate(x):
            pyro.sample("z", dist.MultivariateNormal(mean, self.s.to(x.dtype)))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log N(x; mu, C), shape (N,)."""
        return self._p_x().log_prob(x.double())

    @property
    def gap(self) -> float:
        """KL(q || posterior) = (tr(P S) - d - log|P S|) / 2, the same for all x."""
        product = self.precision @ self.s
        return 0.5 * (product.trace() - self.d - product.logdet()).item()

    @property
    def weight_excess(self) -> float:
        """E_q[w^2] - 1 for w = p(z|x)/q(z|x), a Gaussian integral; NaN where it is infinite."""
        width = self.s.inverse()
        log_square = self.precision.logdet() - 0.5 * width.logdet()
        return (log_square - 0.5 * (2 * self.precision - width).logdet()).expm1().item()

    @property
    def aggregated_covariance(self) -> Tensor:
        return self.v @ self.covariance @ self.v.T + self.s

    @property
    def mutual_information(self) -> float:
        return 0.5 * (self.aggregated_covariance.logdet() - self.s.logdet()).item()

    @property
    def marginal_kl(self) -> float:
        q = self.aggregated_covariance
        return 0.5 * (q.trace() - self.d - q.logdet()).item()

    def finite_data_shift(self, count: int) -> float:
        """Return how much N data points reduce the mutual information and raise the marginal KL.

        The aggregated posterior of N data points is a mixture of N. To second order its KL from
        the population's is (E_x int q(z|x)^2 / q_agg(z) dz - 1) / (2 N), a Gaussian integral.
        """
        q, s_inv = self.aggregated_covariance, self.s.inverse()
        means = q - self.s
        joint = torch.cat(
            [
                torch.cat([means.inverse() + 2 * s_inv, -2 * s_inv], 1),
                torch.cat([-2 * s_inv, 2 * s_inv - q.inverse()], 1),
            ]
        )
        log_integral = 0.5 * (q.logdet() - means.logdet() - joint.logdet()) - self.s.logdet()
        return math.expm1(log_integral.item()) / (2 * count)

    def _p_x(self):
        return torch.distributions.MultivariateNormal(self.mu, self.covariance)


def assert_within(estimate: float, truth: float, error: float, errors: float = 4.0) -> None:
    """Check an estimate against its standard error; 4 errors fail by chance once in 16,000."""
    assert error > 0
    assert abs(estimate - truth) < errors * error, f"{estimate} is not {truth} ± {error}"
