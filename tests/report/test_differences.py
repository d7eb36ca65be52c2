"""Differences of methods with several runs: variance components, coverage, the set of the best."""

import math

import pytest
import torch
from scipy import stats

from pyro_vae.report._differences import Difference, difference, mean_of_runs, not_worse


def runs_of(seeds, data, rest, *, num_seeds, num_data, repeats):
    """Return random runs (repeats, S, N) with standard deviations of their three parts."""
    shape = repeats, num_seeds, num_data
    return (
        seeds * torch.randn(repeats, num_seeds, 1).double()
        + data * torch.randn(repeats, 1, num_data).double()
        + rest * torch.randn(shape).double()
    )


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("seeds", "data", "rest"), [(0.3, 0.5, 0.1), (0.1, 1.0, 1.0)])
def test_squared_errors_estimate_the_variance(seeds, data, rest, paired):
    """The error is at least that of each part alone, which adds at most a tenth to its square."""
    sizes = {"num_seeds": 5, "num_data": 40, "repeats": 1000}
    arms = [runs_of(seeds, data, rest, **sizes) for _ in range(2)]
    found = [difference(*each, paired=paired) for each in zip(*arms, strict=True)]
    squares = torch.tensor([each.standard_error**2 for each in found])
    variance = 2 * (seeds**2 / 5 + data**2 / 40 + rest**2 / 200)
    error = 4 * squares.std().item() / 1000**0.5
    assert variance - error < squares.mean() < 1.1 * variance + error
    means = torch.tensor([each.mean for each in found])
    assert means.var() == pytest.approx(variance, rel=4 * (2 / 1000) ** 0.5)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("num_seeds", "least"), [(2, 0.83), (3, 0.90), (5, 0.90)])
@pytest.mark.parametrize("parts", [(0.1, 0.2, 1.0), (0.3, 0.0, 0.1), (0.3, 0.5, 0.1)])
def test_intervals_cover_the_difference(parts, num_seeds, least, paired):
    """Satterthwaite's approximation is less accurate with two seeds, one degree of freedom."""
    sizes = {"num_seeds": num_seeds, "num_data": 300, "repeats": 400}
    arms = [runs_of(*parts, **sizes) for _ in range(2)]
    arms[0] += 0.7
    covered = 0
    for each in zip(*arms, strict=True):
        low, high = difference(*each, paired=paired).interval
        covered += low <= 0.7 <= high
    assert covered / 400 >= least


def test_pairing_by_seed_removes_what_the_seeds_share():
    shared = 10 * torch.randn(4, 1).double()
    one, other = (shared + torch.randn(4, 50).double() for _ in range(2))
    assert difference(one, other, paired=True).standard_error < 1
    assert difference(one, other, paired=False).standard_error > 1


def test_two_single_runs_have_the_paired_error_of_the_data():
    one, other = torch.randn(2, 1, 30).double()
    found = difference(one, other, paired=False)
    values = one[0] - other[0]
    t_test = stats.ttest_1samp(values, 0.0)
    assert not found.has_replicates
    assert found.p_value == pytest.approx(t_test.pvalue)
    assert found.interval == pytest.approx(tuple(t_test.confidence_interval()))


def test_a_single_run_and_several_have_the_spread_of_the_several():
    several = runs_of(1.0, 0.1, 0.1, num_seeds=4, num_data=50, repeats=1)[0]
    one = torch.zeros(1, 50).double()
    found = difference(one, several, paired=False)
    assert not found.has_replicates
    assert found.standard_error == pytest.approx(mean_of_runs(several).standard_error)
    assert found.standard_error >= (several.mean(1).std() / 4**0.5).item()
    assert found.degrees_of_freedom < 5


def test_degrees_of_freedom_are_those_of_the_dominant_part():
    found = mean_of_runs(runs_of(10.0, 0.01, 0.01, num_seeds=4, num_data=100, repeats=1)[0])
    assert found.degrees_of_freedom == pytest.approx(3, rel=0.01)
    found = mean_of_runs(runs_of(1e-4, 10.0, 0.01, num_seeds=4, num_data=100, repeats=1)[0])
    assert found.degrees_of_freedom == pytest.approx(99, rel=0.01)


def of_p_value(p_value):
    return Difference(-stats.norm.isf(p_value / 2), 1.0, 1e9, True)


@pytest.mark.parametrize(
    ("p_values", "kept"),
    [
        ([0.01, 0.04, 0.03, 0.005], {1, 2}),  # the example of Holm's procedure: 0.03 > 0.05 / 2
        ([0.04], set()),
        ([0.02, 0.04], set()),
        ([0.03, 0.04], {0, 1}),
        ([0.6, 0.001], {0}),
    ],
)
def test_set_of_the_best_is_that_of_holm(p_values, kept):
    assert not_worse({i: of_p_value(p) for i, p in enumerate(p_values)}) == kept


def test_infinite_or_unknown_errors_never_exclude_a_method():
    unknown = Difference(-1.0, math.nan, math.nan, False)
    assert not_worse({"a": unknown, "b": of_p_value(1e-9)}) == {"a"}


def test_equal_runs_have_no_error():
    runs = torch.randn(3, 20).double()
    found = difference(runs, runs, paired=True)
    assert (found.mean, found.standard_error, found.p_value) == (0.0, 0.0, 1.0)
    assert found.interval == (0.0, 0.0)


def test_minus_infinity_has_no_error():
    one = torch.zeros(2, 5).double()
    one[0, 0] = -math.inf
    found = difference(one, torch.zeros(2, 5).double(), paired=True)
    assert found.mean == -math.inf
    assert math.isnan(found.standard_error)
