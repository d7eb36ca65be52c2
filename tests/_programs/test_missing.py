"""Missing data: NaN in the data is accepted if the pair keeps it out of its densities."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Rows, Stream
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.datasets._minibatches import finite_rows

D, NOISE = 5, 0.7
WEIGHT = torch.randn(D, 2, generator=torch.Generator().manual_seed(1))
MEAN = torch.linspace(-1.0, 1.0, D)


def present(x):
    return x.where(x.isfinite(), 0)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = pv.nets.MLP(D, [8])

    def forward(self, x):
        return self.net(present(x))


def latent():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def location(z):
    weight = pyro.param("weight", WEIGHT.clone)
    return z @ weight.T + MEAN


def nan_masked(x):
    with pyro.plate("data", len(x)):
        likelihood = dist.NanMaskedNormal(location(latent()), NOISE)
        pyro.sample("x", likelihood.to_event(1), obs=x)


def nan_masked_jointly(x):
    with pyro.plate("data", len(x)):
        likelihood = dist.NanMaskedMultivariateNormal(location(latent()), NOISE**2 * torch.eye(D))
        pyro.sample("x", likelihood, obs=x)


def masked(x):
    with pyro.plate("data", len(x)):
        likelihood = dist.Normal(location(latent()), NOISE).mask(x.isfinite())
        pyro.sample("x", likelihood.to_event(1), obs=present(x))


def naked(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(location(latent()), NOISE).to_event(1), obs=x)


def masked_too_late(x):
    with pyro.plate("data", len(x)):
        likelihood = dist.Normal(location(latent()), NOISE).mask(x.isfinite())
        pyro.sample("x", likelihood.to_event(1), obs=x)


def replaced_too_late(x):
    """Only the gradient is NaN: torch.where multiplies NaN by zero."""
    with pyro.plate("data", len(x)):
        likelihood = dist.Normal(location(latent()), NOISE, validate_args=False)
        log_prob = torch.where(x.isfinite(), likelihood.log_prob(x), 0.0)
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(len(x)))
        pyro.factor("likelihood", log_prob.sum(-1))


HANDLED = [nan_masked, nan_masked_jointly, masked]


def sample(count):
    return torch.randn(count, 2) @ WEIGHT.T + MEAN + NOISE * torch.randn(count, D)


def data(count=30, value=torch.nan):
    x = sample(count)
    x[torch.rand(x.shape) < 0.3] = value
    x[2] = value  # a row without known values
    x[5] = sample(1)[0]
    return x


def log_evidence(x):
    """Return the Gaussian log-density of the known values of each row."""
    covariance = WEIGHT @ WEIGHT.T + NOISE**2 * torch.eye(D)
    values = []
    for row in x:
        known = row.isfinite()
        normal = torch.distributions.MultivariateNormal(MEAN[known], covariance[known][:, known])
        values.append(normal.log_prob(row[known]) if known.any() else torch.tensor(0.0))
    return torch.stack(values).double()


WRAPS = [lambda x: x, lambda x: x.numpy(), Rows, Stream,
         lambda x: DataLoader(TensorDataset(x), batch_size=10)]  # fmt: skip
FIT = {"epochs": 2, "batch_size": 10, "seed": 0, "progress": False}


def fresh(model):
    """Return a new program, without the parameters that another test fitted."""
    return lambda x: model(x)


def pair_of(model):
    model = fresh(model)
    return model, pv.guides.AmortizedNormal(model, Encoder())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("model", HANDLED)
def test_evidence_is_that_of_the_known_values(model, value):
    """The guide is the posterior, so each weight is the evidence, up to rounding."""
    x = data(value=value)
    estimate = pv.evidence(fresh(model), posterior, x, num_particles=5, seed=1, progress=False)
    torch.testing.assert_close(estimate.values, log_evidence(x), rtol=1e-4, atol=1e-4)


def posterior(x):
    """The posterior of the latents, given the known values of each row."""
    known = x.isfinite().to(x.dtype)
    precision = torch.eye(2) + (WEIGHT.T * known[:, None]) @ WEIGHT / NOISE**2
    shift = (known * present(x - MEAN)) @ WEIGHT / NOISE**2
    loc = torch.linalg.solve(precision, shift)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))


@pytest.mark.parametrize(
    ("model", "wrap"),
    [
        pytest.param(m, w, marks=() if m is masked or w is WRAPS[0] else pytest.mark.slow)
        for m, w in itertools.product(HANDLED, WRAPS)
    ],
)
def test_fit_and_evidence_accept_missing_data(model, wrap):
    model, guide = pair_of(model)
    x = data()
    result = pv.fit(model, guide, wrap(x), validation=wrap(x), **FIT)
    assert result.history[["loss", "validation_loss"]].notna().all(axis=None)
    assert all(p.isfinite().all() for p in guide.parameters())
    assert pv.evidence(model, guide, wrap(x), num_particles=5).values.isfinite().all()


@pytest.mark.parametrize(
    "model", [masked, *(pytest.param(m, marks=pytest.mark.slow) for m in HANDLED[:2])]
)
def test_other_functions_accept_missing_data(model):
    model, guide = pair_of(model)
    x = data()
    guide(x)
    assert np.isfinite(pv.elbo_surgery(model, guide, x, progress=False).mutual_information)
    found = pv.compare({"a": (model, guide)}, x, num_particles=5, progress=False)
    assert np.isfinite(found.entries[0].runs[0].evidence.mean)
    assert found.entries[0].runs[0].surgery is not None
    ascent = pv.evaluation.Ascent(learning_rate=0.1, window=3, patience=1)
    gaps = pv.inference_gaps(model, guide, x, num_particles=5, ascent=ascent, progress=False)
    assert np.isfinite(gaps.amortization_gap.mean)
    pv.to_arviz(model, guide, x, num_draws=2)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("model", "what"),
    [
        (naked, "the log-density of the model's site 'x' is nan there"),
        (masked_too_late, "its distribution still receives them"),
    ],
)
def test_unmasked_nan_is_refused_with_its_rows(model, what, wrap):
    model, guide = pair_of(model)
    x = sample(30)
    x[[17, 25], 1] = torch.nan
    guide(x)
    ordered = DataLoader(wrap(x), batch_size=10) if wrap is Rows else wrap(x)
    rows = r"\[17" if ordered is not x and not isinstance(ordered, np.ndarray) else r"\[17, 25\]"
    for call in (
        lambda: pv.fit(model, guide, ordered, **FIT),
        lambda: pv.evidence(model, guide, ordered, num_particles=2, batch_size=10),
        lambda: pv.elbo_surgery(model, guide, ordered, batch_size=10),
        lambda: pv.compare({"a": (model, guide)}, ordered, num_particles=2),
    ):
        with pytest.raises(
            ValueError,
            match=rf"NaN or infinite values, first in row 17, and .*{what}.*\. Rows .*{rows}",
        ) as caught:
            call()
        for way in (
            "pv.likelihoods.NanMasked",
            "pv.distributions.NanMasked",
            "pv.nets.ZeroImputed",
        ):
            assert way in str(caught.value)


def test_all_rows_and_covariates_are_checked():
    """Also rows after the first minibatch, and values that only the guide scores."""

    def model(x, c):
        with pyro.plate("data", len(x)):
            shift = location(latent()) + c[:, None]
            pyro.sample("x", dist.Normal(shift, 1.0).to_event(1), obs=x)

    class First(Encoder):
        def forward(self, x, c):
            return super().forward(x)

    guide = pv.guides.AmortizedNormal(model, First())
    x, c = sample(30), torch.randn(30)
    c[29] = torch.inf
    with pytest.raises(
        ValueError, match="data covariate 1 has NaN or infinite values, first in row 29"
    ):
        pv.fit(model, guide, (x, c), **FIT)
    model = fresh(masked)
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(D, [8]))
    x[0] = torch.nan
    with pytest.raises(
        ValueError, match="first in row 0, and the log-density of the guide's site 'z'"
    ):
        pv.fit(model, guide, x, **FIT)


def calls_with_covariates(model, guide, x, c):
    yield lambda: pv.fit(model, guide, (x, c), **FIT)
    yield lambda: pv.fit(model, guide, Stream([*zip(x, c, strict=True)]), **FIT)
    yield lambda: pv.evidence(model, guide, (x, c), num_particles=3)
    yield lambda: pv.encode(model, guide, x, c)
    yield lambda: pv.impute(model, guide, x, c, num_samples=3)
    yield lambda: pv.priors.AggregatedPosterior(guide, (x, c))


@pytest.mark.parametrize("number", range(6))
def test_covariates_with_nan_get_their_own_advice(number):
    """x has NaN too, which the pair leaves out. The names are those of the covariate."""

    def model(x, c):
        with pyro.plate("data", len(x)):
            p = dist.Normal(location(latent()) + c[:, None], 1.0).to_event(1)
            pyro.sample("x", pv.distributions.NanMasked(p), obs=x)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = pv.nets.ZeroImputed(pv.nets.MLP(D, [8]))

        def forward(self, x, c):
            return self.net(x) + c[:, None]

    guide = pv.guides.AmortizedNormal(model, Both())
    x, c = data(), torch.randn(len(data()))
    c[3] = torch.nan
    call = [*calls_with_covariates(model, guide, x, c)][number]
    with pytest.raises(ValueError, match="NaN or infinite values, first in row") as caught:
        call()
    message = str(caught.value)
    assert "covariate 1 ha" in message
    assert "a covariate that no site observes" in message
    both_columns = number == 5  # of the aggregated posterior
    assert ("ZeroImputed" in message) == both_columns


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_nonfinite_gradient_is_refused_before_the_first_step(on_nonfinite):
    model, guide = pair_of(replaced_too_late)
    x = data()
    with pytest.raises(
        ValueError, match=r"first in row .*the gradient of the loss is NaN or infinite there"
    ):
        pv.fit(model, guide, x, on_nonfinite=on_nonfinite, **FIT)
    assert np.isfinite(pv.evidence(model, guide, x, num_particles=5).mean)
    with pytest.raises(pv.training.NonFiniteError, match="the gradient of parameter"):
        pv.fit(model, guide, Stream(x), **FIT)


def test_other_errors_keep_their_messages():
    model, guide = pair_of(masked)
    with pytest.raises(
        ValueError, match=r"the (guide|model) cannot run on data x of shape \(10, 10\)"
    ):
        pv.fit(model, guide, torch.cat([data(), data()], 1), **FIT)
    fixed = pv.fit(*pair_of(naked), data(), transform=present, **FIT)
    assert fixed.history.loss.notna().all()


def test_nonfinite_parameters_are_not_reported_as_missing_data():
    model, guide = pair_of(nan_masked)
    with pytest.raises(pv.training.NonFiniteError) as caught:
        pv.fit(model, guide, data(), optimizer=lambda p: torch.optim.SGD(p, lr=1e25), **FIT)
    assert "the value of site 'x'" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_rows_finds_nan_and_infinite_values(dtype):
    values = torch.randn(50, 7).to(dtype)
    assert finite_rows(values).tolist() == [True] * 50
    largest = torch.full((50, 7), torch.finfo(dtype).max, dtype=dtype)  # their sum is infinite
    assert finite_rows(largest).all()
    for bad in (torch.nan, torch.inf):
        values[4, 2], values[9, 0] = bad, -bad
        assert (~finite_rows(values)).nonzero().flatten().tolist() == [4, 9]
        assert (~finite_rows(values[:, 2])).nonzero().flatten().tolist() == [4]
