import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from interrupting import Interrupting
from oracles import LinearGaussian, assert_within

import pyro_vae as pv
from pyro_vae.evaluation._sandwich import Sandwich, warn_of_crossing


def bounds(oracle, num_temperatures, start="prior", count=150, **options):
    ais = pv.evaluation.AIS(20, num_temperatures, start, leapfrog_steps=4, step_size=0.35)
    like = torch.zeros(count, len(oracle.mu), dtype=oracle.dtype)
    options = {"batch_size": count, "pairs_per_pass": 20 * count} | options
    return pv.sandwich(oracle.model, oracle.guide, like=like, ais=ais, seed=0, **options)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_bounds_enclose_the_truth(start):
    oracle = LinearGaussian(d=2, D=4, noise=0.2)
    result = bounds(oracle, 4, start)
    truth = oracle.log_evidence(result.data[0])
    below, above = truth - result.lower, result.upper - truth
    assert below.mean() > -4 * below.std() / 150**0.5
    assert above.mean() > -4 * above.std() / 150**0.5
    for ratio in ((-below).exp(), (-above).exp()):  # unbiased estimates of p(x) and 1/p(x)
        assert_within(ratio.mean(), 1.0, ratio.std() / 150**0.5)
    assert result.gap == pytest.approx((below + above).mean().item())
    assert result.gap_error == pytest.approx((below + above).std().item() / 150**0.5)


def test_bounds_converge_with_temperatures():
    oracle = LinearGaussian(d=2, D=4, noise=0.5)
    few, more, most = (bounds(oracle, count, count=60) for count in (3, 15, 80))
    assert few.gap > 4 * more.gap
    assert abs(most.gap) < 0.05
    # False alarm: 3e-5.
    assert most.gap < more.gap + 4 * math.hypot(most.gap_error, more.gap_error)


def test_simulated_data_follow_the_model():
    oracle = LinearGaussian(d=2, D=3, noise=0.5)
    x = bounds(oracle, 1, count=4000, batch_size=4000, pairs_per_pass=100_000).data[0]
    white = torch.linalg.solve(torch.linalg.cholesky(oracle.covariance), (x - oracle.mu).mT).mT
    assert white.mean(0).abs().max() < 4.5 / 4000**0.5
    assert (white.mT @ white / 4000 - torch.eye(3)).abs().max() < 4.5 * (2 / 4000) ** 0.5


def test_sandwich_without_a_guide_and_with_covariates():
    def model(x, shift):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.LogNormal(c, 0.5))
            w = pyro.sample("w", dist.Normal(z.log(), 0.5))
            pyro.sample("x", dist.Normal(w + shift, 1.0), obs=x)

    shift = torch.randn(100)
    like = (torch.zeros(100), shift)
    ais = pv.evaluation.AIS(20, 20, "prior", leapfrog_steps=3, step_size=0.4)
    result = pv.sandwich(model, like=like, ais=ais, seed=1)
    x, kept = result.data
    assert torch.equal(kept, shift)
    each = [dist.Normal(c + shift, 1.5**0.5).log_prob(x) + p.log() for c, p in
            ((0.0, torch.tensor(0.7)), (1.0, torch.tensor(0.3)))]  # fmt: skip
    truth = torch.logaddexp(*each).double()
    for off in (truth - result.lower, result.upper - truth):
        assert -4 * off.std() / 10 < off.mean() < 0.1
    assert "<= log p(x) <=" in str(result)


def test_sandwich_of_a_neural_pair_matches_evidence_and_is_reproducible(binary):
    pair = make_pair()
    pair[1](binary)
    ais = pv.evaluation.AIS(20, 10, leapfrog_steps=3, step_size=0.5)
    result = pv.sandwich(*pair, like=binary, ais=ais, seed=0)
    assert set(result.data[0].flatten().tolist()) == {0.0, 1.0}
    assert abs(result.gap) < 0.2 + 4 * result.gap_error
    by_particles = pv.evidence(*pair, result.data, num_particles=1000, seed=1)
    off = (result.lower - by_particles.values).mean().item()
    assert abs(off) < 0.1
    again = pv.sandwich(*pair, like=binary, ais=ais, seed=0)
    assert torch.equal(again.upper, result.upper)


def test_sandwich_refuses_missing_guides_and_factors(binary):
    model, guide = make_pair()
    with pytest.raises(ValueError, match="needs a guide, but guide is None"):
        pv.sandwich(model, like=binary, ais=pv.evaluation.AIS(start="guide"))
    with pytest.raises(TypeError, match=r"ais must be a pyro_vae\.evaluation\.AIS"):
        pv.sandwich(model, guide, like=binary, ais="ais")

    def doubled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    ais = pv.evaluation.AIS(5, 2, "prior", step_size=0.1)
    with pytest.raises(ValueError, match="site 'x' does not observe an argument"):
        pv.sandwich(doubled, like=torch.zeros(4), ais=ais)

    def weighted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("more", -z.square())

    with pytest.raises(ValueError, match="the factor 'more'"):
        pv.sandwich(weighted, like=torch.zeros(4), ais=ais)


def test_sandwich_resumes_exactly_after_an_interrupt():
    oracle = LinearGaussian(d=2, D=3)
    ais = pv.evaluation.AIS(5, 4, leapfrog_steps=1, pilot=2)
    options = {"like": oracle.sample(30), "ais": ais, "batch_size": 10, "seed": 3}
    whole = pv.sandwich(oracle.model, oracle.guide, **options)
    with pytest.raises(
        pv.evaluation.Interrupted, match="sandwich was stopped after 20 data"
    ) as stopped:
        pv.sandwich(oracle.model, oracle.guide, progress=Interrupting(2), **options)
    assert torch.equal(stopped.value.partial.upper, whole.upper[:20])
    resumed = pv.sandwich(oracle.model, oracle.guide, resume=stopped.value, **options)
    for name in ("lower", "lower_errors", "upper", "upper_errors"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    assert torch.equal(resumed.data[0], whole.data[0])
    options["ais"] = pv.evaluation.AIS(6, 4)
    with pytest.raises(ValueError, match=r"resume comes from a call with ais=AIS\(num_chains=5"):
        pv.sandwich(oracle.model, oracle.guide, resume=stopped.value, **options)


def test_sandwich_when_sites_observe_x_transposed_or_by_column():
    """x = z + noise with scales 0.1, 1 and 5, so mixed-up columns would be detected."""
    scale = torch.tensor([0.1, 1.0, 5.0])

    def transposed(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, scale.unsqueeze(1)), obs=x.T)

    def in_columns(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for n in range(3):
                pyro.sample(f"x_{n}", dist.Normal(z, scale[n]), obs=x[:, n])

    ais = pv.evaluation.AIS(20, 20, "prior", leapfrog_steps=3, pilot=5)
    covariance = torch.diag(scale**2) + 1
    for model in (transposed, in_columns):
        like = torch.zeros(300, 3)
        bounds = pv.sandwich(
            model, like=like, ais=ais, batch_size=300, pairs_per_pass=6_000, seed=0
        )
        (x,) = bounds.data
        assert (x.std(0) / covariance.diagonal().sqrt() - 1).abs().max() < 0.2
        truth = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).double()
        for off in (truth - bounds.lower, bounds.upper - truth):
            assert -4 * off.std() / 300**0.5 < off.mean() < 1.0


def test_sequences_are_simulated_step_by_step():
    model = pv.models.SequenceModel(
        prior=pv.priors.StandardNormal(1),
        transition=lambda z: dist.Normal(0.9 * z, 0.4).to_event(1),
        likelihood=lambda z: dist.Normal(z, 0.5).to_event(1),
    )
    ais = pv.evaluation.AIS(20, 20, "prior", leapfrog_steps=3, pilot=5)
    like = torch.zeros(200, 3, 1)
    bounds = pv.sandwich(model, like=like, ais=ais, batch_size=200, seed=0)
    variances = torch.tensor([1.0, 0.81 + 0.16, 0.81 * 0.97 + 0.16]) + 0.25
    assert (bounds.data[0].squeeze(2).var(0) / variances - 1).abs().max() < 0.45
    assert abs(bounds.gap) < 0.1 + 4 * bounds.gap_error
    with pytest.raises(ValueError, match="site 'x_1' does not observe an argument"):
        pv.sandwich(model, like=(like, torch.full((200,), 2)), ais=ais, seed=0)


@pytest.mark.parametrize("where", ["decoder", "prior", "twice"])
def test_sandwich_refuses_models_that_use_x_beyond_observing_it(where):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 0] if where == "prior" else 0.0, 1.0))
            loc = torch.stack([z, z + 0.5 * x[:, 0].expand(z.shape)], -1)
            loc = loc if where == "decoder" else z.unsqueeze(-1).expand(*z.shape, 2)
            pyro.sample("x", dist.Normal(loc, 0.3).to_event(1), obs=x)
            if where == "twice":
                pyro.sample("again", dist.Normal(loc, 0.3).to_event(1), obs=x)

    ais = pv.evaluation.AIS(5, 2, "prior", step_size=0.1)
    with pytest.raises(ValueError, match=r"another density at site .* the model uses x for"):
        pv.sandwich(model, like=torch.randn(20, 2), ais=ais, seed=0)


def test_crossed_bounds_warn():
    lower, upper = torch.randn(100), torch.randn(100)
    data = (torch.zeros(100),)
    crossed = Sandwich(lower + 1, upper - 1, lower.abs(), upper.abs(), data, 10)
    with pytest.warns(pv.evaluation.UnreliableEvidence, match="below the lower bound"):
        warn_of_crossing(crossed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_crossing(Sandwich(lower, lower + 0.1 * upper, lower, upper, data, 10))


def test_sandwich_refuses_a_guide_without_amortization():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(10)
    guide = pv.guides.LocalGuide(model, x)
    with pytest.raises(ValueError, match="LocalGuide"):
        pv.sandwich(model, guide, like=x, ais=pv.evaluation.AIS(5, 2, step_size=0.1), seed=0)


def test_errors_of_each_bound_come_from_its_own_chains():
    oracle = LinearGaussian(d=2, D=3, noise=0.4)
    result = bounds(oracle, 4, count=400)
    backward, forward = result.upper_errors, result.lower_errors
    assert not torch.allclose(backward, forward)
    # Four times as many chains halve the error.
    more = pv.evaluation.AIS(80, 4, "prior", leapfrog_steps=4, step_size=0.35)
    like = torch.zeros(400, 3, dtype=oracle.dtype)
    again = pv.sandwich(
        oracle.model,
        oracle.guide,
        like=like,
        ais=more,
        batch_size=400,
        pairs_per_pass=32_000,
        seed=0,
    )
    ratio = backward.median() / again.upper_errors.median()
    assert 1.5 < ratio < 2.6


def test_sandwich_of_a_model_that_sums_over_an_inner_plate():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-2, keepdim=True), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", dist.Normal(x / 4, 0.9))

    ais = pv.evaluation.AIS(num_chains=5, num_temperatures=20, leapfrog_steps=3, pilot=2)
    found = pv.sandwich(model, guide, like=torch.randn(200), ais=ais, seed=0)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 4)  # x is N(0, 4)
    assert found.lower.mean() < -entropy + 0.4
    assert found.upper.mean() > -entropy - 0.4
