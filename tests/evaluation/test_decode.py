"""Decoded latents against likelihoods, reconstructions and closed forms; paths between codes.

Averages of samples may be off by 4.5 standard errors, in 1 of 100,000 cases.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from guide_table import Model, make
from pyro import poutine

import pyro_vae as pv
from pyro_vae.evaluation._interpolate import spherical

ALL = {"enumerate": "parallel"}
LEVELS, SIGMAS = torch.tensor([0.0, 10.0, 20.0]), 4.5


def test_means_and_samples_are_those_of_the_likelihood():
    torch.manual_seed(0)
    model, _ = make_pair()
    z = torch.randn(7, 2)
    p = model.likelihood(z).mean.detach()
    torch.testing.assert_close(pv.decode(model, z, batch_size=3), p)
    torch.testing.assert_close(pv.decode(model, {"z": z.numpy()}), p)
    draws = pv.decode(model, z, num_samples=2000, batch_size=5000, seed=0)
    assert draws.shape == (2000, 7, 16)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((draws.mean(0) - p).abs() < SIGMAS * (p * (1 - p) / 2000).sqrt()).all()
    by_site = pv.decode(model, z, num_samples=3, by_site=True)
    assert by_site["x"].shape == (3, 7, 16)


def test_decoded_means_are_reconstructions():
    """A guide of points reconstructs from its only code."""
    torch.manual_seed(0)
    x = torch.rand(6, 5).round()
    mixture = pv.models.MixtureModel(
        pv.priors.MixtureOfNormals(2, components=3),
        pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 5)),
    )
    for model in (Model(), Model((2, 3)), mixture):
        guide = pv.guides.AmortizedDelta(model, pv.nets.MLP(5, [7]))
        codes = pv.encode(model, guide, x)
        torch.testing.assert_close(pv.decode(model, codes.mean), pv.reconstruct(model, guide, x))


def test_latents_that_are_summed_out_are_averaged_given_z():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer=dict(ALL))
            z = pyro.sample("z", dist.Normal(LEVELS[c] / 10, 0.7))
            pyro.sample("x", dist.Normal(LEVELS[c] + z, 1.0), obs=x)

    z = torch.linspace(-1, 3, 9)
    given = dist.Normal(LEVELS / 10, 0.7).log_prob(z.unsqueeze(-1)).softmax(-1)
    torch.testing.assert_close(pv.decode(model, z), given @ LEVELS + z)
    scaled = poutine.scale(model, 0.5)  # for training; p(c|z) is that of the model
    torch.testing.assert_close(pv.decode(scaled, z), given @ LEVELS + z)
    draws = pv.decode(model, z, num_samples=2000, batch_size=6000, seed=0)
    levels = ((draws - z) / 10).round()
    for value in range(3):
        error = (given[:, value] * (1 - given[:, value]) / 2000).sqrt() + 1e-3
        assert (((levels == value).float().mean(0) - given[:, value]).abs() < SIGMAS * error).all()
    by_both = pv.decode(model, {"c": torch.tensor([2, 0]), "z": torch.tensor([0.5, 1.5])})
    torch.testing.assert_close(by_both, torch.tensor([20.5, 1.5]))


def test_other_latents_are_sampled_given_the_latents_before_them():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(5.0, 1.0))
            b = pyro.sample("b", dist.Normal(3 * a, 0.5))
            pyro.sample("x", dist.Normal(b, 2.0), obs=x)

    z = torch.tensor([0.0, 10.0])
    torch.testing.assert_close(pv.decode(model, {"b": z}), z)
    draws = pv.decode(model, {"a": z}, num_samples=4000, batch_size=8000, seed=0)
    assert ((draws.mean(0) - 3 * z).abs() < SIGMAS * math.sqrt(4.25 / 4000)).all()
    assert ((draws.var(0) - 4.25).abs() < SIGMAS * 4.25 * math.sqrt(2 / 4000)).all()
    means = pv.decode(model, {"a": torch.zeros(4000)}, batch_size=4000, seed=0)
    assert (means.var() - 0.25).abs() < SIGMAS * 0.25 * math.sqrt(2 / 4000)
    with pytest.raises(ValueError, match=r"latents of the model are \['a', 'b'\], got one tensor"):
        pv.decode(model, z)
    with pytest.raises(ValueError, match=r"by name, which are \['a', 'b'\], got 'c'"):
        pv.decode(model, {"c": z})


def test_layouts_of_plates_and_views():
    """The data plate is at -2, with an inner plate; x is observed in two parts, in reverse."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            t = pyro.sample("t", dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
            with pyro.plate("words", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(t[..., 0], 1.0))
                pyro.sample("words_seen", dist.Normal(w, 1.0), obs=x[:, 1:])
            pyro.sample("first", dist.Normal(t[..., 1], 1.0), obs=x[:, :1])

    w, t, x = torch.randn(6, 3), torch.randn(6, 2), torch.zeros(1, 4)
    found = pv.decode(model, {"w": w, "t": t}, x=x, batch_size=4)
    torch.testing.assert_close(found, torch.cat([t[:, 1:], w], -1))
    by_site = pv.decode(model, {"w": w, "t": t}, x=x, by_site=True)
    torch.testing.assert_close(by_site["words_seen"], w)
    with pytest.raises(ValueError, match=r"'w' must be of shape \(N, 3\), got \(6, 2\)"):
        pv.decode(model, {"w": t, "t": t}, x=x)
    with pytest.raises(ValueError, match="the shape of x is unknown"):
        pv.decode(model, {"w": w, "t": t})


def test_placeholders_may_be_outside_of_the_support():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            p = dist.Gamma(torch.ones(3), 1 / (1 + z.square() + y).unsqueeze(-1)).to_event(1)
            pyro.sample("x", p, obs=x)

    z, y = torch.randn(5), torch.rand(5)
    expected = (1 + z.square() + y).unsqueeze(-1).expand(5, 3)
    torch.testing.assert_close(pv.decode(model, z, y.numpy()), expected)
    with pytest.raises(ValueError, match=r"covariates must have 5 rows.* got \[4\]"):
        pv.decode(model, z, y[:4])


def test_values_of_parameters_come_from_the_fit():
    def model(x):
        shift = pyro.param("shift_of_decode", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    pv.fit(model, guide, torch.full((50,), 9.0), epochs=3, learning_rate=1.0, capture=False,
           progress=False, seed=0)  # fmt: skip
    with pv.parameter_store(model, guide):
        shift = pyro.param("shift_of_decode").item()
    assert shift > 1
    found = pv.decode(model, torch.zeros(2), guide=guide)
    torch.testing.assert_close(found, torch.full((2,), shift))


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        ([[0.0, 1.0]], TypeError, "z must be a tensor of latents, or a dictionary"),
        ({}, ValueError, "z must hold at least one latent"),
        (torch.zeros(3), ValueError, r"z of latent site 'z' must be of shape \(N, 2\), got \(3,\)"),
        (torch.full((3, 2), math.nan), ValueError, "z has NaN or infinite values"),
        ({"z": torch.zeros(0, 2)}, ValueError, r"z\['z'\] is empty"),
        (torch.zeros(3, 2, dtype=torch.double), ValueError, "cannot run on z .*torch.float64"),
    ],
)  # fmt: skip
def test_invalid_latents_are_refused(z, error, message):
    with pytest.raises(error, match=message):
        pv.decode(make_pair()[0], z)


def test_linear_and_spherical_paths():
    """The decoder is linear, so decoded points are known."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(6, 5)
    guide = make("normal", model, x, spread=3.0)
    a, b = pv.encode(model, guide, x).mean.chunk(2)
    steps = torch.linspace(0, 1, 5).reshape(5, 1, 1)
    found = pv.interpolate(model, guide, x[:3], x[3:], num=5)
    torch.testing.assert_close(found, ((1 - steps) * a + steps * b) @ model.loading)
    found = pv.interpolate(model, guide, x[:3].numpy(), x[3:].numpy(), num=5, path="spherical")
    torch.testing.assert_close(found[[0, -1]], torch.stack([a, b]) @ model.loading)
    torch.testing.assert_close(found, spherical(a, b, steps) @ model.loading)


def test_spherical_paths_keep_the_norm_and_the_speed():
    a = torch.nn.functional.normalize(torch.randn(20, 3, 4).flatten(1), dim=-1).reshape(20, 3, 4)
    b = torch.nn.functional.normalize(torch.randn(20, 3, 4).flatten(1), dim=-1).reshape(20, 3, 4)
    steps = torch.linspace(0, 1, 9).reshape(9, 1, 1, 1)
    path = spherical(a, b, steps).flatten(2)
    torch.testing.assert_close(path.norm(dim=-1), torch.ones(9, 20))
    cosines = (path[1:] * path[:-1]).sum(-1)
    torch.testing.assert_close(cosines, cosines[:1].expand_as(cosines))
    # Without an arc, the path is a line.
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    b = torch.tensor([[2.0, 4.0], [1.0, 1.0], [-1.0, -2.0]])
    steps = torch.linspace(0, 1, 3).reshape(3, 1, 1)
    torch.testing.assert_close(spherical(a, b, steps), a + steps * (b - a))


def test_paths_of_one_latent_of_several_with_covariates():
    def model(x, y):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(a + y + 0 * c, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x - y, 1.0))
            pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("c", dist.Bernoulli(0.5))

    start, end, y = torch.randn(3), torch.randn(3), np.ones(3, dtype=np.float32)
    found = pv.interpolate(model, guide, start, end, y, num=3, site="a")
    torch.testing.assert_close(found, torch.stack([start, (start + end) / 2, end]))
    with pytest.raises(ValueError, match="'c' is discrete, so there are no points between"):
        pv.interpolate(model, guide, start, end, y, site="c")
    with pytest.raises(ValueError, match="start and end must have one shape"):
        pv.interpolate(model, guide, start, end[:2], y, site="a")
    with pytest.raises(ValueError, match='path must be "linear" or "spherical", got \'bent\''):
        pv.interpolate(model, guide, start, end, y, path="bent")


class Bayesian:
    """x = w z with a global weight w, whose guide is far from its prior."""

    def model(self, x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(w * z + 2 * k[..., None] - 1, 1e-4).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(50.0, 1.0))
        with pyro.plate("cells", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1).to_event(1))


@pytest.mark.parametrize("batch_size", [2, 100])
def test_global_latents_have_one_sample_from_the_guide(batch_size):
    """All samples of w are from its guide or its prior, six standard deviations apart."""
    pair, z = Bayesian(), torch.ones(7, 1)
    options = {"batch_size": batch_size, "seed": 0}
    means = pv.decode(pair.model, z, guide=pair.guide, **options)
    assert (means == means[0]).all()
    assert 45 < means[0] < 55
    prior = pv.decode(pair.model, z, **options)
    assert (prior == prior[0]).all()
    assert prior.abs().max() < 6
    draws = pv.decode(pair.model, z, guide=pair.guide, num_samples=5, **options)
    steps = (draws - draws[:, :1]).abs()  # between w - 1 and w + 1
    assert ((steps < 0.01) | ((steps - 2).abs() < 0.01)).all()
    assert (draws[:, 0] % 2).std() > 0.01  # each draw has its own w
    path = pv.interpolate(pair.model, pair.guide, z[:2], z[:2] + 1, num=3, **options)
    assert torch.allclose(path[2], 2 * path[0])
    assert 45 < path[0, 0] < 55


@pytest.mark.parametrize("with_guide", [True, False])
def test_generated_data_share_global_latents(with_guide):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(50.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    found = pv.generate(model, 9, guide=guide if with_guide else None, batch_size=2, seed=0)
    assert (found == found[0]).all()
    assert bool(found[0] > 45) is with_guide


def test_a_guide_of_global_latents_that_needs_data():
    def guide(x):
        w = pyro.sample("w", dist.Normal(x.mean(), 1e-3))
        with pyro.plate("data", len(x)):
            level = dist.Categorical(x / x.sum(-1, keepdim=True)).sample()
            pyro.sample("z", dist.Normal((w + level)[:, None], 1.0).to_event(1))

    pair, z = Bayesian(), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"latents \['w'\], cannot run .*Pass data as x"):
        pv.decode(pair.model, z, guide=guide, seed=0)
    with pytest.raises(ValueError, match=r"latents \['w'\], cannot run .*Pass data as x"):
        pv.generate(pair.model, torch.zeros(4, 1), guide=guide, seed=0)
    means = pv.decode(pair.model, z, x=torch.full((4, 1), 30.0), guide=guide, seed=0)
    assert torch.allclose(means, torch.tensor(30.0), atol=0.01)  # 10 standard deviations
