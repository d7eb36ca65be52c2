"""The true supports of latents: densities integrate to one, and guides sample inside."""

import math

import distribution_table as table
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as T

import pyro_vae as pv
from pyro_vae import guides
from pyro_vae.distributions._circular import CircleTransform, WrappedNormal, circle
from pyro_vae.distributions._supports import is_angle, support_of

# Angles, which have a wrapped normal guide.
ANGLES = ["VonMises", "SineBivariateVonMises", "SineSkewed", "MixtureSameFamily, angles",
          "DiscreteHMM, angles"]  # fmt: skip


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def model_of(make):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", make())
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

    return model


def guide_of(make, cls=guides.AmortizedNormal):
    guide = cls(model_of(make), pv.nets.MLP(1, [4]))
    return guide, poutine.trace(guide).get_trace(torch.randn(3, 1)).nodes["z"]


def points(dim):
    """Return points of R^dim and their log-weights: a grid, or samples of a wide density."""
    if dim > 2:
        proposal = dist.StudentT(2.0, torch.zeros(dim), 1.5).to_event(1)
        u = proposal.sample((40_000,))
        return u, -proposal.log_prob(u) - math.log(len(u))
    s = torch.linspace(-11.0, 11.0, 2001 if dim == 1 else 161)
    axis, weight = s.sinh() / 8, (s.cosh() / 8 * (s[1] - s[0])).log()
    u = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return u, torch.cartesian_prod(*[weight] * dim).reshape(-1, dim).sum(-1)


def integral(log_prob, support, event_shape):
    """Return the integral of a density over a support, and its standard error."""
    bijection = biject_to(support)
    shape = bijection.inverse_shape(torch.Size(event_shape))
    u, log_weight = points(shape.numel())
    u = u.reshape(-1, *shape)
    values = bijection(u)
    change = bijection.log_abs_det_jacobian(u, values)
    if change.dim() > 1:
        change = change.flatten(1).sum(1)
    kept = values.flatten(1).isfinite().all(1) if values.dim() > 1 else values.isfinite()
    kept = kept & support.check(values)
    if support.event_dim == 0 and support is not constraints.real:  # a power may overflow
        kept = kept & (values.abs() > 1e-150) & (values.abs() < 1e150)
    terms = (log_prob(values[kept]) + change[kept] + log_weight[kept]).exp().nan_to_num(nan=0.0)
    error = 0.0 if shape.numel() <= 2 else terms.std().item() * math.sqrt(len(terms))
    return terms.sum().item(), error


def test_the_table_names_every_distribution():
    named = {name.split(",")[0] for name in (*table.GUIDED, *table.REFUSED)}
    assert table.names() <= named, f"new: {table.names() - named}"


@pytest.mark.parametrize("name", table.GUIDED)
def test_density_and_guide_integrate_to_one_on_the_true_support(name):
    make = table.GUIDED[name]
    fn = make()
    support = support_of(fn)
    total, error = integral(fn.log_prob, support, fn.event_shape)
    # Six standard errors fail once in 500 million; 2e-3 is the error of quadrature.
    assert abs(total - 1) < 6 * error + 2e-3, f"{total} ± {error}"
    _, site = guide_of(make)
    q, z = site["fn"], site["value"]
    inside = support.check(z.detach())
    assert inside.all()
    drawn = q.log_prob(z)
    assert drawn.isfinite().all()
    torch.testing.assert_close(drawn, q.log_prob(z.detach().clone()), rtol=1e-6, atol=1e-6)
    total, error = integral(lambda z: q.log_prob(z.unsqueeze(1))[:, 0], support, fn.event_shape)
    assert abs(total - 1) < 6 * error + 2e-3, f"{total} ± {error}"
    inner = q
    while isinstance(inner, torch.distributions.Independent):
        inner = inner.base_dist
    assert isinstance(inner, WrappedNormal) is (name in ANGLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, make in table.GUIDED.items() if not make().event_shape])
def test_guide_samples_and_scores_several_numbers(name):
    make = table.GUIDED[name]
    _, site = guide_of(lambda: make().expand([2]).to_event(1))
    z = site["value"]
    assert z.shape == (3, 2)
    assert support_of(make()).check(z).all()
    scores = site["fn"].log_prob(z.detach().clone())
    torch.testing.assert_close(site["fn"].log_prob(z), scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", table.REFUSED)
def test_distribution_without_a_density_on_an_open_set_is_refused(name):
    make, reason = table.REFUSED[name]
    model = model_of(make)
    guide = guides.AmortizedNormal(model, pv.nets.MLP(1, [4]))
    with pytest.raises(ValueError, match=reason) as raised:
        pv.fit(model, guide, torch.randn(3, 1), epochs=1, batch_size=3, progress=False)
    if reason not in (table.NOT_RUN, table.BROKEN):
        assert "'z'" in str(raised.value)


def transformed(base, *steps):
    return dist.TransformedDistribution(base, list(steps))


UNIFORM = dist.Uniform(0.2, 0.5)
# A chain of transforms, and the ends of its true support.
CHAINS = {
    "negative scale": (
        lambda: transformed(dist.Gamma(2.0, 1.0), T.AffineTransform(3.0, -1.0)), -math.inf, 3.0),
    "shift": (lambda: transformed(dist.Gamma(2.0, 1.0), T.AffineTransform(3.0, 2.0)),
              3.0, math.inf),
    "interval": (lambda: transformed(UNIFORM, T.AffineTransform(1.0, -2.0)), 0.0, 0.6),
    "exp": (lambda: transformed(dist.Uniform(-1.0, 2.0), T.ExpTransform()),
            math.exp(-1), math.exp(2)),
    "log": (lambda: transformed(UNIFORM, T.ExpTransform().inv), math.log(0.2), math.log(0.5)),
    "log of a Gamma": (lambda: transformed(dist.Gamma(2.0, 1.0), T.ExpTransform().inv),
                       -math.inf, math.inf),
    "sigmoid": (lambda: transformed(dist.Gamma(2.0, 1.0), T.SigmoidTransform()), 0.5, 1.0),
    "sigmoid of a negative": (
        lambda: transformed(dist.Gamma(2.0, 1.0), T.AffineTransform(0.0, -1.0),
                            T.SigmoidTransform()), 0.0, 0.5),
    "logit": (lambda: transformed(dist.Beta(2.0, 3.0), T.SigmoidTransform().inv),
              -math.inf, math.inf),
    "tanh": (lambda: transformed(dist.Gamma(2.0, 1.0), T.TanhTransform()), 0.0, 1.0),
    "softplus": (lambda: transformed(dist.Gamma(2.0, 1.0), T.SoftplusTransform()),
                 math.log(2), math.inf),
    "power": (lambda: transformed(UNIFORM, T.PowerTransform(-1.0)), 2.0, 5.0),
    "power of a tail": (lambda: transformed(dist.Pareto(2.0, 3.0), T.PowerTransform(-1.0)),
                        0.0, 0.5),
    "exp and shift": (lambda: transformed(dist.Normal(0.0, 1.0), T.ExpTransform(),
                                          T.AffineTransform(1.0, 2.0)), 1.0, math.inf),
    "real": (lambda: transformed(dist.Normal(0.0, 1.0), T.AffineTransform(1.0, -2.0)),
             -math.inf, math.inf),
    "nested": (
        lambda: transformed(transformed(dist.Gamma(2.0, 1.0), T.AffineTransform(0.0, -1.0)),
                            T.ComposeTransform([T.ExpTransform(), T.AffineTransform(1.0, -1.0)])),
        0.0, 1.0),
    "wrapped": (
        lambda: transformed(dist.Gamma(2.0, 1.0).mask(True).expand([1]).to_event(1),
                            T.AffineTransform(3.0, -1.0, event_dim=1)).mask(True),
        -math.inf, 3.0),
    "half an angle": (lambda: transformed(dist.VonMises(1.0, 2.0), T.AffineTransform(0.0, 0.5)),
                      -math.pi / 2, math.pi / 2),
    "folded": (lambda: dist.FoldedDistribution(dist.Uniform(-3.0, 1.0, validate_args=False)),
               0.0, 3.0),
    "reshaped": (
        lambda: transformed(dist.Gamma(torch.ones(2), 1.0).to_event(1),
                            T.AffineTransform(1.0, -1.0), T.ReshapeTransform((2,), (2, 1))),
        -math.inf, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_support_of_a_chain_of_transforms(name):
    make, low, high = CHAINS[name]
    fn = make()
    support = support_of(fn)
    shape = biject_to(support).inverse_shape(fn.event_shape)
    ends = (biject_to(support)(torch.full(shape, end)).flatten()[0] for end in (-800.0, 800.0))
    ends = sorted(math.copysign(math.inf, end) if abs(end) > 700 else end.item() for end in ends)
    assert ends == pytest.approx([low, high])
    assert support.event_dim == len(fn.event_shape)
    total, error = integral(fn.log_prob, support, fn.event_shape)
    assert abs(total - 1) < 6 * error + 2e-3
    _, site = guide_of(make)
    assert support.check(site["value"]).all()


NO_SUPPORT = {
    "absolute": (lambda: transformed(dist.Normal(0.0, 1.0), T.AbsTransform()), "not one-to-one"),
    "softmax": (
        lambda: transformed(dist.Normal(torch.zeros(3), 1.0).to_event(1), T.SoftmaxTransform()),
        "not one-to-one"),
    "power of a negative number": (
        lambda: transformed(dist.Normal(0.0, 1.0), T.PowerTransform(2.0)), "is defined on"),
    "elu": (lambda: transformed(dist.Normal(0.0, 1.0), dist.transforms.ELUTransform()), "at -1"),
    "ordered positive numbers": (
        lambda: transformed(dist.Gamma(torch.ones(3), 1.0).to_event(1),
                            dist.transforms.OrderedTransform()), "not a named constraint"),
    "bounded in part": (
        lambda: dist.GeneralizedPareto(0.0, 1.0, torch.tensor([0.3, -0.3])).to_event(1),
        "for some elements"),
    "flow without an inverse": (
        lambda: transformed(dist.Normal(torch.zeros(2), 1.0).to_event(1), PLANAR),
        "TransformedDistribution of Planar, which cannot score"),
    "points": (lambda: dist.Delta(torch.zeros(2)).to_event(1), "pyro.deterministic"),
    "an angle by a user": (lambda: Cardioid(torch.zeros(())), "repeats itself every 2 pi"),
    "no support": (lambda: Stateless(torch.zeros(()), 1.0), "Stateless states no support"),
}  # fmt: skip
if not hasattr(dist, "GeneralizedPareto"):  # added by a torch after 2.4
    del NO_SUPPORT["bounded in part"]
PLANAR = dist.transforms.planar(2).double()


class Cardioid(dist.TorchDistribution):
    """Angles, with the real line as the stated support."""

    arg_constraints = {"loc": constraints.real}  # noqa: RUF012
    support = constraints.real

    def __init__(self, loc, validate_args=None):
        self.loc = loc
        super().__init__(loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape))

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return dist.VonMises(self.loc, 0.5).sample(sample_shape)

    def log_prob(self, value):
        return torch.log1p(0.8 * (value - self.loc).cos()) - math.log(2 * math.pi)


class CardioidOnTheCircle(Cardioid):
    support = circle


class Stateless(dist.Normal):
    @property
    def support(self):
        raise NotImplementedError


@pytest.mark.parametrize("name", NO_SUPPORT)
def test_unknown_support_is_refused_by_name(name):
    make, reason = NO_SUPPORT[name]
    model = model_of(make)
    guide = guides.AmortizedNormal(model, pv.nets.MLP(1, [4]))
    with pytest.raises(ValueError, match=reason) as raised:
        pv.fit(model, guide, torch.randn(3, 1), epochs=1, batch_size=3, progress=False)
    assert "'z'" in str(raised.value)


def test_user_distribution_of_angles_has_a_wrapped_guide():
    _, site = guide_of(lambda: CardioidOnTheCircle(torch.zeros(())))
    assert isinstance(site["fn"], WrappedNormal)


def test_prior_of_a_flow_without_an_inverse_is_refused():
    model = model_of(lambda: transformed(dist.Normal(torch.zeros(2), 1.0).to_event(1), PLANAR))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for run in (pv.terms, pv.evidence):
        with pytest.raises(ValueError, match=r"'z' has the distribution .* of Planar"):
            run(model, guide, torch.randn(3, 1))


def test_observation_without_a_support_warns():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Stateless(z, 1.0), obs=x[:, 0])

    x = torch.randn(20, 1)
    guide = guides.AmortizedNormal(model, pv.nets.MLP(1, [4]))
    with pytest.warns(UserWarning, match="does not define `support`"):
        pv.fit(model, guide, x, epochs=1, batch_size=10, progress=False)
    t = pv.terms(model, guide, x, num_particles=3)
    torch.testing.assert_close(t.log_likelihood, dist.Normal(t.samples["z"], 1.0).log_prob(x[:, 0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: dist.Uniform(0.0, p),
        lambda p: transformed(dist.Gamma(2.0, 1.0), T.AffineTransform(p, 1.0)),
    ],
)
def test_learned_support_is_refused(make):
    width = nn.Parameter(torch.tensor(2.0))
    guide = guides.AmortizedNormal(model_of(lambda: make(width.exp())), pv.nets.MLP(1, [4]))
    with pytest.raises(ValueError, match="depends on parameters"):
        guide(torch.randn(3, 1))


def test_learned_scale_keeps_a_positive_support():
    width = nn.Parameter(torch.tensor(2.0))
    _, site = guide_of(
        lambda: transformed(dist.Gamma(2.0, 1.0), T.AffineTransform(0.0, width.exp()))
    )
    assert (site["value"] > 0).all()


@pytest.mark.parametrize("after", [[], [T.ExpTransform()]])
@pytest.mark.parametrize("name", ["affine_coupling", "affine_autoregressive"])
def test_flow_over_the_reals_keeps_its_support(name, after):
    f = getattr(dist.transforms, name)(2, hidden_dims=[4]).double()

    def make():
        return transformed(dist.Normal(torch.zeros(2), 1.0).to_event(1), f, *after)

    _, site = guide_of(make)
    assert support_of(make()).check(site["value"]).all()


def test_infinite_bounds_are_recognized():
    low = torch.tensor([[0.0], [-math.inf], [-math.inf], [2.0]])
    high = torch.tensor([[math.inf], [1.0], [math.inf], [5.0]])
    wanted = [constraints.greater_than, constraints.less_than, type(constraints.real),
              constraints.interval]  # fmt: skip
    for lower, upper, kind in zip(low, high, wanted, strict=True):

        class Bounded(dist.Normal):
            support = constraints.interval(lower, upper)

        found = support_of(Bounded(torch.zeros(1), 1.0))
        assert type(found) is kind, found


def test_angles_are_recognized():
    angle = dist.VonMises(torch.zeros(2), 1.0)
    numbers = torch.distributions.Uniform(-math.pi * torch.ones(2), math.pi)
    weights = dist.Categorical(torch.ones(2))
    angles = [
        *(table.GUIDED[name]() for name in ANGLES),
        angle.to_event(1),
        angle.mask(torch.tensor([True, False])),
        pv.distributions.NanMasked(angle),
        CardioidOnTheCircle(torch.zeros(2)),
        transformed(dist.Normal(0.0, 1.0), CircleTransform()),
        dist.MixtureSameFamily(weights, WrappedNormal(torch.zeros(2), 1.0)),
    ]
    assert all(is_angle(fn) for fn in angles)
    others = [
        numbers,
        transformed(angle, T.AffineTransform(0.0, 1.0)),
        dist.MixtureSameFamily(weights, numbers),
        dist.Normal(0.0, 1.0),
        weights,
        dist.Delta(torch.zeros(())),
        Stateless(torch.zeros(()), 1.0),
    ]
    assert not any(is_angle(fn) for fn in others)
