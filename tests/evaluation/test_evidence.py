import functools
import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import needs_compiler
from conftest import make_pair
from oracles import LinearGaussian
from torch import nn

import pyro_vae as pv


def every_way():
    """Yield all combinations. By default, run each chunk size, and one case of single runs."""
    for vectorize, chunks, dtype in itertools.product(
        (True, False), ((300, 20_000), (400, 70), (301, 100)), (torch.float32, torch.float64)
    ):
        default = vectorize or (dtype is torch.float64 and chunks == (301, 100))
        marks = () if default else pytest.mark.slow
        yield pytest.param(dtype, vectorize, *chunks, marks=marks)


@pytest.mark.parametrize(("dtype", "vectorize", "num_particles", "pairs"), list(every_way()))
def test_evidence_matches_the_linear_gaussian_model(dtype, vectorize, num_particles, pairs):
    """37 data points in batches of 10; the chunk size does not divide the number of particles."""
    oracle = LinearGaussian(d=2, D=5, dtype=dtype)
    x = oracle.sample(37)
    estimate = pv.evidence(
        oracle.model,
        oracle.guide,
        x,
        num_particles=num_particles,
        batch_size=10,
        pairs_per_pass=pairs,
        vectorize_particles=vectorize,
        seed=1,
    )
    scores = (estimate.values - oracle.log_evidence(x)) / estimate.monte_carlo_errors
    assert scores.abs().max() < 4.5  # 37 data points: fails once in 4000 runs
    assert 0.6 < scores.std() < 1.5  # the errors are neither too small nor too large
    bias = -0.5 * estimate.monte_carlo_errors.square().mean().item()
    total = (estimate.values - oracle.log_evidence(x)).mean().item() - bias
    assert abs(total) < 4 * estimate.monte_carlo_error
    assert estimate.khat.shape == (37,)


@pytest.mark.parametrize("num_particles", [1, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_evidence_is_exact_with_an_exact_guide(num_particles, dtype, tolerance):
    oracle = LinearGaussian(exact=True, dtype=dtype)
    x = oracle.sample(37)
    estimate = pv.evidence(
        oracle.model, oracle.guide, x, num_particles=num_particles, batch_size=10
    )
    exact = oracle.log_evidence(x)
    torch.testing.assert_close(estimate.values, exact, rtol=tolerance, atol=tolerance)
    assert estimate.mean == pytest.approx(exact.mean().item(), rel=tolerance)
    assert estimate.standard_error == pytest.approx((exact.std() / 37**0.5).item(), rel=1e-3)
    assert estimate.monte_carlo_errors.isnan().all() == (num_particles == 1)


def test_weight_stream_equals_all_weights_at_once():
    oracle = LinearGaussian(d=3)
    x = oracle.sample(9)
    torch.manual_seed(3)
    whole = pv.terms(oracle.model, oracle.guide, x, num_particles=500).log_weight
    from pyro_vae.evaluation._weights import WeightStream

    stream = WeightStream(500)
    for chunk in whole.split([1, 100, 250, 149]):
        stream.add(chunk)
    weights = whole.exp()
    torch.testing.assert_close(stream.log_mean(), weights.mean(0).log())
    torch.testing.assert_close(stream.mean_log(), whole.mean(0))
    error = weights.std(0) / 500**0.5 / weights.mean(0)
    torch.testing.assert_close(stream.error(), error)
    torch.testing.assert_close(stream.khat(), pv.evaluation.khat(whole))


def test_coverage_of_the_monte_carlo_errors():
    """Over 200 repeats the 95% intervals cover the truth 90% to 98% of the time."""
    oracle = LinearGaussian(d=3, D=4)
    while not 0.1 < oracle.weight_excess < 0.5:  # weights that have a variance
        oracle = LinearGaussian(d=3, D=4)
    x = oracle.sample(1)
    repeated = x.expand(200, 4).contiguous()
    estimate = pv.evidence(oracle.model, oracle.guide, repeated, num_particles=500, seed=0)
    z = (estimate.values - oracle.log_evidence(x)) / estimate.monte_carlo_errors
    assert 0.90 <= (z.abs() < 1.96).double().mean().item() <= 0.98


def test_unreliable_weights_warn():
    oracle = LinearGaussian(d=2, D=4)
    x = oracle.sample(50)

    def narrow(x):
        with pyro.plate("data", len(x)):
            mean = (x - oracle.mu) @ oracle.v.T
            pyro.sample("z", dist.Normal(mean, 0.1 * oracle.s.diagonal().sqrt()).to_event(1))

    with pytest.warns(pv.evaluation.UnreliableEvidence, match="importance estimate"):
        bad = pv.evidence(oracle.model, narrow, x, num_particles=1000, seed=0)
    good = pv.evidence(oracle.model, oracle.guide, x, num_particles=1000, seed=0)
    assert bad.unreliable_share > 0.8
    assert good.unreliable_share < 0.3
    assert "k-hat > 0.7" in str(bad)


def test_seed_fixes_the_draws_and_keeps_the_global_rng_state(pair, binary):
    model, guide = pair
    guide(binary)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    values = [pv.evidence(model, guide, binary, num_particles=20, seed=1).values for _ in range(2)]
    assert torch.equal(*values)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_mode_is_set_and_restored():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(2, 3), nn.Dropout(0.9)

        def forward(self, z):
            return self.layer(self.drop(z))

    decoder = Dropping()
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(decoder))
    decoder.layer.eval()  # one part is already in evaluation mode
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(3, [4]))
    seen = []
    decoder.drop.register_forward_hook(lambda module, *_: seen.append(module.training))
    pv.evidence(model, guide, torch.ones(5, 3), num_particles=2)
    assert seen
    assert not any(seen)
    assert decoder.drop.training
    assert not decoder.layer.training


def test_pairs_per_pass_bounds_memory():
    largest = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            largest.append(z.numel())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    pv.evidence(model, guide, torch.randn(25), num_particles=999, batch_size=10, pairs_per_pass=100)
    assert max(largest) == 100


def test_standard_error_is_nan_for_one_data_point():
    oracle = LinearGaussian()
    estimate = pv.evidence(oracle.model, oracle.guide, oracle.sample(1), num_particles=100)
    assert math.isnan(estimate.standard_error)
    assert estimate.monte_carlo_error > 0


def test_evidence_refuses_global_latents():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    message = "evidence weighs each data point by itself, but site 'mean'"
    with pytest.raises(ValueError, match=message):
        pv.evidence(model, guide, torch.randn(5))


def test_evidence_with_weights_of_zero_is_captured(without_compiler):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-1.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 0.45))  # sometimes outside the prior's support

    torch.manual_seed(1)
    x = 0.1 * torch.randn(40)
    options = {"num_particles": 50, "batch_size": 5, "pairs_per_pass": 50, "seed": 3}
    eager = pv.evidence(model, guide, x, capture=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = pv.evidence(model, guide, x, capture=True, **options)
    torch.testing.assert_close(captured.values, eager.values)


@pytest.mark.parametrize("num_particles", [1, 7, 300])
def test_captured_evidence_equals_eager_evidence(num_particles, binary, without_compiler):
    pair = make_pair()
    pair[1](binary)
    options = {"num_particles": num_particles, "batch_size": 15, "pairs_per_pass": 600, "seed": 5}
    eager, captured = (pv.evidence(*pair, binary, capture=c, **options) for c in (False, True))
    torch.testing.assert_close(captured.values, eager.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(captured.khat, eager.khat, rtol=1e-3, atol=1e-3, equal_nan=True)


@needs_compiler
def test_compiled_evidence_equals_eager_evidence(binary):
    pair = make_pair()
    pair[1](binary)
    options = {"num_particles": 300, "batch_size": 10, "pairs_per_pass": 500, "seed": 5}
    eager, captured = (pv.evidence(*pair, binary, capture=c, **options) for c in (False, True))
    torch.testing.assert_close(captured.values, eager.values, rtol=1e-6, atol=0)


def test_captured_evidence_validates_every_value(binary, without_compiler):
    pair = make_pair()
    pair[1](binary)
    stream = [binary[:10], binary[10:20], binary[20:30] + 0.5]
    loader = torch.utils.data.DataLoader(torch.cat(stream), batch_size=10)
    with pytest.raises(ValueError, match="support"):
        pv.evidence(*pair, loader, num_particles=50, capture=True)


def test_evidence_of_a_shuffled_loader_is_fixed_by_the_seed():
    """The seed also fixes the order of the data."""
    oracle = LinearGaussian(d=2, D=5)
    loader = torch.utils.data.DataLoader(oracle.sample(40), batch_size=10, shuffle=True)
    before = torch.get_rng_state()
    first, second = (
        pv.evidence(oracle.model, oracle.guide, loader, num_particles=20, seed=4).values
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def untrusted(values, sizes, khats, num_particles=100):
    columns = (torch.tensor(each, dtype=torch.float64) for each in (values, sizes, khats))
    values, sizes, khats = columns
    return pv.evaluation.Evidence(
        values,
        torch.zeros_like(values),
        khats,
        num_particles,
        1,
        effective_sample_size=sizes,
        mean_log_weights=values,
    ).untrusted.tolist()


def test_untrusted_values():
    nan, inf = math.nan, math.inf
    values = [-1.0, -1.0, -1.0, -1.0, -1.0, -inf, nan, inf]
    sizes = [50.0, 9.0, 50.0, 50.0, nan, nan, nan, nan]
    khats = [0.5, 0.5, 0.8, nan, nan, nan, nan, nan]  # the fourth has tied weights
    expected = [False, True, True, False, True, True, True, True]
    assert untrusted(values, sizes, khats) == expected
    # Few draws have no k-hat; the effective sample size must be at least a tenth of them.
    few = [[-1.0, -1.0, -inf], [2.5, 1.4, nan], [nan] * 3, 20]
    assert untrusted(*few) == [False, True, True]
    assert untrusted([-1.0], [1.0], [nan], 1) == [False]


def test_non_finite_evidence_warns():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    x = torch.randn(40)
    x[30:] = 1e20  # a quarter of the data
    with pytest.warns(
        pv.evaluation.UnreliableEvidence, match="-inf for 10 of 40 data points, the first in row 30"
    ):
        estimate = pv.evidence(model, guide, x, batch_size=10, num_particles=100, seed=0)
    assert estimate.untrusted.tolist() == [False] * 30 + [True] * 10
    few = pv.evidence(model, guide, x[:5], num_particles=20, seed=0)
    assert "k-hat: not available, needs 21 samples" in str(few)


def test_naive_and_ais_accept_a_guide_that_enumerates():
    """Importance weights need sampled labels; naive sampling and AIS from the prior do not."""
    mlp, joined = pv.nets.MLP, pv.nets.Joined
    likelihood = pv.likelihoods.Bernoulli(joined(mlp(2 + 3, [8], 16)))
    model = pv.models.SemiSupervisedModel(3, pv.priors.StandardNormal(2), likelihood)
    guide = pv.guides.SemiSupervisedGuide(
        model, classifier=mlp(16, [8], 3), encoder=joined(mlp(16 + 3, [8]))
    )
    data = torch.rand(10, 16).round(), torch.randint(-1, 3, (10,))
    naive = pv.evidence(model, guide, data, method="naive", num_particles=2000, seed=0)
    ais = pv.evaluation.AIS(25, 10, "prior", leapfrog_steps=2, pilot=5)
    chains = pv.evidence(model, guide, data, method=ais, seed=0)
    drawn = functools.partial(guide, enumerates=False)
    weighed = pv.evidence(model, drawn, data, num_particles=2000, seed=0)
    for other in (naive, chains):
        error = torch.hypot(other.monte_carlo_errors, weighed.monte_carlo_errors)
        assert ((other.values - weighed.values).abs() < 5 * error + 0.02).all()


def test_evaluation_of_latents_refuses_pairs_without_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        pass

    x = torch.randn(10)
    estimate = pv.evidence(model, guide, x, num_particles=30)
    torch.testing.assert_close(estimate.values, dist.Normal(0.0, 1.0).log_prob(x).double())
    ais = functools.partial(pv.evidence, method="ais")
    for judge in (pv.elbo_surgery, pv.prior_holes, pv.collapse_report, ais):
        with pytest.raises(ValueError, match="needs a latent variable, but this pair has none"):
            judge(model, guide, x)
    with pytest.raises(ValueError, match="sandwich needs a latent variable"):
        pv.sandwich(model, like=x)


def test_seed_must_be_a_whole_number(pair, binary):
    for seed in ("a", 1.5, True):
        with pytest.raises(TypeError, match="seed must be a whole number or None"):
            pv.evidence(*pair, binary, seed=seed)


def test_support_error_names_bounds_computed_by_the_program():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(0.0, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal((2 * x).log(), 0.5))

    with pytest.raises(ValueError, match="'x', whose bounds the program computes"):
        pv.evidence(model, guide, torch.rand(100) + 0.1)
