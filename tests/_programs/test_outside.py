"""A guide that samples outside the model's support: such samples have weight zero."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import objectives

# Prior, location and scale of a Gaussian guide, and bounds of the quadrature.
PRIORS = {
    "exponential": (dist.Exponential(3.0), 0.4, 0.5, (0.0, 12.0)),
    "gamma": (dist.Gamma(2.0, 3.0), 0.6, 0.6, (0.0, 12.0)),
    "half-normal": (dist.HalfNormal(1.0), 0.5, 0.7, (0.0, 9.0)),
    "log-normal": (dist.LogNormal(-0.5, 0.5), 0.6, 0.5, (0.0, 15.0)),
    "uniform": (dist.Uniform(-1.0, 1.0), 0.2, 0.8, (-1.0, 1.0)),
    "beta": (dist.Beta(2.0, 3.0), 0.4, 0.4, (0.0, 1.0)),
    "von Mises": (dist.VonMises(1.5, 4.0), 1.5, 0.8, (-torch.pi, torch.pi)),
    "pareto": (dist.Pareto(1.0, 3.0), 1.5, 0.6, (1.0, 400.0)),
    "masked von Mises": (dist.VonMises(1.5, 4.0).mask(True), 1.5, 0.8, (-torch.pi, torch.pi)),
    "mixture of von Mises": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.3, 0.7])), dist.VonMises(torch.tensor([1.0, 1.8]), 4.0)
        ),
        1.5,
        0.8,
        (-torch.pi, torch.pi),
    ),
    "mixture of exponentials": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.3, 0.7])), dist.Exponential(torch.tensor([2.0, 4.0]))
        ),
        0.4,
        0.5,
        (0.0, 12.0),
    ),
    "shifted exponential": (
        dist.TransformedDistribution(
            dist.Exponential(2.0), [torch.distributions.AffineTransform(1.0, 1.0)]
        ),
        1.6,
        0.5,
        (1.0, 12.0),
    ),
    "shifted log-normal": (
        dist.TransformedDistribution(
            dist.LogNormal(-0.5, 0.5), [torch.distributions.AffineTransform(1.0, 1.0)]
        ),
        1.6,
        0.5,
        (1.0, 15.0),
    ),
    "wider uniform": (dist.Uniform(-1.0, 1.0), None, 1.3, (-1.0, 1.0)),
}


def pair(name):
    prior, loc, scale, _ = PRIORS[name]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        q = dist.Uniform(-scale, scale) if loc is None else dist.Normal(loc, scale)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return model, guide


def log_evidence(name, x):
    """Return log p(x) by quadrature over the support, at the midpoints of 40,000 intervals."""
    prior, _, _, (low, high) = PRIORS[name]
    width = (high - low) / 40_000
    z = low + (torch.arange(40_000, dtype=torch.float64) + 0.5) * width
    log_joint = prior.log_prob(z) + dist.Normal(z, 1.0).log_prob(x.double()[:, None])
    return log_joint.logsumexp(-1) + torch.tensor(width).log()


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.UnreliableEvidence")
@pytest.mark.parametrize("name", PRIORS)
def test_evidence_matches_quadrature(name, without_compiler):
    model, guide = pair(name)
    x = torch.rand(10)
    exact = log_evidence(name, x)
    ways = [{"capture": False}]
    if name == "exponential":
        ways.append({"capture": True})
    if name in ("exponential", "masked von Mises", "wider uniform"):
        ways.append({"vectorize_particles": False})
    for options in ways:
        count = 100 if "vectorize_particles" in options else 5000
        found = pv.evidence(model, guide, x, num_particles=count, batch_size=5, seed=0, **options)
        # Ten values of one seed: allow 5 standard errors, and the bias of few samples.
        allowed = 5 * found.monte_carlo_errors + found.monte_carlo_errors.square()
        assert ((found.values - exact).abs() < allowed + 1e-4).all(), options


@pytest.mark.parametrize("name", PRIORS)
def test_weights_are_zero_only_outside_the_support(name):
    model, guide = pair(name)
    prior, _, _, (low, high) = PRIORS[name]
    t = pv.terms(model, guide, torch.rand(200), num_particles=20)
    z = t.samples["z"]
    inside = (z >= low) & (z <= (torch.inf if name in _UNBOUNDED else high))
    assert 0 < (~inside).sum() < z.numel()
    assert (t.log_prior[~inside] == -torch.inf).all()
    torch.testing.assert_close(t.log_prior[inside], prior.log_prob(z[inside]))
    bound = objectives.IWAE(20).differentiable_loss(model, guide, torch.rand(20))
    assert bound.isfinite()
    assert objectives.ELBO(50).loss(model, guide, torch.rand(200)) == torch.inf


_UNBOUNDED = ("exponential", "gamma", "half-normal", "log-normal", "pareto",
              "mixture of exponentials", "shifted exponential", "shifted log-normal")  # fmt: skip


def test_gradient_is_finite_with_samples_outside():
    loc = torch.tensor(0.4, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.6))

    objectives.IWAE(50).differentiable_loss(model, guide, torch.rand(40)).backward()
    assert loc.grad.isfinite()


@pytest.mark.parametrize("name", ["exponential", "uniform", "von Mises"])
def test_fit_names_the_latent_with_samples_outside(name):
    model, guide = pair(name)
    with pytest.raises(ValueError, match=r"'z' has a log-density of -inf.*guides of the library"):
        pv.fit(model, guide, torch.rand(300), epochs=1, batch_size=300, progress=False)


def test_guides_of_the_library_and_pyro_sample_inside():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(3.0))
            w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(z + w[..., 0], 1.0), obs=x)

    x = torch.rand(50)
    encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), pv.nets.MLP(1, [4]))
    for guide in (
        pv.guides.AmortizedNormal(model, encoder),
        pv.guides.AmortizedMultivariateNormal(model, encoder),
        pyro.infer.autoguide.AutoNormal(model),
    ):
        t = pv.terms(model, guide, x, num_particles=50)
        z, w = t.samples["z"], t.samples["w"]
        expected = dist.Exponential(3.0).log_prob(z) + dist.Dirichlet(torch.ones(3)).log_prob(w)
        torch.testing.assert_close(t.log_prior, expected)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.UnreliableEvidence")
@pytest.mark.parametrize("skewed", [False, True])
def test_evidence_of_two_angles_agrees_with_quadrature(skewed):
    if skewed:
        base = dist.VonMises(torch.zeros(2), 2.0).to_event(1)
        prior = dist.SineSkewed(base, torch.tensor([0.3, -0.2]))
    else:
        zero, two = torch.tensor(0.0), torch.tensor(2.0)
        prior = dist.SineBivariateVonMises(zero, zero, two, two, correlation=torch.tensor(0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.cos().sum(-1), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))

    x = torch.tensor([1.5, 0.7])
    angles = torch.linspace(-torch.pi, torch.pi, 601)[:-1]
    z = torch.cartesian_prod(angles, angles)
    log_joint = prior.log_prob(z) + dist.Normal(z.cos().sum(-1), 0.5).log_prob(x[:, None])
    exact = log_joint.double().logsumexp(-1) + 2 * torch.tensor(2 * torch.pi / 600).double().log()
    found = pv.evidence(model, guide, x, num_particles=20_000, seed=0)
    assert ((found.values - exact).abs() < 5 * found.monte_carlo_errors).all()


def test_discrete_samples_outside_have_weight_zero():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.7))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def poisson(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Poisson(0.4))

    def one_category_more(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.ones(3)))

    def of_categories(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(c.float(), 1.0), obs=x)

    x = torch.randn(4)
    weights = torch.tensor([0.3, 0.7]).log()
    exact = (weights + dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(x[:, None])).logsumexp(
        -1
    )
    for program, guide in ((model, poisson), (of_categories, one_category_more)):
        for seed in range(3):
            found = pv.evidence(program, guide, x, num_particles=20_000, seed=seed)
            assert ((found.values - exact).abs() < 5 * found.monte_carlo_errors).all()


@pytest.mark.parametrize("method", ["importance", "naive"])
@pytest.mark.parametrize("discrete", [False, True])
def test_samples_that_a_factor_excludes_have_weight_zero(discrete, method):
    """The prior is N(0, 1) or uniform on {0, 1, 2}. A factor excludes all values below 0.5."""
    cut = torch.tensor(0.5)

    def model(x):
        with pyro.plate("data", len(x)):
            p_z = dist.Categorical(torch.ones(3)) if discrete else dist.Normal(0.0, 1.0)
            z = pyro.sample("z", p_z)
            pyro.factor("constraint", torch.where(z < cut, -torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            q_z = dist.Categorical(torch.ones(3)) if discrete else dist.Normal(0.8, 0.9)
            pyro.sample("z", q_z)

    x = torch.randn(5)
    if discrete:
        z = torch.tensor([1.0, 2.0])
        exact = dist.Normal(z, 1.0).log_prob(x[:, None]).logsumexp(-1) - torch.tensor(3.0).log()
    else:  # z is N(x / 2, 1 / 2) given x
        above = dist.Normal(0.0, 1.0).cdf((x / 2 - cut) * 2**0.5)
        exact = dist.Normal(0.0, 2**0.5).log_prob(x) + above.log()
    found = pv.evidence(model, guide, x, num_particles=20_000, method=method, seed=0)
    assert ((found.values - exact).abs() < 5 * found.monte_carlo_errors).all()
    with pytest.raises(ValueError, match=r"'constraint' has a log-density of -inf.*a factor excl"):
        pv.fit(model, guide, x.repeat(10), epochs=1, progress=False)


@pytest.mark.parametrize("name", ["f", "g"])
def test_a_factor_of_the_guide_cannot_exclude_samples(name):
    """Also if the model has a factor of the same name."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor(name, z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(z < 0, -torch.inf, 0.0), has_rsample=True)

    with pytest.raises(ValueError, match=r"'f' has a log-density of -inf"):
        pv.evidence(model, guide, torch.randn(50), num_particles=10)


@pytest.mark.parametrize("inside_event", [False, True])
def test_masked_samples_outside_add_nothing(inside_event):
    mask = torch.tensor([True, False])

    def masked(fn):
        if inside_event:
            return fn.expand([2, 2]).mask(mask[:, None].expand(2, 2)).to_event(1)
        return fn.expand([2, 2]).to_event(1).mask(mask)

    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", masked(dist.Exponential(1.0)))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0).mask(mask), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("z", masked(dist.Normal(0.8, 0.8)))

    t = pv.terms(model, guide, torch.ones(2), num_particles=100)
    assert (t.samples["z"][:, 1] < 0).any()
    assert not t.log_weight[:, 1].any()
    assert (t.log_weight[:, 0] == -torch.inf).any()


def test_support_that_changes_after_the_first_call_is_refused():
    class Encoder(torch.nn.Module):
        def forward(self, x, top):
            return x[:, None]

    def model(x, top):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, top = torch.rand(12), torch.tensor([1.0] * 6 + [4.0] * 6)
    guide = pv.guides.AmortizedNormal(model, Encoder())
    with pytest.raises(ValueError, match="'z' has another support"):
        pv.evidence(model, guide, (x, top), num_particles=50, batch_size=6, seed=0)
    pv.evidence(model, guide, (x[:6], top[:6]), num_particles=50, batch_size=3, seed=0)


@pytest.mark.parametrize("objective", ["DReG", "PIWAE", "ReweightedWakeSleep", "IWAE", "VIMCO"])
def test_zero_weights_keep_bound_and_gradient_finite(objective):
    loc = torch.tensor(1.0, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(1.5, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    made = getattr(objectives, objective)
    losses = []
    for each in (made(1, 50) if objective == "PIWAE" else made(50), objectives.IWAE(50)):
        each.loss(model, guide, torch.rand(20))
        torch.manual_seed(3)
        losses.append(each.differentiable_loss(model, guide, torch.linspace(0, 1, 20)))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    losses[0].backward()
    assert loc.grad.isfinite()


@pytest.mark.skipif(
    not hasattr(dist, "GeneralizedPareto"), reason="this torch has no GeneralizedPareto"
)
@pytest.mark.parametrize("library", [True, False])
def test_evidence_on_a_half_line_matches_quadrature(library):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.GeneralizedPareto(0.0, 1.0, 0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def normal_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5, 0.8))

    encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), pv.nets.MLP(1, [4]))
    guide = pv.guides.AmortizedNormal(model, encoder) if library else normal_guide
    x = torch.rand(5)
    z = (torch.arange(200_000, dtype=torch.float64) + 0.5) * 1e-4
    log_joint = dist.GeneralizedPareto(0.0, 1.0, 0.3).log_prob(z)
    log_joint = log_joint + dist.Normal(z, 1.0).log_prob(x.double()[:, None])
    exact = log_joint.logsumexp(-1) + torch.tensor(1e-4).log()
    found = pv.evidence(model, guide, x, num_particles=5000, seed=0)
    assert ((found.values - exact).abs() < 5 * found.monte_carlo_errors).all()
