import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.evaluation import _psis as psis


def narrow_proposal_weights(t, draws, data):
    """Target N(0, 1), proposal N(0, t^2): the tail index is 1 - t^2 for t < 1."""
    z = t * torch.randn(draws, data, dtype=torch.float64)
    normal = torch.distributions.Normal
    return normal(0.0, 1.0).log_prob(z) - normal(0.0, t).log_prob(z)


@pytest.mark.parametrize("draws", [100, 1000, 5000])
@pytest.mark.parametrize("t", [0.4, 0.8, 1.5])
def test_khat_equals_arviz(draws, t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz", reason="compares with ArviZ's own psislw")
    log_weights = narrow_proposal_weights(t, draws, 7)
    if not hasattr(arviz, "psislw"):
        pytest.skip("this ArviZ has no psislw (1.x moved it): the comparison runs on 0.x")
    _, expected = arviz.psislw(log_weights.T.numpy())
    torch.testing.assert_close(
        pv.evaluation.khat(log_weights), torch.as_tensor(expected), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("t", [0.5, 0.7, 0.9])
def test_khat_equals_one_minus_squared_scale(t):
    khat = pv.evaluation.khat(narrow_proposal_weights(t, 100_000, 40))
    error = khat.std().item() / 40**0.5
    # The tail is generalized Pareto only in the limit. The remaining bias at this S is below 0.1.
    assert abs(khat.mean().item() - (1 - t**2)) < 0.1 + 4 * error


def test_khat_of_weights_without_a_tail():
    assert pv.evaluation.khat(torch.zeros(1000, 3)).tolist() == [-math.inf] * 3
    assert pv.evaluation.khat(torch.randn(20, 2)).isnan().all()
    mostly_equal = torch.zeros(1000)
    mostly_equal[:3] = torch.rand(3)
    assert pv.evaluation.khat(mostly_equal).isnan()


def test_khat_is_finite_with_ties_at_the_cutoff():
    log_weights = torch.zeros(1000, dtype=torch.float64)
    log_weights[:30] = torch.rand(30, dtype=torch.float64)
    assert pv.evaluation.khat(log_weights).isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_khat_is_nan_for_nan_or_infinite_weights(bad):
    log_weights = torch.randn(100, 2)
    log_weights[7, 1] = bad
    assert pv.evaluation.khat(log_weights).isnan().tolist() == [False, True]
    assert pv.evaluation.khat(torch.full((100,), bad)).isnan()


def test_khat_is_nan_when_all_weights_are_zero():
    assert pv.evaluation.khat(torch.full((100,), -math.inf)).isnan()


def test_khat_accepts_a_numpy_array():
    log_weights = torch.randn(100, 2, dtype=torch.float64)
    assert torch.equal(pv.evaluation.khat(log_weights.numpy()), pv.evaluation.khat(log_weights))


def test_khat_raises_without_draws():
    with pytest.raises(ValueError, match=r"got \(0, 3\)"):
        pv.evaluation.khat(torch.zeros(0, 3))


def spread(seed=0):
    torch.manual_seed(seed)
    return 0.1 * torch.randn(1000, dtype=torch.float64)


def test_khat_grows_linearly_with_one_dominant_weight():
    """Beyond e^700 the other weights underflow to zero; k-hat still grows by 1/105 per nat."""
    found = []
    for distance in (300, 500, 599, 601, 650, 700, 1000, 2000, 100_000):
        log_weights = spread()
        log_weights[0] += distance
        found.append((distance, pv.evaluation.khat(log_weights).item()))
    for (first, low), (second, high) in itertools.pairwise(found):
        assert math.isfinite(high)
        assert (high - low) / (second - first) == pytest.approx(1 / 105, rel=0.01)  # M + 10


@pytest.mark.parametrize("many", [2, 4, 5, 20, 60])
def test_khat_is_finite_with_several_dominant_weights(many):
    log_weights = spread()
    log_weights[:many] += 2000
    assert 20 < pv.evaluation.khat(log_weights) < math.inf


def test_two_tail_fits_agree():
    log_excess = (20 * torch.randn(95, 3, dtype=torch.float64)).sort(0).values
    log_excess[-1] += 100
    plain = psis._fit_generalized_pareto((log_excess - log_excess[-1]).exp())
    torch.testing.assert_close(psis._fit_far_tail(log_excess), plain, rtol=1e-10, atol=0)


def test_khat_when_most_weights_are_equal():
    log_weights = torch.zeros(1000, dtype=torch.float64)
    log_weights[:3] = torch.tensor([2000.0, 1999.0, 3.0])
    assert pv.evaluation.khat(log_weights) == math.inf  # three weights dominate
    log_weights[:3] = torch.tensor([1.0, 0.9, 0.3])
    assert pv.evaluation.khat(log_weights).isnan()  # no weight dominates
    log_weights[:3] = -1.0
    assert pv.evaluation.khat(log_weights) == -math.inf
    assert pv.evaluation.khat(torch.zeros(1000).index_fill(0, torch.arange(500), -1.0)) == -math.inf


def test_khat_when_most_weights_are_zero():
    log_weights = torch.full((1000,), -math.inf, dtype=torch.float64)
    log_weights[:3] = 0.0
    assert pv.evaluation.khat(log_weights) == math.inf
    log_weights[:50] = torch.randn(50, dtype=torch.float64)
    assert -2 < pv.evaluation.khat(log_weights) < 2
    log_weights[0] = 2000.0
    assert 10 < pv.evaluation.khat(log_weights) < math.inf
    columns = torch.stack([log_weights, spread(), torch.zeros(1000)], 1)
    assert torch.equal(
        pv.evaluation.khat(columns), torch.stack([pv.evaluation.khat(c) for c in columns.unbind(1)])
    )


def test_khat_of_few_draws_with_one_dominant_weight():
    for draws, wanted in ((25, math.isfinite), (20, math.isnan)):
        log_weights = torch.randn(draws, dtype=torch.float64)
        log_weights[0] = 3000.0
        assert wanted(pv.evaluation.khat(log_weights).item())


@pytest.mark.parametrize("draws", [30, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_khat_of_an_exact_posterior_is_minus_infinity(draws, dtype):
    """The weights are equal up to rounding, and so have ties."""
    x = 2**0.5 * torch.randn(200, dtype=dtype)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    found = pv.evidence(model, guide, x, num_particles=draws, seed=0)
    assert (found.khat == -math.inf).all()
    assert found.unreliable_share == 0
    assert "k-hat > 0.7: 0.0%" in repr(found)


def test_unreliable_share_does_not_have_weights_with_harmless_ties():
    """Most weights share the largest value, so k-hat is NaN for a few larger ones."""
    values, errors = torch.zeros(3), torch.zeros(3)
    khat = torch.tensor([math.nan, 0.2, 0.9])
    found = pv.evaluation.Evidence(
        values=values,
        monte_carlo_errors=errors,
        khat=khat,
        effective_sample_size=torch.full((3,), 900.0),
        num_particles=1000,
        dimensions=1,
        mean_log_weights=values,
    )
    assert found.unreliable_share == pytest.approx(1 / 3)
    assert not found.untrusted[0]
