"""The precision of float32 matrix products is set in a block, and densities do not depend on it."""

import contextlib

import pytest
import torch
from rounded_products import rounded

from pyro_vae._utils.precision import (
    current_precision,
    exact_product,
    matmul_precision,
    rounding_of_products,
    shared_precision,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium", None])
def test_the_precision_is_restored_after_an_error(before, precision):
    with matmul_precision(before):
        with contextlib.suppress(KeyError), matmul_precision(precision):
            assert torch.get_float32_matmul_precision() == (precision or before)
            raise KeyError
        assert torch.get_float32_matmul_precision() == before


def test_settings_of_single_backends_are_restored():
    """torch then refuses to name one precision for all backends."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        assert current_precision().startswith("bf16 on the CPU")
        assert shared_precision(None) is None
        with matmul_precision("high"):
            assert backend.fp32_precision == "tf32"
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("precision", ["low", "", 1, True])
def test_other_values_are_refused(precision):
    message = 'precision must be "highest", "high", "medium" or None, got'
    with pytest.raises(ValueError, match=message), matmul_precision(precision):
        pass


def test_rounding_follows_the_precision():
    found = {}
    for precision in ("highest", "high", "medium"):
        with matmul_precision(precision):
            found[precision] = rounding_of_products(CPU)
    # TF32 has 11 bits of significand, bfloat16 has 8. Rounding is half of the last bit.
    assert found == {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-9}


def test_exact_products_have_the_precision_of_float32():
    """Without rounding, the error of a sum of 50 products is below 50 units in the last place."""
    a, b = torch.randn(30, 50), torch.randn(50, 20, requires_grad=True)
    exact = a.double() @ b.double()
    allowed = 50 * torch.finfo(a.dtype).eps * (a.double().abs() @ b.double().abs())
    with rounded() as products:
        plain, product = a @ b, exact_product(a, b)
        (gradient,) = torch.autograd.grad(product.sum(), b)
    assert products.number == 1  # the plain one
    assert ((product - exact).abs() <= allowed).all()
    assert not ((plain - exact).abs() <= allowed).all()
    torch.testing.assert_close(gradient, a.sum(0, keepdim=True).T.expand(-1, 20))
