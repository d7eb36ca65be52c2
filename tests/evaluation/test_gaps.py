"""Compare approximation and amortization gaps with closed forms and quadrature."""

import dataclasses
import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from interrupting import Interrupting
from oracles import LinearGaussian, assert_within
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae import flows, guides
from pyro_vae._utils.numerics import inverse_softplus_scale, softplus_scale
from pyro_vae.evaluation._gap_estimates import WeightSummary, estimate_gaps, select_estimator

NO_ASCENT = pv.evaluation.Ascent(learning_rate=1e-6, window=1, patience=1)  # keeps its start
QUICK = pv.evaluation.Ascent(learning_rate=0.02, num_particles=20, window=50, patience=2)


def mean_field(oracle, shift=0.0, stretch=1.0):
    """Return the best diagonal Gaussian guide, its means shifted and its scales stretched."""
    x = oracle.sample(3)
    guide = guides.AmortizedNormal(oracle.model, nn.Identity()).to(x)
    guide(x)
    scales = oracle.s.diagonal().sqrt() * stretch
    with torch.no_grad():
        head = guide.built["head"]
        head.weight.copy_(torch.cat([oracle.v, torch.zeros_like(oracle.v)]))
        raw = torch.tensor([inverse_softplus_scale(scale) for scale in scales.tolist()])
        head.bias.copy_(torch.cat([shift - oracle.v @ oracle.mu, raw]))
    return guide


def correlated(dtype=torch.float64):
    """Return a linear-Gaussian model with a mean-field gap and weights of small variance."""
    while True:
        weight = torch.randn(4, 2)
        weight[:, 1] = weight[:, 0] + weight[:, 1]
        oracle = LinearGaussian(weight=weight, noise=0.8, dtype=dtype)
        if 0.02 < oracle.gap < 0.1 and 0 < oracle.weight_excess < 0.3:
            return oracle


def scores(estimate, truth):
    return (estimate.values - truth) / estimate.monte_carlo_errors


def test_gaps_match_a_perturbed_mean_field_encoder():
    oracle = correlated()
    x = oracle.sample(40)
    shift = torch.tensor([0.3, -0.2], dtype=torch.float64)
    guide = mean_field(oracle, shift, stretch=1.5)
    gaps = pv.inference_gaps(
        oracle.model, guide, x, num_particles=2000, ascent=QUICK, batch_size=20, seed=0
    )
    # KL(q || posterior) of a Gaussian, minus that of the best diagonal Gaussian.
    precision = oracle.precision
    covariance = 1.5**2 * oracle.s
    log_det = 0.5 * (precision @ covariance).logdet()
    kl = 0.5 * ((precision @ covariance).trace() - 2 + shift @ precision @ shift) - log_det
    assert oracle.gap > 0.02
    assert kl - oracle.gap > 0.1
    slack = 0.003  # for an ascent that ends near the optimum
    for gap, truth in (
        (gaps.approximation_gap, oracle.gap),
        (gaps.amortization_gap, kl - oracle.gap),
    ):
        assert abs(gap.mean - truth) < 4.5 * gap.monte_carlo_error + slack
    assert scores(gaps.log_evidence, oracle.log_evidence(x)).abs().max() < 4.5
    assert gaps.converged == (True, True)
    # The closed form: the posterior's mean and the diagonal of its precision.
    loc, raw = gaps.parameters.split(2, -1)
    scale = softplus_scale(raw)
    torch.testing.assert_close(loc, (x - oracle.mu) @ oracle.v.T, atol=0.03, rtol=0.03)
    expected = oracle.s.diagonal().sqrt().expand_as(scale)
    torch.testing.assert_close(scale, expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_monte_carlo_errors_of_gaps_cover_known_values(dtype):
    """At the optimum every quantity is known; 300 data points serve as 300 repeats."""
    oracle = correlated(dtype)
    x = oracle.sample(300)
    guide = mean_field(oracle)
    gaps = pv.inference_gaps(
        oracle.model, guide, x, num_particles=1000, ascent=NO_ASCENT, batch_size=150, seed=1
    )
    log_evidence = oracle.log_evidence(x)
    for estimate, truth in (
        (gaps.log_evidence, log_evidence),
        (gaps.best_elbo, log_evidence - oracle.gap),
        (gaps.amortized_elbo, log_evidence - oracle.gap),
        (gaps.approximation_gap, oracle.gap),
        (gaps.amortization_gap, 0.0),
    ):
        z = scores(estimate, truth)
        z = z[estimate.monte_carlo_errors > 0]  # zero where the guide's own parameters are the best
        assert len(z) >= 297
        # 3.7 standard errors below, and more above, because skewed weights have heavier tails.
        assert 0.85 < z.std() < 1.22
        assert abs(z.mean()) < 4.5 / 300**0.5 + 0.1  # includes the bias of log p(x)
        assert estimate.monte_carlo_error == pytest.approx(
            (estimate.monte_carlo_errors.square().sum().sqrt() / 300).item()
        )
    population = gaps.log_evidence.standard_error
    assert population == pytest.approx(gaps.log_evidence.values.std().item() / 300**0.5)


def test_full_covariance_has_no_approximation_gap():
    oracle = correlated()
    x = oracle.sample(15)
    guide = guides.AmortizedMultivariateNormal(oracle.model, nn.Linear(4, 4)).double()
    ascent = pv.evaluation.Ascent(learning_rate=0.03, num_particles=20, window=50, patience=2)
    gaps = pv.inference_gaps(oracle.model, guide, x, num_particles=1000, ascent=ascent, seed=0)
    assert abs(gaps.approximation_gap.mean) < 4.5 * gaps.approximation_gap.monte_carlo_error + 0.004
    assert gaps.amortization_gap.mean > 0.5
    assert gaps.approximation_gap.mean < 0.2 * oracle.gap
    # Errors of shared draws cancel in part, so the gap is more accurate than independent errors.
    assert (gaps.sources == 1).all()
    errors = [e.monte_carlo_errors for e in (gaps.log_evidence, gaps.best_elbo)]
    assert (gaps.approximation_gap.monte_carlo_errors < torch.hypot(*errors)).all()
    torch.testing.assert_close(
        gaps.log_evidence.values - gaps.amortized_elbo.values,
        gaps.approximation_gap.values + gaps.amortization_gap.values,
    )


class Curved:
    """A nonlinear decoder: x ~ N(f(z), 1) in three dimensions, z in one or two."""

    def __init__(self, dim):
        self.dim = dim
        self.first, self.second = (torch.randn(dim, 3, dtype=torch.float64) for _ in range(2))
        line = torch.linspace(-8, 8, 1001 if dim == 1 else 151, dtype=torch.float64)
        self.grid = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
        self.cell = (line[1] - line[0]) ** dim

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.dim), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z):
        return dist.Normal(z @ self.first + 0.5 * torch.sin(2 * z @ self.second), 1.0).to_event(1)

    def sample(self, count):
        return self.likelihood(torch.randn(count, self.dim, dtype=torch.float64)).sample()

    def log_joint(self, x):
        """Return log p(x, z) on the grid, (G, B)."""
        prior = dist.Normal(torch.zeros_like(self.grid), 1.0).log_prob(self.grid).sum(-1)
        return prior.unsqueeze(1) + self.likelihood(self.grid.unsqueeze(1)).log_prob(x)

    def log_evidence(self, x):
        return self.log_joint(x).logsumexp(0) + self.cell.log()

    def elbo(self, guide, parameters, x):
        """Return E_q[log p(x, z) - log q(z)] on the grid for the given guide parameters, (B,)."""

        def member(x):
            return guide.sample(parameters, x)

        z = self.grid.unsqueeze(1).expand(-1, len(x), -1)
        with torch.no_grad(), pyro.plate("grid", len(z), dim=-2):
            trace = poutine.trace(poutine.condition(member, data={"z": z})).get_trace(x)
        log_q = trace.nodes["z"]["fn"].log_prob(z)
        q = log_q.exp() * self.cell
        torch.testing.assert_close(q.sum(0), torch.ones(len(x)).to(q), atol=2e-3, rtol=0)
        return (q * (self.log_joint(x) - log_q)).sum(0)


def flow(layer, length=2):
    return functools.partial(guides.AmortizedFlow, flow=layer, length=length)


FAMILIES = {
    "normal": guides.AmortizedNormal,
    "full covariance": guides.AmortizedMultivariateNormal,
    "low rank": functools.partial(guides.AmortizedLowRankNormal, rank=1),
    "mixture": functools.partial(guides.AmortizedMixture, components=2),
    "planar": flow(flows.Planar),
    "inverse autoregressive": flow(flows.InverseAutoregressive),
    "spline": flow(flows.NeuralSpline, 1),
}
WITHOUT_INVERSE = {"planar"}
LONG = ("mixture", "planar", "inverse autoregressive")


@pytest.mark.parametrize(
    ("dim", "name"),
    [
        *((1, name) for name in ("normal", "mixture", "planar")),
        *((2, name) for name in ("normal", "full covariance", "low rank", "spline")),
        *(pytest.param(2, name, marks=pytest.mark.slow) for name in LONG),
    ],
)
def test_gaps_agree_with_quadrature(dim, name):
    """Compare log p(x) and the ELBOs of the best and amortized parameters with a grid."""
    model = Curved(dim)
    x = model.sample(5)
    guide = FAMILIES[name](model, nn.Linear(3, 5)).double()
    ascent = pv.evaluation.Ascent(learning_rate=0.03, window=50, patience=1, max_steps=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ascent has not converged
        gaps = pv.inference_gaps(model, guide, x, num_particles=2000, ascent=ascent, seed=0)
    error = (gaps.log_evidence.values - model.log_evidence(x)).abs()
    # Weights of a narrow guide have long tails, and their estimated errors are slightly too small.
    assert (error < 5 * gaps.log_evidence.monte_carlo_errors + 0.03).all()
    assert gaps.amortization_gap.mean > 0.1
    assert gaps.approximation_gap.mean > -4 * gaps.approximation_gap.monte_carlo_error
    if name not in WITHOUT_INVERSE:
        best = model.elbo(guide, gaps.parameters, x)
        assert scores(gaps.best_elbo, best).abs().max() < 4.5
        amortized = model.elbo(guide, guide.parameters_of(x), x)
        assert scores(gaps.amortized_elbo, amortized).abs().max() < 4.5


def test_best_gaussian_matches_a_direct_search():
    """Compare the best ELBO with quadrature and an LBFGS search over means and scales."""
    model = Curved(1)
    x = model.sample(5)
    guide = guides.AmortizedNormal(model, nn.Linear(3, 2)).double()
    ascent = pv.evaluation.Ascent(learning_rate=0.02, num_particles=20, window=50, patience=4)
    gaps = pv.inference_gaps(model, guide, x, num_particles=4000, ascent=ascent, seed=0)
    assert all(gaps.converged)
    parameters = gaps.parameters.clone().requires_grad_()
    nodes = torch.linspace(-5, 5, 201, dtype=torch.float64).unsqueeze(1)
    weights = dist.Normal(0.0, 1.0).log_prob(nodes).exp() * 0.05
    search = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def elbo():
        q = guide.built["posterior"].families[0](parameters.unbind(-1))
        z = q.mean + q.stddev * nodes
        log_joint = model.likelihood(z.unsqueeze(-1)).log_prob(x)
        log_joint = log_joint + dist.Normal(0.0, 1.0).log_prob(z)
        return (weights * log_joint).sum(0) + q.entropy()

    def closure():
        search.zero_grad()
        loss = -elbo().sum()
        loss.backward()
        return loss

    start = elbo().detach()
    search.step(closure)
    optimum = elbo().detach()
    assert scores(gaps.best_elbo, start).abs().max() < 4.5
    assert (optimum - start).mean() < 0.01  # no gain is left
    assert (optimum - start).min() > -1e-6


def test_failed_ascent_keeps_the_guide_parameters():
    oracle = correlated()
    x = oracle.sample(8)
    ascent = pv.evaluation.Ascent(learning_rate=1e6, window=1, patience=1, max_steps=2)
    with pytest.warns(UserWarning, match=r"ascents of 100\.0% of the data ended clearly below"):
        gaps = pv.inference_gaps(oracle.model, mean_field(oracle), x, ascent=ascent, seed=0)
    assert (gaps.amortization_gap.values == 0).all()
    assert gaps.failed.tolist() == [True] * 8
    assert "8 data points below their start" in str(gaps)
    assert (gaps.sources == 0).all()
    torch.testing.assert_close(gaps.parameters, mean_field(oracle).parameters_of(x).detach())


@pytest.mark.parametrize("learning_rate", [1e4, 1e30])
def test_diverged_ascent_warns(learning_rate):
    """Start away from the optimum; windows without a gain must not count as convergence."""
    oracle = correlated()
    x = oracle.sample(8)
    ascent = pv.evaluation.Ascent(learning_rate=learning_rate, window=5, patience=2, max_steps=100)
    with pytest.warns(UserWarning, match="a smaller learning rate"):
        gaps = pv.inference_gaps(
            oracle.model, mean_field(oracle, stretch=2.0), x, ascent=ascent, seed=0
        )
    assert gaps.failed.all()
    if learning_rate == 1e30:
        assert gaps.converged == (False,)


def test_ascent_with_nan_gradients_has_not_converged():
    ascended = pv.evaluation.Ascent(window=2, patience=2)(
        lambda parameters: (parameters.sum(1) * torch.nan, parameters), torch.ones(3, 2)
    )
    assert (ascended.steps, ascended.converged) == (4, False)


def test_ascent_skips_nan_and_infinite_gradients():
    """A NaN would stay in Adam's running averages."""

    def step(parameters):
        seen.append(parameters.clone())
        gradient = -(parameters - 1.0)
        broken = torch.full_like(gradient, float(("nan", "inf", "-inf")[len(seen) % 3]))
        return -0.5 * (parameters - 1).square().sum(1), broken if len(seen) < 9 else gradient

    seen = []
    ascended = pv.evaluation.Ascent(learning_rate=0.05, window=20, patience=3)(
        step, torch.zeros(3, 2)
    )
    assert torch.equal(seen[8], torch.zeros(3, 2))
    assert (ascended.parameters - 1).abs().max() < 0.05


def test_parameters_are_averaged_from_the_start_of_the_best_window():
    """Parameters after step t are 0.1 t; the best ELBO is in the second window."""
    elbos = iter([1.0, 1.0, 5.0, 5.0, 2.0, 2.0, 3.0, 3.0])

    def step(parameters):
        return torch.full((1,), next(elbos)), torch.ones_like(parameters)

    ascent = pv.evaluation.Ascent(learning_rate=0.1, window=2, patience=2)
    ascended = ascent(step, torch.zeros(1, 1, dtype=torch.float64))
    # With a gradient of one, each Adam step equals the learning rate. The mean over steps 3 to 8:
    assert ascended.parameters.item() == pytest.approx(0.1 * (3 + 8) / 2, rel=1e-5)


def test_given_evidence_is_used_where_it_is_more_accurate():
    oracle = correlated()
    x = oracle.sample(9)
    exact = dataclasses.replace(
        pv.evidence(oracle.model, mean_field(oracle), x, num_particles=2),
        values=oracle.log_evidence(x),
        monte_carlo_errors=torch.full((9,), 1e-9),
        khat=torch.zeros(9),
    )
    options = {"num_particles": 50, "ascent": NO_ASCENT, "batch_size": 4, "seed": 0}
    gaps = pv.inference_gaps(oracle.model, mean_field(oracle), x, evidence=exact, **options)
    assert (gaps.sources == 2).all()
    torch.testing.assert_close(gaps.log_evidence.values, oracle.log_evidence(x))
    assert "given 9" in str(gaps)
    without = pv.inference_gaps(oracle.model, mean_field(oracle), x, **options)
    assert (without.sources < 2).all()
    torch.testing.assert_close(without.best_elbo.values, gaps.best_elbo.values)


def test_select_estimator():
    nan, inf = float("nan"), float("inf")
    rows = [  # values, errors, k-hats, choice; the first estimator is more accurate for most data
        ([1.0, 1.1], [0.1, 0.2], [0.3, 0.3], 0),
        ([1.0, 1.1], [0.2, 0.1], [0.3, 0.3], 0),
        ([1.0, 5.0], [0.1, 0.2], [0.3, 0.3], 1),  # clearly higher: the first has missed weights
        ([1.0, 5.0], [0.1, 0.2], [0.3, 0.9], 0),  # but not if it is unreliable
        ([1.0, 5.0], [0.1, 0.2], [0.3, nan], 0),
        ([5.0, 1.0], [0.1, 0.2], [0.3, 0.3], 0),
        ([-inf, 1.0], [0.1, 0.2], [0.9, 0.3], 1),
        ([nan, 1.0], [nan, 0.2], [nan, 0.3], 1),
        ([nan, 1.0], [nan, 0.2], [nan, 0.9], 0),
    ]
    values, errors, khats, choice = zip(*rows, strict=True)
    values, errors, khats = (torch.tensor(each).T for each in (values, errors, khats))
    assert select_estimator(values, errors.square(), khats).tolist() == list(choice)
    # The choice for most data does not change with a single large error.
    wild = torch.tensor([[0.1, 0.1, 9.0], [0.2, 0.2, 0.2]])
    assert select_estimator(torch.zeros(2, 3), wild.square(), torch.zeros(2, 3)).tolist() == [
        0,
        0,
        0,
    ]
    swapped = select_estimator(values.flip(0), errors.square().flip(0), khats.flip(0))
    assert swapped.tolist() == [1 - number for number in choice]
    unknown = torch.full((1, len(rows)), nan)  # the error of a single draw
    assert select_estimator(values, torch.cat([unknown, errors[1:]]), khats).tolist() == [1] * len(
        rows
    )


def test_captured_gaps_equal_eager_gaps(without_compiler):
    oracle = correlated()
    x = oracle.sample(20)
    ascent = pv.evaluation.Ascent(learning_rate=0.01, window=10, patience=1, max_steps=20)
    runs = []
    for capture in (True, False):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*captured")
            warnings.filterwarnings("ignore", message=".*still gaining")
            runs.append(
                pv.inference_gaps(
                    oracle.model,
                    mean_field(oracle, 0.5),
                    x,
                    num_particles=100,
                    ascent=ascent,
                    batch_size=10,
                    pairs_per_pass=200,
                    capture=capture,
                    seed=0,
                )
            )
    for name in ("log_evidence", "best_elbo", "approximation_gap"):
        torch.testing.assert_close(*(getattr(run, name).values for run in runs))
    torch.testing.assert_close(*(run.parameters for run in runs))


def test_gaps_with_several_latents_covariates_and_a_loader():
    def model(x, y):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            top = pyro.sample("top", dist.Normal(y, 1.0))
            z = pyro.sample("z", dist.Normal(top.unsqueeze(-1), x.new_ones(3)).to_event(1))
            pyro.sample("x", dist.Normal(z * rate.unsqueeze(-1), 1.0).to_event(1), obs=x)

    class Encoder(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, y.unsqueeze(-1)], -1)

    x, y = torch.randn(6, 3), torch.randn(6)
    guide = guides.AmortizedNormal(model, Encoder())
    ascent = pv.evaluation.Ascent(learning_rate=0.05, window=20, patience=1, max_steps=60)
    rows = torch.utils.data.TensorDataset(x, y)
    stream = torch.utils.data.DataLoader(rows, batch_size=4)
    gaps = pv.inference_gaps(
        model, guide, stream, num_particles=200, ascent=ascent, vectorize_particles=True, seed=0
    )
    assert gaps.amortization_gap.mean > 0
    assert gaps.approximation_gap.values.shape == (6,)
    assert len(gaps.steps) == 2
    assert list(gaps.table.columns) == ["mean", "standard_error", "monte_carlo_error"]
    assert "amortization_gap" in str(gaps)


def test_gaps_warn_when_an_ascent_reaches_max_steps(pair, binary):
    ascent = pv.evaluation.Ascent(window=2, patience=5, max_steps=4)
    with pytest.warns(UserWarning, match="still gaining when they reached 4 steps"):
        gaps = pv.inference_gaps(*pair, binary, num_particles=10, ascent=ascent, seed=0)
    assert gaps.converged == (False,)


def test_gaps_refuse_bad_arguments_and_guides(pair, binary):
    model, guide = pair
    with pytest.raises(TypeError, match="SemiAmortized has only parameters_of"):
        pv.inference_gaps(model, guides.SemiAmortized(guide), binary)
    with pytest.raises(ValueError, match="one point"):
        pv.inference_gaps(model, guides.AmortizedDelta(model, pv.nets.MLP(16, [8])), binary)
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        pv.inference_gaps(model, guide, binary, num_particles=1)
    evidence = pv.evidence(model, guide, binary[:7], num_particles=10)
    with pytest.raises(ValueError, match="7 values for 50 data"):
        pv.inference_gaps(model, guide, binary, evidence=evidence)
    with pytest.raises(TypeError, match=r"a result of pv\.evidence"):
        pv.inference_gaps(model, guide, binary, evidence=evidence.values)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        pv.evaluation.Ascent(learning_rate=0.0)
    with pytest.raises(ValueError, match="max_steps must be at least 100"):
        pv.evaluation.Ascent(max_steps=50)
    with pytest.raises(TypeError, match="patience must be a whole number"):
        pv.evaluation.Ascent(patience=1.5)
    with pytest.raises(
        TypeError, match=r"ascent must be a pyro_vae\.evaluation\.Ascent, got 0\.01"
    ):
        pv.inference_gaps(*pair, binary, ascent=0.01)


def test_mean_evidence_is_within_its_standard_error():
    oracle = correlated()
    gaps = pv.inference_gaps(
        oracle.model, mean_field(oracle), oracle.sample(200), num_particles=50, ascent=NO_ASCENT
    )
    dimension = len(oracle.mu)
    entropy = 0.5 * (oracle.covariance.logdet() + dimension * (1 + 1.8378770664093453))
    assert_within(gaps.log_evidence.mean, -entropy.item(), gaps.log_evidence.standard_error)


def test_gaps_resume_exactly_after_an_interrupt():
    oracle = correlated()
    x = oracle.sample(30)
    guide = mean_field(oracle, shift=0.1)
    ascent = pv.evaluation.Ascent(learning_rate=0.02, num_particles=2, window=5, patience=1)
    options = {"num_particles": 50, "ascent": ascent, "batch_size": 10, "seed": 3}
    evidence = pv.evidence(oracle.model, guide, x, num_particles=100, seed=0)
    options["evidence"] = evidence
    whole = pv.inference_gaps(oracle.model, guide, x, **options)
    with pytest.raises(
        pv.evaluation.Interrupted, match="inference_gaps was stopped after 20 data"
    ) as stopped:
        pv.inference_gaps(oracle.model, guide, x, progress=Interrupting(2), **options)
    so_far = stopped.value.partial
    assert torch.equal(so_far.best_elbo.values, whole.best_elbo.values[:20])
    assert so_far.steps == whole.steps[:2]
    resumed = pv.inference_gaps(oracle.model, guide, x, resume=stopped.value, **options)
    for field in dataclasses.fields(whole):
        found, expected = (getattr(gaps, field.name) for gaps in (resumed, whole))
        if isinstance(expected, pv.evaluation.Estimate):
            assert torch.equal(found.values, expected.values)
            assert torch.equal(found.monte_carlo_errors, expected.monte_carlo_errors)
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected)
        else:
            assert found == expected


def test_log_evidence_is_not_below_an_elbo():
    """Also if no estimate is reliable: the weights of the guide alone are too low by 100 nats."""
    few = torch.arange(6).double()  # data points
    log_weights = -20 * torch.rand(2, 20, 6, dtype=torch.float64)
    log_weights[0] -= 100 + few
    of_guide, of_best = (WeightSummary.of(lambda each=each: each, 20) for each in log_weights)
    of_guide = dataclasses.replace(
        of_guide,
        evidence_variance=of_guide.evidence_variance / 100,  # small, as if by missing large weights
        khat=torch.ones(6),
    )
    gaps = estimate_gaps(of_guide, dataclasses.replace(of_best, khat=torch.ones(6)), None)
    assert gaps.sources.tolist() == [1] * 6
    assert torch.equal(gaps.log_evidence.values, of_best.log_evidence)
    assert (gaps.approximation_gap.values >= 0).all()
    worse = dataclasses.replace(of_best, elbo=of_guide.elbo - 1e4, log_evidence=of_guide.elbo - 1e3)
    given = (of_guide.elbo - 50, torch.full((6,), 1e-3), torch.zeros(6))
    gaps = estimate_gaps(of_guide, worse, given)
    assert gaps.failed.all()
    assert gaps.sources.tolist() == [0] * 6


def test_select_estimator_accounts_for_multiple_comparisons():
    """3.5 standard errors are significant among 10 data points, but not among 10,000."""
    for count, taken in ((10, 1), (10_000, 0)):
        values = torch.zeros(2, count)
        values[1, 0], values[1, 1] = 3.5 * 5**0.5, 6 * 5**0.5
        variances = torch.tensor([1.0, 4.0]).unsqueeze(1).expand(2, count)
        sources = select_estimator(values, variances, torch.zeros(2, count))
        assert sources[:2].tolist() == [taken, 1]
        assert sources.sum() == taken + 1


@pytest.mark.slow
def test_intervals_have_nominal_coverage():
    """Repeat 200 times with fresh data and draws.

    Intervals from the standard error cover the expectation over all data. Intervals from the
    Monte Carlo error cover the mean over the given data. Both ignore two biases: the ascent ends
    slightly below the optimum, and log p(x) is low by half of the weights' variance over K. They
    are 0.3 and -0.2 of the Monte Carlo error of the approximation gap here.
    """
    weight = torch.tensor([[1.0, 0.8], [-0.4, 0.5], [0.6, 0.9], [0.3, -0.5]])
    oracle = LinearGaussian(weight=weight, noise=1.0)
    # The error of the encoder's means depends on x, and so does the amortization gap.
    shift = torch.tensor([0.6, -0.5], dtype=torch.float64)
    guide = mean_field(oracle, shift + 0.2 * oracle.v @ oracle.mu, stretch=1.3)
    with torch.no_grad():
        guide.built["head"].weight[:2] *= 0.8
    precision, covariance = oracle.precision, 1.3**2 * oracle.s
    off = -0.2 * oracle.v
    of_scales = 0.5 * ((precision @ covariance).trace() - 2 - (precision @ covariance).logdet())
    of_means = 0.5 * (precision @ (off @ oracle.covariance @ off.T + torch.outer(shift, shift)))
    total = (of_scales + of_means.trace()).item()
    expectations = {
        "approximation": oracle.gap,
        "amortization": total - oracle.gap,
        "total": total,
    }
    ascent = pv.evaluation.Ascent(learning_rate=0.02, num_particles=20, window=50, patience=3)
    hits = {(name, kind): 0 for name in expectations for kind in ("expectation", "these data")}
    for seed in range(200):
        x = oracle.sample(100)
        gaps = pv.inference_gaps(
            *(oracle.model, guide, x),
            num_particles=500,
            ascent=ascent,
            capture=False,
            seed=seed,
        )
        # Usually not the draws of the amortized ELBO, so the errors are independent.
        assert (gaps.sources == 1).double().mean() > 0.95
        of_total = pv.evaluation.Estimate(
            gaps.log_evidence.values - gaps.amortized_elbo.values,
            torch.hypot(
                gaps.log_evidence.monte_carlo_errors, gaps.amortized_elbo.monte_carlo_errors
            ),
        )
        errors = (x - oracle.mu) @ off.T + shift
        total_of_these = (of_scales + 0.5 * (errors @ precision * errors).sum(1)).mean().item()
        of_these = {
            "approximation": oracle.gap,
            "amortization": total_of_these - oracle.gap,
            "total": total_of_these,
        }
        for name, estimate in (
            ("approximation", gaps.approximation_gap),
            ("amortization", gaps.amortization_gap),
            ("total", of_total),
        ):
            away = abs(estimate.mean - expectations[name])
            hits[name, "expectation"] += away < 1.96 * estimate.standard_error
            away = abs(estimate.mean - of_these[name])
            hits[name, "these data"] += away < 1.96 * estimate.monte_carlo_error
    for which, count in hits.items():
        assert 0.90 <= count / 200 <= 0.98, which
