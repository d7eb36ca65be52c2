"""Closed-form KLs of all pairs that torch and Pyro register, against quadrature and sums."""

import functools
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch import distributions as D
from torch.distributions import kl as registry
from torch.distributions import transforms as T

import pyro_vae as pv
from pyro_vae.distributions import _kl_divergences as closed_forms
from pyro_vae.distributions._kl_divergences import known_kl
from pyro_vae.likelihoods._continuous_bernoulli import _ContinuousBernoulli

# Parameters, moderate and extreme.
SCALARS = {
    D.Beta: [(2.0, 3.0), (0.6, 0.8), (1.0, 50.0), (2e5, 3e5), (2e5, 3.01e5)],
    D.Cauchy: [(0.0, 1.0), (5.0, 0.1), (-300.0, 20.0), (1e4, 1e2)],
    D.ContinuousBernoulli: [(v,) for v in (0.0, 0.01, 1.0, -5.0, 14.0, -20.0, -50.0, 40.0, -500.0)],
    D.Exponential: [(1.0,), (1e-4,), (50.0,)],
    D.Gamma: [(2.0, 1.0), (0.6, 2.0), (1e5, 1e2), (1.01e5, 1e2), (1.0, 1e-4)],
    D.Gumbel: [(0.0, 1.0), (3.0, 0.2), (-10.0, 5.0)],
    D.HalfNormal: [(1.0,), (1e-4,), (30.0,)],
    D.Laplace: [(0.0, 1.0), (3.0, 0.1), (1e4, 1e-2)],
    D.Normal: [(0.0, 1.0), (3.0, 0.1), (-20.0, 10.0), (1e4, 10.0)],
    D.Pareto: [(1.0, 3.0), (0.1, 1.5), (2.0, 0.8), (1e3, 100.0)],
    D.Uniform: [(0.0, 1.0), (-1.0, 3.0), (0.2, 0.7), (1000.0, 1001.0), (-10.0, 0.5)],
    D.HalfCauchy: [(1.0,), (1e-3,), (50.0,)],
    D.InverseGamma: [(3.0, 2.0), (0.6, 1.0), (1e5, 1e5)],
}
SCIPY = {
    D.Beta: scipy.stats.beta,
    D.Cauchy: scipy.stats.cauchy,
    D.Exponential: lambda rate: scipy.stats.expon(scale=1 / rate),
    D.Gamma: lambda shape, rate: scipy.stats.gamma(shape, scale=1 / rate),
    D.Gumbel: scipy.stats.gumbel_r,
    D.HalfCauchy: lambda scale: scipy.stats.halfcauchy(scale=scale),
    D.HalfNormal: lambda scale: scipy.stats.halfnorm(scale=scale),
    D.InverseGamma: lambda shape, scale: scipy.stats.invgamma(shape, scale=scale),
    D.Laplace: lambda *parameters: Laplace(*parameters),
    D.Normal: scipy.stats.norm,
    D.Pareto: lambda scale, alpha: scipy.stats.pareto(alpha, scale=scale),
    D.Uniform: lambda low, high: scipy.stats.uniform(low, high - low),
}
ENDS = {
    D.Beta: (0.0, 1.0), D.ContinuousBernoulli: (0.0, 1.0), D.Exponential: (0.0, math.inf),
    D.Gamma: (0.0, math.inf), D.HalfNormal: (0.0, math.inf), D.HalfCauchy: (0.0, math.inf),
    D.InverseGamma: (0.0, math.inf),
}  # fmt: skip


class Tilted:
    """The density proportional to exp(l x) on [0, 1]."""

    def __init__(self, logit):
        self.logit = logit

    def logpdf(self, x):
        size = abs(self.logit)
        mass = 0.0 if size < 1e-8 else max(self.logit, 0.0) + math.log(-math.expm1(-size) / size)
        return np.where((x >= 0) & (x <= 1), self.logit * x - mass, -math.inf)

    def ppf(self, share):
        if abs(self.logit) < 1e-8:
            return share
        if self.logit < 0:
            return np.log1p(share * np.expm1(self.logit)) / self.logit
        return 1 + np.log1p((1 - share) * np.expm1(-self.logit)) / self.logit

    def isf(self, share):
        return 1 - Tilted(-self.logit).ppf(share)


class Laplace:
    """scipy's Laplace distribution, with a log-density that does not underflow."""

    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale
        self.ppf, self.isf = (getattr(scipy.stats.laplace(loc, scale), n) for n in ("ppf", "isf"))

    def logpdf(self, x):
        return -np.abs(x - self.loc) / self.scale - math.log(2 * self.scale)


def exact(cls, parameters):
    return Tilted(*parameters) if cls is D.ContinuousBernoulli else SCIPY[cls](*parameters)


def ends(cls, parameters):
    if cls is D.Uniform:
        return parameters
    return (parameters[0], math.inf) if cls is D.Pareto else ENDS.get(cls, (-math.inf, math.inf))


@functools.lru_cache
def quantiles(cls, parameters):
    """Return quantiles on a logistic scale to 1e-150 at both ends, log-densities and weights."""
    place = np.arange(-345, 345, 1 / 8)
    share, rest = scipy.special.expit(-np.abs(place)), scipy.special.expit(np.abs(place))
    one = exact(cls, parameters)
    with np.errstate(all="ignore"):
        x = np.where(place < 0, one.ppf(share), one.isf(share))
        return x, one.logpdf(x), share * rest / 8


def by_quadrature(of_q, q, of_p, p):
    """Return KL(q || p), integrated over the quantiles of q."""
    (low, high), (least, most) = ends(of_q, q), ends(of_p, p)
    if low < least or high > most:
        return math.inf
    x, log_q, weight = quantiles(of_q, q)
    with np.errstate(all="ignore"):
        terms = (log_q - exact(of_p, p).logpdf(x)) * weight
    assert weight[~np.isfinite(terms)].sum() < 1e-6  # a quantile underflows there
    kl = terms[np.isfinite(terms)].sum()
    edge = np.abs(terms[np.isfinite(terms)][[0, -1]]).max()
    return math.inf if edge > 1e-9 * abs(kl) else kl  # the terms grow up to the ends


def make(cls, parameters, dtype):
    tensors = [torch.tensor(v, dtype=dtype) for v in parameters]
    if cls is D.ContinuousBernoulli:
        return dist.ContinuousBernoulli(logits=tensors[0])
    return getattr(dist, cls.__name__)(*tensors)


WRAPPERS = {D.Independent, D.TransformedDistribution, dist.MaskedDistribution}


def known_pairs():
    registered = {*registry._KL_REGISTRY, (D.HalfCauchy,) * 2, (D.InverseGamma,) * 2}
    return [(q, p) for q, p in registered if q in SCALARS and p in SCALARS]


@pytest.mark.parametrize(
    "pair", sorted(known_pairs(), key=str), ids=lambda pair: "-".join(c.__name__ for c in pair)
)
def test_kl_of_scalars_matches_quadrature(pair):
    of_q, of_p = pair
    for q, p in itertools.product(SCALARS[of_q], SCALARS[of_p]):
        for dtype in (torch.float32, torch.float64):
            one, other = make(of_q, q, dtype), make(of_p, p, dtype)
            rounded = [tuple(torch.tensor(v, dtype=dtype).double().tolist()) for v in (q, p)]
            truth = by_quadrature(of_q, rounded[0], of_p, rounded[1])
            if truth > torch.finfo(dtype).max:
                truth = math.inf
            found = known_kl(one, other)
            assert found.dtype == dtype
            assert found.item() == pytest.approx(truth, rel=1e-3, abs=1e-3), (q, p, dtype)


def enumerated(q, p, values):
    """Return KL(q || p) as a sum over values, in float64."""
    log_q, log_p = q.log_prob(values), p.log_prob(values)
    return torch.where(log_q > -700, log_q.exp() * (log_q - log_p), 0.0).sum(0)


DISCRETE = {
    D.Bernoulli: (torch.arange(2.0), lambda v: dist.Bernoulli(logits=v),
                  [-200.0, -20.0, -1.0, 0.0, 3.0, 18.0, 90.0]),
    D.Geometric: (torch.arange(200_000.0), lambda v: dist.Geometric(logits=v), [-8.0, 0.0, 6.0]),
    D.Poisson: (torch.arange(3000.0), dist.Poisson, [0.0, 1e-3, 1.0, 30.0, 2000.0]),
}  # fmt: skip


@pytest.mark.parametrize("cls", DISCRETE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_counts_matches_the_sum(cls, dtype):
    values, make_one, parameters = DISCRETE[cls]
    for q, p in itertools.product(parameters, repeat=2):
        wide = [make_one(torch.tensor(v, dtype=torch.float64)) for v in (q, p)]
        truth = enumerated(*wide, values.double()).item()
        if cls is D.Bernoulli:  # its log_prob is exact in the logits
            truth = _of_two(q, p)
        found = known_kl(*(make_one(torch.tensor(v, dtype=dtype)) for v in (q, p)))
        assert found.item() == pytest.approx(truth, rel=1e-4, abs=1e-4), (q, p)


def _of_two(q, p):
    log = scipy.special.log_expit
    return sum(math.exp(log(sign * q)) * (log(sign * q) - log(sign * p)) for sign in (-1, 1))


def test_kl_at_probabilities_zero_and_one():
    probs = torch.tensor([0.0, 0.0, 0.3, 0.3, 1.0, 1.0, 0.0])
    other = torch.tensor([0.0, 0.3, 0.0, 1.0, 1.0, 0.3, 1.0])
    wanted = [0.0, -math.log(0.7), math.inf, math.inf, 0.0, -math.log(0.3), math.inf]
    for dtype in (torch.float32, torch.float64):
        one, two = (dist.Bernoulli(v.to(dtype)) for v in (probs, other))
        torch.testing.assert_close(known_kl(one, two), torch.tensor(wanted, dtype=dtype))
        one, two = (dist.Categorical(torch.stack([v, 1 - v], -1).to(dtype)) for v in (probs, other))
        torch.testing.assert_close(known_kl(one, two), torch.tensor(wanted, dtype=dtype))


def test_kl_of_categories_of_small_probability():
    logits = torch.tensor([0.0, -300.0, 2.0]), torch.tensor([-300.0, 0.0, -2.0])
    for cls in (dist.Categorical, dist.OneHotCategorical):
        found = known_kl(*(cls(logits=v) for v in logits))
        log_q, log_p = (v.double().log_softmax(-1) for v in logits)
        truth = (log_q.exp() * (log_q - log_p)).sum()
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)


def random_gaussians(dim=3):
    torch.manual_seed(0)
    factor, diagonal, loc = torch.randn(4, dim, 2), torch.rand(4, dim) + 0.1, torch.randn(4, dim)
    covariance = factor @ factor.mT + torch.diag_embed(diagonal)
    return (
        dist.MultivariateNormal(loc, covariance),
        dist.LowRankMultivariateNormal(loc, factor, diagonal),
        dist.Normal(loc, diagonal).to_event(1),
    )


def test_kl_of_multivariate_gaussians():
    torch.set_default_dtype(torch.float64)
    try:
        first, second = random_gaussians(), [each.expand([4]) for each in random_gaussians()]
        moved = [
            dist.MultivariateNormal(second[0].loc + 1.0, second[0].covariance_matrix * 3),
            dist.LowRankMultivariateNormal(
                second[1].loc - 1.0, 2 * second[1].cov_factor, second[1].cov_diag),
            dist.Normal(torch.ones(4, 3), 2.0).to_event(1),
        ]  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    for q, p in itertools.product(first, moved):
        wide = [dist.MultivariateNormal(d.mean, _covariance(d)) for d in (q, p)]
        inverse, difference = wide[1].precision_matrix, wide[0].mean - wide[1].mean
        product = inverse @ wide[0].covariance_matrix
        truth = product.diagonal(dim1=-2, dim2=-1).sum(-1) - 3 - product.logdet()
        truth = (
            truth + (difference.unsqueeze(-2) @ inverse @ difference.unsqueeze(-1))[:, 0, 0]
        ) / 2
        found = known_kl(q, p)
        if found is not None:
            torch.testing.assert_close(found, truth)
    assert known_kl(first[2], moved[0]) is not None


def _covariance(q):
    return torch.diag_embed(q.variance) if isinstance(q, D.Independent) else q.covariance_matrix


def test_kl_of_dirichlets_matches_betas_and_samples():
    """E log x_k is digamma(a_k) - digamma(a_0); a Dirichlet of two numbers is a Beta."""
    for first, second in (([2.0, 3.0], [0.5, 0.7]), ([2e5, 3e5], [2e5, 3.01e5])):
        one, two = torch.tensor(first), torch.tensor(second)
        found = known_kl(dist.Dirichlet(one), dist.Dirichlet(two)).item()
        truth = by_quadrature(D.Beta, tuple(first), D.Beta, tuple(second))
        assert found == pytest.approx(truth, rel=1e-4, abs=1e-4)
    torch.manual_seed(0)
    q, p = dist.Dirichlet(torch.tensor([2.0, 0.7, 3.0])), dist.Dirichlet(torch.tensor([1.0, 2, 4]))
    z = q.sample((200_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    assert abs(ratio.mean() - known_kl(q, p)) < 4 * ratio.std() / 200_000**0.5


# Registered but not trusted: a sum without a closed form, no sum at rate zero, no gradient in q's
# parameters, and no log_density.
UNTRUSTED = {
    (D.Binomial, D.Binomial),
    (D.Bernoulli, D.Poisson),
    (D.ExponentialFamily, D.ExponentialFamily),
    (dist.Delta, dist.Distribution),
}
GAUSSIANS = {D.MultivariateNormal, D.LowRankMultivariateNormal}
ALIKE = {D.Dirichlet, D.Categorical, D.OneHotCategorical, *DISCRETE, *WRAPPERS}
INFINITE = {(D.Poisson, D.Bernoulli), (D.Poisson, D.Binomial)}


def test_no_untested_pair_is_trusted():
    """A pair that torch or Pyro newly registers must first be tested in this file."""
    for (q, p), function in registry._KL_REGISTRY.items():
        if function.__module__.split(".")[0] not in ("torch", "pyro"):
            continue
        trusted = closed_forms._form(q, p, len(registry._KL_REGISTRY)) is not None
        tested = (
            (q, p) in known_pairs()
            or (q is p and q in ALIKE)
            or {q, p} <= GAUSSIANS
            or (q, p) in {*INFINITE, (D.Independent, D.MultivariateNormal)}
        )
        assert tested or not trusted, f"{q.__name__} and {p.__name__} are trusted without a test"
        assert trusted or (q, p) in UNTRUSTED, f"{q.__name__} and {p.__name__} are new"


def test_kl_registered_by_a_user_is_used():
    class Mine(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) - 1.0

    one, other = (Mine(torch.tensor(v), 1.0) for v in (0.0, 1.0))
    assert known_kl(one, other) is None  # the density differs
    assert known_kl(one.to_event(0), dist.Normal(0.0, 1.0)) is None
    register = torch.distributions.register_kl(Mine, Mine)
    register(lambda q, p: q.loc + 7.0)
    try:
        assert known_kl(one, other) == 7.0
    finally:
        del registry._KL_REGISTRY[Mine, Mine]


def test_kl_is_infinite_outside_the_support_of_p():
    rate = torch.tensor([1.0, 2.0])
    for p in (dist.Bernoulli(0.3), dist.Binomial(5, 0.3)):
        assert known_kl(dist.Poisson(rate), p.expand([2])).tolist() == [math.inf] * 2


def test_kl_of_wrapped_distributions_matches_the_base_or_is_unknown():
    q, p = dist.Gamma(torch.ones(4, 3, 2), 2.0), dist.Gamma(torch.ones(3, 2), 1.0)
    each = known_kl(q, p)
    assert each.shape == (4, 3, 2)
    torch.testing.assert_close(known_kl(q.to_event(2), p.to_event(2)), each.sum((1, 2)))
    torch.testing.assert_close(known_kl(q.to_event(1), p.to_event(1)), each.sum(2))
    mask = torch.rand(4, 3, 2) < 0.5
    torch.testing.assert_close(known_kl(q.mask(mask), p.mask(mask)), each * mask)
    assert known_kl(q.mask(mask), p.mask(~mask)) is None
    assert known_kl(dist.Delta(torch.zeros(2)).mask(mask[0]), p.mask(mask[0])) is None
    flow = dist.transforms.affine_autoregressive(2)
    for steps, same in (
        ([T.ExpTransform()], [T.ExpTransform()]),
        ([T.AffineTransform(1.0, 2.0)], [T.AffineTransform(1.0, 2.0)]),
        ([T.ExpTransform().inv], [T.ExpTransform().inv]),
        ([T.ComposeTransform([T.ExpTransform(), T.AffineTransform(0.0, 2.0)])],) * 2,
    ):
        one, other = (dist.TransformedDistribution(b, s) for b, s in ((q, steps), (p, same)))
        torch.testing.assert_close(known_kl(one, other), each)
    one, other = (
        dist.TransformedDistribution(dist.Normal(torch.full((2,), v), 1.0).to_event(1), [flow])
        for v in (0.0, 1.0)
    )
    torch.testing.assert_close(known_kl(one, other), torch.tensor(1.0))
    for steps, others in (
        ([T.AffineTransform(1.0, 2.0)], [T.AffineTransform(1.0, 3.0)]),
        ([T.ExpTransform()], [T.SoftplusTransform()]),
        ([T.AbsTransform()], [T.AbsTransform()]),  # not one to one
    ):
        one, other = (dist.TransformedDistribution(b, s) for b, s in ((q, steps), (p, others)))
        assert known_kl(one, other) is None
    folded = [dist.FoldedDistribution(dist.Normal(v, 1.0)) for v in (-1.0, 1.0)]  # the same density
    assert known_kl(*folded) is None


class Doubling(T.Transform):
    """A user's transform that keeps its last input, so a used one has one more attribute."""

    domain = codomain = T.constraints.real
    bijective = True

    def _call(self, x):
        self.last = x
        return 2 * x

    def _inverse(self, y):
        return y / 2

    def log_abs_det_jacobian(self, x, y):
        return torch.full_like(x, math.log(2))


def test_kl_of_transforms_with_other_attributes_is_unknown():
    q, p = (
        dist.TransformedDistribution(dist.Normal(torch.tensor(v), 1.0), [Doubling()])
        for v in (0.0, 1.0)
    )
    assert known_kl(q, p) == 0.5
    q.rsample()
    assert known_kl(q, p) is None
    assert known_kl(p, q) is None

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    x = torch.randn(3)
    terms = pv.terms(model, guide, x, num_particles=4)
    torch.testing.assert_close(terms.kl, terms.log_guide - terms.log_prior)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_match_finite_differences(dtype):
    """The KL is computed in float64; the gradient has the dtype of the parameters."""
    for of_q, of_p in ((D.Gamma, D.Gamma), (D.ContinuousBernoulli,) * 2, (D.Beta, D.Beta)):
        q, p = (
            [torch.tensor(v, dtype=dtype, requires_grad=True) for v in SCALARS[cls][number]]
            for cls, number in ((of_q, 0), (of_p, 1))
        )
        kinds = [
            (lambda v: dist.ContinuousBernoulli(logits=v)) if cls is D.ContinuousBernoulli
            else getattr(dist, cls.__name__) for cls in (of_q, of_p)
        ]  # fmt: skip
        kl = known_kl(kinds[0](*q), kinds[1](*p))
        step = 1e-4
        for tensors in (q, p):
            for tensor in tensors:
                (found,) = torch.autograd.grad(kl, tensor, retain_graph=True)
                assert found.dtype == dtype
                moved = []
                for by in (step, -step):
                    with torch.no_grad():
                        wide = [[t.double() + by * (t is tensor) for t in ts] for ts in (q, p)]
                        moved.append(known_kl(kinds[0](*wide[0]), kinds[1](*wide[1])))
                slope = (moved[0] - moved[1]) / (2 * step)
                assert found.item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-4)


def test_terms_use_closed_forms():
    """q and p are of different families; the KL is compared with samples."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = torch.tensor([1.0, -30.0])
            pyro.sample("z", _ContinuousBernoulli(logits=logits).to_event(1))

    t = pv.terms(model, guide, torch.zeros(3, 2), num_particles=20_000)
    sampled = t.log_guide - t.log_prior
    error = sampled.std(0) / 20_000**0.5
    assert ((sampled.mean(0) - t.kl[0]).abs() < 5 * error).all()  # fails once in a million
    each = t.kl_of_dimensions()["z"]
    torch.testing.assert_close(each.sum(-1), t.kl)
