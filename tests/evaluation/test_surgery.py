import gc
import itertools
import math
import os
import signal
import threading
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from interrupting import Interrupting
from oracles import LinearGaussian, assert_within

import pyro_vae as pv
from pyro_vae import guides
from pyro_vae.evaluation._group import Group
from pyro_vae.evaluation._surgery import information
from pyro_vae.evaluation._surgery.control import controlled, moments
from pyro_vae.evaluation._surgery.dimensions import information_of_dimensions
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians
from pyro_vae.evaluation._surgery.pairwise import log_sum_of_ratios
from pyro_vae.evaluation._surgery.subsets import random_subsets, subset_information
from pyro_vae.evaluation._surgery.threads import in_threads


@pytest.mark.parametrize(("dtype", "num_particles"), [(torch.float32, 1), (torch.float64, 3)])
@pytest.mark.parametrize("scored", [False, True])
def test_surgery_matches_the_linear_gaussian_model(dtype, num_particles, scored):
    oracle = LinearGaussian(d=2, D=5, noise=2.0, dtype=dtype)
    count = 3001  # not a multiple of the batch size
    x = oracle.sample(count)
    guide = oracle.full_covariance_guide if scored else oracle.guide
    surgery = pv.elbo_surgery(oracle.model, guide, x, num_particles=num_particles, seed=2)
    errors = surgery.standard_errors
    shift = oracle.finite_data_shift(count)
    assert shift < 0.004  # small enough for the second-order formula
    evidence = oracle.log_evidence(x)
    # Given the data, the ELBO has only sampling error; the other terms also vary with the data.
    assert_within(surgery.elbo, evidence.mean().item() - oracle.gap, errors["elbo"])
    assert_within(surgery.rate, oracle.mutual_information + oracle.marginal_kl, errors["rate"])
    assert_within(
        surgery.mutual_information,
        oracle.mutual_information - shift,
        errors["mutual_information"],
    )
    assert_within(surgery.marginal_kl, oracle.marginal_kl + shift, errors["marginal_kl"])
    assert surgery.elbo == pytest.approx(-surgery.distortion - surgery.rate, rel=1e-12)
    assert surgery.rate == pytest.approx(
        surgery.mutual_information + surgery.marginal_kl, rel=1e-12
    )
    assert surgery.log_n == pytest.approx(math.log(count))


def test_marginal_kl_of_a_mismatched_prior_matches_its_closed_form():
    """The prior is off by a known amount: the marginal KL is KL(N(0, Q) || N(0, I))."""
    oracle = LinearGaussian(d=1, D=3)
    x = 2 * (oracle.sample(4000) - oracle.mu) + oracle.mu  # twice the model's spread
    surgery = pv.elbo_surgery(oracle.model, oracle.guide, x, seed=0)
    q = (4 * oracle.v @ oracle.covariance @ oracle.v.T + oracle.s).item()
    expected = 0.5 * (q - 1 - math.log(q))
    assert_within(surgery.marginal_kl, expected, surgery.standard_errors["marginal_kl"], 4.5)
    assert surgery.marginal_kl > 20 * surgery.standard_errors["marginal_kl"]


def test_matrix_products_equal_the_scored_pairs():
    """Two latents, one of them positive, with a guide built for the model."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((a.sum(-1) + b)[..., None], 1.0).to_event(1), obs=x)

    x = torch.randn(60, 1)
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(1, [8]))
    guide(x)
    with torch.no_grad():
        guide.built["head"].weight.mul_(5)
    parts = [DiagonalGaussians.read(guide, (rows,)) for rows in x.split(25)]
    q = DiagonalGaussians.concatenate(parts)
    assert q.sites == ("a", "b")
    assert not q.real
    codes = q.codes({"a": torch.zeros(4, 60, 2), "b": torch.zeros(4, 60)})
    normal = torch.distributions.Normal(q.loc, q.scale)
    pairs = normal.log_prob(codes.unsqueeze(2)).sum(-1)  # (K, N, N)
    own = pairs.diagonal(dim1=1, dim2=2)
    expected = (own - pairs.logsumexp(2) + math.log(60)).mean(0)
    found = torch.stack([math.log(60) - log_sum_of_ratios(q.loc, q.scale, z) for z in codes])
    torch.testing.assert_close(found.mean(0), expected, rtol=1e-9, atol=1e-9)

    fast = pv.elbo_surgery(model, guide, x, num_particles=200, seed=0)

    # The same density in a form that surgery does not recognize as Gaussian.
    masked = pyro.poutine.mask(guide, mask=torch.tensor(True))
    masked_model = pyro.poutine.mask(model, mask=torch.tensor(True))
    assert not DiagonalGaussians.is_diagonal_gaussian(masked, (x,))
    slow = pv.elbo_surgery(masked_model, masked, x, num_particles=200, seed=0)
    # The same data: only the draws differ, 200 of them for each of 60 data points.
    assert fast.mutual_information == pytest.approx(slow.mutual_information, abs=0.05)
    with torch.no_grad():
        variance = pv.terms(model, guide, x, num_particles=200).kl.var(0).mean().item()
    error = math.sqrt(2 * variance / (200 * 60))
    assert fast.rate == pytest.approx(slow.rate, abs=4 * error)  # false alarm: 6e-5


def test_hierarchical_guides_are_not_treated_as_mean_field():
    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):  # the exact posterior, top-down
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x / 3, (2 / 3) ** 0.5))
            pyro.sample("z1", dist.Normal((x + z2) / 2, 0.5**0.5))

    x = (torch.randn(1500) * 3**0.5).double()
    assert not DiagonalGaussians.is_diagonal_gaussian(guide, (x,))
    surgery = pv.elbo_surgery(model, guide, x, num_particles=2, seed=0)
    # I[x, (z1, z2)] = h(x) - h(x|z1) = log(3) / 2, and with the exact posterior q_agg is p.
    errors = surgery.standard_errors
    assert_within(surgery.mutual_information, 0.5 * math.log(3), errors["mutual_information"])
    assert abs(surgery.marginal_kl) < 4 * errors["marginal_kl"] + 0.01


@pytest.mark.parametrize("vectorize", [True, False])
def test_surgery_of_guides_that_use_the_shape_of_their_samples(vectorize):
    """The guide receives codes with a data dimension, like its own samples."""
    refine = torch.nn.Linear(2, 1).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z2, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 3, 1.0).to_event(1))
            if vectorize:
                seen = torch.cat([x.expand(*z1.shape[:-1], 1), z1], -1)
            else:
                seen = torch.cat([x, z1], 1)
            pyro.sample("z2", dist.Normal(refine(seen), 0.8).to_event(1))

    x = torch.randn(30, 1).double()
    surgery = pv.elbo_surgery(
        model, guide, x, num_particles=20, vectorize_particles=vectorize, seed=0
    )
    assert 0 < surgery.mutual_information < surgery.log_n
    table = pv.compare({"a": (model, guide)}, x, num_particles=20, vectorize_particles=vectorize)
    assert table.entries[0].runs[0].surgery is not None


def test_surgery_of_a_bijection_that_depends_on_the_data():
    """N(x, 0.5), written as a standard normal under an affine map that depends on x."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def transformed(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            inverse = dist.transforms.AffineTransform(-2 * x, 2.0, event_dim=1).inv
            pyro.sample("z", dist.TransformedDistribution(base, [inverse]))

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    x = 3 * torch.randn(200, 2)
    a, b = (pv.elbo_surgery(model, g, x, num_particles=50, seed=0) for g in (transformed, plain))
    assert a.mutual_information == pytest.approx(b.mutual_information, abs=0.05)
    assert a.mutual_information > 2


def test_surgery_of_a_latent_whose_base_has_another_event_shape():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.LKJCholesky(3, 1.0))
            pyro.sample("x", dist.Normal(c.sum((-1, -2)).unsqueeze(-1), 1.0).to_event(1), obs=x)

    x = torch.randn(20, 1)
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(1, [8]))
    surgery = pv.elbo_surgery(model, guide, x, seed=0)
    assert 0 <= surgery.mutual_information < surgery.log_n


def test_mutual_information_saturates_at_log_n():
    """Well-separated codes identify their data point, so the information is log N."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-3).to_event(1))

    surgery = pv.elbo_surgery(model, guide, torch.randn(200, 5), seed=0)
    assert surgery.mutual_information == pytest.approx(surgery.log_n, abs=1e-6)


def test_control_variate_reduces_the_error_of_the_marginal_kl():
    oracle = LinearGaussian(d=2, D=5)
    surgery = pv.elbo_surgery(oracle.model, oracle.guide, oracle.sample(2000), seed=0)
    errors = surgery.standard_errors
    assert errors["marginal_kl"] < 0.3 * errors["mutual_information"]


def test_the_coefficient_of_the_noise_is_that_of_codes_of_the_same_data_point():
    """Values that differ far more between data points than over the codes hid it."""
    for num_particles, count in ((2, 40), (50, 40), (50, 2)):
        of_data = 10 * torch.randn(count, dtype=torch.float64)
        noise = torch.randn(num_particles, count, dtype=torch.float64)
        mean, variance = moments(noise, noise).unbind(1)
        values = moments(of_data - 0.7 * noise, noise)
        torch.testing.assert_close(controlled(values, mean, variance, num_particles), of_data)


def test_more_particles_reduce_the_error_of_the_mutual_information():
    x = torch.randn(40, 2, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.7).to_event(1))

    axis = torch.linspace(-10, 10, 81, dtype=torch.float64)  # accurate for Gaussians
    grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
    log_q = torch.distributions.Normal(x, 0.7).log_prob(grid).sum(2)
    log_ratio = log_q - log_q.logsumexp(1, keepdim=True) + math.log(40)
    truth = (log_q.exp() * log_ratio).sum().item() / 16 / 40
    for seed in range(8):
        surgery = pv.elbo_surgery(model, guide, x, seed=seed, num_particles=300)
        # The standard deviation of a code is about 0.3 with the control variate, and one without.
        # One of eight exceeds 5 errors once in 200,000 runs.
        assert abs(surgery.mutual_information - truth) < 5 * 0.4 / (40 * 300) ** 0.5


def test_surgery_refuses_guides_that_cannot_be_scored():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    planar = dist.transforms.Planar(2)

    def flow(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x, 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    with pytest.raises(ValueError, match="guide site 'z' cannot be scored"):
        pv.elbo_surgery(model, flow, torch.randn(10, 2))


def test_surgery_prints_its_terms():
    oracle = LinearGaussian()
    text = str(pv.elbo_surgery(oracle.model, oracle.guide, oracle.sample(50)))
    assert "mutual_information" in text
    assert "±" in text


@pytest.mark.parametrize("width", [1e-9, 1e-4, 0.05, 1.0])
def test_log_sum_of_ratios_is_accurate_for_narrow_posteriors(width):
    """Narrow posteriors far from zero, whose log-densities cancel, and codes near many of them."""
    loc = 3 + torch.randn(1000, 8, dtype=torch.float64)
    loc[500:] = loc[:500] + width * torch.randn(500, 8, dtype=torch.float64)
    scale = width * (0.5 + torch.rand_like(loc))
    codes = loc + scale * torch.randn_like(loc)
    normal = torch.distributions.Normal(loc, scale)
    pairs = torch.stack([normal.log_prob(code).sum(1) for code in codes])
    exact = pairs.logsumexp(1) - pairs.diagonal()
    torch.testing.assert_close(log_sum_of_ratios(loc, scale, codes), exact, rtol=0, atol=1e-6)


def test_log_sum_of_ratios_of_codes_far_from_their_posterior():
    """Rounding moves codes off a very narrow posterior; ratios then exceed float32's maximum."""
    loc = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    scale = torch.tensor([[1e-3], [1.0]], dtype=torch.float64)
    codes = torch.tensor([[0.1], [1.0]], dtype=torch.float64)
    ratio = torch.distributions.Normal(loc, scale).log_prob(codes[0]).squeeze(1)
    expected = ratio.logsumexp(0) - ratio[0]
    assert expected > 1000
    torch.testing.assert_close(log_sum_of_ratios(loc, scale, codes)[0], expected)


def test_threads_equal_one_thread_and_are_restored():
    loc = torch.randn(700, 3, dtype=torch.float64)
    scale = torch.full_like(loc, 0.3)
    alone = log_sum_of_ratios(loc, scale, loc)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(log_sum_of_ratios(loc, scale, loc), alone, rtol=0, atol=1e-12)
        assert torch.get_num_threads() == 2

        def interrupted(piece):
            if piece == 3:
                raise KeyboardInterrupt
            return piece

        with pytest.raises(KeyboardInterrupt):
            list(in_threads(interrupted, range(100), torch.device("cpu")))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_total_correlation_and_dimension_wise_kl_match_the_linear_gaussian_model():
    oracle = LinearGaussian(d=3, D=5, noise=2.0)
    x = oracle.sample(3001)
    surgery = pv.elbo_surgery(oracle.model, oracle.guide, x, num_particles=2, seed=1)
    q = oracle.aggregated_covariance
    v = q.diagonal()
    correlation = 0.5 * (v.log().sum() - q.logdet()).item()
    dimension_wise = 0.5 * (v - 1 - v.log()).sum().item()
    errors = surgery.standard_errors
    shift = oracle.finite_data_shift(3001)  # of the joint; far smaller for each dimension
    assert_within(surgery.total_correlation, correlation + shift, errors["total_correlation"], 4.5)
    # An estimated KL near zero is chi-square, about 1/2N per dimension. That is not a bias.
    assert_within(surgery.dimension_wise_kl, dimension_wise, errors["dimension_wise_kl"] + 3 / 3001)
    total = surgery.total_correlation + surgery.dimension_wise_kl
    assert surgery.marginal_kl == pytest.approx(total, abs=1e-9)
    assert sum(surgery.kl_of_dimensions["z"]) == pytest.approx(surgery.rate)
    assert surgery.kl_of_sites == pytest.approx({"z": surgery.rate})
    assert surgery.optimal_prior_gain == surgery.marginal_kl
    assert "total_correlation" in str(surgery)


def test_information_of_dimensions_matches_a_fine_grid():
    """One-dimensional mixtures of narrow and wide Gaussians."""
    loc = torch.randn(40, 2, dtype=torch.float64) * torch.tensor([2.0, 0.1])
    scale = 0.05 + torch.rand(40, 2, dtype=torch.float64)
    found = information_of_dimensions(DiagonalGaussians(loc, scale, ("z",), True), Group())
    z = torch.linspace(-20, 20, 20_001, dtype=torch.float64).unsqueeze(1)
    for j in range(2):
        log_q = torch.distributions.Normal(loc[:, j], scale[:, j]).log_prob(z)
        log_ratio = log_q - log_q.logsumexp(1, keepdim=True) + math.log(40)
        expected = (log_q.exp() * log_ratio).sum(0) * (z[1] - z[0])
        torch.testing.assert_close(found[:, j], expected, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("distance", [0.5, 2.0, 3.0, 4.0, 8.0])
def test_information_of_two_distant_gaussians(distance):
    """The logarithm of q_agg has a bend between them, narrower than the step."""
    loc = torch.tensor([[-distance], [distance]]).double()
    gaussians = DiagonalGaussians(loc, torch.ones_like(loc), ("z",), True)
    z = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    log_q = torch.distributions.Normal(loc, 1.0).log_prob(z)
    log_ratio = log_q - log_q.logsumexp(0) + math.log(2)
    expected = (log_q.exp() * log_ratio).sum(1) * (z[1] - z[0])
    found = information_of_dimensions(gaussians, Group()).squeeze(1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


ZEROS = torch.zeros(2, dtype=torch.float64)
ROUGH_PRIORS = {  # with kinks, jumps, or peaks narrower than the posteriors
    "laplace": dist.Laplace(ZEROS, 0.05),
    "gumbel": dist.Gumbel(ZEROS, 0.3),
    "student": dist.StudentT(1.0, ZEROS, 0.05),
    "cauchy": dist.Cauchy(ZEROS, 0.01),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2, 2, dtype=torch.float64)),
        dist.Normal(torch.tensor([-1.0, 1.0]).double().expand(2, 2), 0.1),
    ),
    "uniform": dist.Uniform(ZEROS - 9, ZEROS + 9),
}


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("name", ROUGH_PRIORS)
def test_dimension_terms_of_rough_priors(name, spread):
    """Quadrature of log p(z) missed kinks and peaks between its points, with an error of zero."""
    prior, x = ROUGH_PRIORS[name], spread * torch.randn(30, 2, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    surgery = pv.elbo_surgery(model, guide, x, seed=0, num_particles=100)
    errors = surgery.standard_errors

    def log_q(z):  # of each dimension and data point
        return torch.distributions.Normal(x.T.unsqueeze(1), 1.0).log_prob(z.unsqueeze(1))

    z = torch.linspace(-12, 12, 97, dtype=torch.float64)  # accurate for Gaussians of scale 1
    first, second = log_q(z)
    joint = (first.unsqueeze(1) + second).logsumexp(2) - math.log(30)
    marginals = [each.logsumexp(1) - math.log(30) for each in (first, second)]
    dependence = joint - marginals[0].unsqueeze(1) - marginals[1]
    correlation = (joint.exp() * dependence).sum().item() / 16
    assert_within(surgery.total_correlation, correlation, errors["total_correlation"] + 1e-9)
    if name == "uniform":  # the posteriors have mass outside
        assert surgery.dimension_wise_kl == surgery.marginal_kl == math.inf
        return
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    aggregated = log_q(z).logsumexp(2) - math.log(30)
    log_ratio = aggregated - prior.log_prob(z.unsqueeze(1).expand(-1, 2)).T
    expected = (aggregated.exp() * log_ratio).sum().item() * 1e-4
    if name in ("laplace", "gumbel"):  # the rate is known in closed form
        assert surgery.dimension_wise_kl == pytest.approx(expected, rel=1e-5)
    else:
        assert_within(surgery.dimension_wise_kl, expected, errors["dimension_wise_kl"])


@pytest.mark.parametrize("kind", ["dependent", "data-dependent", "two sites", "narrow"])
def test_surgery_omits_undefined_dimension_terms(kind):
    def model(x):
        with pyro.plate("data", len(x)):
            loc = x if kind == "data-dependent" else torch.zeros(2)
            p = dist.Normal(loc, 1.0).to_event(1)
            if kind == "dependent":
                p = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.5)
            z = pyro.sample("z", p)
            if kind == "two sites":
                pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-12 if kind == "narrow" else 0.5).to_event(1))
            if kind == "two sites":
                pyro.sample("w", dist.Normal(x.sum(-1), 0.5))

    surgery = pv.elbo_surgery(model, guide, torch.randn(60, 2).double(), seed=0)
    assert surgery.total_correlation is None
    assert surgery.dimension_wise_kl is None
    assert set(surgery.kl_of_sites) == ({"z", "w"} if kind == "two sites" else {"z"})
    assert sum(surgery.kl_of_sites.values()) == pytest.approx(surgery.rate)
    assert (surgery.kl_of_dimensions is None) == (kind == "dependent")
    assert ("kl of w" in str(surgery)) == (kind == "two sites")
    assert surgery.saturated == (kind == "narrow")
    assert ("saturated" in str(surgery)) == (kind == "narrow")


@pytest.mark.parametrize(
    ("scored", "size"),
    [
        (False, 15),
        (True, 60),
        pytest.param(False, 60, marks=pytest.mark.slow),
        pytest.param(True, 15, marks=pytest.mark.slow),
    ],
)
def test_minibatch_estimators_have_bounded_bias(scored, size):
    oracle = LinearGaussian(d=2, D=5, noise=0.5)
    count = 400
    x = oracle.sample(count)
    guide = oracle.full_covariance_guide if scored else oracle.guide
    repeats = 8

    def repeated(estimator):
        found = [
            pv.elbo_surgery(
                oracle.model, guide, x, batch_size=size, estimator=estimator, seed=seed
            ).mutual_information
            for seed in range(repeats)
        ]
        found = torch.tensor(found)
        return found.mean().item(), found.std().item() / repeats**0.5

    exact = pv.elbo_surgery(oracle.model, oracle.guide, x, num_particles=10, seed=0)
    exact = exact.mutual_information
    (stratified, s), (weighted, w) = repeated("stratified"), repeated("weighted")
    assert -4.5 * s < stratified - exact < math.log(count) - exact + 4.5 * s
    bias = weighted - exact
    assert math.log(size) - 4.5 * w < bias < math.log(count * size) - exact + 4.5 * w
    assert size > 15 or stratified - exact > 4.5 * s  # the bias of few data is visible


def test_minibatch_of_all_data_is_exact_up_to_the_weights():
    oracle = LinearGaussian(d=2, D=5)
    pairs = torch.randn(3, 50, 50, dtype=torch.float64)
    exact = pairs.diagonal(dim1=1, dim2=2) - pairs.logsumexp(2) + math.log(50)
    torch.testing.assert_close(subset_information(pairs, 50, "stratified"), exact)
    torch.testing.assert_close(subset_information(pairs, 50, "weighted"), exact + math.log(50))
    x = oracle.sample(50)
    surgery = pv.elbo_surgery(oracle.model, oracle.guide, x, estimator="stratified", seed=0)
    assert "stratified" in str(surgery)
    subsets = random_subsets(7, 2)
    assert [len(rows) for rows in subsets] == [3, 2, 2]
    assert torch.equal(torch.cat(subsets).sort().values, torch.arange(7))


def test_stratified_estimate_of_q_agg_is_unbiased():
    """Average over all minibatches of 3 of 5 data points that contain the first."""
    pairs = torch.randn(5, 5, dtype=torch.float64)
    estimates = []
    for others in itertools.combinations(range(1, 5), 2):
        rows = torch.tensor([0, *others])
        information = subset_information(pairs[rows][:, rows].unsqueeze(0), 5, "stratified")
        estimates.append((pairs[0, 0] - information[0, 0]).exp())
    torch.testing.assert_close(torch.stack(estimates).mean(), pairs[0].exp().mean())


def test_surgery_refuses_unavailable_estimators():
    oracle = LinearGaussian()
    x = oracle.sample(20)
    with pytest.raises(ValueError, match='estimator must be "exact", '):
        pv.elbo_surgery(oracle.model, oracle.guide, x, estimator="all")
    with pytest.raises(ValueError, match="at least two data points per minibatch, got one"):
        pv.elbo_surgery(oracle.model, oracle.guide, x, estimator="stratified", batch_size=1)


def coverage(repeats, count, **options):
    """Return the share of 95% intervals that cover the truth, by term, with new data each time."""
    hits = dict.fromkeys(("elbo", "distortion", "rate", "mutual_information", "marginal_kl"), 0)
    weight = torch.tensor([[1.0, 0.3], [-0.4, 0.8], [0.5, 0.5]]).double()
    oracle = LinearGaussian(weight=weight, noise=1.5)
    shift = oracle.finite_data_shift(count)
    log_evidence = -oracle.weight.shape[0] / 2 * math.log(2 * math.pi * math.e)
    elbo = log_evidence - 0.5 * oracle.covariance.logdet().item() - oracle.gap
    rate = oracle.mutual_information + oracle.marginal_kl
    truth = {
        "elbo": elbo,
        "distortion": -elbo - rate,
        "rate": rate,
        "mutual_information": oracle.mutual_information - shift,
        "marginal_kl": oracle.marginal_kl + shift,
    }
    for seed in range(repeats):
        x = oracle.sample(count)
        surgery = pv.elbo_surgery(oracle.model, oracle.guide, x, seed=seed, **options)
        for name, value in truth.items():
            error = surgery.standard_errors[name]
            hits[name] += abs(getattr(surgery, name) - value) < 1.96 * error
    return {name: hit / repeats for name, hit in hits.items()}


@pytest.mark.parametrize("num_scored", [None, 100, 30])
def test_intervals_cover_the_truth(num_scored):
    # below 0.85 once in 10,000 if 0.95 is right
    for name, share in coverage(40, 1000, num_scored=num_scored).items():
        assert share >= 0.82, name


@pytest.mark.slow
def test_intervals_have_nominal_coverage():
    for name, share in coverage(200, 2000).items():
        assert 0.90 <= share <= 0.98, name


def test_surgery_warns_before_a_long_scoring(monkeypatch):
    oracle = LinearGaussian()
    x, guide = oracle.sample(40), oracle.full_covariance_guide
    monkeypatch.setattr(information, "_MEASURED", 0.0)
    with warnings.catch_warnings(action="error"):
        pv.elbo_surgery(oracle.model, guide, x)
    monkeypatch.setattr(information, "_LONG", 0.0)
    with pytest.warns(match=r"scores 30 codes under 40 posteriors .* about 0 minutes") as found:
        pv.elbo_surgery(oracle.model, guide, x, num_scored=30, batch_size=5)
    assert len(found) == 1
    assert found[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        pv.elbo_surgery(oracle.model, oracle.guide, x)


def test_interrupt_restores_the_rng_state():
    oracle = LinearGaussian()
    calls = []

    def guide(x):
        calls.append(len(x))
        if len(calls) > 8:
            raise KeyboardInterrupt
        oracle.guide(x)

    x = oracle.sample(3000)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        pv.elbo_surgery(oracle.model, guide, x, batch_size=100, seed=0, progress=True)
    assert torch.equal(torch.get_rng_state(), state)
    calls.clear()
    again = [pv.elbo_surgery(oracle.model, oracle.guide, x, seed=0).elbo for _ in range(2)]
    assert again[0] == again[1]


# --- interrupted and resumed


@pytest.mark.parametrize("kind", ["gaussian", "part", "scored", "stratified", "shuffled"])
def test_surgery_resumes_exactly_after_an_interrupt(kind, monkeypatch):
    monkeypatch.setattr(information, "_CODES_OF_A_THREAD", 64)
    monkeypatch.setattr(information, "LOG_DENSITIES_AT_A_TIME", 100 * 50 * 64)
    before = torch.get_num_threads()
    oracle = LinearGaussian(d=2, D=5)
    x = oracle.sample(300)
    guide = oracle.full_covariance_guide if kind in ("scored", "shuffled") else oracle.guide
    options = {"batch_size": 50, "seed": 3, "num_particles": 2}
    options["estimator"] = "stratified" if kind == "stratified" else "exact"
    if kind == "part":
        options["num_scored"] = 230
    if kind == "shuffled":
        x = torch.utils.data.DataLoader(x, batch_size=50, shuffle=True)
    whole = pv.elbo_surgery(oracle.model, guide, x, **options)
    at = 3 if kind == "stratified" else 6 + 2  # during the pass over the data, or after two blocks
    with pytest.raises(
        pv.evaluation.Interrupted, match="elbo_surgery was stopped after"
    ) as stopped:
        pv.elbo_surgery(oracle.model, guide, x, progress=Interrupting(at), **options)
    partial = stopped.value.partial
    assert 0 < partial.num_scored == stopped.value.state.num_done < 300
    assert f"interrupted: averages over {partial.num_scored} scored data points" in str(partial)
    assert partial.log_n == whole.log_n
    assert partial.rate == pytest.approx(partial.mutual_information + partial.marginal_kl)
    difference = abs(partial.mutual_information - whole.mutual_information)
    assert difference < 5 * partial.standard_errors["mutual_information"]
    assert partial.total_correlation is None
    assert (partial.interrupted, whole.interrupted) == (True, False)
    # Interrupted once more after the resume.
    with pytest.raises(pv.evaluation.Interrupted) as again:
        pv.elbo_surgery(
            *(oracle.model, guide, x),
            **options,
            resume=stopped.value,
            progress=Interrupting(at + 1),
        )
    assert again.value.partial.num_scored > partial.num_scored
    assert pv.elbo_surgery(oracle.model, guide, x, resume=again.value, **options) == whole
    assert torch.get_num_threads() == before


def test_surgery_interrupted_in_its_last_part_has_scored_all_codes():
    oracle = LinearGaussian(d=2, D=5)
    x = oracle.sample(100)
    whole = pv.elbo_surgery(oracle.model, oracle.guide, x, seed=3)
    assert whole.total_correlation is not None
    with pytest.raises(pv.evaluation.Interrupted) as stopped:
        pv.elbo_surgery(oracle.model, oracle.guide, x, seed=3, progress=Interrupting(2))
    partial = stopped.value.partial
    assert (partial.num_scored, partial.total_correlation) == (100, None)
    assert partial.mutual_information == whole.mutual_information
    assert pv.elbo_surgery(oracle.model, oracle.guide, x, resume=stopped.value) == whole
    for other in (x[:90], x.flip(0)):
        with pytest.raises(ValueError, match="a call of elbo_surgery with other data"):
            pv.elbo_surgery(oracle.model, oracle.guide, other, resume=stopped.value)
    with pytest.raises(ValueError, match="with num_particles=1, got num_particles=2"):
        pv.elbo_surgery(oracle.model, oracle.guide, x, resume=stopped.value, num_particles=2)


def test_interrupt_ends_running_threads_at_once():
    """Send SIGINT, as Ctrl-C does, during a sum that would run for minutes."""
    loc = torch.randn(200_000, 20, dtype=torch.float64)
    scale = torch.full_like(loc, 0.3)
    before = torch.get_num_threads()
    begun = []
    gc.collect()  # garbage of other tests: a weak reference's callback would swallow the interrupt
    timer = threading.Timer(1.0, lambda: begun.append(time.perf_counter()) or send_interrupt())
    try:
        torch.set_num_threads(2)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            log_sum_of_ratios(loc, scale, loc)
        assert time.perf_counter() - begun[0] < 1.0
        assert torch.get_num_threads() == 2
    finally:
        timer.cancel()
        torch.set_num_threads(before)


def send_interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_marginal_kl_is_nan_if_the_prior_depends_on_covariates():
    """q(z|x, c) = p(z|c): the rate is zero and the latents are informative about c."""

    def model(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(c, 0.1))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(c, 0.1))

    c = torch.randn(300).sort().values
    x = c + torch.randn(300)
    for estimator in ("exact", "stratified"):
        surgery = pv.elbo_surgery(model, guide, (x, c), estimator=estimator, batch_size=60, seed=0)
        assert surgery.rate == pytest.approx(0.0, abs=1e-6)
        assert surgery.mutual_information > 1.5
        assert math.isnan(surgery.marginal_kl)
        assert math.isnan(surgery.optimal_prior_gain)
        assert surgery.total_correlation is None
        assert "no marginal KL: the prior depends on covariates" in str(surgery)
    # The rows are sorted by class, so the first minibatch holds one class.
    classes = (c > 0).to(c)
    surgery = pv.elbo_surgery(model, guide, (x, classes), batch_size=60, seed=0)
    assert math.isnan(surgery.marginal_kl)


def test_marginal_kl_is_defined_if_the_prior_depends_on_other_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(top + k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.5 * x, 1.0))
            pyro.sample("z", dist.Normal(top, 1.0))

    surgery = pv.elbo_surgery(model, guide, torch.randn(100), seed=0)
    assert surgery.marginal_kl == pytest.approx(surgery.rate - surgery.mutual_information)


class RandomRows(torch.utils.data.Dataset):
    """A data set that samples a new row at each access."""

    def __init__(self, means):
        self.means = means

    def __len__(self):
        return len(self.means)

    def __getitem__(self, row):
        return torch.bernoulli(self.means[row])


@pytest.mark.parametrize("estimator", ["exact", "stratified"])
def test_random_data_are_read_once(estimator):
    """A second pass would sample other rows, and the information could exceed log N."""
    weight = torch.randn(20, 2)

    def guide(x):
        with pyro.plate("data", len(x)):
            q = dist.MultivariateNormal(0.6 * (x - 0.5) @ weight, scale_tril=0.2 * torch.eye(2))
            pyro.sample("z", q)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight.T).to_event(1), obs=x)

    data = RandomRows(torch.rand(60, 20))
    surgery = pv.elbo_surgery(model, guide, data, estimator=estimator, seed=0)
    assert 0.5 < surgery.mutual_information <= surgery.log_n


@pytest.mark.parametrize("estimator", ["exact", "stratified"])
def test_surgery_refuses_a_guide_with_a_random_density(estimator):
    weight = 1.5 * torch.randn(2, 6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    guide = guides.AmortizedNormal(model, pv.nets.MLP(6, [8]))
    moving = guides.SemiAmortized(guide, steps=5, step_size=0.1)
    with pytest.raises(ValueError, match=r"differs from run to run, by .* by random"):
        pv.elbo_surgery(model, moving, torch.randn(40, 6), estimator=estimator, seed=0)


def test_dimension_wise_kl_is_left_out_for_very_narrow_posteriors():
    """A grid for posterior scales of 1e-7 would exhaust memory and lose accuracy."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def surgery(scale, x):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, scale))

        return pv.elbo_surgery(model, guide, x, seed=0, num_particles=10)

    x = torch.linspace(-1.5, 1.5, 10, dtype=torch.float64)
    known = surgery(1e-4, x)
    assert known.dimension_wise_kl == pytest.approx(known.marginal_kl, abs=1e-6)
    for scale in (5e-6, 1e-6):
        assert surgery(scale, x).dimension_wise_kl is None


@pytest.mark.parametrize("width", [3e-4, 1e-7, 1e-8])
def test_log_sum_of_ratios_is_accurate_for_nearby_narrow_gaussians(width):
    """Two Gaussians are close; the third at 10 would swamp their squares in rounding error."""
    loc = torch.tensor([[0.0], [0.5 * width], [10.0]], dtype=torch.float64)
    scale = torch.full_like(loc, width)
    z = loc + scale * torch.randn(3, 1, dtype=torch.float64)
    pairs = dist.Normal(loc.T, scale.T).log_prob(z)
    expected = pairs.logsumexp(1) - pairs.diagonal()
    torch.testing.assert_close(log_sum_of_ratios(loc, scale, z), expected, atol=1e-6, rtol=0)


def test_errors_of_few_data_cover_the_truth():
    """With 12 data points, a regression would underestimate the error of the marginal KL."""
    x = torch.randn(12, dtype=torch.float64)
    q = dist.Normal(torch.stack([0.5 * x + 0.3, 0.3 * x], 1), 0.5)
    p = dist.Normal(torch.zeros_like(q.loc), 1.0)
    rate = torch.distributions.kl_divergence(q, p).sum(1)
    found = []
    for _ in range(400):
        z = q.sample()
        noise = rate - (q.log_prob(z) - p.log_prob(z)).sum(1)
        plain = math.log(12) - log_sum_of_ratios(q.loc, q.scale, z)
        found.append((plain, controlled(moments(plain[None], noise[None]), noise, 0 * noise, 1)))
    plain, changed = (torch.stack(each) for each in zip(*found, strict=True))
    truth = plain.mean()
    errors = (rate - changed).std(1) / 12**0.5
    assert ((changed.mean(1) - truth).abs() < 1.96 * errors).double().mean() > 0.9
