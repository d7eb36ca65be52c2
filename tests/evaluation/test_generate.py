"""Data generated without data: moments of the marginal, and the shapes that a model remembers."""

import gc
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from guide_table import Model, make

import pyro_vae as pv
from pyro_vae._programs import argument_shapes
from pyro_vae.serialization._folder import read, write


def near_covariance(samples, covariance):
    """Compare at 4.5 standard errors of a Gaussian's sample covariance: 1 of 100,000 cases."""
    variances = covariance.diagonal()
    error = ((variances[:, None] * variances + covariance**2) / len(samples)).sqrt()
    return bool(((samples.T.cov() - covariance).abs() < 4.5 * error).all())


def test_moments_are_those_of_the_marginal():
    torch.manual_seed(0)
    model = Model(data=3)
    signal = model.loading.T @ model.loading
    means = pv.generate(model, 4000, batch_size=1500, seed=0)
    draws = pv.generate(model, 4000, draw=True, batch_size=1500, seed=1)
    for samples, covariance in ((means, signal), (draws, signal + torch.eye(3))):
        assert samples.shape == (4000, 3)
        error = (covariance.diagonal() / 4000).sqrt()
        assert (samples.mean(0).abs() < 4.5 * error).all()
        assert near_covariance(samples, covariance)


def test_samples_have_the_values_of_x(pair):
    model, _ = pair
    draws = pv.generate(model, np.int64(30), draw=True, seed=0)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(draws, pv.generate(model, 30, draw=True, seed=0))
    assert pv.generate(model, 5, by_site=True)["x"].shape == (5, 16)
    assert torch.equal(
        pv.generate(model, 5, seed=3), pv.generate(model, torch.zeros(5, 16), seed=3)
    )


def in_parts(x):
    """x is observed in two parts, so that a run does not show its shape."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("left", dist.Poisson(z.exp()), obs=x[:, 0])
        pyro.sample("right", dist.Poisson(z.exp()), obs=x[:, 1])


RUNS = {
    "fit": lambda m, g, x: pv.fit(m, g, x, epochs=1, capture=False, progress=False),
    "evidence": lambda m, g, x: pv.evidence(m, g, x, num_particles=3),
    "naive": lambda m, g, x: pv.evidence(m, g, x, num_particles=3, method="naive"),
    "reconstruct": pv.reconstruct,
    "encode": pv.encode,
}


@pytest.mark.parametrize("run", RUNS)
def test_shapes_are_known_after_a_run(run):
    def model(x):
        in_parts(x)

    def guide(x):
        loc = pyro.param("loc_of_generate", torch.zeros((), dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + 0 * x[:, 0], 1.0))

    with pytest.raises(ValueError, match="the shape of x is unknown"):
        pv.generate(model, 3)
    x = torch.poisson(torch.ones(8, 2, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        RUNS[run](model, guide, x)
    for program in (model, pyro.poutine.scale(model, 0.5)):
        assert pv.generate(program, 3).shape == (3, 2)
    assert argument_shapes.known_specs(model)[0].dtype == torch.float64


def test_models_are_held_weakly():
    gc.collect()
    before = len(argument_shapes._known)
    pair = make_pair()
    pv.encode(*pair, torch.rand(3, 16).round())
    assert len(argument_shapes._known) == before + 1
    del pair
    gc.collect()
    assert len(argument_shapes._known) == before


def sequences():
    model = pv.models.SequenceModel(
        pv.priors.StandardNormal(2),
        transition=lambda z: dist.Normal(0.9 * z, 0.4).to_event(1),
        likelihood=lambda z: dist.Normal(z, 0.1).to_event(1),
    )
    return model, pv.guides.SequenceGuide(model, recurrent=4, hidden=[4])


def test_saved_pairs_know_the_shape_of_x(tmp_path):
    """A sequence's length is not in the model. Folders of older versions load without it."""
    model, guide = sequences()
    lengths = torch.tensor([3, 1, 2, 3])
    pv.encode(model, guide, torch.randn(4, 3, 2), lengths, site="z_1")
    pv.save(tmp_path / "pair", model, guide)
    again, other = sequences()
    with pytest.raises(ValueError, match="the shape of x is unknown"):
        pv.generate(again, 4)
    saved = pv.load(tmp_path / "pair", again, other)
    assert pv.generate(saved.model, 4, lengths).shape == (4, 3, 2)
    with pytest.raises(
        ValueError, match=r"takes 1 covariates besides x, .*covariates has the .*\[\]"
    ):
        pv.generate(saved.model, 4)
    with pytest.raises(ValueError, match=r"covariates must have 5 rows, .* got \[4\]"):
        pv.generate(saved.model, 5, lengths)
    content = read(tmp_path / "pair", kind="pair")
    assert content["arguments"][0] == {"shape": [3, 2], "dtype": "float32"}
    del content["arguments"]
    write(tmp_path / "older", content, kind="pair")
    older = pv.load(tmp_path / "older", *sequences())
    assert pv.generate(older.model, torch.zeros(4, 3, 2), lengths).shape == (4, 3, 2)
    for bad in ({"shape": [-1], "dtype": "float32"}, {"shape": [2], "dtype": "save"}, {"shape": 3}):
        write(tmp_path / "bad", {**content, "arguments": [bad]}, kind="pair", overwrite=True)
        with pytest.raises(ValueError, match="bad has no pair that this pyro_vae can rebuild"):
            pv.load(tmp_path / "bad", *sequences())


def test_loaded_pair_generates_and_checkpoints_remember(tmp_path, binary):
    model, guide = make_pair()
    pv.fit(
        model, guide, binary, epochs=1, capture=False, checkpoint=tmp_path / "run", progress=False
    )
    pv.save(tmp_path / "pair", model, guide)
    for loaded in (pv.load(tmp_path / "pair"), pv.load_checkpoint(tmp_path / "run")):
        assert argument_shapes.known_specs(loaded.model)[0].shape == (16,)
        torch.testing.assert_close(
            pv.generate(loaded.model, 16, seed=0), pv.generate(model, 16, seed=0)
        )


def test_a_vampprior_needs_no_guide():
    """The prior calls the guide, so each parameter of the guide has two names."""
    torch.manual_seed(0)
    prior = pv.priors.VampPrior(2, pseudo_inputs=torch.rand(5, 16))
    decoder = pv.nets.MLP(2, [4], 16)
    model = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(decoder))
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [4]))
    prior.bind_guide(guide)
    names = set(pyro.get_param_store().keys())
    pv.evidence(model, guide, torch.rand(10, 16).round(), num_particles=2, capture=False)
    z = torch.randn(3, 2)
    torch.testing.assert_close(pv.decode(model, z), decoder(z).sigmoid().detach())
    with_guide = pv.generate(model, 3, guide=guide, seed=0)
    torch.testing.assert_close(pv.generate(model, 3, seed=0), with_guide)
    assert set(pyro.get_param_store().keys()) == names


def test_models_of_the_library_that_never_ran():
    mlp = pv.nets.MLP
    labels = torch.tensor([0, 1, -1])
    partly = pv.models.SemiSupervisedModel(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.Joined(mlp(5, [4], 16))),
        classes=3,
    )
    assert pv.generate(partly, 3, labels).shape == (3, 16)
    mixture = pv.models.MixtureModel(
        pv.priors.MixtureOfNormals(2, components=3), pv.likelihoods.Normal(mlp(2, [4], 5))
    )
    assert pv.generate(mixture, 4, draw=True).shape == (4, 5)
    layers = [pv.surjections.Bijection(pv.flows.Composition(4, length=1)) for _ in range(2)]
    for number in (1, 2):
        flow = pv.surjections.FlowModel(pv.priors.StandardNormal(4), layers[:number])
        assert pv.generate(flow, 5).shape == (5, 4)
        with pytest.raises(ValueError, match="x has events of shape"):
            flow(torch.randn(3, 2, 4))
    flow, x = pv.surjections.FlowModel(pv.priors.StandardNormal(4), layers[:1]), torch.randn(3, 4)
    codes = pv.encode(flow, pv.surjections.FlowGuide(flow), x)
    torch.testing.assert_close(pv.decode(flow, codes.mean), x, rtol=1e-3, atol=1e-4)
    assert not codes.std.any()
    assert pv.generate(flow, 4).shape == (4, 4)


def test_models_whose_x_has_an_unknown_shape_say_how_to_pass_it():
    """A SequenceModel generates any number of steps."""
    model, _ = sequences()
    message = r"observes 'x_1' of shape .*, not x itself\. Pass data .*torch.zeros\(16, T, D\)"
    with pytest.raises(ValueError, match=message):
        pv.generate(model, 16)
    lengths = torch.full((16,), 3)
    with pytest.raises(ValueError, match=r"does not run on x of .*torch.zeros\(16, T, D\)"):
        pv.generate(model, 16, lengths)
    assert pv.generate(model, torch.zeros(16, 3, 2), lengths).shape == (16, 3, 2)
    with pytest.raises(ValueError, match=r"Pass one row .* x=torch.zeros\(1, \.\.\.\)"):
        pv.decode(model, {"z_1": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"Pass one row .* x=torch.zeros\(1, \.\.\.\)"):
        pv.plots.manifold(model, image_shape=(1, 2))


def test_covariates_are_split_with_the_rows():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            pyro.sample("x", dist.Normal(z + y, 1e-3), obs=x)

    y = torch.arange(7.0)
    found = pv.generate(model, 7, y, batch_size=3)
    assert ((found - y).abs() < 0.1).all()


def test_models_that_use_the_values_of_x_need_data():
    """The total count of a Multinomial is the sum of x."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            total = x.sum(-1, keepdim=True)
            p = dist.Poisson(total * z.softmax(-1) + y.unsqueeze(-1)).to_event(1)
            pyro.sample("x", p, obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.log(), 1.0).to_event(1))

    x, y, z = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.ones(2), torch.zeros(2, 3)
    pv.encode(model, guide, x, y)
    for call in (lambda: pv.generate(model, 2, y), lambda: pv.decode(model, z, y)):
        with pytest.raises(ValueError, match="'x' of the model depends on the values of x"):
            call()
    expected = (x.sum(-1, keepdim=True) / 3 + 1).expand(2, 3)
    torch.testing.assert_close(pv.decode(model, z, y, x=x), expected)
    torch.testing.assert_close(pv.decode(model, z, y, x=x[:1]), expected[:1].expand(2, 3))
    assert pv.generate(model, x, y).shape == (2, 3)
    with pytest.raises(ValueError, match=r"x must have one row, or 2 as z, got shape \(3, 3\)"):
        pv.decode(model, z, y, x=torch.ones(3, 3))

    def failing(x, y):
        assert x.any(), "no counts"
        model(x, y)

    argument_shapes.remember(failing, (x, y))
    with pytest.raises(ValueError, match="in the place of data: AssertionError: no counts"):
        pv.generate(failing, 2, y)


@pytest.mark.parametrize("count", [0, -3, True, 2.5, math.inf])
def test_invalid_numbers_of_data_points(count):
    model = Model()
    make("normal", model, torch.randn(3, 5))
    with pytest.raises(ValueError, match="x must be"):
        pv.generate(model, count)


def test_the_search_for_global_latents_has_no_effect():
    """New parameters depend on the seed of the call."""

    def run(seed):
        def model(x):
            w = pyro.param("w", lambda: torch.randn(()))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

        return pv.generate(model, torch.zeros(3), seed=seed)

    for seed in (0, 1):
        torch.manual_seed(seed)
        assert (run(seed) == torch.randn(())).all()
