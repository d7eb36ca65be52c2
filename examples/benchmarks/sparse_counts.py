"""Compare a fit on a sparse matrix of counts with the arithmetic on its dense minibatches.

python examples/benchmarks/sparse_counts.py                          # about ten minutes
python examples/benchmarks/sparse_counts.py --rows 4000 --epochs 2

The matrix has 5% of random counts. pv.fit trains a VAE with a NegativeBinomial on it. The
arithmetic is a plain PyTorch loop of the same networks, on minibatches that are dense already: a
forward pass, the ELBO with torch's NegativeBinomial, a backward pass, and a step of Adam. After
each epoch of the fit, the loop takes the same number of steps. The first epoch, which includes
checks and compilation, has its own line. Times are CPU seconds of one thread, so that other work on
the machine does not count, and medians over epochs. Peak memory is that of separate processes, for
the whole matrix and for half of its rows. Both hold the matrix.
"""

import argparse
import resource
import subprocess
import sys
import time
from statistics import median

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional as F

import pyro_vae as pv

COLUMNS, STRIDE, HIDDEN, LATENTS = 2000, 20, 128, 10  # one value in each stride: 5%
DENSE_MINIBATCHES = 10


def counts(rows):
    """Return a CSR matrix of float32 counts, made without copies of its size."""
    each = COLUMNS // STRIDE
    generator = np.random.default_rng(0)
    columns = np.empty((rows, each), np.int32)
    values = np.empty((rows, each), np.float32)
    for start in range(0, rows, 1000):
        shape = columns[start : start + 1000].shape
        offset = generator.integers(0, STRIDE, shape)
        columns[start : start + 1000] = STRIDE * np.arange(each) + offset
        values[start : start + 1000] = 1 + generator.poisson(2.0, shape)
    starts = np.arange(0, rows * each + 1, each, dtype=np.int32)
    return sp.csr_matrix((values.ravel(), columns.ravel(), starts), shape=(rows, COLUMNS))


def make_pair():
    torch.manual_seed(0)
    decoder = pv.nets.MLP(LATENTS, [HIDDEN], COLUMNS)
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(LATENTS), pv.likelihoods.NegativeBinomial(decoder)
    )
    return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(COLUMNS, [HIDDEN]))


class Arithmetic:
    """The steps of a plain PyTorch loop, on dense minibatches in memory."""

    def __init__(self, matrix, batch_size):
        torch.manual_seed(0)
        rows = min(matrix.shape[0], DENSE_MINIBATCHES * batch_size)
        starts = range(0, rows, batch_size)
        self.batches = [torch.from_numpy(matrix[s : s + batch_size].toarray()) for s in starts]
        self.encoder = nn.Sequential(
            nn.Linear(COLUMNS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENTS)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, COLUMNS)
        )
        self.dispersion = nn.Parameter(torch.zeros(()))
        parameters = [*self.encoder.parameters(), *self.decoder.parameters(), self.dispersion]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def run(self, steps):
        """Take some steps."""
        for step in range(steps):
            x = self.batches[step % len(self.batches)]
            loc, scale = self.encoder(x).chunk(2, -1)
            scale = F.softplus(scale) + 1e-6
            z = loc + scale * torch.randn_like(loc)
            kl = 0.5 * (loc.square() + scale.square() - 1).sum(-1) - scale.log().sum(-1)
            dispersion = F.softplus(self.dispersion)
            logits = (F.softplus(self.decoder(z)) + 1e-6).log() + dispersion.log()
            likelihood = torch.distributions.NegativeBinomial(
                dispersion.reciprocal(), logits=logits, validate_args=False
            )
            loss = (kl - likelihood.log_prob(x).sum(-1)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def fit(matrix, arguments, after_epoch=None, epochs=1):
    return pv.fit(
        *make_pair(),
        matrix,
        objective=pv.objectives.MeanFieldELBO(),
        epochs=epochs,
        batch_size=arguments.batch_size,
        after_epoch=after_epoch,
        seed=0,
        progress=False,
    )


def measure_time(arguments):
    """Print the CPU seconds of an epoch of the fit, and of as many steps of the arithmetic."""
    matrix = counts(arguments.rows)
    arithmetic = Arithmetic(matrix, arguments.batch_size)
    steps = -(-arguments.rows // arguments.batch_size)
    arithmetic.run(3)
    taken = {"fit": [], "arithmetic": []}
    began = time.process_time()

    def after_epoch(epoch, row):
        nonlocal began
        middle = time.process_time()
        arithmetic.run(steps)
        taken["fit"].append(middle - began)
        began = time.process_time()
        taken["arithmetic"].append(began - middle)

    result = fit(matrix, arguments, after_epoch, arguments.epochs)
    first, *rest = taken["fit"]
    of_arithmetic = median(taken["arithmetic"])
    print(f"{arguments.rows} x {COLUMNS}, {steps} steps an epoch, {result.execution}")
    print("| run | CPU seconds of an epoch | ratio to the arithmetic |\n|---|---|---|")
    rows = {"first epoch": first, "epoch": median(rest), "arithmetic": of_arithmetic}
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} | {value / of_arithmetic:.2f} |")


def measure_memory(arguments):
    """Print the peak memory of the fit and of the arithmetic, each in a process of its own."""
    print("| run | rows | matrix, MB | peak, MB | ratio to the arithmetic |\n|---|---|---|---|---|")
    for rows in (arguments.rows // 2, arguments.rows):
        peaks = {}
        for name in ("arithmetic", "fit"):
            command = [sys.executable, __file__, "--only", name, "--rows", str(rows)]
            command += ["--batch-size", str(arguments.batch_size), "--steps", str(arguments.steps)]
            result = subprocess.run(  # noqa: S603 - no user input
                command, capture_output=True, text=True, check=True
            )
            size, peaks[name] = map(float, result.stdout.split())
            ratio = peaks[name] / peaks["arithmetic"]
            print(f"| {name} | {rows} | {size:.0f} | {peaks[name]:.0f} | {ratio:.2f} |")


def run_alone(arguments):
    """Run one part, and print the size of the matrix and the peak memory, in MB."""
    matrix = counts(arguments.rows)
    if arguments.only == "arithmetic":
        Arithmetic(matrix, arguments.batch_size).run(arguments.steps)
    else:
        fit(matrix, arguments)
    size = sum(part.nbytes for part in (matrix.data, matrix.indices, matrix.indptr)) / 1e6
    print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50, help="of the arithmetic, for its memory")
    parser.add_argument("--only", choices=["arithmetic", "fit"], help="measure its memory alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only is not None:
        run_alone(arguments)
        return
    measure_memory(arguments)
    measure_time(arguments)


if __name__ == "__main__":
    main()
