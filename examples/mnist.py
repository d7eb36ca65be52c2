"""All steps on MNIST: data, model, guide, SVI, log evidence, ELBO surgery.

python examples/mnist.py                      # downloads MNIST once; a few minutes on a CPU
python examples/mnist.py --data digits --epochs 5
"""

import argparse

import torch

import pyro_vae as pv


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=pv.datasets.names())
    parser.add_argument("--latents", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--particles", type=int, default=1000, help="for the log evidence")
    arguments = parser.parse_args()

    data = pv.datasets.load(arguments.data, binarize="dynamic")
    size = data.train.shape[1]

    torch.manual_seed(0)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(arguments.latents),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(arguments.latents, [200, 200], size)),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(size, [200, 200]))

    fit = pv.fit(
        model,
        guide,
        data.train,
        objective=pv.objectives.MeanFieldELBO(),
        validation=data.validation,
        transform=data.transform,
        epochs=arguments.epochs,
        batch_size=100,
        seed=0,
    )
    print(fit.history.tail(1).to_string())

    test = data.test[:1000]
    print(pv.evidence(model, guide, test, num_particles=arguments.particles, seed=0, progress=True))

    torch.manual_seed(0)
    train = torch.bernoulli(data.train)  # binary images, as in training
    print(pv.elbo_surgery(model, guide, train, seed=0, progress=True))


if __name__ == "__main__":
    main()
