"""A guide that draws outside the model's support: such draws have no weight."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import objectives

# Priors of a latent, a Gaussian guide's location and scale, and ends for the quadrature.
PRIORS = {
    "exponential": (dist.Exponential(3.0), 0.4, 0.5, (0.0, 12.0)),
    "gamma": (dist.Gamma(2.0, 3.0), 0.6, 0.6, (0.0, 12.0)),
    "half-normal": (dist.HalfNormal(1.0), 0.5, 0.7, (0.0, 9.0)),
    "log-normal": (dist.LogNormal(-0.5, 0.5), 0.6, 0.5, (0.0, 15.0)),
    "uniform": (dist.Uniform(-1.0, 1.0), 0.2, 0.8, (-1.0, 1.0)),
    "beta": (dist.Beta(2.0, 3.0), 0.4, 0.4, (0.0, 1.0)),
    "von Mises": (dist.VonMises(1.5, 4.0), 1.5, 0.8, (-torch.pi, torch.pi)),
    "pareto": (dist.Pareto(1.0, 3.0), 1.5, 0.6, (1.0, 400.0)),
    "wider uniform": (dist.Uniform(-1.0, 1.0), None, 1.3, (-1.0, 1.0)),
}


def pair(name):
    prior, loc, scale, _ = PRIORS[name]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        q = dist.Uniform(-scale, scale) if loc is None else dist.Normal(loc, scale)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return model, guide


def log_evidence(name, x):
    """By quadrature over the support, at the middles of 400,000 intervals."""
    prior, _, _, (low, high) = PRIORS[name]
    width = (high - low) / 40_000
    z = low + (torch.arange(40_000, dtype=torch.float64) + 0.5) * width
    log_joint = prior.log_prob(z) + dist.Normal(z, 1.0).log_prob(x.double()[:, None])
    return log_joint.logsumexp(-1) + torch.tensor(width).log()


@pytest.mark.filterwarnings("ignore::pyro_vae.UnreliableEvidence")
@pytest.mark.parametrize("name", PRIORS)
def test_evidence_is_that_of_quadrature(name):
    model, guide = pair(name)
    x = torch.rand(10)
    exact = log_evidence(name, x)
    ways = [{"capture": False}, {"vectorize_particles": False}]
    if name == "exponential":
        ways.append({"capture": True})
    for options in ways:
        count = 100 if "vectorize_particles" in options else 5000
        found = pv.evidence(model, guide, x, num_particles=count, batch_size=5, seed=0, **options)
        # Ten values of one seed: 5 standard errors, and what a ratio of few draws is biased by.
        allowed = 5 * found.monte_carlo_errors + found.monte_carlo_errors.square()
        assert ((found.values - exact).abs() < allowed + 1e-4).all(), options


@pytest.mark.parametrize("name", PRIORS)
def test_weights_are_zero_outside_and_as_ever_inside(name):
    model, guide = pair(name)
    prior, _, _, (low, high) = PRIORS[name]
    t = pv.terms(model, guide, torch.rand(200), num_particles=20)
    z = t.samples["z"]
    inside = (z >= low) & (z <= (torch.inf if name in _UNBOUNDED else high))
    assert 0 < (~inside).sum() < z.numel()
    assert (t.log_prior[~inside] == -torch.inf).all()
    torch.testing.assert_close(t.log_prior[inside], prior.log_prob(z[inside]))
    bound = objectives.IWAE(20).differentiable_loss(model, guide, torch.rand(20))
    assert bound.isfinite()
    assert objectives.ELBO(50).loss(model, guide, torch.rand(200)) == torch.inf


_UNBOUNDED = ("exponential", "gamma", "half-normal", "log-normal", "pareto")


def test_gradients_of_what_is_inside_are_finite():
    loc = torch.tensor(0.4, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.6))

    objectives.IWAE(50).differentiable_loss(model, guide, torch.rand(40)).backward()
    assert loc.grad.isfinite()


@pytest.mark.parametrize("name", ["exponential", "uniform", "von Mises"])
def test_a_fit_names_the_latent(name):
    model, guide = pair(name)
    with pytest.raises(ValueError, match=r"'z' has a log-density of -inf.*guides of the library"):
        pv.fit(model, guide, torch.rand(300), epochs=1, batch_size=300, progress=False)


def test_guides_of_the_library_and_of_pyro_stay_inside():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(3.0))
            w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(z + w[..., 0], 1.0), obs=x)

    x = torch.rand(50)
    encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), pv.nets.MLP(1, [4]))
    for guide in (
        pv.guides.AmortizedNormal(model, encoder),
        pv.guides.AmortizedMultivariateNormal(model, encoder),
        pyro.infer.autoguide.AutoNormal(model),
    ):
        t = pv.terms(model, guide, x, num_particles=50)
        z, w = t.samples["z"], t.samples["w"]
        expected = dist.Exponential(3.0).log_prob(z) + dist.Dirichlet(torch.ones(3)).log_prob(w)
        torch.testing.assert_close(t.log_prior, expected)
