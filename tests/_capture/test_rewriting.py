"""Operations rewritten for the compiler are equal up to rounding."""

import pytest
import torch
from capturing import needs_compiler
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae._capture.inductor import keep_bernoulli, rewrite


def rewritten(function, *inputs):
    graph = rewrite(make_fx(function)(*inputs), inputs)
    return graph(*inputs), graph.code


def test_tanh_error_is_below_two_units_in_the_last_place():
    sizes = torch.cat([torch.logspace(-40, 2, 20_000), torch.linspace(0.2, 0.4, 20_000)])
    x = torch.cat([sizes, -sizes])
    y, code = rewritten(torch.tanh, x)
    assert "tanh" not in code
    exact = x.double().tanh()
    normal = exact.abs() > torch.finfo(torch.float32).tiny
    error = ((y - exact) / exact).abs()[normal].max() / torch.finfo(torch.float32).eps
    assert error < 2


def test_tanh_of_special_values_matches_torch():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, -1e30])
    y, _ = rewritten(torch.tanh, x)
    torch.testing.assert_close(y, x.tanh(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit()[[0, 1, 3, 4]], x.signbit()[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tanh_of_other_dtypes_is_not_rewritten(dtype):
    x = torch.randn(9, dtype=dtype)
    y, code = rewritten(torch.tanh, x)
    assert "tanh" in code
    assert torch.equal(y, x.tanh())


@pytest.mark.parametrize("factors", [{}, {"beta": 0.5, "alpha": 2.0}])
def test_split_addmm_matches_torch(factors):
    bias, a, b = torch.randn(5), torch.randn(7, 3), torch.randn(3, 5)
    y, code = rewritten(lambda *inputs: torch.addmm(*inputs, **factors), bias, a, b)
    assert ("addmm" in code) == bool(factors)
    torch.testing.assert_close(y, torch.addmm(bias, a, b, **factors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_samples_match_torch(dtype):
    """The samples and the next random numbers are the same, also for transposed p."""
    for p in (torch.rand(40, 7, dtype=dtype), torch.rand(7, 40, dtype=dtype).T):
        graph = rewrite(make_fx(torch.bernoulli)(p), [p])
        assert "bernoulli" not in graph.code
        draws = []
        for draw in (torch.bernoulli, graph):
            torch.manual_seed(0)
            draws.append((draw(p), torch.rand(3)))
        assert torch.equal(draws[0][0], draws[1][0])
        assert torch.equal(draws[0][1], draws[1][1])


def test_writes_in_place_are_kept():
    count, x = torch.zeros(()), torch.randn(4)

    def function(count, x):
        count.add_(1)
        return x.tanh()

    rewritten(function, count, x)
    assert count == 2  # once by the trace, and once by the graph


@needs_compiler
def test_compiled_samples_are_those_of_torch():
    """As on a GPU, where no operation is rewritten. The compiler's own float64 samples differ."""

    def function(p):
        return [torch.bernoulli(p), torch.rand(3), torch.bernoulli(p), torch.bernoulli(p.T)]

    p = torch.rand(20, 10, dtype=torch.float64)
    graph = make_fx(function)(p)
    keep_bernoulli(graph)
    compiled = torch._inductor.compile(graph, [p], {"fallback_random": True})
    results = []
    for each in (compiled, function):
        torch.manual_seed(1)
        results.append([*each(p), torch.get_rng_state()])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
