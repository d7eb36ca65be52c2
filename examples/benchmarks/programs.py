"""Compare captured with eager training steps of twelve programs.

python examples/benchmarks/programs.py               # all programs, some minutes
python examples/benchmarks/programs.py --programs convolutions --rounds 21

For each program, three pairs of the same seed take turns. One runs eagerly, one is captured, and
one is captured and compiled. The program prints the median time of an eager step, and the medians
of the ratios to it within a round. Below 1, the captured step is faster.
"""

import argparse
import functools
import time
import warnings
from statistics import median, quantiles

import pyro
import torch

import pyro_vae as pv
from pyro_vae._programs.parameters import parameters_of
from pyro_vae._programs.validation import check_pair
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.training._step import TrainStep
from pyro_vae.training._train_state import TrainState

MLP, Normal = pv.nets.MLP, pv.priors.StandardNormal
IMAGE = (1, 28, 28)


def binary(rows, *event):
    return torch.bernoulli(torch.full((rows, *event), 0.5))


def dense(size=784, hidden=(200, 200), latents=50, prior=None, guide=pv.guides.AmortizedNormal):
    """Return a Bernoulli VAE of dense layers."""
    decoder = MLP(latents, hidden, size)
    model = pv.LatentVariableModel(prior or Normal(latents), pv.likelihoods.Bernoulli(decoder))
    return model, guide(model, MLP(size, hidden))


def gated_vamp():
    decoder = pv.nets.GatedMLP(40, [300, 300], 784)
    prior = pv.priors.VampPrior(40, pseudo_inputs=torch.rand(500, 784))
    model = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(decoder))
    guide = pv.guides.AmortizedNormal(model, pv.nets.GatedMLP(784, [300, 300]))
    prior.bind_guide(guide)
    return model, guide


def convolutions():
    likelihood = pv.likelihoods.Bernoulli(pv.nets.ConvDecoder(20, IMAGE), event_dim=3)
    model = pv.LatentVariableModel(Normal(20), likelihood)
    return model, pv.guides.AmortizedNormal(model, pv.nets.ConvEncoder(IMAGE))


def two_layers():
    middle = pv.likelihoods.Normal(MLP(10, [100], 2 * 40), scale=pv.likelihoods.ScaleFromDecoder())
    likelihood = pv.likelihoods.Bernoulli(MLP(40, [200], 784))
    model = pv.models.HierarchicalModel(Normal(10), [middle], likelihood)
    return model, pv.guides.HierarchicalGuide(model, MLP(784, [200]))


def counts():
    likelihood = pv.likelihoods.NegativeBinomial(MLP(10, [128], 1000))
    model = pv.LatentVariableModel(Normal(10), likelihood)
    return model, pv.guides.AmortizedNormal(model, MLP(1000, [128]))


def mixture():
    return dense(latents=10, prior=pv.priors.MixtureOfNormals(10, 20))


def autoregressive_flow():
    flow, kind = pv.flows.InverseAutoregressive, pv.guides.AmortizedFlow
    return dense(guide=functools.partial(kind, flow=flow, length=2))


def planar_flow():
    return dense(latents=10, guide=functools.partial(pv.guides.AmortizedFlow, length=8))


def sequence():
    transition = pv.likelihoods.Normal(MLP(4, [16], 4), scale=0.5)
    likelihood = pv.likelihoods.Bernoulli(MLP(4, [32], 88))
    model = pv.models.SequenceModel(Normal(4), transition, likelihood)
    return model, pv.guides.SequenceGuide(model)


# The pair, the objective, and a minibatch.
PROGRAMS = {
    "784-200-200-50, batch 20": (dense, pv.objectives.ELBO, (20, 784)),
    "784-200-200-50, batch 100": (dense, pv.objectives.ELBO, (100, 784)),
    "784-200-200-50, IWAE-5": (dense, lambda: pv.objectives.IWAE(5), (100, 784)),
    "64-32-2 (digits)": (
        lambda: dense(64, [32], 2),
        pv.objectives.ELBO,
        (100, 64),
    ),
    "gated 2x300-40, VampPrior": (gated_vamp, pv.objectives.ELBO, (100, 784)),
    "mixture prior": (mixture, pv.objectives.ELBO, (100, 784)),
    "convolutions": (convolutions, pv.objectives.ELBO, (64, *IMAGE)),
    "two latent layers": (two_layers, pv.objectives.ELBO, (100, 784)),
    "negative binomial": (counts, pv.objectives.ELBO, (128, 1000)),
    "IAF posterior": (autoregressive_flow, pv.objectives.ELBO, (100, 784)),
    "planar flow posterior": (planar_flow, pv.objectives.ELBO, (100, 784)),
    "sequences of 10 steps": (sequence, pv.objectives.ELBO, (32, 10, 88)),
}


def epoch_of(name, capture, steps):
    """Return a function that runs some steps of a program and returns the seconds of one."""
    make, objective, shape = PROGRAMS[name]
    pyro.set_rng_seed(0)
    model, guide = make()
    objective = objective()
    batches = Minibatches(binary(steps * shape[0], *shape[1:]), shape[0], shuffle=True)
    trace = check_pair(model, guide, batches.first())
    objective.loss(model, guide, *batches.first())
    parameters = parameters_of(model, guide, trace)
    train_state = TrainState(model, guide, objective, None, parameters)
    train_step = TrainStep(train_state, batches, capture=capture is not False)
    if capture == "not compiled":
        train_step._captured.compiles = False

    def epoch():
        pyro.enable_validation(False)
        train_step.begin(None)
        start = time.perf_counter()
        for selection in batches.selections():
            train_step.step(selection)
        return (time.perf_counter() - start) / steps

    epoch()  # traces and compiles
    return epoch


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| program | eager, ms | captured, ratio | compiled, ratio | quartiles |")
    print("|---|---|---|---|---|")
    for name in args.programs:
        kinds = {
            kind: epoch_of(name, kind, args.steps) for kind in (False, "not compiled", "compiled")
        }
        rounds = [[epoch() for epoch in kinds.values()] for _ in range(args.rounds)]
        captured, compiled = ([row[i] / row[0] for row in rounds] for i in (1, 2))
        low, _, high = quantiles(compiled, n=4) if len(rounds) > 1 else compiled * 3
        eager = 1e3 * median(row[0] for row in rounds)
        print(
            f"| {name} | {eager:.2f} | {median(captured):.2f} | {median(compiled):.2f} | "
            f"{low:.2f} to {high:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
