"""Gradients where a parameter is exactly at a bound, or where one formula replaces another."""

import math

import pytest
import torch

import pyro_vae as pv
from pyro_vae._utils.numerics import split_at, within
from pyro_vae.distributions import _continuous_bernoulli as continuous_bernoulli
from pyro_vae.distributions._casting import _log_half_step
from pyro_vae.distributions._circular import WrappedNormal
from pyro_vae.likelihoods._counts import _stirling_rest


def quantile(logit, share):
    p = pv.likelihoods.ContinuousBernoulli(torch.nn.Identity())(logit[None])
    return p.base_dist.icdf(logit.new_tensor([share])).sum()


AT_A_CHANGE_OF_FORMULA = {
    "wrapped normal": (lambda s: WrappedNormal(0.3, s).log_prob(torch.tensor(0.9)), 1.8),
    "Student's t": (_log_half_step, 50.0),
    "counts": (lambda x: _stirling_rest(x, x.log()), 32.0),
    "counts, end of the change": (lambda x: _stirling_rest(x, x.log()), 33.0),
    "mass": (continuous_bernoulli.log_mass, 0.1),
    "mass, negative": (continuous_bernoulli.log_mass, -0.1),
    "mean": (continuous_bernoulli.mean, 0.1),
    "variance": (continuous_bernoulli.variance, 0.5),
    "quantile": (lambda logit: quantile(logit, 0.3), 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_A_CHANGE_OF_FORMULA)
def test_gradient_at_a_change_of_formula_is_that_beside_it(name):
    function, place = AT_A_CHANGE_OF_FORMULA[name]
    slopes = []
    for x in (place, place * (1 + 1e-6), place * (1 - 1e-6)):
        x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        slopes.append(torch.autograd.grad(function(x), x)[0].item())
    assert slopes[0] != 0
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)
    assert slopes[0] == pytest.approx(slopes[2], rel=1e-3)


def test_pseudo_inputs_at_their_bounds_are_learned():
    """Rows of binary data are all at the bounds."""
    torch.manual_seed(0)
    rows = torch.bernoulli(torch.full((5, 16), 0.5))
    model = pv.LatentVariableModel(
        pv.priors.VampPrior(2, pseudo_inputs=rows),
        pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
    model.prior.bind_guide(guide)
    model.prior().log_prob(torch.randn(20, 2)).sum().backward()
    assert (model.prior.pseudo_inputs.grad != 0).all()


def test_within_clamps_values_and_their_gradient():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, math.nan], requires_grad=True)
    found = within(x, 0.0, 1.0)
    torch.testing.assert_close(found, x.clamp(0, 1), equal_nan=True)
    found.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 1]


def test_parts_are_x_on_their_side_and_the_bound_on_the_other():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    below, above, is_below = split_at(2.0, x)
    assert below.tolist() == [1, 2, 2]
    assert above.tolist() == [2, 2, 3]
    assert is_below.tolist() == [True, False, False]
    assert torch.autograd.grad(below.sum(), x, retain_graph=True)[0].tolist() == [1, 0, 0]
    assert torch.autograd.grad(above.sum(), x)[0].tolist() == [0, 1, 1]
