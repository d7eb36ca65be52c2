"""Log-densities of likelihoods at extreme values in float64, against 60 digits of mpmath."""

import itertools

import mpmath
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae._utils.numerics import MIN_SCALE

L = pv.likelihoods


class Fixed(nn.Module):
    """A decoder that returns the same numbers for any z."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = numbers

    def forward(self, z):
        return torch.tensor(self.numbers, dtype=torch.double).expand(*z.shape[:-1], -1)


def log_softplus(raw):
    return mpmath.log(
        mpmath.log1p(mpmath.exp(raw + mpmath.log(mpmath.expm1(1)))) + mpmath.mpf(MIN_SCALE)
    )


def mp_negative_binomial(raw, dispersion, x):
    mean, r = mpmath.exp(log_softplus(raw)), 1 / mpmath.mpf(dispersion)
    rising = mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
    return rising + r * mpmath.log(r / (r + mean)) + x * mpmath.log(mean / (r + mean))


def mp_student(loc, df, x):
    y, df = mpmath.mpf(x) - loc, mpmath.mpf(df)
    gammas = mpmath.loggamma((df + 1) / 2) - mpmath.loggamma(df / 2)
    return gammas - mpmath.log(mpmath.pi * df) / 2 - (df + 1) / 2 * mpmath.log1p(y * y / df)


def mp_logistic(raw_loc, raw_scale, x, levels=256):
    loc = (1 + mpmath.mpf(raw_loc)) / 2 * (levels - 1)
    scale = mpmath.exp(log_softplus(raw_scale)) / 2 * (levels - 1)
    below, above = (mpmath.exp(-(x + by - loc) / scale) for by in (-0.5, 0.5))
    if x == 0:
        return -mpmath.log1p(above)
    if x == levels - 1:
        return mpmath.log(below) - mpmath.log1p(below)
    return mpmath.log(below - above) - mpmath.log1p(below) - mpmath.log1p(above)


def mp_tilted(logit, x):
    logit = mpmath.mpf(logit)
    return logit * x - (mpmath.log(mpmath.expm1(logit) / logit) if logit else 0)


def mp_bernoulli(logit, x):
    return -mpmath.log1p(mpmath.exp(-logit if x else logit))


def mp_poisson(raw, x):
    log_rate = log_softplus(raw)
    return x * log_rate - mpmath.exp(log_rate) - mpmath.loggamma(x + 1)


EXTREMES = [
    *(("nb", (raw, dispersion), (x,)) for raw, dispersion, x in itertools.product(
        [-30.0, -3.0, 19.0, 25.0, 1e5], [1e-8, 1e-2, 0.04, 0.06, 10.0, 1e4], [0, 7, 10**6])),
    *(("student", (loc, df), (x,)) for loc, df, x in itertools.product(
        [0.0], [0.01, 1.5, 99.0, 101.0, 1e6, 1e12], [0.0, 3.0, 1e6])),
    *(("logistic", (loc, scale), (x,)) for loc, scale, x in itertools.product(
        [-40.0, -1.0, 0.3, 30.0], [-40.0, -5.0, 0.0, 22.0, 1e3], [0, 1, 100, 255])),
    *(("tilted", (logit,), (x,)) for logit, x in itertools.product(
        [-1e4, -30.0, -0.1, -0.099, 1e-9, 0.0, 0.101, 21.0, 700.0], [0.0, 0.3, 1.0])),
    *(("bernoulli", (logit,), (x,)) for logit, x in itertools.product(
        [-900.0, -36.0, -1e-9, 0.0, 17.0, 25.0, 800.0], [0.0, 1.0])),
    *(("poisson", (raw,), (x,)) for raw, x in itertools.product(
        [-50.0, -12.0, 19.4, 19.6, 21.0, 1e5], [0, 3, 10**5])),
]  # fmt: skip
EXACT = {
    "nb": (lambda r, d: L.NegativeBinomial(Fixed(r), d), mp_negative_binomial),
    "student": (lambda loc, df: L.StudentT(Fixed(loc), df=df), mp_student),
    "logistic": (lambda m, s: L.DiscretizedLogistic(Fixed(m, s), levels=256), mp_logistic),
    "tilted": (lambda logit: L.ContinuousBernoulli(Fixed(logit)), mp_tilted),
    "bernoulli": (lambda logit: L.Bernoulli(Fixed(logit)), mp_bernoulli),
    "poisson": (lambda raw: L.Poisson(Fixed(raw)), mp_poisson),
}


@pytest.mark.parametrize("name", EXACT)
def test_densities_in_float64_are_exact_for_extreme_numbers(name):
    mpmath.mp.dps = 60
    make, exact = EXACT[name]
    for kind, parameters, (x,) in EXTREMES:
        if kind == name:
            value = torch.tensor([[x]], dtype=torch.long if name == "logistic" else torch.double)
            found = make(*parameters)(torch.zeros(1, 1, dtype=torch.double)).log_prob(value).item()
            assert found == pytest.approx(float(exact(*parameters, x)), rel=1e-9, abs=2e-8), (
                parameters, x)  # fmt: skip


@pytest.mark.parametrize("logit", [0.0, 1e-3, 0.11, -0.3, 0.49, -0.51, 3.0, 40.0])
def test_moments_of_the_continuous_bernoulli(logit):
    """Also where the series of the variance meets its closed form, at a logit of 0.5."""
    p = L.ContinuousBernoulli(Fixed(logit))(torch.zeros(1, 1)).base_dist
    with mpmath.workdps(60):
        size = mpmath.mpf(logit)
        mean, variance = mpmath.mpf(1) / 2, mpmath.mpf(1) / 12
        if logit:
            mean = -1 / mpmath.expm1(-size) - 1 / size
            variance = 1 / size**2 - 1 / (2 * mpmath.sinh(size / 2)) ** 2
    assert p.mean.item() == pytest.approx(float(mean), rel=1e-12, abs=0)
    assert p.variance.item() == pytest.approx(float(variance), rel=2e-13, abs=0)
