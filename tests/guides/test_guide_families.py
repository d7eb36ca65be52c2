"""Tests for every guide: its samples and its density agree."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_table import DENSITIES, FLOWS, ONE_DIMENSION, Model, local_guides, make
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae import flows, guides
from pyro_vae._utils.numerics import increasing_root
from pyro_vae.evaluation._scoring import guide_log_prob

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def scored(guide, x, values):
    """Return log q at values (M, *event), of shape (M, B)."""
    with pyro.validation_enabled(False):
        return guide_log_prob(guide, (x,), values, plate_nesting=1)


def grid(low, high, steps, dim):
    axis = torch.linspace(low, high, steps, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return points, (axis[1] - axis[0]).item() ** dim


@pytest.mark.parametrize("name", ONE_DIMENSION)
def test_density_integrates_to_one_in_one_dimension(name):
    model = Model((), dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    guide = make(name, model, x, spread=2.0)
    points, area = grid(-40, 40, 16_001, 1)
    total = scored(guide, x, {"z": points.squeeze(-1)}).exp().sum(0) * area
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", DENSITIES)
def test_density_integrates_to_one_in_two_dimensions(name):
    model = Model((2,), dtype=torch.float64)
    x = torch.randn(1, 5, dtype=torch.float64)
    guide = make(name, model, x, spread=1.5)
    points, area = grid(-14, 14, 181, 2)
    total = scored(guide, x, {"z": points}).exp().sum(0) * area
    torch.testing.assert_close(total, torch.ones_like(total), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("event_shape", "dtype"),
    [
        ((3,), torch.float32),
        ((1, 4, 4), torch.float64),
        pytest.param((3,), torch.float64, marks=pytest.mark.slow),
        pytest.param((1, 4, 4), torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", DENSITIES)
def test_sample_is_scored_the_same_when_given(name, event_shape, dtype):
    model = Model(event_shape, dtype=dtype)
    x = torch.randn(4, 5, dtype=dtype)
    guide = make(name, model, x)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert z.shape == (4, *event_shape)
    assert z.dtype == dtype
    again = poutine.trace(poutine.condition(guide, data={"z": z.clone()})).get_trace(x)
    again.compute_log_prob()
    log_probs = [t.nodes["z"]["log_prob"] for t in (trace, again)]
    assert log_probs[0].shape == (4,)
    torch.testing.assert_close(*log_probs, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", DENSITIES)
def test_guides_support_particles_and_batches_of_one(name):
    model = Model((2,))
    x = torch.randn(6, 5)
    guide = make(name, model, x)
    t = pv.terms(model, guide, x, num_particles=7)
    assert t.log_weight.shape == (7, 6)
    assert t.samples["z"].shape == (7, 6, 2)
    given = scored(guide, x, {"z": t.samples["z"][:, 2]})
    torch.testing.assert_close(given[:, 2], t.log_guide[:, 2], rtol=1e-3, atol=1e-3)
    assert pv.terms(model, guide, x[:1], num_particles=3).log_weight.shape == (3, 1)
    with pyro.plate("one", 1, dim=-2):
        assert guide(x[:1])["z"].shape[-2:] == (1, 2)


@pytest.mark.parametrize("name", DENSITIES)
def test_every_parameter_has_a_gradient(name):
    model = Model((3,))
    x = torch.randn(16, 5)
    guide = make(name, model, x, spread=1.5)
    pv.objectives.ELBO(5).loss_and_grads(model, guide, x)
    for parameter_name, parameter in guide.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", DENSITIES)
def test_gradients_at_given_values_match_finite_differences(name):
    """With respect to the value and to the parameters."""
    model = Model((2,), dtype=torch.float64)
    x = torch.randn(2, 5, dtype=torch.float64)
    guide = make(name, model, x, spread=1.5)
    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    parameter = guide.encoder[0].bias

    def log_q(z):
        trace = poutine.trace(poutine.condition(guide, data={"z": z})).get_trace(x)
        return trace.log_prob_sum()

    gradients = torch.autograd.grad(log_q(z), [z, parameter])
    for tensor, gradient in zip((z, parameter), gradients, strict=True):
        direction, step = torch.randn_like(tensor), 1e-5
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step * direction
                ends.append(log_q(z).item())
                tensor -= sign * step * direction
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", DENSITIES)
def test_loaded_and_copied_guides_score_the_same(name):
    model = Model((2,))
    x = torch.randn(4, 5)
    guide = make(name, model, x)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = DENSITIES[name](model, pv.nets.MLP(5, [7]))
    fresh.load_state_dict(state)  # before its first call
    assert fresh.state_dict().keys() == state.keys()
    late = DENSITIES[name](model, pv.nets.MLP(5, [7]))
    late(x)
    late.load_state_dict(state)
    expected = scored(guide, x, {"z": torch.ones(1, 2)})
    for other in (fresh, late, copy.deepcopy(guide)):
        torch.testing.assert_close(scored(other, x, {"z": torch.ones(1, 2)}), expected)


def test_state_dict_of_another_guide_is_refused():
    model, x = Model((2,)), torch.randn(4, 5)
    state = make("planar", model, x).state_dict()
    other = guides.AmortizedFlow(model, pv.nets.MLP(5, [7]), length=9)
    other.load_state_dict(state)
    with pytest.raises(
        ValueError, match="state dict belongs to a guide for another model or encoder"
    ):
        other(x)


def test_local_guides_find_their_rows():
    model = Model((2,))
    x = torch.randn(9, 5)
    x[4] = x[1]
    for guide in local_guides(model, x):
        all_parameters = guide.parameters_of(x)
        order = torch.randperm(9)
        assert torch.equal(guide.parameters_of(x[order]), all_parameters[order])
        assert torch.equal(all_parameters[4], all_parameters[1])
        assert len(torch.unique(all_parameters, dim=0)) == 8
        assert guide(x[[3]])["z"].shape == (1, 2)
        with (
            pyro.validation_enabled(True),
            pytest.raises(ValueError, match="row 0 of x is not in the data"),
        ):
            guide(torch.randn(2, 5))
        with pyro.validation_enabled(False):
            assert guide.parameters_of(torch.randn(2, 5)).isnan().all()


def test_local_guides_distinguish_covariates():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, y = torch.zeros(4), torch.tensor([0.0, 1.0, 5.0, 1.0])
    guide = guides.LocalGuide(model, x, y).float().double()
    assert guide.table.shape == (3, 2)
    parameters = guide.parameters_of(x[1:], y[1:])
    assert torch.equal(parameters[0], parameters[2])
    assert not torch.equal(parameters[0], parameters[1])


@pytest.mark.parametrize("name", DENSITIES)
def test_values_that_broadcast_are_scored(name):
    model, x = Model((3,)), torch.randn(4, 5)
    guide = make(name, model, x)
    for shape in ((3,), (1, 3), (7, 1, 3)):
        z = torch.randn(shape)
        with pyro.validation_enabled(False):
            scores = []
            for value in (z, z.expand(*shape[:-2], 4, 3).clone()):
                trace = poutine.trace(poutine.condition(guide, data={"z": value})).get_trace(x)
                trace.compute_log_prob()
                scores.append(trace.nodes["z"]["log_prob"])
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_low_rank_density_is_accurate_for_small_scales():
    guide = guides.AmortizedLowRankNormal(Model((20,)), nn.Identity(), rank=4)
    family = guide._family(20)
    parameters = torch.randn(64, family.num_parameters)
    parameters[:, 20:40] = -7.0  # scales of 0.0016 with factors of one
    z = family(parameters).sample()
    exact = dist.MultivariateNormal(
        parameters[:, :20].double(), family(parameters.double()).covariance_matrix
    ).log_prob(z.double())
    error = family(parameters).log_prob(z).double() - exact
    # The rounding of z in float32, z (1 + 1e-7), changes the log-density by about 1e-2.
    assert error.abs().max() < 0.1


def test_copied_guides_keep_the_same_model():
    model, x = Model((2,)), torch.randn(4, 5)
    for guide in (
        make("planar", model, x),
        guides.SemiAmortized(make("normal", model, x)).guide,
        guides.LocalGuide(model, x),
        make("hierarchical", model, x),
    ):
        assert copy.deepcopy(guide)._model.program is model
        twin, copied = copy.deepcopy((model, guide))
        assert copied._model.program is twin


def test_missing_second_derivatives_are_refused():
    model, x = Model((2,)), torch.randn(4, 5)
    guide = guides.SemiAmortized(make("mixture", model, x), through=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        pv.objectives.ELBO().loss_and_grads(model, guide, x)


# Layers of flows.


@pytest.mark.parametrize("product", [-0.999, 0.0, 1.0, 5.0, 20.0, 1000.0])
def test_roots_of_steep_functions_are_found(product):
    a, b = 40 * torch.randn(20_000, dtype=torch.float64), torch.randn((), dtype=torch.float64)
    target = a + product * torch.tanh(a + b)
    found = increasing_root(
        lambda v: v + product * torch.tanh(v + b) - target,
        lambda v: 1 + product * (1 - torch.tanh(v + b).square()),
        target - abs(product),
        target + abs(product),
    )
    residual = found + product * torch.tanh(found + b) - target
    assert residual.abs().max() < 1e-12 * (1 + target.abs().max())


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_inverses_match_finite_differences(name):
    """With respect to y and the parameters; gradients skip the steps of the solvers."""
    layer = FLOWS[name](3).double()
    parameters = torch.randn(layer.num_parameters, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, v: layer(p).inv(v.clone()), (parameters, y))


def test_large_planar_layers_are_inverted_accurately():
    f = flows.Planar(2)(torch.tensor([3.0, 3.0, 2.0, 2.0, 0.0], dtype=torch.float64))
    z = torch.randn(20_000, 2, dtype=torch.float64)
    torch.testing.assert_close(f.inv(f(z).clone()), z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FLOWS)
def test_log_determinant_matches_the_jacobian(name):
    layer = FLOWS[name](4).double()
    parameters = torch.randn(layer.num_parameters, dtype=torch.float64)
    f = layer(parameters)
    for z in torch.randn(5, 4, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda value: layer(parameters)(value), z)
        claimed = f.log_abs_det_jacobian(z, f(z))
        torch.testing.assert_close(claimed, torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", FLOWS)
def test_inverse_returns_the_input(name, dtype, tolerance):
    layer = FLOWS[name](4).to(dtype)
    f = layer(torch.randn(20, layer.num_parameters, dtype=dtype))
    z = torch.randn(50, 20, 4, dtype=dtype)
    back = f.inv(f(z).clone())
    assert ((back - z).abs().amax() / z.abs().amax()).item() < tolerance


@pytest.mark.parametrize("name", FLOWS)
def test_log_determinant_of_a_sample_is_computed_once(name, monkeypatch):
    layer = FLOWS[name](3)
    f = layer(torch.randn(layer.num_parameters))
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    q = dist.TransformedDistribution(base, [f])
    z = q.rsample()
    monkeypatch.setattr(flows.FlowTransform, "map", None)
    inner = f.inv if isinstance(f.inv, flows.FlowTransform) else f
    monkeypatch.setattr(type(inner), "map", None)
    monkeypatch.setattr(type(inner), "unmap", None)
    if name != "masked autoregressive":  # it scores in one pass
        assert q.log_prob(z).isfinite()


def test_shared_flow_is_inverted_once_per_value(monkeypatch):
    """M values under N posteriors need M inversions and N*M base densities."""
    model, x = Model((2,)), torch.randn(7, 5)
    guide = make("planar, shared", model, x)
    shapes = []
    layer = type(flows.Planar(2)(torch.randn(5)))
    unmap = layer.unmap
    monkeypatch.setattr(layer, "unmap", lambda f, y: shapes.append(y.shape) or unmap(f, y))
    assert scored(guide, x, {"z": torch.randn(11, 2)}).shape == (11, 7)

    def two_latents(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((a + b).unsqueeze(-1), 1.0).to_event(1), obs=x[:, :1])

    guide = make("planar, shared", two_latents, x)
    values = {"a": torch.rand(11), "b": torch.randn(11)}
    assert scored(guide, x, values).shape == (11, 7)
    assert {shape.numel() for shape in shapes} == {11 * 2}


def test_zero_parameters_give_the_identity():
    for name in ("planar", "radial"):
        layer = FLOWS[name](3)
        z = torch.randn(4, 3)
        torch.testing.assert_close(layer(torch.zeros(layer.num_parameters))(z), z)


@pytest.mark.parametrize(
    ("make_guide", "message"),
    [
        (lambda m, e: guides.AmortizedFlow(m, e, flow=flows.Householder), "'z'.*at least 2"),
        (lambda m, e: guides.AmortizedFlow(m, e, flow=flows.NeuralSpline), "'z'.*at least 2"),
        (lambda m, e: guides.AmortizedFlow(m, e, length=0), "length must be at least 1"),
        (lambda m, e: guides.AmortizedMixture(m, e, components=0), "components must be at least 1"),
        (lambda m, e: guides.AmortizedLowRankNormal(m, e, rank=0), "rank must be at least 1"),
    ],
)  # fmt: skip
def test_invalid_families_are_refused_by_site(make_guide, message):
    guide = make_guide(Model(()), pv.nets.MLP(5, [7]))
    with pytest.raises(ValueError, match=message):
        guide(torch.randn(3, 5))


@pytest.mark.parametrize("name", DENSITIES)
def test_discrete_latents_and_models_without_latents_are_refused(name):
    def discrete(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([5]).to_event(1), obs=x)

    def observed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([5]).to_event(1), obs=x)

    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match="latent site 'k' has the support"):
        DENSITIES[name](discrete, pv.nets.MLP(5, [7]))(x)
    with pytest.raises(ValueError, match="no latent site"):
        DENSITIES[name](observed, pv.nets.MLP(5, [7]))(x)
    with pytest.raises(ValueError, match="one row for each data point"):
        DENSITIES[name](Model((2,)), lambda x: x.sum(0))(x)
