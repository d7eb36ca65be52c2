"""Results of minibatches in one tensor, and the memory of a report on many minibatches."""

import subprocess
import sys

import pytest
import torch

from pyro_vae.evaluation._growing_rows import GrowingRows


@pytest.mark.parametrize("sizes", [[1], [3, 1, 5], [1000, 100, 3000, 1]])
def test_rows_are_those_of_a_concatenation(sizes):
    parts = [torch.randn(4, size, 2, dtype=torch.float64) for size in sizes]
    growing = GrowingRows()
    for part in parts:
        growing.add(part)
    assert torch.equal(growing.rows, torch.cat(parts, 1))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="there are no rows"):
        _ = GrowingRows().rows


PROGRAM = """
import resource, torch, pyro_vae as pv

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

decoder = pv.nets.MLP(10, [50], 784)
model = pv.LatentVariableModel(pv.priors.StandardNormal(10), pv.likelihoods.Bernoulli(decoder))
guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(784, [50]))
x = torch.bernoulli(torch.full((20_000, 784), 0.3))
options = {"estimator": "stratified", "seed": 0}
pv.collapse_report(model, guide, x[:500], **options)
before = peak()
pv.collapse_report(model, guide, x, **options)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_collapse_report_does_not_grow_with_the_number_of_minibatches():
    result = subprocess.run(  # noqa: S603 - no user input
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    # A list of small tensors let the process grow by gigabytes here.
    assert float(result.stdout) < 500
