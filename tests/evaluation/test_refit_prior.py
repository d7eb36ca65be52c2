"""Priors that are fitted after training, against the log p(x) of linear Gaussian models."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import assert_within
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import refit_prior

D, NOISE, N = 4, 0.5, 300


class Pair:
    """A linear Gaussian model with a standard normal prior, and its exact posterior as a guide."""

    def __init__(self, likelihood=None):
        self.linear = nn.Linear(2, D)
        with torch.no_grad():
            self.linear.weight.normal_()
        normal = pv.likelihoods.Normal(self.linear, scale=NOISE)
        wrapped = normal if likelihood is None else likelihood(normal)
        self.model = pv.LatentVariableModel(pv.priors.StandardNormal(2), wrapped)

    def guide(self, x):
        """A posterior that is a bit too wide, so that its samples suit other priors too."""
        weight = self.linear.weight.detach()
        seen = x.isfinite().to(x.dtype)
        precision = 0.3 * torch.eye(2) + (weight.T * seen[:, None]) @ weight / NOISE**2
        shift = (seen * (x - self.linear.bias.detach()).nan_to_num(0.0)) @ weight / NOISE**2
        with pyro.plate("data", len(x)):
            loc = torch.linalg.solve(precision, shift)
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    def data(self, z):
        return self.linear(z).detach() + NOISE * torch.randn(len(z), D)

    def log_density(self, x, loc, covariance):
        """Return log p(x) for z ~ N(loc, covariance)."""
        weight = self.linear.weight.detach()
        mean = self.linear(loc).detach()
        total = weight @ covariance @ weight.T + NOISE**2 * torch.eye(D)
        return dist.MultivariateNormal(mean, total).log_prob(x)

    def evidence(self, model, x):
        return pv.evidence(model, self.guide, x, num_particles=200, seed=0, capture=False)


@pytest.mark.parametrize(
    ("kind", "overfit"), [("mixture", 0.1), pytest.param("flow", 0.1, marks=pytest.mark.slow)]
)
def test_prior_of_the_wrong_scale(kind, overfit):
    """Afterwards, log p(x) of new data is that of the distribution of z, up to the fit's error.

    A Gaussian has four parameters, which cost 4 / (2 N) nats on average, and a mixture more.
    """
    pair = Pair()
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.4])
    train, test = (pair.data(loc + scale * torch.randn(N, 2)) for _ in range(2))
    better = refit_prior(pair.model, pair.guide, train, kind=kind, num_particles=10, seed=0)
    exact = pair.log_density(test, loc, scale.square().diag())
    found = pair.evidence(better, test)
    loss = exact.double() - found.values
    error = loss.std().item() / math.sqrt(N) + found.monte_carlo_error
    assert abs(loss.mean().item()) < overfit + 4 * error
    assert pair.evidence(pair.model, test).mean < found.mean - 1.0
    assert isinstance(pair.model.prior, pv.priors.StandardNormal)
    assert better.likelihood is pair.model.likelihood


def test_one_gaussian_is_the_closed_form():
    pair = Pair()
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.4])
    train = pair.data(loc + scale * torch.randn(2000, 2))
    options = {"components": 1, "num_particles": 20, "seed": 0}
    prior = refit_prior(pair.model, pair.guide, train, **options).prior()
    # Errors of five standard errors for samples of z; those of z given x add to them.
    posterior = NOISE**2 * torch.linalg.inv(pair.linear.weight.T @ pair.linear.weight).diagonal()
    spread = (scale.square() + posterior.detach()).sqrt()
    assert ((prior.loc[0] - loc).abs() < 5 * spread / 2000**0.5).all()
    limit = 5 * spread.square() * (2 / 2000) ** 0.5 + 0.01
    assert ((prior.scale[0].square() - scale.square()).abs() < limit).all()


class NormalPrior(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self):
        return dist.Normal(torch.zeros(2), self.scale).to_event(1)


def test_the_units_of_the_latents_have_no_effect():
    """A wide dimension widened the prior of a narrow one, and log p(x) fell."""
    z = torch.randn(N, 2) * torch.tensor([1.0, 0.5])
    scales = []
    for units in (torch.ones(2), torch.tensor([128.0, 1.0])):
        model = pv.LatentVariableModel(
            NormalPrior(units), pv.likelihoods.Normal(nn.Identity(), scale=0.1)
        )

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, 0.1).to_event(1))

        better = refit_prior(model, guide, units * z, components=1, seed=0)
        scales.append(better.prior().scale / units)
    # The noise of 0.1 is smaller in larger units, and adds a hundredth to the variance.
    torch.testing.assert_close(*scales, rtol=0.02, atol=0)
    assert_within(scales[1][0, 1].item(), 0.5, 0.5 / (2 * N) ** 0.5)


@pytest.mark.parametrize("missing", [False, True])
def test_bimodal_prior(missing):
    pair = Pair(pv.likelihoods.NanMasked if missing else None)
    centers = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])

    def sample():
        z = centers[torch.randint(2, (N,))] + 0.3 * torch.randn(N, 2)
        return pair.data(z)

    train, test = sample(), sample()
    if missing:
        train = train.masked_fill(torch.rand(train.shape) < 0.2, torch.nan)
    better = refit_prior(pair.model, pair.guide, train, num_particles=10, seed=0)
    both = torch.stack([pair.log_density(test, c, 0.09 * torch.eye(2)) for c in centers])
    exact = both.logsumexp(0) - math.log(2.0)
    loss = exact.double() - pair.evidence(better, test).values
    assert abs(loss.mean().item()) < 0.15 + 4 * loss.std().item() / math.sqrt(N)
    drawn = pv.generate(better, test, seed=0)
    assert drawn.shape == test.shape


@pytest.mark.filterwarnings("ignore:the new prior does not increase")
def test_aggregated_posterior_of_incomplete_data_is_saved(tmp_path):
    likelihood = pv.likelihoods.NanMasked(pv.likelihoods.Normal(nn.Linear(2, D), scale=NOISE))
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
    guide = pv.guides.AmortizedNormal(model, pv.nets.ZeroImputed(pv.nets.MLP(D, [4])))
    x = torch.randn(30, D).masked_fill(torch.rand(30, D) < 0.3, torch.nan)
    for kind in ("aggregated", "mixture", "flow", pv.priors.MixtureOfNormals(2, 3)):
        better = refit_prior(model, guide, x, kind=kind, num_particles=5, seed=0)
        assert better is not model
        folder = tmp_path / type(better.prior).__name__
        pv.save(folder, better, guide, overwrite=True)
        loaded = pv.load(folder)
        assert type(loaded.model.prior) is type(better.prior)
        before, after = (
            pv.evidence(m, g, x, num_particles=5, seed=0, capture=False).values
            for m, g in ((better, guide), (loaded.model, loaded.guide))
        )
        torch.testing.assert_close(before, after)
        if kind == "aggregated":
            assert pv.elbo_surgery(better, guide, x, seed=0).marginal_kl < 1e-3
    # The old pair and its parameters are as before.
    assert isinstance(model.prior, pv.priors.StandardNormal)
    assert model(x[:3]).shape == (3, D)


class OwnModel(pyro.nn.PyroModule):
    def __init__(self, prior=None):
        super().__init__()
        self.prior = prior or (lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1))
        self.decoder = nn.Linear(2, D)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            p = dist.Normal(self.decoder(z), self.log_scale.exp()).to_event(1)
            pyro.sample("x", p, obs=x)


@pytest.mark.filterwarnings("ignore:the new prior does not increase")
def test_own_modules_with_a_prior():
    model = OwnModel()
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(D, [4]))
    x = model.decoder(3 + torch.randn(50, 2)).detach()
    better = refit_prior(model, guide, x, components=1, seed=0)
    assert {"prior.loc", "log_scale"} <= dict(better.named_parameters()).keys()
    assert better.log_scale is model.log_scale
    assert better.decoder is model.decoder
    assert "prior.loc" not in dict(model.named_parameters())
    mixture = pv.models.MixtureModel(
        pv.priors.MixtureOfNormals(2, 2), pv.likelihoods.Normal(nn.Linear(2, D))
    )
    guide = pv.guides.AmortizedNormal(mixture, pv.nets.MLP(D, [4]))
    better = refit_prior(mixture, guide, x, components=3, seed=0)
    assert len(better.prior.logits) == 3
    assert len(mixture.prior.logits) == 2
    with pytest.raises(ValueError, match=r"MixtureModel cannot run with a FlowPrior"):
        refit_prior(mixture, guide, x, kind="flow", num_particles=2, seed=0)


def test_wrong_models_are_refused():
    pair = Pair()
    x = pair.data(torch.randn(20, 2))
    with pytest.raises(TypeError, match=r"attribute prior, .* got function"):
        refit_prior(lambda x: pair.model(x), pair.guide, x)
    with pytest.raises(ValueError, match=r"kind must be .* got 'gaussian'"):
        refit_prior(pair.model, pair.guide, x, kind="gaussian")
    with pytest.raises(ValueError, match=r'components is for kind="mixture"'):
        refit_prior(pair.model, pair.guide, x, kind="flow", components=2)
    with pytest.raises(ValueError, match=r"has no parameters"):
        refit_prior(pair.model, pair.guide, x, kind=pv.priors.StandardNormal(2))
    deep = pv.models.HierarchicalModel(
        pv.priors.StandardNormal(2),
        [pv.likelihoods.Normal(nn.Linear(2, 2))],
        pv.likelihoods.Normal(nn.Linear(2, D)),
    )
    guide = pv.guides.AmortizedNormal(deep, pv.nets.MLP(D, [4]))
    with pytest.raises(ValueError, match=r"one latent variable, got the latents \['z_2', 'z_1'\]"):
        refit_prior(deep, guide, x)
    positive = OwnModel(lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    guide = pv.guides.AmortizedNormal(positive, pv.nets.MLP(D, [4]))
    with pytest.raises(ValueError, match="needs a latent that is a real vector"):
        refit_prior(positive, guide, x)
    other = OwnModel()
    other.forward = OwnModel.forward.__get__(OwnModel())
    guide = pv.guides.AmortizedNormal(other, pv.nets.MLP(D, [4]))
    other.prior = pv.priors.MixtureOfNormals(2, 3)
    with pytest.raises(ValueError, match="its log-density differs"):
        refit_prior(other, guide, x)


def test_a_prior_of_the_class_is_refused():
    """An attribute of the class hides a new module, so the program would keep its prior."""
    prior = pv.priors.StandardNormal(2)

    class Method(nn.Module):
        def prior(self):
            return prior()

    class Property(nn.Module):
        @property
        def prior(self):
            return prior

    class Shared(nn.Module):
        pass

    Shared.prior = prior
    for owner in (Method, Property, Shared):
        with pytest.raises(TypeError, match=rf"of the class {owner.__name__}. Set self.prior in"):
            refit_prior(owner(), Pair().guide, torch.randn(20, D))


def test_a_property_may_return_a_prior_of_the_object():
    class Renamed(pv.LatentVariableModel):
        @property
        def prior(self):
            return self._modules["prior"]

    pair = Pair()
    x, model = pair.data(torch.randn(50, 2)), Renamed(pair.model.prior, pair.model.likelihood)
    better = refit_prior(model, pair.guide, 3 + x, components=1, seed=0)
    assert isinstance(better.prior, pv.priors.MixtureOfNormals)
    assert pair.evidence(better, 3 + x).mean > pair.evidence(model, 3 + x).mean + 1.0


def test_a_prior_that_does_not_help_is_reported():
    pair = Pair()
    x = pair.data(torch.randn(10, 2))
    with pytest.warns(UserWarning, match="does not increase log p"):
        refit_prior(pair.model, pair.guide, x, components=4, seed=0)


@pytest.mark.parametrize("kind", ["mixture", pytest.param("flow", marks=pytest.mark.slow)])
def test_a_pair_in_float64_gets_a_prior_in_float64(kind):
    """Its samples are those that the decoder takes."""
    linear = nn.Linear(2, D).double()
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2).double(), pv.likelihoods.Normal(linear, scale=NOISE)
    )
    guide = pv.guides.AmortizedNormal(model, nn.Linear(D, 4).double()).double()
    x = torch.randn(20, D).double()
    guide(x)
    guide.double()
    components = 1 if kind == "mixture" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the gain is not the point
        new = refit_prior(model, guide, x, kind=kind, components=components, seed=0)
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert pv.generate(new, 3).dtype == torch.float64


@pytest.mark.parametrize("kind", ["mixture", "module"])
def test_the_store_of_the_old_pair_is_unchanged(kind):
    """Otherwise a later fit of the old pair would train the parameters of the new prior."""
    pair = Pair()
    old = pair.model
    x = pair.data(torch.randn(20, 2))
    pv.fit(old, pair.guide, x, epochs=1, progress=False, capture=False)
    with pv.parameter_store(old, pair.guide):
        before = dict(pyro.get_param_store().named_parameters())
    chosen = pv.priors.MixtureOfNormals(2, components=3) if kind == "module" else kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the gain is not the point
        refit_prior(old, pair.guide, x, kind=chosen, seed=0)
    with pv.parameter_store(old, pair.guide):
        after = dict(pyro.get_param_store().named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
