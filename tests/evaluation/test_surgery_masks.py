"""ELBO surgery of programs with masked latents: the masks are the same for all data points."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv

N, K = 60, 200
KEPT = torch.tensor([True, False, True, False])


def pair_of(way, masks=lambda x: KEPT, size=4):
    """z_j ~ N(0, 1) and x_j ~ N(z_j, 1) for four numbers, of which some are masked.

    Args:
        way: how the programs mask z and x.
        masks: returns the mask, given x. None has no mask.
        size: the number of latents.
    """
    scale = torch.linspace(0.4, 0.9, 4)

    def numbers(x, name, loc, scale, obs=None):
        if masks is None:
            return pyro.sample(name, dist.Normal(loc, scale).to_event(1), obs=obs)
        mask = masks(x)
        if way == "event":
            fn = dist.Normal(loc, scale).mask(mask)
            return pyro.sample(name, fn.to_event(1), obs=obs)
        with pyro.plate(f"numbers of {name}", size, dim=-1), poutine.mask(mask=mask):
            return pyro.sample(name, dist.Normal(loc, scale), obs=obs)

    def plate(x):
        return pyro.plate("cells", len(x), dim=-2 if way == "plate" else -1)

    def model(x):
        with plate(x):
            z = numbers(x, "z", torch.zeros(size), torch.ones(size))
            numbers(x, "x", z, 1.0, obs=x)

    def guide(x):
        spread = scale if x.shape[-1] == 4 else scale[KEPT]
        with plate(x):
            numbers(x, "z", 0.7 * x, spread)

    return model, guide


@pytest.mark.parametrize("way", ["plate", "event"])
def test_masked_latents_do_not_count(way):
    x = torch.randn(N, 4)
    found = pv.elbo_surgery(*pair_of(way), x, num_particles=K, seed=0, batch_size=25)
    expected = pv.elbo_surgery(*pair_of("event", None, size=2), x[:, KEPT], num_particles=K, seed=1)
    # The same posteriors, so only the samples differ: K of them for each data point. A log-ratio
    # of two densities has a variance below two for each of the two numbers.
    error = math.sqrt(2 * 4 / (N * K))
    assert found.mutual_information == pytest.approx(expected.mutual_information, abs=4 * error)
    assert found.rate == pytest.approx(expected.rate, abs=4 * error)
    assert found.marginal_kl == pytest.approx(expected.marginal_kl, abs=4 * error)
    unmasked = pv.elbo_surgery(*pair_of("event", None), x, num_particles=K, seed=1)
    assert unmasked.mutual_information > expected.mutual_information + 8 * error


@pytest.mark.parametrize("way", ["plate", "event"])
@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
def test_estimators_of_minibatches_take_constant_masks(way, estimator):
    x = torch.randn(N, 4)
    surgery = pv.elbo_surgery(*pair_of(way), x, estimator=estimator, seed=0, batch_size=20)
    assert math.isfinite(surgery.mutual_information)


def of_rows(x):
    return x > 0


def of_later_rows(x):
    return KEPT.expand(x.shape) | (x.sum(-1, keepdim=True) > 1000)


@pytest.mark.parametrize("way", ["plate", "event"])
@pytest.mark.parametrize("masks", [of_rows, of_later_rows], ids=["all", "later"])
def test_masks_that_differ_between_data_points_are_refused(way, masks):
    x = torch.randn(N, 4)
    x[-1] = 1000.0
    with pytest.raises(ValueError, match="'z' has a mask that differs between data points"):
        pv.elbo_surgery(*pair_of(way, masks), x, batch_size=20, seed=0)


def test_a_mask_that_differs_between_minibatches_is_refused():
    def masks(x):
        return KEPT if len(x) == 40 else ~KEPT

    with pytest.raises(ValueError, match="'z' has a mask that differs between data points"):
        pv.elbo_surgery(*pair_of("event", masks), torch.randn(N, 4), batch_size=40, seed=0)


@pytest.mark.parametrize("way", ["plate", "event"])
def test_samples_of_the_prior_have_the_masks_of_the_model(way):
    """An estimate from the prior of two masked and two other numbers has a closed form."""
    x = torch.randn(5, 4)
    model, guide = pair_of(way)
    estimate = pv.evidence(model, guide, x, method="naive", num_particles=20_000, seed=0)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x[:, KEPT]).sum(-1)
    errors = estimate.monte_carlo_errors
    assert ((estimate.values - exact).abs() < 4.5 * errors).all()  # false alarm: 3e-5
