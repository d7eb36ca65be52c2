"""ELBO surgery from the codes of a random part of the data points."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, assert_within

import pyro_vae as pv
from pyro_vae import guides
from pyro_vae.evaluation._surgery import code_scores
from pyro_vae.evaluation._surgery.random_part import RandomPart


@pytest.mark.parametrize("kind", ["gaussian", "scored", "flow"])
def test_codes_of_a_random_part_have_the_mean_of_all(kind):
    oracle = LinearGaussian(d=2, D=5, noise=1.5)
    count = 120 if kind == "flow" else 600
    x, quarter = oracle.sample(count), count // 4
    guide = oracle.full_covariance_guide if kind == "scored" else oracle.guide
    if kind == "flow":
        guide = guides.AmortizedFlow(oracle.model, torch.nn.Linear(5, 8)).double()
    options = {"num_particles": 2, "seed": 0}
    every = pv.elbo_surgery(oracle.model, guide, x, **options)
    part = pv.elbo_surgery(oracle.model, guide, x, num_scored=quarter, **options)
    assert (every.num_scored, part.num_scored) == (None, quarter)
    for name in ("elbo", "distortion", "rate"):  # of all data points
        assert getattr(part, name) == getattr(every, name)
        assert part.standard_errors[name] == every.standard_errors[name]
    error = part.standard_errors["mutual_information"]
    assert error > every.standard_errors["mutual_information"]
    assert_within(part.mutual_information, every.mutual_information, error)
    assert part.rate == pytest.approx(part.mutual_information + part.marginal_kl)
    assert f"from the codes of {quarter} data points" in str(part)
    assert "data points" not in str(every)[20:]
    for enough in (count, 10**6):
        found = pv.elbo_surgery(oracle.model, guide, x, num_scored=enough, **options)
        assert found == every


@pytest.mark.parametrize("size", [30, 61])
@pytest.mark.parametrize("kind", ["normal", "outliers", "lognormal", "equal keys"])
def test_errors_of_random_parts(kind, size):
    """Over random parts, the mean is that of all values, and the errors have the stated size."""
    key = {
        "normal": torch.randn(1000),
        "outliers": torch.where(torch.arange(1000) < 10, 50.0, torch.randn(1000)),
        "lognormal": torch.randn(1000).exp(),
        "equal keys": torch.ones(1000),
    }[kind].double()
    values = key.clamp(max=7.0) + 0.3 * torch.randn(1000)
    parts = [RandomPart.choose(key, size, seed) for seed in range(400)]
    numbers = torch.stack([part.of_all(values[part.chosen]) for part in parts])
    errors = numbers.mean(1) - values.mean()
    assert_within(errors.mean().item(), 0.0, errors.std().item() / len(parts) ** 0.5)
    # The stated variance is that of the population, and that of the choice.
    of_choice = numbers.var(1).mean() / len(key) - values.var() / len(key)
    ratio = (errors.var() / of_choice).item()
    # The chi-square of 400 is within 0.75 to 1.28. Neighboring strata differ: the ratio is lower.
    assert 0.2 < ratio < 1.3
    assert errors.std() < 1.1 * values.std() / size**0.5


def test_a_random_part_has_one_data_point_of_each_stratum():
    key = torch.randn(100)
    part = RandomPart.choose(key, 33, seed=0)
    assert torch.equal(part.stratum[part.chosen], torch.arange(33))
    assert part.stratum.bincount().unique().tolist() == [3, 4]
    ordered = part.stratum[key.argsort()]
    assert torch.equal(ordered, ordered.sort().values)
    assert torch.equal(part.chosen, RandomPart.choose(key, 33, seed=0).chosen)
    assert not torch.equal(part.chosen, RandomPart.choose(key, 33, seed=1).chosen)


def test_codes_of_a_part_without_outliers():
    """A mean of 57 nats, above log N, was estimated by extrapolation to the outliers' rates."""
    x = torch.randn(2000, dtype=torch.float64)
    x[:3] = 200.0

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.3))

    every = pv.elbo_surgery(model, guide, x, seed=0)
    for seed in range(5):
        part = pv.elbo_surgery(model, guide, x, seed=seed, num_scored=200)
        error = part.standard_errors["mutual_information"]
        assert_within(part.mutual_information, every.mutual_information, error)
        assert error < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_scored", [None, 200])
@pytest.mark.parametrize("confidence", [8.0, 12.0, 20.0])
@pytest.mark.parametrize("num_particles", [1, 5])
def test_surgery_of_a_latent_whose_codes_are_all_the_mode(
    num_particles, confidence, num_scored, dtype
):
    """The sampled rate then differs from the exact one by about the same number for each code."""
    x = torch.randn(600, dtype=dtype)
    level = ((x * 3).long() + 5).clamp(0, 9)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=x.new_zeros(10)))
            pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)

    def guide(x):
        logits = confidence * torch.nn.functional.one_hot(((x * 3).long() + 5).clamp(0, 9), 10)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits.to(x.dtype)))

    shares = level.bincount(minlength=10).double() / len(x)
    entropy = -(shares * shares.clamp(min=1e-9).log()).sum().item()
    options = {"num_scored": num_scored, "num_particles": num_particles, "seed": 0}
    surgery = pv.elbo_surgery(model, guide, x, **options)
    error = surgery.standard_errors["mutual_information"]
    assert error < 0.1
    assert abs(surgery.mutual_information - entropy) < 5 * error + 0.05


def test_guides_that_are_run_score_a_part_by_default(monkeypatch):
    oracle = LinearGaussian(d=2, D=5)
    x, guide = oracle.sample(200), oracle.full_covariance_guide
    monkeypatch.setattr(code_scores, "_FEWEST_BY_DEFAULT", 20)
    monkeypatch.setattr(code_scores, "_PAIRS", 200 * 60)
    found = [
        pv.elbo_surgery(*pair, x, num_particles=num_particles, seed=0).num_scored
        for pair, num_particles in [
            ((oracle.model, guide), 1),
            ((oracle.model, guide), 2),
            ((oracle.model, guide), 50),
            ((oracle.model, oracle.guide), 1),
        ]
    ]
    assert found == [60, 30, 20, None]
    assert pv.elbo_surgery(oracle.model, guide, x, num_scored=200, seed=0).num_scored is None
    assert pv.collapse_report(oracle.model, guide, x, seed=0).surgery.num_scored == 60


def test_surgery_refuses_a_part_that_it_cannot_score():
    oracle = LinearGaussian()
    x = oracle.sample(20)
    with pytest.raises(ValueError, match="num_scored must be at least 30, got 29"):
        pv.elbo_surgery(oracle.model, oracle.guide, x, num_scored=29)
    with pytest.raises(ValueError, match="num_scored is for the exact estimator, got estimator="):
        pv.elbo_surgery(oracle.model, oracle.guide, x, num_scored=30, estimator="weighted")
