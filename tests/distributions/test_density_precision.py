"""Densities, KLs and samples do not depend on the precision of float32 matrix products.

Rounded products are emulated, because few processors have them. With products of bfloat16, samples
of a Gaussian would be off by 0.4%, and their log-densities by much more.
"""

import pyro.distributions as dist
import pytest
import torch
from rounded_products import rounded
from torch import nn

import pyro_vae as pv
from pyro_vae.distributions import MixtureOfDiagNormals
from pyro_vae.distributions._kl_divergences import known_kl
from pyro_vae.guides import _families as families

D = 6


def gaussian(family):
    return family(0.7 * torch.randn(5, family.num_parameters))


def sylvester(kind):
    def make():
        flow = pv.flows.Sylvester(D, kind, None if kind == "triangular" else 3)
        return flow(torch.randn(5, flow.num_parameters))

    return make


def mixture():
    return MixtureOfDiagNormals(torch.randn(4), torch.randn(4, D), torch.rand(4, D) + 0.5)


DISTRIBUTIONS = {
    "normal": lambda: dist.Normal(torch.randn(5, D), 0.5).to_event(1),
    "full": lambda: gaussian(families.MultivariateNormal(D)),
    "low rank": lambda: gaussian(families.LowRankNormal(D, 3)),
    "one mixture": mixture,
    "mixtures": lambda: gaussian(families.Mixture(D, 3)),
    **{
        kind: lambda kind=kind: dist.TransformedDistribution(
            dist.Normal(torch.zeros(5, D), 1.0).to_event(1), [sylvester(kind)()]
        )
        for kind in ("orthogonal", "householder", "triangular")
    },
}


def both_precisions(compute):
    """Return the results of both precisions, from the same random numbers."""
    found = []
    for precision in ("highest", "rounded"):
        torch.manual_seed(3)
        if precision == "highest":
            found.append(compute())
        else:
            with rounded() as products:
                found.append(compute())
            assert products.number == 0  # no float32 product
    return found


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_samples_and_densities(make):
    """Float32 rounding times a condition number of some tens."""

    def compute():
        q = make()
        z = q.rsample((7,))
        return z, q.log_prob(z), q.log_prob(z.detach().clone() + 0.1)

    for one, other in zip(*both_precisions(compute), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_log_density_of_a_sample_with_strong_correlation():
    """A correlation of 0.9999. If the sample were rounded, the errors would be amplified by 140."""
    triangle = torch.tensor([[1.0, 0.0], [0.9999, (1 - 0.9999**2) ** 0.5]])

    def compute():
        q = families._MultivariateNormal(torch.zeros(2), scale_tril=triangle)
        return q.log_prob(q.rsample((1000,)))

    one, other = both_precisions(compute)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_gradient_of_samples_of_a_mixture():
    def compute():
        loc = torch.randn(4, D, requires_grad=True)
        q = MixtureOfDiagNormals(torch.zeros(4), loc, torch.rand(4, D) + 0.5)
        return torch.autograd.grad(q.rsample((50,)).square().sum(), loc)[0]

    one, other = both_precisions(compute)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


PAIRS = {
    "normal": (lambda: dist.Normal(torch.randn(5), torch.rand(5) + 0.5),) * 2,
    "full": (DISTRIBUTIONS["full"],) * 2,
    "low rank": (DISTRIBUTIONS["low rank"],) * 2,
    "low rank and full": (DISTRIBUTIONS["low rank"], DISTRIBUTIONS["full"]),
    "full and low rank": (DISTRIBUTIONS["full"], DISTRIBUTIONS["low rank"]),
    "independent and full": (DISTRIBUTIONS["normal"], DISTRIBUTIONS["full"]),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_kl(pair):
    one, other = both_precisions(lambda: known_kl(*(make() for make in pair)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_mean_of_gray_levels():
    likelihood = pv.likelihoods.Categorical(nn.Identity(), levels=16)

    def compute():
        return likelihood(torch.randn(3, 5 * 16)).mean

    one, other = both_precisions(compute)
    torch.testing.assert_close(one, other)
