"""The signal-to-noise ratio of gradients as the number of particles grows (Rainforth et al. 2018).

python examples/signal_to_noise.py                # one or two minutes on two cores
python examples/signal_to_noise.py --particles 1 10 --repeats 20

The model is linear and Gaussian, with weights close to the optimum, as in the paper's experiment.
The guide is wider than the posterior, so that all moments of the importance weights exist.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import objectives

ESTIMATORS = {"IWAE": objectives.IWAE, "DReG": objectives.DReG}


class Linear(nn.Module):
    """z ~ N(0, I), x ~ N(W z, I), q(z|x) = N(V x, 2 diag(posterior precision)^-1)."""

    def __init__(self, latents, dimensions, away):
        super().__init__()
        weight = torch.randn(dimensions, latents) / dimensions**0.5
        precision = torch.eye(latents) + weight.T @ weight
        posterior = torch.linalg.solve(precision, weight.T)
        self.weight = nn.Parameter(weight + away * torch.randn_like(weight))
        self.encoder = nn.Parameter(posterior + away * torch.randn_like(posterior))
        self.scale = (2 / precision.diagonal()).sqrt()

    def model(self, x):
        """Run p(x, z)."""
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros_like(self.scale), 1.0)
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 1.0).to_event(1), obs=x)

    def guide(self, x):
        """Run q(z|x)."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.encoder.T, self.scale).to_event(1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 3, 10, 32, 100, 316])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--latents", type=int, default=5)
    parser.add_argument("--dimensions", type=int, default=10)
    parser.add_argument("--figure", type=Path, default=Path("signal.png"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pair = Linear(arguments.latents, arguments.dimensions, away=0.05)
    x = torch.randn(100, arguments.dimensions)
    ratios: dict[tuple[str, str], list[float]] = {}
    for k in arguments.particles:
        noise = pv.gradient_noise(
            pair.model,
            pair.guide,
            x,
            {name: make(k) for name, make in ESTIMATORS.items()},
            repeats=arguments.repeats,
            seed=0,
        )
        for (name, program), row in noise.table.iterrows():
            ratios.setdefault((name, program), []).append(row.signal_to_noise)
    print("| signal-to-noise ratio | " + " | ".join(f"K = {k}" for k in arguments.particles) + " |")
    print("|---|" + "---|" * len(arguments.particles))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, program), values in ratios.items():
        print(f"| {name}, {program} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
        dashed = "--" if program == "model" else "-"
        axes.loglog(arguments.particles, values, dashed, marker="o", label=f"{name}, {program}")
    # Without any signal, a finite number of repeats alone gives this ratio.
    axes.axhline((2 / torch.pi / arguments.repeats) ** 0.5, color="#999999", linewidth=0.8)
    axes.set(xlabel="particles K", ylabel="signal-to-noise ratio of the gradient")
    axes.legend(frameon=False)
    figure.savefig(arguments.figure, dpi=90)


if __name__ == "__main__":
    main()
