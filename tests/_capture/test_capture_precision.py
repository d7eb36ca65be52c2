"""Captured steps at a lower precision of float32 matrix products.

The products of a processor with bfloat16 units are emulated, because few processors have them.
"""

import contextlib
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same, distance, fitted, needs_compiler, replace_compiler
from conftest import make_pair
from rounded_products import RoundedProducts
from torch import nn

import pyro_vae as pv
from pyro_vae._capture.comparing import disagreement, rounding_of
from pyro_vae._capture.inductor import compile_graph
from pyro_vae._capture.tracing import trace
from pyro_vae._utils.precision import matmul_precision

WORDS = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-9}
CPU = torch.device("cpu")


def compiling(monkeypatch, change):
    """Replace the compiler by a change of the function that a graph is."""
    replace_compiler(monkeypatch, lambda graph, *rest: change(graph))


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Rounding


def test_only_products_in_float32_are_rounded():
    weight = torch.randn(3, 3)
    functions = {
        "product": lambda x: [x @ weight.to(x.dtype)],
        "linear": lambda x: [nn.functional.linear(x, weight.to(x.dtype), x[0])],
        "attention": lambda x: [nn.functional.scaled_dot_product_attention(*(x[None, None],) * 3)],
        "sum": lambda x: [(x * weight).sum(0) + 1],
    }
    with matmul_precision("medium"):
        for name, function in functions.items():
            for dtype in (torch.float32, torch.float64):
                graph = trace(function, [torch.randn(3, 3, dtype=dtype)]).graph
                rounds = name != "sum" and dtype == torch.float32
                assert rounding_of(graph, CPU) == (2.0**-9 if rounds else 0.0)


@pytest.mark.parametrize("precision", WORDS)
def test_a_difference_of_ten_times_the_rounding_is_found(precision):
    rounding = WORDS[precision] or torch.finfo(torch.float32).eps
    results = [torch.randn(()), torch.randn(20, 30)]
    planted = [results[0], results[1].clone()]
    largest = planted[1].flatten()[planted[1].abs().argmax()]
    planted[1][3, 4] += (10 * WORDS[precision] or 1e-3) * largest
    assert disagreement(results, planted, WORDS[precision]) is not None
    planted = [results[0], results[1] * (1 + rounding)]
    assert disagreement(results, planted, WORDS[precision]) is None


def test_results_in_float64_are_compared_strictly():
    results = [torch.randn((), dtype=torch.float64), torch.randn(20, dtype=torch.float64)]
    planted = [results[0], results[1] * (1 + 1e-6)]
    assert disagreement(results, planted, WORDS["medium"]) is not None


# Captured steps


def large_pair():
    return make_pair(10, 64, 32)


def test_complex_results_are_compared_up_to_rounding():
    exact = torch.randn(5, dtype=torch.complex64)
    rounded, other = exact * (1 + 1e-6j), exact * (1 + 1e-2j)
    assert disagreement([exact], [rounded]) is None
    assert "differs from the eager run by" in disagreement([exact], [other])


def test_rounding_of_a_compiled_graph_is_no_disagreement(monkeypatch):
    """Float32 rounding moves some factors of IWAE's products to another number of 8 bits."""

    def compiled(graph):
        def run(*inputs):
            with mode:
                return graph(*inputs)

        mode = RoundedProducts(noise=3e-7)
        return run

    compiling(monkeypatch, compiled)
    x = torch.bernoulli(pv.datasets.load("digits").train[:200])
    torch.manual_seed(0)
    pair = large_pair()
    with no_warnings(), RoundedProducts():
        fit = pv.fit(*pair, x, objective=pv.objectives.IWAE(50), precision="medium", epochs=8,
                     batch_size=100, capture=True, seed=0, progress=False)  # fmt: skip
    assert fit.execution == "captured"


@pytest.mark.parametrize("precision", WORDS)
def test_a_graph_that_is_wrong_by_ten_times_the_rounding_is_refused(precision, binary, monkeypatch):
    factor = 1 + (10 * WORDS[precision] or 1e-3)
    compiling(
        monkeypatch,
        lambda graph: lambda *args: [o if o is None else o * factor for o in graph(*args)],
    )
    with pytest.warns(UserWarning, match="differs from the eager run by"):
        fit, _ = fitted(make_pair, binary, capture=True, precision=precision)
    assert fit.execution.startswith("eager: its graph differs from the eager run by")


class Scaled(nn.Module):
    """A network without matrix products."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, z):
        return z.sum(-1, keepdim=True) * self.scale


def elementwise_pair():
    likelihood = pv.likelihoods.Bernoulli(Scaled())
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))

    return model, guide


def test_graphs_without_products_are_compared_strictly(binary, monkeypatch):
    """A difference of 0.2% is below the rounding of bfloat16."""
    compiling(
        monkeypatch,
        lambda graph: lambda *args: [o if o is None else o * 1.002 for o in graph(*args)],
    )
    with pytest.warns(UserWarning, match="differs from the eager run by"):
        fitted(elementwise_pair, binary, capture=True, precision="medium")


@pytest.mark.parametrize("precision", WORDS)
def test_a_precision_that_was_set_before_the_fit_is_captured(precision, binary, without_compiler):
    with matmul_precision(precision), no_warnings():
        check_same(make_pair, binary, execution="captured, not compiled")
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("changes", ["by a callback", "by an argument"])
def test_a_change_of_precision_ends_the_capture(changes, binary, without_compiler):
    seen = []

    def after_epoch(epoch, row):
        seen.append(torch.get_float32_matmul_precision())
        if epoch == 2:
            torch.set_float32_matmul_precision("high")

    precision = None if changes == "by a callback" else "medium"
    options = {"after_epoch": after_epoch, "precision": precision}
    before = torch.get_float32_matmul_precision()
    try:
        _, expected = fitted(make_pair, binary, capture=False, **options)
        torch.set_float32_matmul_precision(before)
        with pytest.warns(UserWarning, match=f"changed from {precision or before} to high since"):
            fit, tensors = fitted(make_pair, binary, capture=True, **options)
        if precision is not None:
            assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == 2 * ([precision or before] * 2 + ["high"] * 2)
    assert fit.execution.startswith("eager: the precision of float32 matrix products changed")
    assert distance(tensors, expected) < 1e-5


# Products


@needs_compiler
@pytest.mark.parametrize("precision", WORDS)
def test_products_of_compiled_graphs(precision):
    """An error of a unit of rounding in each factor, and of float32 in the sum."""
    a, b = torch.randn(200, 150), torch.randn(150, 100)
    graph = trace(lambda a, b: [a @ b + 1], [a, b]).graph
    with matmul_precision(precision):
        (product,) = compile_graph(graph, [a, b])(a, b)
    error = (product.double() - (a.double() @ b.double() + 1)).abs()
    rounding = 2 * WORDS[precision] + 150 * torch.finfo(torch.float32).eps
    assert (error <= rounding * (a.double().abs() @ b.double().abs() + 1)).all()
