"""Compare the rate-distortion curve with the closed form of a linear-Gaussian model."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from torch import nn

import pyro_vae as pv

BETAS = [0.5, 1.0, 2.0, 5.0]


def optimum(oracle, x, beta, diagonal):
    """Return rate and distortion of the optimal q, averaged over x.

    q is p(z) p(x|z)^(1/beta), normalized: N(m, S) with precision P = I + W'W / (beta s2) and mean
    m = P^-1 W'(x - mu) / (beta s2). The best diagonal q has the same mean and precision diag(P).
    """
    w, d = oracle.weight, oracle.d
    precision = oracle.eye + w.T @ w / (beta * oracle.s2)
    mean = torch.linalg.solve(precision, w.T @ (x - oracle.mu).T / (beta * oracle.s2)).T
    s = precision.inverse()
    if diagonal:
        s = torch.diag(precision.diagonal().reciprocal())
    rate = 0.5 * (s.trace() + mean.square().sum(1) - d - s.logdet())
    residual = (x - oracle.mu - mean @ w.T).square().sum(1) + (w @ s @ w.T).trace()
    normalizer = 0.5 * len(w) * (2 * math.pi * oracle.s2).log()
    distortion = normalizer + residual / (2 * oracle.s2)
    return rate.mean().item(), distortion.mean().item()


@pytest.mark.parametrize(
    ("make", "diagonal"),
    [(pv.guides.AmortizedNormal, True), (pv.guides.AmortizedMultivariateNormal, False)],
)
def test_curve_matches_the_linear_gaussian_model(make, diagonal):
    """The guide's family and encoder contain the optimum for every beta."""
    oracle = LinearGaussian(d=2, D=3, noise=0.5, dtype=torch.float32)
    x = oracle.sample(500)
    guide = make(oracle.model, nn.Identity())
    options = {"epochs": 40, "batch_size": 250, "learning_rate": 0.05, "seed": 0}
    options["scheduler"] = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=40)
    pv.fit(oracle.model, guide, x, progress=False, **options)
    curve = pv.rate_distortion(
        oracle.model, guide, x, BETAS, training_particles=5, num_particles=100, **options
    )
    table = curve.table
    assert table.index.tolist() == BETAS
    for beta in BETAS:
        rate, distortion = optimum(oracle, x.double(), beta, diagonal)
        row = table.loc[beta]
        assert row["rate"] == pytest.approx(rate, rel=0.06, abs=0.03)
        assert row["distortion"] == pytest.approx(distortion, rel=0.04, abs=0.04)
        # The objective is flat at its optimum, so it is closer than rate or distortion.
        assert row["distortion"] + beta * row["rate"] == pytest.approx(
            distortion + beta * rate, abs=0.03
        )
    assert table["rate"].is_monotonic_decreasing
    assert table["distortion"].is_monotonic_increasing
    # The slope of a chord of a convex curve is some -beta between those of its ends.
    slopes = (table["distortion"].diff() / table["rate"].diff()).iloc[1:]
    for slope, low, high in zip(slopes, BETAS, BETAS[1:], strict=False):
        assert 0.9 * low < -slope < 1.1 * high
    entropy = -oracle.log_evidence(x).mean().item()
    assert curve.entropy > entropy - 0.01
    gap = 0.0 if not diagonal else oracle.gap
    assert curve.entropy == pytest.approx(entropy + gap, abs=0.03)
    assert (table["rate"] + table["distortion"] >= curve.entropy - 1e-9).all()


def test_closed_form_has_slope_minus_beta():
    oracle = LinearGaussian(d=3, D=4)
    x = oracle.sample(50)
    for diagonal in (False, True):
        for beta in BETAS:
            (r1, d1), (r2, d2) = (
                optimum(oracle, x, b, diagonal) for b in (beta * 0.9999, beta * 1.0001)
            )
            assert (d2 - d1) / (r2 - r1) == pytest.approx(-beta, rel=1e-3)
    rate, distortion = optimum(oracle, x, 1.0, diagonal=False)
    assert -rate - distortion == pytest.approx(oracle.log_evidence(x).mean().item())


def test_rate_distortion_leaves_the_pair_unchanged(pair, binary):
    model, guide = pair
    guide(binary)
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    state = torch.get_rng_state()
    options = {"epochs": 2, "batch_size": 10, "capture": False, "learning_rate": 0.01, "seed": 1}
    both = pv.rate_distortion(model, guide, binary, [4.0, 0.5], refit="both", **options)
    alone = pv.rate_distortion(model, guide, binary, [0.5, 4.0], **options)
    assert torch.equal(state, torch.get_rng_state())
    after = [*model.parameters(), *guide.parameters()]
    assert all(p.requires_grad for p in after)
    for p, q in zip(before, after, strict=True):
        assert torch.equal(p, q)
    assert both.table.index.tolist() == alone.table.index.tolist() == [0.5, 4.0]
    # The model is refitted with refit="both" only.
    assert both.table.loc[4.0, "elbo"] != pytest.approx(alone.table.loc[4.0, "elbo"], abs=1e-4)
    with pytest.raises(FloatingPointError):
        pv.rate_distortion(
            model, guide, binary, [1.0], epochs=30, learning_rate=1e30, batch_size=10
        )
    for p, q in zip(before, [*model.parameters(), *guide.parameters()], strict=True):
        assert torch.equal(p, q)


def test_model_is_constant_while_the_guide_is_refitted(pair, binary):
    model, guide = pair
    seen = []
    model.register_forward_hook(
        lambda *_: seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    )
    moved = []
    guide.register_forward_hook(
        lambda *_: moved.append(next(guide.encoder.parameters()).detach().clone())
    )
    pv.rate_distortion(model, guide, binary, [1.0], epochs=3, batch_size=10, capture=False, seed=0)
    assert all(torch.equal(each, seen[0]) for each in seen)
    assert not torch.equal(moved[0], moved[-1])


def test_rate_distortion_with_pyro_param_parameters():
    def model(x):
        loading = pyro.param("loading", torch.tensor([1.0, 2.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * loading, 1.0).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x.sum(-1, keepdim=True), 0.5).to_event(1))

    x = torch.randn(100, 1) * torch.tensor([1.0, 2.0]) + torch.randn(100, 2)
    options = {"epochs": 10, "batch_size": 10, "learning_rate": 0.01, "capture": False}
    pv.fit(model, guide, x, **options, progress=False, seed=0)
    with pv.parameter_store(model, guide):
        slope = pyro.param("slope").item()
        loading = pyro.param("loading").detach().clone()
    curve = pv.rate_distortion(model, guide, x, [0.5, 2.0], **options, seed=0)
    assert curve.table["rate"].is_monotonic_decreasing
    with pv.parameter_store(model, guide):
        assert pyro.param("slope").item() == slope
        assert torch.equal(pyro.param("loading"), loading)
        assert pyro.param("loading").requires_grad


def test_curve_with_test_data_evidence_and_figure(pair, binary):
    model, guide = pair
    test = torch.bernoulli(torch.full((30, 16), 0.5))
    evidence = pv.evidence(model, guide, test, num_particles=50, seed=0)
    curve = pv.rate_distortion(
        model,
        guide,
        binary,
        [0.5, 2.0],
        test=test,
        evidence=evidence,
        epochs=1,
        seed=0,
        batch_size=10,
        capture=False,
    )
    assert curve.entropy == -evidence.mean
    assert (curve.table["rate_error"] > 0).all()
    axes = pv.plots.rate_distortion(curve).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert "β = 0.5" in texts
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [
        "R + D = H",
        "R = 0, D = H: auto-decoding limit",
        "D = 0, R = H: auto-encoding limit",
    ]
    corners = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 1]
    assert [[0.0, curve.entropy]] in corners
    assert [[curve.entropy, 0.0]] in corners
    assert "rate + distortion >=" in str(curve)


def test_rate_distortion_refuses_bad_arguments_before_any_fit(pair, binary):
    model, guide = pair
    for betas, error, match in (
        ([], ValueError, "at least one"),
        ([1.0, 1.0], ValueError, "must differ"),
        ([0.0], ValueError, "must be positive"),
        (["1"], TypeError, "must be a number"),
        (1.0, TypeError, "betas must be a sequence of numbers"),
    ):
        with pytest.raises(error, match=match):
            pv.rate_distortion(model, guide, binary, betas)
    with pytest.raises(ValueError, match='refit must be "guide" or "both"'):
        pv.rate_distortion(model, guide, binary, [1.0], refit="model")
    with pytest.raises(TypeError, match="sets the fit's 'objective' itself"):
        pv.rate_distortion(model, guide, binary, [1.0], objective=pv.objectives.ELBO())
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        pv.rate_distortion(model, guide, binary, [1.0], epoch=3)
    evidence = pv.evidence(model, guide, binary, num_particles=30)
    with pytest.raises(ValueError, match="evidence must be None with refit='both'"):
        pv.rate_distortion(model, guide, binary, [1.0], refit="both", evidence=evidence)
    fit = {"epochs": 10**6}  # an error must come before the fit
    with pytest.raises(TypeError, match="evidence must be a result"):
        pv.rate_distortion(model, guide, binary, [1.0], evidence=-20.0, **fit)
    for options in ({"data": binary[:20]}, {"data": binary, "test": binary[:20]}):
        with pytest.raises(ValueError, match="evidence has 50 values for 20 measured data"):
            pv.rate_distortion(model, guide, betas=[1.0], evidence=evidence, **options, **fit)


def test_rate_distortion_with_a_prior_that_uses_the_guide(binary):
    vamp = pv.priors.VampPrior(2, pseudo_inputs=binary[:5])
    model = pv.LatentVariableModel(
        prior=vamp, likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16))
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
    vamp.bind_guide(guide)
    with pytest.raises(ValueError, match="share parameters"):
        pv.rate_distortion(model, guide, binary, [1.0], epochs=1, batch_size=10)
    options = {"epochs": 1, "batch_size": 10, "capture": False, "seed": 0}
    curve = pv.rate_distortion(model, guide, binary, [1.0], refit="both", **options)
    assert curve.table["rate"].notna().all()
