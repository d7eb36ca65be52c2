"""Networks, priors, likelihoods and models, each alone."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv


def test_mlp_accepts_any_leading_dimensions():
    net = pv.nets.MLP(3, [5, 4], 2, activation=nn.ReLU)
    x = torch.randn(6, 7, 3)
    torch.testing.assert_close(net(x)[2, 3], net(x[2, 3]))
    assert pv.nets.MLP(3, [5])(x).shape == (6, 7, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, []), "needs a hidden layer or out_features"),
        ((0, [3]), "must be positive"),
        ((3, [3], 0), "must be positive"),
    ],
)
def test_mlp_refuses_empty_and_zero_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        pv.nets.MLP(*arguments)


def test_standard_normal_scores_any_event_shape():
    z = torch.randn(5, 1, 4, 4)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))
    torch.testing.assert_close(pv.priors.StandardNormal(1, 4, 4)().log_prob(z), expected)
    with pytest.raises(ValueError, match="the sizes of z"):
        pv.priors.StandardNormal()


def test_bernoulli_sums_to_one_over_all_images():
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [5], 6))
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    log_p = likelihood(torch.randn(2)).log_prob(images)
    torch.testing.assert_close(log_p.logsumexp(0), torch.tensor(0.0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="event_dim"):
        pv.likelihoods.Bernoulli(nn.Identity(), event_dim=0)


def test_model_generates_and_reconstructs(pair, binary):
    model, guide = pair
    samples = pv.generate(model, binary, seed=0)
    assert samples.shape == binary.shape
    assert ((samples > 0) & (samples < 1)).all()
    torch.testing.assert_close(samples, pv.generate(model, binary, seed=0))
    reconstructions = pv.reconstruct(model, guide, binary, seed=0)
    assert reconstructions.shape == binary.shape
    assert not torch.equal(samples, reconstructions)


def test_generate_refuses_a_model_that_observes_another_shape(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="no observed site of the model has the shape of x"):
        pv.generate(model, torch.zeros(3, 17))


def test_reconstruct_returns_the_site_that_observed_x():
    """An earlier observed site has the same shape; a categorical site has no mean."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + 100, 0.1), obs=x + 100)
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    x = torch.randn(5)
    assert (pv.reconstruct(model, guide, x) - x).abs().max() < 1

    def labels(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=z), obs=x)

    assert pv.generate(labels, torch.tensor([0, 1, 2, 1])).max() <= 2


@pytest.mark.parametrize("shape", [(5, 16), (5, 3, 19), (4, 1)])
def test_bernoulli_log_prob_and_gradients_match_pyro(shape):
    logits = (6 * torch.randn(3, *shape, dtype=torch.double)).requires_grad_()
    x = torch.rand(shape, dtype=torch.double).round()
    for event_dim in (1, len(shape) - 1) if len(shape) > 2 else (1,):
        likelihood = pv.likelihoods.Bernoulli(nn.Identity(), event_dim)(logits)
        plain = dist.Bernoulli(logits=logits).to_event(event_dim)
        assert likelihood.event_shape == plain.event_shape
        torch.testing.assert_close(likelihood.log_prob(x), plain.log_prob(x))
        ours, theirs = (
            torch.autograd.grad(d.log_prob(x).square().sum(), logits) for d in (likelihood, plain)
        )
        torch.testing.assert_close(ours, theirs)
    extreme = pv.likelihoods.Bernoulli(nn.Identity())(torch.tensor([[200.0, -200.0, 90.0, 0.0]]))
    assert extreme.log_prob(torch.tensor([[1.0, 0.0, 1.0, 1.0]])).item() == pytest.approx(-0.693147)


def test_bernoulli_broadcasting_and_half_precision_match_pyro():
    x = torch.rand(4, 16).round()
    for logits in (torch.randn(4, 1), torch.randn(16), torch.zeros(4, 16, dtype=torch.half)):
        ours = pv.likelihoods.Bernoulli(nn.Identity())(logits).log_prob(x.to(logits.dtype))
        plain = dist.Bernoulli(logits=logits).to_event(1)
        torch.testing.assert_close(
            ours, plain.base_dist.log_prob(x.to(logits.dtype)).sum(-1), check_dtype=False
        )
    logits = torch.randn(4, 16)
    gradients = torch.func.vmap(
        torch.func.grad(lambda row: pv.likelihoods.Bernoulli(nn.Identity())(row).log_prob(x[0]))
    )(logits)
    torch.testing.assert_close(gradients, x[0] - logits.sigmoid())
