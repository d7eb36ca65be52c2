"""Compare priors with their definitions and grids, and the optimal prior with theory."""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same
from conftest import make_pair
from oracles import LinearGaussian, assert_within
from pyro.distributions.transforms import affine_coupling
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    SigmoidTransform,
)

import pyro_vae as pv
from pyro_vae._utils.numerics import softplus_scale
from pyro_vae.distributions._mixtures import UniformMixture


def model_with(prior, latent=2, data=16):
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(latent, [8], data))
    return pv.LatentVariableModel(prior, likelihood)


def amortized(model, **kwargs):
    return pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]), **kwargs)


def flow_guide(model, joint=True):
    return pv.guides.AmortizedFlow(
        model, pv.nets.MLP(16, [8]), flow=pv.flows.NeuralSpline, length=2, joint=joint
    )


def bind_guide(prior, make=amortized):
    """Return a pair whose prior is bound to its guide."""
    model = model_with(prior)
    guide = make(model)
    prior.bind_guide(guide)
    guide(torch.rand(3, 16))
    return model, guide


def vamp(make=amortized):
    model, guide = bind_guide(pv.priors.VampPrior(2, pseudo_inputs=torch.rand(7, 16)), make)
    return model.prior, guide


def exemplar():
    model, guide = bind_guide(pv.priors.ExemplarPrior(2, exemplars=torch.rand(9, 16)))
    return model.prior, guide


def aggregated(make=amortized, **kwargs):
    guide = make(model_with(pv.priors.StandardNormal(2)))
    guide(torch.rand(3, 16))
    return pv.priors.AggregatedPosterior(guide, torch.rand(7, 16), **kwargs)


def randomized(module):
    """Add noise to the initial parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


PRIORS = {
    "standard normal": lambda: pv.priors.StandardNormal(2),
    "mixture": lambda: randomized(pv.priors.MixtureOfNormals(2, components=4)),
    "Vamp": lambda: vamp()[0],
    "Vamp, flow": lambda: vamp(flow_guide)[0],
    "exemplar": lambda: exemplar()[0],
    "aggregated": aggregated,
    "aggregated, flow": lambda: aggregated(flow_guide),
    "coupling": lambda: randomized(
        pv.priors.FlowPrior(2, pv.flows.Composition(2, pv.flows.AffineCoupling, length=3))
    ),
    "spline": lambda: pv.priors.FlowPrior(2, pv.flows.Composition(2, pv.flows.NeuralSpline, 2)),
    "planar": lambda: pv.priors.FlowPrior(2, pv.flows.Composition(2, pv.flows.Planar, 4)),
    "affine": lambda: pv.priors.FlowPrior(2, AffineTransform(0.5, 1.7)),
}


@pytest.mark.parametrize("name", PRIORS)
def test_prior_integrates_to_one_and_samples_match_its_density(name):
    prior = PRIORS[name]().double()
    axis = torch.linspace(-10, 10, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    with torch.no_grad():
        p = prior()
        assert p.batch_shape == ()
        assert p.event_shape == (2,)
        density = p.log_prob(grid).exp()
        assert density.sum() * cell == pytest.approx(1.0, abs=2e-3)
        z = p.expand((20_000,)).sample()
    assert z.shape == (20_000, 2)
    mean = (density.unsqueeze(-1) * grid).sum(0) * cell
    square = (density.unsqueeze(-1) * grid.square()).sum(0) * cell
    for value, truth in ((z, mean), (z.square(), square)):
        error = value.std(0) / 20_000**0.5
        assert ((value.mean(0) - truth).abs() < 5 * error + 3e-3).all()


def test_mixture_of_normals_matches_its_definition():
    prior = randomized(pv.priors.MixtureOfNormals(3, components=2)).double()
    z = torch.randn(4, 5, 3, dtype=torch.float64)
    weight = prior.logits.softmax(0)
    scale = softplus_scale(prior.raw_scale)
    parts = [
        weight[k]
        * torch.exp(
            -0.5 * ((z - prior.loc[k]) / scale[k]).square().sum(-1)
            - scale[k].log().sum()
            - 1.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        )
        for k in range(2)
    ]
    torch.testing.assert_close(prior().log_prob(z), (parts[0] + parts[1]).log())
    torch.testing.assert_close(prior.responsibilities(z)[..., 1], parts[1] / (parts[0] + parts[1]))


@pytest.mark.parametrize("make", [amortized, flow_guide])
def test_vamp_prior_averages_the_guide_over_its_pseudo_inputs(make):
    prior, guide = vamp(make)
    z = torch.randn(6, 2)
    total = 0.0
    for u in prior.pseudo_inputs.clamp(0, 1):
        given = pyro.poutine.condition(guide, data={"z": z})
        trace = pyro.poutine.trace(given).get_trace(u.expand(6, -1))
        total = total + trace.nodes["z"]["fn"].log_prob(z).exp() / 7
    torch.testing.assert_close(prior().log_prob(z), total.log(), rtol=1e-4, atol=1e-5)


def test_exemplar_prior_is_a_mixture_of_gaussians_at_the_codes():
    prior, guide = exemplar()
    with torch.no_grad():
        prior.raw_scale += 0.4
        means = pyro.poutine.trace(guide).get_trace(prior.exemplars).nodes["z"]["fn"].base_dist.loc
    scale = softplus_scale(prior.raw_scale)
    z = torch.randn(6, 2)
    expected_log_prob = (
        dist.Normal(means, scale).to_event(1).log_prob(z.unsqueeze(1)).exp().mean(1).log()
    )
    torch.testing.assert_close(prior().log_prob(z), expected_log_prob)


def test_float32_mixture_of_thousands_of_components_is_accurate():
    loc, scale = 5 * torch.randn(3000, 20), 0.01 + 0.1 * torch.rand(3000, 20)
    z = loc[:10] + scale[:10] * torch.randn(7, 10, 20)
    single = pv.distributions.MixtureOfDiagNormals(torch.zeros(3000), loc, scale).log_prob(z)
    parts = dist.Normal(loc.double(), scale.double()).to_event(1)
    exact = UniformMixture([parts]).log_prob(z.double())
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=1e-5)


OBJECTIVES = [pv.objectives.ELBO(), pv.objectives.IWAE(3), pv.objectives.DReG(2)]


@pytest.mark.parametrize("make", [amortized, flow_guide])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_vamp_trains_with_every_guide(make, objective, binary):
    prior = pv.priors.VampPrior(2, pseudo_inputs=torch.rand(5, 16))
    model, guide = bind_guide(prior, make)
    before = copy.deepcopy(prior.pseudo_inputs)
    fit = pv.fit(model, guide, binary, objective=objective, epochs=2, batch_size=25,
                 progress=False)  # fmt: skip
    assert fit.history.loss.notna().all()
    assert not torch.equal(before, prior.pseudo_inputs)
    assert pv.evidence(model, guide, binary, num_particles=20).mean < 0


def captured(name):
    def make():
        if name == "Vamp":
            return bind_guide(pv.priors.VampPrior(2, pseudo_inputs=torch.rand(5, 16)))
        if name == "exemplar":
            prior = pv.priors.ExemplarPrior(2, exemplars=torch.rand(9, 16), num_drawn=3)
            return bind_guide(prior)
        if name == "mixture model":
            prior = pv.priors.MixtureOfNormals(2, components=3)
            model = pv.models.MixtureModel(prior, pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)))
        else:
            model = model_with(PRIORS[name]())
        return model, amortized(model)

    return make


@pytest.mark.parametrize(
    "name",
    [
        *("mixture", "exemplar", "spline"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("coupling", "mixture model")),
        *("Vamp", "aggregated"),
    ],
)
def test_captured_steps_equal_eager_steps(name, binary, without_compiler):
    check_same(captured(name), binary, double=True, objective=pv.objectives.IWAE(2), epochs=2,
               execution="captured, not compiled")  # fmt: skip


def test_gaussian_aggregated_posterior_gains_the_marginal_kl():
    """The data have the exact moments of the population, up to rounding."""
    oracle = LinearGaussian(d=3, D=6, exact=True)
    x = torch.randn(200, 6, dtype=torch.float64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / 200)
    x = torch.linalg.solve_triangular(root, x.T, upper=False).T
    x = x @ torch.linalg.cholesky(oracle.covariance).T + oracle.mu

    def with_prior(covariance):
        def model(x):
            p_z = dist.MultivariateNormal(x.new_zeros(3), covariance)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", p_z)
                mean = z @ oracle.weight.T + oracle.mu
                pyro.sample("x", dist.Normal(mean, oracle.s2.sqrt()).to_event(1), obs=x)

        return model

    bounds = []
    for covariance in (torch.eye(3, dtype=torch.float64), oracle.aggregated_covariance):
        torch.manual_seed(0)
        loss = pv.objectives.MeanFieldELBO().loss(with_prior(covariance), oracle.guide, x)
        bounds.append(-loss / 200)
    assert bounds[1] - bounds[0] == pytest.approx(oracle.marginal_kl, rel=1e-9)


@pytest.mark.parametrize("make", [amortized, flow_guide])
def test_aggregated_posterior_gains_the_marginal_kl_of_surgery(make, binary):
    model, guide = make_pair()
    guide = make(model)
    pv.fit(model, guide, binary, epochs=30, batch_size=10, learning_rate=0.02, progress=False)
    before = pv.elbo_surgery(model, guide, binary, num_particles=50, seed=0)
    prior = pv.priors.AggregatedPosterior(guide, binary)
    after = pv.elbo_surgery(
        pv.LatentVariableModel(prior, model.likelihood), guide, binary, num_particles=50, seed=0
    )
    assert after.distortion == before.distortion
    assert after.marginal_kl == pytest.approx(0.0, abs=1e-4)
    error = before.standard_errors["marginal_kl"]
    assert before.marginal_kl > 4 * error  # the gain is significant
    assert_within(after.elbo - before.elbo, before.marginal_kl, error)


def test_aggregated_posterior_of_a_subset_has_one_component_per_row():
    torch.manual_seed(0)
    assert len(aggregated(subset=3)().loc) == 3
    assert len(aggregated()().loc) == 7


def test_aggregated_posterior_does_not_change_with_the_guide():
    guide = flow_guide(model_with(pv.priors.StandardNormal(2)))
    guide(torch.rand(3, 16))
    prior = pv.priors.AggregatedPosterior(guide, torch.rand(12, 16))
    z = torch.randn(4, 2)
    before = prior().log_prob(z)
    randomized(guide)
    torch.testing.assert_close(prior().log_prob(z), before)
    assert not any(p.requires_grad for p in prior.parameters())


def test_copied_pair_is_independent():
    model, guide = bind_guide(pv.priors.VampPrior(2, pseudo_inputs=torch.rand(5, 16)))
    twins = copy.deepcopy((model, guide))
    assert twins[0].prior.guide is twins[1]
    z = torch.randn(4, 2)
    before = model.prior().log_prob(z)
    randomized(twins[1])
    torch.testing.assert_close(model.prior().log_prob(z), before)
    assert (twins[0].prior().log_prob(z) - before).abs().max() > 1e-4


def test_loaded_pair_has_the_same_prior():
    model, _ = bind_guide(pv.priors.VampPrior(2, pseudo_inputs=torch.rand(5, 16)))
    prior = pv.priors.VampPrior(2, pseudo_inputs=torch.rand(5, 16))
    other = model_with(prior)
    guide = amortized(other)
    prior.bind_guide(guide)
    other.load_state_dict(model.state_dict())
    z = torch.randn(4, 2)
    torch.testing.assert_close(prior().log_prob(z), model.prior().log_prob(z))


def test_vamp_prior_at_the_top_of_a_hierarchy():
    """The guide must sample the top first; otherwise the aggregated posterior is an integral."""
    for order in ("top-down", "bottom-up"):
        prior = pv.priors.VampPrior(2, pseudo_inputs=torch.rand(5, 16))

        def layer(z):
            return dist.Normal(torch.cat([z, z], -1), 1.0).to_event(1)

        likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(4, [8], 16))

        def model(x, prior=prior, layer=layer, likelihood=likelihood):
            p_top = prior()
            with pyro.plate("data", len(x)):
                z = pyro.sample("z_2", p_top)
                pyro.sample("x", likelihood(pyro.sample("z_1", layer(z))), obs=x)

        guide = pv.guides.HierarchicalGuide(model, pv.nets.MLP(16, [8]), order=order)
        prior.bind_guide(guide, site="z_2")
        x = torch.rand(10, 16).round()
        if order == "top-down":
            assert pv.evidence(model, guide, x, num_particles=5).values.shape == (10,)
        else:
            with pytest.raises(ValueError, match="depends on earlier samples, \\['z_1'\\]"):
                pv.evidence(model, guide, x, num_particles=5)


def test_priors_refuse_bad_arguments():
    rows = torch.rand(5, 16)
    with pytest.raises(ValueError, match="positive sizes"):
        pv.priors.MixtureOfNormals(2, components=0)
    with pytest.raises(ValueError, match="positive sizes of z"):
        pv.priors.VampPrior(pseudo_inputs=rows)
    with pytest.raises(ValueError, match="pseudo_inputs must be rows of x"):
        pv.priors.VampPrior(2, pseudo_inputs=rows.int())
    with pytest.raises(ValueError, match="a lower and an upper"):
        pv.priors.VampPrior(2, pseudo_inputs=rows, bounds=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"call prior\.bind_guide"):
        pv.priors.VampPrior(2, pseudo_inputs=rows)()
    with pytest.raises(TypeError, match="must be a Pyro program"):
        pv.priors.VampPrior(2, pseudo_inputs=rows).bind_guide(3)
    with pytest.raises(ValueError, match="bijection of R\\^2"):
        pv.priors.FlowPrior(2, pv.flows.Composition(3))
    with pytest.raises(ValueError, match="bijection of R\\^2"):
        pv.priors.FlowPrior(2, SigmoidTransform())
    with pytest.raises(ValueError, match="dim must be at least 1"):
        pv.priors.FlowPrior(0, AffineTransform(0.0, 1.0))
    with pytest.raises(ValueError, match="between 1 and the 7 data"):
        aggregated(subset=8)
    with pytest.raises(ValueError, match=r"at least one; got|data is empty"):
        pv.priors.AggregatedPosterior(make_pair()[1], torch.rand(0, 16))
    with pytest.raises(ValueError, match="length must be"):
        pv.flows.Composition(2, length=0)
    with pytest.raises(ValueError, match="parts of batch shape"):
        UniformMixture([])


def test_priors_refuse_guides_without_a_known_posterior():
    rows = torch.rand(5, 16)
    prior = pv.priors.VampPrior(3, pseudo_inputs=rows)
    guide = amortized(model_with(pv.priors.StandardNormal(2)))
    prior.bind_guide(guide)
    with pytest.raises(ValueError, match=r"for z of shape \(3,\)"):
        prior()
    prior.bind_guide(guide, site="w")
    with pytest.raises(ValueError, match="no site 'w'"):
        prior()
    prior = pv.priors.VampPrior(2, pseudo_inputs=rows)
    model = model_with(prior)
    prior.bind_guide(pv.guides.AmortizedDelta(model, pv.nets.MLP(16, [8])))
    with pytest.raises(ValueError, match="a point"):
        prior()
    prior.bind_guide(pv.guides.SemiAmortized(amortized(model), steps=1))
    with pytest.raises(ValueError, match="the guide runs the model"):
        prior()

    def two(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((z + w).sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    joint = functools.partial(flow_guide, two)
    with pytest.raises(ValueError, match="build it with joint=False"):
        pv.priors.AggregatedPosterior(joint(), rows)
    assert pv.priors.AggregatedPosterior(joint(joint=False), rows, site="w")().event_shape == (2,)


def test_flow_prior_accepts_torch_and_pyro_transforms():
    loc, scale = torch.randn(2), torch.rand(2) + 0.5
    z = torch.randn(5, 2)
    for transform in (
        AffineTransform(loc, scale, event_dim=1),
        IndependentTransform(AffineTransform(loc, scale), 1),
        ComposeTransform([AffineTransform(loc, scale, event_dim=1)]),
    ):
        prior = pv.priors.FlowPrior(2, transform)
        torch.testing.assert_close(
            prior().log_prob(z), dist.Normal(loc, scale).to_event(1).log_prob(z)
        )
    coupling = affine_coupling(2)
    prior = pv.priors.FlowPrior(2, coupling)
    assert {*prior.parameters()} == {*coupling.parameters()}
    with pytest.raises(ValueError, match="parameters that nothing would train"):
        pv.priors.FlowPrior(2, lambda: coupling)
    with pytest.raises(TypeError, match="must be a torch Transform"):
        pv.priors.FlowPrior(2, 3)


def test_prior_density_has_a_gradient_for_the_guide():
    """Compare the gradient of log p(z) through the encoder with its definition."""
    prior, guide = vamp()
    z = torch.randn(6, 2)
    parameters = [*guide.parameters(), prior.pseudo_inputs]
    found = torch.autograd.grad(prior().log_prob(z).sum(), parameters)
    loc, raw = guide.parameters_of(prior.pseudo_inputs.clamp(0, 1)).split(2, -1)
    q = dist.Normal(loc, softplus_scale(raw)).to_event(1)
    expected_log_prob = q.log_prob(z.unsqueeze(1)).logsumexp(1).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected_log_prob, parameters))
    prior, guide = exemplar()
    found = torch.autograd.grad(prior().log_prob(z).sum(), guide.encoder[0].weight)[0]
    assert found.abs().sum() > 0


def test_uniform_mixture_of_several_blocks():
    loc = torch.tensor([[-30.0], [-10.0], [0.0], [10.0], [30.0]])
    parts = [dist.Normal(part, 1.0).to_event(1) for part in loc.split([3, 2])]
    q = UniformMixture(parts)
    z = torch.randn(4, 1)
    expected = dist.Normal(loc, 1.0).to_event(1).log_prob(z.unsqueeze(1)).exp().mean(1).log()
    torch.testing.assert_close(q.log_prob(z), expected)
    nearest = (q.sample((4000,)) - loc.T).abs().argmin(1)
    shares = torch.bincount(nearest, minlength=5) / 4000
    assert ((shares - 0.2).abs() < 5 * (0.16 / 4000) ** 0.5).all()


def test_batch_of_mixtures_expands():
    q = pv.distributions.MixtureOfDiagNormals(
        torch.zeros(5, 2), torch.randn(5, 2, 3), torch.ones(5, 2, 3)
    )
    z = torch.randn(5, 3)
    assert q.expand((4, 5)).log_prob(z).shape == (4, 5)
    assert pv.distributions.MixtureOfDiagNormals(
        torch.zeros(2), torch.randn(2, 3), torch.ones(2, 3)
    ).expand((4, 5)).log_prob(z).shape == (4, 5)


def test_pseudo_inputs_lie_within_their_bounds():
    rows = torch.randn(5, 16)
    with pytest.raises(ValueError, match="Those outside have zero gradient"):
        pv.priors.VampPrior(2, pseudo_inputs=rows)
    assert pv.priors.VampPrior(2, pseudo_inputs=rows, bounds=None).rows().min() == rows.min()


def test_aggregated_posterior_freezes_the_guide_in_evaluation_mode():
    """A method is frozen with its module, including dropout; a plain function is refused."""

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(16, 2), torch.nn.Dropout(0.5))

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.MultivariateNormal(self.net(x), torch.eye(2)))

    pair, x, z = Pair(), torch.rand(12, 16), torch.randn(4, 2)
    prior = pv.priors.AggregatedPosterior(pair.guide, x)
    before = prior().log_prob(z)
    randomized(pair)
    assert torch.equal(prior.train()().log_prob(z), before)
    with pytest.raises(ValueError, match="must be a module or a method of one"):
        pv.priors.AggregatedPosterior(lambda x: Pair().guide(x), x)


def test_aggregated_posterior_draws_a_new_subset_each_time():
    guide = amortized(model_with(pv.priors.StandardNormal(2)))
    x = torch.rand(15, 16)
    guide(x)
    drawn = [pv.priors.AggregatedPosterior(guide, x, subset=5)().loc for _ in range(2)]
    assert not torch.equal(*drawn)


def test_aggregated_posterior_refuses_invalid_data():
    guide = make_pair()[1]
    x = torch.rand(6, 16)
    for data in (None, 3.0, [x]):
        with pytest.raises(ValueError, match="data must be a tensor, a numpy array, a DataFrame"):
            pv.priors.AggregatedPosterior(guide, data)
    with pytest.raises(ValueError, match=r"must be of one length, got \[6, 5\]"):
        pv.priors.AggregatedPosterior(guide, (x, torch.zeros(5)))
    with pytest.raises(TypeError, match="whole number"):
        pv.priors.AggregatedPosterior(guide, x, subset=2.5)


def test_aggregated_posterior_refuses_a_latent_outside_the_plate():
    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no site 'z' in the plate"):
        pv.priors.AggregatedPosterior(guide, torch.rand(3, 16))


def test_aggregated_posterior_of_scalar_latents():
    class Guide(torch.nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.7))

    x, z = torch.randn(20), torch.randn(5)
    found = pv.priors.AggregatedPosterior(Guide(), x)().log_prob(z)
    expected = dist.Normal(x / 2, 0.7).log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(20)
    torch.testing.assert_close(found, expected)
