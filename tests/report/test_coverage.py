"""Comparisons of really trained pairs: log p(x) in closed form, and coverage of the intervals."""

import importlib.util
from pathlib import Path

import pytest
from oracles import assert_within

import pyro_vae as pv

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "coverage.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("coverage_of_comparisons", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compare_agrees_with_the_closed_form(script):
    arms, test = script.repeat(3, 2, num_test=60, steps=12)
    fits = {name: [fit for fit, _ in runs] for name, runs in arms.items()}
    estimated = pv.compare(fits, test, num_particles=500)
    exact = script.comparison_of(arms, 2, 60)
    for one, other in script.PAIRS["paired"] + script.PAIRS["unpaired"]:
        found, expected = estimated.difference(one, other), exact.difference(one, other)
        runs = [e for e in estimated.entries if e.name in (one, other)]
        noise = sum(r.evidence.monte_carlo_errors.square().sum() for e in runs for r in e.runs)
        assert_within(found.mean, expected.mean, noise.item() ** 0.5 / 2 / 60)
        assert found.standard_error == pytest.approx(expected.standard_error, rel=0.1)
    same = {e.name: e.seeds for e in estimated.entries}
    assert same["a"] == same["b"] != same["c"]


def test_arms_with_the_same_seeds_share_weights_and_order(script):
    """Without steps that matter, paired runs are equal, and runs of other seeds are not."""
    arms, _ = script.repeat(5, 2, num_test=40, steps=3)
    values = {name: [each.mean().item() for _, each in runs] for name, runs in arms.items()}
    assert values["a"] != values["b"]
    assert values["a"] == pytest.approx(values["b"], abs=0.3)
    assert values["a"] != pytest.approx(values["c"], abs=0.3)


@pytest.mark.slow
def test_intervals_of_trained_pairs_cover_equal_arms(script):
    """With 60 repeats, a coverage of 95% is below 85% in less than one case of 500."""
    repeats = [script.repeat(number, 3)[0] for number in range(60)]
    for pairs in script.PAIRS.values():
        found = [
            script.comparison_of(arms, 3, 200).difference(*pairs[0]).interval for arms in repeats
        ]
        assert sum(low <= 0 <= high for low, high in found) / 60 >= 0.85
    held = [script.comparison_of(arms, 3, 200).best for arms in repeats]
    assert sum("a" in best for best in held) / 60 >= 0.85
