"""The mixture that replaces a prior: its density, and the prior that no mixture improves."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from pyro_vae.evaluation import _prior_fit
from pyro_vae.evaluation import _prior_fit as prior_fit
from pyro_vae.evaluation._prior_fit import (
    GaussianMixture,
    WeightedCodes,
    fit_prior,
    maximize_evidence,
)


@pytest.mark.parametrize("numbers_at_a_time", [1, 24, 4_000_000])
def test_density_is_that_of_torch(numbers_at_a_time, monkeypatch):
    monkeypatch.setattr(_prior_fit, "_NUMBERS_AT_A_TIME", numbers_at_a_time)
    factors = torch.randn(3, 4, 4, dtype=torch.float64)
    covariances = factors @ factors.mT + torch.eye(4)
    weights, means = torch.rand(3).double(), torch.randn(3, 4).double()
    found = GaussianMixture(weights, means, covariances)
    expected = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
    codes = torch.randn(5, 7, 4)
    torch.testing.assert_close(found.log_prob(codes.double()), expected.log_prob(codes.double()))
    assert found.log_prob(codes).dtype == torch.float32
    assert found.log_prob(codes).shape == (5, 7)


NONE = torch.zeros(300, dtype=torch.bool)  # is masked


def standard_normal(codes):
    return torch.distributions.Normal(0.0, 1.0).log_prob(codes).sum(-1)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_prior_of_the_right_scale_is_kept_and_another_one_is_replaced(scale):
    """x is z itself with a noise of 0.1, so that codes near x are weighted by the likelihood."""
    x = scale * torch.randn(300, 1, 2, dtype=torch.float64)
    codes = x + 0.1 * torch.randn(300, 20, 2, dtype=torch.float64)  # the likelihood as proposal
    of_data = WeightedCodes(codes, standard_normal(codes), torch.zeros(300, 20).double(), NONE)
    prior = fit_prior(of_data)
    gain = of_data.gains(prior).mean().item()
    # The best prior makes log p(x) that of the data's own distribution, N(0, s^2).
    own, models = (torch.distributions.Normal(0.0, v**0.5) for v in (scale**2, 1.01))
    truth = (own.log_prob(x) - models.log_prob(x)).sum(-1).mean().item()
    assert -0.05 < gain - truth < 0.2  # a mixture of up to 16 parts overfits the 300 rows a little
    if scale != 1.0:
        assert prior is not None


def clusters(count, width):
    """Return weighted codes of two clusters, whose likelihood is the proposal."""
    z = torch.where(torch.rand(count, 1) < 0.5, -1.0, 1.0) + width * torch.randn(count, 2)
    x = (z + width / 2 * torch.randn(count, 2)).double().unsqueeze(1)
    codes = x + width / 2 * torch.randn(count, 20, 2, dtype=torch.float64)
    none = torch.zeros(count, dtype=torch.bool)
    return WeightedCodes(codes, standard_normal(codes), torch.zeros(count, 20).double(), none)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, None])
def test_the_units_of_a_dimension_have_no_effect(count, diagonal):
    units = torch.tensor([1024.0, 0.125], dtype=torch.float64)  # powers of two round alike
    of_data = clusters(200, 0.2)
    scaled = WeightedCodes(
        of_data.codes * units,
        of_data.log_prior - units.log().sum(),
        of_data.log_rest + units.log().sum(),
        of_data.masked,
    )
    found = []
    for codes in (of_data, scaled):
        torch.manual_seed(0)
        if count is None:
            found.append(fit_prior(codes, diagonal=diagonal))
        else:
            found.append(maximize_evidence(codes, count, diagonal=diagonal))
    prior, other = found
    options = {"rtol": 1e-6, "atol": 1e-9}  # rounding, which grows in up to 100 steps
    torch.testing.assert_close(other.means, prior.means * units, **options)
    torch.testing.assert_close(other.covariances, prior.covariances * units.outer(units), **options)
    torch.testing.assert_close(scaled.gains(other), of_data.gains(prior), **options)


@pytest.mark.parametrize("width", [0.1, 0.01])
def test_components_may_be_far_narrower_than_their_distance(width):
    codes = clusters(1000, width)
    # The noise of x counts in the error. Five errors are exceeded once in 90,000 tests.
    error = 1.25 * width**2 * (2 / 500) ** 0.5
    for seed in range(5):  # some begin with both components in the same cluster
        torch.manual_seed(seed)
        prior = maximize_evidence(codes, 2, diagonal=True)
        variances = prior.covariances.diagonal(dim1=1, dim2=2)
        assert ((variances - width**2).abs() < 5 * error).all()


def exact_codes(points):
    """Return codes whose weights are equal, one for each data point."""
    codes = points.unsqueeze(1)
    rest, none = torch.zeros(len(points), 1).double(), torch.zeros(len(points), dtype=torch.bool)
    return WeightedCodes(codes, standard_normal(codes), rest, none)


@pytest.mark.parametrize("constant", [0.0, 3.0])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_dimension_without_spread_is_fitted(constant, diagonal):
    points = torch.stack([torch.randn(200), torch.full((200,), constant)], 1).double()
    prior = maximize_evidence(exact_codes(points), 2, diagonal=diagonal)
    assert prior.log_prob(points).isfinite().all()


def test_held_out_data_select_the_least_variance(monkeypatch):
    torch.manual_seed(0)
    means = {}
    for shrinkages in (prior_fit._SHRINKAGES, (1e-8,)):
        monkeypatch.setattr(prior_fit, "_SHRINKAGES", shrinkages)
        torch.manual_seed(0)
        reached = []
        for _ in range(10):
            centers = 3 * torch.randn(8, 8)
            points = (centers[torch.randint(8, (1100,))] + 0.3 * torch.randn(1100, 8)).double()
            reached.append(fit_prior(exact_codes(points[:100])).log_prob(points[100:]).mean())
        means[shrinkages] = sum(reached) / 10
    assert means[prior_fit._SHRINKAGES[:1]] < means[(1e-8, 1e-3)] - 0.1
