"""Path gradients at held samples, for every guide and every Pyro flow."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from capturing import default_dtype
from guide_table import DENSITIES, Model, make
from oracles import LinearGaussian
from torch import nn

import pyro_vae as pv
from pyro_vae import objectives

PYRO_FLOWS = {
    "affine autoregressive": lambda: T.affine_autoregressive(3, [8]),
    "affine coupling": lambda: T.affine_coupling(3, hidden_dims=[8]),
    "block autoregressive": lambda: T.block_autoregressive(3, hidden_factors=[4]),
    "householder": lambda: T.householder(3, count_transforms=2),
    "neural autoregressive": lambda: T.neural_autoregressive(3, [8]),
    "planar": lambda: T.planar(3),
    "polynomial": lambda: T.polynomial(3, [8]),
    "radial": lambda: T.radial(3),
    "spline": lambda: T.spline(3),
    "spline autoregressive": lambda: T.spline_autoregressive(3, [8]),
    "spline coupling": lambda: T.spline_coupling(3, hidden_dims=[8]),
    "sylvester": lambda: T.sylvester(3),
}


class PyroFlow(nn.Module):
    """A Gaussian whose location depends on x, transformed by a Pyro flow."""

    def __init__(self, name):
        super().__init__()
        self.flow, self.head = PYRO_FLOWS[name](), nn.Linear(2, 3)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :2] + z[..., 2:], 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(self.head(x), 0.6).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


@pytest.mark.parametrize("name", PYRO_FLOWS)
def test_path_and_score_add_up_for_every_pyro_flow(name):
    """The gradient of the ELBO is the path gradient plus the score at a fixed sample."""
    torch.manual_seed(0)
    with default_dtype(torch.float64):  # Pyro's autoregressive inverses use it
        check_flow(PyroFlow(name), torch.randn(4, 2))


def check_flow(pair, x):
    parameters = [*pair.parameters()]

    def gradients(hold, reduce):
        torch.manual_seed(1)
        t = pv.terms(pair.model, pair.guide, x, hold_samples=hold)
        found = torch.autograd.grad(reduce(t), parameters, allow_unused=True)
        return t, [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]

    live, whole = gradients(False, lambda t: t.log_weight.sum())
    held, path = gradients(True, lambda t: t.path(torch.ones(1, 4).double()).sum())
    _, score = gradients(True, lambda t: -t.log_guide.sum())
    torch.testing.assert_close(held.log_guide, live.log_guide)
    for both, one, other in zip(whole, path, score, strict=True):
        torch.testing.assert_close(one + other, both, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_path_and_score_add_up_for_every_guide(name, num_particles):
    torch.manual_seed(0)
    model = Model(dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    guide = make(name, model, x, spread=2.0)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    weights = torch.rand(num_particles, 4, dtype=torch.float64)

    def gradients(hold, reduce):
        torch.manual_seed(1)
        t = pv.terms(model, guide, x, num_particles=num_particles, hold_samples=hold)
        found = torch.autograd.grad(reduce(t), parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]

    whole = gradients(False, lambda t: (weights * t.log_weight).sum())
    path = gradients(True, lambda t: t.path(weights).sum())
    score = gradients(True, lambda t: -(weights * t.log_guide).sum())
    for both, one, other in zip(whole, path, score, strict=True):
        torch.testing.assert_close(one + other, both, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("objective", [objectives.StickingTheLanding(), objectives.DReG(4)])
def test_path_gradient_is_zero_at_the_posterior(objective):
    """If q is the posterior, the log-weight of every sample is log p(x)."""
    torch.manual_seed(2)
    oracle = LinearGaussian(exact=True)
    x = oracle.sample(6)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    stretch = torch.ones((), dtype=torch.float64, requires_grad=True)

    def guide(x):
        mean = (x - oracle.mu) @ oracle.v.T + shift
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, stretch * oracle.s))

    loss = objective.differentiable_loss(oracle.model, guide, x)
    for gradient in torch.autograd.grad(loss, [shift, stretch]):
        assert gradient.abs().max() < 1e-9
    plain = objectives.ELBO().differentiable_loss(oracle.model, guide, x)
    assert max(g.abs().max() for g in torch.autograd.grad(plain, [shift, stretch])) > 0.1


def test_distribution_without_log_prob_is_refused():
    class Stuck(dist.Normal):
        def log_prob(self, value):
            raise NotImplementedError

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Stuck(x, 1.0))

    with pytest.raises(TypeError, match="cannot score"):
        objectives.StickingTheLanding().loss(model, guide, torch.randn(3))


def test_held_sample_is_scored_with_its_own_dropout_mask():
    """The density is that of the network that drew the sample, not of another mask."""
    torch.manual_seed(3)
    drop, head = nn.Dropout(0.5), nn.Linear(5, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.ones(2, 5), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(head(drop(x)), 1e-3).to_event(1))

    t = pv.terms(model, guide, torch.randn(50, 5), hold_samples=True)
    assert t.log_guide.min() > -30  # with another mask: about -1e5


@pytest.mark.parametrize("transform", ["planar", "radial", "sylvester"])
@pytest.mark.parametrize("objective", [objectives.DReG(3), objectives.StickingTheLanding(2)])
def test_pyro_flows_without_an_inverse_have_the_same_loss_without_gradients(transform, objective):
    flow = getattr(dist.transforms, transform)(2)
    loading, network = torch.randn(2, 5), nn.Linear(5, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loading, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("network", network)
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(network(x), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    x, found = torch.randn(40, 5), []
    objective.loss(model, guide, x)
    for loss in (objective.loss, objective.differentiable_loss):
        torch.manual_seed(0)
        found.append(float(loss(model, guide, x)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    fit = pv.fit(
        model, guide, x, objective=objective, validation=x, epochs=2, batch_size=20, progress=False
    )
    assert fit.history[["loss", "validation_loss"]].notna().all(None)
