"""Programs that cannot take the dimension of particles run once for each particle."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae._programs.particles import particle_options

K = 3
QUIET = {"progress": False, "seed": 1}


class Decoder(nn.Module):
    """A decoder for latents of shape (B, 2) alone: BatchNorm1d takes dimension 1 as channels."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, z):
        return self.out(self.norm(self.hidden(z)))


class IndexDecoder(nn.Module):
    """A decoder with an index over the rows."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 4)

    def forward(self, z):
        rows = torch.arange(z.shape[0])
        if z.dim() != 2:
            raise AssertionError("rows are dimension 0")
        return self.out(z)[rows]


def pair_of(decoder=Decoder):
    torch.manual_seed(0)
    net, encoder = decoder(), nn.Linear(4, 2)

    def model(x):
        pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.7).to_event(1))

    return model, guide


SHORT = pv.evaluation.AIS(num_temperatures=3, num_chains=2, leapfrog_steps=1, step_size=0.1)
# Training runs each particle alone. Evaluation makes particles rows of the batch.
TRAINING = ("terms", "fit", "captured fit")
CALLS = {
    "terms": lambda m, g, x, **o: pv.terms(m, g, x, num_particles=K, **o).log_weight.tolist(),
    "evidence": lambda m, g, x, **o: pv.evidence(m, g, x, num_particles=K, **QUIET, **o).mean,
    "elbo_surgery": lambda m, g, x, **o: (
        pv.elbo_surgery(m, g, x, num_particles=K, **QUIET, **o).marginal_kl
    ),
    "collapse_report": lambda m, g, x, **o: (
        pv.collapse_report(m, g, x, num_particles=K, **QUIET, **o).units["kl"].tolist()
    ),
    "prior_holes": lambda m, g, x, **o: pv.prior_holes(
        m, g, x, num_samples=20, quantile=0.1, **QUIET, **o
    ).log_ratio.tolist(),
    "compare": lambda m, g, x, **o: (
        pv.compare({"a": (m, g)}, x, num_particles=K, **QUIET, **o)
        .to_dataframe()["log_evidence"]
        .iloc[0]
    ),
    "to_arviz": lambda m, g, x, **o: pv.to_arviz(m, g, x, num_draws=K, seed=1, **o)["posterior"][
        "z"
    ].values.tolist(),
    "sandwich": lambda m, g, x, **o: pv.sandwich(
        m, g, like=x, ais=SHORT, **QUIET, **o
    ).lower.tolist(),
    "fit": lambda m, g, x, **o: (
        pv.fit(m, g, x, objective=pv.objectives.IWAE(K, **o), epochs=2, batch_size=10, **QUIET)
        .history["loss"]
        .tolist()
    ),
    "captured fit": lambda m, g, x, **o: (
        pv.fit(
            m,
            g,
            x,
            objective=pv.objectives.DReG(K, **o),
            epochs=2,
            batch_size=10,
            capture=True,
            **QUIET,
        )
        .history["loss"]
        .tolist()
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_the_default_equals_one_run_per_particle_and_warns_once(name, without_compiler):
    x, call = torch.randn(20, 4), CALLS[name]
    results = []
    for options in ({"vectorize_particles": False}, {}):
        model, guide = pair_of()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(2)
            results.append(call(model, guide, x, **options))
            if not options:
                torch.manual_seed(2)
                pv.terms(model, guide, x, num_particles=K)
        told = [w for w in caught if "leading dimension of particles" in str(w.message)]
        assert len(told) == (0 if options else 1)
    torch.testing.assert_close(*map(torch.as_tensor, results), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in TRAINING])
def test_evaluation_runs_particles_as_rows_of_the_batch_without_a_warning(name):
    model, guide = pair_of()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*leading dimension of particles")
        CALLS[name](model, guide, torch.randn(20, 4))


def exact_pair(decode, plate=lambda x: pyro.plate("data", len(x))):
    """Return a model of x given decode(z) = z, and its exact posterior."""

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    return model, guide


def in_rows(z):
    """Return z through an index that takes dimension 0 as the rows."""
    if z.dim() != 2:
        raise ValueError("rows are dimension 0")
    return z[torch.arange(len(z))]


@pytest.mark.parametrize("num_particles", [2, 7])
def test_folded_particles_have_the_exact_weights(num_particles):
    x = torch.randn(20, 2)
    expected = dist.Normal(0.0, 2**0.5).log_prob(x).sum(1)
    model, guide = exact_pair(in_rows)
    terms = pv.terms(model, guide, x, num_particles=num_particles, vectorize_particles="fold")
    torch.testing.assert_close(terms.log_weight, expected.expand(num_particles, -1))
    assert terms.samples["z"].shape == (num_particles, 20, 2)
    assert torch.equal(terms.observations["x"], x)
    assert terms.predict()["x"].shape == (num_particles, 20, 2)
    z = terms.samples["z"]
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(terms.log_prior, log_prior)
    torch.testing.assert_close(terms.kl[0], terms.kl[1])  # analytic
    evidence = pv.evidence(model, guide, x, num_particles=5, progress=False)
    torch.testing.assert_close(evidence.values.float(), expected)


def test_folded_particles_have_the_scale_of_the_minibatch():
    x = torch.randn(20, 2)
    model, guide = exact_pair(in_rows, lambda x: pyro.plate("data", 1000, subsample=x))
    terms = pv.terms(model, guide, x, num_particles=3, vectorize_particles="fold")
    assert terms.scale == 50.0
    expected = dist.Normal(0.0, 2**0.5).log_prob(x).sum(1)
    torch.testing.assert_close(terms.log_weight, expected.expand(3, -1))


def centered(z):
    return in_rows(z) - z.mean(0)


def noisy(z):
    return in_rows(z) + torch.randn_like(z)


@pytest.mark.parametrize("decode", [centered, noisy])
def test_programs_whose_rows_depend_on_each_other_are_not_folded(decode):
    model, guide = exact_pair(decode)
    with pytest.warns(UserWarning, match="rows are dimension 0"):
        options = particle_options(model, guide, (torch.randn(20, 2),), may_fold=True)
    assert options["vectorize_particles"] is False


def test_programs_with_a_global_latent_are_not_folded():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(in_rows(z) + w, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    options = particle_options(model, guide, (torch.randn(5, 2),), may_fold=True)
    assert options == {"plate_nesting": 1, "vectorize_particles": False}


def test_inference_gaps_run_each_particle_alone():
    x, found = torch.randn(20, 4), []
    short = pv.evaluation.Ascent(num_particles=K, window=10, patience=1, max_steps=40)
    for options in ({"vectorize_particles": False}, {}):
        model, _ = pair_of()
        guide = pv.guides.AmortizedNormal(model, nn.Linear(4, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gaps = pv.inference_gaps(
                model, guide, x, num_particles=K, ascent=short, **QUIET, **options
            )
        found.append(gaps.parameters)
    torch.testing.assert_close(*found)


def test_insisting_raises_an_error_in_one_line():
    model, guide = pair_of()
    with pytest.raises(ValueError, match=r"leading dimension of particles.*=False\.$") as held:
        pv.evidence(model, guide, torch.randn(20, 4), num_particles=K, vectorize_particles=True)
    assert "\n" not in str(held.value)


def test_errors_of_any_type_lead_to_single_runs():
    model, guide = pair_of(IndexDecoder)
    with pytest.warns(UserWarning, match=r"AssertionError: rows are dimension 0"):
        terms = pv.terms(model, guide, torch.randn(20, 4), num_particles=K)
    assert terms.log_weight.shape == (K, 20)


def test_a_program_that_takes_particles_has_one_run():
    x = torch.randn(20, 4)
    model, guide = pair_of(lambda: nn.Linear(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        terms = pv.terms(model, guide, x, num_particles=K)
    assert len(terms._runs) == 1


@pytest.mark.parametrize("at", range(2, 6))
@pytest.mark.parametrize("plate", ["data", "cells"])
def test_a_lack_of_memory_on_trial_is_raised(plate, at):
    """A run on trial says nothing of the pair if the memory is full."""
    model, guide = exact_pair(lambda z: z, lambda x: pyro.plate(plate, len(x)))
    count = 0

    def full(x):
        nonlocal count
        count += 1
        if count == at:
            raise MemoryError("full")
        model(x)

    with pytest.raises(MemoryError, match="full"):
        pv.terms(full, guide, torch.randn(20, 2), num_particles=K)


@pytest.mark.parametrize("spoiled", [False, True])
def test_flows_without_an_inverse_take_particles(spoiled):
    """Pyro's planar flow can score its last sample alone, so values of single runs do not fit."""
    flow, encoder = T.planar(2), nn.Linear(4, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z - z.mean(0) if spoiled else z
            pyro.sample("x", dist.Normal(loc @ torch.ones(2, 4), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(encoder(x), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    x = torch.randn(6, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = particle_options(model, guide, (x,))
    assert options["vectorize_particles"] is not spoiled
    assert len(caught) == spoiled
    if not spoiled:
        losses = []
        for objective in (
            pv.objectives.ELBO(K, vectorize_particles=True),
            Trace_ELBO(K, vectorize_particles=True, max_plate_nesting=1),
        ):
            pyro.set_rng_seed(1)
            losses.append(objective.loss(model, guide, x))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_points_of_deltas_may_be_rounded_otherwise_with_particles():
    """A function of a sample rounds differently in another layout. A Delta has no density there."""
    one = 1 + 2.0**-23  # the next number of float32

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(p, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            p = z.exp() if z.dim() == 1 else z.exp() * one
            pyro.sample("p", dist.Delta(p, log_density=-z))

    x = torch.randn(50)
    z = torch.randn(3, 50)
    assert not torch.equal(z.exp(), z.exp() * one)
    loss = pv.objectives.ELBO(num_particles=3).loss(model, guide, x)
    assert math.isfinite(loss)
