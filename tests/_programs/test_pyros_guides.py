"""Pyro's own guides: the losses match Pyro's, and parameters must belong to rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, autoguide

import pyro_vae as pv
from pyro_vae import objectives

N = 12


def one_local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Beta(2.0, 3.0))
        pyro.sample("x", dist.Normal(z.sum(-1) + w, 1.0), obs=x)


def global_and_local(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_a_factor(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("energy", -0.5 * (x - z) ** 2)


def simplex(x):
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(p[..., 0], 1.0), obs=x)


MODELS = {f.__name__: f for f in (one_local, two_local, global_and_local, with_a_factor, simplex)}
GUIDES = (
    "AutoNormal",
    "AutoDelta",
    "AutoDiagonalNormal",
    "AutoMultivariateNormal",
    "AutoLowRankMultivariateNormal",
    "AutoIAFNormal",
    "AutoStructured",
    "AutoLaplaceApproximation",
    "AutoNormalMessenger",
    "AutoHierarchicalNormalMessenger",
)


def make(name, model, x):
    guide = getattr(autoguide, name)(model)
    guide(x)
    return guide


# Pyro's AutoIAFNormal supports one particle at a time.
CASES = [(n, k) for n in GUIDES for k in (1, 3) if (n, k) != ("AutoIAFNormal", 3)]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("name", "num_particles"), CASES)
def test_loss_matches_pyro(name, num_particles, model):
    x = torch.randn(N)
    guide = make(name, model, x)
    options = {"num_particles": num_particles, "vectorize_particles": True}
    torch.manual_seed(1)
    expected = Trace_ELBO(**options, max_plate_nesting=1).loss(model, guide, x)
    torch.manual_seed(1)
    assert objectives.ELBO(**options).loss(model, guide, x) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", GUIDES)
def test_autoguide_parameters_per_position_are_refused(name):
    x = torch.randn(N)
    guide = getattr(autoguide, name)(two_local)
    with pytest.raises(ValueError, match=r"separate numbers for each position.*create_plates"):
        pv.fit(two_local, guide, x, epochs=1, batch_size=4, progress=False)


def test_parameters_per_position_are_refused():
    x = torch.randn(N)

    def of_guide(x):
        loc = pyro.param("loc", torch.zeros(len(x), 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("w", dist.Beta(2.0, 2.0))

    def of_model(x):
        offset = pyro.param("offset", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(offset, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    amortized = pv.guides.AmortizedNormal(of_model, torch.nn.Unflatten(0, (-1, 1)))
    cases = (two_local, of_guide, "loc"), (of_model, amortized, "offset")
    loader = torch.utils.data.DataLoader(x, batch_size=4)
    for model, guide, name in cases:
        for data in (x, loader):
            with pytest.raises(ValueError, match=f"'{name}'.*each position in a minibatch of 4"):
                pv.fit(model, guide, data, epochs=1, batch_size=4, progress=False)
    with pytest.raises(ValueError, match=r"'offset'.*each position"):
        pv.evidence(of_model, amortized, x, num_particles=5, batch_size=4)


def test_parameters_of_all_data_indexed_by_position_are_refused():
    x = torch.randn(40)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(40))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[: len(x)], 0.95))

    for batch_size in (10, 12, 30):
        with pytest.raises(ValueError, match=r"'loc'.*each position"):
            pv.fit(model, guide, x, epochs=1, batch_size=batch_size, progress=False)
    pv.fit(model, guide, x, epochs=2, batch_size=40, progress=False)
    with pytest.raises(ValueError, match=r"'loc'.*each position"):
        pv.evidence(model, guide, x, num_particles=5, batch_size=12)


def test_parameters_per_row_and_layers_of_batch_size_are_accepted():
    """Parameters indexed by row and layers of B units do not belong to positions."""
    x, rows = torch.randn(N), torch.arange(N)

    def model(x, rows):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def looked_up(x, rows):
        loc = pyro.param("loc", torch.zeros(N))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[rows], 1.0))

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = pv.nets.MLP(1, [4, 8], 4)

        def forward(self, x, rows):
            return self.network(x[:, None])

    local = pv.guides.LocalGuide(model, x, rows)
    for guide in (looked_up, pv.guides.AmortizedNormal(model, Encoder()), local):
        pv.fit(model, guide, (x, rows), epochs=1, batch_size=4, progress=False)


def posterior_means(model, guide, data, name="z"):
    with pv.parameter_store(model, guide), torch.no_grad():
        draws = [pv.terms(model, guide, *data).samples[name][0] for _ in range(60)]
    return torch.stack(draws).mean(0)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDiagonalNormal", "AutoNormalMessenger"])
def test_autoguide_on_all_data_finds_the_posterior_of_each_row(name):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = 10 * torch.randn(N)
    guide = getattr(autoguide, name)(model)
    options = {"epochs": 100, "learning_rate": 0.5, "seed": 0, "progress": False}
    pv.fit(model, guide, x, batch_size=N, **options)
    found = posterior_means(model, guide, (x,))
    torch.testing.assert_close(found, x * 100 / 101, atol=1.5, rtol=0.0)


def test_autoguide_on_minibatches_needs_create_plates():
    x, rows = 10 * torch.randn(N), torch.arange(N)

    def model(x, rows):
        with pyro.plate("data", N, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def plates(x, rows):
        return pyro.plate("data", N, subsample=rows)

    options = {"epochs": 50, "learning_rate": 0.4, "seed": 0, "progress": False}
    for objective in (objectives.ELBO(), objectives.IWAE(2), Trace_ELBO()):
        if not isinstance(objective, Trace_ELBO):  # Pyro's objective accepts it silently
            with pytest.raises(ValueError, match=r"draws rows at random.*create_plates"):
                objective.loss(model, autoguide.AutoNormal(model), x[:4], rows[:4])
        guide = autoguide.AutoNormal(model, create_plates=plates)
        pv.fit(model, guide, (x, rows), objective=objective, batch_size=4, **options)
        torch.testing.assert_close(guide.locs.z, x * 100 / 101, atol=1.5, rtol=0.0)
    exact = dist.Normal(0.0, 101**0.5).log_prob(x)
    found = pv.evidence(model, guide, (x, rows), num_particles=4000, batch_size=4, seed=0)
    torch.testing.assert_close(torch.as_tensor(found.values).float(), exact, atol=0.2, rtol=0.0)


def test_rows_that_differ_between_model_and_guide_are_refused():
    x, rows = torch.randn(4), torch.tensor([3, 0, 7, 1])

    def program(rows, sample):
        def run(x):
            with pyro.plate("data", N, subsample=rows):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if sample:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return run

    model = program(rows, True)
    pv.terms(model, program(rows.clone(), False), x)
    with pytest.raises(ValueError, match=r"\[3, 0, 7, 1\] in the model and \[0, 1, 2, 3\]"):
        pv.terms(model, program(torch.arange(4), False), x)


def test_messenger_guide_combines_with_another():
    """A messenger runs the model, but the model's factor is not part of the guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.factor("energy", -0.5 * (x - z - w) ** 2)

    x = torch.randn(N)
    messenger = autoguide.AutoNormalMessenger(
        poutine.block(model, hide=["w"]), amortized_plates=("data",), init_scale=1.0
    )

    def guide(x):
        messenger(x)
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(0.3 * x, 1.0))

    t = pv.terms(model, guide, x, num_particles=3)
    z, w = t.samples["z"], t.samples["w"]
    torch.testing.assert_close(t.log_likelihood, -0.5 * (x - z - w) ** 2)
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(0.0, 1.0).log_prob(w)
    torch.testing.assert_close(t.log_prior, expected)
    assert t.loss_of_guide() == 0.0
    found = pv.evidence(model, guide, x, num_particles=4000, seed=0)
    exact = dist.Normal(0.0, 3**0.5).log_prob(x) + 0.5 * torch.tensor(2 * torch.pi).log()
    errors = torch.as_tensor(found.monte_carlo_errors)
    assert ((torch.as_tensor(found.values) - exact).abs() < 5 * errors).all()


def test_auxiliary_site_larger_than_the_latents_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            fn = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            a = pyro.sample("a", fn, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(a.sum(-1).exp()))

    with pytest.raises(ValueError, match="auxiliary site 'a'"):
        pv.terms(one_local, guide, torch.randn(N))
