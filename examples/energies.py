"""Fit flows to the four unnormalized densities of Rezende & Mohamed (2015, table 1).

python examples/energies.py                                  # all: about half an hour on two cores
python examples/energies.py --energies U1 --families planar-8 --steps 2000

A density exp(-U(z)) / Z is a model with a latent z and no data, so KL(q || p) = log Z - ELBO. Z was
computed by quadrature. U2, U3 and U4 are integrable only on |z1| <= 4, so z1 is a site with that
support. The guide's flow maps onto this support automatically.
"""

import argparse
import functools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv
from pyro_vae import flows
from pyro_vae.guides import LocalGuide
from pyro_vae.guides import _families as families

BATCH, STEPS_PER_EPOCH = 256, 100


def w1(z1):
    return torch.sin(2 * torch.pi * z1 / 4)


def w2(z1):
    return 3 * torch.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)


def w3(z1):
    return 3 * torch.sigmoid((z1 - 1) / 0.3)


def bell(distance, width):
    return -0.5 * (distance / width) ** 2


def u1(z1, z2):
    ring = 0.5 * (((z1**2 + z2**2).sqrt() - 2) / 0.4) ** 2
    return ring - torch.logaddexp(bell(z1 - 2, 0.6), bell(z1 + 2, 0.6))


def u2(z1, z2):
    return 0.5 * ((z2 - w1(z1)) / 0.4) ** 2


def u3(z1, z2):
    return -torch.logaddexp(bell(z2 - w1(z1), 0.35), bell(z2 - w1(z1) + w2(z1), 0.35))


def u4(z1, z2):
    return -torch.logaddexp(bell(z2 - w1(z1), 0.4), bell(z2 - w1(z1) + w3(z1), 0.35))


ENERGIES = {"U1": (u1, 1.8775), "U2": (u2, 2.0821), "U3": (u3, 2.6417), "U4": (u4, 2.7107)}  # log Z
SPLINE = functools.partial(flows.NeuralSpline, hidden=[128])
FAMILIES = {
    "Gaussian": families.MultivariateNormal,
    "planar-2": functools.partial(families.Transformed, flow=flows.Planar, length=2),
    "planar-8": functools.partial(families.Transformed, flow=flows.Planar, length=8),
    "planar-32": functools.partial(families.Transformed, flow=flows.Planar, length=32),
    "IAF-8": functools.partial(families.Transformed, flow=flows.InverseAutoregressive, length=8),
    "spline-4": functools.partial(families.Transformed, flow=SPLINE, length=4),
}


def program(name):
    """Return exp(-U) as a Pyro program. The densities of its sites cancel."""
    energy, _ = ENERGIES[name]

    def model(x):
        with pyro.plate("data", len(x)):
            first = dist.Normal(0.0, 3.0) if name == "U1" else dist.Uniform(-4.0, 4.0)
            second = dist.Normal(0.0, 3.0)
            z1, z2 = pyro.sample("z1", first), pyro.sample("z2", second)
            own = first.log_prob(z1) + second.log_prob(z2)
            pyro.factor("energy", -energy(z1, z2) - own)

    return model


class Annealed(pv.objectives.Objective):
    """The ELBO of a density that is flat at first, so that the guide finds all modes."""

    def __init__(self, steps):
        super().__init__()
        self.beta, self._step = torch.tensor(0.05), 1.0 / (0.4 * steps)

    def bound(self, terms):
        """Warm up by one step, and return the bound of each data point."""
        self.beta.add_(self._step).clamp_(max=1.0)
        log_joint = terms.log_likelihood + terms.log_prior
        return (self.beta * log_joint - terms.log_guide).mean(0)


def fit(name, family, steps, seed=0):
    """Return the model, the guide, and KL(q || p) with its standard error, in nats."""
    torch.manual_seed(seed)
    model = program(name)
    x = torch.zeros(BATCH * STEPS_PER_EPOCH, 1)  # equal rows: many samples of one posterior
    guide = LocalGuide(model, x[:1], family=family)
    epochs = max(1, steps // STEPS_PER_EPOCH)
    pv.fit(
        model,
        guide,
        x,
        objective=Annealed(steps),
        epochs=epochs,
        batch_size=BATCH,
        learning_rate=5e-3,
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        clip_norm=10.0,
        seed=seed,
        progress=False,
    )
    with torch.no_grad():
        elbo = pv.terms(model, guide, torch.zeros(200_000, 1)).log_weight
    return model, guide, ENERGIES[name][1] - elbo.mean().item(), (elbo.std() / 200_000**0.5).item()


def density(guide, z1, z2):
    """Return q(z1, z2): condition the guide on the values and score them."""
    given = pyro.poutine.condition(guide, data={"z1": z1, "z2": z2})
    with torch.no_grad():
        trace = pyro.poutine.trace(given).get_trace(torch.zeros(len(z1), 1))
        trace.compute_log_prob()
    log_probs = [s["log_prob"] for s in trace.nodes.values() if "log_prob" in s]
    return torch.stack(log_probs).sum(0).exp()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--energies", nargs="+", default=list(ENERGIES), choices=ENERGIES)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("energies.png"))
    arguments = parser.parse_args()
    rows, columns = len(arguments.energies), 1 + len(arguments.families)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2 * rows), squeeze=False)
    axis = torch.linspace(-3.99, 3.99, 200)
    z2, z1 = torch.meshgrid(axis.flip(0), axis, indexing="ij")
    print("| energy | family | KL, nats | standard error |")
    print("|---|---|---|---|")
    for row, name in zip(axes, arguments.energies, strict=True):
        energy, _ = ENERGIES[name]
        row[0].imshow((-energy(z1, z2)).exp())
        row[0].set_ylabel(name)
        for plot, family in zip(row[1:], arguments.families, strict=True):
            _, guide, kl, error = fit(name, FAMILIES[family], arguments.steps, arguments.seed)
            plot.imshow(density(guide, z1.flatten(), z2.flatten()).view_as(z1))
            plot.set_title(f"{family}: {kl:.3f}")
            print(f"| {name} | {family} | {kl:.4f} | {error:.4f} |", flush=True)
    for plot in axes.flat:
        plot.set_xticks([])
        plot.set_yticks([])
    figure.tight_layout()
    figure.savefig(arguments.figure, dpi=90)


if __name__ == "__main__":
    main()
