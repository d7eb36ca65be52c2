"""The order of the bounds, and which pairs each objective accepts or refuses."""

import itertools
import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, assert_within

from pyro_vae import objectives as o

BOUNDS = {
    "ELBO": o.ELBO,
    "MeanFieldELBO": o.MeanFieldELBO,
    "BetaELBO": lambda k: o.BetaELBO(1.0, k),
    "StickingTheLanding": o.StickingTheLanding,
    "ScoreFunction": o.ScoreFunction,
    "IWAE": o.IWAE,
    "DReG": o.DReG,
    "MIWAE": lambda k: o.MIWAE(2, k),
    "PIWAE": lambda k: o.PIWAE(2, k),
    "CIWAE": lambda k: o.CIWAE(0.5, k),
    "Renyi": lambda k: o.Renyi(0.5, k),
    "TVO": lambda k: o.TVO(max(k, 2)),
    "VIMCO": lambda k: o.VIMCO(max(k, 2)),
    "ReweightedWakeSleep": o.ReweightedWakeSleep,
    "CUBO": lambda k: o.CUBO(1.5, k),
}
# Not bounds on the evidence: weighted, floored, or with a distance that is not a divergence.
OTHERS = {
    "BetaELBO": lambda k: o.BetaELBO(4.0, k),
    "FreeBits": lambda k: o.FreeBits(0.5, num_particles=k),
    "FreeBits, dimension": lambda k: o.FreeBits(0.5, per="dimension", num_particles=k),
    "CapacityELBO": lambda k: o.CapacityELBO(5.0, num_particles=k),
    "BetaTCVAE": lambda k: o.BetaTCVAE(num_data=100, num_particles=k),
    "InfoVAE": lambda k: o.InfoVAE(num_particles=k),
}


def estimates(objective, oracle, x, rows=500):
    """Return the mean bound of each block of rows."""
    losses = [-objective.loss(oracle.model, oracle.guide, part) for part in x.split(rows)]
    return torch.tensor(losses, dtype=torch.float64) / rows


@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("num_particles", [2, 1000])
def test_renyi_near_one_and_far_from_it(spread, num_particles):
    def renyi(log_weight, alpha):
        log_weight = log_weight.clone().requires_grad_()
        terms = SimpleNamespace(log_weight=log_weight, require_reparameterized=lambda _: None)
        value = o.Renyi(alpha, num_particles).bound(terms)
        return value.detach(), torch.autograd.grad(value.sum(), log_weight)[0]

    log_weight = spread * torch.randn(num_particles, 5) - 90
    for distance in [1e-15, 1e-8, 1e-7, 1e-5, 1e-3, 0.1, 0.5, 1.0, 5.0]:
        for alpha in (1 - distance, 1 + distance):
            value, gradient = renyi(log_weight, alpha)
            double = log_weight.double()
            offset = double.mean(0)
            powers = (1 - alpha) * (double - offset)
            if distance > 1e-3:
                log_mean = powers.logsumexp(0) - math.log(num_particles)
            else:
                log_mean = torch.expm1(powers).mean(0).log1p()
            expected = offset + log_mean / (1 - alpha)
            assert (value - expected).abs().max() <= 1e-6 * (90 + 5 * spread), alpha
            torch.testing.assert_close(gradient.double(), powers.softmax(0), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1 - 1e-7])
def test_renyi_with_weights_of_zero(alpha):
    log_weight = torch.tensor([[-1.0, -1.0], [-torch.inf, -torch.inf], [-3.0, -torch.inf]])
    terms = SimpleNamespace(log_weight=log_weight, require_reparameterized=lambda _: None)
    power = 1 - alpha
    expected = (power * log_weight.double()).exp().mean(0).log() / power
    torch.testing.assert_close(o.Renyi(alpha, 3).bound(terms).double(), expected)
    upper = o.Renyi(2 - alpha, 3).bound(terms)
    assert upper.tolist() == [-torch.inf] * 2


def test_bounds_are_ordered_and_close_on_the_evidence():
    torch.manual_seed(0)
    weight = torch.tensor([[1.0, 0.6], [0.3, 1.0], [0.8, 0.5]])
    oracle = LinearGaussian(weight=weight, noise=0.3)
    x = oracle.sample(15_000)
    chain = [
        o.ELBO(1),
        o.CIWAE(0.5, 8),
        o.IWAE(8),
        o.IWAE(16),
        oracle.log_evidence,
        o.CUBO(1.5, 256),
    ]
    values = []
    for each in chain:
        if isinstance(each, o.CUBO):
            values.append(-estimates(each, oracle, x))
        elif isinstance(each, o.Objective):
            values.append(estimates(each, oracle, x))
        else:
            values.append(each(x).view(-1, 500).mean(1))
    for lower, upper in itertools.pairwise(values):
        gaps = upper - lower
        assert gaps.mean() > 3 * gaps.std() / len(gaps) ** 0.5


def test_chi_upper_bound_matches_its_closed_form():
    """E_q[w^2] is a Gaussian integral; Jensen's gap is small with many particles."""
    torch.manual_seed(1)
    oracle = LinearGaussian(weight=torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.5, 0.0]]), noise=0.8)
    x = oracle.sample(4)
    truth = oracle.log_evidence(x).mean().item() + 0.5 * torch.log1p(
        torch.tensor(oracle.weight_excess)
    )
    found = torch.tensor(
        [o.CUBO(2, 4000).loss(oracle.model, oracle.guide, x) / 4 for _ in range(50)]
    )
    assert abs(found.mean() - truth) < 4.5 * found.std() / 50**0.5 + 1e-3


@pytest.mark.parametrize("k", [1, 64])
@pytest.mark.parametrize("name", BOUNDS)
def test_bound_with_the_exact_posterior_equals_the_evidence(name, k):
    torch.manual_seed(2)
    oracle = LinearGaussian(exact=True)
    x = oracle.sample(6)
    loss = BOUNDS[name](k).loss(oracle.model, oracle.guide, x)
    sign = 1 if name == "CUBO" else -1
    assert sign * loss == pytest.approx(oracle.log_evidence(x).sum().item(), rel=1e-10)


class Subsampled(LinearGaussian):
    """A model whose plate scales each minibatch by ten."""

    def plate(self, x):
        return pyro.plate("data", 10 * len(x), subsample=x)


@pytest.mark.parametrize("k", [1, 64])
@pytest.mark.parametrize("name", BOUNDS)
def test_bound_under_a_subsampled_plate_stays_a_bound(name, k):
    """The plate's scale multiplies the bound; it is not an exponent of the weights."""
    torch.manual_seed(3)
    oracle = Subsampled()
    x = oracle.sample(2000)
    objective = BOUNDS[name](k)
    gaps = []
    for part in x.split(200):
        loss = objective.loss(oracle.model, oracle.guide, part) / 2000
        evidence = oracle.log_evidence(part).mean().item()
        gaps.append(evidence + loss if name != "CUBO" else loss - evidence)
    gaps = torch.tensor(gaps)
    if name == "CUBO" and k == 1:  # with one particle the estimate equals the ELBO, as documented
        gaps = -gaps
    assert gaps.mean() > 0
    assert gaps.mean() < oracle.gap + 4.5 * gaps.std() / 10**0.5


def shared_weight():
    """Return a pair with a global latent, and data."""

    def model(x):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    def guide(x):
        pyro.sample("weight", dist.Normal(0.5, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 0.8))

    return model, guide, torch.randn(6)


@pytest.fixture(scope="module")
def with_shared_weight():
    """Return the pair and its losses from Pyro."""
    torch.manual_seed(4)
    pair = shared_weight()
    return pair, torch.tensor([pyro.infer.Trace_ELBO(64).loss(*pair) for _ in range(30)])


@pytest.mark.parametrize("k", [1, 64])
@pytest.mark.parametrize("name", [*BOUNDS, *(f"other {n}" for n in OTHERS)])
def test_global_latents_are_accepted_or_refused_by_name(name, k, with_shared_weight):
    make = OTHERS[name.removeprefix("other ")] if name.startswith("other") else BOUNDS[name]
    (model, guide, x), theirs = with_shared_weight
    objective = make(k)
    if isinstance(objective, (o.ELBO, o.MeanFieldELBO, o.BetaELBO)):
        ours = torch.tensor([objective.loss(model, guide, x) for _ in range(100)])
        if name == "other BetaELBO":
            assert ours.mean() > theirs.mean()  # the KL counts four times
        else:
            error = (theirs.var() / 30 + ours.var() / 100) ** 0.5
            assert_within(ours.mean(), theirs.mean(), error)
    else:
        with pytest.raises(ValueError, match="site 'weight' is outside the plate"):
            objective.loss(model, guide, x)


@pytest.mark.parametrize("name", [*BOUNDS, *(f"other {n}" for n in OTHERS)])
def test_objectives_work_with_pyros_svi(name, pair, binary):
    make = OTHERS[name.removeprefix("other ")] if name.startswith("other") else BOUNDS[name]
    model, guide = pair
    objective = make(2)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    losses = [svi.step(binary) for _ in range(30)]
    assert objective.step == 30
    if name != "CUBO":  # which trains the guide alone
        assert sum(losses[-5:]) < sum(losses[:5])
    before = objective.step.item()
    svi.evaluate_loss(binary)
    assert objective.step == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: o.MIWAE(0, 2), "num_bounds must be at least 1"),
        (lambda: o.MIWAE(2, 0), "num_particles must be at least 1"),
        (lambda: o.CIWAE(1.5, 2), "beta must be between 0 and 1"),
        (lambda: o.Renyi(1, 2), "Use objectives.ELBO"),
        (lambda: o.Renyi(float("inf"), 2), "alpha must be finite"),
        (lambda: o.CUBO(0.5), "n must be a number of at least 1"),
        (lambda: o.TVO(1), "num_particles must be at least 2"),
        (lambda: o.TVO(2, first=1.0), "first must be between 0 and 1"),
        (lambda: o.VIMCO(1), "num_particles must be at least 2"),
        (lambda: o.ScoreFunction(1, "others"), "needs num_particles of at least 2"),
        (lambda: o.ScoreFunction(1, "mean"), "baseline must be"),
        (lambda: o.ReweightedWakeSleep(2, wake=0, sleep=0), "not both zero"),
        (lambda: o.FreeBits(0.0), "least must be positive"),
        (lambda: o.FreeBits(per="pixel"), "per must be"),
        (lambda: o.FreeBits(over="epoch"), "over must be"),
        (lambda: o.InfoVAE(alpha=2.0), "alpha must be at most 1"),
        (lambda: o.Linear(0), "steps must be at least 1"),
        (lambda: o.Cyclical(10, rise=0.0), "rise must be a fraction"),
        (lambda: o.BetaELBO(float("nan")), "beta must be finite"),
        (lambda: o.BetaTCVAE(num_data=0), "num_data must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", sorted({*BOUNDS} - {"ELBO", "VIMCO", "ScoreFunction", "TVO",
                                                     "ReweightedWakeSleep"}))  # fmt: skip
def test_sites_without_a_reparameterized_sample_are_refused_by_name(name):
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="site 'c' has none"):
        BOUNDS[name](3).loss(model, guide, torch.randn(5))
