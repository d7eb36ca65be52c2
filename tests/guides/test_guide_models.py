"""Guides of every family for models that were not written for them."""

import contextlib
import copy
import functools
import itertools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_table import DENSITIES
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae import guides
from pyro_vae.evaluation._scoring import guide_log_prob
from pyro_vae.guides import _families as families


def two_supports(x):
    """A rate and a composition."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        mean = rate.unsqueeze(-1) * weights.cumsum(-1)
        pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


def nested_plate(x):
    """A latent for the data point, and one for each of its three parts."""
    with pyro.plate("data", len(x), dim=-2):
        level = pyro.sample("level", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("parts", 3, dim=-1):
            part = pyro.sample("part", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Normal(level + part, 0.5), obs=x)


def plate_outside(x):
    """The plate of the parts is to the left of the data plate."""
    with pyro.plate("data", len(x), dim=-1):
        level = pyro.sample("level", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("parts", 3, dim=-2):
            part = pyro.sample("part", dist.Normal(level.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(part, 0.5), obs=x.T)


def sequence(x):
    """A Markov chain of latents, one for each of three observations (Krishnan et al. 2017)."""
    weight = torch.tensor([[0.8, -0.4], [0.4, 0.8]])
    z = torch.zeros(2)
    with pyro.plate("data", len(x)):
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Normal(torch.tanh(z @ weight), 1.0).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z.sum(-1), 0.5), obs=x[:, t])


MODELS = {f.__name__: f for f in (two_supports, nested_plate, plate_outside, sequence)}
NAMES = [*DENSITIES, "normal, per site", "multivariate normal, per site", "top-down"]


def make(name, model):
    encoder = pv.nets.MLP(3, [8])
    if name == "top-down":
        return guides.HierarchicalGuide(model, encoder, order="top-down", history=1)
    if name.endswith(", per site"):
        family = getattr(families, name.split(",")[0].title().replace(" ", ""))
        return guides.AmortizedGuide(model, encoder, family, joint=False)
    return DENSITIES[name](model, encoder)


def families_and_models():
    """Yield all combinations. By default, run each family with two models, and some with all."""
    some = ("normal", "mixture", "planar", "hierarchical", "normal, per site", "top-down")
    for model, name in itertools.product(MODELS.values(), NAMES):
        default = name in some or model in (two_supports, plate_outside)
        marks = () if default else pytest.mark.slow
        yield pytest.param(name, model, id=f"{name}-{model.__name__}", marks=marks)


@pytest.mark.parametrize(("name", "model"), list(families_and_models()))
def test_every_family_works_for_every_model(name, model):
    torch.manual_seed(0)
    x = torch.randn(8, 3).abs()
    guide = make(name, model)
    pv.objectives.ELBO(4).loss_and_grads(model, guide, x)
    t = pv.terms(model, guide, x, num_particles=6)
    assert t.log_weight.shape == (6, 8)
    assert t.log_weight.isfinite().all()
    for parameter in guide.parameters():
        assert parameter.grad is not None
    # Score the samples of the third data point under the posterior of every data point.
    drawn = {site: values[:, 2] for site, values in t.samples.items()}
    nesting = 2 if "plate" in model.__name__ else 1
    given = guide_log_prob(guide, (x,), drawn, plate_nesting=nesting)
    assert given.shape == (6, 8)
    torch.testing.assert_close(given[:, 2], t.log_guide[:, 2], rtol=1e-3, atol=2e-3)
    loss = pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True)
    assert torch.isfinite(torch.tensor(loss.loss(model, guide, x)))


@pytest.mark.parametrize("name", ["multivariate normal", "planar", "mixture"])
def test_joint_density_integrates_to_one(name):
    """Over a positive site and a real one."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            mean = (a.unsqueeze(-1) + b).expand(*a.shape, 3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    x = torch.randn(2, 3)
    guide = make(name, model)
    guide(x)
    log_a, b = torch.linspace(-9, 9, 301), torch.linspace(-9, 9, 301)
    points = torch.cartesian_prod(log_a, b)
    values = {"a": points[:, 0].exp(), "b": points[:, 1:]}
    with pyro.validation_enabled(False):
        log_q = guide_log_prob(guide, (x,), values, plate_nesting=1)
    total = (log_q + points[:, :1]).exp().sum(0) * (log_a[1] - log_a[0]) ** 2  # da = a dlog a
    torch.testing.assert_close(total, torch.ones(2), rtol=2e-3, atol=0)


def test_sites_of_a_joint_sample_are_correlated():
    torch.manual_seed(0)
    guide = guides.AmortizedMultivariateNormal(two_supports, pv.nets.MLP(3, [8]))
    x = torch.ones(1, 3)
    guide(x)
    with torch.no_grad():
        guide.built["head"].bias[6:] = 5.0  # the lower triangle
    draws = pv.terms(two_supports, guide, x, num_particles=4000).samples
    both = torch.stack([draws["rate"].log().flatten(), draws["weights"][..., 0].logit().flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.5


def test_joint_latents_must_be_given_together():
    guide = guides.AmortizedMultivariateNormal(two_supports, pv.nets.MLP(3, [8]))
    x = torch.ones(2, 3)
    guide(x)
    with pytest.raises(ValueError, match=r"'rate' is given and 'weights' is drawn.*joint=False"):
        poutine.condition(guide, data={"rate": torch.ones(2)})(x)
    apart = guides.AmortizedMultivariateNormal(two_supports, pv.nets.MLP(3, [8]), joint=False)
    values = poutine.condition(apart, data={"rate": torch.ones(2)})(x)
    assert torch.equal(values["rate"], torch.ones(2))


def test_joint_guide_refuses_masked_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=x[:, 0] > 0):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
            mean = (a + b).unsqueeze(-1).expand(-1, 3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"'b' is masked.*joint=False"):
        guides.AmortizedMultivariateNormal(model, pv.nets.MLP(3, [8]))(x)


class OfX(torch.nn.Module):
    """An encoder that reads x alone."""

    def __init__(self):
        super().__init__()
        self.net = pv.nets.MLP(1, [8])

    def forward(self, x, seen):
        return self.net(x.unsqueeze(-1))


@pytest.mark.parametrize(
    "family",
    [
        families.MultivariateNormal,
        families.Mixture,
        functools.partial(families.Transformed, flow=pv.flows.Planar, length=2),
    ],
)
def test_hierarchical_guide_takes_masked_parts_of_any_family(family):
    """The density of a part, from two masks, has the integral one over a grid of its values."""

    def model(x, seen):
        with pyro.plate("data", len(x)):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 2, dim=-2), poutine.mask(mask=seen.T):
                pyro.sample("part", dist.Normal(level, 1.0))
            pyro.sample("x", dist.Normal(level, 1.0), obs=x)

    grid = torch.linspace(-15, 15, 600)
    x, both = torch.full_like(grid, 0.3), torch.ones(600, 2, dtype=torch.bool)
    guide = guides.HierarchicalGuide(model, OfX(), family=family, order="top-down")
    given = {"level": torch.zeros(600), "part": torch.stack([grid, torch.full_like(grid, 0.5)])}

    def score(seen):
        trace = poutine.trace(poutine.condition(guide, data=given)).get_trace(x, seen)
        trace.compute_log_prob()
        return sum(trace.nodes[name]["log_prob"].reshape(-1, 600).sum(0) for name in given)

    score(both)  # creates the networks
    second = score(torch.tensor([False, True]).expand(600, 2))
    density = (score(both) - second).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(second, second[:1].expand(600))


def test_autoguide_samples_a_global_weight():
    def model(x):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)

    x = torch.randn(40, 2) @ torch.randn(2, 3)
    for family in (guides.AmortizedNormal, guides.AmortizedFlow):
        local = family(model, pv.nets.MLP(3, [8]))
        weights = AutoNormal(poutine.block(model, expose=["weight"]))

        def guide(x, local=local, weights=weights):
            return {**weights(x), **local(x)}

        fit = pv.fit(model, guide, x, epochs=40, batch_size=40, learning_rate=0.02, seed=0,
                     progress=False)  # fmt: skip
        losses = fit.history.loss.values
        assert losses[-5:].mean() < losses[:5].mean() - 1


@pytest.mark.parametrize("order", ["top-down", "bottom-up", ["z_1", "z_0", "z_2"]])
def test_hierarchical_guide_depends_on_earlier_latents(order):
    guide = guides.HierarchicalGuide(sequence, pv.nets.MLP(3, [8]), order=order)
    x = torch.randn(4, 3)
    trace = poutine.trace(guide).get_trace(x)
    names = [n for n, s in trace.nodes.items() if s["type"] == "sample" and n.startswith("z")]
    wanted = {"top-down": ["z_0", "z_1", "z_2"], "bottom-up": ["z_2", "z_1", "z_0"]}
    assert names == (wanted[order] if isinstance(order, str) else order)
    given = poutine.condition(guide, data={names[0]: torch.full((4, 2), 3.0)})
    moved = poutine.trace(given).get_trace(x)
    locs = [t.nodes[names[1]]["fn"].base_dist.loc for t in (trace, moved)]
    assert not torch.allclose(*locs)


def test_invalid_order_and_history_are_refused():
    x = torch.randn(4, 3)
    for order in ("sideways", ["z_0"]):
        with pytest.raises(ValueError, match="order must be"):
            guides.HierarchicalGuide(sequence, pv.nets.MLP(3, [8]), order=order)(x)
    with pytest.raises(ValueError, match="history must be"):
        guides.HierarchicalGuide(sequence, pv.nets.MLP(3, [8]), history=-1)


@pytest.mark.parametrize("through", [False, True])
def test_refining_raises_the_elbo_of_an_untrained_guide(through):
    torch.manual_seed(0)
    x = torch.randn(20, 3).abs()
    start = guides.AmortizedMultivariateNormal(two_supports, pv.nets.MLP(3, [8]))
    start(x)
    refined = guides.SemiAmortized(start, steps=15, step_size=0.2, through=through)
    elbo = [
        pv.terms(two_supports, g, x, num_particles=50).log_weight.mean().item()
        for g in (start, refined)
    ]
    assert elbo[1] > elbo[0] + 1
    pv.objectives.ELBO().loss_and_grads(two_supports, refined, x)
    assert all(p.grad is not None for p in start.parameters())
    with torch.no_grad():
        assert not refined(x)["rate"].requires_grad


def test_family_may_be_any_function():
    x = torch.randn(4, 3).abs()
    guide = guides.AmortizedGuide(two_supports, pv.nets.MLP(3, [8]), lambda d: families.Normal(d))
    assert pv.terms(two_supports, guide, x).log_weight.isfinite().all()


def test_samples_respect_a_bound_of_one_dimension():
    def model(x):
        with pyro.plate("data", len(x)):
            prior = dist.Pareto(torch.tensor([1.0, 2.0]), 3.0).expand([len(x), 2]).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    guide = guides.AmortizedMultivariateNormal(model, pv.nets.MLP(1, [8]))
    z = pv.terms(model, guide, torch.randn(5, 1), num_particles=3).samples["z"]
    assert z.shape == (3, 5, 2)
    assert (z[..., 1] >= 2).all()


def test_surgery_of_a_bottom_up_guide_matches_its_elbo():
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x)

    x = torch.randn(30, 2)
    guide = guides.HierarchicalGuide(model, pv.nets.MLP(2, [8]))
    pv.fit(model, guide, x, epochs=3, batch_size=30, progress=False)
    surgery = pv.elbo_surgery(model, guide, x, seed=0)
    elbo = pv.terms(model, guide, x, num_particles=2000).log_weight.mean().item()
    assert surgery.elbo == pytest.approx(elbo, abs=1.0)


def test_semi_amortized_refuses_unsupported_arguments():
    def with_a_global_weight(x):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x[:, 0])

    local = guides.AmortizedNormal(with_a_global_weight, pv.nets.MLP(3, [8]))
    with pytest.raises(ValueError, match="latent site 'weight' outside the plate"):
        guides.SemiAmortized(local)(torch.randn(4, 3))
    local = guides.LocalGuide(two_supports, torch.randn(3, 3).abs())
    with pytest.raises(TypeError, match="must be an AmortizedGuide"):
        guides.SemiAmortized(local)
    amortized = guides.AmortizedNormal(two_supports, pv.nets.MLP(3, [8]))
    with pytest.raises(ValueError, match="must be positive"):
        guides.SemiAmortized(amortized, steps=0)


def test_delta_guide_has_a_constant_or_learned_log_density():
    def model(x):
        weight = pyro.param("decoder", lambda: torch.randn(2, 3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    x = torch.randn(30, 3)
    guide = guides.AmortizedDelta(model, nn_identity())
    t = pv.terms(model, guide, x)
    assert torch.equal(t.log_guide, torch.zeros(1, 30))
    assert torch.equal(guide(x)["z"], guide(x)["z"])
    learned = guides.AmortizedDelta(model, nn_identity(), log_density=None)
    learned(x)
    pv.objectives.ELBO().loss_and_grads(model, learned, x)
    assert learned.built["head"].bias.grad.abs().min() > 0
    constant = guides.AmortizedDelta(model, nn_identity(), log_density=-0.5)
    torch.testing.assert_close(pv.terms(model, constant, x).log_guide, torch.full((1, 30), -1.0))


def nn_identity():
    return functools.partial(torch.mul, other=1.0)


def _semi_amortized():
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 6))
    )
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(6, [8]))
    return model, pv.guides.SemiAmortized(guide, steps=3)


def test_a_pair_that_is_copied_at_once_is_consistent():
    model, guide = _semi_amortized()
    copied = copy.deepcopy((model, guide))
    assert copied[1].guide._model.program is copied[0]
    assert copy.deepcopy(guide).guide._model.program is model
    loaded = pickle.loads(pickle.dumps((guide, model)))  # noqa: S301
    assert loaded[0].guide._model.program is loaded[1]


COLUMNS = {
    "large": lambda u: 1e12 * u,
    "huge": lambda u: 1e300 * u,
    "constant": lambda u: torch.full_like(u, 1e12),
    "nearly constant": lambda u: (
        torch.tensor([0.1, 0.2, 0.7])[torch.randint(3, u.shape)].double() + 2.0**-50 * (u > 0.5)
    ),
    "dates": lambda u: 2459000.5 + 0.01 * u,
    "seconds": lambda u: 1.7e9 + u,
    "small": lambda u: 1e-12 * u,
}


@pytest.mark.parametrize("column", COLUMNS)
def test_local_guide_finds_rows_whatever_the_scale_of_a_column(column):
    x = torch.randn(2000, 3, dtype=torch.float64)
    x[:, 0] = COLUMNS[column](torch.rand(2000, dtype=torch.float64))
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Normal(pv.nets.MLP(2, [4], 3))
    ).double()
    guide = pv.guides.LocalGuide(model, x)
    order = torch.randperm(2000)
    found = guide.parameters_of(x[order])
    assert found.isfinite().all()
    assert torch.equal(found, guide.parameters_of(x)[order])
    assert len(found.unique(dim=0)) == 2000


def test_local_guide_of_rows_that_add_up_to_one():
    x = torch.rand(1000, 3, dtype=torch.float64)
    x = x / x.sum(1, keepdim=True)
    x = torch.cat([x, x.sum(1, keepdim=True)], 1)  # the last column is 1 up to rounding
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Normal(pv.nets.MLP(2, [4], 4))
    ).double()
    assert pv.guides.LocalGuide(model, x).parameters_of(x).isfinite().all()


def test_local_guide_refuses_to_be_the_guide_of_a_prior():
    model = pv.LatentVariableModel(
        pv.priors.VampPrior(2, pseudo_inputs=torch.rand(3, 6)),
        pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 6)),
    )
    with pytest.raises(ValueError, match="A LocalGuide cannot be its guide"):
        pv.guides.LocalGuide(model, torch.rand(8, 6).round())
    model.prior.bind_guide(pv.guides.AmortizedNormal(model, pv.nets.MLP(6, [4])))
    pv.guides.LocalGuide(model, torch.rand(8, 6).round())


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("inner", [False, True])
def test_leading_dimensions_of_size_one_belong_to_no_latent(name, inner):
    sizes = (1, 1, 4) if inner else (1, 4)

    def model(x, dims):
        loc = torch.zeros(*dims[:-1], len(x), 2)
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("inner", 3, dim=-2) if inner else contextlib.nullcontext():
                z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            total = z[..., 0].sum(-2, keepdim=True) if inner else z[..., 0]
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    x = torch.randn(4)
    found = []
    for dims in (sizes, sizes[-2:] if inner else sizes[-1:]):
        torch.manual_seed(0)
        program = functools.partial(model, dims=dims)
        encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 8))
        guide = DENSITIES[name](program, encoder)
        terms = pv.terms(program, guide, x, num_particles=3)
        numbers = [terms.log_weight, terms.samples["z"], terms.kl]
        with contextlib.suppress(ValueError):  # the dimensions of the family are dependent
            numbers.append(terms.kl_of_dimensions()["z"])
        found.append(numbers)
    torch.testing.assert_close(found[0], found[1])


class Returning(torch.nn.Module):
    """A network that returns its output in another form."""

    def __init__(self, network, form):
        super().__init__()
        self.network, self.form = network, form

    def forward(self, *inputs):
        return self.form(self.network(torch.cat(inputs, -1)))


FORMS = {
    "a tuple (Tensor, tuple)": lambda h: (h, (h, h)),
    "a tuple (Tensor, Tensor)": lambda h: (h, h),
    "a dict with the keys ['loc']": lambda h: {"loc": h},
    "NoneType": lambda h: None,
}


def calls(model, guide, *data):
    yield lambda: pv.fit(model, guide, data, epochs=1, batch_size=5, progress=False)
    yield lambda: pv.evidence(model, guide, data, num_particles=2)
    yield lambda: pv.objectives.ELBO().loss(model, guide, *data)
    yield lambda: pv.impute(model, guide, *data, num_samples=2)


@pytest.mark.parametrize("form", FORMS)
def test_networks_must_return_one_tensor(form):
    x = torch.bernoulli(torch.full((10, 4), 0.5))
    mlp = pv.nets.MLP
    prior = pv.priors.StandardNormal(2)
    model = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(mlp(2, [3], 4)))
    guide = pv.guides.AmortizedNormal(model, mlp(4, [3]))
    encoder, decoder = Returning(mlp(4, [3]), FORMS[form]), Returning(mlp(2, [3], 4), FORMS[form])
    other = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(decoder))
    pairs = {
        "encoder": (model, pv.guides.AmortizedNormal(model, encoder)),
        "decoder": (other, guide),
    }
    for name, pair in pairs.items():
        for call in calls(*pair, x):
            with pytest.raises(TypeError) as caught:
                call()
            text = f"the {name} must return one tensor, got {form}. Return"
            assert str(caught.value).startswith(text)

    steps = torch.randn(6, 3, 4)
    model = pv.models.SequenceModel(
        prior=pv.priors.StandardNormal(2),
        transition=lambda z: dist.Normal(z, 1.0).to_event(1),
        likelihood=pv.likelihoods.Normal(mlp(2, [3], 4)),
    )
    guide = pv.guides.SequenceGuide(model, encoder=encoder)
    with pytest.raises(TypeError, match="the encoder must return one tensor"):
        pv.objectives.ELBO().loss(model, guide, steps)

    for name in ("classifier", "encoder"):
        model = pv.models.SemiSupervisedModel(
            prior=prior,
            likelihood=pv.likelihoods.Bernoulli(pv.nets.Joined(mlp(5, [3], 4))),
            classes=3,
        )
        nets = {"classifier": mlp(4, [3], 3), "encoder": pv.nets.Joined(mlp(7, [3]))}
        nets[name] = Returning(nets[name], FORMS[form])
        guide = pv.guides.SemiSupervisedGuide(model, **nets)
        with pytest.raises(TypeError, match=f"the {name} must return one tensor"):
            pv.objectives.ELBO().loss(model, guide, x, torch.arange(10) % 3)


def test_networks_that_do_not_take_the_covariates():
    x, y = torch.bernoulli(torch.full((10, 4), 0.5)), torch.rand(10, 3)
    mlp = pv.nets.MLP
    prior, joined = pv.priors.StandardNormal(2), pv.nets.Joined(mlp(5, [3], 4))
    alone = pv.likelihoods.Bernoulli(mlp(2, [3], 4))
    model = pv.models.ConditionalModel(prior, pv.likelihoods.Bernoulli(joined))
    pairs = {
        "encoder must take x": (model, pv.guides.AmortizedNormal(model, mlp(4, [3]))),
        "decoder must take z": (
            other := pv.models.ConditionalModel(prior, alone),
            pv.guides.AmortizedNormal(other, pv.nets.Joined(mlp(7, [3]))),
        ),
    }
    for start, pair in pairs.items():
        for call in calls(*pair, x, y):
            with pytest.raises(
                TypeError, match=f"^the {start} and 1 covariate, .*wrap the network"
            ):
                call()

    def broken(x, y):
        raise TypeError("my own")

    guide = pv.guides.AmortizedNormal(model, broken)
    with pytest.raises(TypeError, match=r"^my own"):
        pv.objectives.ELBO().loss(model, guide, x, y)
