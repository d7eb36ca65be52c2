"""Compare four priors, and models of one or two latent layers, on MNIST.

python examples/priors.py                          # a quarter of an hour on two cores
python examples/priors.py --figure priors.png      # also save samples from each prior
python examples/priors.py --data digits --epochs 2 --particles 20 --test 50 --surgery 200
"""

import argparse

import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.nets import GatedMLP, Joined
from pyro_vae.objectives import BetaELBO, Linear

LATENTS, WIDTH, LAYERS = 40, 300, 2
BEST = "aggregated posterior"


def standard_normal(size):
    return pv.priors.StandardNormal(LATENTS)


def mixture(size):
    return pv.priors.MixtureOfNormals(LATENTS, components=100)


def vamp(size):
    return pv.priors.VampPrior(LATENTS, pseudo_inputs=(0.05 + 0.01 * torch.randn(500, size)).relu())


def flow(size):
    transform = pv.flows.Composition(LATENTS, pv.flows.AffineCoupling, length=4)
    return pv.priors.FlowPrior(LATENTS, transform)


def one_layer(prior, size):
    decoder = GatedMLP(LATENTS, [WIDTH] * LAYERS, size)
    model = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(decoder))
    return model, pv.guides.AmortizedNormal(model, GatedMLP(size, [WIDTH] * LAYERS)), "z"


def two_layers(prior, size):
    """Make the model of Tomczak & Welling (2018): p(x|z1, z2), and q(z2|x) at the top."""
    middle = pv.likelihoods.Normal(
        GatedMLP(LATENTS, [WIDTH] * LAYERS, 2 * LATENTS), scale=pv.likelihoods.ScaleFromDecoder()
    )
    decoder = Joined(GatedMLP(2 * LATENTS, [WIDTH] * LAYERS, size))
    likelihood = pv.likelihoods.Bernoulli(decoder)
    model = pv.models.HierarchicalModel(prior, [middle], likelihood, skip=True)
    encoder = GatedMLP(size, [WIDTH] * LAYERS)
    guide = pv.guides.HierarchicalGuide(model, encoder, order="top-down", hidden=[WIDTH])
    return model, guide, "z_2"


PAIRS = {
    "VAE, N(0, I)": (one_layer, standard_normal),
    "VAE, mixture of 100": (one_layer, mixture),
    "VAE, Vamp of 500": (one_layer, vamp),
    "VAE, flow": (one_layer, flow),
    "two layers, N(0, I)": (two_layers, standard_normal),
    "two layers, Vamp of 500": (two_layers, vamp),
}


def train(make, make_prior, data, arguments):
    size = data.train.shape[1]
    prior = make_prior(size)
    model, guide, top = make(prior, size)
    if isinstance(prior, pv.priors.GuideMixturePrior):
        prior.bind_guide(guide, site=top)
    steps_of_epoch = -(-len(data.train) // 100)
    warm_up = Linear(steps=max(1, arguments.epochs // 3) * steps_of_epoch)
    fit = pv.fit(
        model,
        guide,
        data.train,
        objective=BetaELBO(warm_up),
        transform=data.transform,
        epochs=arguments.epochs,
        batch_size=100,
        learning_rate=5e-4,
        seed=0,
        progress=False,
    )
    return model, guide, fit


def best_prior(model, guide, data, arguments):
    """Replace the prior by the aggregated posterior, and print the gain of the ELBO."""
    torch.manual_seed(1)
    x = torch.bernoulli(data.train[: arguments.surgery])
    best = pv.LatentVariableModel(pv.priors.AggregatedPosterior(guide, x), model.likelihood)
    before, after = (pv.elbo_surgery(m, guide, x, seed=0) for m in (model, best))
    print(f"\nELBO surgery on {len(x)} training images:\n{before}")
    error = before.standard_errors["marginal_kl"]
    print(
        f"with the {BEST} as the prior, the ELBO is larger by {after.elbo - before.elbo:.3f} nats; "
        f"the marginal KL was {before.marginal_kl:.3f} ± {error:.3f}"
    )
    return best


def draw(models, data, path):
    """Save a figure with one row of samples per model."""
    figure = Figure(figsize=(10, 1.1 * len(models) + 0.2), layout="constrained")
    grid = figure.subplots(len(models), 10)
    for row, (name, (model, guide)) in zip(grid, models.items(), strict=True):
        images = pv.generate(model, data.test[:10], guide=guide, seed=0)
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.reshape(data.image_shape), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
        row[0].set_title(name, fontsize=8, loc="left")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=pv.datasets.names())
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--particles", type=int, default=1000, help="for the log evidence")
    parser.add_argument("--test", type=int, default=1000, help="images for the log evidence")
    parser.add_argument("--surgery", type=int, default=10_000, help="images for the ELBO surgery")
    parser.add_argument("--figure", help="file for a figure of samples")
    arguments = parser.parse_args()
    data = pv.datasets.load(arguments.data, binarize="dynamic")
    torch.manual_seed(1)
    test = torch.bernoulli(data.test[: arguments.test])
    evidences, models = {}, {}
    print("| model | log p(x), nats | minus the first | s per epoch | |")
    print("|---|---|---|---|---|")
    for name in arguments.pairs:
        torch.manual_seed(0)
        model, guide, fit = train(*PAIRS[name], data, arguments)
        models[name] = (model, guide)
        result = pv.evidence(model, guide, test, num_particles=arguments.particles, seed=0)
        evidences[name] = result.values
        gain = result.values - next(iter(evidences.values()))
        print(
            f"| {name} | log p(x) = {result.mean:.2f} ± {result.standard_error:.2f} | "
            f"{gain.mean():+.2f} ± {gain.std() / len(gain) ** 0.5:.2f} | "
            f"{fit.seconds / arguments.epochs:.1f} | {fit.execution} |",
            flush=True,
        )
    first, (model, guide) = next(iter(models.items()))
    models = {first: (model, guide), f"the same, {BEST}": (None, guide), **models}
    models[f"the same, {BEST}"] = (best_prior(model, guide, data, arguments), guide)
    if arguments.figure:
        draw(models, data, arguments.figure)


if __name__ == "__main__":
    main()
