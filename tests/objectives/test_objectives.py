import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from oracles import LinearGaussian, assert_within
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.objectives import ELBO, IWAE, MeanFieldELBO


def two_latents():
    """Return a hierarchical pair with a handwritten, structured guide."""
    top, bottom = nn.Linear(2, 3), nn.Linear(3, 4)
    encode, refine = nn.Linear(4, 6), nn.Linear(7, 4)

    def model(x):
        pyro.module("top", top)
        pyro.module("bottom", bottom)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(top(z2), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(bottom(z1), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encode", encode)
        pyro.module("refine", refine)
        with pyro.plate("data", len(x)):
            loc, raw = encode(x).chunk(2, -1)
            # the model's order, top first; the upper loc does not depend on z1
            z2 = pyro.sample("z2", dist.Normal(loc[..., :2], raw[..., :2].exp()).to_event(1))
            seen = torch.cat([x.expand(*z2.shape[:-1], 4), z2, z2[..., :1]], -1)
            loc1, raw1 = refine(seen).split([3, 1], -1)
            pyro.sample("z1", dist.Normal(loc1, raw1.exp()).to_event(1))

    return model, guide, torch.randn(7, 4)


def non_gaussian():
    """Return a pair with one positive latent and one on the unit interval."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.LogNormal(loc, 0.8))
            b = pyro.sample("b", dist.Beta(2.0, 3.0))
            pyro.sample("x", dist.Normal(a * b, 0.5), obs=x[..., 0])

    encoder = pv.nets.MLP(1, [5])
    guide = pv.guides.AmortizedNormal(model, encoder)
    x = torch.rand(7, 1)
    guide(x)
    return model, guide, x


def bare_parameters():
    """Return a pair of pyro.param parameters, with a global observation."""

    def model(x):
        weight = pyro.param("weight", torch.tensor([0.5, -1.0]))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        pyro.sample("pseudo", dist.Normal(weight.sum(), 1.0), obs=torch.tensor(0.1))
        with pyro.plate("data", 100, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * weight, scale).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor([0.2, 0.1]))
        width = pyro.param("width", torch.tensor(0.4), constraint=dist.constraints.positive)
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("z", dist.Normal(x @ slope, width))

    return model, guide, torch.randn(7, 2)


def discrete():
    logits = nn.Linear(2, 1)

    def model(x):
        shift = pyro.param("shift", torch.tensor([1.0, -1.0]))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(c.unsqueeze(-1) * shift, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("logits", logits)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=logits(x).squeeze(-1)))

    return model, guide, torch.randn(7, 2)


def loss_and_gradients(objective, model, guide, x):
    objective.loss_and_grads(model, guide, x)  # the first call determines plate nesting
    for p in dict(pyro.get_param_store().named_parameters()).values():
        p.grad = None
    torch.manual_seed(5)
    loss = float(objective.loss_and_grads(model, guide, x))
    return loss, {n: p.grad.clone() for n, p in pyro.get_param_store().named_parameters()}


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    ("program", "ours", "theirs"),
    [
        (two_latents, ELBO, Trace_ELBO),
        (two_latents, MeanFieldELBO, TraceMeanField_ELBO),
        (non_gaussian, ELBO, Trace_ELBO),
        (non_gaussian, MeanFieldELBO, TraceMeanField_ELBO),
        (bare_parameters, ELBO, Trace_ELBO),
        (bare_parameters, MeanFieldELBO, TraceMeanField_ELBO),
        (discrete, ELBO, Trace_ELBO),
    ],
)
def test_loss_and_gradient_equal_pyros_for_the_same_noise(program, ours, theirs, num_particles):
    torch.set_default_dtype(torch.float64)
    try:
        model, guide, x = program()
        loss, gradients = loss_and_gradients(ours(num_particles), model, guide, x)
        theirs = theirs(num_particles=num_particles, vectorize_particles=num_particles > 1)
        expected_loss, expected = loss_and_gradients(theirs, model, guide, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_score_function_gradient_matches_the_exact_gradient():
    """Compare the average of many gradients with that of the enumerated ELBO."""
    model, guide, x = discrete()
    objective = ELBO(num_particles=20_000)
    _, gradients = loss_and_gradients(objective, model, guide, x)

    def exact_loss():
        shift = pyro.param("shift").unconstrained().detach().requires_grad_()
        logits = guide.__closure__[0].cell_contents
        q = logits(x).squeeze(-1).sigmoid()
        loss = 0.0
        for c, prior in ((0.0, 0.7), (1.0, 0.3)):
            p_c = q if c else 1 - q
            log_p = dist.Normal(c * shift, 1.0).log_prob(x).sum(-1)
            loss = loss - (p_c * (log_p + torch.tensor(prior).log() - p_c.log())).sum()
        return loss, shift, logits

    loss, shift, logits = exact_loss()
    expected = torch.autograd.grad(loss, [shift, logits.weight, logits.bias])
    # Standard errors of the three gradients, from twenty shorter runs.
    runs = [loss_and_gradients(ELBO(num_particles=1000), model, guide, x)[1]]
    for seed in range(19):
        torch.manual_seed(seed)
        for p in dict(pyro.get_param_store().named_parameters()).values():
            p.grad = None
        ELBO(num_particles=1000).loss_and_grads(model, guide, x)
        runs.append({n: p.grad.clone() for n, p in pyro.get_param_store().named_parameters()})
    for name, truth in zip(["shift", "logits$$$weight", "logits$$$bias"], expected, strict=True):
        error = torch.stack([run[name] for run in runs]).std(0) / 20**0.5
        assert ((gradients[name] - truth).abs() < 4.5 * error).all(), name


@pytest.mark.parametrize("num_particles", [1, 4])
def test_score_function_gradient_under_a_scale_equals_pyros(num_particles):
    """The scale multiplies the bound once, not the score as well."""
    plain_model, plain_guide, x = discrete()
    model = pyro.poutine.scale(plain_model, scale=0.1)
    guide = pyro.poutine.scale(plain_guide, scale=0.1)
    loss, gradients = loss_and_gradients(ELBO(num_particles), model, guide, x)
    theirs = Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1)
    expected_loss, expected = loss_and_gradients(theirs, model, guide, x)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_discrete_latents_beside_global_sites_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("total", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(2.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="'z' has no reparameterized sample, and site 'total'"):
        ELBO().loss(model, guide, torch.randn(5))


@pytest.mark.parametrize("objective", [ELBO, MeanFieldELBO])
@pytest.mark.parametrize("num_particles", [1, 10])
def test_expected_elbo_is_evidence_minus_the_closed_form_gap(objective, num_particles):
    oracle = LinearGaussian()
    x = oracle.sample(400)
    truth = (oracle.log_evidence(x) - oracle.gap).sum().item()
    objective = objective(num_particles)
    losses = torch.tensor([objective.loss(oracle.model, oracle.guide, x) for _ in range(30)])
    assert_within(-losses.mean().item(), truth, losses.std().item() / 30**0.5)


def test_iwae_rises_with_particles_toward_the_evidence():
    oracle = LinearGaussian(d=3)
    x = oracle.sample(300)
    evidence = oracle.log_evidence(x).sum().item()
    previous, previous_error = -float("inf"), 0.0
    for num_particles in (1, 4, 16, 64):
        objective = IWAE(num_particles)
        bounds = -torch.tensor([objective.loss(oracle.model, oracle.guide, x) for _ in range(30)])
        mean, error = bounds.mean().item(), bounds.std().item() / 30**0.5
        assert mean < evidence + 4 * error
        assert mean > previous + 4 * (error**2 + previous_error**2) ** 0.5
        previous, previous_error = mean, error


def test_iwae_bias_matches_theory():
    """The bias is about -(E[w^2] - 1)/(2K) per data point, with w = p(z|x)/q."""
    oracle = LinearGaussian(d=2, D=5)
    while not 0.3 < oracle.weight_excess < 0.8:
        oracle = LinearGaussian(d=2, D=5)
    x = oracle.sample(500)
    bias = -oracle.weight_excess / (2 * 16)
    bounds = -torch.tensor([IWAE(16).loss(oracle.model, oracle.guide, x) for _ in range(100)])
    bounds = (bounds.double() - oracle.log_evidence(x).sum()) / 500
    # The next order is smaller by about the same factor.
    assert bounds.mean().item() == pytest.approx(
        bias, abs=4 * bounds.std().item() / 10 + 3 * bias**2 + abs(bias) / 16
    )
    assert bias < -6 * bounds.std().item() / 10  # the bias is significant


def subsampled():
    """Return a pair with a plate of 1000, a subsample of 50, and a poor guide."""
    x = torch.randn(1000) * 5**0.5

    def model(x):
        with pyro.plate("data", 1000, subsample_size=50) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", 1000, subsample_size=50) as rows:
            pyro.sample(
                "z", dist.Normal(x[rows].unsqueeze(-1) / 5, 0.8).expand([50, 4]).to_event(1)
            )

    evidence = dist.Normal(0.0, 5**0.5).log_prob(x).sum().item()
    return model, guide, x, evidence


def test_iwae_of_a_subsampled_plate_is_a_bound_unlike_pyros():
    model, guide, x, evidence = subsampled()

    def bound(objective, repeats=150):
        values = -torch.tensor([float(objective.loss(model, guide, x)) for _ in range(repeats)])
        return values.mean().item(), values.std().item() / repeats**0.5

    previous = -float("inf")
    for num_particles in (1, 8, 500):
        value, error = bound(IWAE(num_particles))
        assert value < evidence + 4 * error
        assert value > previous + 4 * error
        previous = value
    renyi = RenyiELBO(alpha=0, num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    value, error = bound(renyi)
    assert value > evidence + 4 * error  # the scale is inside the logarithm, so this is not a bound


def test_iwae_refuses_scaled_and_discrete_sites():
    def scaled(x):
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="site 'z' is scaled"):
        IWAE(3).loss(scaled, guide, torch.randn(5))
    model, discrete_guide, x = discrete()
    for objective in (IWAE(3), MeanFieldELBO()):
        with pytest.raises(ValueError, match="site 'c' has none"):
            objective.loss(model, discrete_guide, x)


def test_kl_is_sampled_if_the_guide_samples_in_another_order():
    """The guide samples b before a, so the KL of a depends on b and has no closed form."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(x, 1.0))
            pyro.sample("a", dist.Normal(b, 1.0))

    x = torch.randn(5)
    t = pv.terms(model, guide, x, num_particles=3)
    torch.testing.assert_close(t.kl, t.log_guide - t.log_prior)
    for parts in (t.kl_of_sites(), t.kl_of_dimensions()):
        torch.testing.assert_close(sum(parts.values()), t.kl)
    losses = []
    for objective in (ELBO(), MeanFieldELBO()):
        torch.manual_seed(0)
        losses.append(objective.loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_global_latents_are_accepted_by_elbos():
    """With an unknown mean, the exact evidence is a multivariate normal density."""
    x = torch.randn(6) + 1

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mean + z, 1.0), obs=x)

    precision = torch.tensor(1 + len(x) / 2)

    def guide(x):  # the exact posterior of each site
        mean = pyro.sample("mean", dist.Normal(x.sum() / 2 / precision, precision.rsqrt()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - mean) / 2, 0.5**0.5))

    covariance = 2 * torch.eye(6) + torch.ones(6, 6)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(x)

    assert ELBO().loss(model, guide, x) == pytest.approx(-evidence.item(), rel=1e-5)
    assert ELBO(5).loss(model, guide, x) == pytest.approx(-evidence.item(), rel=1e-5)
    losses = torch.tensor([MeanFieldELBO(5).loss(model, guide, x) for _ in range(300)])
    assert_within(losses.mean().item(), -evidence.item(), losses.std().item() / 300**0.5)


@pytest.mark.parametrize("objective", [ELBO(), ELBO(5), MeanFieldELBO(2), IWAE(5)])
def test_objectives_work_with_pyros_svi(objective, pair, binary):
    model, guide = pair
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    losses = [svi.step(binary) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert isinstance(svi.evaluate_loss(binary), float)
    module = objective(model, guide)
    assert module(binary).requires_grad


def test_one_objective_works_for_pairs_of_different_plate_nesting():
    objective = IWAE(3)
    oracle = LinearGaussian(exact=True)
    x = oracle.sample(5)

    def nested(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def nested_guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 2, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    y = torch.randn(4, 2)
    for _ in range(2):
        loss = objective.loss(oracle.model, oracle.guide, x)
        assert loss == pytest.approx(-oracle.log_evidence(x).sum().item())
        loss = objective.loss(nested, nested_guide, y)
        exact = dist.Normal(0.0, 2**0.5).log_prob(y).sum().item()
        assert loss == pytest.approx(-exact, rel=1e-5)


def test_programs_without_a_particle_dimension_need_vectorize_particles_false():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if z.dim() > 1:
                raise RuntimeError("no more than the batch, please")
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(5)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()
    with pytest.raises(
        ValueError, match=r"no more than the batch, please\. .*vectorize_particles=False"
    ):
        IWAE(3, vectorize_particles=True).loss(model, guide, x)
    with pytest.warns(UserWarning, match="no more than the batch, please"):
        loss = IWAE(3).loss(model, guide, x)
    assert loss == pytest.approx(-exact, rel=1e-5)
    loss = IWAE(3, vectorize_particles=False).loss(model, guide, x)
    assert loss == pytest.approx(-exact, rel=1e-5)


@pytest.mark.parametrize("objective", [ELBO, MeanFieldELBO, IWAE])
def test_num_particles_must_be_positive(objective):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        objective(0)


def test_copies_of_an_objective_do_not_have_its_last_pair(binary):
    model, guide = make_pair()
    objective = pv.objectives.IWAE(3)
    before = len(pickle.dumps(objective))
    loss = objective.loss(model, guide, binary)
    assert math.isfinite(loss)
    assert len(pickle.dumps(objective)) == before
    assert math.isfinite(copy.deepcopy(objective).loss(model, guide, binary))
