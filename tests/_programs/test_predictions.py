"""Observations, predictions and reconstructions of models with summed-out discrete latents.

Frequencies are compared at 4.5 standard errors: a false alarm in 10^5 comparisons.
"""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

ALL = {"enumerate": "parallel"}
PROBS = torch.tensor([0.2, 0.3, 0.5])
MEANS = torch.tensor([-1.0, 0.5, 1.5])
STEP = 100.0  # so large that an observation shows its component


def mixture(x, plates=0):
    """z depends on c, and x on both; with ``plates``, x is in an inner plate of four numbers."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(PROBS), infer=dict(ALL))
        z = pyro.sample("z", dist.Normal(MEANS[c], 0.7))
        pyro.sample("shown", dist.Normal(z, 1e-3), obs=x[:, 0])
        if plates:
            with pyro.plate("inner", 4):
                pyro.sample("x", dist.Normal(STEP * c + z, 1.0), obs=x.T)
        else:
            loc = (STEP * c + z).unsqueeze(-1).expand(*(c + z).shape, 4)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], 0.5))


def given(z):
    """Return p(c|z)."""
    log_joint = PROBS.log() + dist.Normal(MEANS, 0.7).log_prob(z.unsqueeze(-1))
    return log_joint.softmax(-1)


def assert_drawn_from(found, probs):
    """Compare zeros and ones with their probabilities, summed over all particles."""
    error = (probs * (1 - probs)).sum().sqrt()
    assert ((found - probs).sum() / error).abs() < 4.5


@pytest.mark.parametrize("plates", [0, 1])
@pytest.mark.parametrize(("particles", "vectorize"), [(1, True), (2000, True), (40, False)])
def test_predictions_sample_the_component_given_the_latents(plates, particles, vectorize):
    torch.manual_seed(0)
    model = functools.partial(mixture, plates=plates)
    x = torch.randn(200 if particles == 1 else 3, 4)
    options = {"num_particles": particles, "vectorize_particles": vectorize}
    t = pv.terms(model, guide, x, **options)
    z, drawn = t.samples["z"], t.predict()
    assert drawn["x"].shape == (particles, *x.shape)
    c = ((drawn["x"] - z.unsqueeze(-1)) / STEP).round()
    assert (c == c[..., :1]).all()  # one component for each data point
    for value in range(3):
        assert_drawn_from((c[..., 0] == value).float(), given(z)[..., value])


def test_predictions_sample_two_summed_out_latents():
    """Two latents depend on c, and none on d."""
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer=dict(ALL))
            d = pyro.sample("d", dist.OneHotCategorical(PROBS), infer=dict(ALL))
            a = pyro.sample("a", dist.Normal(c, 1.0))
            pyro.sample("b", dist.Normal(2 * c, 0.5))
            loc = STEP * torch.stack(torch.broadcast_tensors(c, d[..., 1], d[..., 2]), -1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x.unsqueeze(1))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("y", dist.Normal(STEP * c + a, 1.0), obs=x[:, :2])

    def of_both(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("a", dist.Normal(x[:, :1], 1.0))
            pyro.sample("b", dist.Normal(1.0, 1.0))

    t = pv.terms(model, of_both, torch.randn(3, 3), num_particles=2000)
    a, b = t.samples["a"], t.samples["b"]
    drawn = t.predict()
    x, y = (drawn["x"] / STEP).round(), (drawn["y"] / STEP).round()
    assert x.shape == (2000, 3, 3)
    assert y.shape == (2000, 3, 2)
    assert (y == x[..., :1]).all()
    log_odds = [
        p.log() + dist.Normal(c, 1.0).log_prob(a) + dist.Normal(2.0 * c, 0.5).log_prob(b)
        for c, p in enumerate(torch.tensor([0.7, 0.3]))
    ]
    assert_drawn_from(x[..., 0], torch.stack(log_odds).softmax(0)[1])
    for value in (1, 2):
        assert_drawn_from(x[..., value], PROBS[value].expand(2000, 3))
    assert (x[..., 1] * x[..., 2] == 0).all()


@pytest.mark.parametrize("plates", [0, 1])
def test_reconstructions_average_over_the_components(plates):
    model = functools.partial(mixture, plates=plates)
    means = pv.reconstruct(model, guide, torch.randn(6, 4), by_site=True, seed=0)
    z = means["shown"]
    expected = STEP * (given(z) @ torch.arange(3.0)) + z
    torch.testing.assert_close(means["x"], expected.unsqueeze(-1).expand(6, 4))


def test_reconstructed_angles_are_mean_directions():
    """The linear mean of a mixture of angles on both sides of the cut is near zero."""

    def model(x, several):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)).unsqueeze(-1)
            loc = 3.0 + z.expand(*z.shape[:-1], 2)
            angles = dist.VonMises(loc, 20.0)
            if several:
                components = dist.VonMises(torch.stack([loc - 0.3, loc + 0.3], -1), 20.0)
                weights = dist.Categorical(torch.ones_like(components.loc))
                angles = dist.MixtureSameFamily(weights, components)
            pyro.sample("x", angles.to_event(1), obs=x)

    def guide(x, several):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, 0]))

    x = torch.linspace(-3.0, 3.0, 7).unsqueeze(-1).repeat(1, 2)
    expected = torch.atan2((3.0 + x).sin(), (3.0 + x).cos())
    for several in (False, True):
        pair = (functools.partial(program, several=several) for program in (model, guide))
        torch.testing.assert_close(pv.reconstruct(*pair, x), expected, rtol=0, atol=1e-5)


def test_reconstruction_samples_latents_enumerated_in_the_guide():
    def both(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=1e4 * (x - 1).sign() * torch.eye(3)[1]),
                            infer=dict(ALL))  # fmt: skip
            pyro.sample("z", dist.Normal(c.float(), 0.1))

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(PROBS), infer=dict(ALL))
            z = pyro.sample("z", dist.Normal(MEANS[c], 0.7))
            loc = (STEP * c + z).unsqueeze(-1).expand(*(c + z).shape, 3)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = torch.tensor([[0.0, 2.0, 0.0]]).expand(5, 3).clone()
    means = pv.reconstruct(model, both, x, seed=0)
    assert ((means - STEP - 1).abs() < 0.6).all()


def test_discrete_observation_is_sampled_with_its_component():
    """The observed site has no mean."""
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(PROBS), infer=dict(ALL))
            pyro.sample("z", dist.Normal(MEANS[c], 0.7))
            pyro.sample("x", dist.Categorical(logits=1e3 * torch.eye(3)[c]), obs=x[:, 0].long())

    x = torch.zeros(4000, 1)
    found = pv.reconstruct(model, guide, x, seed=0, by_site=True)["x"]
    probs = given(0.5 * torch.randn(100_000)).mean(0)
    for value in range(3):
        error = (probs[value] * (1 - probs[value]) / 4000).sqrt() + 2e-3  # and that of 100,000
        assert ((found == value).float().mean() - probs[value]).abs() < 4.5 * error


def test_predictions_of_the_mixture_model():
    torch.manual_seed(0)
    model = pv.models.MixtureModel(
        pv.priors.MixtureOfNormals(2, components=3), pv.likelihoods.Normal(pv.nets.MLP(2, [8], 4))
    )
    encoder = pv.guides.AmortizedNormal(model, pv.nets.MLP(4, [8]))
    x = torch.randn(6, 4)
    encoder(x)
    container = pv.to_arviz(model, encoder, x, num_draws=7, seed=0)
    assert container["posterior_predictive"]["x"].shape == (1, 7, 6, 4)
    assert container["observed_data"]["x"].shape == (6, 4)
    t = pv.terms(model, encoder, x, num_particles=4000)
    p = model.likelihood(t.samples["z"])
    z = (t.predict()["x"] - p.mean).sum(0) / p.variance.sum(0).sqrt()
    assert (z.abs() < 4.5).all()


def plain(x, plates=0):
    """z and c are independent; x and a constant are observed."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Categorical(PROBS), infer=dict(ALL))
        if plates:
            with pyro.plate("inner", 4):
                pyro.sample("x", dist.Normal(z + c, 1.0), obs=x.T)
        else:
            loc = (z + c).unsqueeze(-1).expand(*(z + c).shape, 4)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
        pyro.sample("constant", dist.Normal(z + c, 1.0), obs=torch.tensor(0.5))


@pytest.mark.parametrize("plates", [0, 1])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("particles", [1, 3, 7])
def test_observations_have_one_row_per_data_point(plates, vectorize, particles):
    x = torch.randn(5, 4)
    model = functools.partial(plain, plates=plates)
    options = {"num_particles": particles, "vectorize_particles": vectorize}
    observations = pv.terms(model, guide, x, **options).observations
    assert torch.equal(observations["x"], x)
    assert torch.equal(observations["constant"], torch.full((5,), 0.5))
    container = pv.to_arviz(
        model, guide, x, num_draws=particles, vectorize_particles=vectorize, seed=0
    )
    assert (container["observed_data"]["x"].values == x.numpy()).all()
    assert container["posterior_predictive"]["x"].shape == (1, particles, 5, 4)


@pytest.mark.parametrize("on", ["z", "c"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_observation_that_depends_on_latents_is_refused(on, vectorize):
    def model(x, weight):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(PROBS), infer=dict(ALL))
            shift = z if on == "z" else c
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x[:, 0] + weight * shift)

    x = torch.randn(5, 4)
    repeated = pv.terms(functools.partial(model, weight=0.0), guide, x, num_particles=3,
                        vectorize_particles=vectorize).observations  # fmt: skip
    assert torch.equal(repeated["x"], x[:, 0])
    t = pv.terms(functools.partial(model, weight=1.0), guide, x, num_particles=3,
                 vectorize_particles=vectorize)  # fmt: skip
    with pytest.raises(ValueError, match="'x' observes values that differ from particle to"):
        _ = t.observations
