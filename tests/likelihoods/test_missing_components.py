"""Pairs of components on data with missing numbers, against the Gaussian of the observed ones."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same, needs_compiler
from guide_table import DENSITIES
from torch import nn

import pyro_vae as pv

D, NOISE = 5, 0.7
# An error of five standard errors has a probability of 6e-7.
ERRORS = 5.0


def sample(count):
    x = torch.randn(count, 2) @ torch.randn(2, D) + NOISE * torch.randn(count, D)
    x[torch.rand(x.shape) < 0.3] = torch.nan
    x[2] = torch.nan
    x[3] = 1.0
    return x


def make_model(likelihood=None):
    """Return a linear Gaussian VAE with random weights."""
    if likelihood is None:
        likelihood = pv.likelihoods.Normal(nn.Linear(2, D), scale=NOISE)
    return pv.LatentVariableModel(pv.priors.StandardNormal(2), pv.likelihoods.NanMasked(likelihood))


def make_pair(make_guide=pv.guides.AmortizedNormal, **options):
    model = make_model(**options)
    net = pv.nets.ZeroImputed(pv.nets.MLP(2 * D, [8]), with_mask=True)
    return model, make_guide(model, net)


def log_evidence(model, x):
    """Return the Gaussian log-density of the observed numbers of each row."""
    linear = model.likelihood.likelihood.decoder
    covariance = linear.weight @ linear.weight.T + NOISE**2 * torch.eye(D)
    values = []
    for row in x:
        seen = row.isfinite()
        normal = dist.MultivariateNormal(linear.bias[seen], covariance[seen][:, seen])
        values.append(normal.log_prob(row[seen]) if seen.any() else torch.zeros(()))
    return torch.stack(values)


def exact_guide(model):
    """Return the posterior given the observed numbers, as a plain program."""

    def posterior(x):
        linear = model.likelihood.likelihood.decoder
        weight, bias = linear.weight.detach(), linear.bias.detach()
        seen = x.isfinite().to(x.dtype)
        precision = torch.eye(2) + (weight.T * seen[:, None]) @ weight / NOISE**2
        shift = (seen * (x - bias).nan_to_num(0.0)) @ weight / NOISE**2
        return dist.MultivariateNormal(
            torch.linalg.solve(precision, shift), precision_matrix=precision
        )

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    guide.posterior = posterior
    return guide


def test_evidence_and_surgery_are_those_of_the_observed_numbers():
    """The guide is the posterior, so that each weight is the evidence up to rounding."""
    x, model = sample(40), make_model()
    guide, exact = exact_guide(model), log_evidence(model, x).detach().double()
    estimate = pv.evidence(model, guide, x, num_particles=5, seed=1)
    torch.testing.assert_close(estimate.values, exact, rtol=1e-4, atol=1e-4)
    weights = pv.terms(model, guide, x, num_particles=3).log_weight.detach().double()
    torch.testing.assert_close(weights, exact.expand(3, -1), rtol=1e-4, atol=1e-4)
    surgery = pv.elbo_surgery(model, guide, x, seed=0)
    assert -surgery.distortion - surgery.rate == pytest.approx(exact.mean().item(), abs=1e-3)
    q = guide.posterior(x)
    second = q.covariance_matrix.diagonal(dim1=1, dim2=2).sum(1) + q.mean.square().sum(1)
    rate = 0.5 * (second - 2 - q.covariance_matrix.logdet()).mean().item()
    assert surgery.rate == pytest.approx(rate, abs=ERRORS * surgery.standard_errors["rate"])


def test_gradient_of_the_elbo_is_that_of_the_evidence():
    """At the posterior, E_q of the gradient of log p(x, z) is the gradient of log p(x)."""
    x, model = sample(30), make_model()
    guide = exact_guide(model)
    parameters = [*model.parameters()]
    exact = torch.autograd.grad(log_evidence(model, x).sum(), parameters)
    draws = []
    for _ in range(30):
        elbo = pv.terms(model, guide, x, num_particles=100).log_weight.mean(0).sum()
        draws.append(torch.autograd.grad(elbo, parameters))
    for expected, found in zip(exact, zip(*draws, strict=True), strict=True):
        found = torch.stack(found)
        errors = found.std(0) / math.sqrt(len(found))
        # Student's t with 29 degrees of freedom: 2e-8 for each of the 15 numbers.
        assert ((found.mean(0) - expected).abs() < 7.5 * errors + 1e-4).all()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "normal" else pytest.mark.slow)
        for name in (*DENSITIES, "semi-amortized")
    ],
)
def test_every_guide_is_fitted_to_observed_numbers(name):
    def make_guide(model, net):
        if name == "semi-amortized":
            return pv.guides.SemiAmortized(pv.guides.AmortizedNormal(model, net), steps=2)
        return DENSITIES[name](model, net)

    model, guide = make_pair(make_guide)
    x = sample(30)
    fit = pv.fit(
        model, guide, x, validation=x, epochs=2, batch_size=10, seed=0, progress=False,
        capture=False,
    )  # fmt: skip
    assert fit.history[["loss", "validation_loss"]].notna().all(axis=None)
    found = pv.evidence(model, guide, x, num_particles=300, seed=0, capture=False)
    assert found.values[2].abs() < ERRORS * found.monte_carlo_errors[2] + 1e-4


def test_other_functions_accept_missing_numbers(tmp_path):
    model, guide = make_pair()
    x = sample(20)
    filled = pv.reconstruct(model, guide, x)
    assert filled.shape == x.shape
    assert filled.isfinite().all()
    found = pv.compare({"a": (model, guide)}, x, num_particles=5, progress=False)
    assert np.isfinite(found.entries[0].runs[0].evidence.mean)
    pv.save(tmp_path / "pair", model, guide)
    loaded = pv.load(tmp_path / "pair")
    before, after = (
        pv.evidence(m, g, x, num_particles=3, seed=0, capture=False).values
        for m, g in ((model, guide), (loaded.model, loaded.guide))
    )
    assert torch.equal(before, after)


@pytest.mark.slow
@needs_compiler
def test_captured_steps_are_those_of_the_programs():
    check_same(make_pair, sample(30))


MAKE_LIKELIHOOD = {
    "images": (
        lambda: pv.likelihoods.Bernoulli(
            nn.Sequential(nn.Linear(2, 18), nn.Unflatten(-1, (2, 3, 3))), event_dim=3
        ),
        lambda x: (x > 0).float().where(x.isfinite(), torch.nan),
    ),
    "counts": (
        lambda: pv.likelihoods.NegativeBinomial(
            nn.Sequential(nn.Linear(2, 18), nn.Unflatten(-1, (2, 3, 3))), event_dim=3
        ),
        lambda x: x.abs().round(),
    ),
}


@pytest.mark.parametrize("kind", MAKE_LIKELIHOOD)
def test_images_with_missing_pixels(kind):
    """The channels of the mask follow those of x."""
    make, prepare = MAKE_LIKELIHOOD[kind]
    model = make_model(likelihood=make())
    net = nn.Sequential(nn.Conv2d(4, 2, 2), nn.Flatten())
    guide = pv.guides.AmortizedNormal(model, pv.nets.ZeroImputed(net, with_mask=True))
    x = prepare(torch.randn(12, 2, 3, 3).masked_fill(torch.rand(12, 2, 3, 3) < 0.3, torch.nan))
    options = {"epochs": 1, "batch_size": 6, "progress": False, "capture": False}
    assert pv.fit(model, guide, x, **options).history.loss.notna().all()


def test_other_models_leave_out_missing_numbers():
    masked = pv.likelihoods.NanMasked(pv.likelihoods.Normal(nn.Linear(2, D)))
    encode = functools.partial(pv.nets.ZeroImputed, with_mask=True)
    prior = pv.priors.StandardNormal(2)
    mixture = pv.models.MixtureModel(pv.priors.MixtureOfNormals(2, 3), masked)
    two = pv.models.HierarchicalModel(prior, [pv.likelihoods.Normal(nn.Linear(2, 2))], masked)
    sequence = pv.models.SequenceModel(prior, pv.likelihoods.Normal(nn.Linear(2, 2)), masked)
    labels = pv.models.SemiSupervisedModel(
        2, prior, pv.likelihoods.NanMasked(
            pv.likelihoods.Normal(pv.nets.Joined(nn.Linear(4, D)))
        )
    )  # fmt: skip
    x, y = sample(12), torch.arange(12) % 3 - 1
    steps = torch.stack([sample(12), sample(12)], 1)
    pairs = [
        (mixture, pv.guides.AmortizedNormal(mixture, encode(pv.nets.MLP(2 * D, [4]))), (x,)),
        (two, pv.guides.HierarchicalGuide(two, encode(pv.nets.MLP(2 * D, [4]))), (x,)),
        (sequence, pv.guides.SequenceGuide(sequence, encode(nn.Identity())), (steps,)),
        (
            labels,
            pv.guides.SemiSupervisedGuide(
                labels, encode(pv.nets.MLP(2 * D, [4], 2)),
                encode(pv.nets.Joined(pv.nets.MLP(2 * D + 2, [4]))),
            ),
            (x, y),
        ),
    ]  # fmt: skip
    for model, guide, batch in pairs:
        pv.fit(model, guide, batch, epochs=1, progress=False, capture=False)
        found = pv.terms(model, guide, *batch, num_particles=3)
        assert found.log_weight.isfinite().all()
        if model is not labels:  # whose label is observed
            assert (found.log_likelihood[:, 2] == 0).all()
