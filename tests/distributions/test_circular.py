"""Latents that are angles: the wrapped normal, and pairs compared with quadrature."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same, needs_compiler
from oracles import assert_within
from pyro import poutine
from torch.distributions import biject_to

import pyro_vae as pv
from pyro_vae import flows, guides, objectives
from pyro_vae._utils import transform_config
from pyro_vae.distributions._circular import CircleTransform, WrappedNormal, circle
from pyro_vae.evaluation._scoring import guide_log_prob

SCALES = [1e-3, 0.1, 1.0, 1.79, 1.81, 5.0, 100.0]


def grid(count=4000, dtype=torch.float64):
    """Return evenly spaced angles and the weight of each."""
    angles = (torch.arange(count, dtype=dtype) + 0.5) / count * 2 * math.pi - math.pi
    return angles, 2 * math.pi / count


def sum_over_windings(value, loc, scale):
    turns = 2 * math.pi * torch.arange(-120, 121, dtype=torch.float64)
    return dist.Normal(loc, scale).log_prob(value.unsqueeze(-1) + turns).logsumexp(-1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_density_is_the_sum_over_all_windings(scale, dtype, rounding):
    value, _ = grid(101, dtype)
    for loc in (0.0, 3.1, -2.0):
        parameters = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (loc, scale)]
        wide = [p.detach().double().requires_grad_() for p in parameters]
        found = WrappedNormal(*parameters).log_prob(value)
        exact = sum_over_windings(value.double(), *wide)
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=rounding)
        weights = torch.cos(value + 1)
        gradients = torch.autograd.grad((found * weights).sum(), parameters)
        exact = torch.autograd.grad((exact * weights.double()).sum(), wide)
        for one, other in zip(gradients, exact, strict=True):
            size = 1e3 * rounding * (1 + scale**-3)  # terms of size (pi / scale)^2 cancel
            torch.testing.assert_close(one.double(), other, rtol=size, atol=size)


@pytest.mark.parametrize("scale", [0.3, 1.8, 4.0])
def test_samples_match_expectations_and_their_gradients(scale):
    torch.manual_seed(0)
    parameters = [torch.tensor(v, requires_grad=True) for v in (3.0, scale)]  # near the cut
    q = WrappedNormal(*parameters)
    z = q.rsample((400_000,))
    assert circle.check(z).all()
    assert WrappedNormal(torch.tensor(3.0), 50.0).sample((100_000,)).abs().max() <= math.pi
    angles, weight = grid()
    for function in (lambda a: (a - 2.5).cos().exp(), lambda a: (2 * a).sin()):
        exact = (q.log_prob(angles.float()).exp() * function(angles.float())).sum() * weight
        value = function(z)
        assert_within(value.mean().item(), exact.item(), value.std().item() / len(z) ** 0.5)
        of_exact = torch.autograd.grad(exact, parameters, retain_graph=True)
        (slope,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        noise = (z - parameters[0]).detach() / scale
        noise = (noise + math.pi / scale) % (2 * math.pi / scale) - math.pi / scale
        found = torch.autograd.grad(value.mean(), parameters, retain_graph=True)
        assert_within(found[0].item(), of_exact[0].item(), slope.std().item() / len(z) ** 0.5)
        size = (slope.std() * max(1.0, 3.0)).item() / len(z) ** 0.5
        assert abs(found[1].item() - of_exact[1].item()) < 5 * size


def test_circle_transform_and_its_inverse():
    x = torch.linspace(-60.0, 60.0, 1001, dtype=torch.float64, requires_grad=True)
    t = CircleTransform()
    y = t(x)
    assert circle.check(y).all()
    assert t.inv(y.detach().clone()).isfinite().all()
    assert t.inv(torch.tensor([-math.pi, math.pi])).isfinite().all()
    near = x.abs() < 25
    torch.testing.assert_close(t.inv(y)[near], x[near], rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(y.sum(), x)
    near = x.abs() < 20
    torch.testing.assert_close(
        t.log_abs_det_jacobian(x, y)[near], slope.log()[near], rtol=1e-6, atol=1e-6
    )
    assert biject_to(circle) == t
    assert transform_config.from_config(transform_config.to_config(biject_to(circle))) == t


class Angles:
    """An angle z, observed through an angle x; log p(x) is computed by quadrature."""

    def __init__(self, prior=0.1, likelihood=2.0, loc=0.0):
        self.prior, self.likelihood, self.loc = prior, likelihood, loc

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(x.new_tensor(self.loc), self.prior))
            pyro.sample("x", dist.VonMises(z, self.likelihood), obs=x[:, 0])

    def log_joint(self, x, z):
        prior = dist.VonMises(x.new_tensor(self.loc), self.prior).log_prob(z)
        return prior + dist.VonMises(z, self.likelihood).log_prob(x)

    def log_evidence(self, x):
        z, weight = grid(1000)
        return self.log_joint(x.double(), z).logsumexp(-1) + math.log(weight)


ENCODER = functools.partial(pv.nets.MLP, 1, [16])
GUIDES = {
    "normal": lambda m, x: guides.AmortizedNormal(m, ENCODER()),
    "multivariate": lambda m, x: guides.AmortizedMultivariateNormal(m, ENCODER()),
    "low rank": lambda m, x: guides.AmortizedLowRankNormal(m, ENCODER(), rank=1),
    "mixture": lambda m, x: guides.AmortizedMixture(m, ENCODER()),
    "planar": lambda m, x: guides.AmortizedFlow(m, ENCODER(), flows.Planar, length=2),
    "local": lambda m, x: guides.LocalGuide(m, x),
    "hierarchical": lambda m, x: guides.HierarchicalGuide(m, ENCODER()),
    "semi-amortized": lambda m, x: guides.SemiAmortized(
        guides.AmortizedNormal(m, ENCODER()), steps=2
    ),
}


CUT = ["multivariate", "low rank", "mixture", "planar"]


def data_at_the_cut(count=40):
    """Return data with posteriors on both sides of the cut."""
    torch.manual_seed(1)
    x = math.pi - 0.2 + 0.6 * torch.randn(count, 1)
    return torch.remainder(x + math.pi, 2 * math.pi) - math.pi


@pytest.mark.parametrize("name", GUIDES)
def test_evidence_of_every_guide_matches_quadrature(name):
    model, x = Angles(), data_at_the_cut()
    if name in CUT:  # a prior that is low at the cut keeps the weights' variance finite
        model, x = Angles(prior=6.0), 0.5 * torch.randn(40, 1)
    guide = GUIDES[name](model, x)
    evidence = pv.evidence(model, guide, x, num_particles=1000, seed=0, capture=False)
    exact = model.log_evidence(x)
    assert_within(evidence.values.mean().item(), exact.mean().item(),
                  evidence.monte_carlo_errors.square().sum().sqrt().item() / len(x))  # fmt: skip


def test_fitted_elbo_is_slightly_below_the_evidence():
    """The data are on both sides of the cut, where a Gaussian on the real line would fail."""
    model, x = Angles(likelihood=3.0), data_at_the_cut(50)
    guide = guides.AmortizedNormal(model, pv.nets.MLP(1, [32]))
    elbo = objectives.ELBO(5)
    options = {"epochs": 90, "batch_size": 50, "learning_rate": 0.05, "seed": 0}
    pv.fit(model, guide, x, objective=elbo, **options, progress=False, capture=False)
    with torch.no_grad():
        t = pv.terms(model, guide, x, num_particles=2000)
    found, exact = (t.log_joint - t.log_guide).mean(0), model.log_evidence(x)
    error = (t.log_joint - t.log_guide).std(0) / 2000**0.5
    assert (found < exact + 5 * error).all()
    assert (exact.mean() - found.mean()).item() < 0.05
    angles, weight = grid(500)
    q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
    with torch.no_grad():
        log_q = q.log_prob(angles.float().unsqueeze(-1)).double()  # (grid, data)
    log_p = model.log_joint(x.double(), angles).T - exact
    distance = (log_q.exp() - log_p.exp()).abs().sum(0) * weight / 2
    assert distance.median() < 0.1  # total variation distance: a Gaussian nearly fits


def test_gradient_of_the_elbo_matches_quadrature():
    model, x = Angles(likelihood=3.0), data_at_the_cut(3)
    loc = torch.tensor([3.0, -3.0, 2.5], requires_grad=True)
    scale = torch.tensor([0.5, 0.8, 2.2], requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", WrappedNormal(loc, scale))

    angles, weight = grid(1000)
    log_q = WrappedNormal(loc, scale).log_prob(angles.float().unsqueeze(-1)).double()
    log_p = model.log_joint(x.double(), angles).T
    exact = torch.autograd.grad((log_q.exp() * (log_p - log_q)).sum() * weight, [loc, scale])
    draws = []
    for _ in range(30):
        t = pv.terms(model, guide, x, num_particles=4000)
        bound = (t.log_joint - t.log_guide).mean(0).sum()
        draws.append(torch.cat(torch.autograd.grad(bound, [loc, scale])))
    draws = torch.stack(draws)
    error = draws.std(0) / 30**0.5
    # Six Student's t values with 29 degrees of freedom exceed 5.5 once in 30,000 runs.
    assert ((draws.mean(0) - torch.cat(exact)).abs() < 5.5 * error).all()


def two_latents(x):
    """An angle, a positive number, and a pair of angles for each of three words."""
    with pyro.plate("data", len(x)):
        angle = pyro.sample("angle", dist.VonMises(x.new_tensor(3.0), 1.0))
        size = pyro.sample("size", dist.Gamma(x.new_tensor(3.0), 2.0))
        with pyro.plate("words", 3):
            pair = pyro.sample("pair", dist.VonMises(x.new_zeros(2), 1.0).to_event(1))
        shift = pair.cos().sum(-1).sum(-2, keepdim=True)
        pyro.sample("x", dist.Normal(size * angle.cos() + 0.3 * shift, 1.0), obs=x[:, 0])


@pytest.mark.parametrize(
    "make",
    [
        guides.AmortizedNormal,
        guides.AmortizedMultivariateNormal,
        functools.partial(guides.AmortizedMixture, joint=False),
        guides.AmortizedFlow,
        functools.partial(guides.HierarchicalGuide, order="top-down"),
        guides.AmortizedDelta,
    ],
)
def test_loaded_guides_of_angles_and_other_latents_score_the_same(make, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(12, 1)
    guide = make(two_latents, ENCODER())
    pv.fit(two_latents, guide, x, epochs=2, batch_size=6, progress=False)
    for particles in (1, 5):
        t = pv.terms(two_latents, guide, x, num_particles=particles)
        assert t.samples["pair"].shape == (particles, 12, 3, 2)
        assert circle.check(t.samples["pair"]).all()
        assert circle.check(t.samples["angle"]).all()
        assert t.log_guide.isfinite().all()
    if not isinstance(guide, guides.AmortizedDelta):
        values = {name: value.flatten(0, 1) for name, value in t.samples.items()}
        scores = guide_log_prob(guide, (x,), values, plate_nesting=2)
        own = scores.reshape(5, 12, 12).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(own, t.log_guide, rtol=1e-4, atol=1e-3)
    pv.save(tmp_path / "pair", two_latents, guide)
    loaded = pv.load(tmp_path / "pair", model=two_latents).guide
    scores = []
    for one in (guide, loaded):
        torch.manual_seed(3)
        scores.append(pv.terms(two_latents, one, x).log_guide)
    assert torch.equal(*scores)


@pytest.mark.slow
@needs_compiler
def test_captured_steps_match_eager():
    def make():
        return two_latents, guides.AmortizedNormal(two_latents, ENCODER())

    check_same(make, torch.randn(30, 1), objective=objectives.ELBO(2))


def test_networks_of_a_hierarchical_guide_are_continuous_at_the_cut():
    torch.manual_seed(0)
    x = torch.randn(4, 1)
    guide = guides.HierarchicalGuide(two_latents, ENCODER(), order="top-down")
    guide(x)
    below, above = (torch.full((4,), sign * (math.pi - 1e-6)) for sign in (-1, 1))
    found = []
    for angle in (below, above):
        given = poutine.condition(guide, data={"angle": angle})
        found.append(poutine.trace(given).get_trace(x).nodes["size"]["fn"].base_dist.loc)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_evidence_of_a_chain_of_angles_matches_the_forward_algorithm():
    def model(x):
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x))
            for step in range(x.shape[1]):
                z = pyro.sample(f"z_{step}", dist.VonMises(z, 0.5))
                pyro.sample(f"x_{step}", dist.VonMises(z, 0.7), obs=x[:, step])

    torch.manual_seed(0)
    x = dist.VonMises(3.0, 2.0).sample((20, 3))
    guide = guides.SequenceGuide(model, recurrent=8, hidden=[8])
    evidence = pv.evidence(model, guide, x, num_particles=5000, seed=0, capture=False)
    angles, weight = grid(200)
    step = dist.VonMises(angles, 0.5).log_prob(angles.unsqueeze(-1))  # to, from
    seen = dist.VonMises(angles, 0.7).log_prob(x.double().unsqueeze(-1))  # (data, step, to)
    alpha = dist.VonMises(0.0, 0.5).log_prob(angles) + seen[:, 0]
    for t in (1, 2):
        alpha = (step + alpha.unsqueeze(1)).logsumexp(-1) + math.log(weight) + seen[:, t]
    exact = (alpha.logsumexp(-1) + math.log(weight)).mean().item()
    error = evidence.monte_carlo_errors.square().sum().sqrt().item() / len(x)
    assert_within(evidence.values.mean().item(), exact, error)


def test_other_functions_accept_angles():
    """Objectives, KL terms, AIS, surgery and the collapse report."""
    model, x = Angles(likelihood=3.0), data_at_the_cut(30)
    guide = guides.AmortizedNormal(model, ENCODER())
    for objective in (
        objectives.ELBO(3),
        objectives.IWAE(5),
        objectives.MeanFieldELBO(2),
        objectives.StickingTheLanding(2),
        objectives.DReG(4),
        objectives.ReweightedWakeSleep(4),
    ):
        fit = pv.fit(model, guide, x, objective=objective, epochs=1, batch_size=15, progress=False)
        assert math.isfinite(fit.history.loss.iloc[-1])
    t = pv.terms(model, guide, x, num_particles=3)
    torch.testing.assert_close(t.kl, t.kl_of_dimensions()["z"])
    torch.testing.assert_close(t.kl, t.log_guide - t.log_prior)
    ais = pv.evaluation.AIS(num_temperatures=25, num_chains=30, step_size=0.5)
    annealed = pv.evidence(model, guide, x[:4], method=ais, seed=0)
    distance = (annealed.values - model.log_evidence(x[:4])).abs()
    assert (distance < 5 * annealed.monte_carlo_errors + 0.02).all()
    surgery = pv.elbo_surgery(model, guide, x, seed=0)
    rate, marginal_kl = rate_and_marginal_kl(model, guide, x)
    assert surgery.rate == pytest.approx(rate, abs=0.3)
    assert surgery.marginal_kl == pytest.approx(marginal_kl, abs=0.3)
    assert pv.collapse_report(model, guide, x, seed=0).rate == pytest.approx(rate, abs=0.3)


def rate_and_marginal_kl(model, guide, x):
    angles, weight = grid(1000)
    with torch.no_grad():
        q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
        log_q = q.log_prob(angles.float().unsqueeze(-1)).double()
    log_prior = dist.VonMises(torch.tensor(model.loc), model.prior).log_prob(angles)
    rate = (log_q.exp() * (log_q - log_prior.unsqueeze(-1))).sum(0).mean() * weight
    log_mixed = log_q.logsumexp(1) - math.log(len(x))
    return rate.item(), ((log_mixed.exp() * (log_mixed - log_prior)).sum() * weight).item()
