import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from oracles import LinearGaussian

import pyro_vae as pv


def test_groups_contain_draws_weights_and_data():
    oracle = LinearGaussian(exact=True)
    x = oracle.sample(6)
    container = pv.to_arviz(oracle.model, oracle.guide, x, num_draws=400, seed=0)
    posterior = container["posterior"]["z"]
    assert posterior.dims[:3] == ("chain", "draw", "data_point")
    assert posterior.shape == (1, 400, 6, 2)
    log_weight = container["sample_stats"]["log_weight"].values
    exact = oracle.log_evidence(x).numpy()
    np.testing.assert_allclose(log_weight, np.broadcast_to(exact, (1, 400, 6)), rtol=1e-9)
    np.testing.assert_array_equal(container["observed_data"]["x"].values, x.numpy())
    # z is drawn from the posterior, and x from the posterior predictive.
    mean = (x - oracle.mu) @ oracle.v.T
    scale = oracle.s.diagonal().sqrt()
    z = (posterior.values.mean((0, 1)) - mean.numpy()) / (scale.numpy() / 20)
    assert np.abs(z).max() < 4.5
    predicted = container["posterior_predictive"]["x"].values
    spread = oracle.weight @ oracle.s @ oracle.weight.T + oracle.s2 * torch.eye(5)
    expected = mean @ oracle.weight.T + oracle.mu
    z = (predicted.mean((0, 1)) - expected.numpy()) / (spread.diagonal().sqrt().numpy() / 20)
    assert np.abs(z).max() < 4.5


@pytest.mark.parametrize("vectorize", [True, False])
def test_to_arviz_with_nested_plates(vectorize):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", 3):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1) / 4, 0.5))

    x = torch.randn(5, 3)
    container = pv.to_arviz(model, guide, x, num_draws=7, vectorize_particles=vectorize)
    assert container["posterior"]["z"].shape == (1, 7, 5)
    assert container["posterior_predictive"]["x"].shape == (1, 7, 5, 3)
    np.testing.assert_array_equal(container["observed_data"]["x"].values, x.numpy())


def test_arviz_summarizes_the_container(binary):
    arviz = pytest.importorskip("arviz", reason="needs ArviZ")
    container = pv.to_arviz(*make_pair(), binary, num_draws=50)
    if isinstance(container, getattr(arviz, "InferenceData", ())):
        summary = arviz.summary(container, var_names=["z"], kind="stats")
        assert len(summary) == 50 * 2
    else:
        assert container["posterior"]["z"].mean().item() == pytest.approx(0, abs=1)


def test_masked_latents_are_nan():
    m = torch.arange(12) % 3 > 0

    def model(x, m):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=m):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z[..., 0] + k, 1.0), obs=x)

    def guide(x, m):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=m):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("k", dist.Bernoulli(0.5))

    found = pv.to_arviz(model, guide, (torch.randn(12), m), num_draws=5, seed=0)["posterior"]
    of_z, of_k = found["z"].values[0], found["k"].values[0]
    assert np.isnan(of_z[:, ~m.numpy()]).all()
    assert np.isfinite(of_z[:, m.numpy()]).all()
    assert np.isnan(of_k[:, ~m.numpy()]).all()
    assert set(np.unique(of_k[:, m.numpy()])) <= {0.0, 1.0}


@pytest.mark.parametrize("vectorize", [True, False])
def test_masked_observations_are_left_out(vectorize):
    """A program replaces such numbers by others that can be scored, which are not data."""
    labels = torch.tensor([2, -1, 0, -1])

    def model(x, y):
        known = y >= 0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = torch.stack([z[..., 0], z[..., 1], 0 * z[..., 0]], -1)
            with pyro.poutine.mask(mask=known):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y.clamp(min=0))
                pyro.sample("is_first", dist.Categorical(logits=z), obs=(y == 0).byte())
            scored = dist.Normal(z, 1.0).mask(x.isfinite()).to_event(1)
            pyro.sample("x", scored, obs=x.nan_to_num())

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    x = torch.randn(4, 2)
    x[1, 0] = x[3] = torch.nan
    options = {"num_draws": 3, "vectorize_particles": vectorize}
    found = pv.to_arviz(model, guide, (x, labels), **options)["observed_data"]
    assert np.array_equal(found["x"].values, x.numpy(), equal_nan=True)
    assert found["y"].values.tolist() == labels.tolist()
    assert found["is_first"].values.tolist() == [0, -1, 1, -1]


def test_padding_of_sequences_is_not_data():
    model = pv.models.SequenceModel(
        pv.priors.StandardNormal(2),
        lambda z: dist.Normal(z, 1.0).to_event(1),
        lambda z: dist.Normal(z, 1.0).to_event(1),
    )
    guide = pv.guides.SequenceGuide(model, recurrent=4, hidden=[4])
    x, lengths = torch.randn(3, 3, 2), torch.tensor([3, 1, 2])
    found = pv.to_arviz(model, guide, (x, lengths), num_draws=2)["observed_data"]
    for step in range(3):
        inside = (step < lengths).numpy()
        of_step = found[f"x_{step + 1}"].values
        assert np.array_equal(of_step[inside], x[:, step].numpy()[inside])
        assert np.isnan(of_step[~inside]).all()
