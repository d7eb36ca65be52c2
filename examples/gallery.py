"""Draw every plot of pv.plots for pairs that are fitted to the 8x8 digits: docs/gallery.

python examples/gallery.py                        # two minutes on one core
python examples/gallery.py --folder docs/gallery  # the pictures of the documentation
"""

import argparse
import io
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from PIL import Image

import pyro_vae as pv

SHAPE = (8, 8)


def make_pair(latents, width):
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(latents, [width], 64))
    model = pv.LatentVariableModel(pv.priors.StandardNormal(latents), likelihood)
    return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(64, [width]))


def fit(data, objective, args, latents=8, seed=0):
    pyro.set_rng_seed(seed)
    model, guide = make_pair(latents, args.width)
    return pv.fit(
        model,
        guide,
        data.train,
        objective=objective,
        validation=data.validation,
        epochs=args.epochs,
        learning_rate=2e-3,
        seed=seed,
        progress=False,
    )


def draw(args):
    """Yield the name of each plot and its figure."""
    data, labels = pv.datasets.load("digits"), pv.datasets.load_labels("digits").train
    objectives = {"ELBO": pv.objectives.ELBO(), "IWAE, K = 10": pv.objectives.IWAE(10)}
    fits = {
        name: [fit(data, objective, args, seed=seed) for seed in range(args.seeds)]
        for name, objective in objectives.items()
    }
    model, guide = fits["ELBO"][0].model, fits["ELBO"][0].guide
    flat = fit(data, pv.objectives.ELBO(), args, latents=2)  # z has two dimensions
    x = data.test

    yield "reconstructions", pv.plots.reconstructions(model, guide, x[:20], image_shape=SHAPE)
    yield "samples", pv.plots.samples(model, 50, image_shape=SHAPE)
    yield "traversals", pv.plots.traversals(model, guide, x, row=3, image_shape=SHAPE)
    yield "interpolations", pv.plots.interpolations(model, guide, x[:6], x[6:12], image_shape=SHAPE)
    yield "manifold", pv.plots.manifold(flat.model, image_shape=SHAPE)

    yield "codes", pv.plots.codes(pv.encode(flat.model, flat.guide, data.train), labels)
    yield "codes_pca", pv.plots.codes(pv.encode(model, guide, data.train), labels)
    yield "aggregated_posterior", pv.plots.aggregated_posterior(flat.model, flat.guide, data.train)

    yield "learning_curves", pv.plots.learning_curves(fits)
    noise = {
        name: pv.gradient_noise(m, g, data.train[:100], objectives, repeats=args.repeats, seed=0)
        for name, (m, g) in {"before": make_pair(8, args.width), "after": (model, guide)}.items()
    }
    yield "gradient_noise", pv.plots.gradient_noise(noise)

    surgeries = {
        name: [pv.elbo_surgery(each.model, each.guide, data.train, seed=0) for each in runs]
        for name, runs in fits.items()
    }
    yield "surgery", pv.plots.surgery(surgeries)
    comparison = pv.compare(fits, x, train=data.train, num_particles=args.particles)
    print(comparison)
    yield "differences", pv.plots.differences(comparison)
    few = data.train[: args.rows]
    ledger = pv.diagnose(model, guide, few, x[: args.rows], num_particles=args.particles, seed=0)
    yield "diagnosis", pv.plots.diagnosis(ledger)
    betas, epochs = [0.1, 0.3, 1.0, 3.0], args.epochs // 4 + 1
    curve = pv.rate_distortion(model, guide, data.train, betas, epochs=epochs, seed=0)
    yield "rate_distortion", pv.plots.rate_distortion(curve)

    overview, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    pv.plots.codes(pv.encode(flat.model, flat.guide, data.train), labels, ax=left)
    pv.plots.manifold(flat.model, image_shape=SHAPE, ax=middle)
    ledger = pv.diagnose(
        flat.model,
        flat.guide,
        few,
        x[: args.rows],
        num_particles=args.particles,
        seed=0,
    )
    pv.plots.diagnosis(ledger, ax=right)
    left.set_title("latents of digits, by label")
    middle.set_title("digits over the latents")
    right.set_title("the parts of the pair that lose")
    yield "overview", overview


def save(figure, path):
    """Save a figure as a small file, with a palette of colors."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160)
    Image.open(file).convert("RGB").quantize(128).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("gallery"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="fits of each objective")
    parser.add_argument("--particles", type=int, default=300, help="of log p(x)")
    parser.add_argument("--repeats", type=int, default=100, help="gradients of each objective")
    parser.add_argument("--rows", type=int, default=200, help="data points of the diagnosis")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(args):
        save(figure, args.folder / f"{name}.png")
        print(f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
