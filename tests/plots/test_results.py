"""Plots of results show the numbers of the results."""

import dataclasses
import inspect
import math
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from drawn import texts
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure
from public_calls import call

import pyro_vae as pv
from pyro_vae.evaluation._gradient_noise import GradientNoise, Moments

WITH_AX = sorted(
    name
    for name in pv.plots.__all__
    if "ax" in inspect.signature(getattr(pv.plots, name)).parameters
)


@pytest.mark.parametrize("name", pv.plots.__all__)
def test_plots_are_drawn_on_the_given_axes_and_in_no_window(name):
    figure, before = Figure(), dict(mpl.rcParams)
    ax = figure.add_subplot(1, 2, 2)
    drawn = call(f"plots.{name}", **({"ax": ax} if name in WITH_AX else {}))
    if name in WITH_AX:
        assert drawn is figure
        assert ax.has_data()
    assert isinstance(drawn, Figure)
    assert dict(mpl.rcParams) == before
    assert not _pylab_helpers.Gcf.figs  # the figures of pyplot, which stay open


def fit(elbos, losses=None):
    rows = {"loss": losses or [-e - 1.0 for e in elbos], "validation_elbo": elbos}
    return SimpleNamespace(history=pd.DataFrame(rows, pd.RangeIndex(1, len(elbos) + 1)))


def test_learning_curves_have_one_line_for_each_replicate_and_one_color_for_each_name():
    fits = {"a": [fit([-3.0, -2.0]), fit([-4.0, -1.0, -0.5])], "b $1": fit([-5.0, -4.0])}
    (axes,) = pv.plots.learning_curves(fits).axes
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    assert drawn == [
        ([1, 2], [-3.0, -2.0]),
        ([1, 2, 3], [-4.0, -1.0, -0.5]),
        ([1, 2], [-5.0, -4.0]),
    ]
    colors = [line.get_color() for line in axes.lines]
    assert colors[0] == colors[1] != colors[2]
    assert texts(axes.get_legend().get_texts()) == ["a", r"b \$1"]
    (axes,) = pv.plots.learning_curves({"_a": fits["a"], "b": fits["b $1"]}).axes
    assert texts(axes.get_legend().get_texts()) == ["\u200b_a", "b"]  # a zero-width space
    (axes,) = pv.plots.learning_curves(fits["a"]).axes
    assert axes.get_legend() is None
    assert len(axes.lines) == 2


def test_learning_curves_refuse_what_is_not_a_fit():
    for value, error, message in (
        ({}, ValueError, "at least one fit"),
        ({"a": []}, ValueError, "got no fit for 'a'"),
        (fit([]), ValueError, "an empty history"),
        ([1], TypeError, "fits must be a fit, .* got int"),
        ("fit", TypeError, "got str"),
    ):
        with pytest.raises(error, match=message):
            pv.plots.learning_curves(value)


def noise(ratios, repeats=50):
    """Return a result with given ratios by objective, of model and guide."""
    of = lambda ratio: Moments(torch.tensor([ratio]), torch.ones(1), repeats)  # noqa: E731
    moments = {n: {"model": of(a), "guide": of(b)} for n, (a, b) in ratios.items()}
    return GradientNoise(moments, None)


def test_gradient_noise_shows_each_ratio_and_the_floor_of_noise():
    results = {
        "K = 1": noise({"a": (1.0, 2.0), "b": (3.0, 4.0)}),
        "K = 9": noise({"b": (5.0, 6.0)}),
    }
    figure = pv.plots.gradient_noise(results)
    for number, axes in enumerate(figure.axes):
        first, other, floor = [line for line in axes.lines if len(line.get_xdata()) == 2]
        np.testing.assert_allclose(first.get_xdata(), [[1.0, 3.0], [2.0, 4.0]][number], rtol=1e-6)
        np.testing.assert_allclose(other.get_xdata(), [np.nan, [5.0, 6.0][number]], rtol=1e-6)
        assert first.get_ydata().round().tolist() == [0, 1]
        assert floor.get_xdata()[0] == pytest.approx(math.sqrt(2 / (math.pi * 50)))
        assert axes.get_xscale() == "log"
    assert texts(figure.axes[0].get_yticklabels()) == ["a", "b"]
    assert texts(figure.legends[0].get_texts()) == ["K = 1", "K = 9"]
    figure = pv.plots.gradient_noise({"_K": results["K = 1"], "K = 9": results["K = 9"]})
    assert texts(figure.legends[0].get_texts()) == ["\u200b_K", "K = 9"]
    assert not pv.plots.gradient_noise(results["K = 1"]).legends
    with pytest.raises(ValueError, match="at least one result"):
        pv.plots.gradient_noise({})
    with pytest.raises(TypeError, match="got int"):
        pv.plots.gradient_noise({"a": 1})


def surgery(distortion, information, marginal):
    rate = information + (0.0 if math.isnan(marginal) else marginal)
    return pv.evaluation.Surgery(
        -distortion - rate, distortion, rate, information, marginal, 5.0, {}
    )


def test_bars_of_surgery_sum_to_minus_the_elbo_with_negative_and_unknown_terms():
    parts = {
        "positive": surgery(10.0, 2.0, 1.0),
        "negative": surgery(-8.0, 3.0, -0.5),
        "unknown": surgery(4.0, 3.0, math.nan),
        "seeds": [surgery(1.0, 2.0, 3.0), surgery(3.0, 4.0, 6.0)],
    }
    (axes,) = pv.plots.surgery(parts).axes
    sums = np.array([[bar.get_width() for bar in bars] for bars in axes.containers]).sum(0)
    expected = [13.0, -5.5, 7.0, 9.5]
    np.testing.assert_allclose(sums, expected)
    (marks,) = (line for line in axes.lines if line.get_label() == "-ELBO")
    np.testing.assert_allclose(marks.get_xdata(), expected)
    assert texts(axes.get_yticklabels()) == list(parts)
    names = texts(axes.get_legend().get_texts())
    assert names == ["distortion", "mutual information", "marginal KL", "rate", "-ELBO"]
    spans = {
        name: sorted(
            (bars[row].get_x(), bars[row].get_x() + bars[row].get_width())
            for bars in axes.containers
            if bars[row].get_width()
        )
        for row, name in enumerate(parts)
    }
    assert [tuple(sorted(span)) for span in spans["positive"]] == [(0, 10), (10, 12), (12, 13)]
    ends = sorted(tuple(sorted(span)) for span in spans["negative"])
    assert ends == [(-8.5, -8), (-8, 0), (0, 3)]
    for value, error in (({}, ValueError), ({"a": []}, ValueError), (3, TypeError)):
        with pytest.raises(error, match="results must"):
            pv.plots.surgery(value)


def test_surgery_of_a_comparison_leaves_out_methods_without_one():
    run = lambda found: SimpleNamespace(surgery=found)  # noqa: E731
    entries = [
        SimpleNamespace(name="a", runs=[run(surgery(1.0, 2.0, 3.0))]),
        SimpleNamespace(name="b", runs=[run(None)]),
    ]
    comparison = SimpleNamespace(entries=entries, difference=lambda name: None)
    (axes,) = pv.plots.surgery(comparison).axes
    assert texts(axes.get_yticklabels()) == ["a"]


def test_bars_of_a_diagnosis_are_its_losses_with_two_standard_errors():
    entry = pv.report.LedgerEntry
    result = pv.report.Diagnosis(
        (
            entry("log p(x), test", -80.0, 1.0, ""),
            entry("approximation gap", 2.0, 0.5, ""),
            entry("prior gain", 1.0, 0.7, ""),
            entry("decoder gain", math.nan, math.nan, "no decoder"),
        ),
        10,
        10,
    )
    (axes,) = pv.plots.diagnosis(result).axes
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [2.0, 1.0, math.nan])
    (bars,) = (each for each in axes.containers if hasattr(each, "errorbar"))
    segments = bars.errorbar.lines[2][0].get_segments()
    np.testing.assert_allclose([s[:, 0] for s in segments[:2]], [[1.0, 3.0], [-0.4, 2.4]])
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert colors[0] != colors[1] == colors[2]
    assert texts(axes.get_yticklabels()) == ["approximation gap", "prior gain", "decoder gain"]
    assert texts(axes.texts) == ["unknown"]
    assert axes.texts[0].xy[1] == 2


def test_differences_show_means_intervals_and_runs():
    comparison = call("compare", pairs={name: call_pair(name) for name in "ab"})
    (axes,) = pv.plots.differences(comparison).axes
    found = [comparison.difference(entry.name) for entry in comparison.entries]
    diamonds = axes.containers[0].lines[0]
    np.testing.assert_allclose(diamonds.get_xdata().astype(float), [each.mean for each in found])
    (segments,) = (bars.get_segments() for bars in axes.containers[0].lines[2])
    np.testing.assert_allclose(segments[1][:, 0], found[1].interval, rtol=1e-6)
    best = comparison.entries[0].log_evidence.mean(0)
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "."]
    for drawn, entry in zip(dots, comparison.entries, strict=True):
        np.testing.assert_allclose(drawn, (entry.log_evidence - best).mean(1), atol=1e-6)
    assert texts(axes.get_yticklabels()) == [entry.name for entry in comparison.entries]


def call_pair(name):
    torch.manual_seed(ord(name))
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [3], 4))
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
    return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(4, [3]))


def test_a_curve_has_its_points_errors_and_ends():
    values = {"rate": [5.0, 2.0], "distortion": [15.0, 20.0]}
    errors = {"rate_error": [0.1, math.nan], "distortion_error": [0.2, 0.3]}
    table = pd.DataFrame(values | errors, pd.Index([0.5, 2.0], name="beta"))
    curve = pv.report.RateDistortion(table, entropy=18.0, refit="guide")
    (axes,) = pv.plots.rate_distortion(curve).axes
    line, _, (across, up) = axes.containers[0].lines
    assert line.get_xydata().tolist() == [[5.0, 15.0], [2.0, 20.0]]
    np.testing.assert_allclose([s[:, 0] for s in across.get_segments()], [[4.8, 5.2], [2, 2]])
    np.testing.assert_allclose([s[:, 1] for s in up.get_segments()], [[14.6, 15.4], [19.4, 20.6]])
    negative = dataclasses.replace(curve, entropy=-1.0)
    names = texts(pv.plots.rate_distortion(negative).axes[0].get_legend().get_texts())
    assert names == ["R + D = H", "R = 0, D = H: auto-decoding limit"]
    with pytest.raises(TypeError, match=r"curve must be the result of pv\.rate_distortion, got 3"):
        pv.plots.rate_distortion(3)
