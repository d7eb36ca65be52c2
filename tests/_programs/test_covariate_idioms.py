"""Idioms of published programs: covariates beside latents, plates of rows, plain dimensions."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import objectives

N, D = 7, 3


def joined(z, y):
    """Join a latent and a covariate, which must have as many dimensions."""
    return torch.cat([z, y], -1)


def broadcast(z, y):
    """Join a latent and a covariate, which is expanded to the latent's dimensions."""
    return torch.cat([z, y.expand(*z.shape[:-1], y.shape[-1])], -1)


@pytest.mark.parametrize("join", [joined, broadcast])
@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.filterwarnings("ignore:model and guide cannot run with a leading dimension")
def test_covariate_beside_a_latent(join, num_particles):
    """As in a conditional VAE; x = z + y + noise, so p(x|y) is a Gaussian."""
    weights = torch.cat([torch.eye(D), torch.eye(D)])

    def model(x, y):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(join(z, y) @ weights, 1.0).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal((x - y) / 2, 0.5**0.5).to_event(1))

    x, y = torch.randn(N, D), torch.randn(N, D)
    exact = dist.Normal(y, 2**0.5).log_prob(x).sum(-1)
    t = pv.terms(model, guide, x, y, num_particles=num_particles)
    torch.testing.assert_close(t.log_weight, exact.expand(num_particles, N))
    found = pv.evidence(model, guide, (x, y), num_particles=num_particles, batch_size=3, seed=0)
    torch.testing.assert_close(found.values, exact.double(), atol=1e-4, rtol=0.0)
    container = pv.to_arviz(model, guide, (x, y), num_draws=300, seed=0)
    drawn = torch.as_tensor(container["posterior_predictive"]["x"].values)[0]
    expected = (x - y) / 2 + y
    assert ((drawn.mean(0) - expected).abs() < 6 * 1.5**0.5 / 300**0.5).all()


def factors(x):
    """A plate at dimension -2; the dimension of the factors belongs to no plate."""
    with pyro.plate("spots", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, D), 1.0))
        size = pyro.sample("size", dist.Normal(torch.zeros(1, 1), 1.0))
        pyro.sample("x", dist.Normal(z + size, 1.0), obs=x)


def posterior_of_factors(x):
    """The exact posterior: first of the common size, then of the factors."""
    variance = 1 / (1 + D / 2)
    with pyro.plate("spots", x.shape[0], dim=-2):
        loc = variance * x.sum(-1, keepdim=True) / 2
        size = pyro.sample("size", dist.Normal(loc, variance**0.5))
        pyro.sample("z", dist.Normal((x - size) / 2, 0.5**0.5))


def log_evidence_of_factors(x):
    covariance = 2 * torch.eye(D) + torch.ones(D, D)
    return dist.MultivariateNormal(torch.zeros(D), covariance).log_prob(x)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_dimension_without_a_plate_is_part_of_a_data_point(num_particles):
    x = torch.randn(N, D)
    exact = log_evidence_of_factors(x)
    t = pv.terms(factors, posterior_of_factors, x, num_particles=num_particles)
    torch.testing.assert_close(t.log_weight, exact.expand(num_particles, N))
    assert {name: tuple(z.shape) for name, z in t.samples.items()} == {
        "z": (num_particles, N, D),
        "size": (num_particles, N),
    }
    torch.testing.assert_close(t.observations["x"], x)
    found = pv.evidence(factors, posterior_of_factors, x, num_particles=2, batch_size=5, seed=0)
    torch.testing.assert_close(found.values, exact.double(), atol=1e-4, rtol=0.0)
    elbo = pv.elbo_surgery(factors, posterior_of_factors, x, seed=0).elbo
    assert elbo == pytest.approx(exact.mean().item(), abs=1e-4)
    container = pv.to_arviz(factors, posterior_of_factors, x, num_draws=5, seed=0)
    assert container["observed_data"]["x"].shape == (N, D)


def test_library_guides_sample_a_dimension_without_a_plate():
    x = torch.randn(40, D)
    guide = pv.guides.AmortizedMultivariateNormal(factors, encoder=torch.nn.Identity())
    options = {"epochs": 150, "batch_size": 40, "learning_rate": 0.05, "capture": False}
    fit = pv.fit(factors, guide, x, seed=0, progress=False, **options)
    # A linear Gaussian guide contains the exact posterior.
    exact = -log_evidence_of_factors(x).mean().item()
    last = fit.history.loss.iloc[-20:]
    assert last.mean() == pytest.approx(exact, abs=0.2)
    found = pv.evidence(factors, guide, x, num_particles=500, capture=False, seed=0)
    errors = (found.values - log_evidence_of_factors(x)).abs()
    assert (errors < 6 * found.monte_carlo_errors + 1e-3).all()


def test_dimension_as_long_as_the_minibatch_needs_a_plate():
    """It could hold data points: a sum over the last dimension moves them there."""

    def model(x):
        spots = pyro.plate("spots", x.shape[0], dim=-2)
        with spots, pyro.plate("genes", D, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with spots:
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)  # without keepdim=True

    def guide(x):
        with pyro.plate("spots", x.shape[0], dim=-2), pyro.plate("genes", D, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"site 'x'.*no plate at its dimension -1"):
        pv.terms(model, guide, torch.randn(N, 1))
    with pytest.raises(ValueError, match=r"no plate at its dimension -1.*rows, 3,.*batch size"):
        objectives.ELBO().loss(factors, posterior_of_factors, torch.randn(D, D))


@pytest.mark.parametrize("role", ["model", "guide"])
def test_errors_of_torch_name_the_program(role):
    """A message of torch names neither the program nor the data, so that both are added."""
    wrong = {"model": 1, "guide": 1, role: 2}

    def model(x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.repeat(wrong["model"]), torch.ones(len(x))), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(x.repeat(wrong["guide"]), torch.ones(len(x))))

    def refuses(x):
        raise ValueError("the program wants other data")

    message = rf"the {role} cannot run on data x of shape \(7,\) and dtype torch.float32: \w+"
    with pytest.raises(ValueError, match=message):
        pv.evidence(model, guide, torch.randn(N))
    pair = {"model": model, "guide": guide, role: refuses}
    wrong[role] = 1
    with pytest.raises(ValueError, match=rf"the {role} cannot run.*the program wants other data"):
        pv.evidence(pair["model"], pair["guide"], torch.randn(N))
