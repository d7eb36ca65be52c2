"""A hundred labels and fifty thousand images: M2 of Kingma et al. (2014), and what the images add.

python examples/semi_supervised.py                      # some ten minutes on two cores
python examples/semi_supervised.py --epochs 1 --train 600 --labels 20 --test 100
"""

import argparse

import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.nets import MLP, Joined

CLASSES = 10


def make_pair(size, latents, width):
    def network(inputs, outputs=None):
        return MLP(inputs, [width], outputs, activation=nn.Softplus)

    model = pv.SemiSupervisedModel(
        CLASSES,
        prior=pv.priors.StandardNormal(latents),
        likelihood=pv.likelihoods.Bernoulli(Joined(network(latents + CLASSES, size))),
    )
    guide = pv.guides.SemiSupervisedGuide(
        model, classifier=network(size, CLASSES), encoder=Joined(network(size + CLASSES))
    )
    return model, guide


def choose(labels, count):
    """As many of each class, the first ones."""
    return torch.cat([(labels == c).nonzero()[: count // CLASSES, 0] for c in range(CLASSES)])


def accuracy(guide, x, y):
    with torch.no_grad():
        return (guide.classify(x).logits.argmax(-1) == y).double().mean().item()


def train(x, y, few, arguments):
    """Fit to all images, or to the few that have labels."""
    torch.manual_seed(0)
    model, guide = make_pair(x.shape[1], arguments.latents, arguments.width)
    if few:
        x, y = x[y >= 0], y[y >= 0]
    # Every minibatch has a tenth of its rows labelled: the few rows are there many times.
    labelled = y >= 0
    times = 1 if few else max(1, (~labelled).sum().item() // (9 * labelled.sum().item()))
    x = torch.cat([x[~labelled], x[labelled].repeat(times, 1)])
    y = torch.cat([y[~labelled], y[labelled].repeat(times)])
    fit = pv.fit(
        model,
        guide,
        (x, y),
        objective=pv.objectives.SemiSupervisedELBO(arguments.classification),
        transform=torch.bernoulli,
        epochs=20 * arguments.epochs if few else arguments.epochs,
        batch_size=min(arguments.batch_size, len(x)),
        learning_rate=arguments.learning_rate,
        seed=0,
        progress=False,
    )
    return guide, fit


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashion-mnist", "digits"))
    parser.add_argument("--train", type=int, default=50_000, help="images, most without a label")
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--latents", type=int, default=50)
    parser.add_argument("--width", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--classification", type=float, default=50.0, help="weight of log q(y|x)")
    arguments = parser.parse_args()
    data = pv.datasets.load(arguments.data, binarize="none")
    labels = pv.datasets.load_labels(arguments.data)
    x, truth = data.train[: arguments.train], labels.train[: arguments.train]
    x_test, y_test = data.test[: arguments.test], labels.test[: arguments.test]
    chosen = choose(truth, arguments.labels)
    y = torch.full_like(truth, -1)
    y[chosen] = truth[chosen]
    for name, few in (("labelled images alone", True), ("all images", False)):
        guide, fit = train(x, y, few, arguments)
        print(
            f"{name}: test accuracy {accuracy(guide, x_test, y_test):.2%} "
            f"({(y >= 0).sum()} labels, {fit.seconds:.0f} s, {fit.execution})",
            flush=True,
        )


if __name__ == "__main__":
    main()
