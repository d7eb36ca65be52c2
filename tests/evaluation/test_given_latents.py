"""Latents that are outside of the support of their site are refused, by name and by row."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_vae as pv
from pyro_vae.evaluation._given_latents import described

ALL = {"enumerate": "parallel"}


def decoder_of(prior, size, **infer):
    """Return a model with a latent of one distribution, and x = z as numbers."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior, infer=infer)
            mean = z.to(x.dtype).reshape(*z.shape[: z.dim() - len(prior.event_shape)], size)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model


def half(*shape):
    return torch.full(shape, 0.5)


class Ordered(dist.Normal):
    """A distribution of two numbers in order, up to a constant."""

    support = constraints.ordered_vector

    def __init__(self):
        super().__init__(torch.zeros(()), 1.0)
        self._event_shape = torch.Size([2])

    def expand(self, batch_shape, _instance=None):
        new = Ordered()
        new._batch_shape = torch.Size(batch_shape)
        return new

    def sample(self, sample_shape=()):
        return torch.randn(*sample_shape, *self._batch_shape, 2).sort(-1).values

    rsample = sample

    def log_prob(self, value):
        return -0.5 * value.square().sum(-1)


# Prior, values inside of the support, values outside in row 1, and words of the message.
SUPPORTS = {
    "positive": (dist.LogNormal(torch.zeros(2), 1.0).to_event(1), [2.0, 0.1], [1.0, -0.1],
                 r"Expected numbers above 0, but row 1 has numbers in \[-0.1, 1\]"),
    "no event": (dist.Gamma(2.0, 1.0), 0.5, -2.0, "numbers of at least 0, but row 1"),
    "interval": (dist.Beta(torch.ones(2), 2.0).to_event(1), [0.0, 1.0], [0.0, 1.01],
                 "numbers from 0 to 1"),
    "uniform": (dist.Uniform(-half(2), 3.0).to_event(1), [-0.5, 3.0], [3.1, 0.0],
                "numbers from -0.5 to 3"),
    "simplex": (dist.Dirichlet(torch.ones(3)), [0.2, 0.3, 0.5], [0.2, 0.3, 0.6],
                "numbers of at least 0 whose sum is 1"),
    "negative share": (dist.Dirichlet(torch.ones(3)), [0.0, 0.0, 1.0], [-0.5, 0.5, 1.0],
                       "whose sum is 1"),
    "angle": (dist.VonMises(0.0, 1.0), 3.1, 4.0, "angles from -pi to pi"),
    "levels": (dist.Categorical(half(3)), 2, 3, r"whole numbers from 0 to 2.*not means"),
    "no level": (dist.Categorical(half(3)), 0, -1, "whole numbers from 0 to 2"),
    "one-hot": (dist.OneHotCategorical(half(3)), [0.0, 1.0, 0.0], [0.0, 0.5, 0.5],
                "one-hot vectors.*num_samples=1"),
    "two levels": (dist.Bernoulli(half(2)).to_event(1), [1.0, 0.0], [0.5, 1.0], "Expected 0 or 1"),
    "counts": (dist.Poisson(3.0), 4.0, 2.5, "whole numbers of at least 0"),
    "pushed": (dist.TransformedDistribution(
                   dist.Uniform(torch.zeros(2), 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]
               ).to_event(1), [1.0, 3.0], [0.5, 2.0], "numbers from 1 to 3"),
    "order": (Ordered(), [1.0, 2.0], [2.0, 1.0], "vectors in ascending order"),
    "reals": (dist.Normal(torch.zeros(2), 1.0).to_event(1), [-9.0, 9.0], [math.inf, 0.0],
              "z has NaN or infinite values at latent site 'z', first in row 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize("summed", [False, True])
def test_latents_outside_of_their_support_are_refused(kind, summed):
    prior, inside, outside, message = SUPPORTS[kind]
    inside, outside = torch.tensor(inside), torch.tensor(outside)
    size, inner = outside.numel(), decoder_of(prior, outside.numel())

    def with_summed(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer=dict(ALL))
            z = pyro.sample("z", prior)
            mean = z.to(x.dtype).reshape(*z.shape[: z.dim() - len(prior.event_shape)], size)
            mean = mean + 0.0 * c.unsqueeze(-1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    model, options = with_summed if summed else inner, {"x": torch.zeros(1, size)}
    rows = torch.stack([inside, inside, inside])
    found = pv.decode(model, rows, batch_size=2, **options)
    torch.testing.assert_close(found, rows.reshape(3, size).to(found.dtype))
    for row, batch_size in ((1, 3), (1, 1)):
        wrong = rows.clone()
        wrong[row] = outside
        with pytest.raises(ValueError, match=message):
            pv.decode(model, {"z": wrong}, batch_size=batch_size, **options)


def test_bounds_may_depend_on_covariates_and_on_other_latents():
    def model(x, high):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(torch.zeros_like(high), high))
            b = pyro.sample("b", dist.Uniform(a, 10.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    high, x = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(1)
    a, b = torch.tensor([0.5, 1.5, 2.5]), torch.tensor([1.0, 9.0, 4.0])
    torch.testing.assert_close(pv.decode(model, {"a": a, "b": b}, high, x=x), a + b)
    with pytest.raises(ValueError, match="latent site 'a', first in row 0"):
        pv.decode(model, {"a": a.flip(0), "b": b + 2}, high, x=x)
    with pytest.raises(ValueError, match=r"latent site 'b', first in row 2.*in \[2, 2\]"):
        pv.decode(model, {"a": a, "b": torch.tensor([1.0, 9.0, 2.0])}, high, x=x)


def test_values_of_masked_latents_are_not_checked():
    def model(x, lengths):
        with pyro.plate("data", len(x), dim=-1):
            for t in range(x.shape[1]):
                with pyro.poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.LogNormal(0.0, 1.0))
                    assert (z > 0).all()
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    x, lengths = torch.zeros(3, 2), torch.tensor([2, 1, 2])
    z = {"z_0": torch.tensor([1.0, 2.0, 3.0]), "z_1": torch.tensor([4.0, torch.nan, 5.0])}
    found = pv.decode(model, z, lengths, x=x, seed=0)
    torch.testing.assert_close(found[lengths == 2], torch.tensor([[1.0, 4.0], [3.0, 5.0]]))
    assert found[1, 0] == 2
    with pytest.raises(ValueError, match="infinite values at latent site 'z_1', first in row 1"):
        pv.decode(model, z, torch.tensor([2, 2, 2]), x=x)


def test_shares_in_low_precision_are_inside_of_the_simplex():
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        shares = torch.randn(5, 50).softmax(-1).to(dtype)
        prior = dist.Dirichlet(torch.ones(50, dtype=torch.float64))
        model = decoder_of(prior, 50)
        found = pv.decode(model, shares, x=torch.zeros(1, 50))
        torch.testing.assert_close(found, shares.float())


def test_spherical_paths_that_leave_the_support_are_refused():
    """On a simplex, the middle of an arc has a sum above one. Its chord is inside."""
    prior = dist.Dirichlet(torch.ones(3))
    model = decoder_of(prior, 3)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x, event_dim=1))

    start, end = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    found = pv.interpolate(model, guide, start, end, num=3)
    torch.testing.assert_close(found[1], (start + end) / 2)
    with pytest.raises(ValueError, match=r"whose sum is 1.*The spherical path.*path=\"linear\""):
        pv.interpolate(model, guide, start, end, num=3, path="spherical")
    ball = decoder_of(dist.ProjectedNormal(torch.zeros(3)), 3)
    with pytest.raises(ValueError, match=r"vectors of length 1.*The linear path.*by pv.decode"):
        pv.interpolate(ball, guide, start, end, num=3)


def test_words_of_other_supports():
    assert described(constraints.greater_than_eq(2)) == "numbers of at least 2"
    assert described(constraints.less_than(2)) == "numbers below 2"
    assert described(constraints.interval(torch.zeros(2), half(2))) == "numbers from 0 to 0.5"
    assert "interval" in described(constraints.interval(0, torch.tensor([1.0, 2.0]))).lower()
    assert described(constraints.lower_cholesky) == str(constraints.lower_cholesky)
