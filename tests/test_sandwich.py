import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from oracles import LinearGaussian, assert_within

import pyro_vae as pv


def bounds(oracle, num_temperatures, start="prior", count=150, **options):
    ais = pv.AIS(20, num_temperatures, start, leapfrog_steps=4, step_size=0.35)
    like = torch.zeros(count, len(oracle.mu), dtype=oracle.dtype)
    return pv.sandwich(oracle.model, oracle.guide, like=like, ais=ais, seed=0, **options)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_two_sides_hold_the_truth_between_them(start):
    oracle = LinearGaussian(d=2, D=4, noise=0.2)
    result = bounds(oracle, 4, start)
    truth = oracle.log_evidence(result.data[0])
    below, above = truth - result.lower, result.upper - truth
    assert below.mean() > -4 * below.std() / 150**0.5
    assert above.mean() > -4 * above.std() / 150**0.5
    for ratio in ((-below).exp(), (-above).exp()):  # p(x) and 1/p(x) without bias
        assert_within(ratio.mean(), 1.0, ratio.std() / 150**0.5)
    assert result.gap == pytest.approx((below + above).mean().item())
    assert result.gap_error == pytest.approx((below + above).std().item() / 150**0.5)


def test_the_two_sides_meet():
    oracle = LinearGaussian(d=2, D=4, noise=0.5)
    gaps = [bounds(oracle, count, count=60).gap for count in (3, 15, 80)]
    assert gaps[0] > 4 * gaps[1]
    assert abs(gaps[2]) < 0.05
    assert gaps[2] < gaps[1]


def test_simulated_data_are_the_models():
    oracle = LinearGaussian(d=2, D=3, noise=0.5)
    x = bounds(oracle, 1, count=4000, batch_size=4000, pairs_per_pass=100_000).data[0]
    white = torch.linalg.solve(torch.linalg.cholesky(oracle.covariance), (x - oracle.mu).mT).mT
    assert white.mean(0).abs().max() < 4.5 / 4000**0.5
    assert (white.mT @ white / 4000 - torch.eye(3)).abs().max() < 4.5 * (2 / 4000) ** 0.5


def test_a_model_without_a_guide_and_with_covariates():
    def model(x, shift):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.LogNormal(c, 0.5))
            w = pyro.sample("w", dist.Normal(z.log(), 0.5))
            pyro.sample("x", dist.Normal(w + shift, 1.0), obs=x)

    shift = torch.randn(100)
    like = (torch.zeros(100), shift)
    ais = pv.AIS(20, 20, "prior", leapfrog_steps=3, step_size=0.4)
    result = pv.sandwich(model, like=like, ais=ais, seed=1)
    x, kept = result.data
    assert torch.equal(kept, shift)
    each = [dist.Normal(c + shift, 1.5**0.5).log_prob(x) + p.log() for c, p in
            ((0.0, torch.tensor(0.7)), (1.0, torch.tensor(0.3)))]  # fmt: skip
    truth = torch.logaddexp(*each).double()
    for off in (truth - result.lower, result.upper - truth):
        assert -4 * off.std() / 10 < off.mean() < 0.1
    assert "<= log p(x) <=" in str(result)


def test_a_neural_pair(binary):
    pair = make_pair()
    pair[1](binary)
    ais = pv.AIS(20, 10, leapfrog_steps=3, step_size=0.5)
    result = pv.sandwich(*pair, like=binary, ais=ais, seed=0)
    assert set(result.data[0].flatten().tolist()) == {0.0, 1.0}
    assert abs(result.gap) < 0.2 + 4 * result.gap_error
    by_particles = pv.evidence(*pair, result.data, num_particles=1000, seed=1)
    off = (result.lower - by_particles.values).mean().item()
    assert abs(off) < 0.1
    again = pv.sandwich(*pair, like=binary, ais=ais, seed=0)
    assert torch.equal(again.upper, result.upper)


def test_what_is_refused(binary):
    model, guide = make_pair()
    with pytest.raises(ValueError, match="starts from the guide, and none is given"):
        pv.sandwich(model, like=binary, ais=pv.AIS(start="guide"))
    with pytest.raises(TypeError, match=r"ais must be a pyro_vae\.AIS"):
        pv.sandwich(model, guide, like=binary, ais="ais")

    def doubled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    ais = pv.AIS(5, 2, "prior", step_size=0.1)
    with pytest.raises(ValueError, match="'x', but that site observes no argument"):
        pv.sandwich(doubled, like=torch.zeros(4), ais=ais)

    def weighted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("more", -z.square())

    with pytest.raises(ValueError, match="the factor 'more'"):
        pv.sandwich(weighted, like=torch.zeros(4), ais=ais)
