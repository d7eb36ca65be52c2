"""Baselines of score functions, against exact enumeration and Pyro's TraceGraph_ELBO.

Averages of gradients are compared at 4.5 standard errors: a false alarm in 10^5 comparisons.
"""

import functools
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import objectives as o


class Pair(nn.Module):
    """A binary latent, two more in an inner plate that depend on it, and x of five numbers.

    Args:
        options: returns the baseline options of a site, given the pair, x and the site's name.
    """

    def __init__(self, options=lambda pair, x, name: {}):
        super().__init__()
        self.options = options
        self.logit, self.follow = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(2, 1))
        self.loading = nn.Parameter(torch.randn(3, 5))
        self.first, self.second = nn.Linear(5, 1), nn.Linear(5, 2)
        self.carry = nn.Parameter(torch.randn(2, 1))
        self.base, self.bases = nn.Linear(5, 1), nn.Linear(5, 2)

    def p_a(self):
        return dist.Bernoulli(logits=self.logit)

    def p_b(self, a):
        return dist.Bernoulli(logits=self.follow * a)

    def p_x(self, a, b):
        z = torch.cat([a, b], -2)  # (..., 3, B)
        return dist.Normal((z.mT @ self.loading).unsqueeze(-3), 1.0).to_event(1)

    def q_a(self, x):
        return dist.Bernoulli(logits=self.first(x)[:, 0])

    def q_b(self, a, x):
        return dist.Bernoulli(logits=self.second(x).T + self.carry * a)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", self.p_a())
            with pyro.plate("inner", 2, dim=-2):
                b = pyro.sample("b", self.p_b(a))
            a = a.reshape(*a.shape[: max(0, a.dim() - 2)], 1, len(x))
            pyro.sample("x", self.p_x(a, b), obs=x.unsqueeze(0))

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            infer = [{"baseline": self.options(self, x, name)} for name in "ab"]
            a = pyro.sample("a", self.q_a(x), infer=infer[0])
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("b", self.q_b(a, x), infer=infer[1])

    def pair_parameters(self):
        return [p for n, p in self.named_parameters() if not n.startswith("base")]

    def baseline_parameters(self):
        return [*self.base.parameters(), *self.bases.parameters()]

    def log_terms(self, x):
        """Return log w and log q at the eight values of the latents, of shape (8, B)."""
        log_w, log_q = [], []
        for values in itertools.product([0.0, 1.0], repeat=3):
            a = torch.full((1, len(x)), values[0])
            b = torch.tensor(values[1:]).unsqueeze(-1).expand(2, len(x))
            q = self.q_a(x).log_prob(a[0]) + self.q_b(a, x).log_prob(b).sum(0)
            p = self.p_a().log_prob(a[0]) + self.p_b(a).log_prob(b).sum(0)
            log_w.append(p + self.p_x(a, b).log_prob(x)[0] - q)
            log_q.append(q)
        return torch.stack(log_w), torch.stack(log_q)


def network(pair, x, name):
    base = (lambda v: pair.base(v)[:, 0]) if name == "a" else (lambda v: pair.bases(v).T)
    return {"nn_baseline": base, "nn_baseline_input": x}


def average(pair, x, name):
    return {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}


def value(pair, x, name):
    return {"baseline_value": pair.base.bias}  # one number for all


def both(pair, x, name):
    return network(pair, x, name) | average(pair, x, name)


def one_site(pair, x, name):
    return network(pair, x, name) if name == "b" else {}


OPTIONS = {f.__name__: f for f in (network, average, value, both, one_site)}
OBJECTIVES = {
    "ELBO": o.ELBO,
    "ELBO of 3": functools.partial(o.ELBO, 3),
    "ELBO of 3, one by one": functools.partial(o.ELBO, 3, vectorize_particles=False),
    "score function": functools.partial(o.ScoreFunction, 2),
    "score function, others": functools.partial(o.ScoreFunction, 2, "others"),
}


def gradient(loss, parameters):
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def sampled(objective, pair, x, parameters, count):
    return torch.stack(
        [gradient(objective.differentiable_loss(pair.model, pair.guide, x), parameters)
         for _ in range(count)]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        *(("ELBO", options) for options in OPTIONS),
        ("ELBO of 3", "network"),
        ("ELBO of 3, one by one", "both"),
        ("score function", "both"),
        ("score function, others", "network"),
    ],
)
def test_expected_gradient_matches_enumeration(objective, options):
    """The baselines are far from optimal, and do not bias the gradient."""
    torch.manual_seed(0)
    pair, x = Pair(OPTIONS[options]), torch.randn(2, 5)
    log_w, log_q = pair.log_terms(x)
    exact = gradient(-(log_q.exp() * log_w).sum(), pair.pair_parameters())
    rows = x.repeat(200, 1)
    found = sampled(OBJECTIVES[objective](), pair, rows, pair.pair_parameters(), 25) / 200
    error = found.std(0) / 25**0.5
    t = (found.mean(0) - exact).abs() / (error + 1e-5)
    assert t.max() < 6.5  # as rare for 24 degrees of freedom as 4.5 standard errors for many


@pytest.mark.parametrize(
    ("objective", "options"),
    [("ELBO", "network"), ("ELBO", "average"), ("score function", "both")],
)
def test_trained_baseline_lowers_the_variance(objective, options):
    torch.manual_seed(1)
    made = [Pair(), Pair(OPTIONS[options])]
    made[1].load_state_dict(made[0].state_dict())
    x = torch.randn(40, 5) + 2.0
    variances = []
    for pair in made:
        it = OBJECTIVES[objective]()
        optimizer = torch.optim.Adam(pair.baseline_parameters(), lr=0.2)
        for _ in range(0 if pair is made[0] else 40):
            optimizer.zero_grad()
            it.differentiable_loss(pair.model, pair.guide, x).backward()
            optimizer.step()
        of_guide = [*pair.first.parameters(), *pair.second.parameters(), pair.carry]
        variances.append(sampled(it, pair, x, of_guide, 30).var(0).sum())
    assert variances[1] < 0.5 * variances[0]


@pytest.mark.parametrize("in_pyro", [True, False])
def test_baseline_network_learns_the_expected_log_weight(in_pyro):
    """Train it by pv.fit or by Pyro's SVI."""
    torch.manual_seed(0)
    pair = Pair(network)
    x = torch.eye(5)[torch.randint(2, (100,))]
    for p in pair.pair_parameters():
        p.requires_grad_(False)
    if in_pyro:
        optimizer = pyro.optim.Adam({"lr": 0.2})

        def guide(x):
            pyro.module("base", pair.base), pyro.module("bases", pair.bases)
            pair.guide(x)

        svi = pyro.infer.SVI(pair.model, guide, optimizer, loss=o.ELBO(4))
        for _ in range(100):
            svi.step(x)
    else:
        pv.fit(pair.model, pair.guide, x, objective=o.ELBO(4), epochs=50, batch_size=50,
               learning_rate=0.2, progress=False, capture=False, seed=0)  # fmt: skip
    log_w, log_q = pair.log_terms(x)
    expected = (log_q.exp() * log_w).sum(0)
    spread = ((log_q.exp() * (log_w - expected).square()).sum(0)).sqrt()
    for predicted in (pair.base(x)[:, 0], *pair.bases(x).T):
        assert ((predicted - expected).abs() < 0.5 * spread).all()


class Single(nn.Module):
    """One binary latent: Pyro's estimator and ours are then the same."""

    def __init__(self, options):
        super().__init__()
        self.options = options
        self.first, self.base, self.loading = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(1, 3)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(self.loading(z.unsqueeze(-1)), 1.0).to_event(1), obs=x)

    def guide(self, x, shape):
        with pyro.plate("data", len(x)):
            q = dist.Bernoulli(logits=self.first(x)[:, 0])
            pyro.sample("z", q, infer={"baseline": self.options(self, x, shape)})


def of_shape(pair, x, shape):
    def base(v):  # the shape that Pyro expects
        return pair.base(v)[:, 0].expand(shape) if shape else pair.base(v).squeeze()

    return {"nn_baseline": base, "nn_baseline_input": 2 * x}


def as_value(pair, x, shape):
    return {"baseline_value": pair.base(x)[:, 0].expand(shape)}


def decaying(pair, x, shape):
    return {"use_decaying_avg_baseline": True, "baseline_beta": 0.7}


def decaying_by_default(pair, x, shape):
    return of_shape(pair, x, shape) | {"use_decaying_avg_baseline": True}


@pytest.mark.parametrize(
    ("options", "particles", "vectorize"),
    [
        *itertools.product([of_shape, as_value], [1], [True]),
        *itertools.product([of_shape, as_value], [4], [True, False]),
        *itertools.product([decaying, decaying_by_default], [1], [True]),
    ],
)
def test_gradients_match_pyro(options, particles, vectorize):
    """Averages are tested with one data point, because Pyro keeps an average for each row."""
    torch.manual_seed(0)
    pair = Single(options)
    averages = options in (decaying, decaying_by_default)
    x = torch.randn(1 if averages else 6, 3)
    shape = () if averages else (len(x),)
    if vectorize and particles > 1:
        shape = (particles, *shape)
    guide = functools.partial(pair.guide, shape=shape)
    keywords = {"num_particles": particles, "vectorize_particles": vectorize}
    found = []
    for objective in (o.ELBO(**keywords), TraceGraph_ELBO(max_plate_nesting=1, **keywords)):
        pyro.clear_param_store()
        if isinstance(objective, o.ELBO) and vectorize and particles > 1:
            objective.loss(pair.model, guide, x)  # the first call looks for the plates
        torch.manual_seed(1)
        for _ in range(3):
            pair.zero_grad()
            objective.loss_and_grads(pair.model, guide, x)
            gradients = [p.grad.flatten() for p in pair.parameters() if p.grad is not None]
            found.append(torch.cat(gradients))
    assert len(found[0]) == sum(p.numel() for p in pair.parameters()) - 4 * (options is decaying)
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_averages_are_updated_only_with_gradients():
    torch.manual_seed(0)
    pair, x = Pair(average), torch.randn(6, 5)
    objective = o.ELBO(2)
    objective.loss(pair.model, pair.guide, x)
    assert {name: v.item() for name, v in objective.averages.items()} == {"a": 0.0, "b": 0.0}
    losses = [objective.loss_and_grads(pair.model, pair.guide, x).item() / 6 for _ in range(3)]
    expected = 0.0
    for loss in losses:
        expected = 0.8 * expected - 0.2 * loss
    for v in objective.averages.values():
        assert v.item() == pytest.approx(expected, rel=1e-5)
    before = objective.averages["a"].item()
    objective.loss(pair.model, pair.guide, x)
    with torch.no_grad():
        objective.differentiable_loss(pair.model, pair.guide, x)
    assert objective.averages["a"].item() == before


def fitted(capture=False, epochs=4, **options):
    torch.manual_seed(1)
    pair, objective = Pair(both), o.ELBO(2)
    x = torch.randn(60, 5)
    options |= {"objective": objective, "epochs": epochs, "batch_size": 20, "capture": capture}
    fit = pv.fit(pair.model, pair.guide, x, validation=x[:20], learning_rate=0.01, seed=2,
                 progress=False, **options)  # fmt: skip
    numbers = [p.detach().flatten() for p in pair.parameters()]
    return fit, torch.cat([*numbers, *(v.flatten().float() for v in objective.averages.values())])


def test_captured_fit_matches_eager(without_compiler):
    (captured, numbers), (_, eager) = fitted(capture=True), fitted()
    assert captured.execution == "captured, not compiled"
    torch.testing.assert_close(numbers, eager)


def test_checkpoint_restores_averages(tmp_path):
    fitted(epochs=2, checkpoint=tmp_path)
    _, resumed = fitted(epochs=4, checkpoint=pv.training.Checkpoint(tmp_path, resume=True))
    _, whole = fitted(epochs=4)
    assert torch.equal(resumed, whole)


REFUSING = [
    o.MeanFieldELBO(), o.IWAE(2), o.MIWAE(2, 2), o.CIWAE(0.5, 2), o.Renyi(0.5, 2), o.VIMCO(2),
    o.StickingTheLanding(), o.DReG(2), o.PIWAE(2, 2), o.CUBO(), o.TVO(2), o.BetaELBO(),
    o.ReweightedWakeSleep(2), o.FreeBits(), o.CapacityELBO(1.0), o.InfoVAE(),
]  # fmt: skip


@pytest.mark.parametrize("objective", REFUSING, ids=str)
def test_other_objectives_refuse_baselines(objective):
    pair, x = Pair(network), torch.randn(4, 5)
    name = type(objective).__name__
    with pytest.raises(ValueError, match=f"{name} takes no score function at guide site 'a'"):
        objective.loss(pair.model, pair.guide, x)
    with pytest.raises(ValueError, match="would be ignored"):
        pv.fit(pair.model, pair.guide, x, objective=objective, epochs=1, batch_size=2,
               progress=False)  # fmt: skip
    assert pv.terms(pair.model, pair.guide, x).log_weight.shape == (1, 4)  # terms ignore it


def test_elbo_refuses_a_baseline_at_a_reparameterized_site():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            q = dist.Normal(x / 2, 1.0)
            pyro.sample("z", q, infer={"baseline": {"baseline_value": torch.zeros(len(x))}})

    x = torch.randn(5)
    with pytest.raises(ValueError, match="ELBO takes no score function at guide site 'z'"):
        o.ELBO().loss(model, guide, x)
    o.ScoreFunction().loss(model, guide, x)


BAD = {
    "unknown": ({"nn_baselin": print}, ValueError, "unknown option 'nn_baselin'"),
    "not a dictionary": ("average", TypeError, "must be a dictionary"),
    "two": (
        {"nn_baseline": print, "nn_baseline_input": 1, "baseline_value": torch.zeros(4)},
        ValueError, "both nn_baseline and baseline_value"),
    "no input": ({"nn_baseline": print}, ValueError, "one of nn_baseline and nn_baseline_input"),
    "no network": (
        {"nn_baseline_input": torch.zeros(4)}, ValueError, "one of nn_baseline and nn_base"),
    "not called": (
        {"nn_baseline": 3, "nn_baseline_input": torch.zeros(4)}, TypeError, "cannot be called"),
    "no average": ({"baseline_beta": 0.5}, ValueError, "no average"),
    "decay": (
        {"use_decaying_avg_baseline": True, "baseline_beta": 1.5}, ValueError, r"in \[0, 1\)"),
    "a column": ({"baseline_value": torch.zeros(4, 1)}, ValueError, r"Got \(4, 1\)"),
    "another size": ({"baseline_value": torch.zeros(3)}, ValueError, r"\(4,\).*Got \(3,\)"),
    "more dimensions": ({"baseline_value": torch.zeros(2, 1, 4)}, ValueError, r"Got \(2, 1, 4\)"),
    "a number": ({"baseline_value": 1.0}, TypeError, "must be a tensor, got float"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_invalid_options_are_refused_by_name(case):
    options, kind, message = BAD[case]
    pair = Pair(lambda pair, x, name: options if name == "a" else {})
    with pytest.raises(kind, match=f"'a'.*{message}"):
        o.ELBO().loss(pair.model, pair.guide, torch.randn(4, 5))


def test_column_baseline_is_refused():
    """With as many particles as data points, (B, 1) would fit in the wrong dimension."""
    pair = Pair(lambda pair, x, name: {"baseline_value": torch.zeros(4, 1)} if name == "a" else {})
    with pytest.raises(ValueError, match=r"Got \(4, 1\)"):
        o.ELBO(4).loss(pair.model, pair.guide, torch.randn(4, 5))


def test_empty_options_are_accepted():
    """Every objective accepts them, as Pyro does."""
    for options in ({}, {"use_decaying_avg_baseline": False, "baseline_beta": 0.9}):
        pair = Pair(lambda pair, x, name, options=options: options)
        o.VIMCO(3).loss(pair.model, pair.guide, torch.randn(4, 5))
        o.ELBO().loss(pair.model, pair.guide, torch.randn(4, 5))
