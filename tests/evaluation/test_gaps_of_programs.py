"""Inference gaps of guides written as plain functions, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from torch import nn

import pyro_vae as pv
from pyro_vae._programs.local_offsets import OffsetGuide

QUICK = pv.evaluation.Ascent(learning_rate=0.02, num_particles=20, window=50, patience=2)
SLACK = 0.004  # nats, for an ascent that ends near the optimum


def assert_near(estimate, truth):
    """Allow 4.5 Monte Carlo errors, which fail by chance once in 150,000."""
    assert abs(estimate.mean - truth) < 4.5 * estimate.monte_carlo_error + SLACK


def kl(loc, scale, other_loc, other_scale):
    q, p = (torch.distributions.Normal(*each) for each in ((loc, scale), (other_loc, other_scale)))
    return torch.distributions.kl_divergence(q, p)


def test_two_latents_one_log_normal_against_closed_forms():
    """log w and z are independent given x, with conjugate posteriors; both guides are wrong."""
    s1, s2 = 0.5 + torch.rand(2, dtype=torch.float64)
    shift = torch.randn((), dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            w = pyro.sample("w", dist.LogNormal(x.new_zeros(()), 1.0))
            both = torch.stack([z, w.log()], -1)
            pyro.sample("x", dist.Normal(both, torch.stack([s1, s2])).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x[:, 0], 1.2 + 0.1 * x[:, 0].tanh()))
            pyro.sample("w", dist.LogNormal(0.2 * x[:, 1] + 0.3 * shift, 0.9 + 0 * x[:, 1]))

    x = torch.randn(60, 2, dtype=torch.float64) * (1 + torch.stack([s1, s2]).square()).sqrt()
    gaps = pv.inference_gaps(
        model, guide, x, num_particles=3000, ascent=QUICK, batch_size=30, seed=0
    )
    variances = torch.stack([s1, s2]).square()
    loc = x / (1 + variances)
    scale = (variances / (1 + variances)).sqrt()
    of_z = kl(0.3 * x[:, 0], 1.2 + 0.1 * x[:, 0].tanh(), loc[:, 0], scale[0])
    of_w = kl(0.2 * x[:, 1] + 0.3 * shift, torch.full_like(x[:, 1], 0.9), loc[:, 1], scale[1])
    # The scale of w is 0.9 for all data points, so it belongs to the family.
    best_of_w = kl(loc[:, 1], torch.full_like(x[:, 1], 0.9), loc[:, 1], scale[1]).mean().item()
    assert best_of_w > 0.01
    assert_near(gaps.approximation_gap, best_of_w)
    assert_near(gaps.amortization_gap, (of_z + of_w).mean().item() - best_of_w)
    assert gaps.parameters.shape == (60, 3)  # location and scale of z, location of w


def test_mean_field_gap_of_a_function_is_that_of_the_oracle():
    oracle = LinearGaussian(d=2, D=4, noise=0.8)
    slope = 0.5 * oracle.v

    def guide(x):
        scale = (0.1 * x[:, :2]).exp()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - oracle.mu) @ slope.T, scale).to_event(1))

    x = oracle.sample(40)
    gaps = pv.inference_gaps(oracle.model, guide, x, num_particles=3000, ascent=QUICK, seed=0)
    assert_near(gaps.approximation_gap, oracle.gap)
    assert gaps.amortization_gap.mean > 0.05


def test_correlated_latents_in_order_have_the_shift_of_every_conditional():
    """q(b|a) has the slope of the exact posterior, so an offset of its location closes the gap."""
    oracle = LinearGaussian(d=2, D=4, noise=0.8, exact=True)
    covariance = oracle.s
    slope = covariance[1, 0] / covariance[0, 0]
    conditional = (covariance[1, 1] - slope * covariance[1, 0]).sqrt()

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
            mean = torch.stack([a, b], -1) @ oracle.weight.T + oracle.mu
            pyro.sample("x", dist.Normal(mean, oracle.s2.sqrt()).to_event(1), obs=x)

    def guide(x):
        loc = (x - oracle.mu) @ oracle.v.T
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(loc[:, 0] + 0.2, covariance[0, 0].sqrt()))
            mean = 0.7 * loc[:, 1] + slope * (a - loc[:, 0])
            pyro.sample("b", dist.Normal(mean, conditional))

    x = oracle.sample(30)
    gaps = pv.inference_gaps(model, guide, x, num_particles=2000, ascent=QUICK, seed=0)
    assert gaps.parameters.shape == (30, 2)  # both locations
    assert_near(gaps.approximation_gap, 0.0)
    truth = oracle.log_evidence(x).mean().item()
    assert abs(gaps.log_evidence.mean - truth) < 4.5 * gaps.log_evidence.monte_carlo_error + SLACK


B = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
POSITIVE = B.exp()
GUIDES = {
    "normal": lambda: dist.Normal(B, POSITIVE).to_event(1),
    "affine": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).expand([7, 3]),
        [dist.transforms.AffineTransform(B, POSITIVE)],
    ).to_event(1),
    "low rank": lambda: dist.LowRankMultivariateNormal(B, B.unsqueeze(-1), POSITIVE),
    "full": lambda: dist.MultivariateNormal(B, torch.eye(3) + B.unsqueeze(-1) @ B.unsqueeze(-2)),
    "masked": lambda: dist.Normal(B, POSITIVE).mask(B > 0).to_event(1),
    "log-normal": lambda: dist.LogNormal(B, POSITIVE).to_event(1),
    "gamma": lambda: dist.Gamma(POSITIVE, 1 / POSITIVE).to_event(1),
    "beta": lambda: dist.Beta(POSITIVE, 1 + POSITIVE).to_event(1),
    "dirichlet": lambda: dist.Dirichlet(POSITIVE),
    "student": lambda: dist.StudentT(2 + POSITIVE, B, POSITIVE).to_event(1),
    "uniform": lambda: dist.Uniform(B, B + POSITIVE).to_event(1),
    "weibull": lambda: dist.Weibull(POSITIVE, 1 + POSITIVE).to_event(1),
    "logistic normal": lambda: dist.LogisticNormal(B, POSITIVE),
    "kumaraswamy": lambda: dist.Kumaraswamy(POSITIVE, 1 + POSITIVE).to_event(1),
    "relaxed": lambda: dist.RelaxedBernoulli(torch.tensor(0.5), logits=B).to_event(1),
    "relaxed categorical": lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=B),
    "laplace": lambda: dist.Laplace(B, POSITIVE).to_event(1),
    "half-normal": lambda: dist.HalfNormal(POSITIVE).to_event(1),
    "pareto": lambda: dist.Pareto(POSITIVE, 1 + POSITIVE).to_event(1),
    "mixture": lambda: pv.distributions.MixtureOfDiagNormals(
        B, B.unsqueeze(-1).expand(7, 3, 2), POSITIVE.unsqueeze(-1).expand(7, 3, 2)
    ),
    "wrapped": lambda: pv.distributions.WrappedNormal(B, POSITIVE).to_event(1),
}


@pytest.mark.parametrize("name", GUIDES)
def test_offsets_of_zero_are_the_guide_itself_and_others_are_valid_members(name):
    def guide(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", GUIDES[name]())

    offsets = OffsetGuide(guide, (torch.zeros(7, 2),))
    zeros = offsets.parameters_of(torch.zeros(7, 2))
    assert zeros.shape == (7, offsets.num_parameters)
    for parameters, is_same in ((zeros, True), (torch.randn_like(zeros), False)):
        with pyro.poutine.trace() as tracer:
            torch.manual_seed(3)
            value = offsets.sample(parameters, torch.zeros(7, 2))
        with pyro.poutine.trace() as own:
            torch.manual_seed(3)
            guide(torch.zeros(7, 2))
        site = tracer.trace.nodes["z"]
        assert site["fn"].log_prob(value).isfinite().all()
        assert site["fn"].batch_shape == own.trace.nodes["z"]["fn"].batch_shape
        is_close = torch.allclose(value, own.trace.nodes["z"]["value"], atol=1e-4, rtol=1e-3)
        assert is_close is is_same


def test_offsets_move_only_their_own_data_point():
    encoder = nn.Linear(2, 6)

    def guide(x):
        loc, raw = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 3, dim=-1):
            return pyro.sample("z", dist.Normal(loc, raw.exp()))

    x = torch.randn(5, 2)
    offsets = OffsetGuide(guide, (x,))
    parameters = offsets.parameters_of(x)
    assert parameters.shape == (5, 6)
    parameters[2] = 1.0
    with pyro.plate("particles", 4, dim=-3), pyro.poutine.trace() as tracer:
        offsets.sample(parameters, x)
    fn = tracer.trace.nodes["z"]["fn"]
    loc, raw = encoder(x).chunk(2, -1)
    moved = torch.zeros(5, 1)
    moved[2] = 1.0
    torch.testing.assert_close(fn.loc, (loc + moved).expand(4, 5, 3))
    torch.testing.assert_close(fn.scale, (raw + moved).exp().expand(4, 5, 3))


def test_pyro_parameters_of_a_function_stay_in_the_store():
    oracle = LinearGaussian(d=1, D=3, noise=0.5, exact=True)

    def guide(x):
        slope = pyro.param("slope", 0.1 * torch.ones(3, 1, dtype=torch.float64))
        scale = pyro.param("scale", oracle.s.sqrt(), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            loc = (x - oracle.mu) @ slope
            pyro.sample("z", dist.Normal(loc, scale[0]).to_event(1))

    x = oracle.sample(20)
    with pytest.warns(UserWarning, match="found no value of pyro.param"):
        gaps = pv.inference_gaps(oracle.model, guide, x, num_particles=1000, ascent=QUICK, seed=0)
    assert_near(gaps.approximation_gap, 0.0)
    assert not list(pyro.get_param_store())


class Odd(dist.Normal):
    """A distribution whose constructor does not take its attributes."""

    def __init__(self, log_scale, loc):
        self._raw = log_scale
        super().__init__(loc, log_scale.exp())

    def expand(self, batch_shape, _instance=None):
        return Odd(self._raw.expand(batch_shape), self.loc.expand(batch_shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: dist.Normal(torch.zeros(len(x)), 1.0), "no parameter that differs"),
        (lambda x: Odd(x[:, 0], x[:, 0]), "Odd has no attribute 'log_scale'"),
        (lambda x: dist.Delta(x[:, 0]), "one point"),
    ],
)
def test_guides_without_known_parameters_are_refused_by_name(make, message):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x
            )

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(x))

    with pytest.raises(ValueError, match=message):
        pv.inference_gaps(model, guide, torch.randn(6, 2), num_particles=10)


def test_flow_with_parameters_of_its_own_optimizes_its_base():
    """The flow's numbers are the same for all data points, so they belong to the family."""
    scale = math.exp(torch.randn(()).item() / 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.log(), scale), obs=x)

    def guide(x):
        base = dist.Normal(0.3 * x, 1 + 0.1 * x.tanh())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.ExpTransform()]))

    x = torch.randn(30, dtype=torch.float64)
    gaps = pv.inference_gaps(model, guide, x, num_particles=2000, ascent=QUICK, seed=0)
    assert_near(gaps.approximation_gap, 0.0)
    assert gaps.parameters.shape == (30, 2)


def masked_pair(make_guide):
    """Return a pair whose only latent is masked, so that no density depends on the guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=False):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    return model, make_guide(model, nn.Linear(3, 8))


@pytest.mark.parametrize("capture", [False, True])
def test_a_guide_that_no_density_depends_on_has_no_gaps(capture, without_compiler):
    x = torch.randn(4, 3)
    pair = masked_pair(pv.guides.AmortizedNormal)
    found = pv.inference_gaps(*pair, x, num_particles=10, capture=capture, seed=0)
    exact = dist.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(found.log_evidence.values.float(), exact)
    for gap in (found.approximation_gap, found.amortization_gap):
        assert gap.values.abs().max() < 1e-5


def test_a_refinement_without_a_gradient_keeps_the_parameters():
    x = torch.randn(4, 3)
    model, guide = masked_pair(pv.guides.AmortizedNormal)
    refined = pv.guides.SemiAmortized(guide, steps=2)
    z = pv.terms(model, refined, x).samples["z"][0]
    densities = []
    for program in (refined, guide):
        trace = pyro.poutine.trace(pyro.poutine.condition(program, data={"z": z})).get_trace(x)
        densities.append(trace.nodes["z"]["fn"].log_prob(z))
    torch.testing.assert_close(*densities)


def test_a_discrete_latent_is_refused_with_the_way_to_both_gaps_together():
    """The remedy named an objective. An estimator takes none."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=x))

    with pytest.raises(ValueError, match=r"mean minus the elbo of pyro_vae.evidence\.$") as caught:
        pv.inference_gaps(model, guide, torch.randn(5), num_particles=5)
    assert "objectives" not in str(caught.value)
