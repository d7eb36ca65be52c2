"""Compare likelihoods for gray images of 256 levels, in bits per dimension.

python examples/frey_faces.py                      # about ten minutes on two cores
python examples/frey_faces.py --figure faces.png   # also save samples of each likelihood
python examples/frey_faces.py --data digits --levels 17 --epochs 2 --particles 20
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch.distributions.transforms import SigmoidTransform

import pyro_vae as pv
from pyro_vae import likelihoods, surjections
from pyro_vae.nets import MLP


def with_likelihood(make, parts):
    """Return a function that makes a VAE whose decoder has ``parts`` numbers per pixel."""

    def make_pair(size, arguments):
        decoder = MLP(arguments.latents, [arguments.width] * 2, parts(arguments.levels) * size)
        prior = pv.priors.StandardNormal(arguments.latents)
        model = pv.LatentVariableModel(prior, make(decoder, arguments.levels))
        encoder = MLP(size, [arguments.width] * 2)
        return model, pv.guides.AmortizedNormal(model, encoder)

    return make_pair


def dequantized(size, arguments):
    """Make a flow model of uniform dequantization, a logit and a Gaussian VAE."""
    latents, width = arguments.latents, arguments.width
    scale = likelihoods.ScaleFromDecoder()
    autoencoder = surjections.Stochastic(
        encoder=likelihoods.Normal(MLP(size, [width] * 2, 2 * latents), scale=scale),
        decoder=likelihoods.Normal(MLP(latents, [width] * 2, 2 * size), scale=scale),
    )
    logit = surjections.Bijection(SigmoidTransform().inv)
    dequantize = surjections.UniformDequantization(arguments.levels)
    model = pv.surjections.FlowModel(
        pv.priors.StandardNormal(latents), [dequantize, logit, autoencoder]
    )
    return model, pv.surjections.FlowGuide(model)


PAIRS = {
    "DiscretizedLogistic": with_likelihood(likelihoods.DiscretizedLogistic, lambda levels: 2),
    "DiscretizedLogisticMixture": with_likelihood(
        lambda decoder, levels: likelihoods.DiscretizedLogisticMixture(decoder, levels, 3),
        lambda levels: 9,
    ),
    "dequantized Normal": dequantized,
    "Categorical": with_likelihood(likelihoods.Categorical, lambda levels: levels),
}


def draw(models, data, path):
    """Save a figure with one row of samples per likelihood: the mean of x for z from the prior."""
    figure = Figure(figsize=(8, 1.45 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), 10, squeeze=False)
    for row, (name, model) in zip(grid, models.items(), strict=True):
        images = pv.generate(model, data.test[:10], seed=0)
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.reshape(data.image_shape), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
        row[0].set_title(name, fontsize=9, loc="left")
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="freyfaces", choices=pv.datasets.names())
    parser.add_argument("--levels", type=int, default=256)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--latents", type=int, default=10)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--patience", type=int, default=50)
    parser.add_argument("--particles", type=int, default=500, help="for the log evidence")
    parser.add_argument("--figure", help="file for a figure of samples")
    arguments = parser.parse_args()
    data = pv.datasets.load(arguments.data, binarize="none")
    print("| likelihood | log p(x), nats | bits per dimension | best epoch | seconds | |")
    print("|---|---|---|---|---|---|")
    models = {}
    for name in arguments.pairs:
        torch.manual_seed(0)
        model, guide = PAIRS[name](data.train.shape[1], arguments)
        models[name] = model
        fit = pv.fit(
            model,
            guide,
            data.train,
            validation=data.validation,
            patience=arguments.patience,
            epochs=arguments.epochs,
            batch_size=100,
            seed=0,
            progress=False,
        )
        result = pv.evidence(
            model,
            guide,
            data.test,
            num_particles=arguments.particles,
            pairs_per_pass=500,
            seed=0,
        )
        print(
            f"| {name} | log p(x) = {result.mean:.1f} ± {result.standard_error:.1f} | "
            f"{result.bits_per_dimension:.3f} | {fit.best_epoch} | {fit.seconds:.0f} | "
            f"{fit.execution} |",
            flush=True,
        )
    if arguments.figure:
        draw(models, data, arguments.figure)


if __name__ == "__main__":
    main()
