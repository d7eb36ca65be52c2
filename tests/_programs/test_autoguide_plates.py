"""Pyro's own guides for global and local latents, alone and together, against closed forms.

All models are linear and Gaussian, except for the discrete ones, and their plate is "cells".
"""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, autoguide

import pyro_vae as pv
from pyro_vae import objectives
from pyro_vae._programs.trial_runs import trial_run

N = 9
PROBS = torch.tensor([0.2, 0.3, 0.5])


def of_global(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("cells", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def of_local(x):
    with pyro.plate("cells", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_two_locals(x):
    with pyro.plate("cells", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)


def of_both(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("cells", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_rows(x, rows):
    with pyro.plate("cells", N, subsample=rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete(x, y):
    with pyro.plate("cells", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Categorical(PROBS))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(c.float(), 1.0), obs=y)


def joint_normal(model):
    """Return p(latents, x) of a model as one Gaussian of mean zero: its covariance."""
    ones, one = torch.ones(N, N), torch.eye(N)
    if model is of_global:  # mu, x
        top = torch.cat([torch.ones(1, 1), torch.ones(1, N)], 1)
        return torch.cat([top, torch.cat([torch.ones(N, 1), ones + one], 1)])
    if model is of_local:  # z, x
        return torch.cat([torch.cat([one, one], 1), torch.cat([one, 2 * one], 1)])
    of_z = ones + one  # mu, z, x
    top = torch.ones(1, 1 + 2 * N)
    middle = torch.cat([torch.ones(N, 1), of_z, of_z], 1)
    return torch.cat([top, middle, torch.cat([torch.ones(N, 1), of_z, of_z + one], 1)])


def posterior(model, x):
    """Return the mean and covariance of all latents given x, by conditioning the joint Gaussian."""
    joint = joint_normal(model)
    latents = len(joint) - N
    gain = torch.linalg.solve(joint[latents:, latents:], joint[latents:, :latents]).T
    return gain @ x, joint[:latents, :latents] - gain @ joint[latents:, :latents]


def log_evidence(model, x):
    """Return log p of all x together."""
    joint = joint_normal(model)
    return dist.MultivariateNormal(torch.zeros(N), joint[-N:, -N:]).log_prob(x).item()


MODELS = {f.__name__: f for f in (of_global, of_local, of_both)}
NAMES = (
    "AutoNormal",
    "AutoMultivariateNormal",
    "AutoDiagonalNormal",
    "AutoLowRankMultivariateNormal",
    "AutoIAFNormal",
    "AutoNormalizingFlow",
    "AutoLaplaceApproximation",
    "AutoDelta",
    "AutoStructured",
    "AutoGaussian",
    "AutoNormalMessenger",
    "AutoHierarchicalNormalMessenger",
    "AutoRegressiveMessenger",
)
FLOWS = ("AutoIAFNormal", "AutoNormalizingFlow")


def make(name, model, *arguments):
    """Create an AutoGuide and its parameters, and name the plate."""
    pyro.clear_param_store()  # another guide of the same class has parameters of the same names
    kind = getattr(autoguide, name)
    if name == "AutoNormalizingFlow":
        guide = kind(model, functools.partial(iterated, 1, affine_autoregressive))
    elif name == "AutoIAFNormal" and model is of_global:
        pytest.skip("an autoregressive network needs two numbers")
    elif name == "AutoStructured":
        guide = kind(model, conditionals="normal", dependencies="linear")
    else:
        guide = kind(model)
    guide(*arguments)
    return named(model, guide, *arguments)


def named(model, guide, *arguments):
    pv.terms(model, guide, *arguments, plate="cells")
    return guide


def assert_same_as_pyro(model, guide, arguments, pyros=Trace_ELBO, seeded=None, **options):
    """Compare losses and gradients at the same noise."""
    guide = guide if seeded is None else seeded
    found = []
    for elbo in (pyros(max_plate_nesting=1, **options), objectives.ELBO(**options)):
        pyro.set_rng_seed(1)
        with poutine.trace(param_only=True) as trace:
            loss = elbo.differentiable_loss(model, guide, *arguments)
        parameters = {n: s["value"].unconstrained() for n, s in trace.trace.nodes.items()}
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in parameters.items()}))
        for parameter in parameters.values():
            parameter.grad = None
    (expected, slopes), (loss, grads) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert grads.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(grads[name], slope, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_pyros(name, model):
    x = torch.randn(N)
    if name == "AutoNormalizingFlow" and model is of_global:
        pytest.skip("an autoregressive network needs two numbers")
    guide = make(name, model, x)
    for num_particles in (1,) if name in FLOWS else (1, 3):
        options = {"num_particles": num_particles, "vectorize_particles": num_particles > 1}
        assert_same_as_pyro(model, guide, (x,), **options)


def at_posterior(name, model, x):
    """Return an AutoGuide with the parameters of the exact posterior."""
    guide = make(name, model, x)
    mean, covariance = posterior(model, x)
    if name == "AutoMultivariateNormal":
        factor = torch.linalg.cholesky(covariance)
        guide.loc, guide.scale = torch.nn.Parameter(mean), factor.diag()
        guide.scale_tril = factor / factor.diag()[:, None]
    elif name == "AutoDiagonalNormal":
        guide.loc, guide.scale = torch.nn.Parameter(mean), covariance.diag().sqrt()
    elif name == "AutoLaplaceApproximation":
        guide.loc = torch.nn.Parameter(mean)
        guide = named(model, guide.laplace_approximation(x), x)
    elif name == "AutoHierarchicalNormalMessenger" and model is of_both:
        guide.locs.mu, guide.scales.mu = mean[0], covariance[0, 0].sqrt()
        guide.weights.mu = torch.tensor(1e-30)
        guide.locs.z, guide.scales.z = x / 2, torch.full((N,), 0.5**0.5)  # z given mu and x
        guide.weights.z = torch.full((N,), 0.5)
    else:
        site = "mu" if model is of_global else "z"
        shape = getattr(guide.locs, site).shape
        setattr(guide.locs, site, mean.reshape(shape))
        setattr(guide.scales, site, covariance.diag().sqrt().reshape(shape))
        if name == "AutoHierarchicalNormalMessenger":
            setattr(guide.weights, site, torch.full(shape, 1.0))  # times a prior mean of zero
    return guide


OF_ONE_KIND = (
    "AutoNormal",
    "AutoMultivariateNormal",
    "AutoDiagonalNormal",
    "AutoLaplaceApproximation",
    "AutoNormalMessenger",
    "AutoHierarchicalNormalMessenger",
)
EXACT = {
    of_global: OF_ONE_KIND,
    of_local: OF_ONE_KIND,
    of_both: (
        "AutoMultivariateNormal",
        "AutoLaplaceApproximation",
        "AutoHierarchicalNormalMessenger",
    ),
}


@pytest.mark.parametrize(
    ("name", "model"),
    [(name, model) for model, names in EXACT.items() for name in names],
)
def test_loss_at_the_exact_posterior_is_the_evidence(name, model):
    """Then every sample has the same weight, log p(x)."""
    x = 2 * torch.randn(N)
    guide = at_posterior(name, model, x)
    expected = -log_evidence(model, x)
    for num_particles in (1, 3):
        loss = objectives.ELBO(num_particles=num_particles).loss(model, guide, x)
        assert loss == pytest.approx(expected, rel=1e-4)


def test_point_estimate():
    x = torch.randn(N)
    guide = make("AutoDelta", of_both, x)
    log_joint = dist.Normal(0.0, 1.0).log_prob(guide.mu)
    log_joint = log_joint + dist.Normal(guide.mu, 1.0).log_prob(guide.z).sum()
    log_joint = log_joint + dist.Normal(guide.z, 1.0).log_prob(x).sum()
    loss = objectives.ELBO().loss(of_both, guide, x)
    assert loss == pytest.approx(-log_joint.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoNormalMessenger"])
def test_evidence_of_each_row(name):
    x = 2 * torch.randn(N)
    guide = at_posterior(name, of_local, x)
    found = pv.evidence(of_local, guide, x, num_particles=5, batch_size=N, seed=0)
    expected = dist.Normal(0.0, 2**0.5).log_prob(x).double()
    torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=0.0)
    drawn = pv.to_arviz(of_local, guide, x, num_draws=400, seed=0)["posterior"]["z"].values
    errors = (torch.as_tensor(drawn)[0].mean(0) - x / 2).abs()
    assert errors.max() < 5 * 0.5**0.5 / 400**0.5


def information_of(x):
    """Estimate I[x, z] from 2000 samples of each posterior N(x / 2, 1 / 2)."""
    posteriors = dist.Normal(x / 2, 0.5**0.5)
    z = posteriors.sample([2000])
    pairs = posteriors.log_prob(z.unsqueeze(-1))  # (2000, N, N)
    own = pairs.diagonal(dim1=1, dim2=2)
    return (own - pairs.logsumexp(-1)).mean().item() + math.log(len(x))


@pytest.mark.parametrize("name", ["cells", "data"])
@pytest.mark.parametrize("plate_dim", [-1, -2])
def test_surgery_of_auto_normal_on_several_supports(name, plate_dim):
    """Bijections do not change the mutual information, which is that of the Gaussians."""
    x = 2 * torch.randn(N)

    def model(x):
        with pyro.plate(name, N, dim=plate_dim):
            shape = (N,) if plate_dim == -1 else (N, 1)
            z = pyro.sample("z", dist.LogNormal(torch.zeros(shape), 1.0))
            p = pyro.sample("p", dist.Beta(torch.ones(shape), 1.0))
            pyro.sample("x", dist.Normal(z + p, 1.0), obs=x.reshape(shape))

    guide = autoguide.AutoNormal(model)
    guide(x)
    shape = guide.locs.z.shape
    guide.locs.z, guide.scales.z = (x / 2).reshape(shape), torch.full(shape, 0.5**0.5)
    guide.locs.p = torch.zeros(shape)  # the same for all data points: no information
    surgery = pv.elbo_surgery(model, guide, x, seed=0, num_particles=500)
    assert surgery.mutual_information == pytest.approx(information_of(x), abs=0.06)
    kl = pv.terms(model, guide, x, num_particles=500).kl
    error = (2 * kl.var(0).mean() / kl.numel()).sqrt().item()
    assert surgery.rate == pytest.approx(kl.mean().item(), abs=4 * error)  # false alarm: 6e-5


def test_surgery():
    """A messenger scores any value. The Gaussians of AutoNormal are read."""
    x = 2 * torch.randn(N)
    guide = at_posterior("AutoNormalMessenger", of_local, x)
    found = pv.elbo_surgery(of_local, guide, x, seed=0, batch_size=N)
    expected = dist.Normal(0.0, 2**0.5).log_prob(x).mean()
    assert found.elbo == pytest.approx(expected.item(), abs=1e-4)
    guide = at_posterior("AutoNormal", of_local, x)
    surgery = pv.elbo_surgery(of_local, guide, x, seed=0, num_particles=500)
    assert surgery.elbo == pytest.approx(expected.item(), abs=1e-4)
    assert surgery.mutual_information == pytest.approx(information_of(x), abs=0.06)


@pytest.mark.parametrize("name", ["AutoMultivariateNormal", "AutoDiagonalNormal", "AutoGaussian"])
def test_guides_of_all_rows_together_have_no_evidence(name):
    x = torch.randn(N)
    guide = make(name, of_local, x)
    for estimate in (pv.evidence, pv.elbo_surgery, pv.to_arviz):
        with pytest.raises(ValueError, match=r"together, at the auxiliary site '_Auto.*AutoNormal"):
            estimate(of_local, guide, x)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal", "AutoNormalMessenger"])
def test_global_latents_have_no_evidence(name):
    x = torch.randn(N)
    for model in (of_global, of_both):
        guide = make(name, model, x)
        with pytest.raises(ValueError, match=r"site 'mu' is outside the plate"):
            pv.evidence(model, guide, x)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDelta", "AutoNormalMessenger"])
def test_plates_of_rows(name):
    """With ``create_plates``, minibatches find the parameters of their rows."""
    x, rows = 3 * torch.randn(N), torch.arange(N)

    def plates(x, rows):
        return pyro.plate("cells", N, subsample=rows)

    kind = getattr(autoguide, name)
    guide = kind(of_rows) if "Messenger" in name else kind(of_rows, create_plates=plates)
    options = {"batch_size": 3, "seed": 0, "progress": False, "plate": "cells", "capture": False}
    pv.fit(of_rows, guide, (x, rows), epochs=60, learning_rate=0.1, **options)
    loc = guide.z if name == "AutoDelta" else guide.locs.z
    torch.testing.assert_close(loc.detach(), x / 2, atol=0.7, rtol=0.0)  # one sd
    if name != "AutoDelta":
        guide.locs.z = x / 2
        guide.scales.z = torch.full((N,), 0.5**0.5)
        found = pv.evidence(of_rows, guide, (x, rows), num_particles=3, batch_size=4, seed=0)
        expected = dist.Normal(0.0, 2**0.5).log_prob(x).double()
        torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=0.0)


def test_saved_and_loaded(tmp_path):
    x = torch.randn(N)
    for name in ("AutoNormal", "AutoMultivariateNormal", "AutoNormalMessenger"):
        guide = at_posterior(name, of_local, x)
        pv.save(tmp_path / name, of_local, guide)
        fresh = make(name, of_local, x + 1)
        pv.load(tmp_path / name, of_local, fresh)
        loss = objectives.ELBO().loss(of_local, fresh, x)
        assert loss == pytest.approx(-log_evidence(of_local, x), rel=1e-4)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 4)

    def forward(self, x):
        return self.layer(x[:, None]).tanh()


def of_parts(*parts):
    """Return a list of guides for the model with a global and a local latent."""
    guide = autoguide.AutoGuideList(of_both)
    for part in parts:
        guide.append(part)
    return guide


def composed():
    of_mu = autoguide.AutoNormal(poutine.block(of_both, expose=["mu"]))
    of_z = pv.guides.AmortizedNormal(of_both, Encoder())

    class Composed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.of_mu, self.of_z = of_mu, of_z

        def forward(self, x):
            self.of_mu(x)
            self.of_z(x)

    return Composed()


SIDE_BY_SIDE = {
    "list of AutoNormals": lambda: named(
        of_both,
        of_parts(
            autoguide.AutoNormal(poutine.block(of_both, expose=["mu"])),
            autoguide.AutoNormal(poutine.block(of_both, expose=["z"])),
        ),
        torch.randn(N),
    ),
    "AutoNormal and AmortizedNormal in a list": lambda: of_parts(
        autoguide.AutoNormal(poutine.block(of_both, expose=["mu"])),
        pv.guides.AmortizedNormal(of_both, Encoder()),
    ),
    "AutoNormal and AmortizedNormal in a module": composed,
}


@pytest.mark.parametrize("guide", SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE)
def test_global_and_local_side_by_side(guide):
    x = 1.5 + 2**0.5 * torch.randn(N)
    guide = guide()
    pv.terms(of_both, guide, x)
    for num_particles in (1, 3):
        options = {"num_particles": num_particles, "vectorize_particles": num_particles > 1}
        assert_same_as_pyro(of_both, guide, (x,), **options)
    options = {"batch_size": N, "seed": 0, "progress": False, "capture": False}
    pv.fit(of_both, guide, x, epochs=100, learning_rate=0.1, **options)
    mean = posterior(of_both, x)[0][0]
    found = guide.of_mu if hasattr(guide, "of_mu") else guide[0]
    torch.testing.assert_close(found.locs.mu.detach(), mean, atol=0.4, rtol=0.0)
    with pytest.raises(ValueError, match=r"site 'mu' is outside the plate"):
        pv.evidence(of_both, guide, x)


def discrete_guide(x, y):
    guide = autoguide.AutoGuideList(discrete)
    guide.append(autoguide.AutoNormal(poutine.block(discrete, expose=["z"])))
    guide.append(autoguide.AutoDiscreteParallel(poutine.block(discrete, expose=["c"])))
    guide(x, y)
    return guide


def log_evidence_of_discrete(x, y):
    of_y = torch.logsumexp(
        PROBS.log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(y[:, None]), -1
    )
    return dist.Normal(0.0, 2**0.5).log_prob(x) + of_y


def test_discrete_latents_beside_continuous_ones():
    x, y = torch.randn(N), 1 + torch.randn(N)
    guide = named(discrete, discrete_guide(x, y), x, y)

    def seeded(x, y):
        pyro.set_rng_seed(2)
        return guide(x, y)

    named(discrete, seeded, x, y)
    assert_same_as_pyro(discrete, guide, (x, y), TraceEnum_ELBO, seeded)
    guide[0].locs.z = x / 2
    guide[0].scales.z = torch.full((N,), 0.5**0.5)
    log_joint = PROBS.log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(y[:, None])
    guide[1].c_probs = log_joint.softmax(-1)
    exact = log_evidence_of_discrete(x, y)
    loss = objectives.ELBO().loss(discrete, guide, x, y)
    assert loss == pytest.approx(-exact.sum().item(), rel=1e-4)
    found = pv.evidence(discrete, guide, (x, y), num_particles=3, batch_size=N, seed=0)
    torch.testing.assert_close(found.values, exact.double(), atol=1e-4, rtol=0.0)


def test_discrete_latents_alone():
    def model(x):
        with pyro.plate("cells", len(x)):
            c = pyro.sample("c", dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(c.float(), 1.0), obs=x)

    x = 1 + torch.randn(N)
    guide = autoguide.AutoDiscreteParallel(model)
    guide(x)
    named(model, guide, x)
    assert_same_as_pyro(model, guide, (x,), TraceEnum_ELBO)
    log_joint = PROBS.log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(x[:, None])
    guide.c_probs = log_joint.softmax(-1)
    exact = log_joint.logsumexp(-1)
    assert objectives.ELBO().loss(model, guide, x) == pytest.approx(-exact.sum().item(), rel=1e-4)
    found = pv.evidence(model, guide, x, num_particles=3, batch_size=N, seed=0)
    torch.testing.assert_close(found.values, exact.double(), atol=1e-4, rtol=0.0)


def test_auxiliary_site_without_a_latent_is_refused_beside_discrete_latents():
    """A continuous latent that depends on an auxiliary site has no known density."""

    def guide(x, y):
        with pyro.plate("cells", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a, 1.0))
            pyro.sample("c", dist.Categorical(PROBS))

    with pytest.raises(ValueError, match="auxiliary site 'a'"):
        pv.terms(discrete, guide, torch.randn(N), torch.randn(N), plate="cells")


@pytest.mark.parametrize("name", ["AutoNormal", "AutoStructured"])
def test_points_beside_densities_have_no_evidence(name):
    """A Delta without an auxiliary site is a point, also beside Deltas that have one."""

    x = torch.randn(N)
    if name == "AutoStructured":
        conditionals = {"z": "normal", "w": "delta"}
        guide = autoguide.AutoStructured(of_two_locals, conditionals=conditionals, dependencies={})
        expected = "together, at the auxiliary site 'z_aux'"
    else:
        guide = autoguide.AutoGuideList(of_two_locals)
        guide.append(autoguide.AutoNormal(poutine.block(of_two_locals, expose=["z"])))
        guide.append(autoguide.AutoDelta(poutine.block(of_two_locals, expose=["w"])))
        expected = r"latent site 'w' one point \(a Delta\)"
    guide(x)
    named(of_two_locals, guide, x)
    assert_same_as_pyro(of_two_locals, guide, (x,))
    for estimate in (pv.evidence, pv.to_arviz):
        with pytest.raises(ValueError, match=expected):
            estimate(of_two_locals, guide, x)
    with pytest.raises(ValueError, match=expected):
        objectives.IWAE(3).loss(of_two_locals, guide, x)


class GroupOfLocals(EasyGuide):
    """One Gaussian over both local latents, of the exact posterior."""

    def guide(self, x):
        group = self.group(match="z|w")
        # x = z + w + noise
        covariance = torch.tensor([[2.0, -1.0], [-1.0, 2.0]]) / 3
        with self.plate("cells", len(x)):
            loc = pyro.param("loc", x[:, None].expand(-1, 2) / 3)
            group.sample("both", dist.MultivariateNormal(loc, covariance))


class GroupOfAll(EasyGuide):
    def guide(self, x):
        group = self.group(match="mu|z")
        mean, covariance = posterior(of_both, x)
        loc = pyro.param("loc", mean)
        group.sample("all", dist.MultivariateNormal(loc, covariance))


class GlobalPoint(EasyGuide):
    def guide(self, x):
        mu = self.map_estimate("mu")
        with self.plate("cells", len(x)):
            pyro.sample("z", dist.Normal((x + mu) / 2, 0.5**0.5))


def test_group_of_local_latents():
    x = 2 * torch.randn(N)
    guide = GroupOfLocals(of_two_locals)
    named(of_two_locals, guide, x)
    assert_same_as_pyro(of_two_locals, guide, (x,))
    expected = dist.Normal(0.0, 3**0.5).log_prob(x)
    found = pv.evidence(of_two_locals, guide, x, num_particles=3, batch_size=N, seed=0)
    torch.testing.assert_close(found.values, expected.double(), atol=1e-4, rtol=0.0)
    with pytest.raises(ValueError, match="auxiliary site 'both'"):
        pv.elbo_surgery(of_two_locals, guide, x, seed=0)
    fit = pv.fit(
        of_two_locals, guide, x, epochs=3, batch_size=N, seed=0, capture=False, progress=False
    )
    assert fit.history.loss.iloc[0] == pytest.approx(-expected.mean().item(), rel=1e-4)


def test_group_of_global_and_local_latents():
    x = 2 * torch.randn(N)
    guide = GroupOfAll(of_both)
    named(of_both, guide, x)
    assert_same_as_pyro(of_both, guide, (x,))
    loss = objectives.ELBO().loss(of_both, guide, x)
    assert loss == pytest.approx(-log_evidence(of_both, x), rel=1e-4)
    with pytest.raises(ValueError, match=r"site 'mu' is outside the plate"):
        pv.evidence(of_both, guide, x)


def test_point_of_a_global_latent():
    """The bound is log p(x, mu), because q(z) is exact given the point mu."""
    x = 2 * torch.randn(N)
    guide = GlobalPoint(of_both)
    named(of_both, guide, x)
    assert_same_as_pyro(of_both, guide, (x,))
    mu = guide.mu.detach()
    expected = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu, 2**0.5).log_prob(x).sum()
    loss = objectives.ELBO().loss(of_both, guide, x)
    assert loss == pytest.approx(-expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDelta", "AutoGaussian", "AutoNormalMessenger"])
def test_the_plate_needs_no_name(name):
    """Most AutoGuides keep the number of rows of their first run."""
    x = torch.randn(N)
    guide = getattr(autoguide, name)(of_local)
    guide(x)
    elbo = objectives.ELBO()
    losses = []
    for each in (elbo, pyro.infer.Trace_ELBO()):
        torch.manual_seed(0)
        losses.append(each.loss(of_local, guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("plate", [None, "cells"])
def test_a_guide_of_the_library_inside_a_guide_with_a_global_latent(plate):
    encoder = torch.nn.Sequential(torch.nn.Unflatten(-1, (-1, 1)), torch.nn.Linear(1, 3))

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.of_mu = autoguide.AutoNormal(poutine.block(of_both, expose=["mu"]))
            self.of_z = pv.guides.AmortizedNormal(of_both, encoder)

        def forward(self, x):
            self.of_mu(x)
            self.of_z(x)

    x, guide = torch.randn(N), Both()
    pv.terms(of_both, guide, x, plate=plate)
    losses = []
    for elbo in (objectives.ELBO(), Trace_ELBO()):
        torch.manual_seed(0)
        losses.append(elbo.loss(of_both, guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_that_fails_on_trial_leaves_a_guide_unchanged():
    """An EasyGuide keeps the plates of a run that raised an error."""

    x = torch.randn(N)
    guide = GroupOfLocals(of_two_locals)
    guide(x)
    before = {name: value for name, value in vars(guide).items() if name != "training"}
    with pytest.raises(ValueError, match="Shape mismatch"), trial_run(guide):
        guide(x[:-1])
    assert {name: vars(guide)[name] for name in before} == before
    guide(x)
