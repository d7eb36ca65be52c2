"""Matrix products by oneDNN, in compiled graphs."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae._capture import products
from pyro_vae._capture.inductor import compile_graph, rewrite

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def _slow_mkl(monkeypatch):
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)


def number_of_products(graph):
    return sum(node.target is torch.ops.pyro_vae.product.default for node in graph.graph.nodes)


def layer_and_gradients(x, weight, bias, gradient):
    """Return the output of a linear layer, and the gradients of its input and its weights."""
    y = torch.addmm(bias, x, weight.t()).tanh()
    return y, gradient @ weight, gradient.t() @ x


def test_compiled_products_are_right_in_every_layout():
    x, weight, gradient = torch.randn(100, 300), torch.randn(200, 300), torch.randn(100, 200)
    inputs = [x, weight, torch.randn(200), gradient]
    expected = layer_and_gradients(*(tensor.double() for tensor in inputs))
    graph = make_fx(layer_and_gradients)(*inputs)
    assert number_of_products(rewrite(graph, inputs)) == 3
    compiled = compile_graph(graph, inputs)
    for result, exact in zip(compiled(*inputs), expected, strict=True):
        # The error of a sum of 300 products of standard normals, in units of float32's epsilon.
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=300 * 1.2e-7)


def products_of_views(a, b, row, vector):
    """Return products whose factors are views: strided, expanded, flipped, and with an offset."""
    return [
        a[:, ::2] @ b[::2],
        a.chunk(2, 1)[1] @ b.chunk(2, 0)[1],
        a @ row.expand(len(b), 200),
        row.t().expand(200, len(b)) @ b,
        a.flip(1) @ b.flip(0),
        a[:, 1:] @ b[1:],
        a.t() @ b.t().contiguous().t()[:200],
        vector @ vector.t() @ vector,
    ]


def test_compiled_products_of_views():
    inputs = [torch.randn(200, 600), torch.randn(600, 200), torch.randn(1, 200)]
    inputs.append(torch.randn(1, 2000).t())
    expected = products_of_views(*(tensor.double() for tensor in inputs))
    graph = make_fx(products_of_views)(*inputs)
    assert number_of_products(rewrite(graph, inputs)) == len(expected) + 1
    compiled = compile_graph(graph, inputs)
    for result, exact in zip(compiled(*inputs), expected, strict=True):
        size = exact.abs().max().item()
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize(
    "a",
    [
        pytest.param(torch.randn(20, 300), id="small"),
        pytest.param(torch.randn(100, 300).double(), id="float64"),
        pytest.param(torch.randn(100, 300).bfloat16(), id="bfloat16"),
    ],
)
def test_other_products_are_left(a):
    inputs = [a, torch.randn(300, 200).to(a.dtype)]
    graph = rewrite(make_fx(torch.mm)(*inputs), inputs)
    assert number_of_products(graph) == 0


@pytest.mark.parametrize("shapes", [[(0, 300), (300, 200)], [(100, 0), (0, 200)]])
def test_empty_products(shapes):
    inputs = [torch.randn(shape) for shape in shapes]
    graph = rewrite(make_fx(torch.mm)(*inputs), inputs)
    assert torch.equal(graph(*inputs), torch.mm(*inputs))


@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", torch.backends.mkl.is_available()),
        ("vendor_id\t: AuthenticAMD", "AVX2", False),
        ("vendor_id\t: GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_processors_on_which_mkl_is_slow(monkeypatch, vendor, capability, slow):
    monkeypatch.undo()
    monkeypatch.setattr(products, "_processor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products._mkl_is_slow.__wrapped__() is slow
