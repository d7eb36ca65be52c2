"""Your own model and guide, as plain Pyro functions, with every step of the library.

The data are small count vectors. Each data point mixes three topics (a Dirichlet latent variable)
and has its own length (a LogNormal latent variable). The functions are ordinary Pyro code. Every
site that has one value per data point is inside the plate "data".

    python examples/own_pair.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

TOPICS, WORDS = 3, 12

encoder = nn.Sequential(nn.Linear(WORDS, 32), nn.Tanh(), nn.Linear(32, TOPICS + 2))


def model(x):
    """Run p(x, z). Topics are pyro.param values, and counts are Poisson."""
    topics = pyro.param(
        "topics",
        lambda: torch.distributions.Dirichlet(torch.ones(WORDS)).sample((TOPICS,)),
        constraint=dist.constraints.simplex,
    )
    with pyro.plate("data", x.shape[0]):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(TOPICS)))
        length = pyro.sample("length", dist.LogNormal(3.0, 0.5))
        rate = length.unsqueeze(-1) * (weights @ topics)
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def guide(x):
    """Run q(z|x), with one encoder for both latents."""
    pyro.module("encoder", encoder)
    raw = encoder(torch.log1p(x))
    concentration, loc, scale = raw.split([TOPICS, 1, 1], dim=-1)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("weights", dist.Dirichlet(concentration.exp()))
        loc, scale = 3.0 + loc.squeeze(-1), 0.3 * scale.squeeze(-1).exp()
        pyro.sample("length", dist.LogNormal(loc, scale))


def simulate(count):
    """Sample data from fixed topics, which the model must learn."""
    topics = torch.zeros(TOPICS, WORDS)
    for i in range(TOPICS):
        topics[i, 4 * i : 4 * i + 4] = 0.25
    weights = torch.distributions.Dirichlet(torch.ones(TOPICS)).sample((count,))
    length = torch.distributions.LogNormal(3.0, 0.5).sample((count, 1))
    return torch.poisson(length * (weights @ topics))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--test", type=int, default=500, help="data points for the log evidence")
    arguments = parser.parse_args()
    epochs = arguments.epochs

    torch.manual_seed(0)
    train, test = simulate(2000), simulate(arguments.test)

    # Fit the same model with two guides: the one above and an AmortizedNormal.
    fit = pv.fit(model, guide, train, epochs=epochs, learning_rate=5e-3, seed=0)
    print(pv.evidence(model, guide, test, num_particles=2000, seed=0))
    print(pv.elbo_surgery(model, guide, train, seed=0))
    with pv.parameter_store(model, guide):
        print("topics:", pyro.param("topics").detach().round(decimals=2), sep="\n")

    amortized = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(WORDS, [32]))
    fit2 = pv.fit(model, amortized, train, epochs=epochs, learning_rate=5e-3, seed=0)
    print(pv.compare({"own guide": fit, "AmortizedNormal": fit2}, test, train=train))


if __name__ == "__main__":
    main()
