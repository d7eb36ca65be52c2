"""Compare the time of pv.elbo_surgery with that of its matrix products alone.

python examples/benchmarks/surgery.py                                # a few minutes
python examples/benchmarks/surgery.py --data 2000 --rounds 1

The posteriors are random, with 50 latent dimensions that range from active to inactive. The matrix
products are those of the surgery, on the same blocks, in float64 and also in float32. elbo_surgery
itself runs on a model and a guide with random weights. All runs alternate, and the results are
medians over rounds. The error is that of the log-ratio of q(z|x) and q_agg(z) for 200 codes,
compared with sums of log-densities in float64. Peak memory is that of the whole process.
"""

import argparse
import math
import resource
import time
from statistics import median

import torch
from torch.distributions import Normal

import pyro_vae as pv
from pyro_vae.evaluation._surgery import pairwise as pairs
from pyro_vae.evaluation._surgery.threads import in_threads

ROWS, COLUMNS = 128, 2048  # of a block, as in the surgery on a CPU


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def random_pair(features, latents):
    """Return a model and a guide with random weights."""
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(latents),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(latents, [100], features)),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(features, [100]))
    guide(torch.randn(1, features))
    return model, guide


def random_posteriors(count, latents):
    """Return means, scales and codes of posteriors from narrow ones to the prior."""
    share = torch.linspace(0, 0.9, latents, dtype=torch.float64)  # variance of the means
    loc = torch.randn(count, latents, dtype=torch.float64) * share.sqrt()
    spread = (0.2 * torch.randn(count, latents, dtype=torch.float64)).exp()
    scale = (1 - share).sqrt() * spread
    return loc, scale, loc + scale * torch.randn_like(loc)


def products(left, right):
    """Multiply all blocks, in the same threads as the surgery."""
    blocks = [block.contiguous() for block in right.split(COLUMNS, dim=1)]

    def multiply(rows):
        out = rows.new_empty(len(rows) * COLUMNS)
        for block in blocks:
            shape = (len(rows), block.shape[1])
            torch.mm(rows, block, out=out[: shape[0] * shape[1]].view(shape))

    list(in_threads(multiply, left.split(ROWS), left.device))


def largest_error(loc, scale, codes, log_sums):
    """Return the largest error of 200 sums, compared with sums of log-densities in float64."""
    errors = []
    for row in torch.linspace(0, len(loc) - 1, 200).long().tolist():
        log_prob = Normal(loc, scale).log_prob(codes[row]).sum(1)
        errors.append(abs(log_sums[row] - (log_prob.logsumexp(0) - log_prob[row])).item())
    return max(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=60_000)
    parser.add_argument("--features", type=int, default=784)
    parser.add_argument("--latents", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, guide = random_pair(arguments.features, arguments.latents)
    x = torch.randn(arguments.data, arguments.features)
    loc, scale, codes = random_posteriors(arguments.data, arguments.latents)
    left = pairs.quadratic(codes)
    right = pairs.log_density_weights(loc, scale)
    extra = left.new_zeros(len(left), 1)  # the surgery's products have one more column
    left, right = torch.cat([left, extra], 1), torch.cat([right, extra.T])
    results = {}

    def all_pairs():
        results["log_sums"] = pairs.log_sum_of_ratios(loc, scale, codes)

    def surgery():
        results["surgery"] = pv.elbo_surgery(model, guide, x, seed=0)

    runs = {
        "products": lambda: products(left, right),
        "products, float32": lambda: products(left.float(), right.float()),
        "all pairs": all_pairs,
        "elbo_surgery": surgery,
    }
    taken = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    taken = {name: median(values) for name, values in taken.items()}
    print("| run | seconds | ratio to products | ratio to float32 products |\n|---|---|---|---|")
    for name, value in taken.items():
        ratios = [value / taken[each] for each in ("products", "products, float32")]
        print(f"| {name} | {value:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    error = largest_error(loc, scale, codes, results["log_sums"])
    information = math.log(len(loc)) - results["log_sums"].mean().item()
    print(f"\npeak memory {peak:.2f} GB, largest error {error:.1e} nats in 200 codes")
    print(f"mutual information {information:.3f} of at most {math.log(len(loc)):.3f} nats")
    print(results["surgery"])


if __name__ == "__main__":
    main()
