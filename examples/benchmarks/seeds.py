"""Compare the throughput of pv.fit_seeds in parallel processes with one fit after another.

python examples/benchmarks/seeds.py                               # about ten minutes
python examples/benchmarks/seeds.py --seeds 2 --epochs 2 --rounds 2

Each round fits the same seeds with one worker and with several, and starts with the other one than
the round before. The first call with several workers starts their processes, which then import
torch. Later calls use the same processes. So the program prints the ratio of the first call, and
the ratio of the medians of later calls. All fits of a seed must be equal.
"""

import argparse
import time
from statistics import median

import torch

import pyro_vae as pv

DATA, LATENTS, HIDDEN = 64, 10, [200, 200]


def make_pair():
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(LATENTS),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(LATENTS, HIDDEN, DATA)),
    )
    return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(DATA, HIDDEN))


def weights(fits):
    return [p.detach() for fit in fits for m in (fit.model, fit.guide) for p in m.parameters()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    digits = pv.datasets.load("digits", binarize="fixed")
    options = {"epochs": 1, "learning_rate": 2e-3, "validation": digits.validation}
    options["progress"] = False
    pv.fit_seeds(make_pair, digits.train, seeds=1, num_workers=1, **options)  # loads modules
    options["epochs"] = arguments.epochs
    rates, expected = {1: [], arguments.workers: []}, None
    for number in range(arguments.rounds):
        for num_workers in sorted(rates, reverse=number % 2 == 1):
            started = time.perf_counter()
            fits = pv.fit_seeds(
                make_pair, digits.train, seeds=arguments.seeds, num_workers=num_workers, **options
            )
            rates[num_workers].append(arguments.seeds / (time.perf_counter() - started))
            expected = weights(fits) if expected is None else expected
            for one, other in zip(weights(fits), expected, strict=True):
                if not torch.equal(one, other):
                    raise RuntimeError(f"the fits with {num_workers} workers differ")
    first = rates[arguments.workers][0] / rates[1][0]
    print(f"{arguments.seeds} fits of {arguments.epochs} epochs, {fits[0].execution}")
    print("| workers | fits per minute, by round |\n|---|---|")
    for num_workers, values in rates.items():
        print(f"| {num_workers} | {', '.join(f'{60 * value:.2f}' for value in values)} |")
    print(f"ratio of the first call, with the start of the processes: {first:.2f}")
    if arguments.rounds > 1:
        later = [median(values[1:]) for values in (rates[arguments.workers], rates[1])]
        print(f"ratio of later calls, medians of {arguments.rounds - 1}: {later[0] / later[1]:.2f}")


if __name__ == "__main__":
    main()
