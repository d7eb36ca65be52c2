"""Likelihoods: normalization, closed forms, tails, samples and captured steps."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same
from oracles import assert_within
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae._utils import numerics

L = pv.likelihoods
DTYPES = [torch.float32, torch.float64]

# Each likelihood as a function of its decoder, and the number of outputs per element of x.
MADE = {
    "bernoulli": (L.Bernoulli, 1),
    "continuous-bernoulli": (L.ContinuousBernoulli, 1),
    "normal": (functools.partial(L.Normal, scale=0.3), 1),
    "normal-shared": (lambda net, **k: L.Normal(net, L.SharedScale(0.3), **k), 1),
    "normal-per-output": (lambda net, **k: L.Normal(net, L.ScalePerOutput(4), **k), 1),
    "normal-from-decoder": (lambda net, **k: L.Normal(net, L.ScaleFromDecoder(), **k), 2),
    "normal-optimal": (lambda net, **k: L.Normal(net, L.OptimalScale(), **k), 1),
    "laplace-from-decoder": (lambda net, **k: L.Laplace(net, L.ScaleFromDecoder(), **k), 2),
    "laplace-optimal": (lambda net, **k: L.Laplace(net, L.OptimalScale(), **k), 1),
    "student": (functools.partial(L.StudentT, df=3.0, scale=0.4), 1),
    "student-learned": (
        lambda net, **k: L.StudentT(net, df=None, scale=L.ScaleFromDecoder(), **k),
        2,
    ),
    "categorical": (functools.partial(L.Categorical, levels=6), 6),
    "logistic": (functools.partial(L.DiscretizedLogistic, levels=6), 2),
    "logistic-mixture": (
        functools.partial(L.DiscretizedLogisticMixture, levels=6, components=3),
        9,
    ),
    "poisson": (L.Poisson, 1),
    "negative-binomial": (L.NegativeBinomial, 1),
    "negative-binomial-fixed": (functools.partial(L.NegativeBinomial, dispersion=0.5), 1),
    "negative-binomial-from-decoder": (
        lambda net, **k: L.NegativeBinomial(net, L.ScaleFromDecoder(), **k),
        2,
    ),
}
COUNTS = torch.arange(4000.0)


def made(name, numbers=None, **options):
    """Return a likelihood on an MLP of 4 outputs, or on given numbers, in eval mode."""
    make, parts = MADE[name]
    if numbers is None:
        return make(pv.nets.MLP(2, [8], 4 * parts), **options)
    return make(nn.Identity(), **options).eval()


def grid_of(support, dtype):
    """Return values that cover a support, and the weight of each in a sum."""
    if isinstance(support, L.Levels):
        x = torch.arange(support.levels, dtype=dtype) / (support.levels - 1)
        return x, torch.ones_like(x)
    if support is dist.constraints.boolean:
        return torch.tensor([0.0, 1.0], dtype=dtype), torch.ones(2, dtype=dtype)
    if support is dist.constraints.nonnegative_integer:
        return COUNTS.to(dtype), torch.ones(len(COUNTS), dtype=dtype)
    if support is dist.constraints.unit_interval:
        u = (torch.arange(20000, dtype=dtype) + 0.5) / 20000
        return u, torch.full_like(u, 1 / 20000)
    # All reals by x = sinh(t), wide enough for a t distribution of three degrees of freedom.
    step = 2e-4
    t = torch.arange(-12.0, 12.0, step, dtype=dtype)
    return t.sinh(), t.cosh() * step


@pytest.mark.parametrize("name", MADE)
def test_density_sums_to_one_and_has_its_mean(name):
    parts = MADE[name][1]
    numbers = torch.randn(4 * parts, dtype=torch.double)
    p = made(name, numbers).double()(numbers)
    assert p.event_shape == (4,)
    x, weights = grid_of(p.base_dist.support, torch.double)
    probabilities = p.base_dist.log_prob(x.unsqueeze(-1)).exp() * weights.unsqueeze(-1)
    # Quadrature over the kink of a Laplace density of scale 0.05 at x = 4 errs by 2e-5.
    torch.testing.assert_close(probabilities.sum(0), torch.ones(4).double(), rtol=0, atol=2e-5)
    if name != "student":  # its tail is beyond the grid
        mean = (x.unsqueeze(-1) * probabilities).sum(0)
        torch.testing.assert_close(p.mean, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MADE)
def test_likelihoods_support_leading_and_event_dimensions(name):
    parts = MADE[name][1]
    numbers = torch.randn(3, 5, 2 * parts, 3, 4)  # particles, data; channels, height, width
    likelihood = made(name, numbers, event_dim=3)
    p = likelihood(numbers)
    assert (p.batch_shape, p.event_shape) == ((3, 5), (2, 3, 4))
    x = p.sample()
    assert x.shape == (3, 5, 2, 3, 4)
    assert p.support.check(x).all()
    log_p = p.log_prob(x[0])
    assert log_p.shape == (3, 5)
    torch.testing.assert_close(log_p[2, 3], likelihood(numbers[2, 3]).log_prob(x[0, 3]))
    wider = p.expand((7, 3, 5))
    assert (wider.batch_shape, wider.event_shape) == ((7, 3, 5), (2, 3, 4))
    torch.testing.assert_close(wider.log_prob(x[0]), log_p.expand(7, 3, 5))
    assert wider.sample((2,)).shape == (2, 7, 3, 5, 2, 3, 4)
    torch.testing.assert_close(wider.mean, p.mean.expand(wider.mean.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MADE)
def test_gradient_reaches_every_parameter(name, dtype):
    likelihood = made(name).to(dtype)
    p = likelihood(torch.randn(3, 7, 2, dtype=dtype))
    x = likelihood(torch.randn(7, 2, dtype=dtype)).sample()
    assert x.dtype == dtype
    log_p = p.log_prob(x)
    assert log_p.dtype == dtype
    log_p.square().sum().backward()
    for parameter in likelihood.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", MADE)
def test_samples_have_the_mean_of_the_distribution(name):
    parts = MADE[name][1]
    numbers = torch.randn(4 * parts)
    p = made(name, numbers)(numbers)
    x = p.sample((20_000,))
    for d in range(4):
        error = x[:, d].std().item() / len(x) ** 0.5
        assert_within(x[:, d].mean().item(), p.mean[d].item(), error, 4.5)


@pytest.mark.parametrize("name", ["categorical", "logistic", "logistic-mixture", "poisson"])
def test_sample_frequencies_match_their_probabilities(name):
    parts = MADE[name][1]
    numbers = torch.randn(4 * parts)
    p = made(name, numbers)(numbers).base_dist
    count, most = 20_000, 5
    unit = most if isinstance(p.support, L.Levels) else 1
    x = (p.sample((count,)) * unit).round()
    for level in range(most + 1):
        expected = p.log_prob(torch.full((4,), level / unit)).exp()
        error = (expected * (1 - expected) / count).sqrt()
        assert ((x == level).double().mean(0) - expected).abs().le(4.5 * error + 1e-9).all()


@pytest.mark.parametrize("name", MADE)
def test_tensors_stay_on_the_input_device_and_are_not_read(name):
    likelihood = made(name).to("meta")  # has no values, and refuses tensors of other devices
    with pyro.validation_enabled(False):
        p = likelihood(torch.empty(3, 2, device="meta"))
        x = torch.empty(3, 4, device="meta")
        for tensor in (p.log_prob(x), p.mean, p.expand((5, 3)).log_prob(x)):
            assert tensor.device.type == "meta"


# Decoders and their outputs


@pytest.mark.parametrize("name", [n for n in MADE if MADE[n][1] > 1])
def test_decoder_outputs_of_wrong_size_are_refused(name):
    make, parts = MADE[name]
    message = rf"needs {parts} decoder outputs .* {4 * parts + 1} is not divisible"
    with pytest.raises(ValueError, match=message):
        make(nn.Identity())(torch.zeros(3, 4 * parts + 1))
    with pytest.raises(ValueError, match=r"events of 3 dimensions, .* shape \(3, 8\)"):
        make(nn.Identity(), event_dim=3)(torch.zeros(3, 8))


@pytest.mark.parametrize("name", MADE)
def test_covariates_reach_the_decoder(name):
    make, parts = MADE[name]
    likelihood = make(pv.nets.Joined(pv.nets.MLP(2 + 3, [8], 4 * parts))).eval()
    z, y = torch.randn(5, 7, 2), torch.randn(7, 3)
    p = likelihood(z, y)
    x = p.sample()
    expected = make(nn.Identity()).eval()
    expected.load_state_dict(likelihood.state_dict(), strict=False)
    torch.testing.assert_close(p.log_prob(x), expected(likelihood.decoder(z, y)).log_prob(x))


def test_blocks_of_decoder_outputs_are_parameters_in_order():
    numbers = torch.randn(3, 8)
    x = torch.randn(3, 4)
    scale = nn.functional.softplus(numbers[:, 4:] + math.log(math.e - 1)) + 1e-6
    p = L.Normal(nn.Identity(), L.ScaleFromDecoder())(numbers)
    expected = dist.Normal(numbers[:, :4], scale).log_prob(x).sum(-1)
    torch.testing.assert_close(p.log_prob(x), expected)
    images = torch.randn(3, 4, 5, 6)
    p = L.Laplace(nn.Identity(), L.ScaleFromDecoder(), event_dim=3)(images)
    torch.testing.assert_close(p.mean, images[:, :2])
    levels = torch.randn(3, 5 * 4)
    p = L.Categorical(nn.Identity(), levels=5)(levels)
    expected = levels.view(3, 5, 4).log_softmax(1)[:, 2].sum(-1)
    torch.testing.assert_close(p.log_prob(torch.full((4,), 0.5)), expected)


def test_decoder_output_of_zero_is_a_scale_of_one():
    p = L.Normal(nn.Identity(), L.ScaleFromDecoder())(torch.zeros(2))
    assert p.stddev.item() == pytest.approx(1, abs=1e-5)
    assert L.Poisson(nn.Identity())(torch.zeros(1)).mean.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("initial", [1e-4, 0.03, 1.0, 7.0, 300.0])
def test_learned_scales_start_at_initial(initial):
    for scale in (L.SharedScale(initial), L.ScalePerOutput(4, initial=initial)):
        p = L.Normal(nn.Identity(), scale)(torch.zeros(4))
        torch.testing.assert_close(p.stddev, torch.full((4,), initial), rtol=1e-4, atol=1e-7)


def test_kl_of_normal_likelihoods_matches_samples():
    p = L.Normal(nn.Identity(), L.ScaleFromDecoder())(torch.randn(3, 8))
    q = L.Normal(nn.Identity(), L.SharedScale(0.5))(torch.randn(3, 4))
    kl = torch.distributions.kl_divergence(q, p)
    x = q.sample((50_000,))
    ratio = q.log_prob(x) - p.log_prob(x)
    for n in range(3):
        assert_within(ratio[:, n].mean(), kl[n], ratio[:, n].std() / len(x) ** 0.5)


# Continuous Bernoulli


@pytest.mark.parametrize("dtype", DTYPES)
def test_continuous_bernoulli_is_accurate_at_small_and_large_logits(dtype):
    sizes = torch.tensor([0.0, 1e-30, 1e-8, 1e-4, 0.02, 0.0999, 0.1001, 0.5, 3.0, 20.0, 200.0, 1e4])
    logits = torch.cat([-sizes, sizes]).to(dtype)
    x = torch.rand(len(logits), dtype=dtype)
    # The normalizer by quadrature in float64, from the end where the density is greatest.
    l64 = logits.double().requires_grad_()
    u = torch.logspace(-8, 0, 40_001, dtype=torch.double)
    u = torch.cat([torch.zeros(1, dtype=torch.double), u])
    falling = (-l64.unsqueeze(-1).abs() * u).exp()
    log_norm = l64.clamp(min=0) + torch.trapezoid(falling, u).log()
    expected = l64 * x.double() - log_norm
    (slope,) = torch.autograd.grad(expected.sum(), l64)
    ours = logits.clone().requires_grad_()
    log_p = L.ContinuousBernoulli(nn.Identity())(ours.unsqueeze(-1)).log_prob(x.unsqueeze(-1))
    (ours_slope,) = torch.autograd.grad(log_p.sum(), ours)
    torch.testing.assert_close(log_p.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    nonzero = logits != 0  # |l| has no gradient in the oracle there
    torch.testing.assert_close(ours_slope.double()[nonzero], slope[nonzero], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours_slope[~nonzero], x[~nonzero] - 0.5)
    mean = L.ContinuousBernoulli(nn.Identity())(logits).mean.double()
    torch.testing.assert_close(mean[nonzero], (x - slope)[nonzero], rtol=1e-4, atol=2e-5)


def test_series_of_the_continuous_bernoulli_are_exact_to_rounding():
    logits = torch.tensor([-0.099, -0.05, -1e-2, 1e-3, 0.05, 0.099], dtype=torch.double)
    ours = logits.clone().requires_grad_()
    p = L.ContinuousBernoulli(nn.Identity())(ours.unsqueeze(-1))
    log_p = p.log_prob(torch.zeros(1).double())
    (slope,) = torch.autograd.grad(log_p.sum(), ours)
    torch.testing.assert_close(log_p, -(logits.expm1() / logits).log(), rtol=0, atol=1e-14)
    mean = 1 / -(-logits).expm1() - 1 / logits
    torch.testing.assert_close(-slope, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(p.mean.squeeze(-1), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("logit", [-300.0, -5.0, -1e-3, 0.0, 1e-9, 0.3, 5.0, 300.0])
def test_continuous_bernoulli_samples_have_its_mean_and_inverse_cdf(logit):
    p = L.ContinuousBernoulli(nn.Identity())(torch.tensor([logit])).base_dist
    x = p.rsample((20_000,))
    assert ((x >= 0) & (x <= 1)).all()
    assert_within(x.mean(), p.mean, x.std() / len(x) ** 0.5, 4.5)
    u = torch.linspace(0.02, 0.98, 49)
    if abs(logit) < 10:  # torch's cdf clamps probabilities
        torch.testing.assert_close(p.cdf(p.icdf(u)), u, rtol=0, atol=1e-3)


# Levels


def brute_force(level, levels, loc, scale):
    """Return the log-probability of a level: a difference of the smaller tails, in float64."""
    loc, scale = loc.double() * (levels - 1), scale.double() * (levels - 1)
    lower = (level - 0.5 - loc) / scale if level > 0 else torch.full_like(loc, -torch.inf)
    upper = (level + 0.5 - loc) / scale if level < levels - 1 else torch.full_like(loc, torch.inf)
    beyond = lower > 0
    a, b = torch.where(beyond, -lower, upper), torch.where(beyond, -upper, lower)
    return (a.sigmoid() - b.sigmoid()).log()


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_discretized_logistics_are_differences_of_sigmoids(levels):
    numbers = torch.randn(200, 2) * torch.tensor([1.5, 2.0])
    numbers[:, 1] -= 2
    p = L.DiscretizedLogistic(nn.Identity(), levels)(numbers)
    loc = 0.5 * (1 + numbers[:, :1])
    scale = 0.5 * (nn.functional.softplus(numbers[:, 1:] + math.log(math.e - 1)) + 1e-6)
    for level in {0, 1, levels // 2, levels - 2, levels - 1}:
        expected = brute_force(level, levels, loc, scale).squeeze(-1)
        seen = expected > -500  # beyond, the difference is zero even in float64
        x = torch.full((1,), level / (levels - 1))
        torch.testing.assert_close(
            p.log_prob(x).double()[seen], expected[seen], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(p.log_prob(x), p.log_prob(torch.tensor([level])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [L.DiscretizedLogistic, L.DiscretizedLogisticMixture])
def test_tails_are_finite_in_value_and_gradient(make, dtype):
    loc = torch.tensor([-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4], dtype=dtype)
    raw = torch.tensor([-60.0, -12.0, -4.0, 0.0, 50.0, 1e4], dtype=dtype)
    numbers = torch.stack(torch.meshgrid(loc, raw, indexing="ij"), -1).flatten(0, 1)
    if make is L.DiscretizedLogisticMixture:
        spread = torch.tensor([-1.0, 0, 1, 3, -7], dtype=dtype)
        numbers = torch.cat(
            [
                40 * spread.expand(len(numbers), -1),
                numbers[:, :1] + spread,
                numbers[:, 1:] + spread,
            ],
            -1,
        )
    numbers.requires_grad_()
    p = make(nn.Identity())(numbers)
    for x in (0.0, 1 / 255, 128 / 255, 1.0):
        log_p = p.log_prob(torch.tensor([x], dtype=dtype))
        (grad,) = torch.autograd.grad(log_p.sum(), numbers, retain_graph=True)
        assert log_p.isfinite().all()
        assert grad.isfinite().all()
        assert (log_p <= 1e-6).all()


def test_mixture_is_the_sum_of_its_components():
    numbers = torch.randn(5, 3 * 2 * 4, dtype=torch.double)  # C = 2, D = 4
    x = torch.randint(0, 17, (5, 4))
    p = L.DiscretizedLogisticMixture(nn.Identity(), 17, 2)(numbers).base_dist
    logits, loc, raw = numbers.view(5, 3, 2, 4).unbind(1)
    single = L.DiscretizedLogistic(nn.Identity(), 17)
    components = [
        single(torch.cat([loc[:, c], raw[:, c]], -1)).base_dist.log_prob(x) for c in range(2)
    ]
    expected = (logits.log_softmax(1) + torch.stack(components, 1)).logsumexp(1)
    torch.testing.assert_close(p.log_prob(x), expected)


def test_levels_accept_only_their_grid():
    support = L.Levels(256)
    assert repr(support) == "levels(256)"
    grid = torch.arange(256) / 255
    assert support.check(grid).all()
    assert support.check(grid.double()).all()
    assert support.check(torch.arange(256, dtype=torch.uint8)).all()
    assert not support.check(torch.tensor([-1 / 255, 256 / 255, 0.5 / 255, torch.nan])).any()
    assert not support.check(torch.tensor([-1, 256])).any()
    assert L.Levels(2**16).check(torch.arange(2**16) / (2**16 - 1)).all()
    assert not support.check(torch.arange(1, 16) / 16).any()


@pytest.mark.parametrize("name", ["categorical", "logistic", "logistic-mixture"])
def test_data_that_are_not_levels_are_refused(name):
    likelihood = made(name)
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(4, [8]))
    x = torch.randint(0, 6, (30, 4)) / 5
    x[25, 0] = 3 / 16
    with pytest.raises(ValueError, match=r"support of site 'x', .*levels\(6\).* in row 25"):
        pv.fit(model, guide, x, batch_size=10, epochs=1, progress=False)
    with pyro.validation_enabled(True):
        p = likelihood(torch.zeros(2))
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor([0.0, 0.5, 1.0, 1.0]))


# Counts


@pytest.mark.parametrize("dispersion", [1e-6, 1e-3, 0.049, 0.051, 0.7, 30.0])
def test_negative_binomial_in_float32_matches_float64(dispersion):
    raw = torch.tensor([-8.0, 0.0, 3.0, 50.0])
    x = torch.tensor([0.0, 1, 3, 40, 200]).unsqueeze(-1)
    mean = nn.functional.softplus(raw.double() + math.log(math.e - 1)) + 1e-6
    r = torch.tensor(1 / dispersion).double()
    expected = dist.NegativeBinomial(r, logits=(mean / r).log()).log_prob(x.double())
    p = L.NegativeBinomial(nn.Identity(), dispersion)(raw).base_dist
    torch.testing.assert_close(p.log_prob(x).double(), expected, rtol=2e-5, atol=2e-5)
    variance = mean + dispersion * mean.square()
    torch.testing.assert_close(p.variance.double(), variance, rtol=1e-5, atol=0)
    if dispersion == 1e-6:
        poisson = dist.Poisson(mean).log_prob(x.double())
        torch.testing.assert_close(expected, poisson, rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("dispersion", [1e-6, 0.01, 0.7, 30.0])
def test_gradient_of_the_dispersion_in_float32_matches_float64(dispersion):
    def log_p(alpha, dtype):
        scale = L.ScalePerOutput(1, initial=alpha + 1e-5).to(dtype)
        p = L.NegativeBinomial(nn.Identity(), scale)(torch.tensor([3.0], dtype=dtype))
        value = p.log_prob(torch.tensor([[0.0], [4.0], [90.0]], dtype=dtype)).sum()
        return torch.autograd.grad(value, scale.raw)[0].double()

    torch.testing.assert_close(
        log_p(dispersion, torch.float32), log_p(dispersion, torch.double), rtol=1e-2, atol=1e-4
    )


@pytest.mark.parametrize("mean", [1e-3, 0.3, 3.0, 32.0, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("dispersion", [0.0, 1e-9, 1e-6, 1e-3, 0.7, 30.0])
def test_counts_of_any_size_in_float32_match_float64(mean, dispersion):
    identity = nn.Identity()
    likelihood = L.NegativeBinomial(identity, dispersion) if dispersion else L.Poisson(identity)
    raw = torch.tensor([numerics.inverse_softplus_scale(mean + 2e-6)], requires_grad=True)
    rate = numerics.softplus_scale(raw.detach().double()).requires_grad_()
    if dispersion:
        r = 1 / torch.tensor(dispersion).double()
        truth = dist.NegativeBinomial(r, logits=(rate / r).log())
    else:
        truth = dist.Poisson(rate)
    x = torch.cat(
        [truth.sample((200,)).detach(), torch.arange(100.0)[:, None], rate.detach().round()[None]]
    )
    found, expected = likelihood(raw).base_dist.log_prob(x.float()), truth.log_prob(x)
    atol = 3e-5 + 1e-6 * mean**0.5  # the rounding of the rate changes log p by sqrt(rate) times it
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=atol)
    slope = torch.autograd.grad(found.sum(), raw)[0].double()
    expected = torch.autograd.grad(expected.sum(), rate)[0]
    expected = expected * torch.sigmoid(raw.double() + math.log(math.e - 1))
    assert (slope - expected).abs() < 1e-6 * (x / rate + 1).sum()


def test_densities_of_counts_that_are_no_integers_are_those_of_torch():
    x = torch.tensor([0.0, 1e-3, 0.4, 0.99, 1.5, 31.4, 32.0, 32.7, 33.0, 500.5]).double()
    raw = torch.randn(10).double()
    mean = numerics.softplus_scale(raw)
    r = torch.tensor(4.0).double()
    truth = {
        L.NegativeBinomial(nn.Identity(), 0.25): dist.NegativeBinomial(r, logits=(mean / r).log()),
        L.Poisson(nn.Identity()): dist.Poisson(mean),
    }
    with pyro.validation_enabled(False):
        for likelihood, expected in truth.items():
            expected = type(expected).log_prob(expected.expand([10]), x)
            found = likelihood(raw).base_dist.log_prob(x)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["poisson", "negative-binomial"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_counts_may_be_integers(name, dtype):
    p = made(name)(torch.randn(3, 2))
    x = torch.tensor([0, 1, 7, 255], dtype=dtype)
    torch.testing.assert_close(p.log_prob(x), p.log_prob(x.float()))


# The optimal scale


def optimal(make, **options):
    likelihood = make(pv.nets.MLP(2, [8], 4), L.OptimalScale(**options)).double()
    return likelihood, torch.randn(3, 5, 2).double(), torch.randn(5, 4).double()


def best(make, residuals):
    return residuals.square().mean().sqrt() if make is L.Normal else residuals.abs().mean()


@pytest.mark.parametrize("make", [L.Normal, L.Laplace])
def test_optimal_scale_has_a_closed_form_loss_and_gradient(make):
    likelihood, z, x = optimal(make)
    loss = -likelihood(z).log_prob(x).mean()
    scale = best(make, x - likelihood.decoder(z))
    constant = 0.5 * math.log(2 * math.pi * math.e) if make is L.Normal else math.log(2 * math.e)
    profile = 4 * (scale.log() + constant)  # D dimensions; the gradient includes that of the scale
    torch.testing.assert_close(loss, profile)
    parameters = list(likelihood.decoder.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(profile, parameters)
    )
    for other in (0.9, 1.1):  # it is a maximum
        p = make(likelihood.decoder, other * scale.item())(z)
        assert p.log_prob(x).mean() < -loss


@pytest.mark.parametrize("make", [L.Normal, L.Laplace])
def test_evaluation_uses_the_running_average_of_the_scale(make):
    likelihood, z, x = optimal(make, momentum=0.25)
    power = 2 if make is L.Normal else 1
    assert likelihood.eval()(z).base_dist.scale.unique().item() == 1
    deviations = []
    for shift in (0.0, 3.0, 1.0):
        likelihood.train()(z).log_prob(x + shift)
        deviations.append(best(make, x + shift - likelihood.decoder(z)).item() ** power)
    average = deviations[0]  # without the initial value
    for deviation in deviations[1:]:
        average += 0.25 * (deviation - average)
    expected = average ** (1 / power)
    stored = likelihood.scale.average.clone()
    p = likelihood.eval()(z)
    assert p.base_dist.scale.unique().item() == pytest.approx(expected)
    fixed = make(likelihood.decoder, expected)(z)
    torch.testing.assert_close(p.log_prob(x), fixed.log_prob(x))
    assert torch.equal(likelihood.scale.average, stored)
    drawn = likelihood.train()(z)
    torch.testing.assert_close(drawn.variance, fixed.variance)
    assert_within(
        (drawn.rsample((4000,)) - drawn.mean).abs().mean().item(),
        (fixed.sample((4000,)) - fixed.mean).abs().mean().item(),
        2 * expected / (4000 * 60) ** 0.5,
    )
    restored, *_ = optimal(make)
    restored.load_state_dict(likelihood.state_dict())
    torch.testing.assert_close(restored.eval()(z).log_prob(x), p.log_prob(x))


def test_optimal_scale_has_a_minimum():
    likelihood = L.Normal(nn.Identity(), L.OptimalScale(least=0.01))
    x = torch.randn(5, 4)
    loc = x.clone().requires_grad_()
    log_p = likelihood(loc).log_prob(x)
    expected = dist.Normal(x, 0.01).log_prob(x).sum(-1)
    torch.testing.assert_close(log_p, expected)
    assert torch.autograd.grad(log_p.sum(), loc)[0].isfinite().all()
    torch.testing.assert_close(likelihood.eval()(x).log_prob(x), expected)


def test_kl_at_an_unknown_optimal_scale_is_not_implemented():
    likelihood = L.Normal(nn.Identity(), L.OptimalScale())
    p, q = likelihood(torch.zeros(4)), dist.Normal(torch.zeros(4), 1.0).to_event(1)
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(q, p)
    assert torch.distributions.kl_divergence(q, likelihood.eval()(torch.zeros(4))).item() == 0


# Bad arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: L.Normal(net, 0.0), "scale must be positive and finite, got 0.0"),
        (lambda net: L.Laplace(net, float("nan")), "scale must be positive and finite, got nan"),
        (lambda net: L.StudentT(net, 3.0, math.inf), "scale must be positive and finite, got inf"),
        (lambda net: L.StudentT(net, -1.0), "df must be positive and finite, got -1.0"),
        (lambda net: L.NegativeBinomial(net, 0), "dispersion must be positive and finite, got 0"),
        (lambda net: L.SharedScale(-1.0), "initial must be positive"),
        (lambda net: L.SharedScale(1e-7), "initial must be above 1e-06"),
        (lambda net: L.ScalePerOutput(), "positive sizes of x"),
        (lambda net: L.ScalePerOutput(3, 0), r"for ScalePerOutput, got \(3, 0\)"),
        (lambda net: L.OptimalScale(0.0), "momentum must be positive"),
        (lambda net: L.OptimalScale(1.5), "momentum must be at most 1"),
        (lambda net: L.OptimalScale(least=-1.0), "least must be positive"),
        (lambda net: L.Categorical(net, 1), "levels must be at least 2, got 1"),
        (lambda net: L.DiscretizedLogistic(net, 1), "levels must be at least 2, got 1"),
        (lambda net: L.DiscretizedLogisticMixture(net, 0), "levels must be at least 2, got 0"),
        (
            lambda net: L.DiscretizedLogisticMixture(net, components=0),
            "components must be at least 1, got 0",
        ),
        (lambda net: L.Poisson(net, event_dim=0), "event_dim must be at least 1, got 0"),
        (
            lambda net: L.Normal(net, L.ScalePerOutput(5))(torch.zeros(3, 4)),
            r"scales of shape \(5,\), .* shape \(3, 4\): pass the shape of x",
        ),
        (
            lambda net: L.Normal(net, L.ScalePerOutput(2, 3, 4))(torch.zeros(3, 4)),
            "pass the shape of x",
        ),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Identity())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: L.Normal(net, "learned"), "scale must be a number, got 'learned'"),
        (lambda net: L.Normal(net, torch.ones(3)), "scale must be a number, SharedScale"),
        (lambda net: L.StudentT(net, 3.0, L.OptimalScale()), "scale must be a number, SharedScale"),
        (lambda net: L.NegativeBinomial(net, L.OptimalScale()), "dispersion must be a number, Sh"),
        (lambda net: L.StudentT(net, True), "df must be a number"),
        (lambda net: L.Categorical(net, 2.5), "levels must be a whole number"),
    ],
)
def test_arguments_of_wrong_type_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make(nn.Identity())


# Fits


GRAY = {"continuous-bernoulli", "categorical", "logistic", "logistic-mixture"}


def data_for(name):
    """Return rows of two kinds, inside the support."""
    base = torch.where(torch.rand(40, 1) < 0.5, torch.tensor([1.0, 4, 0, 3]), 2.0)
    x = (base + torch.randint(-1, 2, (40, 4))).clamp(0, 5)
    if name in GRAY:
        return x / 5
    return (x > 2).float() if name == "bernoulli" else x


def pair(name):
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), made(name))
    return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(4, [8]))


@pytest.mark.parametrize("name", MADE)
def test_every_likelihood_fits_evaluates_and_generates(name):
    x = data_for(name)
    model, guide = pair(name)
    fit = pv.fit(model, guide, x, validation=x, epochs=4, batch_size=10, learning_rate=1e-2,
                 seed=0, capture=False, progress=False)  # fmt: skip
    assert fit.history.validation_loss.iloc[-1] < fit.history.validation_loss.iloc[0]
    assert pv.evidence(model, guide, x, num_particles=5).values.isfinite().all()
    assert pv.reconstruct(model, guide, x).shape == x.shape
    assert pv.generate(model, x, guide=guide).isfinite().all()


# Variants whose operations other likelihoods have too.
VARIANTS = {
    *("normal-shared", "normal-per-output", "laplace-from-decoder", "laplace-optimal", "student"),
    *("negative-binomial", "negative-binomial-fixed"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in VARIANTS else ())
        for n in MADE
        if n != "bernoulli"
    ],
)
def test_captured_steps_match_eager(name, without_compiler):
    options = {"objective": pv.objectives.IWAE(3), "execution": "captured, not compiled"}
    check_same(functools.partial(pair, name), data_for(name), double=True, epochs=2, **options)


@pytest.mark.parametrize("logit", [-60.0, -3.0, -0.4, -1e-9, 0.0, 1e-4, 0.05, 0.7, 20.0, 50.0])
def test_moments_of_the_continuous_bernoulli_match_a_grid(logit):
    """In float32, where torch's own moments are limited to logits of 16."""
    p = pv.likelihoods.ContinuousBernoulli(nn.Identity())(torch.tensor([logit])).base_dist
    x = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    density = torch.exp(logit * x - (logit * x).logsumexp(0)).double() * 400_000
    mean = (x * density).mean()
    assert p.mean.item() == pytest.approx(mean.item(), rel=1e-4)
    assert p.variance.item() == pytest.approx(((x - mean) ** 2 * density).mean().item(), rel=2e-4)
    entropy = -(density * density.log()).nan_to_num().mean().item()
    assert p.entropy().item() == pytest.approx(entropy, abs=2e-3)
    for at in (0.1, 0.5, 0.97):
        share = density[x < at].mean().item() * at if at < 1 else 1.0
        assert p.cdf(torch.tensor([at])).item() == pytest.approx(share, abs=2e-3)
        assert p.icdf(p.cdf(torch.tensor([at]))).item() == pytest.approx(at, abs=0.02) or (
            not 1e-6 < share < 1 - 1e-6
        )


def test_kl_of_continuous_bernoullis_matches_a_grid():
    p, q = (
        pv.likelihoods.ContinuousBernoulli(nn.Identity())(torch.tensor([each])).base_dist
        for each in (1.0, 40.0)
    )
    x = (torch.arange(100_000) + 0.5) / 100_000
    log_p, log_q = p.log_prob(x), q.log_prob(x)
    expected = (log_p.exp() * (log_p - log_q)).mean()
    torch.testing.assert_close(kl_divergence(p, q)[0], expected, rtol=1e-4, atol=0)


def test_samples_near_the_uniform_have_a_gradient():
    """E[x] = 1/2 + l/12 for small logits."""
    for value in (0.0, 1e-8, -1e-5, 1e-3):
        logit = torch.tensor([value], requires_grad=True)
        draws = pv.likelihoods.ContinuousBernoulli(nn.Identity())(logit).rsample((20_000,))
        (gradient,) = torch.autograd.grad(draws.mean(), logit)
        assert gradient.item() == pytest.approx(1 / 12, abs=0.003)


def test_levels_accept_small_integer_dtypes():
    x = torch.tensor([0, 100, 127])
    assert pv.likelihoods.Levels(300).check(x.to(torch.uint8)).all()
    assert pv.likelihoods.Levels(256).check(x.to(torch.int8)).all()
    assert not pv.likelihoods.Levels(100).check(x.to(torch.int8)).all()


def test_degrees_of_freedom_start_at_five_and_stay_above_one():
    likelihood = pv.likelihoods.StudentT(nn.Identity())
    df = likelihood(torch.zeros(1, 3)).base_dist.df
    torch.testing.assert_close(df, torch.full((1, 3), 5.0))
    with torch.no_grad():
        likelihood.df_above_one.raw.fill_(-100.0)
    assert (likelihood(torch.zeros(1, 3)).base_dist.df > 1).all()
