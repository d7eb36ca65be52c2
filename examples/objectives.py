"""Compare objectives on MNIST, with the same network, number of epochs and seed.

python examples/objectives.py                      # about an hour and a half on two cores
python examples/objectives.py --data digits --epochs 2 --particles 50 --test 100

The network is that of Burda et al. (2016), with one layer of 50 latents. A unit is active if the
mean of its posterior varies over the data: Var_x(E_q[z]) > 0.01 (their section 5.2).
"""

import argparse

import torch

import pyro_vae as pv
from pyro_vae import objectives

OBJECTIVES = {
    "ELBO": lambda num_data: objectives.ELBO(),
    "IWAE-5": lambda num_data: objectives.IWAE(5),
    "IWAE-50": lambda num_data: objectives.IWAE(50),
    "DReG-50": lambda num_data: objectives.DReG(50),
    "MIWAE(8, 8)": lambda num_data: objectives.MIWAE(8, 8),
    "PIWAE(8, 8)": lambda num_data: objectives.PIWAE(8, 8),
    "CIWAE(0.5, 64)": lambda num_data: objectives.CIWAE(0.5, 64),
    "beta-TCVAE(6)": lambda num_data: objectives.BetaTCVAE(6.0, num_data=num_data),
}


def active_units(model, guide, x, particles=100):
    """Count the latents whose posterior mean varies over the data."""
    with torch.no_grad():
        z = pv.terms(model, guide, x, num_particles=particles).samples["z"]
    noise = z.var(0).mean(0) / particles  # variance of the estimated mean
    return int((z.mean(0).var(0) - noise > 0.01).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=pv.datasets.names())
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--latents", type=int, default=50)
    parser.add_argument("--train", type=int, default=None, help="number of images, all by default")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--particles", type=int, default=5000, help="for the log evidence")
    parser.add_argument("--test", type=int, default=1000, help="images for the log evidence")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = pv.datasets.load(arguments.data, binarize="dynamic")
    train = data.train[: arguments.train]
    torch.manual_seed(1)
    test = torch.bernoulli(data.test[: arguments.test])
    size, latents = train.shape[1], arguments.latents
    first = None
    print("| objective | log p(x), nats | minus the first | active units | k-hat > 0.7 | seconds |")
    print("|---|---|---|---|---|---|")
    for name in arguments.objectives:
        torch.manual_seed(arguments.seed)
        model = pv.LatentVariableModel(
            prior=pv.priors.StandardNormal(latents),
            likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latents, [200, 200], size)),
        )
        guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(size, [200, 200]))
        fit = pv.fit(
            model,
            guide,
            train,
            objective=OBJECTIVES[name](len(train)),
            transform=data.transform,
            epochs=arguments.epochs,
            batch_size=100,
            seed=arguments.seed,
            progress=False,
        )
        result = pv.evidence(model, guide, test, num_particles=arguments.particles, seed=0)
        first = result.values if first is None else first
        gain = result.values - first
        print(
            f"| {name} | {result.mean:.2f} ± {result.standard_error:.2f} | "
            f"{gain.mean():+.2f} ± {gain.std() / len(gain) ** 0.5:.2f} | "
            f"{active_units(model, guide, test)} | {result.unreliable_share:.0%} | "
            f"{fit.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
