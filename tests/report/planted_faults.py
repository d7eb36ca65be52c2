"""Pairs with one planted fault each, for the diagnosis. The data come from linear Gaussians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import pyro_vae as pv


@dataclass(frozen=True)
class Planted:
    """A pair with a fault.

    Attributes:
        model: program of p(x, z).
        guide: program of q(z|x).
        train: training data.
        test: test data.
        entry: the line of the ledger that the verdict must name first.
        nats: the loss on the test data in closed form; None without a closed form.
    """

    model: Callable
    guide: Callable
    train: Tensor
    test: Tensor
    entry: str
    nats: float | None = None


class Gaussian:
    """x = W z + e with z ~ N(0, scale^2 I_d) and e ~ N(0, noise^2 I_D), with random W."""

    noise = 0.5

    def __init__(self, d: int = 2, D: int = 5, scale: float = 1.0):  # noqa: N803
        self.weight, self.scale = torch.randn(D, d), scale

    def rescaled(self, scale: float) -> Gaussian:
        other = Gaussian(scale=scale)
        other.weight = self.weight
        return other

    def decode(self, z: Tensor) -> Tensor:
        mean = z @ self.weight.T
        return mean + self.noise * torch.randn_like(mean)

    def sample(self, count: int) -> Tensor:
        return self.decode(self.scale * torch.randn(count, self.weight.shape[1]))

    def model(self, x: Tensor) -> None:
        prior = dist.Normal(torch.zeros(self.weight.shape[1]), self.scale).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.noise).to_event(1), obs=x)

    @property
    def precision(self) -> Tensor:
        """Of the posterior."""
        inner = self.weight.T @ self.weight / self.noise**2
        return inner + torch.eye(len(inner)) / self.scale**2

    def posterior_mean(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.solve(self.precision, self.weight.T / self.noise**2).T

    def posterior(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = self.posterior_mean(x)
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=self.precision))

    def mean_field(self, x: Tensor) -> None:
        scale = self.precision.diagonal().rsqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.posterior_mean(x), scale).to_event(1))

    def log_prob(self, x: Tensor) -> Tensor:
        cov = self.scale**2 * self.weight @ self.weight.T + self.noise**2 * torch.eye(x.shape[1])
        return MultivariateNormal(torch.zeros(x.shape[1]), cov).log_prob(x)


def prior_of_wrong_scale(num_data: int = 500) -> Planted:
    true = Gaussian()
    wrong = true.rescaled(3.0)
    train, test = true.sample(num_data), true.sample(num_data)
    nats = (true.log_prob(test) - wrong.log_prob(test)).mean().item()
    return Planted(wrong.model, wrong.posterior, train, test, "prior gain", nats)


def prior_that_should_be_bimodal(num_data: int = 500) -> Planted:
    true = Gaussian(d=1)
    true.weight = true.weight / true.weight.norm() * 2.0
    width = 0.3

    def sample(count: int) -> Tensor:
        side = 1 - 2 * torch.randint(2, (count, 1))
        return true.decode(side * (1 - width**2) ** 0.5 + width * torch.randn(count, 1))

    def log_prob(x: Tensor) -> Tensor:
        means = torch.tensor([[-1.0], [1.0]]) * (1 - width**2) ** 0.5 @ true.weight.T
        cov = width**2 * true.weight @ true.weight.T + true.noise**2 * torch.eye(x.shape[1])
        modes = MultivariateNormal(means, cov.expand(2, -1, -1))
        return MixtureSameFamily(Categorical(torch.ones(2)), modes).log_prob(x)

    train, test = sample(num_data), sample(num_data)
    nats = (log_prob(test) - true.log_prob(test)).mean().item()
    return Planted(true.model, true.posterior, train, test, "prior gain", nats)


def mean_field_on_a_correlated_posterior(num_data: int = 500) -> Planted:
    true = Gaussian()
    true.weight[:, 1] = true.weight[:, 0] + 0.3 * true.weight[:, 1]
    nats = 0.5 * (true.precision.diagonal().log().sum() - true.precision.logdet()).item()
    train, test = true.sample(num_data), true.sample(num_data)
    return Planted(true.model, true.mean_field, train, test, "approximation gap", nats)


def encoder_stopped_early(num_data: int = 500) -> Planted:
    true = Gaussian()
    train, test = true.sample(num_data), true.sample(num_data)
    guide = _trained_encoder(true, train, epochs=3)
    return Planted(true.model, guide, train, test, "amortization gap, training")


def encoder_that_overfits(num_data: int = 500) -> Planted:
    true = Gaussian(D=50)
    train, test = true.sample(100), true.sample(num_data)
    guide = _trained_encoder(true, train, hidden=128, epochs=500, learning_rate=2e-3)
    return Planted(true.model, guide, train, test, "encoder overfitting")


def decoder_that_ignores_z(num_data: int = 500) -> Planted:
    true = Gaussian()
    train, test = true.sample(num_data), true.sample(num_data)

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = pv.nets.MLP(2, [32], 5)

        def forward(self, z: Tensor) -> Tensor:
            return self.net(0 * z)

    return _trained_pair(Blind(), 2, train, test, epochs=60, learning_rate=5e-3)


def decoder_that_is_too_small(num_data: int = 500) -> Planted:
    weight = torch.randn(3, 6)

    def sample(count: int) -> Tensor:
        z = torch.randn(count, 1)
        curve = torch.cat([z, 1.5 * torch.sin(2 * z), 1.5 * torch.cos(2 * z)], 1)
        return curve @ weight + 0.3 * torch.randn(count, 6)

    train, test = sample(2 * num_data), sample(num_data)
    return _trained_pair(nn.Linear(1, 6), 1, train, test, epochs=100, learning_rate=3e-3)


FAULTS = (
    mean_field_on_a_correlated_posterior,
    encoder_stopped_early,
    encoder_that_overfits,
    prior_of_wrong_scale,
    prior_that_should_be_bimodal,
    decoder_that_ignores_z,
    decoder_that_is_too_small,
)


def _trained_encoder(true: Gaussian, train: Tensor, hidden: int = 64, **options: float) -> Callable:
    encoder = pv.nets.MLP(train.shape[1], [hidden, hidden])
    guide = pv.guides.AmortizedMultivariateNormal(true.model, encoder)
    pv.fit(true.model, guide, train, progress=False, capture=False, **options)
    return guide


def _trained_pair(
    decoder: nn.Module, latent: int, train: Tensor, test: Tensor, **options: float
) -> Planted:
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(latent),
        pv.likelihoods.Normal(decoder, scale=pv.likelihoods.SharedScale()),
    )
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(train.shape[1], [64, 64]))
    pv.fit(model, guide, train, progress=False, capture=False, **options)
    return Planted(model, guide, train, test, "decoder gain")
