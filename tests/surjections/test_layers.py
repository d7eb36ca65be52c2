"""Compare flows, surjections and VAEs as layers of one pair with closed forms."""

import copy
import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same
from oracles import LinearGaussian, assert_within
from torch import nn
from torch.distributions import transforms

import pyro_vae as pv
from pyro_vae.surjections._dequantization import _Grid
from pyro_vae.surjections._images import _ORIGINS


class Gaussian(nn.Module):
    """A learned prior without arguments; with a value, a Gaussian whose mean is a network."""

    def __init__(self, inputs, outputs=None, dtype=torch.float64):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(inputs, dtype=dtype))
        self.raw = nn.Parameter(0.3 * torch.randn(outputs or inputs, dtype=dtype))
        self.net = outputs and pv.nets.MLP(inputs, [6], outputs).to(dtype)

    def forward(self, value=None):
        loc = self.loc if value is None else self.net(value)
        return dist.Normal(loc, self.raw.exp()).to_event(1)


class Affine(nn.Module):
    """A module that returns a torch transform with parameters."""

    def __init__(self, dim):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(dim))
        self.raw = nn.Parameter(torch.randn(dim))

    def forward(self):
        return transforms.AffineTransform(self.loc, self.raw.exp() * torch.tensor([1.0, -1, 1]))


FLOWS = {
    "affine": Affine,
    "affine coupling": functools.partial(pv.flows.Composition, length=3),
    "spline coupling": functools.partial(
        pv.flows.Composition, flow=pv.flows.NeuralSpline, length=2
    ),
    "autoregressive spline": functools.partial(
        pv.flows.Composition,
        flow=functools.partial(pv.flows.NeuralSpline, autoregressive=True),
        length=2,
    ),
}


def flow_pair(kind, layers=None):
    flow = FLOWS[kind](3)
    for parameter in flow.parameters():  # far from the identity
        parameter.data += 0.3 * torch.randn_like(parameter)
    model = pv.surjections.FlowModel(Gaussian(3), flow if layers is None else layers(flow)).double()
    return model, pv.surjections.FlowGuide(model)


def exact_log_p(model, x):
    """Return log p(f(x)) + log|det J_f(x)| by autograd, differentiable."""
    f = model.layers[0].transform
    jacobians = [
        torch.autograd.functional.jacobian(lambda row: f(row[None])[0], row, create_graph=True)
        for row in x
    ]
    return model.prior().log_prob(f(x.clone())) + torch.stack(jacobians).slogdet()[1]


def exact_log_p_under_normal_prior(f, x):
    jacobians = torch.stack([torch.autograd.functional.jacobian(f, row) for row in x])
    z = torch.stack([f(row) for row in x])
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + jacobians.slogdet()[1]


def gradients(value, module):
    found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(found, module.parameters(), strict=True)
    ]


def assert_exact(model, guide, x, expected, num_particles=3):
    """Assert that every particle has the weight p(x)."""
    log_weight = pv.terms(model, guide, x, num_particles=num_particles).log_weight
    torch.testing.assert_close(log_weight, expected.expand(num_particles, -1), rtol=1e-9, atol=1e-9)


def assert_evidence(model, guide, x, expected, num_particles=20_000):
    """Assert that the evidence of each data point is log p(x) within 4.5 errors."""
    estimate = pv.evidence(model, guide, x, num_particles=num_particles, capture=False, seed=0)
    assert (estimate.monte_carlo_errors < 0.05).all()
    distance = (estimate.values - expected).abs()
    assert (distance < 4.5 * estimate.monte_carlo_errors + 1e-6).all()


def flows_and_objectives():
    """Yield all combinations. By default, run each flow, and each objective with one flow."""
    objectives = (
        pv.objectives.ELBO(),
        pv.objectives.IWAE(4),
        pv.objectives.MeanFieldELBO(),
        pv.objectives.StickingTheLanding(),
        pyro.infer.Trace_ELBO(),
    )
    for kind, objective in itertools.product(FLOWS, objectives):
        default = objective is objectives[0] or kind == "affine coupling"
        name = f"{kind}-{type(objective).__name__}"
        yield pytest.param(kind, objective, id=name, marks=() if default else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "objective"), list(flows_and_objectives()))
def test_elbo_of_a_flow_equals_its_log_likelihood_in_value_and_gradient(kind, objective):
    model, guide = flow_pair(kind)
    x = torch.randn(5, 3, dtype=torch.float64)
    exact = exact_log_p(model, x).sum()
    loss = objective.differentiable_loss(model, guide, x)
    torch.testing.assert_close(-loss, exact, rtol=1e-9, atol=0)
    found, expected = gradients(-loss, model), gradients(exact, model)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert sum(g.abs().sum() > 0 for g in expected) >= 4  # prior and flow


@pytest.mark.parametrize("kind", FLOWS)
def test_evidence_of_a_flow_is_exact_with_one_particle(kind):
    model, guide = flow_pair(kind)
    x = torch.randn(7, 3, dtype=torch.float64)
    estimate = pv.evidence(model, guide, x, num_particles=1, seed=0)
    expected = exact_log_p(model, x).detach()
    torch.testing.assert_close(estimate.values, expected, rtol=1e-9, atol=0)
    many = pv.evidence(model, guide, x, num_particles=20, seed=0)
    torch.testing.assert_close(many.values, estimate.values)
    assert (many.monte_carlo_errors < 1e-6).all()


@pytest.mark.parametrize("kind", FLOWS)
def test_bijection_inverts_and_scores_samples_without_recorded_origins(kind):
    model, guide = flow_pair(kind)
    x = pv.generate(model, torch.zeros(6, 3, dtype=torch.float64), seed=1)
    layer = model.layers[0]
    z = layer.infer(x).rsample()
    torch.testing.assert_close(layer.generate(z.clone()).rsample(), x)
    torch.testing.assert_close(pv.reconstruct(model, guide, x), x)
    for density, value in ((layer.infer(x), z), (layer.generate(z), x)):
        torch.testing.assert_close(density.log_prob(value), density.log_prob(value.clone()))
    untagged = layer.generate(z.clone()).log_prob(x)
    torch.testing.assert_close(untagged, layer.generate(z).log_prob(x))
    assert (layer.infer(x).log_prob(z + 1e-3) == -math.inf).all()
    assert (layer.generate(z + 1e-3).log_prob(x) == -math.inf).all()


def test_layers_map_data_once_for_all_particles():
    shapes = []

    class Counted(pv.flows.FlowTransform):
        def map(self, x):
            shapes.append(tuple(x.shape))
            return 2 * x, torch.full(x.shape[:-1], 3 * math.log(2))

    model = pv.surjections.FlowModel(pv.priors.StandardNormal(3), [lambda_module(Counted)] * 2)
    terms = pv.terms(
        model, pv.surjections.FlowGuide(model), torch.randn(5, 3), num_particles=4, plate_nesting=1
    )
    assert terms.log_weight.shape == (4, 5)
    shapes.clear()  # of the runs that compare particles with single runs
    terms = pv.terms(
        model,
        pv.surjections.FlowGuide(model),
        torch.randn(5, 3),
        num_particles=4,
        plate_nesting=1,
        vectorize_particles=True,
    )
    assert shapes == [(5, 3), (1, 5, 3)]


def lambda_module(make):
    module = nn.Module()
    module.forward = make
    return module


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: lambda_module(lambda: f)])
def test_cached_transforms_are_recomputed_after_an_update(wrap):
    """Pyro's transforms cache their last input, and x is the same tensor at every step."""
    spline = dist.transforms.spline_coupling(3, 1, [5]).double()
    prior = lambda: dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)  # noqa: E731
    model = pv.surjections.FlowModel(prior, wrap(spline))
    guide = pv.surjections.FlowGuide(model)
    x = torch.randn(6, 3, dtype=torch.float64)
    first = pv.terms(model, guide, x).log_weight
    with torch.no_grad():
        for parameter in spline.parameters():
            parameter += torch.randn_like(parameter)
    second = pv.terms(model, guide, x).log_weight
    assert (first - second).abs().max() > 1e-3
    expected = exact_log_p_under_normal_prior(lambda row: spline(row[None].clone())[0], x)
    torch.testing.assert_close(second[0], expected, rtol=1e-8, atol=1e-8)


def test_inverse_transforms_are_trained_and_copied():
    """In torch, the inverse of a module is not a module and loses its link when copied."""
    learned = dist.transforms.affine_coupling(3, [5]).double()
    scale = transforms.AffineTransform(0.3, 2.0)
    radial = pv.flows.Radial(3)(torch.randn(5).double())
    f = transforms.ComposeTransform([learned.inv, scale, radial])
    prior = lambda: dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)  # noqa: E731
    shift = transforms.AffineTransform(30.0, 1.0)  # into the domain of the logarithm
    model = pv.surjections.FlowModel(prior, [f.inv, shift, transforms.ExpTransform().inv, f])
    assert {id(p) for p in model.parameters()} == {id(p) for p in learned.parameters()}
    x = torch.rand(6, 3, dtype=torch.float64)
    guide = pv.surjections.FlowGuide(model)
    log_weight = pv.terms(model, guide, x).log_weight[0]
    twins = copy.deepcopy((model, guide))
    torch.testing.assert_close(pv.terms(*twins, x).log_weight[0], log_weight)
    exact = exact_log_p_under_normal_prior(lambda row: f((f.inv(row[None]) + 30.0).log())[0], x)
    torch.testing.assert_close(log_weight, exact, rtol=1e-8, atol=1e-8)


def test_inverse_sigmoid_maps_the_unit_cube_to_the_reals():
    squash = transforms.SigmoidTransform().inv
    model = pv.surjections.FlowModel(Gaussian(3), squash)
    guide = pv.surjections.FlowGuide(model)
    x = torch.rand(5, 3, dtype=torch.float64)
    expected = model.prior().log_prob(x.logit()) - (x.log() + (1 - x).log()).sum(-1)
    assert_exact(model, guide, x, expected.detach())
    x[4, 2] = 1.5
    with pytest.raises(ValueError, match="outside the support of site 'x'"):
        pv.fit(model, guide, x, progress=False, batch_size=2)
    assert pv.terms(model, guide, x).log_weight[0, 4] == -math.inf


def test_reshape_and_image_transforms():
    prior = lambda: dist.Normal(torch.zeros(4, 4), 2.0).to_event(2)  # noqa: E731
    reshape = transforms.ReshapeTransform((16,), (4, 4))
    model = pv.surjections.FlowModel(
        prior, [reshape, pv.surjections.Bijection(transforms.AffineTransform(0.3, 2.0), 2)]
    )
    x = torch.randn(5, 16)
    expected = prior().log_prob((0.3 + 2 * x).reshape(5, 4, 4)) + 16 * math.log(2)
    log_weight = pv.terms(model, pv.surjections.FlowGuide(model), x).log_weight[0]
    torch.testing.assert_close(log_weight, expected)
    assert pv.generate(model, x).shape == (5, 16)


def test_images_pass_through_dequantization_and_bijections():
    images = torch.randint(8, (5, 1, 4, 4)) / 7
    squash = pv.surjections.Bijection(transforms.SigmoidTransform().inv, event_dim=3)
    layers = [pv.surjections.UniformDequantization(8, event_dim=3), squash]
    model = pv.surjections.FlowModel(pv.priors.StandardNormal(1, 4, 4), layers)
    guide = pv.surjections.FlowGuide(model)
    log_weight = pv.terms(model, guide, images, num_particles=3).log_weight
    assert log_weight.shape == (3, 5)
    assert log_weight.isfinite().all()
    assert pv.generate(model, images).shape == images.shape
    with pytest.raises(ValueError, match="event_dim does not fit"):
        pv.surjections.FlowModel(pv.priors.StandardNormal(1, 4, 4), [layers[0], squash.transform])(
            images
        )


def test_svi_step_is_a_maximum_likelihood_step():
    model, guide = flow_pair("affine coupling")
    x = torch.randn(8, 3, dtype=torch.float64)
    expected = [
        p.detach() + 1e-3 * g
        for p, g in zip(
            model.parameters(), gradients(exact_log_p(model, x).sum(), model), strict=True
        )
    ]
    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    svi.step(x)
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)


# Dequantization


def cells(prior, levels, x):
    """Return the log-mass of a product of Gaussians in the cells of x."""
    low = (x * (levels - 1)).round() / levels
    mass = prior.cdf(low + 1 / levels) - prior.cdf(low)
    return mass.log().sum(-1)


def grid(levels, dim):
    values = torch.linspace(0, 1, levels, dtype=torch.float64)
    return torch.cartesian_prod(*[values] * dim)


def variational(levels, dim=2):
    return pv.surjections.VariationalDequantization(levels, Gaussian(dim, dim))


def logistic(levels):
    """Return a layer with heavy-tailed noise; Gaussian noise has weights of infinite variance."""
    net = pv.nets.MLP(2, [5], 2).double()
    return pv.surjections.VariationalDequantization(
        levels, lambda x: dist.Logistic(net(x), 1.3).to_event(1)
    )


@pytest.mark.parametrize("make", [pv.surjections.UniformDequantization, logistic])
def test_evidence_of_dequantized_data_is_the_mass_of_the_cell(make):
    base = dist.Normal(torch.tensor([0.4, 0.7], dtype=torch.float64), 0.3)
    layer = make(4)
    model = pv.surjections.FlowModel(lambda: base.to_event(1), layer)
    x = grid(4, 2)
    assert_evidence(model, pv.surjections.FlowGuide(model), x, cells(base, 4, x))


def test_probabilities_sum_to_one_over_the_grid():
    cube = lambda: dist.Uniform(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)  # noqa: E731
    model = pv.surjections.FlowModel(cube, pv.surjections.UniformDequantization(5))
    log_p = pv.terms(model, pv.surjections.FlowGuide(model), grid(5, 3)).log_weight[0]
    torch.testing.assert_close(log_p, torch.full_like(log_p, -3 * math.log(5)))
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))


def test_variational_noise_density_uses_the_change_of_variables():
    layer = variational(8, dim=3)
    x = (torch.randint(8, (6, 3)) / 7).double()
    q = layer.infer(x)
    z = q.rsample()
    u = 8 * z - (7 * x).round()
    v = u.logit()
    expected_log_q = layer.noise(x).log_prob(v) - (u * (1 - u)).log().sum(-1) + 3 * math.log(8)
    torch.testing.assert_close(q.log_prob(z), expected_log_q)
    torch.testing.assert_close(q.log_prob(z.clone()), expected_log_q)
    assert (q.log_prob(z + 1) == -math.inf).all()
    assert (layer.generate(z).log_prob(x) == 0).all()
    assert (
        layer.generate(z).log_prob(x.roll(1, 0))[(x != x.roll(1, 0)).any(-1)] == -math.inf
    ).all()


def test_noise_from_a_flow_without_an_inverse_is_scored_at_its_samples():
    """Pyro's planar flows can invert only their last output."""
    planar = dist.transforms.Planar(3).double()

    def noise(x):
        return dist.TransformedDistribution(dist.Normal(x, 1.0).to_event(1), [planar])

    x = grid(4, 3)[:20]
    for layer in (
        pv.surjections.VariationalDequantization(4, noise),
        pv.surjections.Augment(3, noise),
    ):
        q = layer.infer(x).expand(torch.Size([7, 20]))
        z = q.rsample()
        log_q = q.log_prob(z)
        assert log_q.shape == (7, 20)
        with pytest.raises((KeyError, NotImplementedError)):
            q.log_prob(z.clone())
    e = z[..., 3:]  # in the last layer, z = (x, e) with e = f(v)
    v = e.clone()  # found as a fixed point
    for _ in range(200):
        v = v - 0.5 * (planar(v.clone()) - e)
    torch.testing.assert_close(planar(v.clone()), e)
    v = v.detach().clone()
    log_det = planar.log_abs_det_jacobian(v, planar(v))
    torch.testing.assert_close(log_q, dist.Normal(x, 1.0).log_prob(v).sum(-1) - log_det)


def test_integer_levels_equal_scaled_levels():
    model = pv.surjections.FlowModel(
        pv.priors.StandardNormal(4), pv.surjections.UniformDequantization(256)
    )
    guide = pv.surjections.FlowGuide(model)
    numbers = torch.randint(256, (5, 4), dtype=torch.uint8)
    torch.manual_seed(1)
    whole = pv.terms(model, guide, numbers, num_particles=3).log_weight
    torch.manual_seed(1)
    between = pv.terms(model, guide, numbers / 255, num_particles=3).log_weight
    torch.testing.assert_close(whole, between)
    assert whole.isfinite().all()


def test_rounding_keeps_values_in_their_cell():
    layer = pv.surjections.UniformDequantization(256)
    x = torch.arange(256).repeat_interleave(20)[:, None] / 255
    ends = torch.tensor([0.0, 1.0, 1e-8, 1 - 1e-7]).repeat(256 * 5)[:, None]
    z = layer.join(x, ends)
    assert (layer.generate(z).log_prob(x) == 0).all()
    assert ((z > 0) & (z < 1)).all()
    torch.testing.assert_close(layer.generate(z).sample(), x)


def test_data_off_the_grid_are_refused():
    model = pv.surjections.FlowModel(
        pv.priors.StandardNormal(4), pv.surjections.UniformDequantization(16)
    )
    x = torch.randint(16, (20, 4)) / 15
    assert _Grid(model.layers[0]).check(x).all()
    x[7, 2] += 0.01
    with pytest.raises(ValueError, match=r"outside the support of site 'x', .*16 levels.*row 7"):
        pv.fit(model, pv.surjections.FlowGuide(model), x, progress=False, batch_size=5)


# Surjections


def test_slice_has_the_exact_log_likelihood():
    model = pv.surjections.FlowModel(
        Gaussian(2), pv.surjections.Slice(2, Gaussian(2, 3), conditional=True)
    )
    x = torch.randn(6, 5, dtype=torch.float64)
    noise = model.layers[0].noise
    expected = model.prior().log_prob(x[:, :2]) + noise(x[:, :2]).log_prob(x[:, 2:])
    assert_exact(model, pv.surjections.FlowGuide(model), x, expected.detach())


def test_slice_with_unconditional_noise_has_the_exact_log_likelihood():
    model = pv.surjections.FlowModel(Gaussian(2), pv.surjections.Slice(2, Gaussian(3)))
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = model.prior().log_prob(x[:, :2]) + model.layers[0].noise().log_prob(x[:, 2:])
    assert_exact(model, pv.surjections.FlowGuide(model), x, expected.detach())


def test_augment_integrates_over_the_added_dimensions():
    """z = (x, e) is a correlated Gaussian, so log p(x) and the optimal q(e|x) are known."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    prior = lambda: dist.MultivariateNormal(torch.zeros(2).double(), covariance)  # noqa: E731
    scale = (0.8 - 0.36) ** 0.5
    best = pv.surjections.Augment(1, lambda x: dist.Normal(0.6 * x, scale).to_event(1))
    other = pv.surjections.Augment(
        1, lambda: dist.Normal(torch.zeros(1).double(), 1.2).to_event(1), False
    )
    x = torch.randn(6, 1, dtype=torch.float64)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    model = pv.surjections.FlowModel(prior, best)
    assert_exact(model, pv.surjections.FlowGuide(model), x, expected)
    model = pv.surjections.FlowModel(prior, other)
    assert_evidence(model, pv.surjections.FlowGuide(model), x, expected)


def test_absolute_has_the_exact_log_likelihood():
    x = torch.randn(6, 3, dtype=torch.float64)
    prior = lambda: dist.Gamma(torch.full((3,), 2.0).double(), 1.5).to_event(1)  # noqa: E731
    magnitude = prior().log_prob(x.abs())
    model = pv.surjections.FlowModel(prior, pv.surjections.Absolute())
    assert_exact(model, pv.surjections.FlowGuide(model), x, magnitude - 3 * math.log(2))
    signs = pv.nets.MLP(3, [5], 3).double()
    model = pv.surjections.FlowModel(prior, pv.surjections.Absolute(signs))
    chosen = signs(x.abs()).sigmoid()
    expected = magnitude + torch.where(x > 0, chosen, 1 - chosen).log().sum(-1)
    assert_exact(model, pv.surjections.FlowGuide(model), x, expected.detach())


def folded(prior, x):
    """Return log sum_s p(s x) over the signs of each number."""
    return torch.logaddexp(prior.log_prob(x), prior.log_prob(-x)).sum(-1)


def test_generative_absolute_folds_the_density():
    base = dist.Normal(torch.tensor([0.3, -0.8], dtype=torch.float64), 1.1)
    x = torch.rand(6, 2, dtype=torch.float64) + 0.1
    exact = folded(base, x)
    posterior = lambda x: base.log_prob(x) - base.log_prob(-x)  # noqa: E731
    model = pv.surjections.FlowModel(
        lambda: base.to_event(1), pv.surjections.GenerativeAbsolute(posterior)
    )
    assert_exact(model, pv.surjections.FlowGuide(model), x, exact)
    model = pv.surjections.FlowModel(lambda: base.to_event(1), pv.surjections.GenerativeAbsolute())
    guide = pv.surjections.FlowGuide(model)
    assert_evidence(model, guide, x, exact)
    pv.objectives.IWAE(3).loss(model, guide, x)  # fair signs have no parameters
    x[2, 1] *= -1
    with pytest.raises(ValueError, match=r"outside the support|log-density of -inf"):
        pv.fit(model, guide, x, progress=False, batch_size=5)


def test_learned_signs_have_score_function_gradients():
    """Compare with the sum over signs, in a stack with a parameter below the signs."""
    base = dist.Normal(torch.tensor([0.7], dtype=torch.float64), 1.1)
    logits, x = nn.Parameter(torch.randn(1).double()), torch.full((4000, 1), 0.4).double()
    shift = nn.Parameter(torch.tensor(0.3).double())

    class Signs(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = logits

        def forward(self, x):
            return self.logits * x

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = shift

        def forward(self):
            return transforms.AffineTransform(self.shift, 1.0)

    model = pv.surjections.FlowModel(
        lambda: base.to_event(1), [Shift(), pv.surjections.GenerativeAbsolute(Signs())]
    )
    guide = pv.surjections.FlowGuide(model)
    y = x[0] + shift
    p = (logits * y).sigmoid()
    bound = p * (base.log_prob(y) - p.log()) + (1 - p) * (base.log_prob(-y) - (1 - p).log())
    expected = torch.autograd.grad(bound.sum(), [logits, shift])
    found = []
    for _ in range(20):
        loss = pv.objectives.ELBO().differentiable_loss(model, guide, x) / len(x)
        found.append(torch.stack([-g.sum() for g in torch.autograd.grad(loss, [logits, shift])]))
    found = torch.stack(found)
    for number in range(2):
        error = found[:, number].std().item() / 20**0.5
        assert_within(found[:, number].mean().item(), expected[number].item(), error, 5.0)
    with pytest.raises(ValueError, match="reparameterized"):
        pv.objectives.IWAE(2).loss(model, guide, x)


def test_maximum_has_the_exact_normalized_log_likelihood():
    rates = torch.tensor([0.7, 1.3], dtype=torch.float64)
    noise = lambda z: dist.Exponential(rates * (1 + z.abs())).to_event(1)  # noqa: E731
    model = pv.surjections.FlowModel(Gaussian(1), pv.surjections.Maximum(noise, conditional=True))
    guide = pv.surjections.FlowGuide(model)
    x = torch.randn(8, 3, dtype=torch.float64)
    expected = []
    for row in x.tolist():
        z = max(row)
        gaps = [z - number for number in row if number != z]
        at = torch.tensor([z], dtype=torch.float64)
        log_p = model.prior().log_prob(at) + noise(at).log_prob(
            torch.tensor(gaps, dtype=torch.float64)
        )
        expected.append(log_p - math.log(3))
    assert_exact(model, guide, x, torch.stack(expected).detach())
    with torch.no_grad():
        drawn = model.layers[0].generate(torch.zeros(40_000, 1, dtype=torch.float64)).sample()
    torch.testing.assert_close(drawn.max(-1).values, torch.zeros(40_000).double())
    share = (drawn.argmax(-1) == 1).double().mean().item()
    assert_within(share, 1 / 3, (2 / 9 / 40_000) ** 0.5)

    gap = lambda: dist.Exponential(torch.ones(1)).to_event(1)  # noqa: E731
    two = pv.surjections.FlowModel(pv.priors.StandardNormal(1), pv.surjections.Maximum(gap))
    axis = torch.linspace(-12, 5, 801)
    points = torch.cartesian_prod(axis, axis)
    log_p = pv.terms(two, pv.surjections.FlowGuide(two), points).log_weight[0]
    assert (log_p.exp().sum() * (axis[1] - axis[0]) ** 2).item() == pytest.approx(1, abs=2e-2)


LAYERS = {
    "bijection": lambda: pv.surjections.Bijection(FLOWS["affine coupling"](4)),
    "stochastic": lambda: pv.surjections.Stochastic(Gaussian(4, 4), Gaussian(4, 4)),
    "uniform": lambda: pv.surjections.UniformDequantization(4),
    "variational": lambda: variational(4, 4),
    "slice": lambda: pv.surjections.Slice(4, Gaussian(4, 2), conditional=True),
    "augment": lambda: pv.surjections.Augment(3, Gaussian(3, 1)),
    "absolute": lambda: pv.surjections.Absolute(pv.nets.MLP(4, [4], 4)),
    "generative absolute": lambda: pv.surjections.GenerativeAbsolute(),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_accept_leading_dimensions_and_both_dtypes(kind, dtype):
    layer = LAYERS[kind]().to(dtype)
    z = torch.rand(3, 5, 4, dtype=dtype)
    p = layer.generate(z)
    x = p.sample()
    q = layer.infer(x)
    back = q.rsample()
    assert p.batch_shape == q.batch_shape == (3, 5)
    assert back.shape == z.shape
    for value in (x, back, p.log_prob(x), q.log_prob(back)):
        assert value.dtype == dtype
    assert p.log_prob(x).shape == q.log_prob(back).shape == (3, 5)
    assert (p.log_prob(x) + q.log_prob(back)).isfinite().all()
    # One row alone, more particles, and z without a recorded origin.
    torch.testing.assert_close(
        layer.generate(z[1]).log_prob(x[1].clone()), p.log_prob(x.clone())[1], rtol=1e-4, atol=1e-4
    )
    many = q.expand(torch.Size([2, 3, 5]))
    assert many.rsample().shape == (2, *z.shape)
    assert many.log_prob(back.clone()).shape == (2, 3, 5)
    if kind in ("bijection", "slice", "absolute"):
        torch.testing.assert_close(back, z, rtol=1e-4, atol=1e-4)
    elif kind != "stochastic":
        torch.testing.assert_close(layer.generate(back.clone()).sample(), x)


# Stacks and the rest of the library


def stack(dim=4, levels=8, hidden=5):
    """Return a stack: dequantization, a bijection, a VAE and a flow."""
    return pv.surjections.FlowModel(
        pv.priors.StandardNormal(2),
        [
            variational(levels, dim).to(torch.float32),
            transforms.SigmoidTransform().inv,
            pv.surjections.Stochastic(
                Gaussian(dim, 2, torch.float32), Gaussian(2, dim, torch.float32)
            ),
            pv.flows.Composition(2, length=2),
        ],
    )  # fmt: skip


def levels_of_two_kinds(count=60):
    kinds = torch.tensor([[1, 2, 5, 6], [6, 5, 1, 0]])
    return (kinds[torch.randint(2, (count,))] + torch.randint(2, (count, 4))) / 7


def test_stack_of_flow_vae_and_dequantization_trains():
    model, x = stack(), levels_of_two_kinds()
    guide = pv.surjections.FlowGuide(model)
    assert guide(x).keys() == {"z_1", "z_2", "z_3", "z_4"}
    before = pv.evidence(model, guide, x, num_particles=100, capture=False, seed=0).values.mean()
    state = copy.deepcopy(model.state_dict())
    fit = pv.fit(model, guide, x, epochs=40, batch_size=20, seed=0, progress=False, capture=False)
    after = pv.evidence(model, guide, x, num_particles=100, capture=False, seed=0)
    assert fit.execution.startswith("eager")
    assert after.values.mean() > before + 0.5
    assert after.values.max() < 0  # a probability
    moved = [not torch.equal(state[name], value) for name, value in model.state_dict().items()]
    assert sum(moved) > 15
    samples = pv.generate(model, x, seed=0)
    torch.testing.assert_close(samples * 7, (samples * 7).round())
    assert samples.shape == x.shape
    torch.testing.assert_close(pv.reconstruct(model, guide, x), x)


def test_linear_vae_above_a_bijection_matches_its_closed_form():
    oracle = LinearGaussian()
    scale, shift = torch.tensor([1.0, -2, 0.5, 3, 1.5]).double(), torch.randn(5).double()

    def decode(z):
        return dist.Normal(z @ oracle.weight.T + oracle.mu, oracle.s2.sqrt()).to_event(1)

    def encode(x):
        return dist.Normal((x - oracle.mu) @ oracle.v.T, oracle.s.diagonal().sqrt()).to_event(1)

    model = pv.surjections.FlowModel(
        lambda: dist.Normal(torch.zeros(2).double(), 1.0).to_event(1),
        [transforms.AffineTransform(shift, scale), pv.surjections.Stochastic(encode, decode)],
    )
    guide = pv.surjections.FlowGuide(model)
    x = (oracle.sample(30) - shift) / scale
    exact = oracle.log_evidence(scale * x + shift) + scale.abs().log().sum()
    assert_evidence(model, guide, x, exact, 2000)
    terms = pv.terms(model, guide, x, num_particles=4000)
    gap = exact - terms.log_weight.mean(0)
    assert_within(gap.mean().item(), oracle.gap, terms.log_weight.std().item() / (4000 * 30) ** 0.5)


def test_fit_refuses_another_guide():
    model, _ = flow_pair("affine coupling")
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(3, [4])).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    assert (pv.terms(model, guide, x).log_weight == -math.inf).all()
    with pytest.raises(ValueError, match="site 'x' has a log-density of -inf"):
        pv.fit(model, guide, x, progress=False, batch_size=5)


@pytest.mark.parametrize("double", [pytest.param(False, marks=pytest.mark.slow), True])
def test_captured_steps_equal_eager_steps(double, without_compiler):
    def make():
        model = stack() if not double else stack().double()
        return model, pv.surjections.FlowGuide(model)

    check_same(
        make, levels_of_two_kinds(), double=double, execution="captured, not compiled", epochs=2
    )


@pytest.mark.parametrize("objective", [pv.objectives.IWAE(3), pv.objectives.StickingTheLanding()])
def test_captured_steps_of_a_flow_equal_eager_steps(objective, without_compiler):
    def make():
        model = pv.surjections.FlowModel(pv.priors.StandardNormal(4), FLOWS["spline coupling"](4))
        return model, pv.surjections.FlowGuide(model)

    check_same(
        make,
        torch.randn(40, 4),
        objective=objective,
        execution="captured, not compiled",
        epochs=2,
    )


def test_surgery_of_a_bijection_has_mutual_information_log_n():
    """The codes of N data points are N distinct points, so the information is log N."""
    model, guide = flow_pair("affine coupling")
    x = torch.randn(30, 3, dtype=torch.float64)
    surgery = pv.elbo_surgery(model, guide, x, seed=0)
    assert surgery.mutual_information == pytest.approx(math.log(30))
    assert surgery.elbo == pytest.approx(exact_log_p(model, x).mean().item())
    z = model.layers[0].infer(x).sample()
    assert surgery.rate == pytest.approx(-model.prior().log_prob(z).mean().item())


def test_model_and_guide_are_copied_together():
    model, guide = flow_pair("spline coupling")
    twin, other = copy.deepcopy((model, guide))
    assert other.layers is twin.layers
    assert guide.layers is model.layers
    x = torch.randn(4, 3, dtype=torch.float64)
    before = pv.terms(twin, other, x).log_weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    torch.testing.assert_close(pv.terms(twin, other, x).log_weight, before)
    assert (pv.terms(model, guide, x).log_weight - before).abs().max() > 1e-3


def test_path_gradient_below_a_bijection_equals_the_elbo_gradient():
    """With noise below a bijection, the path gradient at held samples equals that of the ELBO."""
    layers = [
        pv.surjections.Stochastic(Gaussian(3, 2), Gaussian(2, 3)),
        pv.flows.Composition(2, length=2).double(),
    ]
    model = pv.surjections.FlowModel(Gaussian(2), layers)
    guide, x = pv.surjections.FlowGuide(model), torch.randn(50, 3, dtype=torch.float64)
    encoder = layers[0].encoder.raw  # the scale: its score has mean zero and positive variance
    found = {}
    for objective in (pv.objectives.ELBO(200), pv.objectives.StickingTheLanding(200)):
        draws = [
            gradients(objective.differentiable_loss(model, guide, x), model) for _ in range(15)
        ]
        flat = torch.stack([torch.cat([g.flatten() for g in draw]) for draw in draws])
        found[type(objective).__name__] = flat.mean(0), flat.var(0) / len(flat)
    (one, its_variance), (other, other_variance) = found.values()
    errors = (its_variance + other_variance).sqrt()
    assert encoder.numel() == 2
    assert ((one - other).abs() <= 5.5 * errors + 1e-9).all()


BAD = {
    "no layers": (
        lambda: pv.surjections.FlowModel(pv.priors.StandardNormal(2), []),
        ValueError,
        "at least one layer",
    ),
    "not a layer": (
        lambda: pv.surjections.FlowModel(pv.priors.StandardNormal(2), [3]),
        TypeError,
        "takes layers, torch Transforms",
    ),
    "module without a transform": (
        lambda: pv.surjections.FlowModel(pv.priors.StandardNormal(2), pv.priors.StandardNormal(2)),
        TypeError,
        "StandardNormal is not a layer: .*which returns Independent",
    ),
    "transform of matrices": (
        lambda: pv.surjections.FlowModel(
            pv.priors.StandardNormal(2), transforms.LowerCholeskyTransform()
        ),
        ValueError,
        "acts on events of 2 dimensions, but event_dim is 1: pass event_dim=2",
    ),
    "no event": (
        lambda: pv.surjections.Bijection(transforms.ExpTransform(), event_dim=0),
        ValueError,
        "event_dim must be at least 1",
    ),
    "one level": (lambda: pv.surjections.UniformDequantization(1), ValueError, "at least 2, got 1"),
    "half a level": (lambda: pv.surjections.UniformDequantization(2.5), TypeError, "whole number"),
    "no size": (
        lambda: pv.surjections.Slice(0, Gaussian(2)),
        ValueError,
        "size must be at least 1",
    ),
    "guide without layers": (
        lambda: pv.surjections.FlowGuide(nn.Linear(2, 2)),
        TypeError,
        "FlowGuide takes a FlowModel",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused(what):
    make, error, message = BAD[what]
    with pytest.raises(error, match=message):
        make()


def vectors(*sizes):
    return lambda: dist.Normal(torch.zeros(*sizes), 1.0).to_event(len(sizes))


MISFITS = {
    "prior of another size": (
        vectors(4), pv.flows.Composition(3), (5, 3), r"events of shape \(4,\): both must have",
    ),
    "data of another size": (
        vectors(3), pv.flows.Composition(3), (5, 4), r"cannot map events of shape \(4,\)",
    ),
    "data that broadcast": (
        vectors(3), transforms.AffineTransform(torch.zeros(3), 1.0), (5, 1), "cannot map events",
    ),
    "images for vectors": (
        vectors(4), transforms.AffineTransform(0.3, 2.0), (5, 2, 4), "event_dim does not fit",
    ),
    "prior of images": (
        vectors(2, 4), transforms.AffineTransform(0.3, 2.0), (5, 4), r"events of shape \(2, 4\)",
    ),
    "slice of another size": (
        vectors(3), pv.surjections.Slice(2, vectors(2)), (5, 4), r"events of shape \(3,\)",
    ),
    "noise without an event": (
        vectors(2),
        pv.surjections.Slice(2, lambda: dist.Normal(torch.zeros(2), 1.0)),
        (5, 4),
        r"Slice needs a distribution .* with 1 event dimension",
    ),
    "dequantization noise of another size": (
        vectors(4),
        pv.surjections.VariationalDequantization(2, lambda x: dist.Normal(x, 1.0)),
        (5, 4),
        "noise must have the event shape of x",
    ),
    "signs": (
        vectors(4),
        pv.surjections.GenerativeAbsolute(lambda x: x[..., :1]),
        (5, 4),
        "one logit for each",
    ),
    "maximum of one number": (
        vectors(2), pv.surjections.Maximum(vectors(3)), (5, 4), r"events of shape \(2,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
def test_shape_mismatch_raises_at_the_first_call(what):
    prior, layers, shape, message = MISFITS[what]
    model = pv.surjections.FlowModel(prior, layers)
    with pytest.raises(ValueError, match=message):
        pv.terms(model, pv.surjections.FlowGuide(model), torch.ones(shape))


@pytest.mark.parametrize(
    ("prior", "layers", "message"),
    [
        (vectors(4), pv.flows.Composition(3), "cannot map events .* back: .*Give the prior"),
        (vectors(3), pv.surjections.Slice(2, vectors(2)), "takes 2 numbers here"),
        (vectors(2), pv.surjections.Maximum(vectors(3)), "Maximum takes one number"),
        (vectors(2), transforms.AffineTransform(0.3, 2.0), r"x has events of shape \(4,\)"),
        (vectors(2, 4), transforms.AffineTransform(0.3, 2.0), "event_dim does not fit"),
    ],
)
def test_shape_mismatch_raises_in_generate(prior, layers, message):
    with pytest.raises(ValueError, match=message):
        pv.generate(pv.surjections.FlowModel(prior, layers), torch.ones(5, 4))


@pytest.mark.parametrize(
    "objective",
    [pv.objectives.DReG(3), pv.objectives.ReweightedWakeSleep(3, sleep=1.0),
     pv.objectives.ScoreFunction(3), pv.objectives.TVO(3), pv.objectives.PIWAE(2, 3)],
    ids=lambda objective: type(objective).__name__,
)  # fmt: skip
def test_estimators_with_held_samples_have_the_exact_gradient_of_a_flow(objective):
    """Deterministic outputs must not be held, or the flow would lose the prior's gradient."""
    model, guide = flow_pair("affine coupling")
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = gradients(exact_log_p(model, x).sum(), model)
    found = gradients(-objective.differentiable_loss(model, guide, x), model)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_prior_support_beyond_the_image_of_the_data_is_refused():
    """Otherwise p(x) would integrate to less than one."""
    normal = pv.priors.StandardNormal(1)
    x = torch.rand(5, 1)
    for layer in (
        pv.surjections.Absolute(),
        torch.distributions.SigmoidTransform(),
        torch.distributions.ExpTransform(),
    ):
        model = pv.surjections.FlowModel(normal, layer)
        with pytest.raises(ValueError, match=r"maps data to .* on all real numbers"):
            pv.evidence(model, pv.surjections.FlowGuide(model), x, num_particles=1)
    gaps = pv.surjections.Maximum(noise=pv.priors.StandardNormal(2))
    model = pv.surjections.FlowModel(normal, gaps)
    with pytest.raises(ValueError, match="noise of positive numbers"):
        pv.evidence(model, pv.surjections.FlowGuide(model), torch.rand(5, 3), num_particles=1)


def test_bijection_refuses_non_bijective_and_parametrized_transforms():
    with pytest.raises(ValueError, match="needs a bijective transform, got AbsTransform"):
        pv.surjections.Bijection(torch.distributions.AbsTransform())
    loc = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="holds tensors that require gradients"):
        pv.surjections.Bijection(torch.distributions.AffineTransform(loc, 1.0))
    with pytest.raises(ValueError, match=r"continuous numbers, got torch.int64"):
        pv.surjections.Absolute().infer(torch.tensor([[1, -2]]))


def test_flow_guide_scores_joint_samples():
    """In float32, a logit amplifies rounding errors."""
    logit = torch.distributions.SigmoidTransform().inv
    steep = torch.distributions.AffineTransform(0.0, 30.0)
    model = pv.surjections.FlowModel(pv.priors.StandardNormal(4), [logit, steep.inv])
    guide = pv.surjections.FlowGuide(model)
    x = torch.rand(2000, 4).clamp(0.01, 0.99)
    assert pv.terms(model, guide, x).sample_joint().log_guide().isfinite().double().mean() > 0.99


def test_sample_taken_without_gradients_keeps_the_density_differentiable():
    model, _ = flow_pair("affine coupling")
    x = torch.randn(5, 3, dtype=torch.float64)
    layer = model.layers[0]
    with torch.no_grad():
        z = layer.infer(x).rsample()
    assert layer.generate(z).log_prob(x).requires_grad


def test_sample_has_zero_density_under_another_latent():
    layer = pv.surjections.Slice(
        2, noise=lambda z: dist.Normal(z, 1.0).to_event(1), conditional=True
    )
    z, other = torch.randn(2, 5, 2)
    x = layer.generate(z).sample()
    assert (layer.generate(other).log_prob(x) == -torch.inf).all()


def test_origin_of_a_sample_is_freed_with_it():
    model = pv.surjections.FlowModel(pv.priors.StandardNormal(3), pv.flows.Composition(3))
    z = pv.surjections.FlowGuide(model)(torch.randn(5, 3))["z"]
    assert vars(z) == {}
    assert z in _ORIGINS
    count = len(_ORIGINS)
    del z
    assert len(_ORIGINS) == count - 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integer_levels_in_a_float64_model(tmp_path, dtype):
    layers = [
        pv.surjections.UniformDequantization(4),
        pv.surjections.Bijection(dist.transforms.SigmoidTransform().inv),
        pv.surjections.Bijection(pv.flows.Composition(3)),
    ]
    model = pv.surjections.FlowModel(pv.priors.StandardNormal(3), layers).double()
    guide = pv.surjections.FlowGuide(model)
    levels = torch.randint(4, (10, 3))
    found = pv.evidence(model, guide, levels.to(dtype), num_particles=5, seed=0).values
    expected = pv.evidence(model, guide, levels.double() / 3, num_particles=5, seed=0).values
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    pv.save(tmp_path / "pair", model, guide)
    saved = pv.load(tmp_path / "pair")
    loaded = pv.evidence(saved.model, saved.guide, levels.to(dtype), num_particles=5, seed=0)
    assert torch.equal(loaded.values, found)
