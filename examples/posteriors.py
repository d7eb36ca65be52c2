"""Compare six posterior families on MNIST, with the same model, encoder and number of epochs.

python examples/posteriors.py                      # about half an hour on two cores
python examples/posteriors.py --data digits --epochs 2 --particles 50 --test 100
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch

import pyro_vae as pv
from pyro_vae import flows, guides

FAMILIES: dict[str, Callable[..., Any]] = {
    "mean-field": guides.AmortizedNormal,
    "full covariance": guides.AmortizedMultivariateNormal,
    "planar-10": functools.partial(guides.AmortizedFlow, flow=flows.Planar, length=10),
    "Sylvester-4": functools.partial(guides.AmortizedFlow, flow=flows.Sylvester, length=4),
    "IAF-4": functools.partial(guides.AmortizedFlow, flow=flows.InverseAutoregressive, length=4),
    "spline-2": functools.partial(guides.AmortizedFlow, flow=flows.NeuralSpline, length=2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=pv.datasets.names())
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--latents", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--particles", type=int, default=1000, help="for the log evidence")
    parser.add_argument("--test", type=int, default=1000, help="images for the log evidence")
    arguments = parser.parse_args()
    data = pv.datasets.load(arguments.data, binarize="dynamic")
    torch.manual_seed(1)
    test = torch.bernoulli(data.test[: arguments.test])
    size, latents = data.train.shape[1], arguments.latents
    evidences = {}
    print(
        "| posterior | log p(x), nats | minus mean-field's | ELBO | k-hat > 0.7 | ms per step | |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in arguments.families:
        torch.manual_seed(0)
        model = pv.LatentVariableModel(
            prior=pv.priors.StandardNormal(latents),
            likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latents, [200, 200], size)),
        )
        guide = FAMILIES[name](model, encoder=pv.nets.MLP(size, [200, 200]))
        fit = pv.fit(
            model,
            guide,
            data.train,
            transform=data.transform,
            epochs=arguments.epochs,
            batch_size=100,
            seed=0,
            progress=False,
        )
        result = pv.evidence(model, guide, test, num_particles=arguments.particles, seed=0)
        with torch.no_grad():
            elbo = pv.terms(model, guide, test, num_particles=20).log_weight.mean().item()
        evidences[name] = result.values
        gain = result.values - next(iter(evidences.values()))
        steps = arguments.epochs * -(-len(data.train) // 100)
        print(
            f"| {name} | log p(x) = {result.mean:.2f} ± {result.standard_error:.2f} | "
            f"{gain.mean():+.2f} ± {gain.std() / len(gain) ** 0.5:.2f} | {elbo:.2f} | "
            f"{result.unreliable_share:.0%} | {1e3 * fit.seconds / steps:.2f} | {fit.execution} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
