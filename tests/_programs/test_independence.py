"""Estimators of log p(x) refuse programs whose data points depend on each other's latents."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn

import pyro_vae as pv


@pytest.fixture
def x():
    return torch.randn(8, 3)


def pair_of(mix=lambda z: z, mix_in_guide=lambda z: z):
    """A pair with two latents; functions of the latents may combine rows."""
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(mix(u), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(mix(z)), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(encoder(x), 0.5).to_event(1))
            pyro.sample("z", dist.Normal(mix_in_guide(u), 0.5).to_event(1))

    return model, guide


MIXES = {
    "mean": lambda z: z - z.mean(-2, keepdim=True),
    "shift": lambda z: z.roll(1, -2),
    "cumulative": lambda z: z.cumsum(-2),
    "pairs": lambda z: torch.stack([z[..., ::2, :], z[..., ::2, :] + z[..., 1::2, :]], -2).flatten(
        -3, -2
    ),
    "attention": lambda z: (z @ z.mT).softmax(-1) @ z,
}


@pytest.mark.parametrize("call", [pv.evidence, pv.elbo_surgery, pv.collapse_report])
def test_rows_that_share_latents_in_the_model_are_refused(call, x):
    model, guide = pair_of(MIXES["mean"])
    with pytest.raises(ValueError, match=r"the model's site '[zx]' at one data point"):
        call(model, guide, x, seed=0)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("role", ["model", "guide"])
def test_any_operation_along_the_data_is_found_in_both_programs(role, mix, x):
    pair = pair_of(mix) if role == "model" else pair_of(mix_in_guide=mix)
    with pytest.raises(ValueError, match=rf"the {role}'s site '[zx]' at one data point"):
        pv.evidence(*pair, x, num_particles=5, seed=0)


def test_the_dimension_of_the_data_may_be_any(x):
    def model(x):
        with pyro.plate("cells", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("genes", 3, dim=-1):
                pyro.sample("x", dist.Normal(z.flip(-2), 1.0), obs=x)

    def guide(x):
        with pyro.plate("cells", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0))

    with pytest.raises(ValueError, match="the model's site 'x' at one data point"):
        pv.evidence(model, guide, x, num_particles=5, seed=0)


def test_statistics_of_the_data_alone_and_random_decoders_are_accepted(x):
    """Only latents make data points depend on each other, and other noise is not a latent."""
    center = x.mean(0)[:2]
    model, guide = pair_of(lambda z: z + center + 0.1 * torch.randn_like(z))
    assert pv.evidence(model, guide, x, num_particles=5, seed=0).values.isfinite().all()


def test_running_statistics_are_those_of_evaluation(x):
    """BatchNorm uses all rows in training mode, and none in evaluation mode."""
    norm = nn.BatchNorm1d(2)
    model, guide = pair_of(norm)
    assert pv.evidence(model, guide, x, num_particles=5, seed=0).values.isfinite().all()
    batch_only = nn.BatchNorm1d(2, track_running_stats=False)
    model, guide = pair_of(batch_only)
    with pytest.raises(ValueError, match="depends on the latents of other data points"):
        pv.evidence(model, guide, x, num_particles=5, seed=0)


def test_a_guide_that_cannot_score_given_values_is_no_obstacle(x):
    flow = T.planar(2)

    def plain_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.ones(2, 3), 1.0).to_event(1), obs=x)

    def mixing_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = MIXES["mean"](z) @ torch.ones(2, 3)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow", flow)
        base = dist.Normal(x[:, :2], 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    assert pv.evidence(plain_model, guide, x, num_particles=5, seed=0).values.isfinite().all()
    with pytest.raises(ValueError, match="the model's site 'x' at one data point"):
        pv.evidence(mixing_model, guide, x, num_particles=5, seed=0)


def test_a_single_data_point_depends_on_no_other():
    model, guide = pair_of(MIXES["mean"])
    x = torch.randn(1, 3)
    assert pv.evidence(model, guide, x, num_particles=5, seed=0).values.isfinite().all()
