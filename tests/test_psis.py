import math
import warnings

import pytest
import torch

import pyro_vae as pv


def weights_of_a_narrow_proposal(t, draws, data):
    """Target N(0, 1), proposal N(0, t^2): the tail index is 1 - t^2 for t < 1."""
    z = t * torch.randn(draws, data, dtype=torch.float64)
    normal = torch.distributions.Normal
    return normal(0.0, 1.0).log_prob(z) - normal(0.0, t).log_prob(z)


@pytest.mark.parametrize("draws", [100, 1000, 5000])
@pytest.mark.parametrize("t", [0.4, 0.8, 1.5])
def test_khat_is_that_of_arviz(draws, t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz", reason="compares with ArviZ's own psislw")
    log_weights = weights_of_a_narrow_proposal(t, draws, 7)
    if not hasattr(arviz, "psislw"):
        pytest.skip("this ArviZ has no psislw (1.x moved it): the comparison runs on 0.x")
    _, expected = arviz.psislw(log_weights.T.numpy())
    torch.testing.assert_close(pv.khat(log_weights), torch.as_tensor(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("t", [0.5, 0.7, 0.9])
def test_khat_is_one_less_the_squared_scale(t):
    khat = pv.khat(weights_of_a_narrow_proposal(t, 100_000, 40))
    error = khat.std().item() / 40**0.5
    # The tail is generalised Pareto in the limit only: what is left of it at this S is below 0.1.
    assert abs(khat.mean().item() - (1 - t**2)) < 0.1 + 4 * error


def test_weights_without_a_tail():
    assert pv.khat(torch.zeros(1000, 3)).tolist() == [-math.inf] * 3
    assert pv.khat(torch.randn(20, 2)).isnan().all()
    mostly_equal = torch.zeros(1000)
    mostly_equal[:3] = torch.rand(3)
    assert pv.khat(mostly_equal).isnan()


def test_ties_with_the_cutoff_are_no_tail():
    log_weights = torch.zeros(1000, dtype=torch.float64)
    log_weights[:30] = torch.rand(30, dtype=torch.float64)
    assert pv.khat(log_weights).isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers(bad):
    log_weights = torch.randn(100, 2)
    log_weights[7, 1] = bad
    assert pv.khat(log_weights).isnan().tolist() == [False, True]
    assert pv.khat(torch.full((100,), bad)).isnan()


def test_weights_that_are_all_zero():
    assert pv.khat(torch.full((100,), -math.inf)).isnan()


def test_khat_of_an_array():
    log_weights = torch.randn(100, 2, dtype=torch.float64)
    assert torch.equal(pv.khat(log_weights.numpy()), pv.khat(log_weights))


def test_khat_of_no_draws():
    with pytest.raises(ValueError, match=r"got \(0, 3\)"):
        pv.khat(torch.zeros(0, 3))
