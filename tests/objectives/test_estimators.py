"""Compare each objective's expected value and gradient with autograd through quadrature."""

import functools
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import objectives

X = torch.tensor([0.8, -1.3], dtype=torch.float64)
CHUNKS, ROWS = 80, 300  # draws per x; at 4.5 standard errors, about 1e-4 false alarms per case


class Pair(nn.Module):
    """A pair with one latent, a nonlinear decoder, and a guide unequal to the posterior."""

    num_latents = 1
    of_model = ("value", "w", "shift")

    def __init__(self, reparameterized=True):
        super().__init__()
        for name, value in self.initial().items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))
        self.reparameterized = reparameterized

    @staticmethod
    def initial():
        return {"w": 1.3, "shift": 0.2, "slope": 0.4, "bias": 0.1, "log_scale": -0.4}

    def p_z(self, number, z):
        return dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)

    def p_x(self, z):
        return dist.Normal(torch.sin(self.w * z[0]) + self.shift * z[0], 0.8)

    def q_z(self, number, z, x):
        return dist.Normal(self.slope * x + self.bias, self.log_scale.exp())

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = []
            for number in range(self.num_latents):
                z.append(pyro.sample(f"z{number}", self.p_z(number, z)))
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z = []
            for number in range(self.num_latents):
                q = self.q_z(number, z, x)
                q = q if self.reparameterized else q.has_rsample_(False)
                z.append(pyro.sample(f"z{number}", q))

    def value_and_gradient(self, bound):
        names, values = zip(*self.named_parameters(), strict=True)
        found = torch.autograd.grad(bound, values, allow_unused=True)
        gradient = {n: 0.0 if g is None else g.item() for n, g in zip(names, found, strict=True)}
        return {"value": bound.item(), **gradient}


class Chain(Pair):
    """A pair with two latents; both programs sample the second given the first."""

    num_latents = 2
    of_model = ("value", "w", "shift", "carry")

    @staticmethod
    def initial():
        return {**Pair.initial(), "carry": 0.6, "follow": -0.5, "log_scale1": -0.2}

    def p_z(self, number, z):
        return super().p_z(number, z) if number == 0 else dist.Normal(self.carry * z[0], 0.9)

    def p_x(self, z):
        return dist.Normal(torch.sin(self.w * z[1]) + self.shift * z[0], 0.8)

    def q_z(self, number, z, x):
        if number == 0:
            return super().q_z(number, z, x)
        return dist.Normal(self.follow * torch.tanh(z[0]) + 0.3 * x, self.log_scale1.exp())


def nodes(pair, particles):
    """Return quadrature nodes of K particles for one x: noise (K, J, points), and weights."""
    count = {1: 80, 2: 40, 4: 16}[particles * pair.num_latents]
    t, weight = np.polynomial.hermite_e.hermegauss(count)
    t, weight = torch.tensor(t), torch.tensor(weight) / np.sqrt(2 * np.pi)
    axes = torch.meshgrid(*[t] * (particles * pair.num_latents), indexing="ij")
    weights = torch.ones((), dtype=torch.float64)
    for _ in axes:
        weights = weights.unsqueeze(-1) * weight
    noise = torch.stack([axis.flatten() for axis in axes])
    return noise.unflatten(0, (particles, pair.num_latents)), weights.flatten()


def log_densities(pair, noise, x, *, hold=False):
    """Return log p(x, z_k) and log q(z_k|x) at the nodes, each (K, points)."""
    z, log_q, log_p = [], 0.0, 0.0
    for number in range(pair.num_latents):
        q = pair.q_z(number, z, x)
        value = q.loc + q.scale * noise[:, number]
        z.append(value.detach() if hold else value)
        log_q = log_q + q.log_prob(z[-1]) if not hold else log_q
        log_p = log_p + pair.p_z(number, z).log_prob(z[-1])
    if hold:
        given = []
        for number in range(pair.num_latents):
            log_q = log_q + pair.q_z(number, given, x).log_prob(z[number])
            given.append(z[number])
    return log_p + pair.p_x(z).log_prob(x), log_q


def expected(pair, particles, reduce):
    """Return E[reduce(log w)] summed over x and its gradient, by autograd through quadrature."""
    noise, weights = nodes(pair, particles)
    total = 0.0
    for x in X:
        log_p, log_q = log_densities(pair, noise, x)
        total = total + (weights * reduce(log_p - log_q)).sum()
    return pair.value_and_gradient(total)


def log_mean(log_w):
    return log_w.logsumexp(0) - np.log(len(log_w))


def elbo(pair):
    return expected(pair, 1, lambda log_w: log_w[0])


def iwae(pair):
    return expected(pair, 2, log_mean)


def piwae(pair):
    tight, loose = expected(pair, 4, log_mean), iwae(pair)
    return {n: (tight if n in pair.of_model else loose)[n] for n in tight}


def renyi(pair, alpha):
    return expected(pair, 2, lambda log_w: log_mean((1 - alpha) * log_w) / (1 - alpha))


def cubo(pair):
    found = expected(pair, 2, lambda log_w: -log_mean(2 * log_w) / 2)
    return {n: 0.0 if n in pair.of_model[1:] else g for n, g in found.items()}


def mixed(pair, beta):
    ends = elbo(pair), iwae(pair)
    return {n: beta * ends[0][n] + (1 - beta) * ends[1][n] for n in ends[0]}


def wake(pair):
    """Return the biased wake gradient E[sum_k w_k grad log q(z_k)] of the guide at K = 2."""
    noise, weights = nodes(pair, 2)
    total = 0.0
    for x in X:
        log_p, log_q = log_densities(pair, noise, x, hold=True)
        shares = (log_p - log_q).detach().softmax(0)
        total = total + (weights * (shares * log_q).sum(0)).sum()
    guide, model = pair.value_and_gradient(total), iwae(pair)
    return {n: (model if n in pair.of_model else guide)[n] for n in model}


def beta_elbo(pair, beta):
    noise, weights = nodes(pair, 1)
    total = 0.0
    for x in X:
        q = pair.q_z(0, [], x)
        log_p, _ = log_densities(pair, noise, x)
        kl = torch.distributions.kl_divergence(q, pair.p_z(0, []))
        log_prior = pair.p_z(0, []).log_prob(q.loc + q.scale * noise[:, 0])
        total = total + (weights * (log_p - log_prior)[0]).sum() - beta * kl
    return pair.value_and_gradient(total)


CASES = {
    "ELBO": (objectives.ELBO(), elbo),
    "ELBO, 2 particles": (objectives.ELBO(2), elbo),
    "mean field": (objectives.MeanFieldELBO(), elbo),
    "sticking the landing": (objectives.StickingTheLanding(), elbo),
    "sticking the landing, 2": (objectives.StickingTheLanding(2), elbo),
    "one by one": (objectives.StickingTheLanding(2, vectorize_particles=False), elbo),
    "score function": (objectives.ScoreFunction(), elbo),
    "score function, others": (objectives.ScoreFunction(3, "others"), elbo),
    "score function, average": (objectives.ScoreFunction(1, "average"), elbo),
    "IWAE": (objectives.IWAE(2), iwae),
    "DReG": (objectives.DReG(2), iwae),
    "DReG, one by one": (objectives.DReG(2, vectorize_particles=False), iwae),
    "MIWAE": (objectives.MIWAE(3, 2), iwae),
    "PIWAE": (objectives.PIWAE(2, 2), piwae),
    "CIWAE": (objectives.CIWAE(0.3, 2), functools.partial(mixed, beta=0.3)),
    "Renyi, 0.5": (objectives.Renyi(0.5, 2), functools.partial(renyi, alpha=0.5)),
    "Renyi, -1": (objectives.Renyi(-1.0, 2), functools.partial(renyi, alpha=-1.0)),
    "CUBO": (objectives.CUBO(2, 2), cubo),
    "wake": (objectives.ReweightedWakeSleep(2), wake),
}
UNREPARAMETERIZED = {
    "ELBO": (objectives.ELBO(), elbo),
    "VIMCO": (objectives.VIMCO(2), iwae),
    "score function": (objectives.ScoreFunction(2, "others"), elbo),
    "wake": (objectives.ReweightedWakeSleep(2), wake),
}


def sampled(pair, objective, chunks=CHUNKS, rows=ROWS):
    """Return the bound summed over X and its gradient, per chunk of draws."""
    x = X.repeat_interleave(rows)
    found = []
    for _ in range(chunks):
        loss = objective.differentiable_loss(pair.model, pair.guide, x)
        found.append([each / rows for each in pair.value_and_gradient(-loss).values()])
        objective.advance()
    return torch.tensor(found, dtype=torch.float64)


def check(pair, objective, truth, chunks=CHUNKS):
    gradients = sampled(pair, objective, chunks)
    mean, error = gradients.mean(0), gradients.std(0) / chunks**0.5
    for name, m, e in zip(truth, mean, error, strict=True):
        assert abs(m - truth[name]) < 4.5 * e + 1e-9, f"{name}: {m} ± {e}, expected {truth[name]}"


@pytest.mark.parametrize("name", CASES)
def test_expected_gradient_with_one_latent(name):
    torch.manual_seed(1)
    objective, truth = CASES[name]
    pair = Pair()
    check(pair, objective, truth(pair))


@pytest.mark.parametrize(
    "name", ["ELBO", "sticking the landing", "score function", "IWAE", "DReG", "CUBO", "wake",
             "DReG, one by one"]
)  # fmt: skip
def test_expected_gradient_with_one_latent_given_another(name):
    torch.manual_seed(2)
    objective, truth = CASES[name]
    pair = Chain()
    check(pair, objective, truth(pair))


@pytest.mark.parametrize("make", [Pair, Chain])
@pytest.mark.parametrize("name", UNREPARAMETERIZED)
def test_expected_gradient_without_reparameterization(make, name):
    torch.manual_seed(3)
    objective, truth = UNREPARAMETERIZED[name]
    pair = make(reparameterized=False)
    check(pair, objective, truth(pair))


def test_expected_gradient_of_a_weighted_kl():
    torch.manual_seed(4)
    check(Pair(), objectives.BetaELBO(2.5), beta_elbo(Pair(), 2.5))


def test_tvo_gradient_approaches_that_of_the_riemann_sum():
    """The covariances use self-normalized weights, with a bias of order 1/K."""
    torch.manual_seed(5)
    pair, objective = Pair(), objectives.TVO(400, 4, 0.05)
    noise, weights = nodes(pair, 1)
    total = 0.0
    for x in X:
        log_p, log_q = (each[0] for each in log_densities(pair, noise, x))
        log_w = log_p - log_q
        for beta, after in itertools.pairwise(objective.points):
            tilted = weights * (beta * log_w).exp()
            total = total + (after - beta) * (tilted * log_w).sum() / tilted.sum()
    truth = pair.value_and_gradient(total)
    gradients = sampled(pair, objective, chunks=64, rows=20)
    for name, m, e in zip(truth, gradients.mean(0), gradients.std(0) / 8, strict=True):
        assert abs(m - truth[name]) < 4.5 * e + 2 / 400, f"{name}: {m} ± {e}, {truth[name]}"


def test_sleep_gradient_equals_that_of_the_joint():
    torch.manual_seed(6)
    pair = Pair()
    t, weight = np.polynomial.hermite_e.hermegauss(40)
    t, weight = torch.tensor(t), torch.tensor(weight) / np.sqrt(2 * np.pi)
    p_x = pair.p_x([t])
    x = (p_x.loc.unsqueeze(-1) + p_x.scale.unsqueeze(-1) * t).detach()
    log_q = pair.q_z(0, [], x).log_prob(t.unsqueeze(-1))
    total = len(X) * (weight.unsqueeze(-1) * weight * log_q).sum()
    truth = {**pair.value_and_gradient(total), **dict.fromkeys(pair.of_model)}
    gradients = sampled(pair, objectives.ReweightedWakeSleep(2, wake=0.0, sleep=1.0))
    error = gradients.std(0) / CHUNKS**0.5
    for name, m, e in zip(truth, gradients.mean(0), error, strict=True):
        if truth[name] is not None:
            assert abs(m - truth[name]) < 4.5 * e, f"{name}: {m} ± {e}, expected {truth[name]}"


def test_sleep_gradient_is_linear_in_its_weight():
    """Doubling the sleep weight doubles the gradient."""
    pair, found = Pair(), []
    for sleep in (1.0, 2.0):
        torch.manual_seed(7)
        objective = objectives.ReweightedWakeSleep(2, wake=0.0, sleep=sleep)
        loss = objective.differentiable_loss(pair.model, pair.guide, X)
        found.append(pair.value_and_gradient(loss)["slope"])
    assert found[1] == pytest.approx(2 * found[0], rel=1e-9)


@pytest.mark.parametrize(
    ("without", "with_baseline", "share"),
    [
        (objectives.ScoreFunction(4), objectives.ScoreFunction(4, "others"), 0.7),
        (objectives.ScoreFunction(4), objectives.ScoreFunction(4, "average"), 0.9),
    ],
)
def test_baselines_lower_the_variance(without, with_baseline, share):
    torch.manual_seed(8)
    pair = Pair()
    variances = [sampled(pair, each, 100, 20).var(0)[3:].sum() for each in (without, with_baseline)]
    assert variances[1] < share * variances[0]


@pytest.mark.parametrize("lowest", [-torch.inf, -1.5])
def test_vimco_matches_its_definition(lowest):
    """Compute the signal of each of three particles, also if z below ``lowest`` has p(z) = 0."""
    torch.manual_seed(9)
    pair = Pair(reparameterized=False)

    class Truncated(dist.Normal):
        def log_prob(self, value):
            return torch.where(value < lowest, -torch.inf, super().log_prob(value))

    pair.p_z = lambda number, z: Truncated(torch.zeros((), dtype=torch.float64), 1.0)
    t = pv.terms(pair.model, pair.guide, X.repeat(20), num_particles=3)
    zeros = {*t.log_weight.isinf().sum(0).tolist()}
    assert zeros == ({0, 1, 2} if lowest > -torch.inf else {0})
    bound = objectives.VIMCO(3).bound(t).sum()
    log_w, log_q = t.log_weight, t.log_guide
    total = log_mean(log_w).sum()
    for k in range(3):
        others = [j for j in range(3) if j != k]
        mean = log_w[others].detach().mean(0)
        replaced = torch.cat([log_w[others].detach(), mean.unsqueeze(0)])
        signal = log_mean(log_w).detach() - log_mean(replaced)
        signal = torch.where(replaced.isinf().all(0), 0.0, signal)
        total = total + (signal * (log_q[k] - log_q[k].detach())).sum()
    found = torch.autograd.grad(bound, [*pair.parameters()], retain_graph=True)
    expected = torch.autograd.grad(total, [*pair.parameters()])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(bound, total)


def test_vimco_does_not_depend_on_a_constant_if_weights_are_zero():
    gradients = []
    for offset in (0.0, 100.0):
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)

        def model(x, offset=offset):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(torch.ones(3)))
                pyro.factor("f", torch.where(z < 1, -torch.inf, offset))
                pyro.sample("x", dist.Normal(z.double(), 1.0), obs=x)

        def guide(x, logits=logits):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Categorical(logits=logits.expand(len(x), 3)))

        torch.manual_seed(2)
        x = torch.linspace(0, 2, 20).double()
        objectives.VIMCO(3).differentiable_loss(model, guide, x).backward()
        gradients.append(logits.grad)
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients)


def test_sleep_phase_refuses_a_factor():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("penalty", -z.abs())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())) * x, 1.0))

    objectives.ReweightedWakeSleep(5).loss(model, guide, torch.randn(6))
    with pytest.raises(ValueError, match="the model has the factor 'penalty'"):
        objectives.ReweightedWakeSleep(5, sleep=1.0).loss(model, guide, torch.randn(6))
