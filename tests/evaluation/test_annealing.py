import copy
import dataclasses
import math
import os
import signal
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import needs_compiler
from conftest import make_pair
from interrupting import Calls, Interrupting
from oracles import LinearGaussian, assert_within
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae import flows, guides
from pyro_vae.evaluation._hamiltonian import transition
from pyro_vae.evaluation._tempered_path import State, TemperedPath

QUICK = {"num_chains": 200, "num_temperatures": 8, "leapfrog_steps": 4, "step_size": 0.3}


def scores(estimate, truth):
    return (estimate.values - truth) / estimate.monte_carlo_errors


def check(estimate, truth):
    """Assert that 40 values lie within their errors, singly and on average.

    Each weight is skewed, so one value may be seven errors off. The log of an average is low by
    half of a squared error.
    """
    of_all = scores(estimate, truth)
    assert of_all.abs().max() < 7
    assert 0.5 < of_all.std() < 1.7
    off = estimate.values - truth + 0.5 * estimate.monte_carlo_errors.square()
    assert_within(off.mean(), 0.0, estimate.monte_carlo_error)


def log_normalizers(oracle, x, start, temperatures):
    """Return the log-integral of each density of the path, (T + 1, N)."""
    eye = torch.eye(len(oracle.mu), dtype=torch.float64)
    log_evidence = oracle.log_evidence(x)
    results = []
    for b in temperatures.tolist():
        if b == 0:
            results.append(torch.zeros_like(log_evidence))
        elif start == "prior":  # p(x|z)^b is an unnormalized Gaussian in x of variance s2 / b
            noise = oracle.s2 / b
            p = torch.distributions.MultivariateNormal(
                oracle.mu, oracle.weight @ oracle.weight.T + noise * eye
            )
            scale = (2 * math.pi * noise).log() - b * (2 * math.pi * oracle.s2).log()
            results.append(p.log_prob(x.double()) + 0.5 * len(eye) * scale)
        else:  # Gaussians with one mean and precisions L and P
            width, precision = oracle.s.inverse(), oracle.precision
            between = (1 - b) * width + b * precision
            overlap = (1 - b) * width.logdet() + b * precision.logdet() - between.logdet()
            results.append(b * log_evidence + 0.5 * overlap)
    return torch.stack(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["prior", "guide"])
def test_normalizers_match_the_linear_gaussian_path(start, dtype):
    oracle = LinearGaussian(d=2, D=5, dtype=dtype)
    x = oracle.sample(40)
    ais = pv.evaluation.AIS(start=start, **QUICK)
    estimate = pv.evidence(oracle.model, oracle.guide, x, method=ais, pairs_per_pass=4000, seed=1)
    check(estimate, oracle.log_evidence(x))
    seen = estimate.annealing
    truth = log_normalizers(oracle, x, start, seen.temperatures)
    torch.testing.assert_close(truth[-1], oracle.log_evidence(x), rtol=1e-9, atol=1e-9)
    assert seen.log_normalizers.shape == (9, 40)
    off = (seen.log_normalizers - truth)[1:] / seen.monte_carlo_errors[1:]
    assert off.abs().max() < 7
    assert off.mean(1).abs().max() < 4.5 * 1.6 / 40**0.5
    assert torch.equal(seen.log_normalizers[-1], estimate.values)
    assert torch.equal(seen.log_normalizers[0], torch.zeros(40, dtype=torch.float64))
    assert seen.acceptance.shape == seen.step_sizes.shape == (7, 40)


@pytest.mark.parametrize("step_size", [1e-4, 0.4, 30.0])
def test_weights_are_unbiased_for_any_step_size(step_size):
    """The chains never move, move well, or are always rejected."""
    oracle = LinearGaussian(weight=torch.randn(4, 2), noise=0.8)
    x = oracle.sample(1)
    ais = pv.evaluation.AIS(20, 4, leapfrog_steps=3, step_size=step_size)
    repeated = x.expand(500, -1).contiguous()
    estimate = pv.evidence(oracle.model, oracle.guide, repeated, method=ais, seed=0)
    weights = (estimate.values - oracle.log_evidence(x)).exp()
    assert_within(weights.mean(), 1.0, weights.std() / 500**0.5)
    accepted = estimate.annealing.acceptance.mean()
    assert accepted > 0.999 if step_size < 0.1 else accepted < (0.999 if step_size < 1 else 0.01)


def test_transition_leaves_the_posterior_invariant():
    oracle = LinearGaussian(d=2, D=5, exact=True)
    x = oracle.sample(3)
    path = TemperedPath(oracle.model, oracle.guide, (x,), start="prior", plate_nesting=1)
    with torch.no_grad():
        before = pv.terms(oracle.model, oracle.guide, x, num_particles=8000).samples["z"]
        state = State(before, *path.evaluate(before, x))
        sizes = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
        sizes = sizes * oracle.s.diagonal().min() ** 0.5
        for _ in range(3):
            state, acceptance = transition(
                lambda rows: State(rows, *path.evaluate(rows, x)), state, 1.0, sizes, 4
            )
    assert (acceptance.mean(0).diff() < 0).all()  # longer steps are rejected more often
    assert (state.rows != before).any(-1).double().mean() > 0.8
    mean = (x - oracle.mu) @ oracle.v.T
    white = (state.rows - mean) @ torch.linalg.cholesky(oracle.precision)
    assert white.mean(0).abs().max() < 4.5 / 8000**0.5
    for each in white.unbind(1):
        moments = each.unsqueeze(-1) * each.unsqueeze(-2) - torch.eye(2)
        assert (moments.mean(0).abs() / moments.std(0)).max() < 4.5 / 8000**0.5


def test_pilot_reaches_the_target_acceptance():
    oracle = LinearGaussian(d=3, D=6, noise=0.05)
    x = oracle.sample(10)
    ais = pv.evaluation.AIS(100, 40, start="prior", leapfrog_steps=4, target_acceptance=0.7)
    estimate = pv.evidence(oracle.model, oracle.guide, x, method=ais, seed=2)
    assert abs(estimate.annealing.acceptance.mean().item() - 0.7) < 0.1
    steps = estimate.annealing.step_sizes
    assert (steps[-1] < 0.5 * steps[0]).all()  # the posterior is narrower than the prior
    assert scores(estimate, oracle.log_evidence(x)).abs().max() < 4.5


def test_coverage_of_the_monte_carlo_errors():
    """Over 200 repeats the 95% intervals cover the truth 90% to 98% of the time."""
    oracle = LinearGaussian(weight=torch.randn(4, 2), noise=0.5)
    x = oracle.sample(1)
    ais = pv.evaluation.AIS(200, 10, start="prior", leapfrog_steps=4, step_size=0.4)
    repeated = x.expand(200, -1).contiguous()
    options = {"method": ais, "pairs_per_pass": 40_000, "batch_size": 200, "seed": 0}
    estimate = pv.evidence(oracle.model, oracle.guide, repeated, **options)
    inside = scores(estimate, oracle.log_evidence(x)).abs() < 1.96
    assert 0.90 <= inside.double().mean().item() <= 0.98


@pytest.mark.parametrize("schedule", ["sigmoid", "linear", (0.0, 0.01, 0.3, 1.0)])
def test_schedules_rise_from_zero_to_one(schedule):
    b = pv.evaluation.AIS(num_temperatures=7, schedule=schedule).temperatures
    assert len(b) == (8 if isinstance(schedule, str) else 4)
    assert b[0] == 0
    assert b[-1] == 1
    assert (b.diff() > 0).all()
    if schedule == "sigmoid":  # as dense at its end as at its start
        torch.testing.assert_close(b, 1 - b.flip(0))
        assert b.diff()[0] < 0.5 * b.diff()[3]


# --- other methods


def test_naive_sampling_has_the_exact_mean_and_variance():
    r"""E[p(x|z)^2] is (4 pi s2)^(-D/2) N(x; mu, W W' + s2/2 I), a Gaussian integral."""
    oracle = LinearGaussian(d=1, D=2, noise=1.0)
    x = oracle.sample(1)
    eye = torch.eye(2, dtype=torch.float64)
    halved = oracle.weight @ oracle.weight.T + 0.5 * oracle.s2 * eye
    log_square = torch.distributions.MultivariateNormal(oracle.mu, halved).log_prob(x)
    log_square = log_square - (4 * math.pi * oracle.s2).log()
    variance = (log_square - 2 * oracle.log_evidence(x)).expm1().item()
    repeated = x.expand(4000, -1).contiguous()
    options = {"num_particles": 50, "batch_size": 4000, "pairs_per_pass": 200_000, "seed": 3}
    estimate = pv.evidence(oracle.model, oracle.guide, repeated, method="naive", **options)
    weights = (estimate.values - oracle.log_evidence(x)).exp()
    assert_within(weights.mean(), 1.0, weights.std() / 4000**0.5)
    squares = 50 * (weights - 1).square()
    assert_within(squares.mean(), variance, squares.std() / 4000**0.5)


def test_naive_sampling_warns_when_unreliable():
    oracle = LinearGaussian(d=8, D=30, noise=0.02)
    x = oracle.sample(20)
    with pytest.warns(
        pv.evaluation.UnreliableEvidence, match=r"the naive estimate .* for 20 of 20 data"
    ):
        naive = pv.evidence(oracle.model, oracle.guide, x, method="naive", num_particles=1000)
    assert naive.untrusted.all()
    assert naive.effective_sample_size.median() < 5
    assert (naive.values < oracle.log_evidence(x)).double().mean() > 0.9
    assert "by naive" in str(naive)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = LinearGaussian(exact=True)
        good = pv.evidence(exact.model, exact.guide, exact.sample(5), num_particles=100)
    torch.testing.assert_close(good.effective_sample_size, torch.full((5,), 100.0).double())


def test_ais_warns_when_chains_hardly_move():
    oracle = LinearGaussian(d=8, D=30, noise=0.02)
    x = oracle.sample(20)
    ais = pv.evaluation.AIS(50, 5, start="prior", leapfrog_steps=1, step_size=1e-3)
    with pytest.warns(pv.evaluation.UnreliableEvidence, match="the ais estimate"):
        estimate = pv.evidence(oracle.model, oracle.guide, x, method=ais, seed=0)
    assert estimate.untrusted.all()


# --- kinds of models


class NonlinearDecoder(nn.Module):
    """A decoder of one latent whose posterior is far from Gaussian."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(1, 3)) for _ in range(2))

    def forward(self, z):
        return 2 * torch.sin(2 * z @ self.a) + z.square() @ self.b


def nonlinear_model(prior):
    torch.set_default_dtype(torch.float64)
    try:
        model = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(NonlinearDecoder()))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.double()


def quadrature(model, x):
    """Return log p(x), integrated on a fine grid of the one latent."""
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        log_joint = model.prior().log_prob(z).unsqueeze(-1)
        log_joint = log_joint + model.likelihood(z.unsqueeze(1)).log_prob(x)
    return log_joint.logsumexp(0) + math.log(24 / 20_000)


NONLINEAR_PRIORS = {
    "normal": lambda: pv.priors.StandardNormal(1),
    "mixture": lambda: pv.priors.MixtureOfNormals(1, components=3),
    "vamp": lambda: pv.priors.VampPrior(1, pseudo_inputs=torch.rand(4, 3)),
    "flow": lambda: pv.priors.FlowPrior(1, dist.transforms.Spline(1, count_bins=4)),
}
NONLINEAR_GUIDES = {
    "normal": guides.AmortizedNormal,
    "mixture": guides.AmortizedMixture,
    "planar": lambda model, encoder: guides.AmortizedFlow(model, encoder, flow=flows.Planar),
    "hierarchical": guides.HierarchicalGuide,
}


@pytest.mark.parametrize(
    ("prior", "guide"),
    [(prior, "normal") for prior in NONLINEAR_PRIORS]
    + [("normal", guide) for guide in NONLINEAR_GUIDES],
)
def test_ais_matches_quadrature_for_a_nonlinear_decoder(prior, guide):
    model = nonlinear_model(NONLINEAR_PRIORS[prior]())
    x = torch.bernoulli(torch.full((30, 3), 0.5, dtype=torch.float64))
    q = NONLINEAR_GUIDES[guide](model, pv.nets.MLP(3, [5]).double())
    if prior == "vamp":
        model.prior.bind_guide(q)
    q(x)
    ais = pv.evaluation.AIS(100, 5, leapfrog_steps=3, step_size=0.3)
    options = {"method": ais, "capture": False, "seed": 0}
    estimate = pv.evidence(model.double(), q.double(), x, **options)
    assert scores(estimate, quadrature(model, x)).abs().max() < 4.5


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_ais_matches_conjugacy_for_a_positive_latent(start):
    """A Poisson count with a Gamma rate is negative binomial."""

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal((x + 1.5).log() - 0.4, 0.6))

    truth = dist.NegativeBinomial(2.0, probs=1 / 1.5)
    x = truth.sample((40,))
    ais = pv.evaluation.AIS(start=start, **QUICK)
    check(pv.evidence(model, guide, x, method=ais, seed=0), truth.log_prob(x).double())


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_ais_matches_conjugacy_for_a_simplex_and_an_inner_plate(start):
    """Multinomial counts with Dirichlet probabilities, three per data point."""

    def model(x):
        with pyro.plate("data", len(x)), pyro.plate("words", 3):
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.7])))
            pyro.sample("x", dist.Multinomial(5, probs=p), obs=x.movedim(1, 0))

    x = torch.distributions.Multinomial(5, torch.ones(3)).sample((20, 3))
    guide = guides.AmortizedNormal(model, nn.Sequential(nn.Flatten(), pv.nets.MLP(9, [8])))
    guide(x)
    truth = dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 0.7]), 5).log_prob(x).sum(1)
    ais = pv.evaluation.AIS(
        start=start, **{**QUICK, "num_chains": 100, "num_temperatures": 40}
    )  # 8 temperatures leave a bias
    estimate = pv.evidence(model, guide, x, method=ais, seed=0)
    check(estimate, truth.double())


def test_evidence_with_masked_latents_and_data():
    """Masked latents and masked data do not enter p(x, z)."""
    keep = torch.rand(40) < 0.5

    def model(x, keep):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)
            with poutine.mask(mask=keep):
                w = pyro.sample("w", dist.LogNormal(0.0, 1.0))
                pyro.sample("y", dist.Normal(w.log() - 1, 0.5), obs=x)

    guide = guides.AmortizedNormal(model, EncoderOfBoth())
    x = torch.randn(40)
    guide(x, keep)
    truth = dist.Normal(0.0, 2**0.5).log_prob(x)
    truth = truth + torch.where(keep, dist.Normal(-1.0, 1.25**0.5).log_prob(x), 0.0)
    for start in ("prior", "guide"):
        estimate = pv.evidence(
            model, guide, (x, keep), method=pv.evaluation.AIS(start=start, **QUICK), seed=0
        )
        check(estimate, truth.double())
    naive = pv.evidence(model, guide, (x, keep), method="naive", num_particles=500, seed=0)
    check(naive, truth.double())


class EncoderOfBoth(nn.Module):
    def forward(self, x, keep):
        return torch.stack([x, keep.to(x)], -1)


@pytest.mark.parametrize(
    "method", [pv.evaluation.AIS(start="prior", **QUICK), pv.evaluation.AIS(**QUICK), "naive"]
)
def test_evidence_with_an_enumerated_latent(method):
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            how = {"enumerate": "parallel"}
            c = pyro.sample("c", dist.Categorical(weights), infer=how)
            z = pyro.sample("z", dist.Normal(means[c], 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.2))

    x = 2 * torch.randn(40)
    each = dist.Normal(means, 1.25**0.5).log_prob(x.unsqueeze(-1))
    truth = (each + weights.log()).logsumexp(-1).double()
    check(pv.evidence(model, guide, x, method=method, num_particles=2000, seed=0), truth)


def test_naive_sampling_samples_discrete_latents():
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(weights))

    x = 2 * torch.randn(40)
    each = dist.Normal(means, 1.0).log_prob(x.unsqueeze(-1))
    truth = (each + weights.log()).logsumexp(-1).double()
    check(pv.evidence(model, guide, x, method="naive", num_particles=500, seed=0), truth)
    with pytest.raises(ValueError, match="latent site 'c' is discrete"):
        pv.evidence(model, guide, x, method=pv.evaluation.AIS(start="prior", **QUICK))


@pytest.mark.parametrize(
    "method", [pv.evaluation.AIS(start="prior", **QUICK), pv.evaluation.AIS(**QUICK), "naive"]
)
def test_evidence_without_vectorized_particles(method):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.shape == (len(x), 2)
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x / 3).unsqueeze(-1).expand(len(x), 2), 1.0).to_event(1))

    x = torch.randn(25)
    if isinstance(method, pv.evaluation.AIS):
        method = pv.evaluation.AIS(30, 3, method.start, 2, step_size=0.5)
    options = {"method": method, "num_particles": 60, "capture": False, "seed": 1}
    estimate = pv.evidence(model, guide, x, vectorize_particles=False, **options)
    truth = dist.Normal(0.0, 3**0.5).log_prob(x).double().mean()
    assert_within(estimate.mean, truth, estimate.monte_carlo_error, errors=4.5)


def test_ais_is_exact_when_the_decoder_ignores_the_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.randn(5)
    estimate = pv.evidence(model, guide, x, method=pv.evaluation.AIS(start="prior", **QUICK))
    torch.testing.assert_close(estimate.values, dist.Normal(0.0, 1.0).log_prob(x).double())


def test_ais_with_one_chain_or_one_temperature(pair, binary):
    pair[1](binary)
    x = binary[:4]
    one = pv.evidence(*pair, x, method=pv.evaluation.AIS(1, 1), seed=0)
    assert one.values.isfinite().all()
    assert one.monte_carlo_errors.isnan().all()
    many = pv.evidence(
        *pair, x, method=pv.evaluation.AIS(300, 1), seed=0
    )  # plain importance sampling
    plain = pv.evidence(*pair, x, num_particles=3000, seed=1)
    off = (many.values - plain.values).abs()
    assert (off < 4.5 * (many.monte_carlo_errors + plain.monte_carlo_errors)).all()


# --- execution


@pytest.mark.parametrize("method", ["prior", "guide", "naive"])
def test_captured_chains_equal_eager_chains(method, binary, without_compiler):
    pair = make_pair()
    pair[1](binary)
    if method != "naive":
        method = pv.evaluation.AIS(6, 4, method, leapfrog_steps=2, step_size=0.3)
    options = {"method": method, "num_particles": 15, "batch_size": 25, "seed": 5}
    options["pairs_per_pass"] = 75 if method == "naive" else 5000
    eager = pv.evidence(*pair, binary, capture=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = pv.evidence(*pair, binary, capture=True, **options)
    torch.testing.assert_close(captured.values, eager.values, rtol=1e-6, atol=0)


@pytest.mark.slow
@needs_compiler
def test_compiled_chains_equal_eager_chains(binary):
    pair = make_pair()
    pair[1](binary)
    ais = pv.evaluation.AIS(6, 4, leapfrog_steps=2, step_size=0.3)
    options = {"method": ais, "batch_size": 25, "seed": 5}
    eager, captured = (pv.evidence(*pair, binary, capture=c, **options) for c in (False, True))
    torch.testing.assert_close(captured.values, eager.values, rtol=1e-5, atol=0)


def test_seed_fixes_the_chains_and_keeps_the_global_rng_state(pair, binary):
    pair[1](binary)
    ais = pv.evaluation.AIS(5, 3, leapfrog_steps=2, step_size=0.3)
    before = torch.get_rng_state()
    values = [pv.evidence(*pair, binary, method=ais, seed=1).values for _ in range(2)]
    assert torch.equal(*values)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in (*pair[0].parameters(), *pair[1].parameters()))


def test_pairs_per_pass_bounds_the_chains_per_pass():
    largest = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            largest.append(z.numel())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    ais = pv.evaluation.AIS(20, 2, leapfrog_steps=1, step_size=0.5)
    estimate = pv.evidence(model, guide, torch.randn(23), method=ais, pairs_per_pass=100)
    assert max(largest) == 100
    assert estimate.values.shape == estimate.effective_sample_size.shape == (23,)
    assert "23 data points, 20 chains" in str(estimate)


# --- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_chains": 0}, ValueError, "num_chains must be at least 1"),
        ({"num_temperatures": 2.5}, TypeError, "num_temperatures must be a whole number"),
        ({"leapfrog_steps": 0}, ValueError, "leapfrog_steps must be at least 1"),
        ({"pilot": 0}, ValueError, "pilot must be at least 1"),
        ({"start": "posterior"}, ValueError, 'start must be "guide" or "prior"'),
        ({"target_acceptance": 1.0}, ValueError, "target_acceptance must be between 0 and 1"),
        ({"step_size": 0.0}, ValueError, "step_size must be positive"),
        ({"schedule": "cosine"}, ValueError, 'schedule must be "sigmoid", "linear" or numbers'),
        ({"schedule": 3}, TypeError, 'schedule must be "sigmoid", "linear" or numbers'),
        ({"schedule": (0.0, 0.5)}, ValueError, "must increase from 0 to 1"),
        ({"schedule": (0.0, 0.5, 0.5, 1.0)}, ValueError, "must increase from 0 to 1"),
        ({"schedule": (1.0,)}, ValueError, "must increase from 0 to 1"),
    ],
)
def test_ais_refuses_invalid_settings(options, error, message):
    with pytest.raises(error, match=message):
        pv.evaluation.AIS(**options)


@pytest.mark.parametrize("method", ["exact", None, 3])
def test_evidence_refuses_an_unknown_method(method, pair, binary):
    with pytest.raises(ValueError, match='method must be "importance", "naive", "ais" or'):
        pv.evidence(*pair, binary, method=method)


def test_ais_refuses_guides_that_cannot_start_chains():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def outside(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(5.0 + 0 * x, 1.0))  # below zero once in 3 million

    def auxiliary(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    x, ais = torch.linspace(-1, 1, 300), pv.evaluation.AIS(start="guide", **QUICK)
    path = TemperedPath(model, outside, (x,), start="guide", plate_nesting=1)
    with pytest.raises(ValueError, match="'z' was sampled outside its support"):
        path.rows_of({"z": torch.linspace(-1, 5, 300).unsqueeze(0)})
    with pytest.raises(ValueError, match=r"auxiliary site 'u'.*Or use AIS\(start=\"prior"):
        pv.evidence(model, auxiliary, x, method=ais)
    from_prior = pv.evaluation.AIS(start="prior", **QUICK)
    assert pv.evidence(model, auxiliary, x[:5], method=from_prior).values.isfinite().all()


def test_ais_refuses_a_randomly_refined_guide():
    model, plain = make_pair()
    x = torch.bernoulli(torch.full((10, 16), 0.5))
    guide = guides.SemiAmortized(plain, steps=2, step_size=0.5)
    with pytest.raises(ValueError, match="density of the start of AIS differs from call to call"):
        pv.evidence(model, guide, x, method=pv.evaluation.AIS(**QUICK))


def test_evidence_refuses_global_latents():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, 1.0))

    for method in ("ais", "naive"):
        with pytest.raises(ValueError, match="site 'mean' is outside"):
            pv.evidence(model, guide, torch.randn(5), method=method)


# --- interrupted and resumed


@pytest.mark.parametrize(
    "method", ["importance", pv.evaluation.AIS(10, 3, leapfrog_steps=1, step_size=0.3)]
)
def test_evidence_resumes_exactly_after_an_interrupt(method):
    oracle = LinearGaussian(d=2, D=3)
    x = oracle.sample(30)
    options = {"method": method, "num_particles": 40, "batch_size": 10, "seed": 3}
    whole = pv.evidence(oracle.model, oracle.guide, x, **options)
    before = torch.get_rng_state()

    class Stop:
        """Raise KeyboardInterrupt when the model has seen the third minibatch twice."""

        calls = 0

        def __call__(self, rows):
            self.calls += bool(torch.equal(rows[0], x[20]))
            if self.calls == 2:
                raise KeyboardInterrupt
            return oracle.model(rows)

    with pytest.raises(pv.evaluation.Interrupted, match="stopped after 20 data") as stopped:
        pv.evidence(Stop(), oracle.guide, x, **options)
    assert torch.equal(torch.get_rng_state(), before)
    so_far = stopped.value.partial
    assert torch.equal(so_far.values, whole.values[:20])
    resumed = pv.evidence(oracle.model, oracle.guide, x, resume=so_far, **options)
    names = ("values", "monte_carlo_errors", "khat", "effective_sample_size", "mean_log_weights")
    for name in names:
        torch.testing.assert_close(
            getattr(resumed, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True
        )
    if isinstance(method, pv.evaluation.AIS):
        seen = (resumed.annealing.log_normalizers, whole.annealing.log_normalizers)
        assert torch.equal(*seen)
    unfinished = copy.deepcopy(stopped.value)
    unseeded = options | {"seed": None}
    again = pv.evidence(oracle.model, oracle.guide, x, resume=unfinished, **unseeded)
    assert torch.equal(again.values, whole.values)  # with the seed stored in the exception
    with pytest.raises(ValueError, match="resume has samples of seed 3, got seed=4"):
        pv.evidence(oracle.model, oracle.guide, x, resume=unfinished, **options | {"seed": 4})
    with pytest.raises(ValueError, match="resume comes from evidence, but this call is sandwich"):
        pv.sandwich(oracle.model, oracle.guide, like=x, resume=unfinished)
    with pytest.raises(pv.evaluation.Interrupted) as of_sandwich:
        pv.sandwich(
            *(oracle.model, oracle.guide),
            like=x,
            ais=pv.evaluation.AIS(2, 2, leapfrog_steps=1, step_size=0.3),
            batch_size=10,
            progress=Interrupting(1),
        )
    with pytest.raises(ValueError, match="resume comes from sandwich, but this call is evidence"):
        pv.evidence(oracle.model, oracle.guide, x, resume=of_sandwich.value)
    with pytest.raises(TypeError, match=r"resume must be the pyro_vae\.evaluation\.Interrupted"):
        pv.evidence(oracle.model, oracle.guide, x, resume=3)
    with pytest.raises(
        ValueError, match="resume has 20 data points, but in this call no minibatch"
    ):
        pv.evidence(oracle.model, oracle.guide, x, resume=so_far, **{**options, "batch_size": 15})
    with pytest.raises(ValueError, match="resume has 5 data points more than data"):
        pv.evidence(
            oracle.model, oracle.guide, x[:15], resume=so_far, **{**options, "batch_size": 5}
        )
    with pytest.raises(
        ValueError, match=r"resume has estimates by .*, but this call uses naive with 40"
    ):
        pv.evidence(oracle.model, oracle.guide, x, resume=so_far, **{**options, "method": "naive"})


def test_interrupt_in_the_first_minibatch_is_a_plain_keyboard_interrupt():
    oracle = LinearGaussian()

    def model(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        pv.evidence(model, oracle.guide, oracle.sample(3))
    assert not isinstance(stopped.value, pv.evaluation.Interrupted)


def test_interrupt_is_raised_between_two_transitions():
    """A minibatch may take minutes, so its end is too late; finished minibatches are kept."""
    oracle = LinearGaussian(d=2, D=3)
    x = oracle.sample(20)
    options = {
        "method": pv.evaluation.AIS(5, 10, leapfrog_steps=1, pilot=2),
        "batch_size": 10,
        "seed": 3,
    }
    counted = Calls(oracle.model, -1, None)
    whole = pv.evidence(counted, oracle.guide, x, capture=False, **options)
    num_calls = -1 - counted.left
    # Inside the second minibatch.
    stopping = Calls(oracle.model, num_calls - 20, KeyboardInterrupt())
    with pytest.raises(pv.evaluation.Interrupted) as stopped:
        pv.evidence(stopping, oracle.guide, x, capture=False, **options)
    assert stopping.left == 0  # the model was not called again
    resumed = pv.evidence(oracle.model, oracle.guide, x, resume=stopped.value, **options)
    assert torch.equal(resumed.values, whole.values)


def test_evidence_resumes_exactly_without_a_seed():
    oracle = LinearGaussian(d=2, D=3)
    x = oracle.sample(30)
    options = {"num_particles": 10, "batch_size": 10, "capture": False}
    torch.manual_seed(1)
    whole = pv.evidence(oracle.model, oracle.guide, x, **options)
    torch.manual_seed(1)
    with pytest.raises(pv.evaluation.Interrupted) as stopped:
        pv.evidence(oracle.model, oracle.guide, x, progress=Interrupting(2), **options)
    resumed = pv.evidence(oracle.model, oracle.guide, x, resume=stopped.value, **options)
    assert torch.equal(resumed.values, whole.values)


def test_evidence_resumes_from_a_state_and_refuses_that_of_a_fit():
    oracle = LinearGaussian(d=2, D=3)
    x = oracle.sample(30)
    options = {"num_particles": 10, "batch_size": 10, "capture": False}
    whole = pv.evidence(oracle.model, oracle.guide, x, seed=3, **options)
    with pytest.raises(pv.evaluation.Interrupted) as stopped:
        pv.evidence(oracle.model, oracle.guide, x, seed=3, progress=Interrupting(2), **options)
    state = stopped.value.state
    resumed = pv.evidence(oracle.model, oracle.guide, x, resume=state, **options)
    assert torch.equal(resumed.values, whole.values)
    with pytest.raises(ValueError, match="with num_particles=10, got num_particles=20"):
        pv.evidence(oracle.model, oracle.guide, x, resume=state, num_particles=20)
    for other in (x + 1, x[:20], x.float()):
        with pytest.raises(ValueError, match="a call of evidence with other data"):
            pv.evidence(oracle.model, oracle.guide, other, resume=state, num_particles=10)
    of_a_fit = pv.training.Interrupted("the fit was stopped", None)
    with pytest.raises(TypeError, match="Resume a fit from its checkpoint"):
        pv.evidence(oracle.model, oracle.guide, x, resume=of_a_fit)


@pytest.mark.parametrize(
    "method", ["importance", pv.evaluation.AIS(5, 3, leapfrog_steps=1, pilot=2)]
)
def test_ctrl_c_is_deferred_until_the_program_returns(method):
    """An interrupt inside a program would leave Pyro's plates open."""
    oracle = LinearGaussian(d=2, D=3)
    x = oracle.sample(30)
    options = {"method": method, "num_particles": 40, "batch_size": 10, "seed": 3}
    whole = pv.evidence(oracle.model, oracle.guide, x, capture=False, **options)
    ends = []

    def model(rows):
        oracle.model(rows)
        if torch.equal(rows[0], x[20]) and not ends:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # where the interrupt would be raised
            ends.append(rows)

    with pytest.raises(pv.evaluation.Interrupted, match="stopped after 20 data") as stopped:
        pv.evidence(model, oracle.guide, x, capture=False, **options)
    assert len(ends) == 1
    resumed = pv.evidence(oracle.model, oracle.guide, x, resume=stopped.value, **options)
    assert torch.equal(resumed.values, whole.values)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_refuses_estimates_of_other_settings():
    oracle = LinearGaussian(d=1, D=2)
    x = oracle.sample(20)
    ais = pv.evaluation.AIS(**QUICK)
    options = {"batch_size": 10, "seed": 0}
    first = pv.evidence(oracle.model, oracle.guide, x[:10], method=ais, **options)
    assert first.annealing.settings == ais
    for other in (
        dataclasses.replace(ais, num_temperatures=ais.num_temperatures + 1),
        dataclasses.replace(ais, schedule="linear"),
    ):
        with pytest.raises(ValueError, match=r"resume has estimates by AIS\(.*but method is AIS\("):
            pv.evidence(oracle.model, oracle.guide, x, method=other, resume=first, **options)
    whole = pv.evidence(oracle.model, oracle.guide, x, method=ais, resume=first, **options)
    assert torch.equal(whole.values[:10], first.values)


def test_leapfrog_energy_error_is_second_order():
    """The error of leapfrog is second order: half the step leaves a fourth of the error."""
    precision = torch.tensor([1.0, 4.0], dtype=torch.float64)

    def evaluate(rows):
        density = -0.5 * (precision * rows.square()).sum(-1)
        zeros = torch.zeros_like(density)
        return State(rows, density, zeros, -precision * rows, torch.zeros_like(rows))

    rows = torch.randn(500, 1, 2, dtype=torch.float64) / precision.sqrt()
    rejected = []
    for step, count in ((0.2, 8), (0.1, 16)):
        torch.manual_seed(0)  # the same momenta and jitter
        size = torch.tensor([step], dtype=torch.float64)
        _, acceptance = transition(evaluate, evaluate(rows), 1.0, size, count)
        rejected.append(1 - acceptance.mean().item())
    assert 0 < rejected[0] < 0.03
    assert 3.0 < rejected[0] / rejected[1] < 5.0


@pytest.mark.slow
def test_intervals_from_the_guide_have_nominal_coverage():
    """Check log p(x) of each of 5 data points and their mean, over 200 repeats.

    The errors cover the draws alone, so the truth is that of the given data. The estimate of
    log p(x) is low by half of a squared error; this bias is ignored (0.03 errors here).
    """
    weight = torch.tensor([[1.0, 0.8], [-0.4, 0.5], [0.6, 0.9], [0.3, -0.5]])
    oracle = LinearGaussian(weight=weight, noise=1.0)
    oracle.v, oracle.s = 0.7 * oracle.v, 1.5 * oracle.s  # a start that is off and too wide
    x = oracle.sample(1000)
    options = {"pairs_per_pass": 40_000, "batch_size": 200, "capture": False, "seed": 0}
    ais = pv.evaluation.AIS(200, 8, start="guide", leapfrog_steps=4)
    estimate = pv.evidence(oracle.model, oracle.guide, x, method=ais, **options)
    off = (estimate.values - oracle.log_evidence(x)).reshape(200, 5)
    errors = estimate.monte_carlo_errors.reshape(200, 5)
    inside = (off.abs() < 1.96 * errors).double().mean(0)
    assert ((inside >= 0.90) & (inside <= 0.98)).all()
    inside = off.mean(1).abs() < 1.96 * errors.square().sum(1).sqrt() / 5
    assert 0.90 <= inside.double().mean().item() <= 0.98
