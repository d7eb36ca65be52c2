"""Semi-supervised learning with M2 and M1 + M2 (Kingma et al. 2014): 100 labels, 50,000 images.

python examples/semi_supervised.py                      # about ten minutes on two cores
python examples/semi_supervised.py --data digits --epochs 2 --train 600 --labels 50 --width 50
"""

import argparse
import functools
from typing import Any

import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.nets import MLP, Joined

CLASSES = 10


def network(width, inputs, outputs=None):
    return MLP(inputs, [width], outputs, activation=nn.Softplus)


def draw(codes):
    """Sample features from their posteriors, given rows of means and standard deviations."""
    return torch.normal(*codes.chunk(2, -1))


def m1(x, x_test, arguments):
    """Return features: the posteriors of a VAE that is trained without labels."""
    net = functools.partial(network, arguments.width)
    prior = pv.priors.StandardNormal(arguments.features)
    likelihood = pv.likelihoods.Bernoulli(net(arguments.features, x.shape[1]))
    model = pv.LatentVariableModel(prior, likelihood)
    guide = pv.guides.AmortizedNormal(model, net(x.shape[1]))
    fit = pv.fit(
        model,
        guide,
        x,
        transform=torch.bernoulli,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        seed=0,
        progress=False,
    )
    print(f"M1: {fit.seconds:.0f} s, {fit.execution}", flush=True)

    def codes(images):
        with torch.no_grad():
            q: Any = poutine.trace(guide).get_trace(images).nodes["z"]["fn"]
        return torch.cat([q.mean, q.stddev], -1)

    return codes(x), codes(x_test)[:, : arguments.features]


def m2(x, y, likelihood, transform, arguments):
    """Fit M2. The labeled rows are repeated, so that they are a tenth of the data."""
    torch.manual_seed(0)
    size, net = transform(x[:1]).shape[1], functools.partial(network, arguments.width)
    model = pv.models.SemiSupervisedModel(
        CLASSES,
        prior=pv.priors.StandardNormal(arguments.latents),
        likelihood=likelihood(Joined, net, arguments.latents + CLASSES, size),
    )
    guide = pv.guides.SemiSupervisedGuide(
        model, classifier=net(size, CLASSES), encoder=Joined(net(size + CLASSES))
    )
    known = y >= 0
    times = max(1, (~known).sum().item() // (9 * known.sum().item()))
    fit = pv.fit(
        model,
        guide,
        (
            torch.cat([x[~known], x[known].repeat(times, 1)]),
            torch.cat([y[~known], y[known].repeat(times)]),
        ),
        objective=pv.objectives.SemiSupervisedELBO(arguments.classification),
        transform=transform,
        epochs=arguments.epochs if (~known).any() else 20 * arguments.epochs,
        batch_size=min(arguments.batch_size, len(x)),
        seed=0,
        progress=False,
    )
    return guide, fit


def of_images(joined, net, inputs, size):
    return pv.likelihoods.Bernoulli(joined(net(inputs, size)))


def of_features(joined, net, inputs, size):
    scale = pv.likelihoods.ScaleFromDecoder()
    return pv.likelihoods.Normal(joined(net(inputs, 2 * size)), scale=scale)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashion-mnist", "digits"))
    parser.add_argument("--train", type=int, default=50_000, help="images, mostly unlabeled")
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--features", type=int, default=50, help="latent dimensions of M1")
    parser.add_argument("--latents", type=int, default=10, help="latent dimensions of M2")
    parser.add_argument("--width", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--classification", type=float, default=50.0, help="weight of log q(y|x)")
    arguments = parser.parse_args()
    data = pv.datasets.load(arguments.data, binarize="none")
    labels = pv.datasets.load_labels(arguments.data)
    images, truth = data.train[: arguments.train], labels.train[: arguments.train]
    # The first images of each class, the same number for all classes.
    few = torch.cat(
        [(truth == c).nonzero()[: arguments.labels // CLASSES, 0] for c in range(CLASSES)]
    )
    y = torch.full_like(truth, -1)
    y[few] = truth[few]

    def report(name, x, y, x_test, likelihood, transform):
        guide, fit = m2(x, y, likelihood, transform, arguments)
        with torch.no_grad():
            correct = guide.classify(x_test).logits.argmax(-1) == labels.test
        print(
            f"{name}: test accuracy {correct.double().mean():.2%} ({len(few)} labels, "
            f"{fit.seconds:.0f} s, {fit.execution})",
            flush=True,
        )

    report("labeled images only", images[few], y[few], data.test, of_images, torch.bernoulli)
    report("M2, all images", images, y, data.test, of_images, torch.bernoulli)
    codes, codes_test = m1(images, data.test, arguments)
    report("M1 + M2, all images", codes, y, codes_test, of_features, draw)


if __name__ == "__main__":
    main()
