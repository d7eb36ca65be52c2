"""Validation switches are restored, and distributions made before a fit can be captured."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from pyro import infer, poutine
from torch.distributions import Distribution

import pyro_vae as pv
from pyro_vae._utils.value_checks import values_checked


def switches():
    modules = (dist, infer, poutine)
    return [Distribution._validate_args, *(m.is_validation_enabled() for m in modules)]


@pytest.fixture(params=[(False, True), (True, False)], ids=str)
def before(request):
    """Set the validation switches of torch and Pyro, as a user may, and yield them."""
    pyro.enable_validation(request.param[1])
    Distribution.set_default_validate_args(request.param[0])
    yield switches()
    pyro.enable_validation(True)


def failing(x):
    raise ArithmeticError


CALLS = {
    "fit": lambda m, g, x: pv.fit(m, g, x, validation=x, epochs=2, batch_size=25, progress=False),
    "evidence": lambda m, g, x: pv.evidence(m, g, x, num_particles=3),
    "surgery": pv.elbo_surgery,
    "compare": lambda m, g, x: pv.compare({"a": (m, g)}, x, num_particles=3),
    "reconstruct": pv.reconstruct,
    "generate": lambda m, g, x: pv.generate(m, x),
    "decode": lambda m, g, x: pv.decode(m, x[:, :2], x=x),
    "interpolate": lambda m, g, x: pv.interpolate(m, g, x[:2], x[2:4]),
    "to_arviz": lambda m, g, x: pv.to_arviz(m, g, x, num_draws=2),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_restore_validation_switches(call, before, binary):
    CALLS[call](*make_pair(), binary)
    assert switches() == before


@pytest.mark.parametrize("call", CALLS)
def test_errors_restore_validation_switches(call, before, binary):
    model, guide = make_pair()
    guide(binary)
    model.likelihood.decoder.register_forward_hook(lambda *_: failing(None))
    with pytest.raises(ArithmeticError):
        CALLS[call](model, guide, binary)
    assert switches() == before


def test_nested_blocks_restore_validation_switches(before):
    with values_checked(False):
        assert switches() == [False] * 4
        with values_checked(True):
            assert switches() == [True] * 4
            with pytest.raises(ArithmeticError), values_checked(False):
                failing(None)
            assert switches() == [True] * 4
        assert switches() == [False] * 4
    assert switches() == before


def test_values_checked_respects_validate_args():
    prior = dist.Normal(torch.zeros(2), 1.0).expand([3, 2]).to_event(1)
    outside = torch.full((2,), torch.nan)
    with values_checked(False):
        prior.log_prob(outside)
        dist.Normal(torch.zeros(2), -torch.ones(2))
        asks = dist.Normal(torch.zeros(2), 1.0, validate_args=True)
        for each in (asks, asks.expand([3, 2])):
            with pytest.raises(ValueError, match="within the support"):
                each.log_prob(outside)
    with pytest.raises(ValueError, match="within the support"):
        prior.log_prob(outside)
    unchecked = dist.Normal(0.0, 1.0, validate_args=False)
    with values_checked(True):
        unchecked.log_prob(torch.tensor(torch.nan))


def by_expand():
    return dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def by_argument():
    return dist.Normal(torch.zeros(2), torch.ones(2), validate_args=True).to_event(1)


def mixture():
    kinds = dist.Categorical(torch.ones(3)).expand([])
    return dist.MixtureSameFamily(kinds, dist.Normal(0.0, 1.0).expand([3, 2]).to_event(1))


def transformed():
    transform = torch.distributions.AffineTransform(0.5, 2.0)
    return dist.TransformedDistribution(by_expand().base_dist.expand([2]), [transform]).to_event(1)


class WithPyroSample(pyro.nn.PyroModule):
    def __init__(self, prior):
        super().__init__()
        self.z = pyro.nn.PyroSample(prior)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.z, 1.0).to_event(1), obs=x)


def with_a_function(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model


def with_a_factor(prior):
    """The program itself computes the log-density; no site has this distribution."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("prior", prior.log_prob(z))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model


def guide(x):
    slope = pyro.param("slope", torch.ones(2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 1.0).to_event(1))


def kinds_of_priors():
    """Yield all combinations. By default, run each program and each prior."""
    programs = (with_a_function, WithPyroSample, with_a_factor)
    for make, prior in itertools.product(programs, (by_expand, by_argument, mixture, transformed)):
        default = prior is by_expand or make is with_a_function
        yield pytest.param(make, prior, marks=() if default else pytest.mark.slow)


@pytest.mark.parametrize(("make", "prior"), list(kinds_of_priors()))
def test_a_prior_made_once_is_captured(make, prior, without_compiler):
    def run(capture):
        torch.manual_seed(0)
        model, x = make(prior()), torch.randn(60, 2)
        fit = pv.fit(model, guide, x, epochs=4, batch_size=20, seed=0, capture=capture,
                     progress=False)  # fmt: skip
        evidence = pv.evidence(model, guide, x, num_particles=20, seed=0, capture=capture)
        return fit, evidence

    (fit, evidence), (eager, expected) = run(True), run(False)
    assert fit.execution == "captured, not compiled"
    assert fit.history.loss.values == pytest.approx(eager.history.loss.values, rel=1e-5)
    assert evidence.mean == pytest.approx(expected.mean, rel=1e-5)


@pytest.mark.parametrize(
    ("x_given", "reason"),
    [
        (
            lambda z: dist.Poisson(z.exp(), is_sparse=True),
            r"a shape depends on values of tensors \(site 'x', test_validating.py, line \d+\)",
        ),
        (
            lambda z: dist.Poisson(z.exp(), validate_args=True),
            r"control flow depends on values of tensors \(test_validating.py, line \d+\)",
        ),
    ],
    ids=["in a density", "in the program"],
)
def test_a_refused_capture_names_the_line_of_the_program(x_given, reason, without_compiler):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", x_given(z).to_event(1), obs=x)

    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(2, [4]))
    with pytest.warns(UserWarning, match=reason):
        pv.fit(model, guide, torch.ones(60, 2), epochs=3, batch_size=20, capture=True,
               progress=False)  # fmt: skip
