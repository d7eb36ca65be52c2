"""Samples that the model gives a density of zero: their weight is zero in every estimator.

Estimates are compared with closed forms or quadrature at 4.5 standard errors: a false alarm in
10^5 comparisons.
"""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special

import pyro_vae as pv

ALL = {"enumerate": "parallel"}
GRID = torch.linspace(-12, 12, 200_001, dtype=torch.float64)


def integral(log_density):
    return torch.trapezoid(log_density.exp(), GRID, dim=-1)


def assert_near(found, truth):
    assert found.monte_carlo_errors.isfinite().all()
    assert ((found.values - truth).abs() < 4.5 * found.monte_carlo_errors).all()


def rates(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Exponential(1.0))
        pyro.sample("x", dist.Poisson(z), obs=x)


def rates_by_factor(x):
    """The same model: the factor cuts and reweights a prior on the real line."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.StudentT(4.0, 0.5, 1.0))
        prior = dist.StudentT(4.0, 0.5, 1.0).log_prob(z)
        pyro.factor("positive", torch.where(z > 0, -z - prior, -torch.inf))
        pyro.sample("x", dist.Poisson(z), obs=x)


def tailed(x):
    """A fifth of the samples are negative, and then the Poisson has no density."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.StudentT(4.0, 1.0, 1.0).expand([len(x)]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("model", "method"),
    [(rates, "importance"), (rates_by_factor, "importance"), (rates_by_factor, "naive")],
)
def test_likelihoods_need_no_density_at_samples_of_zero_weight(model, method, seed):
    x = torch.arange(4.0).repeat(30)
    found = pv.evidence(model, tailed, x, method=method, num_particles=3000, seed=seed)
    assert_near(found, -(x.double() + 1) * math.log(2))


def test_a_parameter_that_is_invalid_everywhere_is_an_error():
    def negative(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Poisson(-z), obs=x)

    def inside(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Exponential(1.0).expand([len(x)]))

    with pytest.raises(ValueError, match="parameter rate"):
        pv.evidence(negative, inside, torch.arange(4.0), seed=0)


@pytest.mark.parametrize("row", [0, 35])
def test_an_observation_outside_of_its_support_is_an_error(row):
    x = torch.arange(4.0).repeat(10)
    x[row] = -1.0
    stream = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=10)
    for data in (x, stream):
        with pytest.raises(ValueError, match="outside the support of site 'x'"):
            pv.evidence(rates, tailed, data, num_particles=50, seed=0)


def nested(x):
    """The bound of b is a, so b has the density E1(b)."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Exponential(1.0))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def nested_scale(x):
    """The scale a - b is positive for samples of the prior. It has the density of b."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Exponential(1.0))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("x", dist.Normal(0.0, a - b + 0.3), obs=x)


def guide_of_nested(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Exponential(torch.ones(len(x))))
        pyro.sample("b", dist.Uniform(0.0, a))


@pytest.mark.parametrize("method", ["naive", "importance"])
@pytest.mark.parametrize("model", [nested, nested_scale])
def test_bounds_may_depend_on_other_latents(model, method):
    x = torch.tensor([0.3, -0.5, 1.2, 0.0, 2.0])
    b = torch.linspace(1e-6, 30, 400_001, dtype=torch.float64)
    log_prior = torch.from_numpy(special.exp1(b.numpy())).log()
    wide = x.double().unsqueeze(1)
    p_x = dist.Normal(b, 1.0) if model is nested else dist.Normal(0.0, b + 0.3)
    truth = torch.trapezoid((log_prior + p_x.log_prob(wide)).exp(), b)
    first = 1e-6 * (1 - math.log(1e-6) - 0.577)  # of the prior, below the grid
    truth = truth + first * p_x.log_prob(wide)[:, 0].exp()
    found = pv.evidence(model, guide_of_nested, x, method=method, num_particles=4000, seed=0)
    assert_near(found, truth.log())


def test_a_factor_that_excludes_no_sample_of_the_prior_is_accepted_by_ais():
    def near(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.01))
            pyro.factor("near", torch.where((a - b).abs() < 0.1, 0.0, -torch.inf))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x / 2, 0.7))
            pyro.sample("b", dist.Normal(a, 0.01))

    x = torch.tensor([0.3, -0.5, 1.2])
    ais = pv.evaluation.AIS(start="prior", num_chains=200, num_temperatures=20)
    found = pv.evidence(near, guide, x, method=ais, seed=0)
    assert_near(found, dist.Normal(0.0, (2 + 1e-4) ** 0.5).log_prob(x.double()))


def ordered(first, enumerated):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            infer = dict(ALL) if enumerated else {}
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)), infer=infer)
            factor = torch.where((z > 0) & (c >= 0), 0.0, -torch.inf)
            if first:
                pyro.factor("positive", factor)
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)
            if not first:
                pyro.factor("positive", factor)

    return model


@pytest.mark.parametrize("first", [True, False])
def test_a_factor_beside_an_enumerated_latent_may_come_before_or_after_the_data(first):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x, 1.2))

    x = torch.linspace(-1, 2, 10)
    wide = x.double().unsqueeze(1)
    p_z = torch.where(GRID > 0, dist.Normal(0.0, 1.0).log_prob(GRID), -torch.inf)
    truth = sum(
        p * integral(p_z + dist.Normal(GRID + c, 1.0).log_prob(wide))
        for c, p in ((0, 0.6), (1, 0.4))
    )
    found = pv.evidence(ordered(first, enumerated=True), guide, x, num_particles=2000, seed=0)
    assert_near(found, truth.log())
    t = pv.terms(ordered(first, enumerated=True), guide, x, num_particles=50)
    z = t.samples["z"]
    mixture = torch.logaddexp(
        math.log(0.6) + dist.Normal(z, 1.0).log_prob(x),
        math.log(0.4) + dist.Normal(z + 1, 1.0).log_prob(x),
    )
    expected = torch.where(z > 0, mixture, -torch.inf)
    assert torch.allclose(t.log_likelihood, expected, atol=1e-5)
    assert torch.allclose(t.log_prior, dist.Normal(0.0, 1.0).log_prob(z), atol=1e-5)


class Cut(torch.nn.Module):
    """The latent has no mass below 0.5, and none at all for data points above a limit."""

    def __init__(self, limit):
        super().__init__()
        self.prior, self.limit = pv.priors.StandardNormal(2), limit

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            excluded = (z[..., 0] < 0.5) | (x[:, 0] > self.limit)
            pyro.factor("cut", torch.where(excluded, -torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def guide_of_cut(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.8).to_event(1))


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_refit_prior_leaves_out_data_points_without_possible_samples(kind):
    torch.manual_seed(0)
    x = 1.5 + 0.7 * torch.randn(100, 2)
    left_out = int((x[:, 0] > 2.5).sum())
    with pytest.warns(UserWarning, match=f"^{left_out} of 100 data points were left out"):
        new = pv.evaluation.refit_prior(Cut(2.5), guide_of_cut, x, kind=kind, seed=0)
    kept = x[x[:, 0] <= 2.5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            pv.evidence(new, guide_of_cut, kept, num_particles=200, seed=0).values.isfinite().all()
        )
    with pytest.raises(ValueError, match="no sample of latent 'z' has a density above zero"):
        pv.evaluation.refit_prior(Cut(-9.0), guide_of_cut, x, kind=kind, seed=0)


def by_degrees(x):
    """Without the factor, z could be a number of degrees of freedom at which x has no mean."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(2.0, 1.0))
        never = x[:, 0].nan_to_num() > 100
        pyro.factor("cut", torch.where((z < 1.5) | never, -torch.inf, 0.0))
        pyro.sample("first", dist.Normal(z, 1.0), obs=x[:, 0])
        pyro.sample("second", dist.StudentT(z, z, 1.0), obs=x[:, 1])


def guide_of_degrees(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(2.5 + 0 * x[:, 0].nan_to_num(), 1.2))


def test_impute_weighs_excluded_samples_with_zero():
    x = torch.tensor([[1.0, math.nan], [2.5, math.nan]])
    found = pv.impute(by_degrees, guide_of_degrees, x, num_samples=4000, num_draws=2, seed=0)
    log_joint = dist.Normal(2.0, 1.0).log_prob(GRID) + dist.Normal(GRID, 1.0).log_prob(
        x[:, :1].double()
    )
    weights = log_joint.where(GRID >= 1.5, -torch.inf).softmax(-1)
    truth = (weights * GRID).sum(-1)
    error = found.monte_carlo_errors[:, 1]
    assert ((found.mean[:, 1] - truth).abs() < 4.5 * error).all()
    assert (error < 0.05).all()
    assert found.draws.isfinite().all()


def test_impute_warns_of_rows_without_possible_samples():
    x = torch.tensor([[1.0, math.nan], [200.0, math.nan], [200.0, 3.0]])
    with pytest.warns(
        pv.evaluation.UnreliableEvidence, match="of 1 of 2 rows are NaN, first in row 1"
    ):
        found = pv.impute(by_degrees, guide_of_degrees, x, num_samples=100, num_draws=2, seed=0)
    assert found.mean.isfinite().tolist() == [[True, True], [True, False], [True, True]]
    assert found.draws.isfinite().all(0).tolist() == found.mean.isfinite().tolist()
    assert found.untrusted.tolist()[1:] == [True, False]


def test_ais_refuses_supports_that_depend_on_latents_for_any_number_of_rows():
    for start in ("prior", "guide"):
        ais = pv.evaluation.AIS(start=start, num_chains=10, num_temperatures=3)
        for rows in (1, 3):
            with pytest.raises(ValueError, match="support of latent"):
                pv.evidence(nested, guide_of_nested, torch.ones(rows), method=ais, seed=0)


@pytest.mark.parametrize("seed", range(4))
def test_impute_accepts_invalid_parameters_at_excluded_samples_and_reconstruct_says_so(seed):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("a", dist.Poisson(z), obs=x[:, 0])
            pyro.sample("b", pv.distributions.NanMasked(dist.Normal(z, 1.0)), obs=x[:, 1])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1.0 + 0 * x[:, 0], 1.0))

    x = torch.stack([torch.arange(4.0).repeat(5), torch.full((20,), math.nan)], 1)
    found = pv.impute(model, guide, x, num_samples=400, num_draws=3, seed=seed, batch_size=5)
    assert found.mean.isfinite().all()
    torch.manual_seed(seed)
    with pytest.raises(ValueError, match="x has no distribution there"):
        pv.reconstruct(rates, tailed, torch.arange(4.0).repeat(10))


def test_an_excluded_latent_may_be_any_of_those_that_depend_on_enumerated_values():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)), infer=dict(ALL))
            pyro.sample("z0", dist.Normal(c, 1.0))
            z1 = pyro.sample("z1", dist.Exponential(1.0 + c))
            pyro.sample("x", dist.Poisson(z1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z0", dist.Normal(0.5 + 0 * x, 1.3))
            pyro.sample("z1", dist.StudentT(4.0, 0.5 + 0 * x, 1.0))

    x = torch.arange(4.0).repeat(10)
    found = pv.evidence(model, guide, x, num_particles=3000, seed=0)
    wide = x.double()
    truth = sum(0.5 * r / (1 + r) ** (wide + 1) for r in (1.0, 2.0))
    assert_near(found, truth.log())


@pytest.mark.parametrize("seed", range(4))
def test_an_invalid_parameter_at_a_possible_sample_is_an_error_for_each_seed(seed):
    def too_large(x):  # of a probability
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Bernoulli(z), obs=x)

    def negative_scale(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, torch.where(x == 7, -1.0, 1.0)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = torch.where(x == 8, -1.0, 1.0)
            pyro.sample("z", dist.Normal(2.0 + 0 * x, scale))

    options = {"num_particles": 20, "seed": seed, "batch_size": 20}
    with pytest.raises(ValueError, match="parameter probs"):
        pv.evidence(too_large, guide, torch.arange(40.0) % 2, **options)
    for wrong in (7.0, 8.0):
        x = torch.zeros(40)
        x[20:] = wrong
        with pytest.raises(ValueError, match="parameter scale"):
            pv.evidence(negative_scale, guide, x, **options)


def test_a_factor_does_not_switch_off_the_checks_of_later_minibatches():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.prior = pv.priors.StandardNormal(2)

        def forward(self, x, c):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior())
                pyro.factor("none", 0 * z[..., 0])
                pyro.sample("a", dist.Bernoulli(c / 2), obs=(x[:, 0] > 0).float())
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))

    c = torch.full((40,), 0.5)
    c[30] = 3.0
    with pytest.raises(ValueError, match="parameter probs"):
        pv.evaluation.refit_prior(Model(), guide, (torch.randn(40, 2), c), batch_size=20, seed=0)
