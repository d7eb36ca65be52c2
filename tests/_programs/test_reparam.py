"""Models under ``poutine.reparam``: the replaced site is a function, not an observation."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, TransformReparam

import pyro_vae as pv
from pyro_vae import objectives

N = 12


def decentered(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.5, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def transformed(x):
    """The transform is a shift, so that x is still Gaussian."""
    shift = dist.transforms.AffineTransform(0.5, 2.0)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [shift]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# Each model, its reparameterized program, and the latent of that program: a standard Gaussian.
CASES = {
    "LocScaleReparam": (decentered, LocScaleReparam(0.0), "z_decentered"),
    "TransformReparam": (transformed, TransformReparam(), "z_base"),
}


@pytest.fixture(params=CASES)
def case(request):
    """A reparameterized model, its exact posterior, the name of its latent, and x."""
    model, reparam, name = CASES[request.param]
    reparameterized = poutine.reparam(model, config={"z": reparam})

    def guide(x):
        with pyro.plate("data", len(x)):  # x = 0.5 + 2 u + noise
            pyro.sample(name, dist.Normal(2 * (x - 0.5) / 5, 0.2**0.5))

    return reparameterized, guide, name, 0.5 + 5**0.5 * torch.randn(N)


def exact(x):
    return dist.Normal(0.5, 5**0.5).log_prob(x)


def test_only_x_is_observed(case):
    model, guide, name, x = case
    t = pv.terms(model, guide, x, num_particles=3)
    assert list(t.samples) == [name]
    assert list(t.observations) == ["x"]
    torch.testing.assert_close(t.log_weight, exact(x).expand(3, N))
    torch.testing.assert_close(t.observations["x"], x)


def test_arviz(case):
    model, guide, name, x = case
    container = pv.to_arviz(model, guide, x, num_draws=400, seed=0)
    assert list(container["posterior"].data_vars) == [name]
    assert list(container["observed_data"].data_vars) == ["x"]
    (predicted,) = container["posterior_predictive"].data_vars.values()
    predicted = torch.as_tensor(predicted.values)[0]
    # x' given x: 0.5 + 2 u + noise, with u from the posterior
    expected = 0.5 + 2 * 2 * (x - 0.5) / 5
    error = (4 * 0.2 + 1.0) ** 0.5 / 400**0.5
    assert ((predicted.mean(0) - expected).abs() < 5 * error).all()


def test_sandwich(case):
    model, guide, _, _ = case
    ais = pv.evaluation.AIS(num_chains=3, num_temperatures=4, leapfrog_steps=1, step_size=0.1)
    like = torch.zeros(10)
    bounds = pv.sandwich(model, guide, like=like, ais=ais, capture=False, seed=0)
    # The guide is the exact posterior of the simulated data, too.
    truth = exact(bounds.data[0]).double()
    for bound in (bounds.lower, bounds.upper):
        torch.testing.assert_close(bound, truth, atol=1e-4, rtol=0.0)


def test_sleep_update(case):
    """The sleep update is the gradient of log q at samples of the model."""
    model, _, name, x = case
    gain = torch.tensor(0.1, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(name, dist.Normal(gain * (x - 0.5), 1.0))

    objective = objectives.ReweightedWakeSleep(num_particles=2, wake=0.0, sleep=1.0)
    slopes = []
    for _ in range(300):
        gain.grad = None
        objective.differentiable_loss(model, guide, x).backward()
        slopes.append(gain.grad / N)
    slopes = torch.stack(slopes)
    # -d/dg E log N(u; g (x - 0.5), 1) = g E (x - 0.5)^2 - E u (x - 0.5) = 5 g - 2
    assert abs(slopes.mean() - (5 * 0.1 - 2)) < 5 * slopes.std() / 300**0.5


def test_generated_data(case):
    model = case[0]
    rows = pv.generate(model, torch.zeros(2000), seed=0)
    assert abs(rows.mean() - 0.5) < 5 * 2 / 2000**0.5
    assert abs(rows.std() - 2) < 5 * 2 / 4000**0.5
