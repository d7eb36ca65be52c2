"""Compare each family's gap on a correlated Gaussian posterior with its closed form."""

import functools

import pytest
import torch
from oracles import LinearGaussian
from torch import nn

import pyro_vae as pv
from pyro_vae import flows, guides


def flow(layer, length):
    return functools.partial(guides.AmortizedFlow, flow=layer, length=length)


RICH = {
    "full covariance": guides.AmortizedMultivariateNormal,
    "low rank": functools.partial(guides.AmortizedLowRankNormal, rank=2),
    "householder": flow(flows.Householder, 2),
    "inverse autoregressive": flow(flows.InverseAutoregressive, 2),
    "masked autoregressive": flow(flows.MaskedAutoregressive, 2),
    "affine coupling": flow(flows.AffineCoupling, 3),
    "sylvester": flow(flows.Sylvester, 4),
    "planar": flow(flows.Planar, 16),
    "spline": flow(flows.NeuralSpline, 2),
    "radial": flow(flows.Radial, 16),
}
SLOW = {"affine coupling", "masked autoregressive", "sylvester", "planar", "spline", "radial"}
LONG = {"low rank", "inverse autoregressive", "householder"}  # seconds each


def gap_after_training(make, steps):
    """Return the mean KL(q || posterior), its standard error, and the mean-field gap."""
    torch.manual_seed(3)
    weight = 2 * torch.randn(4, 2)
    weight[:, 1] = weight[:, 0] + 0.3 * weight[:, 1]  # correlates the posterior
    oracle = LinearGaussian(weight=weight, noise=0.3, dtype=torch.float32)
    x = oracle.sample(20_000)
    guide = make(oracle.model, nn.Identity())
    pv.fit(
        oracle.model,
        guide,
        x,
        objective=pv.objectives.ELBO(4),
        epochs=steps // 100,
        batch_size=200,
        learning_rate=0.01,
        scheduler=functools.partial(
            torch.optim.lr_scheduler.CosineAnnealingLR, T_max=max(1, steps // 100)
        ),
        clip_norm=10.0,
        seed=0,
        progress=False,
    )
    test = oracle.sample(500)
    with torch.no_grad():
        elbo = pv.terms(oracle.model, guide, test, num_particles=400).log_weight.double().mean(0)
    gaps = oracle.log_evidence(test) - elbo
    return gaps.mean().item(), (gaps.std() / 500**0.5).item(), oracle.gap


def test_mean_field_gap_matches_its_closed_form():
    gap, error, expected = gap_after_training(guides.AmortizedNormal, 1000)
    assert expected > 0.3
    assert abs(gap - expected) < 4 * error + 0.01 * expected


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW | LONG else n for n in RICH]
)
def test_richer_families_close_the_gap(name):
    gap, error, of_mean_field = gap_after_training(RICH[name], 8000 if name in SLOW else 1200)
    assert gap < 0.01 * of_mean_field + 4 * error
    assert gap > -4 * error
