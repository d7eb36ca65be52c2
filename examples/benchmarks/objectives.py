"""Compare ELBO, MeanFieldELBO and IWAE on the digits, with several seeds of each.

python examples/benchmarks/objectives.py                          # about ten minutes
python examples/benchmarks/objectives.py --seeds 2 --epochs 20 --workers 1

ELBO and MeanFieldELBO are one bound, so a comparison must not tell them apart. IWAE trains another
bound. All fits of a seed start from the same weights and use the same order of the data. The
settings are those of `pyro-vae compare`. The first table has log p(x) of the same test rows for
each seed. The second table is that of pv.compare.
"""

import argparse
import functools
import itertools

import rich

import pyro_vae as pv

DATA, LATENTS, HIDDEN = 64, 10, [200, 200]
OBJECTIVES = {
    "ELBO": pv.objectives.ELBO(),
    "MeanFieldELBO": pv.objectives.MeanFieldELBO(),
    "IWAE-10": pv.objectives.IWAE(num_particles=10),
}


def make_pair():
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(LATENTS),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(LATENTS, HIDDEN, DATA)),
    )
    return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(DATA, HIDDEN))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--checkpoint", default=None, help="folder, to resume from it")
    arguments = parser.parse_args()
    digits = pv.datasets.load("digits", binarize="fixed")
    fit_seeds = functools.partial(
        pv.fit_seeds,
        make_pair,
        digits.train,
        seeds=arguments.seeds,
        num_workers=arguments.workers,
        validation=digits.validation,
        epochs=arguments.epochs,
        patience=20,
        batch_size=100,
        learning_rate=2e-3,
    )
    fits = {}
    for name, objective in OBJECTIVES.items():
        folder = arguments.checkpoint and f"{arguments.checkpoint}/{name}"
        fits[name] = fit_seeds(objective=objective, checkpoint=folder, description=name)
    comparison = pv.compare(fits, digits.test, train=digits.train)
    print("| |" + "".join(f" seed {seed} |" for seed in range(arguments.seeds)))
    print("|---" * (1 + arguments.seeds) + "|")
    entries = {entry.name: entry for entry in comparison.entries}
    for name in OBJECTIVES:
        values = entries[name].log_evidence.mean(1).tolist()
        print(f"| {name} |" + "".join(f" {value:.3f} |" for value in values))
    print()
    for one, other in itertools.combinations(OBJECTIVES, 2):
        found = comparison.difference(other, one)
        low, high = found.interval
        print(
            f"{other} - {one}: {found.mean:.3f} +- {found.standard_error:.3f}, 95% interval "
            f"[{low:.3f}, {high:.3f}], p = {found.p_value:.2g}"
        )
    print("best:", ", ".join(comparison.best))
    rich.print(comparison)


if __name__ == "__main__":
    main()
