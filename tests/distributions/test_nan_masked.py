"""Densities of the observed numbers alone, for each distribution of single numbers."""

import inspect

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

LIKELIHOODS = {
    "Bernoulli": lambda: pv.likelihoods.Bernoulli(nn.Identity()),
    "ContinuousBernoulli": lambda: pv.likelihoods.ContinuousBernoulli(nn.Identity()),
    "Normal": lambda: pv.likelihoods.Normal(nn.Identity(), pv.likelihoods.ScalePerOutput(4)),
    "Laplace": lambda: pv.likelihoods.Laplace(nn.Identity()),
    "StudentT": lambda: pv.likelihoods.StudentT(nn.Identity()),
    "Categorical": lambda: pv.likelihoods.Categorical(pv.nets.MLP(4, [3], 4 * 3), levels=3),
    "DiscretizedLogistic": lambda: pv.likelihoods.DiscretizedLogistic(
        pv.nets.MLP(4, [3], 4 * 2), levels=3
    ),
    "DiscretizedLogisticMixture": lambda: pv.likelihoods.DiscretizedLogisticMixture(
        pv.nets.MLP(4, [3], 4 * 6), levels=3, components=2
    ),
    "Poisson": lambda: pv.likelihoods.Poisson(nn.Identity()),
    "NegativeBinomial": lambda: pv.likelihoods.NegativeBinomial(nn.Identity()),
}
OTHERS = {
    "Gamma": lambda z: dist.Gamma(z.exp(), 1.0),
    "Exponential": lambda z: dist.Exponential(z.exp()),
    "Beta": lambda z: dist.Beta(z.exp(), 2.0),
    "Uniform": lambda z: dist.Uniform(z, z + 1.0),
    "LogNormal": lambda z: dist.LogNormal(z, 1.0),
    "VonMises": lambda z: dist.VonMises(z, 2.0),
    "Binomial": lambda z: dist.Binomial(5, logits=z),
    "Geometric": lambda z: dist.Geometric(logits=z),
    "Mixture": lambda z: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(*z.shape, 2)),
        dist.Normal(torch.stack([z, -z], -1), 1.0),
    ),
}


def test_every_likelihood_is_tested():
    public = {name for name in pv.likelihoods.__all__ if "decoder" in parameters_of(name)}
    assert public - {"Likelihood"} == LIKELIHOODS.keys()


def parameters_of(name):
    return inspect.signature(getattr(pv.likelihoods, name)).parameters


def check(whole, masked, z):
    """Compare density and gradients with the sum over the observed numbers."""
    x = whole.sample()
    missing = torch.rand(x.shape) < 0.4
    missing[0], missing[1] = True, False
    log_prob = whole.base_dist.log_prob(x)  # while whole may be one fused function
    expected = torch.where(missing, 0.0, log_prob).sum(-1)
    for value in (torch.nan, torch.inf):
        found = masked.log_prob(x.masked_fill(missing, value))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(each.sum(), z, retain_graph=True)[0] for each in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours[0] == 0).all()
    wider = masked.expand((2, 6))
    assert (wider.batch_shape, wider.event_shape) == ((2, 6), (4,))
    torch.testing.assert_close(wider.log_prob(x.masked_fill(missing, value))[1], found)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_of_the_observed_numbers(name):
    likelihood, z = LIKELIHOODS[name](), torch.randn(6, 4, requires_grad=True)
    check(likelihood(z), pv.likelihoods.NanMasked(likelihood)(z), z)


@pytest.mark.parametrize("name", OTHERS)
def test_density_of_the_observed_numbers(name):
    z = torch.randn(6, 4, requires_grad=True)
    whole = OTHERS[name](z).to_event(1)
    check(whole, pv.distributions.NanMasked(whole), z)
    assert pv.distributions.NanMasked(whole.base_dist, 1).event_shape == (4,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("name", ["Bernoulli", "Poisson", "Normal", "Categorical"])
def test_integers_are_scored_as_without_a_mask(name, dtype):
    likelihood, z = LIKELIHOODS[name](), torch.randn(6, 4)
    x = torch.randint(0, 2, (6, 4)).to(dtype)
    found = pv.likelihoods.NanMasked(likelihood)(z).log_prob(x)
    torch.testing.assert_close(found, likelihood(z).log_prob(x))


def test_observed_numbers_outside_the_support_are_refused():
    p = pv.distributions.NanMasked(dist.Bernoulli(torch.full((2,), 0.5), validate_args=True), 1)
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor([torch.nan, 2.0]))


def test_dependent_numbers_are_refused():
    with pytest.raises(ValueError, match=r"MultivariateNormal .* NanMaskedMultivariateNormal"):
        pv.distributions.NanMasked(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pytest.raises(ValueError, match=r"got a Dirichlet of event shape \(3,\)"):
        pv.distributions.NanMasked(dist.Dirichlet(torch.ones(2, 3)).to_event(1))
    normal = pv.likelihoods.Normal(nn.Identity(), pv.likelihoods.OptimalScale())
    with pytest.raises(ValueError, match=r"Normal with an OptimalScale .* SharedScale"):
        pv.likelihoods.NanMasked(normal)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 4)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_encoder_reads_zeros_and_the_mask(shape, with_mask):
    x = torch.randn(shape)
    missing = torch.rand(shape) < 0.5
    net = pv.nets.ZeroImputed(nn.Identity(), with_mask)
    found = net(x.masked_fill(missing, torch.nan))
    filled = x.masked_fill(missing, 0.0)
    assert torch.equal(found, torch.cat([filled, (~missing).float()], 1) if with_mask else filled)
    whole = torch.randint(0, 5, shape)
    assert torch.equal(net(whole)[:, : shape[1]], whole)
