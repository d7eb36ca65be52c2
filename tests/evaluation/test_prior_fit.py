"""The mixture that replaces a prior: its density, and the prior that no mixture improves."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from pyro_vae.evaluation import _prior_fit
from pyro_vae.evaluation._prior_fit import GaussianMixture, WeightedCodes, fit_prior


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
