"""Values and gradients of the objectives if some samples have a weight of zero."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import objectives as o
from pyro_vae.objectives._base import terms_of_losses

K, SEEDS = 6, range(6)


def log_mean(log_weight):
    return log_weight.exp().mean(0).log()


OBJECTIVES = {
    "ELBO": (lambda: o.ELBO(K), lambda w: w.mean(0)),
    "ELBO of discrete samples": (lambda: o.ELBO(K), lambda w: w.mean(0)),
    "StickingTheLanding": (lambda: o.StickingTheLanding(K), lambda w: w.mean(0)),
    "ScoreFunction": (lambda: o.ScoreFunction(K), lambda w: w.mean(0)),
    "ScoreFunction, others": (lambda: o.ScoreFunction(K, "others"), lambda w: w.mean(0)),
    "ScoreFunction, average": (lambda: o.ScoreFunction(K, "average"), lambda w: w.mean(0)),
    "IWAE": (lambda: o.IWAE(K), log_mean),
    "CIWAE, beta 0": (lambda: o.CIWAE(0.0, K), log_mean),
    "CIWAE, beta 1": (lambda: o.CIWAE(1.0, K), lambda w: w.mean(0)),
    "CIWAE": (lambda: o.CIWAE(0.3, K), lambda w: 0.3 * w.mean(0) + 0.7 * log_mean(w)),
    "MIWAE": (lambda: o.MIWAE(2, K // 2), lambda w: (log_mean(w[:3]) + log_mean(w[3:])) / 2),
    "PIWAE": (lambda: o.PIWAE(2, K // 2), log_mean),
    "DReG": (lambda: o.DReG(K), log_mean),
    "VIMCO": (lambda: o.VIMCO(K), log_mean),
    "VIMCO of discrete samples": (lambda: o.VIMCO(K), log_mean),
    "RWS": (lambda: o.ReweightedWakeSleep(K), log_mean),
    "CUBO": (lambda: o.CUBO(2.0, K), lambda w: -log_mean(2 * w) / 2),
    "Renyi 0.5": (lambda: o.Renyi(0.5, K), lambda w: 2 * log_mean(0.5 * w)),
    "Renyi 2": (lambda: o.Renyi(2.0, K), lambda w: -log_mean(-w)),
    "TVO": (lambda: o.TVO(K), None),
}


def pair(discrete, bound):
    """Every weight is zero where z is below ``bound``."""
    loc = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    shift = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    one = torch.ones((), dtype=torch.float64)

    def p_z():
        return dist.Poisson(one) if discrete else dist.Normal(0 * one, one)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p_z())
            pyro.factor("bound", torch.where(z < bound, -torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z + shift, one), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            rate = loc.exp() + 0 * x
            q = dist.Poisson(rate) if discrete else dist.Normal(loc + 0 * x, one)
            pyro.sample("z", q)

    return model, guide, [loc, shift]


@pytest.mark.parametrize("bound", [0.9, 1e9])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_finite_or_infinite_as_their_equations_say(name, bound):
    make, equation = OBJECTIVES[name]
    discrete = "discrete" in name or "Score" in name
    model, guide, parameters = pair(discrete, bound)
    x = torch.tensor([0.3, 1.2], dtype=torch.float64)
    kinds = set()
    for seed in SEEDS:
        torch.manual_seed(seed)
        objective = make()
        with terms_of_losses() as found:
            loss = objective.differentiable_loss(model, guide, x)
        log_weight = found[0].log_weight.detach()
        if equation is None:  # the first term of TVO is the ELBO
            expected = None if log_weight.isfinite().all() else math.inf
        else:
            expected = -equation(log_weight).sum().item()
        if expected is not None:
            assert loss.item() == pytest.approx(expected)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if loss.isfinite():
            assert all(g is None or g.isfinite() for g in gradients)
        some, every = log_weight.isinf().any().item(), log_weight.isinf().all(0).any().item()
        kinds.add("all of a row" if every else "some" if some else "none")
    assert kinds == {"all of a row"} if bound > 1 else "some" in kinds


def test_average_of_a_score_function_is_not_changed_by_infinite_bounds():
    model, guide, _ = pair(discrete=True, bound=0.9)
    objective = o.ScoreFunction(K, "average")
    x = torch.zeros(50, dtype=torch.float64)
    assert objective.differentiable_loss(model, guide, x) == torch.inf
    assert objective.average == 0.0


def test_a_kl_that_is_infinite_has_no_effect_at_a_weight_of_zero():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x, 1.0))

    x = torch.zeros(50)
    torch.manual_seed(0)
    loss = o.BetaELBO(0.0).loss(model, guide, x)
    torch.manual_seed(0)
    z = dist.Normal(torch.zeros(50), 1.0).sample()
    assert loss == pytest.approx(-dist.Normal(z, 1.0).log_prob(x).sum().item(), rel=1e-5)
    assert o.BetaELBO(0.1).loss(model, guide, x) == math.inf


@pytest.mark.parametrize(
    "make",
    [o.IWAE, o.DReG, o.CUBO, o.ReweightedWakeSleep, lambda k: o.PIWAE(k, 2)],
    ids=["IWAE", "DReG", "CUBO", "RWS", "PIWAE"],
)
@pytest.mark.parametrize("by_component", [False, True])
def test_gradients_are_finite_if_a_factor_depends_on_enumerated_values(make, by_component):
    shift, loc = (torch.nn.Parameter(torch.tensor(value)) for value in (0.5, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            infer = {"enumerate": "parallel"}
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)), infer=infer)
            z = pyro.sample("z", dist.Normal(c * shift, 1.0))
            excluded = (z < 0) & (c >= 0) if not by_component else (z < c - 0.5)
            pyro.factor("positive", torch.where(excluded, -torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + 0 * x, 1.0))

    torch.manual_seed(0)
    x = torch.arange(4.0).repeat(3)
    with terms_of_losses() as found:
        loss = make(16).differentiable_loss(model, guide, x)
    assert found[0].log_weight.isinf().any()
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, [shift, loc], allow_unused=True)
    assert all(g is None or g.isfinite() for g in gradients)
