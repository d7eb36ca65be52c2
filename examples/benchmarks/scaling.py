"""Measure how time and memory grow with the data, for training and evaluation.

python examples/benchmarks/scaling.py

Each line has the CPU seconds and the peak memory of its own process, so that other work on the
machine does not count. Growth is the exponent between a line and the previous line. It is 1 if
twice the data take twice the time.
"""

import argparse
import math
import multiprocessing
import resource
import time

import torch

import pyro_vae as pv

FEATURES, HIDDEN = 100, [100]


def make_pair(latents):
    torch.manual_seed(0)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(latents),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latents, HIDDEN, FEATURES)),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(FEATURES, HIDDEN))
    return model, guide


def training(data, latents):
    pair, x = make_pair(latents), torch.bernoulli(torch.full((data, FEATURES), 0.3))
    return lambda: pv.fit(*pair, x, epochs=1, capture=False, progress=False)


def evidence(data, particles):
    model, guide = make_pair(10)
    x = torch.bernoulli(torch.full((data, FEATURES), 0.3))
    return lambda: pv.evidence(model, guide, x, num_particles=particles, capture=False)


def annealing(data, temperatures):
    model, guide = make_pair(10)
    x = torch.bernoulli(torch.full((data, FEATURES), 0.3))
    ais = pv.evaluation.AIS(num_chains=20, num_temperatures=temperatures, step_size=0.1)
    return lambda: pv.evidence(model, guide, x, method=ais, capture=False)


def surgery(data, latents):
    model, guide = make_pair(latents)
    x = torch.bernoulli(torch.full((data, FEATURES), 0.3))
    return lambda: pv.elbo_surgery(model, guide, x)


SERIES = {
    "training, an epoch: N, D": (training, [(100_000, 10), (200_000, 10), (200_000, 20)]),
    "evidence: N, K": (evidence, [(1000, 500), (2000, 500), (2000, 1000)]),
    "AIS, 20 chains: N, T": (annealing, [(100, 50), (200, 50), (200, 100)]),
    "surgery: N, D": (surgery, [(20_000, 10), (40_000, 10), (40_000, 20)]),
}


def measured(work, sizes, pipe):
    torch.set_num_threads(1)
    work(100, 10)()  # work that is done once per process
    run = work(*sizes)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    run()
    took = time.process_time() - began
    pipe.send((took, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the data, for a quick run")
    share = parser.parse_args().share
    context = multiprocessing.get_context("fork")
    print("| task | sizes | CPU s | growth | memory without the data, MB |")
    print("|---|---|---|---|---|")
    for name, (work, series) in SERIES.items():
        last = None
        for data, size in series:
            sizes = max(20, int(share * data)), size
            ours, theirs = context.Pipe()
            process = context.Process(target=measured, args=(work, sizes, theirs))
            process.start()
            took, before, after = ours.recv()
            process.join()
            growth = "" if last is None else f"{math.log2(took / last):.2f}"
            last = took
            print(
                f"| {name} | {sizes[0]}, {sizes[1]} | {took:.2f} | {growth} | "
                f"{(after - before) / 1024:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
