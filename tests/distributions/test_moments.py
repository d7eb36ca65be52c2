"""Closed-form and sampled moments of distributions, against samples and against torch."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import transforms as t

from pyro_vae.distributions import MixtureOfDiagNormals
from pyro_vae.distributions._circular import WrappedNormal
from pyro_vae.distributions._moments import (
    SampledMoments,
    closed_form_mean,
    closed_form_moments,
    one_hot,
)

LOC, SCALE = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 0.2])
TRIL = torch.tensor([[0.5, 0.0], [0.3, 0.4]])
NORMAL = dist.Normal(LOC, SCALE)
OPPOSITE = torch.tensor([3.0, -3.2])  # on both sides of the cut of the circle


def mixture(components):
    weights = dist.Categorical(logits=LOC.expand(components.batch_shape))
    return dist.MixtureSameFamily(weights, components)


TO_POSITIVE = t.ComposeTransform([t.ExpTransform(), t.AffineTransform(1.0, -2.0)])
KNOWN = {
    "normal": NORMAL.to_event(1),
    "masked": NORMAL.mask(torch.tensor([True, False])),
    "multivariate": dist.MultivariateNormal(LOC, scale_tril=TRIL),
    "mixture": MixtureOfDiagNormals(
        torch.tensor([0.2, -1.0]), torch.stack([LOC, -LOC]), SCALE.expand(2, 2)
    ),
    "exponential": dist.TransformedDistribution(NORMAL, [t.ExpTransform()]).to_event(1),
    "exponential of joint": dist.TransformedDistribution(
        dist.MultivariateNormal(LOC, scale_tril=TRIL), [t.IndependentTransform(TO_POSITIVE, 1)]
    ),
    "affine of exponential": dist.TransformedDistribution(NORMAL, [TO_POSITIVE]),
    "affine": dist.TransformedDistribution(dist.Gamma(2.0, SCALE), [t.AffineTransform(1.0, 3.0)]),
    "one-hot": dist.OneHotCategorical(logits=LOC),
    "Bernoulli": dist.Bernoulli(logits=LOC),
    "von Mises": dist.VonMises(torch.tensor([3.0, -3.1]), torch.tensor([2.0, 0.5])),
    "von Mises, further turns": dist.VonMises(torch.tensor([10.0, -40.0]), 4.0),
    "wrapped": WrappedNormal(torch.tensor([3.0, -9.0]), torch.tensor([0.7, 1.5])),
    "mixture of angles": mixture(dist.VonMises(OPPOSITE, torch.tensor([20.0, 3.0]))),
    "mixture of pairs of angles": mixture(
        WrappedNormal(OPPOSITE.unsqueeze(-1) + LOC, SCALE).to_event(1)
    ),
    "mixture of mixtures": mixture(mixture(dist.VonMises(OPPOSITE.expand(2, 2), 5.0))),
    "categorical": dist.Categorical(logits=torch.tensor([[0.1, 0.5, -1.0]])),
}
UNKNOWN = {
    "sigmoid": dist.TransformedDistribution(NORMAL, [t.SigmoidTransform()]),
    "exponential twice": dist.TransformedDistribution(NORMAL, [t.ExpTransform()] * 2),
    "exponential of mixture": dist.TransformedDistribution(KNOWN["mixture"], [t.ExpTransform()]),
    "direction": dist.ProjectedNormal(torch.tensor([1.0, 2.0])),
    "mixture of directions": mixture(dist.ProjectedNormal(torch.eye(2))),
    "image of an angle": dist.TransformedDistribution(
        dist.VonMises(2.5, 1.0), [t.AffineTransform(0.0, 1.0)]
    ),
    "image of a mixture of angles": dist.TransformedDistribution(
        KNOWN["mixture of angles"], [t.AffineTransform(0.0, 1.0)]
    ),
    "skewed angles": dist.SineSkewed(KNOWN["von Mises"].to_event(1), torch.tensor([0.3, 0.5])),
}


@pytest.mark.parametrize("name", KNOWN)
def test_closed_forms_agree_with_samples(name):
    """Each number may fail at 4.5 standard errors, in 1 of 100,000 cases."""
    torch.manual_seed(0)
    fn = KNOWN[name]
    mean, std = closed_form_moments(one_hot(fn))
    moments = SampledMoments(fn)
    samples = fn.sample((40_000,))
    for part in samples.split(15_000):
        moments.add(part)
    found, found_std, error = moments.result()
    assert found.shape == mean.shape
    angle = torch.remainder(found - mean + math.pi, 2 * math.pi) - math.pi
    assert (angle.abs() < 4.5 * error).all()
    # The standard deviation has about this error for a kurtosis of at most 20.
    torch.testing.assert_close(found_std.float(), std.expand_as(found), rtol=0.05, atol=0)


def test_standard_errors_are_those_of_repeated_averages():
    """A chi-square test of 400 averages, in 1 of 10,000 runs wrong by more than 15%."""
    torch.manual_seed(0)
    for fn in (dist.Gamma(2.0, 1.0), dist.VonMises(3.0, 1.0), dist.Categorical(torch.ones(2))):
        moments = SampledMoments(fn)
        moments.add(fn.sample((100, 400)))
        mean, _, error = moments.result()
        spread = (mean - closed_form_moments(one_hot(fn))[0] + math.pi) % (2 * math.pi) - math.pi
        ratio = (spread.square().mean() / error.square().mean()).sqrt()
        assert 0.85 < ratio < 1.15


@pytest.mark.parametrize("name", UNKNOWN)
def test_distributions_without_closed_form(name):
    assert closed_form_moments(UNKNOWN[name]) is None
    assert closed_form_mean(UNKNOWN[name]) is None


def test_moments_that_do_not_exist():
    mean, std = closed_form_moments(dist.Cauchy(torch.zeros(2), 1.0))
    assert mean.isnan().all()
    assert not std.isfinite().any()
    mean, std = closed_form_moments(dist.StudentT(1.5, 2.0, 1.0))
    assert mean == 2.0
    assert std == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("concentration", [1e-3, 1.0, 500.0, 999.0, 1001.0, 5000.0, 1e8, 1e12])
def test_circular_standard_deviation_of_any_concentration(concentration, dtype):
    """By quadrature. Differences of Bessel functions cancel for large concentrations."""
    fn = dist.VonMises(torch.zeros((), dtype=dtype), concentration)
    width = min(math.pi, 12 / math.sqrt(concentration))
    angle = torch.linspace(-width, width, 20_001, dtype=torch.float64)[1:]
    away = 2 * (angle / 2).sin().square()  # 1 - cos
    weights = (-fn.concentration.double() * away).softmax(0)
    expected = (-2 * torch.log1p(-(weights * away).sum())).sqrt()
    mean, std = closed_form_moments(fn)
    assert mean == 0.0
    assert std.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(std.double(), expected, rtol=rounding, atol=0)


def test_moments_of_angles_on_a_torus():
    """By quadrature, within 4.5 standard errors of the mean; false in 1 of 100,000 cases.

    The samples are points of the grid, because Pyro's have too wide first angles.
    """
    torch.manual_seed(0)
    loc = torch.tensor([3.1, -3.1])
    one, pair = torch.ones(()), torch.tensor([20.0, 15.0])
    torus = dist.SineBivariateVonMises(*loc, *pair, correlation=8 * one)
    axis = torch.linspace(-math.pi, math.pi, 401)[1:]
    grid = torch.cartesian_prod(axis, axis)
    for fn in (torus, dist.SineSkewed(torus, torch.tensor([0.4, -0.5]))):
        weights = fn.log_prob(grid).double().softmax(0)
        cos, sin = weights @ grid.cos().double(), weights @ grid.sin().double()
        mean, std = torch.atan2(sin, cos), (-2 * torch.hypot(sin, cos).log()).sqrt()
        moments = SampledMoments(fn)
        moments.add(grid[weights.multinomial(10_000, replacement=True)])
        found, found_std, error = moments.result()
        assert ((found - mean).sin().abs() < 4.5 * error).all()
        torch.testing.assert_close(found_std, std, rtol=0.05, atol=0)
        assert closed_form_moments(fn) is None
    torch.testing.assert_close(closed_form_mean(torus), loc)


@pytest.mark.parametrize("offset", [0.0, 1e6, 1e9, -1e12])
def test_sampled_moments_far_from_zero(offset):
    """The chunks may start anywhere. The difference of squares would cancel."""
    torch.manual_seed(0)
    rounding = 1e-15 * abs(offset)
    samples = torch.randn(999, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.3]) + offset
    moments = SampledMoments(NORMAL)
    for part in samples.split([1, 500, 498]):
        moments.add(part)
    mean, std, error = moments.result()
    torch.testing.assert_close(mean, samples.mean(0), rtol=1e-12, atol=rounding)
    torch.testing.assert_close(std, samples.std(0), rtol=1e-10, atol=rounding)
    torch.testing.assert_close(error, std / math.sqrt(999))


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-9])
def test_sampled_moments_of_narrow_angles(scale):
    """As for numbers, from the second moments about the mean direction, which is at the cut."""
    torch.manual_seed(0)
    away = scale * torch.randn(999, 2, dtype=torch.float64)
    samples = torch.remainder(away, 2 * math.pi) - math.pi
    away = samples - math.pi * samples.sign()  # with the rounding of the samples
    moments = SampledMoments(WrappedNormal(0.0, 1.0))
    for part in samples.split([1, 500, 498]):
        moments.add(part)
    mean, std, error = moments.result()
    direction = torch.atan2(away.sin().mean(0), away.cos().mean(0))
    torch.testing.assert_close(mean.sin(), -direction.sin(), rtol=1e-6, atol=1e-15)
    away = away - direction
    variance = 2 * (away / 2).sin().square().mean(0)
    torch.testing.assert_close(std, (-2 * torch.log1p(-variance)).sqrt(), rtol=1e-6, atol=0)
    expected = (away.sin().square().mean(0) / 999).sqrt() / (1 - variance)
    torch.testing.assert_close(error, expected, rtol=1e-6, atol=0)
