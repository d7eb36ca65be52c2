"""Imputed numbers against the conditional Gaussian, against quadrature, and refusals."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation._impute import _Averages, _Chosen

D, NOISE, DRAWS = 4, 0.6, 400
ERRORS = 5.0  # standard errors; the probability of a false alarm is 6e-7 for each number


@functools.cache
def weights():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(D, 2, generator=generator), torch.randn(D, generator=generator)


def latent():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def mean_of(z):
    weight, bias = weights()
    return z @ weight.T + bias


def plain(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean_of(latent()), NOISE).to_event(1), obs=x)


def nan_masked(x):
    with pyro.plate("data", len(x)):
        likelihood = pv.distributions.NanMasked(dist.Normal(mean_of(latent()), NOISE), 1)
        pyro.sample("x", likelihood, obs=x)


def masked(x):
    with pyro.plate("data", len(x)):
        likelihood = dist.Normal(mean_of(latent()), NOISE).mask(x.isfinite())
        pyro.sample("x", likelihood.to_event(1), obs=x.where(x.isfinite(), 0))


def by_column(x):
    """Observe the columns one by one, the last one first, and the first two under a mask."""
    with pyro.plate("data", len(x)):
        mean = mean_of(latent())
        for column in reversed(range(D)):
            with poutine.mask(mask=torch.ones(len(x), dtype=torch.bool)):
                pyro.sample(f"x{column}", dist.Normal(mean[..., column], NOISE), obs=x[:, column])


def by_plate(x):
    with pyro.plate("data", len(x), dim=-1):
        mean = mean_of(latent())  # (B, D), or (K, 1, B, D) with particles
        mean = (mean if mean.dim() == 2 else mean.squeeze(-3)).transpose(-1, -2)
        with pyro.plate("numbers", D, dim=-2):
            pyro.sample("x", dist.Normal(mean, NOISE), obs=x.T)


def wide(x):
    """A guide that ignores x; it is wider than the posterior."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.2).to_event(1))


def of_zeros(x):
    """A guide that is NaN for missing numbers."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.05 * (x @ weights()[0]), 1.2).to_event(1))


def sample(count):
    x = torch.randn(count, 2) @ weights()[0].T + weights()[1] + NOISE * torch.randn(count, D)
    missing = torch.rand(x.shape) < 0.4
    missing[0], missing[1] = True, False
    missing[2] = torch.tensor([True, False, True, False])
    return x.masked_fill(missing, torch.nan)


def conditional(x):
    """Return mean and covariance of the missing numbers of a row."""
    weight, bias = weights()
    covariance = weight @ weight.T + NOISE**2 * torch.eye(D)
    seen = x.isfinite()
    gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, ~seen]).T
    mean = bias[~seen] + gain @ (x - bias)[seen]
    return mean, covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]


@pytest.mark.parametrize(
    ("model", "guide"),
    [(plain, of_zeros), (nan_masked, wide), (masked, wide), (by_column, wide), (by_plate, wide)],
)
def test_linear_gaussian(model, guide):
    x = sample(8)
    filled = pv.impute(
        model, guide, x, num_samples=4000, num_draws=DRAWS, pairs_per_pass=9000, seed=1
    )
    assert torch.equal(filled.mean[filled.observed], x[x.isfinite()])
    assert torch.equal(filled.observed, x.isfinite())
    assert not filled.untrusted.any()
    inside = 0
    for row, values in enumerate(x):
        gone = ~values.isfinite()
        mean, covariance = conditional(values)
        errors = filled.monte_carlo_errors[row]
        assert (errors[~gone] == 0).all()
        assert ((filled.mean[row, gone] - mean).abs() < ERRORS * errors[gone] + 1e-5).all()
        # The draws take one of the samples, whose average has the errors above.
        draws = filled.draws[:, row, gone]
        spread = covariance.diagonal()
        tolerance = ERRORS * (spread / DRAWS + errors[gone] ** 2).sqrt() + 1e-5
        assert ((draws.mean(0) - mean).abs() < tolerance).all()
        square = (draws - mean).T @ (draws - mean) / DRAWS
        # var(ab) <= 2 var(a) var(b) for Gaussians; 6 standard errors for the skewed average.
        limit = 6.0 * (2 * torch.outer(spread, spread)).sqrt()
        limit = limit * math.sqrt(1 / DRAWS + 1 / filled.effective_sample_size[row].item())
        assert ((square - covariance).abs() < limit + 1e-5).all()
        inside += ((draws - mean).abs() < 1.6449 * spread.sqrt()).sum().item()
        assert torch.equal(filled.draws[:, row, ~gone], values[~gone].expand(DRAWS, -1))
    count = DRAWS * int((~filled.observed).sum())
    # 90% coverage. The draws of a number share the samples, so allow for K of few effective ones.
    effective = 1 / (1 / count + 1 / filled.effective_sample_size.sum().item())
    assert inside / count == pytest.approx(0.9, abs=ERRORS * math.sqrt(0.09 / effective))


@pytest.mark.parametrize("mixture", [False, True])
def test_bernoulli_against_quadrature(mixture):
    """One latent, so that integrals are sums over a grid; also with an enumerated component."""
    decoder = nn.Linear(1, 3)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[2.0], [-3.0], [1.5]]))
    likelihood = pv.likelihoods.NanMasked(pv.likelihoods.Bernoulli(decoder))
    prior = pv.priors.MixtureOfNormals(1, 3) if mixture else pv.priors.StandardNormal(1)
    build = pv.models.MixtureModel if mixture else pv.LatentVariableModel
    model = build(prior, likelihood)
    nan = torch.nan
    x = torch.tensor([[1.0, nan, nan], [nan, 1.0, 0.0], [nan, nan, nan]])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 2.0).to_event(1))

    filled = pv.impute(model, guide, x, num_samples=20_000, num_draws=DRAWS, seed=2)
    z = torch.linspace(-12, 12, 4001).unsqueeze(1)
    with torch.no_grad():
        log_joint = prior().log_prob(z).unsqueeze(1) + torch.stack(
            [likelihood(z).log_prob(row.expand(len(z), -1)) for row in x], 1
        )
        exact = log_joint.softmax(0).T @ decoder(z).sigmoid()
    gone = ~filled.observed
    errors = filled.monte_carlo_errors[gone]
    assert ((filled.mean - exact)[gone].abs() < ERRORS * errors).all()
    error = ((exact * (1 - exact))[gone] / DRAWS + errors**2).sqrt()
    assert ((filled.draws.mean(0) - exact)[gone].abs() < ERRORS * error).all()
    assert ((filled.draws == 0) | (filled.draws == 1)).all()


def test_chunks_of_samples_give_the_averages_of_all():
    torch.manual_seed(0)
    values, log_weight = torch.randn(60, 3).double(), 5 * torch.randn(60, 3).double()
    log_weight[:20, 0] = -math.inf
    averages = _Averages(torch.arange(3))
    for rows in torch.arange(60).split(20):
        averages.add(log_weight[rows], values[rows])
    w = log_weight.softmax(0)
    mean = (w * values).sum(0)
    torch.testing.assert_close(averages.means(), mean)
    error = (w.square() * (values - mean).square()).sum(0).sqrt()
    torch.testing.assert_close(averages.errors(), error)


def test_latents_are_chosen_by_their_weights():
    torch.manual_seed(0)
    count, weight = 20_000, torch.tensor([0.0, 0.1, 0.2, 0.0, 0.4, 0.3])
    chosen = _Chosen(count)
    for part in torch.arange(6).split(2):
        chosen.add(weight[part].log().unsqueeze(1).double(), {"z": part.reshape(2, 1, 1)})
    found = torch.stack([z["z"].squeeze() for z in chosen.latents()]).bincount(minlength=6) / count
    assert ((found - weight).abs() <= ERRORS * (weight * (1 - weight) / count).sqrt()).all()


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.UnreliableEvidence")
def test_mask_and_nan_are_equivalent_and_seeds_repeat():
    x = sample(7)
    complete = x.where(x.isfinite(), 99.0)
    options = {"num_samples": 30, "num_draws": 2, "seed": 3, "batch_size": 3}
    by_nan = pv.impute(plain, wide, x, **options)
    by_mask = pv.impute(plain, wide, complete, observed=x.isfinite(), **options)
    as_array = pv.impute(plain, wide, x.numpy(), **options)
    one_by_one = pv.impute(plain, wide, x, vectorize_particles=False, **options)
    assert one_by_one.mean.shape == x.shape
    assert one_by_one.draws.isfinite().all()
    for other in (by_mask, as_array):
        assert torch.equal(by_nan.mean, other.mean)
        assert torch.equal(by_nan.draws, other.draws)
    assert by_nan.draws.shape == (2, 7, D)
    assert "samples of z for each row" in str(by_nan)


def test_data_without_gaps_stay_as_they_are():
    x = sample(5).nan_to_num(1.0)
    filled = pv.impute(plain, wide, x, num_samples=30, num_draws=1)
    assert torch.equal(filled.mean, x)
    assert torch.equal(filled.draws[0], x)
    assert not filled.untrusted.any()


def test_parameters_are_those_of_the_fit():
    def model(x):
        bias = pyro.param("bias", torch.zeros(D))
        with pyro.plate("data", len(x)):
            z = latent()
            p = dist.Normal(bias + 0 * z[..., :1], 0.1)
            pyro.sample("x", pv.distributions.NanMasked(p, 1), obs=x)

    x = (5.0 + 0.1 * torch.randn(200, D)).masked_fill(torch.rand(200, D) < 0.3, torch.nan)
    guide = pv.guides.AmortizedNormal(model, pv.nets.ZeroImputed(pv.nets.MLP(D, [4])))
    pv.fit(model, guide, x, epochs=60, batch_size=50, learning_rate=0.2, seed=0, progress=False,
           capture=False)  # fmt: skip
    filled = pv.impute(model, guide, x[:3], num_samples=50)
    assert (filled.mean - 5.0).abs().max() < 0.6


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.UnreliableEvidence")
def test_models_with_several_latents_and_steps():
    normal = functools.partial(pv.likelihoods.Normal, scale=0.5)
    prior = pv.priors.StandardNormal(2)
    masked_normal = pv.likelihoods.NanMasked(normal(nn.Linear(2, D)))
    deep = pv.models.HierarchicalModel(prior, [normal(nn.Linear(2, 2))], masked_normal)
    net = pv.nets.ZeroImputed(pv.nets.MLP(2 * D, [4]), with_mask=True)
    sequence = pv.models.SequenceModel(prior, normal(nn.Linear(2, 2)), masked_normal)
    steps = torch.stack([sample(6), sample(6)], 1)
    lengths = torch.tensor([2, 1, 2, 2, 1, 2])
    identity = pv.nets.ZeroImputed(nn.Identity(), with_mask=True)
    for model, guide, batch in (
        (deep, pv.guides.HierarchicalGuide(deep, net), (sample(6),)),
        (deep, pv.guides.AmortizedMultivariateNormal(deep, net), (sample(6),)),
        (sequence, pv.guides.SequenceGuide(sequence, identity), (steps,)),
        (sequence, pv.guides.SequenceGuide(sequence, identity), (steps, lengths)),
    ):
        options = {"num_samples": 40, "num_draws": 2, "seed": 0}
        if len(batch) == 2:  # padding after the end of a sequence is replaced by its first step
            batch[0][lengths == 1, 1] = 1.0
        filled = pv.impute(model, guide, *batch, **options)
        assert filled.mean.isfinite().all()
        assert filled.draws.isfinite().all()
        assert (filled.draws[0] != filled.draws[1])[~filled.observed].all()


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.UnreliableEvidence")
@pytest.mark.parametrize("given", [False, True])
def test_padding_is_not_missing(given):
    """Steps after the end are NaN, and one number inside of each sequence is missing."""
    torch.manual_seed(0)
    normal = functools.partial(pv.likelihoods.Normal, scale=0.5)
    prior, net = pv.priors.StandardNormal(2), pv.nets.ZeroImputed(nn.Identity())
    emission = pv.likelihoods.NanMasked(normal(nn.Linear(2, D)))
    model = pv.models.SequenceModel(prior, normal(nn.Linear(2, 2)), emission)
    guide = pv.guides.SequenceGuide(model, net)
    lengths = torch.tensor([3, 1, 2, 3, 1])
    x = torch.randn(5, 3, D)
    padding = (torch.arange(3) >= lengths.unsqueeze(-1)).unsqueeze(-1).expand_as(x)
    missing = torch.zeros_like(padding)
    missing[:3, 0, 1] = True
    mask = {"observed": ~(padding | missing)} if given else {}
    gaps = padding if given else padding | missing
    options = {"num_samples": 40, "num_draws": 2, "batch_size": 2, "seed": 0}
    filled = pv.impute(model, guide, x.masked_fill(gaps, torch.nan), lengths, **mask, **options)
    assert torch.equal(filled.padding, padding)
    assert torch.equal(filled.observed, ~(padding | missing))
    for part in (filled.mean, *filled.draws):
        assert torch.equal(part.isnan(), padding)
        assert torch.equal(part[filled.observed], x[filled.observed])
    assert (filled.monte_carlo_errors[missing] > 0).all()
    assert not filled.untrusted[3:].any()
    assert repr(filled).startswith(f"3 of {D * 10} numbers imputed, in 3 of 5 rows (40 samples")
    assert f"{D * 5} numbers of padding left out" in repr(filled)


def test_a_mask_of_missing_numbers_as_covariate():
    """The model masks them whatever their value, so that NaN would be padding."""

    def model(x, shown):
        with pyro.plate("data", len(x)):
            likelihood = dist.Normal(mean_of(latent()), NOISE).mask(shown)
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(x, shown):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    x, shown = torch.randn(4, D), torch.rand(4, D) < 0.7
    filled = pv.impute(model, guide, x, shown, observed=shown, num_samples=50, seed=0)
    assert not filled.padding.any()
    assert (filled.mean != x)[~shown].all()
    gaps = x.masked_fill(~shown, torch.nan)
    filled = pv.impute(model, guide, gaps, shown, num_samples=50, seed=0)
    assert torch.equal(filled.padding, ~shown)
    assert "padding left out" in repr(filled)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.UnreliableEvidence")
@pytest.mark.parametrize("mixture", [False, True])
def test_a_distribution_without_a_mean_has_draws_only(mixture):
    def model(x):
        with pyro.plate("data", len(x)):
            angles = dist.VonMises(latent(), 50.0)
            if mixture:
                components = dist.VonMises(torch.stack([angles.loc, angles.loc + 3], -1), 50.0)
                weights = dist.Categorical(torch.ones_like(components.loc))
                angles = dist.MixtureSameFamily(weights, components)
            pyro.sample("x", angles.to_event(1), obs=x)

    filled = pv.impute(model, wide, torch.tensor([[0.5, torch.nan]]), num_samples=50, num_draws=3)
    assert filled.mean[0, 0] == 0.5
    assert filled.mean[0, 1].isnan()
    assert filled.draws.isfinite().all()


def scaled(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean_of(latent()), NOISE).to_event(1), obs=x / 255)


def replaced(x):
    with pyro.plate("data", len(x)):
        likelihood = dist.Normal(mean_of(latent()), NOISE)
        pyro.sample("x", likelihood.to_event(1), obs=x.where(x.isfinite(), 0))


def dependent(x):
    with pyro.plate("data", len(x)):
        p = dist.MultivariateNormal(mean_of(latent()), torch.eye(D))
        pyro.sample("x", p, obs=x)


def masked_jointly(x):
    with pyro.plate("data", len(x)):
        p = dist.NanMaskedMultivariateNormal(mean_of(latent()), torch.eye(D))
        pyro.sample("x", p, obs=x)


def summed_out(x):
    with pyro.plate("data", len(x)):
        z = latent()
        c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        mean = mean_of(z) + c.unsqueeze(-1)
        pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x)


def half(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean_of(latent())[..., :2], NOISE).to_event(1), obs=x[:, :2])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (scaled, "site 'x' observes numbers that the model computes from x"),
        (replaced, "site 'x' observes other values in place of missing numbers of x"),
        (dependent, "site 'x' observes missing numbers: .* got a MultivariateNormal"),
        (masked_jointly, "site 'x' observes missing numbers: .* NanMaskedMultivariateNormal"),
        (summed_out, "site 'x' depends on 'c', which the model sums out"),
        (half, "No site observes [1-9]+ of them unchanged"),
    ],
)
def test_models_that_cannot_be_imputed_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        pv.impute(model, wide, sample(6), num_samples=20)


def test_wrong_masks_and_types_are_refused():
    x = sample(5)
    with pytest.raises(ValueError, match=r"first in row 0. Mark them as missing"):
        pv.impute(plain, wide, x, observed=torch.ones(5, D, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shape of x, \(5, 4\), got \(5,\)"):
        pv.impute(plain, wide, x, observed=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"Boolean mask, got torch.float32"):
        pv.impute(plain, wide, x, observed=torch.ones(5, D))
    with pytest.raises(TypeError, match=r"floating-point, .* got torch.int64"):
        pv.impute(plain, wide, torch.ones(5, D, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"covariates must have 5 rows"):
        pv.impute(lambda x, y: plain(x), lambda x, y: wide(x), x, torch.ones(4))


def test_data_points_of_one_number():
    """The posterior of z is its prior for a missing number, and E[x|x] is x for the others."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.5))

    x = torch.tensor([1.0, torch.nan, -2.0, torch.nan])
    filled = pv.impute(model, guide, x, num_samples=4000, num_draws=2, seed=0)
    gone = x.isnan()
    assert (filled.mean[~gone] == x[~gone]).all()
    assert ((filled.mean - 1.0).abs() < ERRORS * filled.monte_carlo_errors)[gone].all()
    assert repr(filled).startswith("2 of 4 numbers imputed, in 2 of 4 rows")
    with pytest.raises(ValueError, match="first in row 1"):
        pv.impute(model, guide, x, observed=torch.ones(4, dtype=torch.bool))


def test_a_poor_guide_is_reported():
    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((2,), 4.0), 0.05).to_event(1))

    with pytest.warns(pv.evaluation.UnreliableEvidence, match="unreliable for .* rows"):
        filled = pv.impute(plain, narrow, sample(20), num_samples=100, seed=0)
    assert filled.untrusted.any()
