"""The models and guides of the published tables, from the training images ``(N, pixels)``."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

# Table A: Tomczak & Welling (2018), with the code of Norouzi et al. (2020).
LATENTS, WIDTH, PSEUDO_INPUTS = 40, 300, 500
DRAWN, NEAREST = 25_000, 10  # exemplars


class GatedNormal(nn.Module):
    """A Normal whose mean is linear in the features, and whose log-variance is in [-6, 2]."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.mean, self.log_variance = (nn.Linear(WIDTH, LATENTS) for _ in range(2))
        for head in (self.mean, self.log_variance):
            nn.init.normal_(head.weight, std=math.sqrt(2 / WIDTH))

    def forward(self, *inputs):
        h = self.features(*inputs)
        scale = (0.5 * nn.functional.hardtanh(self.log_variance(h), -6.0, 2.0)).exp()
        return dist.Normal(self.mean(h), scale).to_event(1)


class TwoInputs(nn.Module):
    """A gated layer for each of two inputs, a gated layer for both, and a linear layer if asked."""

    def __init__(self, first, second, out_features=None):
        super().__init__()
        self.first = pv.nets.GatedMLP(first, [WIDTH])
        self.second = pv.nets.GatedMLP(second, [WIDTH])
        self.joint = pv.nets.Joined(pv.nets.GatedMLP(2 * WIDTH, [WIDTH], out_features))

    def forward(self, first, second):
        return self.joint(self.first(first), self.second(second))


class GatedGuide(pyro.nn.PyroModule):
    """q(z|x) with two gated layers."""

    def __init__(self, size):
        super().__init__()
        self.q_z = GatedNormal(pv.nets.GatedMLP(size, [WIDTH, WIDTH]))

    def forward(self, x, index=None):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.q_z(x))


class TwoLevelGuide(pyro.nn.PyroModule):
    """q(z2|x) q(z1|x, z2)."""

    def __init__(self, size):
        super().__init__()
        self.q_z2 = GatedNormal(pv.nets.GatedMLP(size, [WIDTH, WIDTH]))
        self.q_z1 = GatedNormal(TwoInputs(size, LATENTS))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z_2", self.q_z2(x))
            return pyro.sample("z_1", self.q_z1(x, z2))


def standard_normal(size):
    return pv.priors.StandardNormal(LATENTS)


def vamp(size):
    start = (0.05 + 0.01 * torch.randn(PSEUDO_INPUTS, size)).clamp(0, 1)
    return pv.priors.VampPrior(LATENTS, pseudo_inputs=start)


class ExemplarModel(pyro.nn.PyroModule):
    """p(x|z) and an exemplar prior, which leaves out each data point's own exemplar in training."""

    def __init__(self, prior, likelihood):
        super().__init__()
        self.prior, self.likelihood = prior, likelihood

    def forward(self, x, index=None):
        p_z = self.prior(index)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p_z)
            return pyro.sample("x", self.likelihood(z), obs=x)


def exemplars(train):
    """The networks of one level, and a Gaussian around the code of each training image.

    The published run encoded 25,000 exemplars in each step. This one has the retrieval of the same
    code: it encodes the ten nearest of them for each image of the minibatch.
    """
    count, size = train.shape
    prior = pv.priors.ExemplarPrior(
        LATENTS, exemplars=train, num_drawn=min(DRAWN, count // 2), num_nearest=NEAREST
    )
    guide = GatedGuide(size)
    prior.bind_guide(guide)
    decoder = pv.nets.GatedMLP(LATENTS, [WIDTH, WIDTH], size)
    return ExemplarModel(prior, pv.likelihoods.Bernoulli(decoder)), guide


def one_level(make_prior):
    """p(z) p(x|z), whose networks have two gated layers of 300 units."""

    def make(train):
        size = train.shape[1]
        prior, guide = make_prior(size), GatedGuide(size)
        if isinstance(prior, pv.priors.VampPrior):
            prior.bind_guide(guide)
        decoder = pv.nets.GatedMLP(LATENTS, [WIDTH, WIDTH], size)
        return pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(decoder)), guide

    return make


def two_levels(make_prior):
    """p(z2) p(z1|z2) p(x|z1, z2)."""

    def make(train):
        size = train.shape[1]
        prior, guide = make_prior(size), TwoLevelGuide(size)
        if isinstance(prior, pv.priors.VampPrior):
            prior.bind_guide(guide, site="z_2")
        p_z1 = GatedNormal(pv.nets.GatedMLP(LATENTS, [WIDTH, WIDTH]))
        likelihood = pv.likelihoods.Bernoulli(TwoInputs(LATENTS, LATENTS, size))
        return pv.models.HierarchicalModel(prior, [p_z1], likelihood, skip=True), guide

    return make


class TanhGuide(pyro.nn.PyroModule):
    """Table B (Burda et al. 2016): two tanh layers of 200 units, sigma = exp(linear)."""

    def __init__(self, size, latents=50, width=200):
        super().__init__()
        self.hidden = pv.nets.MLP(size, [width, width])
        self.mean, self.log_sigma = (nn.Linear(width, latents) for _ in range(2))
        self.apply(glorot)

    def forward(self, x):
        h = self.hidden(x)
        with pyro.plate("data", len(x)):
            q = dist.Normal(self.mean(h), self.log_sigma(h).exp()).to_event(1)
            return pyro.sample("z", q)


def tanh_pair(train, latents=50, width=200):
    """The VAE of one stochastic layer. The last bias gives the mean image at z = 0."""
    size = train.shape[1]
    decoder = pv.nets.MLP(latents, [width, width], size).apply(glorot)
    mean_image = train.mean(0).clamp(0.001, 0.999)
    with torch.no_grad():
        decoder[-1].bias.copy_((mean_image / (1 - mean_image)).log())
    prior, likelihood = pv.priors.StandardNormal(latents), pv.likelihoods.Bernoulli(decoder)
    return pv.LatentVariableModel(prior, likelihood), TanhGuide(size, latents, width)


def flow_pair(train, width=200):
    """Table D: the model of table B, and a posterior with two affine coupling layers."""
    model, gaussian = tanh_pair(train, width=width)
    flow = pv.flows.AffineCoupling
    return model, pv.guides.AmortizedFlow(model, gaussian.hidden, flow=flow, length=2)


def glorot(module):
    """Initialize the weights of a linear layer uniformly (Glorot & Bengio 2010), its bias by 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
