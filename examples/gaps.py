"""Measure the approximation gap and the amortization gap of a Gaussian guide and of a flow.

python examples/gaps.py --epochs 300         # half an hour on two cores; the default is 20
python examples/gaps.py --data digits --epochs 2 --test 20 --particles 100 --steps 100
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch

import pyro_vae as pv
from pyro_vae import flows, guides

GUIDES: dict[str, Callable[..., Any]] = {
    "mean-field": guides.AmortizedNormal,
    "IAF-2": functools.partial(guides.AmortizedFlow, flow=flows.InverseAutoregressive, length=2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=pv.datasets.names())
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=GUIDES)
    parser.add_argument("--latents", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--test", type=int, default=100, help="images per row of the table")
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of the ascent")
    parser.add_argument("--steps", type=int, default=5000, help="maximum of the ascent")
    arguments = parser.parse_args()
    data = pv.datasets.load(arguments.data, binarize="fixed")
    size, latents = data.train.shape[1], arguments.latents
    print("| guide, images | log p(x), nats | approximation gap | amortization gap | k-hat > 0.7 |")
    print("|---|---|---|---|---|")
    for name in arguments.guides:
        torch.manual_seed(0)
        model = pv.LatentVariableModel(
            prior=pv.priors.StandardNormal(latents),
            likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latents, [200, 200], size)),
        )
        guide = GUIDES[name](model, encoder=pv.nets.MLP(size, [200, 200]))
        pv.fit(
            model,
            guide,
            data.train,
            epochs=arguments.epochs,
            scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, arguments.epochs),
            seed=0,
            progress=False,
        )
        # The encoder was trained on the training images, so their gaps may be smaller.
        for part, x in (("training", data.train), ("test", data.test)):
            gaps = pv.inference_gaps(
                model,
                guide,
                x[: arguments.test],
                num_particles=arguments.particles,
                ascent=pv.evaluation.Ascent(
                    learning_rate=arguments.learning_rate, patience=3, max_steps=arguments.steps
                ),
                seed=0,
            )
            unreliable = (gaps.khat > 0.7).double().mean()
            print(
                f"| {name}, {part} | {gaps.log_evidence} | {gaps.approximation_gap} | "
                f"{gaps.amortization_gap} | {unreliable:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
