"""The diagnosis names planted faults, in nats that agree with closed forms."""

import math
from types import SimpleNamespace

import planted_faults
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.report import _log_evidence

SLACK = 0.05  # nats; the prior is fitted to 300 rows, and log p(x) is sampled


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(planted_faults.prior_of_wrong_scale, marks=pytest.mark.slow),
        planted_faults.prior_that_should_be_bimodal,
        planted_faults.mean_field_on_a_correlated_posterior,
    ],
)
def test_losses_in_nats_are_those_of_closed_forms(fault):
    planted = fault(num_data=250)
    found = pv.diagnose(planted.model, planted.guide, planted.train, planted.test, refit=False)
    assert found.losses[0].name == planted.entry
    assert planted.nats > 0.1
    assert abs(found[planted.entry].value - planted.nats) < SLACK
    assert found[planted.entry].note in str(found)


def test_decoder_that_ignores_the_latents_is_named():
    planted = planted_faults.decoder_that_ignores_z(num_data=200)
    found = pv.diagnose(planted.model, planted.guide, planted.train, planted.test, num_data=200)
    assert found.verdict[0].startswith("decoder ignores the latents: one that uses them gains")
    assert found["unused units"].value == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", planted_faults.FAULTS)
def test_first_line_of_the_verdict_names_the_planted_fault_in_19_of_20(fault):
    named, close = 0, 0
    for seed in range(20):
        torch.manual_seed(seed)
        planted = fault()
        found = pv.diagnose(planted.model, planted.guide, planted.train, planted.test)
        losses = found.losses
        named += bool(losses) and losses[0].name == planted.entry
        if planted.nats is not None:
            close += abs(found[planted.entry].value - planted.nats) < SLACK
    assert named >= 19
    assert planted.nats is None or close >= 19


def test_a_perfect_pair_has_no_losses():
    true = planted_faults.Gaussian()
    found = pv.diagnose(true.model, true.posterior, true.sample(200), true.sample(200), refit=False)
    assert not found.losses
    (verdict,) = found.verdict
    assert verdict.startswith("No part loses more than 0.05 nats that this diagnosis can find.")
    assert verdict.endswith("The decoder was not examined (refit=False).")
    for name in ("approximation gap", "amortization gap, test", "amortization gap, training"):
        assert abs(found[name].value) < 0.02


@pytest.mark.slow
def test_a_scalar_latent_has_a_decoder_gain():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    train, test = 2**0.5 * torch.randn(2, 60)
    found = pv.diagnose(model, guide, train, test, num_particles=30)
    assert -0.3 < found["decoder gain"].value < 0.05  # the model is that of the data
    assert not found.losses


def test_latents_with_small_units_do_not_lose_by_a_larger_decoder():
    """Corrections that are small numbers are far from zero in the units of these latents."""
    unit = 1e-5

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), unit).to_event(1))
            pyro.sample("x", dist.Normal(z / unit, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(unit * x / 2, unit * 0.5**0.5).to_event(1))

    train, test = 2**0.5 * torch.randn(2, 30, 2)
    options = {"num_particles": 50, "ascent": pv.evaluation.Ascent(max_steps=100)}
    found = pv.diagnose(model, guide, train, test, **options)
    assert abs(found["decoder gain"].value) < 0.5  # nats; the exact posterior needs no correction


def test_missing_numbers_are_left_out_of_all_parts():
    """The encoder's correction gets zeros for missing numbers, as the encoder does."""
    likelihood = pv.likelihoods.Normal(pv.nets.MLP(1, [], 3), scale=1.0)
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(1), pv.likelihoods.NanMasked(likelihood)
    )
    guide = pv.guides.AmortizedNormal(model, pv.nets.ZeroImputed(pv.nets.MLP(3, [4])))
    x = torch.randn(2, 40, 3) * torch.tensor([3.0, 1.0, 1.0])
    train, test = x.masked_fill(torch.rand(2, 40, 3) < 0.3, torch.nan)
    found = pv.diagnose(
        model, guide, train, test, num_particles=30, num_data=10, annealing=None, seed=0
    )
    assert math.isfinite(found["decoder gain"].value)
    assert math.isfinite(found["prior gain"].value)


def test_unknown_quantities_have_a_reason():
    """A discrete latent has no gaps and no unconstrained codes, but log p(x) and the surgery."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=2 * x - 2))

    x = 2 * torch.bernoulli(torch.full((100,), 0.5)) + torch.randn(100)
    found = pv.diagnose(model, guide, x, x + 0.01, num_particles=200)
    truth = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x.unsqueeze(1) + 0.01)
    truth = (truth.logsumexp(1) - math.log(2)).mean().item()
    assert abs(found["log p(x), test"].value - truth) < 0.01
    assert found["mutual information"].value > 0.1
    for name in ("approximation gap", "prior gain", "decoder gain"):
        assert math.isnan(found[name].value)
        assert found[name].note
    assert any("approximation gap; amortization gap, test; " in note for note in found.notes)
    assert len(found.to_dataframe()) == len(found.entries)
    with pytest.raises(KeyError, match="no entry 'gap'"):
        found["gap"]


@pytest.mark.parametrize("num_rows", [2, 4])
def test_too_few_rows_for_a_decoder_are_a_note(num_rows):
    true = planted_faults.Gaussian()
    train, test = true.sample(num_rows), true.sample(num_rows)
    found = pv.diagnose(true.model, true.mean_field, train, test, num_particles=30)
    assert math.isnan(found["decoder gain"].value)
    assert "needs at least 5 rows" in found["decoder gain"].note


def test_a_site_before_a_latent_is_a_note():
    """Only the sites after all latents can have a correction of the decoder."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("w", dist.Normal(z, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.sample("w", dist.Normal(z, 1.0))

    x = 2**0.5 * torch.randn(30)
    found = pv.diagnose(model, guide, x, x + 0.01, num_particles=30)
    assert math.isnan(found["decoder gain"].value)
    assert "site 'x' is sampled before the latents ['w']" in found["decoder gain"].note
    assert found["prior gain"].value == found["prior gain"].value


@pytest.mark.parametrize("dim", [-1, -2])
def test_an_inner_plate_is_a_note_of_the_decoder_alone(dim):
    def values(x):
        return x if dim == -2 else x.T

    def model(x):
        with pyro.plate("data", len(x), dim=dim), pyro.plate("words", 3, dim=-3 - dim):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=values(x))

    def guide(x):
        with pyro.plate("data", len(x), dim=dim), pyro.plate("words", 3, dim=-3 - dim):
            pyro.sample("z", dist.Normal(values(x) / 2, 0.5**0.5))

    train, test = 2**0.5 * torch.randn(2, 30, 3)
    found = pv.diagnose(model, guide, train, test, num_particles=30)
    assert "has a plate besides that of the data" in found["decoder gain"].note
    truth = dist.Normal(0.0, 2**0.5).log_prob(test).sum(1).mean().item()
    assert found["log p(x), test"].value == pytest.approx(truth, abs=1e-3)


@pytest.mark.parametrize("refit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_and_results_depend_on_the_seed_alone(refit):
    true = planted_faults.Gaussian()
    train, test = true.sample(60), true.sample(60)
    options = {"num_data": 40, "num_particles": 50, "refit": refit}
    torch.manual_seed(5)
    first = pv.diagnose(true.model, true.mean_field, train, test, seed=1, **options)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    second = pv.diagnose(true.model, true.mean_field, train, test, seed=1, **options)
    assert str(first) == str(second)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are restored


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_data": 1}, "num_data must be at least 2, got 1"),
        ({"annealing": "auto"}, "annealing must be a pyro_vae.evaluation.AIS, got 'auto'"),
        ({"refit": 1}, "refit must be True or False, got 1"),
        ({"ascent": 3}, "ascent must be a pyro_vae.evaluation.Ascent, got 3"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changed, message):
    true = planted_faults.Gaussian()
    x = true.sample(10)
    with pytest.raises((ValueError, TypeError), match=message):
        pv.diagnose(true.model, true.posterior, x, x, **changed)


def test_a_guide_whose_gaps_are_unknown_still_has_its_loss():
    """The guide does not look at x, and a discrete latent has no ascent."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(4 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.5)))

    train, test = 4 * torch.bernoulli(torch.full((2, 100), 0.5)) + torch.randn(2, 100)
    found = pv.diagnose(model, guide, train, test, num_particles=200, refit=False)
    each = dist.Normal(torch.tensor([0.0, 4.0]), 1.0).log_prob(test.unsqueeze(1))
    truth = (each.logsumexp(1) - math.log(2) - each.mean(1)).mean().item()
    # The ELBO has 200 samples of two values: its error per row is half their distance / 200 ** 0.5.
    error = ((each[:, 0] - each[:, 1]).square().mean() / 4 / 200 / 100).sqrt().item()
    assert abs(found["inference gap"].value - truth) < 5 * error + 1e-3
    assert found.verdict[0].startswith("guide: its family and encoder cost")
    assert len([note for note in found.notes if "gap" in note]) == 1  # one reason, one note


def test_a_conditional_prior_that_no_mixture_improves_is_unknown():
    """The prior N(y, 3) should be N(y, 0.3). One mixture for all y cannot show this."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 3.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, y):
        variance = 1 / (1 / 9 + 4)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(variance * (y / 9 + 4 * x), variance**0.5))

    def rows():
        y = 10 * torch.randn(60)
        return torch.utils.data.TensorDataset(y + 0.58 * torch.randn(60), y)

    found = pv.diagnose(model, guide, rows(), rows(), num_particles=50, refit=False)
    assert math.isnan(found["prior gain"].value)
    assert "prior gain are unknown: the prior depends on covariates" in str(found)


def test_too_few_rows_for_a_prior_are_a_note():
    """Without a fitted mixture, a gain of zero would say that the prior is good."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 4.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * 64 / 65, (16 / 65) ** 0.5).to_event(1))

    train, test = torch.randn(2, 15, 20)
    found = pv.diagnose(model, guide, train, test, num_particles=30, refit=False)
    assert math.isnan(found["prior gain"].value)
    assert "needs about 25 rows of training data, got 15" in found["prior gain"].note


@pytest.mark.parametrize("name", ["train", "test"])
def test_one_row_is_refused_by_name(name):
    true = planted_faults.Gaussian()
    data = {"train": true.sample(10), "test": true.sample(10)}
    data[name] = true.sample(1)
    with pytest.raises(ValueError, match=f"{name} must have at least two rows"):
        pv.diagnose(true.model, true.posterior, **data)


@pytest.mark.parametrize("higher", ["importance sampling", "annealing"])
def test_the_highest_of_several_unreliable_estimates_is_used(higher, monkeypatch):
    """Unreliable estimates of log p(x) are too low."""
    rows, values = torch.zeros(5, 2), torch.randn(5)

    def no_gaps(*args, **options):
        raise ValueError("no gaps")

    def unreliable(*args, method=None, **options):
        name = "importance sampling" if method is None else "annealing"
        found = values + (name == higher)
        return SimpleNamespace(values=found, untrusted=values < 9, mean_log_weights=values)

    monkeypatch.setattr(_log_evidence, "_quiet_gaps", no_gaps)
    monkeypatch.setattr(_log_evidence, "evidence", unreliable)
    found = _log_evidence.estimate_log_evidence(
        None, None, (rows,), ascent=pv.evaluation.Ascent(), num_particles=2,
        annealing=pv.evaluation.AIS(), capture=False, seed=0,
    )  # fmt: skip
    assert torch.equal(found.values, values + 1)
    assert found.unreliable_share == 1
