"""Compare the time of pv.evidence with that of the decoder's forward passes alone.

python examples/benchmarks/evidence.py                  # two networks, about five minutes
python examples/benchmarks/evidence.py --data 100 --particles 500 --rounds 1
python examples/benchmarks/evidence.py --precisions highest medium

The time of the evidence is that of 2n data points minus that of n data points, so capture and
compilation do not count. The decoder alone runs on the same number of latents, under no_grad, in
passes of the same size, with full precision of its products. Both alternate, and the results are
medians over rounds. Peak memory is that of the whole process.
"""

import argparse
import resource
import time
from statistics import median

import torch

import pyro_vae as pv

NETWORKS = {"784-200-200-50": ([200, 200], 50), "784-400-20": ([400], 20)}
BATCH_SIZE = 100
PAIRS_PER_PASS = 5000  # the default of evidence


def seconds(function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def measure(hidden, latents, num_data, num_particles, rounds, precisions):
    """Return the median seconds of the evidence, captured and eager, and of the decoder.

    The evidence has a key (name, precision) for each precision of float32 matrix products.
    """
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(latents),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latents, hidden, 784)),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(784, hidden))
    x = torch.bernoulli(torch.rand(2 * num_data, 784))
    guide(x[:1])
    z = torch.randn(PAIRS_PER_PASS // BATCH_SIZE, BATCH_SIZE, latents)

    @torch.no_grad()
    def decode():
        for _ in range(num_data * num_particles // PAIRS_PER_PASS):
            model.likelihood.decoder(z)

    def evidence(n, capture, precision):
        options = {"num_particles": num_particles, "capture": capture, "precision": precision}
        pv.evidence(model, guide, x[:n], **options)

    for precision in precisions:
        evidence(num_data, True, precision)  # compile, so that all rounds use the cache
    names = [(name, precision) for name in ("captured", "eager") for precision in precisions]
    taken = {"decoder": [], **{name: [] for name in names}}
    for _ in range(rounds):
        taken["decoder"].append(seconds(decode))
        for name, precision in names:
            capture = name == "captured"
            once = seconds(evidence, num_data, capture, precision)
            taken[name, precision].append(
                seconds(evidence, 2 * num_data, capture, precision) - once
            )
    return {name: median(values) for name, values in taken.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=400)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--precisions", nargs="+", default=["highest"], choices=["highest", "high", "medium"]
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print("| network | precision | decoder, s | captured, ratio | eager, ratio | peak memory, GB |")
    print("|---|---|---|---|---|---|")
    for name, (hidden, latents) in NETWORKS.items():
        taken = measure(
            hidden,
            latents,
            arguments.data,
            arguments.particles,
            arguments.rounds,
            arguments.precisions,
        )
        decoder = taken["decoder"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        for precision in arguments.precisions:
            ratios = " | ".join(
                f"{taken[k, precision] / decoder:.2f}" for k in ("captured", "eager")
            )
            line = f"| {name} | {precision} | {decoder:.2f} | {ratios} | {peak:.2f} |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
