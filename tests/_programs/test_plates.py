"""All forms of the plate "data", with all guides: the model keeps its own rows."""

import functools
import itertools
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_table import DENSITIES
from pyro import poutine

import pyro_vae as pv
from pyro_vae import guides
from pyro_vae.guides import _families as families

N = 12
ROWS = torch.tensor([7, 2, 11, 0, 4])
OFFSET = torch.linspace(-20.0, 20.0, N)
WEIGHT = torch.tensor([[0.5, -1.0, 0.3], [0.2, 0.7, -0.4]])


def data(rows=ROWS):
    return OFFSET[rows, None] + torch.randn(len(rows), 3), rows


class Encoder(torch.nn.Module):
    """Features of the difference between a row and its offset."""

    def __init__(self):
        super().__init__()
        self.network = pv.nets.MLP(3, [6])

    def forward(self, x, rows):
        return self.network(x - OFFSET[rows, None])


def _sites(x, offset):
    prior = dist.Normal(0.1 * offset.unsqueeze(-1), torch.tensor([1.0, 2.0]))
    z = pyro.sample("z", prior.to_event(1))
    loc = z @ WEIGHT + offset.unsqueeze(-1)
    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def size(x, rows):
    with pyro.plate("data", len(x)):
        _sites(x, OFFSET[rows])


def dim(x, rows):
    with pyro.plate("data", len(x), dim=-1):
        _sites(x, OFFSET[rows])


def number(x, rows):
    with pyro.plate("data", 5):
        _sites(x, OFFSET[rows])


def subsample_of_data(x, rows):
    with pyro.plate("data", N, subsample=x):
        _sites(x, OFFSET[rows])


def subsample_of_rows(x, rows):
    with pyro.plate("data", N, subsample=rows) as own:
        _sites(x, OFFSET[own])


def subsample_and_dim(x, rows):
    with pyro.plate("data", N, subsample=rows, dim=-1) as own:
        _sites(x, OFFSET[own])


def subsample_size(x, rows):
    with pyro.plate("data", N, subsample_size=len(x)):
        _sites(x, OFFSET[rows])


def parameter_of_rows(x, rows):
    with pyro.plate("data", N, subsample=rows):
        _sites(x, pyro.param("offset", OFFSET.clone(), event_dim=0))


def subsample_statement(x, rows):
    with pyro.plate("data", N, subsample=rows):
        _sites(x, pyro.subsample(OFFSET, event_dim=0))


def entered_twice(x, rows):
    plate = pyro.plate("data", N, subsample=rows)
    with plate as own:
        z = pyro.sample("z", dist.Normal(0.1 * OFFSET[own, None], _scale()).to_event(1))
    with plate as own:
        loc = z @ WEIGHT + OFFSET[own, None]
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def left_of_a_plate(x, rows):
    with pyro.plate("data", N, subsample=rows, dim=-2) as own:
        offset = OFFSET[own].unsqueeze(-1)
        z = pyro.sample("z", dist.Normal(0.1 * offset.unsqueeze(-1), _scale()).to_event(1))
        loc = (z @ WEIGHT).squeeze(-2) + offset
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def _scale():
    return torch.tensor([1.0, 2.0])


SIZED = (size, dim, number)
FORMS = {
    form.__name__: form
    for form in (
        *SIZED,
        subsample_of_data,
        subsample_of_rows,
        subsample_and_dim,
        subsample_size,
        parameter_of_rows,
        subsample_statement,
        entered_twice,
        left_of_a_plate,
    )
}
GUIDES = {
    **DENSITIES,
    "delta": guides.AmortizedDelta,
    "per site": functools.partial(
        guides.AmortizedGuide, family=families.MultivariateNormal, joint=False
    ),
    "top-down": functools.partial(guides.HierarchicalGuide, order="top-down"),
    "semi-amortized": lambda model, encoder: guides.SemiAmortized(
        guides.AmortizedNormal(model, encoder), steps=2
    ),
}


def log_joint(x, rows, z):
    """Return log p(x|z) and log p(z) of z of shape (K, B, 2)."""
    offset = OFFSET[rows, None]
    likelihood = dist.Normal(z @ WEIGHT + offset, 1.0).log_prob(x).sum(-1)
    return likelihood, dist.Normal(0.1 * offset, _scale()).log_prob(z).sum(-1)


def check(model, guide, x, rows, num_particles):
    t = pv.terms(model, guide, x, rows, num_particles=num_particles)
    z = t.samples["z"].reshape(num_particles, len(x), 2)
    likelihood, prior = log_joint(x, rows, z)
    torch.testing.assert_close(t.log_likelihood, likelihood, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.log_prior, prior, rtol=1e-4, atol=1e-4)
    return t


def combinations(forms, guides, of_every_guide, of_every_form):
    """Return all pairs. By default, run some forms of every guide and some guides of each form."""
    found = []
    for form, name in itertools.product(forms, guides):
        default = form in of_every_guide or name in of_every_form
        found.append(pytest.param(form, name, marks=() if default else pytest.mark.slow))
    return found


@pytest.mark.parametrize(
    ("form", "name"),
    combinations(FORMS, GUIDES, ("size", "subsample_of_rows"), ("normal", "planar", "top-down")),
)
def test_model_keeps_its_own_rows(form, name):
    model = FORMS[form]
    x, rows = data()
    guide = GUIDES[name](model, Encoder())
    for num_particles in (1, 5):
        t = check(model, guide, x, rows, num_particles)
        assert t.scale == (1.0 if model in SIZED else N / 5)
        torch.manual_seed(1)
        expected = pv.terms(model, guide, x, rows, num_particles=num_particles).log_weight
        torch.manual_seed(1)
        loss = pv.objectives.ELBO(num_particles).loss(model, guide, x, rows)
        assert loss == pytest.approx(-t.scale * expected.mean(0).sum().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("form", "name"),
    combinations(
        [form for form in FORMS if form != "number"],
        ["normal", "multivariate normal", "planar", "mixture"],
        ("size", "subsample_of_rows"),
        ("normal",),
    ),
)
def test_guides_score_minibatches_of_any_size(form, name):
    model = FORMS[form]
    guide = GUIDES[name](model, Encoder())
    for rows in (ROWS, ROWS[:1], ROWS[:3], torch.randperm(N)[:11]):
        check(model, guide, *data(rows), 2)


@pytest.mark.parametrize("form", FORMS)
def test_model_keeps_its_rows_with_local_and_user_guides(form):
    model = FORMS[form]
    x, rows = data()

    def user_guide(x, rows):
        with ExitStack() as stack:
            if model in SIZED:
                stack.enter_context(pyro.plate("data", len(x), dim=-1))
            elif model is left_of_a_plate:
                stack.enter_context(pyro.plate("data", N, subsample=rows, dim=-2))
            else:
                stack.enter_context(pyro.plate("data", N, subsample=rows, dim=-1))
            loc = 0.1 * OFFSET[rows, None]
            loc = loc.unsqueeze(-2) if model is left_of_a_plate else loc
            pyro.sample("z", dist.Normal(loc, _scale()).to_event(1))

    for guide in (guides.LocalGuide(model, x, rows), user_guide):
        for num_particles in (1, 5):
            check(model, guide, x, rows, num_particles)


@pytest.mark.parametrize("form", FORMS)
def test_evidence_and_surgery_use_the_rows_of_the_model(form):
    model = FORMS[form]
    rows = torch.randperm(N)[:10]
    x, rows = data(rows) if model is not number else data()
    guide = GUIDES["normal"](model, Encoder())
    found = pv.evidence(model, guide, (x, rows), num_particles=4000, batch_size=5, seed=0)
    covariance = WEIGHT.T @ torch.diag(_scale() ** 2) @ WEIGHT + torch.eye(3)
    mean = 0.1 * OFFSET[rows, None].expand(-1, 2) @ WEIGHT + OFFSET[rows, None]
    exact = dist.MultivariateNormal(mean, covariance).log_prob(x)
    error = torch.as_tensor(found.monte_carlo_errors).clamp(min=0.02)
    assert ((torch.as_tensor(found.values) - exact).abs() < 5 * error).all()
    surgery = pv.elbo_surgery(model, guide, (x, rows), num_particles=50, batch_size=5, seed=0)
    with torch.no_grad():
        log_weight = pv.terms(model, guide, x, rows, num_particles=4000).log_weight
    error = (log_weight.var(0).sum() * (1 / 50 + 1 / 4000)).sqrt() / len(x)
    assert abs(surgery.elbo - log_weight.mean()) < 5 * error


def test_two_guides_in_one_program_score_their_own_latents():
    def model(x):
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Beta(2.0, 2.0))
            loc = torch.stack([a, b], -1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    first = guides.AmortizedNormal(poutine.block(model, hide=["b"]), pv.nets.MLP(2, [4]))
    second = guides.AmortizedMixture(poutine.block(model, hide=["a"]), pv.nets.MLP(2, [4]))

    def guide(x):
        first(x)
        second(x)

    def inside(x):
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            first(x)
            second(x)

    x = torch.randn(8, 2)
    for program in (guide, inside):
        t = pv.terms(model, program, x, num_particles=3)
        assert set(t.samples) == {"a", "b"}
        expected = dist.Beta(2.0, 2.0).log_prob(t.samples["b"])
        expected = expected + dist.Normal(0.0, 1.0).log_prob(t.samples["a"])
        torch.testing.assert_close(t.log_prior, expected)
    fit = pv.fit(model, guide, x, epochs=2, batch_size=8, progress=False)
    assert fit.history.loss.notna().all()


@pytest.mark.parametrize(
    "name", ["normal", "multivariate normal", "hierarchical", "semi-amortized"]
)
def test_guide_can_be_first_called_inside_a_plate(name):
    x, rows = data()
    model = subsample_of_rows
    inner = GUIDES[name](model, Encoder())

    def guide(x, rows):
        with pyro.plate("data", N, subsample=rows):
            inner(x, rows)

    for num_particles in (1, 5):
        check(model, guide, x, rows, num_particles)


def test_plate_opened_twice_must_have_the_same_rows():
    def model(x, rows):
        with pyro.plate("data", N, subsample=rows):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x[:, 0])

    def guide_of(order):
        def guide(x, rows):
            with pyro.plate("data", N, subsample=rows):
                pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("data", N, subsample=order(rows)):
                pyro.sample("b", dist.Normal(0.0, 1.0))

        return guide

    pv.terms(model, guide_of(lambda rows: rows.clone()), *data())
    with pytest.raises(ValueError, match="opens the plate 'data' twice"):
        pv.terms(model, guide_of(lambda rows: rows.flip(0)), *data())
