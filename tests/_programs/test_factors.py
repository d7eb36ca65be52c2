"""Models with a `pyro.factor`: what samples of the model are, and which samples it excludes.

Frequencies are compared at 4.5 standard errors: a false alarm in 10^5 comparisons.
"""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

ALL = {"enumerate": "parallel"}


def above(x, bound=1.0):
    """The prior of z is cut at a bound."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("above", torch.where(z < bound, -torch.inf, 0.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.reshape(len(x), -1)[:, 0], 0.5))


def with_component(x):
    """The factor gives the component c the odds 1 : 3 : 0, whatever its prior."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer=dict(ALL))
        odds = torch.tensor([1.0, 3.0, 0.0])
        pyro.sample("x", dist.Normal((z + 100.0 * c).unsqueeze(-1), 0.1).to_event(1), obs=x)
        pyro.factor("odds", odds[c].log())


SAMPLERS = {
    "generate": lambda model, x: pv.generate(model, x, seed=0),
    "generate a number": lambda model, x: pv.generate(model, 500, seed=0),
    "prior_holes": lambda _, x: pv.prior_holes(partial(above, bound=-9.0), guide, x, seed=0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_from_the_prior_warn_once_that_they_ignore_a_factor(name):
    with pytest.warns(UserWarning, match="the factor 'above', which is not a density") as found:
        SAMPLERS[name](above, torch.randn(500))
    assert len(found) == 1
    assert found[0].filename == __file__


def test_a_penalty_outside_of_the_plate_is_not_a_reason_to_warn():
    def penalized(x):
        weight = pyro.param("weight", torch.ones(()))
        pyro.factor("penalty", -weight.square())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.generate(penalized, torch.zeros(10), seed=0)


def test_decode_warns_only_if_it_samples_a_latent():
    def two(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.factor("ordered", torch.where(z < y, -torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x, z = torch.zeros(1), torch.ones(5)
    with pytest.warns(UserWarning, match="the factor 'ordered'"):
        pv.decode(two, {"z": z}, x=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pv.decode(two, {"z": z, "y": 0 * z}, x=x), z)
        assert torch.equal(pv.decode(above, z, x=x), z)
        pv.decode(with_component, z, x=torch.zeros(1, 1))


def test_components_that_are_summed_out_have_the_odds_of_their_factor():
    torch.manual_seed(0)
    x = torch.rand(400, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        means = pv.reconstruct(with_component, guide, x)
        decoded = pv.decode(with_component, x[:, 0], x=x)
        t = pv.terms(with_component, guide, x)
        drawn = t.predict()["x"]
    assert torch.allclose(decoded, x + 75.0, atol=1e-3)
    assert ((means - x - 75.0).abs() < 5.0).all()  # z is a sample with a standard deviation of 0.5
    component = (drawn[0, :, 0] / 100.0).round()
    assert set(component.unique().tolist()) == {0.0, 1.0}
    error = (0.75 * 0.25 / len(x)) ** 0.5
    assert abs(component.mean() - 0.75) < 4.5 * error


def test_a_factor_of_components_in_an_inner_plate_is_not_counted_and_warned_of():
    def words(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", 3, dim=-1):
                c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer=dict(ALL))
                pyro.factor("first", torch.where(c > 0, -torch.inf, 0.0))
                pyro.sample("x", dist.Normal(100.0 * c, 0.1), obs=x)

    def guide_of_words(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))

    with pytest.warns(UserWarning, match="the factor 'first'"):
        pv.reconstruct(words, guide_of_words, torch.zeros(4, 3))
